//! The OCI distribution API over what the node's containerd holds, read-only. Peers pull from it; any client of
//! a registry can.
//!
//! A node reads what the controller granted it, and nothing else; what there is else, it is not told.
//!
//! Names are not checked for blobs: a digest says what it is. A tag means something only together with the
//! registry it is a tag of, which clients of a mirror give as `?ns=`.

mod answer;
mod feed;
mod grants;
mod path;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Query, Request, State};
use axum::response::Response;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use http::{HeaderMap, Method};
use serde::Deserialize;
use tokio::time::Instant;
use tote_image::{Digest, Document, MAX_DOCUMENT_BYTES, Reference};
use tote_rpc::Refusal as Refused;
use tote_rpc::identity::{Peer, Role};

use self::answer::Refusal;
use self::feed::{Turn, Uploads};
pub use self::grants::{GrantError, Grants, blobs_below};
use self::path::{Asked, Path, Version};
use crate::bandwidth::Bandwidth;
use crate::containerd::{ByteStream, Containerd, Error};
use crate::metrics::Metrics;

/// What the API needs.
#[derive(Clone)]
pub struct Served {
    /// The node's containerd.
    pub containerd: Arc<dyn Containerd>,
    /// Where served bytes are counted.
    pub metrics: Arc<Metrics>,
    /// Who may read what.
    pub grants: Grants,
    /// How long a reader may leave a piece that was sent to it.
    pub stall: Duration,
    /// The cap on what is sent, to all readers together.
    pub upload: Bandwidth,
    uploads: Arc<Uploads>,
}

impl Served {
    /// With nothing granted to anybody.
    pub fn new(containerd: Arc<dyn Containerd>, metrics: Arc<Metrics>) -> Self {
        let (grants, upload, uploads) = (Grants::default(), Bandwidth::default(), Arc::default());
        Self { containerd, metrics, grants, stall: STALL, upload, uploads }
    }
}

/// A capped target reads slowly, one that is gone not at all.
const STALL: Duration = Duration::from_secs(120);

/// Who asks.
struct Reader<'a> {
    served: &'a Served,
    node: String,
}

impl Reader<'_> {
    /// Refuses what was not granted to it. Gives what to refuse it with if it is not here: to be asked before that is looked at,
    /// for what is on its way may arrive meanwhile.
    fn may_read(&self, digest: &Digest, unknown: fn(String) -> Refusal) -> Result<Refusal, Refusal> {
        let (grants, now) = (&self.served.grants, Instant::now());
        let coming = grants.coming(&self.node, digest, now).map(Refusal::Coming);
        if grants.allow(&self.node, digest, now) {
            return Ok(coming.unwrap_or_else(|| unknown(digest.to_string())));
        }
        Err(coming.unwrap_or_else(|| self.denied(digest.as_str())))
    }

    async fn turn(&self) -> Result<Turn, Refusal> {
        let busy = || Refusal::Unavailable("this node sends as much as it may at once".to_owned());
        self.served.uploads.turn(&self.node).await.ok_or_else(busy)
    }

    /// A body of these pieces of a blob, which is cut off when the grant ends.
    fn feed(&self, digest: &Digest, pieces: ByteStream, turn: Turn) -> Body {
        let (grants, node, blob) = (self.served.grants.clone(), self.node.clone(), digest.clone());
        let metrics = self.served.metrics.clone();
        let may_read = move || grants.allow(&node, &blob, Instant::now());
        let upload = self.served.upload.clone();
        let pieces = pieces.then(move |piece| {
            let upload = upload.clone();
            async move {
                upload.take(piece.as_ref().map_or(0, Bytes::len)).await;
                piece
            }
        });
        let sent = move |n| metrics.served(n);
        Body::from_stream(feed::feed(pieces.boxed(), turn, may_read, sent, self.served.stall))
    }

    fn denied(&self, what: &str) -> Refusal {
        tracing::debug!(node = self.node, what, "refused: not granted");
        self.served.metrics.refused(Refused::Grant);
        Refusal::Denied
    }
}

#[derive(Debug, Default, Deserialize)]
struct Params {
    ns: Option<String>,
}

/// The API, for every path below `/v2/` and an answer for all others.
pub fn router(served: Served) -> Router {
    Router::new().fallback(handle).with_state(served)
}

async fn handle(State(served): State<Served>, request: Request) -> Response {
    let (parts, _) = request.into_parts();
    if parts.method != Method::GET && parts.method != Method::HEAD {
        return Refusal::ReadOnly.into();
    }
    let Some(Peer { role: Role::Node(node), .. }) = parts.extensions.get::<Peer>() else {
        // The controller has no business here, and there is nobody else.
        served.metrics.refused(Refused::Role);
        return Refusal::Denied.into();
    };
    let reader = Reader { served: &served, node: node.to_string() };
    let params = Query::<Params>::try_from_uri(&parts.uri).map(|params| params.0).unwrap_or_default();
    let answer = match path::parse(parts.uri.path()) {
        Ok(Asked::Version) => Ok(answer::version()),
        Ok(Asked::Manifest(path)) => manifest(&reader, &path, params.ns.as_deref(), &parts.headers).await,
        Ok(Asked::Blob(digest)) => blob(&reader, &digest, &parts.method, &parts.headers).await,
        Err(refusal) => Err(refusal),
    };
    let mut response = answer.unwrap_or_else(Response::from);
    if parts.method == Method::HEAD {
        // The headers, Content-Length among them, stay.
        *response.body_mut() = Body::empty();
    }
    response
}

async fn manifest(
    reader: &Reader<'_>,
    path: &Path,
    ns: Option<&str>,
    headers: &HeaderMap,
) -> Result<Response, Refusal> {
    let digest = match &path.version {
        Version::Digest(digest) => digest.clone(),
        Version::Tag(tag) => resolve(reader, &path.name, tag, ns).await?,
    };
    let absent = reader.may_read(&digest, Refusal::ManifestUnknown)?;
    let served = reader.served;
    let turn = reader.turn().await?;
    let unknown = || Refusal::ManifestUnknown(digest.to_string());
    let found = served.containerd.blob(&digest).await?.ok_or(absent)?;
    if found.size > MAX_DOCUMENT_BYTES {
        return Err(unknown());
    }
    let pieces = served.containerd.read(&digest, 0, found.size).await?;
    let bytes = pieces.try_collect::<Vec<_>>().await?.concat();
    // The document says what it is; a blob that is none is no manifest.
    let document = Document::parse(&bytes).map_err(|_| unknown())?;
    let media_type = document.media_type(&bytes).map_err(|_| unknown())?;
    let length = bytes.len() as u64;
    let range = answer::range(headers, length)?;
    let (from, to) = range.clone().map_or((0, length), |range| (*range.start(), *range.end() + 1));
    let part = usize::try_from(from).unwrap_or_default()..usize::try_from(to).unwrap_or_default();
    let piece = Bytes::copy_from_slice(bytes.get(part).unwrap_or_default());
    let body = reader.feed(&digest, stream::iter([Ok(piece)]).boxed(), turn);
    Ok(answer::content(&digest, &media_type, length, range, body))
}

/// What a tag means here; that there is no such tag is not told from that it is not granted.
async fn resolve(reader: &Reader<'_>, name: &str, tag: &str, ns: Option<&str>) -> Result<Digest, Refusal> {
    let unknown = || reader.denied(&format!("{name}:{tag}"));
    let Some(ns) = ns else {
        let message = format!("{name}:{tag}: a tag is looked up with ?ns=<registry> only");
        return Err(Refusal::ManifestUnknown(message));
    };
    let reference: Reference = format!("{ns}/{name}:{tag}").parse().map_err(|_| unknown())?;
    let record = reader.served.containerd.image(&reference.to_string()).await?.ok_or_else(unknown)?;
    Ok(record.target.digest)
}

async fn blob(
    reader: &Reader<'_>,
    digest: &Digest,
    method: &Method,
    headers: &HeaderMap,
) -> Result<Response, Refusal> {
    let absent = reader.may_read(digest, Refusal::BlobUnknown)?;
    let served = reader.served;
    let found = served.containerd.blob(digest).await?.ok_or_else(|| absent.clone())?;
    let range = answer::range(headers, found.size)?;
    let (from, to) = range.clone().map_or((0, found.size), |range| (*range.start(), *range.end() + 1));
    if method == Method::HEAD {
        // Nothing is sent, so it needs no turn.
        return Ok(answer::content(digest, "application/octet-stream", found.size, range, Body::empty()));
    }
    let turn = reader.turn().await?;
    let pieces = match served.containerd.read(digest, from, to - from).await {
        Err(Error::NotFound(_)) => return Err(absent),
        other => other?,
    };
    let body = reader.feed(digest, pieces, turn);
    Ok(answer::content(digest, "application/octet-stream", found.size, range, body))
}

#[cfg(test)]
mod tests;
