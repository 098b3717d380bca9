//! Peers that serve an image by the real distribution API, and do as they are told with some blobs.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytes::Bytes;
use futures::{StreamExt, stream};
use http::StatusCode;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tote_agent::bandwidth::Bandwidth;
use tote_agent::containerd::Fake;
use tote_agent::import::{Context, ImportRequest, Imports, Lifetimes, Patience, TransferId};
use tote_agent::metrics::Metrics;
use tote_agent::serve::{Grants, Served, router};
use tote_agent::testing::Blobs;
use tote_image::Digest;
use tote_rpc::testing::{NoAgent, Pki};
use tote_rpc::v1::{self, import_event::Event};
use tower::ServiceExt;

/// Signs for all of these tests.
pub static PKI: LazyLock<Pki> = LazyLock::new(Pki::new);

/// The node that imports.
pub const READER: &str = "target";

/// What a peer does when it is asked for a blob.
#[derive(Clone, Debug)]
pub enum Trick {
    /// Other bytes of the same length.
    Wrong,
    /// The first bytes, then the connection breaks.
    Cut(usize),
    /// The same with every third request.
    CutThird(usize),
    /// Other bytes, so many, then the connection breaks.
    WrongCut(usize),
    /// The first bytes, then nothing more comes.
    Stall(usize),
    /// Bytes without end, and no Content-Length.
    Endless,
    /// Fewer bytes than the blob has, as if that were all.
    Short(usize),
    /// All of it, and says that the blob has so many bytes more, or fewer.
    Sized(i64),
    /// These bytes as all of it.
    Given(Bytes),
    /// Nothing, not even a head.
    Hang,
    /// All of it, so many bytes a second.
    Slow(u64),
    /// This status.
    Status(u16),
    /// To another address.
    Redirect(SocketAddr),
}

/// A peer on loopback.
pub struct Peer {
    pub node: String,
    pub address: SocketAddr,
    pub fake: Fake,
    grants: Grants,
    tricks: Arc<Mutex<HashMap<Digest, Trick>>>,
    asked: Arc<Mutex<HashMap<Digest, Vec<u64>>>>,
}

impl Peer {
    pub async fn holding(image: &Blobs, name: &str) -> Self {
        let fake = Fake::default();
        image.pull_into(&fake, name);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tricks: Arc<Mutex<HashMap<Digest, Trick>>> = Arc::default();
        let asked: Arc<Mutex<HashMap<Digest, Vec<u64>>>> = Arc::default();
        let served = Served::new(Arc::new(fake.clone()), Arc::default());
        let grants = served.grants.clone();
        let api = router(served);
        let (tricking, counting) = (tricks.clone(), asked.clone());
        let app = axum::Router::new().fallback(move |request: Request| {
            let last = request.uri().path().rsplit('/').next().and_then(|last| last.parse::<Digest>().ok());
            let from = request.headers().get("range").map_or(0, |range| {
                let range = range.to_str().unwrap().trim_start_matches("bytes=");
                range.split_once('-').unwrap().0.parse().unwrap()
            });
            let trick = last.and_then(|digest| {
                let nth = {
                    let mut counting = counting.lock().unwrap();
                    let offsets = counting.entry(digest.clone()).or_default();
                    offsets.push(from);
                    offsets.len()
                };
                let trick = tricking.lock().unwrap().get(&digest).cloned();
                trick.filter(|trick| !matches!(trick, Trick::CutThird(_)) || nth % 3 == 0)
            });
            let answer = api.clone().oneshot(request);
            async move {
                let answer = answer.await.unwrap();
                match trick {
                    Some(trick) => perform(trick, answer).await,
                    None => answer,
                }
            }
        });
        let node = format!("node-{}", address.port());
        let identity = PKI.node(&node, "127.0.0.1");
        let (refusals, stop) = (Arc::new(|_| {}), CancellationToken::new());
        tokio::spawn(tote_rpc::serve(listener, identity, NoAgent, app, refusals, stop));
        let peer = Self { node, address, fake, grants, tricks, asked };
        peer.let_read(READER, image);
        peer
    }

    /// Lets a node read an image's blobs.
    pub fn let_read(&self, reader: &str, image: &Blobs) {
        let now = Instant::now();
        let until = now + Duration::from_secs(600);
        let (blobs, id) = (image.digests().into_iter().collect(), format!("for-{reader}"));
        self.grants.give(TransferId::parse(&id).unwrap(), reader.to_owned(), blobs, until, now).unwrap();
    }

    /// Plays a trick whenever it is asked for a blob.
    pub fn trick(&self, digest: &Digest, trick: Trick) {
        self.tricks.lock().unwrap().insert(digest.clone(), trick);
    }

    pub fn behave(&self) {
        self.tricks.lock().unwrap().clear();
    }

    /// How often it was asked for a blob.
    pub fn asked(&self, digest: &Digest) -> usize {
        self.asked.lock().unwrap().get(digest).map_or(0, Vec::len)
    }

    /// From which offsets it was asked for a blob.
    pub fn offsets(&self, digest: &Digest) -> Vec<u64> {
        self.asked.lock().unwrap().get(digest).cloned().unwrap_or_default()
    }
}

/// A peer's second address, where it can be away for a while.
pub struct Door {
    pub address: SocketAddr,
    open: watch::Sender<bool>,
}

impl Door {
    pub async fn of(peer: &Peer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (open, to) = (watch::Sender::new(true), peer.address);
        let is_open = open.subscribe();
        tokio::spawn(async move {
            loop {
                let (mut from, _) = listener.accept().await.unwrap();
                let mut is_open = is_open.clone();
                if !*is_open.borrow() {
                    continue;
                }
                tokio::spawn(async move {
                    let passing = async {
                        let mut on = TcpStream::connect(to).await?;
                        tokio::io::copy_bidirectional(&mut from, &mut on).await
                    };
                    tokio::select! {
                        _ = passing => {}
                        _ = is_open.wait_for(|open| !open) => {}
                    }
                });
            }
        });
        Self { address, open }
    }

    /// Breaks every connection, and takes none any more.
    pub fn shut(&self) {
        self.open.send_replace(false);
    }

    pub fn open(&self) {
        self.open.send_replace(true);
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        // One listens.
        self.open.receiver_count() - 1
    }
}

async fn perform(trick: Trick, answer: Response) -> Response {
    let (mut parts, body) = answer.into_parts();
    let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap();
    let first = |count: usize| Ok::<_, std::io::Error>(bytes.slice(..count.min(bytes.len())));
    let body = match trick {
        Trick::Wrong => Body::from(vec![0x55; bytes.len()]),
        Trick::Cut(_) | Trick::CutThird(_) | Trick::WrongCut(_) => {
            let first = match trick {
                Trick::WrongCut(count) => Ok(Bytes::from(vec![0x55; count.min(bytes.len())])),
                Trick::Cut(count) | Trick::CutThird(count) => first(count),
                _ => first(0),
            };
            let cut = stream::once(async {
                // So that the first bytes are out when the connection breaks.
                tokio::time::sleep(Duration::from_millis(50)).await;
                Err(std::io::Error::other("cut"))
            });
            Body::from_stream(stream::iter([first]).chain(cut))
        }
        Trick::Stall(count) => Body::from_stream(stream::iter([first(count)]).chain(stream::pending())),
        Trick::Endless => {
            parts.headers.remove("content-length");
            let piece = || Ok::<_, std::io::Error>(Bytes::from_static(&[7; 4096]));
            Body::from_stream(stream::repeat_with(piece))
        }
        Trick::Short(count) => {
            parts.headers.remove("content-length");
            Body::from_stream(stream::iter([first(count)]))
        }
        Trick::Sized(more) => {
            let changed = |bytes: u64| bytes.checked_add_signed(more).unwrap();
            let length = |bytes: usize| usize::try_from(changed(bytes as u64)).unwrap();
            if let Some(range) = parts.headers.get("content-range") {
                let (range, all) = range.to_str().unwrap().rsplit_once('/').unwrap();
                let range = format!("{range}/{}", changed(all.parse().unwrap()));
                parts.headers.insert("content-range", range.parse().unwrap());
                Body::from(bytes)
            } else {
                let mut all = bytes.to_vec();
                all.resize(length(bytes.len()), 0);
                parts.headers.insert("content-length", all.len().into());
                Body::from(all)
            }
        }
        Trick::Given(given) => {
            parts.status = StatusCode::OK;
            parts.headers.insert("content-length", given.len().into());
            Body::from(given)
        }
        Trick::Hang => std::future::pending().await,
        Trick::Slow(rate) => {
            let piece = usize::try_from(rate / 50).unwrap();
            let pieces: Vec<Bytes> = bytes.chunks(piece).map(Bytes::copy_from_slice).collect();
            Body::from_stream(stream::iter(pieces).then(|piece| async {
                tokio::time::sleep(Duration::from_millis(20)).await;
                Ok::<_, std::io::Error>(piece)
            }))
        }
        Trick::Redirect(to) => {
            parts.status = StatusCode::TEMPORARY_REDIRECT;
            parts.headers.remove("content-length");
            parts.headers.insert("location", format!("https://{to}/v2/x/blobs/y").parse().unwrap());
            Body::empty()
        }
        Trick::Status(status) => {
            parts.status = StatusCode::from_u16(status).unwrap();
            parts.headers.remove("content-length");
            Body::from("no")
        }
    };
    Response::from_parts(parts, body)
}

/// What the tests wait for is short.
pub const PATIENCE: Patience = Patience {
    head: Duration::from_millis(800),
    piece: Duration::from_millis(500),
    pause: Duration::from_millis(20),
    rounds: 3,
    growth: Duration::from_millis(500),
};

pub const LIFETIMES: Lifetimes =
    Lifetimes { abandoned: Duration::from_millis(150), remembered: Duration::from_secs(600) };

pub fn agent(fake: &Fake) -> Arc<Imports> {
    agent_with(fake, Bandwidth::default(), Lifetimes::default())
}

pub fn agent_with(fake: &Fake, bandwidth: Bandwidth, lifetimes: Lifetimes) -> Arc<Imports> {
    Arc::new(Imports::new(context(fake, bandwidth), lifetimes))
}

pub fn context(fake: &Fake, bandwidth: Bandwidth) -> Context {
    let peers = tote_rpc::blob_client(&PKI.node(READER, "127.0.0.1")).unwrap();
    let visible_within = Duration::from_millis(200);
    let context = Context::new(Arc::new(fake.clone()), peers, bandwidth);
    Context { patience: PATIENCE, visible_within, ..context }
}

/// The lines of one of an agent's counters.
pub fn counted(metrics: &Metrics, name: &str) -> Vec<String> {
    let (mut registry, mut text) = (Registry::default(), String::new());
    metrics.register(&mut registry);
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    text.lines().filter(|line| line.starts_with(name)).map(str::to_owned).collect()
}

pub fn request(id: &str, name: &str, image: &Blobs, peers: &[&Peer]) -> ImportRequest {
    let source = |peer: &&Peer| v1::Source {
        node_name: peer.node.clone(),
        address: peer.address.to_string(),
        ..v1::Source::default()
    };
    let request = v1::ImportRequest {
        term: None,
        transfer_id: id.to_owned(),
        reference: name.to_owned(),
        digest: image.target.digest.to_string(),
        sources: peers.iter().map(source).collect(),
        pulled: None,
        max_bytes: 0,
    };
    request.try_into().unwrap()
}

/// Imports and waits for the end, as the wire tells it.
pub async fn import(imports: &Imports, request: ImportRequest) -> Result<v1::Done, v1::Failed> {
    let mut attached = imports.attach(request).unwrap();
    let ended = attached.states.wait_for(|state| state.outcome.is_some());
    let state = tokio::time::timeout(Duration::from_secs(30), ended).await.expect("an end").unwrap().clone();
    match v1::ImportEvent::from(&state).event {
        Some(Event::Done(done)) => Ok(done),
        Some(Event::Failed(failed)) => Err(failed),
        other => panic!("no end: {other:?}"),
    }
}
