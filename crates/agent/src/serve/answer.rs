//! Responses of the distribution API: content with its headers, and errors as the specification words them.

use std::ops::RangeInclusive;

use axum::body::Body;
use axum::response::Response;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde_json::json;
use tote_image::Digest;

use crate::containerd::Error;
use crate::import::Arrived;

/// Why nothing is given.
#[derive(Clone, Debug)]
pub(super) enum Refusal {
    ReadOnly,
    /// It was not granted to whoever asks.
    Denied,
    NotFound(String),
    NameInvalid(String),
    DigestInvalid(String),
    ManifestUnknown(String),
    BlobUnknown(String),
    /// The blob's size, for a range beyond it.
    Range(u64),
    Unavailable(String),
    /// It is on its way here.
    Coming(Arrived),
}

impl Refusal {
    /// The error code (distribution specification, "Error Codes").
    pub(super) fn code(&self) -> &'static str {
        match self {
            Self::ReadOnly => "UNSUPPORTED",
            Self::Denied => "DENIED",
            Self::NotFound(_) => "NOT_FOUND",
            Self::NameInvalid(_) => "NAME_INVALID",
            Self::DigestInvalid(_) => "DIGEST_INVALID",
            Self::ManifestUnknown(_) => "MANIFEST_UNKNOWN",
            Self::BlobUnknown(_) => "BLOB_UNKNOWN",
            Self::Range(_) => "RANGE_INVALID",
            Self::Unavailable(_) | Self::Coming(_) => "UNAVAILABLE",
        }
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::ReadOnly => StatusCode::METHOD_NOT_ALLOWED,
            Self::Denied => StatusCode::FORBIDDEN,
            Self::NotFound(_) | Self::ManifestUnknown(_) | Self::BlobUnknown(_) => StatusCode::NOT_FOUND,
            Self::NameInvalid(_) | Self::DigestInvalid(_) => StatusCode::BAD_REQUEST,
            Self::Range(_) => StatusCode::RANGE_NOT_SATISFIABLE,
            Self::Unavailable(_) | Self::Coming(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    fn message(&self) -> String {
        match self {
            Self::ReadOnly => "this registry is read-only".to_owned(),
            Self::Denied => "the controller has not granted this to the caller".to_owned(),
            Self::NotFound(path) => format!("no such path: {path}"),
            Self::NameInvalid(name) => format!("not a repository name: {name}"),
            Self::ManifestUnknown(what) => format!("no such manifest on this node: {what}"),
            Self::BlobUnknown(what) => format!("no such blob on this node: {what}"),
            Self::Range(size) => format!("the range lies beyond the blob's {size} bytes"),
            Self::Coming(_) => "it is on its way to this node".to_owned(),
            Self::DigestInvalid(reason) | Self::Unavailable(reason) => reason.clone(),
        }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Unavailable(error.to_string())
    }
}

impl From<Refusal> for Response {
    fn from(refusal: Refusal) -> Self {
        let body = json!({"errors": [{"code": refusal.code(), "message": refusal.message()}]}).to_string();
        let mut response = with_version(Self::new(Body::from(body)));
        *response.status_mut() = refusal.status();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        match refusal {
            Refusal::ReadOnly => {
                headers.insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            }
            Refusal::Range(size) => set(headers, header::CONTENT_RANGE, &format!("bytes */{size}")),
            Refusal::Coming(arrived) => {
                set(headers, header::HeaderName::from_static(Arrived::HEADER), &arrived.to_string());
            }
            _ => {}
        }
        response
    }
}

/// The answer to `/v2/`.
pub(super) fn version() -> Response {
    let mut response = with_version(Response::new(Body::from("{}")));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// The one range that is asked for, if any. More than one, or what is no byte range, is answered in full, as
/// RFC 9110 (section 14.2) allows.
pub(super) fn range(headers: &HeaderMap, size: u64) -> Result<Option<RangeInclusive<u64>>, Refusal> {
    let Some(asked) = headers.get(header::RANGE).and_then(|range| range.to_str().ok()) else {
        return Ok(None);
    };
    let Ok(parsed) = http_range_header::parse_range_header(asked) else { return Ok(None) };
    let mut ranges = parsed.validate(size).map_err(|_| Refusal::Range(size))?;
    Ok(if ranges.len() == 1 { ranges.pop() } else { None })
}

/// A blob of `size` bytes, or the part of it that is asked for.
pub(super) fn content(
    digest: &Digest,
    media_type: &str,
    size: u64,
    range: Option<RangeInclusive<u64>>,
    body: Body,
) -> Response {
    let mut response = with_version(Response::new(body));
    let mut length = size;
    if let Some(range) = range {
        let (from, to) = range.into_inner();
        length = to - from + 1;
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        set(response.headers_mut(), header::CONTENT_RANGE, &format!("bytes {from}-{to}/{size}"));
    }
    let headers = response.headers_mut();
    set(headers, header::CONTENT_LENGTH, &length.to_string());
    set(headers, header::CONTENT_TYPE, media_type);
    set(headers, header::ETAG, &format!("\"{digest}\""));
    set(headers, header::HeaderName::from_static("docker-content-digest"), digest.as_str());
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    response
}

fn set(headers: &mut HeaderMap, name: header::HeaderName, value: &str) {
    if let Ok(value) = value.parse() {
        headers.insert(name, value);
    }
}

fn with_version(mut response: Response) -> Response {
    let version = HeaderValue::from_static("registry/2.0");
    response.headers_mut().insert("docker-distribution-api-version", version);
    response
}
