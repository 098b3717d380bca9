//! Getting a blob from one peer by the OCI distribution API. The peer is hostile until the digest was checked:
//! it may answer anything, stop, or never end.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::HeaderName;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use thiserror::Error;
use tokio::time::timeout;
use tote_image::{Digest, Reference};
use tote_rpc::BlobClient;
use tote_rpc::identity::{Peer, Role};

use super::request::Source;
use super::underway::Arrived;

/// Bytes that are gathered before they are written: containerd takes pieces of 1 MiB and more best.
const PIECE: usize = 1 << 20;

/// How patient to be with a peer.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For the head of the response.
    pub head: Duration,
    /// For a piece of 1 MiB, or whatever remains: slower peers count as dead.
    pub piece: Duration,
    /// The first pause between two rounds over all sources; it doubles.
    pub pause: Duration,
    /// How many rounds.
    pub rounds: u32,
    /// For an image to grow at a source that is getting it itself, if only by a byte.
    pub growth: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            head: Duration::from_secs(10),
            piece: Duration::from_secs(30),
            pause: Duration::from_millis(200),
            rounds: 4,
            growth: Duration::from_secs(20),
        }
    }
}

/// Why a peer did not give a blob.
#[derive(Clone, Debug, Error)]
pub enum FetchError {
    /// It does not hold it.
    #[error("does not hold it")]
    Missing,
    /// It does not hold it yet, but a transfer brings it there.
    #[error("is getting it itself")]
    Coming(Arrived),
    /// It does not let this node have the image; of others that says nothing.
    #[error("refuses: the controller has not granted this node to read it")]
    Refused,
    /// It could not be asked, or broke off.
    #[error("{0}")]
    Broken(String),
    /// What it gave cannot be the blob.
    #[error("{0}")]
    Wrong(String),
    /// It says that the blob has another length. Whether it lies or the image does shows once the blob is had.
    #[error("says that it has {has} bytes, and {due} are due")]
    Disputed {
        /// What it says.
        has: u64,
        /// What the image says, or the most that is taken.
        due: u64,
    },
}

/// Which of the API's two paths a blob is asked for by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An index or manifest.
    Manifest,
    /// A config or layer.
    Blob,
}

/// A response that is being read.
#[derive(Debug)]
pub struct Body {
    incoming: Incoming,
    /// What may still come: of a known size exactly, otherwise at most.
    left: u64,
    exact: bool,
    gathered: BytesMut,
    /// Of what came last what the piece had no room for.
    rest: Bytes,
    ended: bool,
    /// What ended it: told once all that came before has been given out, for that need not be sent again.
    broken: Option<FetchError>,
    patience: Patience,
}

/// What of a blob is asked for.
#[derive(Clone, Copy, Debug)]
pub enum Span {
    /// All of it: so many bytes.
    Whole(u64),
    /// All of it, however much that is, up to so many bytes.
    Unknown(u64),
    /// `length` bytes from `from` on, and not all of it.
    Part {
        /// The offset of the first.
        from: u64,
        /// How many.
        length: u64,
        /// Of so many in all.
        of: u64,
    },
}

impl Span {
    /// `length` bytes from `from` on, of a blob of `size` bytes.
    pub fn of(size: u64, from: u64, length: u64) -> Self {
        if from == 0 && length == size { Self::Whole(size) } else { Self::Part { from, length, of: size } }
    }

    /// The bytes that are due, or at most are.
    fn most(self) -> u64 {
        match self {
            Self::Whole(length) | Self::Unknown(length) | Self::Part { length, .. } => length,
        }
    }

    fn is_exact(self) -> bool {
        !matches!(self, Self::Unknown(_))
    }
}

/// Asks `source` for a blob or a part of it.
pub async fn open(
    peers: &BlobClient,
    source: &Source,
    reference: &Reference,
    wanted: (Kind, &Digest),
    span: Span,
    patience: Patience,
) -> Result<Body, FetchError> {
    let part = match span {
        Span::Part { from, length, .. } => Some((from, length)),
        Span::Whole(_) | Span::Unknown(_) => None,
    };
    let response = ask(peers, source, reference, (Method::GET, wanted, part), patience).await?;
    let length = header_of(&response, &header::CONTENT_LENGTH).and_then(|length| length.parse::<u64>().ok());
    let range = header_of(&response, &header::CONTENT_RANGE);
    let all = range.and_then(|range| range.rsplit_once('/')?.1.parse::<u64>().ok());
    match (response.status(), span) {
        (StatusCode::OK, Span::Whole(_) | Span::Unknown(_)) => {}
        (StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE, Span::Part { of, .. })
            if all.is_some_and(|all| all != of) =>
        {
            return Err(FetchError::Disputed { has: all.unwrap_or_default(), due: of });
        }
        (StatusCode::PARTIAL_CONTENT, Span::Part { from, length, .. }) => {
            let due = format!("bytes {from}-{}/", from + length - 1);
            if !range.is_some_and(|range| range.starts_with(&due)) {
                return Err(FetchError::Wrong("answered another range than was asked for".to_owned()));
            }
        }
        (status, _) => return Err(FetchError::Broken(format!("answered {status}"))),
    }
    let left = span.most();
    if let Some(length) = length.filter(|length| *length > left || (span.is_exact() && *length != left)) {
        return Err(match span {
            Span::Part { .. } => FetchError::Wrong(format!("announced {length} bytes where {left} are due")),
            Span::Whole(due) | Span::Unknown(due) => FetchError::Disputed { has: length, due },
        });
    }
    let incoming = response.into_body();
    let (gathered, rest) = (BytesMut::new(), Bytes::new());
    Ok(Body { incoming, left, exact: span.is_exact(), gathered, rest, ended: false, broken: None, patience })
}

/// Asks `source` whether it would give a blob.
pub async fn look(
    peers: &BlobClient,
    source: &Source,
    reference: &Reference,
    wanted: (Kind, &Digest),
    patience: Patience,
) -> Result<(), FetchError> {
    let response = ask(peers, source, reference, (Method::HEAD, wanted, None), patience).await?;
    match response.status() {
        StatusCode::OK => Ok(()),
        status => Err(FetchError::Broken(format!("answered {status}"))),
    }
}

/// An answer of the agent that is meant, and of nobody else, which does not say that it gives nothing.
async fn ask(
    peers: &BlobClient,
    source: &Source,
    reference: &Reference,
    (method, (kind, digest), part): (Method, (Kind, &Digest), Option<(u64, u64)>),
    patience: Patience,
) -> Result<Response<Incoming>, FetchError> {
    let (address, name) = (source.address, path(reference));
    let what = if kind == Kind::Manifest { "manifests" } else { "blobs" };
    let uri = format!("https://{address}/v2/{name}/{what}/{digest}?ns={}", reference.registry());
    let mut request = Request::builder().method(method).uri(uri);
    if let Some((from, length)) = part {
        request = request.header(header::RANGE, format!("bytes={from}-{}", from + length - 1));
    }
    let request = request.body(Empty::new()).map_err(|error| FetchError::Broken(error.to_string()))?;
    let response = timeout(patience.head, peers.request(request))
        .await
        .map_err(|_| FetchError::Broken(format!("no answer within {} s", patience.head.as_secs_f32())))?
        .map_err(|error| FetchError::Broken(told(&error)))?;
    match response.extensions().get::<Peer>().map(|peer| &peer.role) {
        Some(Role::Node(name)) if **name == *source.node => {}
        other => {
            let who = other.map_or_else(|| "nobody that is known".to_owned(), ToString::to_string);
            return Err(FetchError::Broken(format!("at {address} is {who}, not the agent of that node")));
        }
    }
    match response.status() {
        StatusCode::NOT_FOUND => Err(FetchError::Missing),
        StatusCode::FORBIDDEN => Err(FetchError::Refused),
        StatusCode::SERVICE_UNAVAILABLE => {
            let arrived = header_of(&response, &HeaderName::from_static(Arrived::HEADER));
            Err(match arrived.and_then(Arrived::parse) {
                Some(arrived) => FetchError::Coming(arrived),
                None => FetchError::Broken(format!("answered {}", StatusCode::SERVICE_UNAVAILABLE)),
            })
        }
        _ => Ok(response),
    }
}

fn header_of<'a>(response: &'a Response<Incoming>, name: &HeaderName) -> Option<&'a str> {
    response.headers().get(name)?.to_str().ok()
}

impl Body {
    /// The next piece; nothing when all has come.
    pub async fn next(&mut self) -> Result<Option<Bytes>, FetchError> {
        let deadline = tokio::time::Instant::now() + self.patience.piece;
        loop {
            self.gather();
            if self.gathered.len() == PIECE || self.ended {
                break;
            }
            match tokio::time::timeout_at(deadline, self.incoming.frame()).await {
                Err(_) => {
                    let within = self.patience.piece.as_secs_f32();
                    self.end(FetchError::Broken(format!("less than 1 MiB came within {within} s")));
                }
                Ok(None) => self.ended = true,
                Ok(Some(Err(error))) => self.end(FetchError::Broken(told(&error))),
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        if data.len() as u64 > self.left {
                            return Err(FetchError::Wrong("sent more bytes than the blob has".to_owned()));
                        }
                        self.left -= data.len() as u64;
                        self.rest = data;
                    }
                }
            }
        }
        if self.gathered.is_empty() {
            if let Some(error) = self.broken.take() {
                return Err(error);
            }
            return if self.exact && self.left > 0 {
                // A connection that breaks says so.
                Err(FetchError::Wrong(format!("ended {} bytes early, as if that were all", self.left)))
            } else {
                Ok(None)
            };
        }
        Ok(Some(std::mem::take(&mut self.gathered).freeze()))
    }

    /// Moves what came into the piece, as far as that has room. A piece has all its room from the start: it never grows.
    fn gather(&mut self) {
        if self.rest.is_empty() {
            return;
        }
        if self.gathered.capacity() == 0 {
            let due = usize::try_from(self.left).unwrap_or(PIECE).saturating_add(self.rest.len());
            self.gathered.reserve(due.min(PIECE));
        }
        let taken = self.rest.len().min(PIECE - self.gathered.len());
        self.gathered.extend_from_slice(&self.rest.split_to(taken));
    }

    /// Nothing more is read; what has come is given out, and then the reason.
    pub fn end(&mut self, reason: FetchError) {
        self.ended = true;
        self.broken.get_or_insert(reason);
    }
}

/// The repository without its registry, as the distribution API names it.
fn path(reference: &Reference) -> &str {
    reference.repository().split_once('/').map_or("", |(_, path)| path)
}

/// An error with its cause, which is where hyper says what happened.
fn told(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => told(source),
        None => error.to_string(),
    }
}
