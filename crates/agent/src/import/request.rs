//! What an import is asked to do, validated at the edge.

use std::net::SocketAddr;

use thiserror::Error;
use tote_image::{Digest, Reference};
use tote_rpc::v1;

use crate::kubelet::Restriction;

/// The most sources that a request may name.
const MAX_SOURCES: usize = 64;

/// The name of a transfer: 1 to 63 of `[a-z0-9-]`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransferId(String);

/// An agent that is to give blobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its node: what its certificate must say.
    pub node: String,
    /// Where its distribution API listens.
    pub address: SocketAddr,
    /// Whether it is to be asked only where no other gives what is wanted.
    pub last_resort: bool,
    /// Whether its node is getting the image itself, and gives each blob once that is committed there.
    pub relay: bool,
}

/// What to import.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The record to make.
    pub reference: Reference,
    /// The record's target.
    pub digest: Digest,
}

/// A request in full.
#[derive(Clone, Debug)]
pub struct ImportRequest {
    /// The transfer to start or attach to.
    pub id: TransferId,
    /// What it imports.
    pub wanted: Wanted,
    /// Where from, best first. None are needed for what the node holds.
    pub sources: Vec<Source>,
    /// Who alone may have it; `None` restricts nothing.
    pub restriction: Option<Restriction>,
    /// The most bytes that it may have.
    pub max_bytes: Option<u64>,
}

/// Which field of a request is wrong, and how.
#[derive(Debug, Error)]
#[error("{field} {value:?}: {reason}")]
pub struct RequestError {
    field: &'static str,
    value: String,
    reason: String,
}

impl RequestError {
    /// A field whose value is wrong.
    pub fn new(field: &'static str, value: &str, reason: &dyn std::fmt::Display) -> Self {
        wrong(field, value, reason)
    }
}

fn wrong(field: &'static str, value: &str, reason: &dyn std::fmt::Display) -> RequestError {
    RequestError { field, value: value.chars().take(300).collect(), reason: reason.to_string() }
}

impl TransferId {
    /// The name as it was given.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Parses the field `transfer_id`.
    pub fn parse(id: &str) -> Result<Self, RequestError> {
        let fits = (1..=63).contains(&id.len());
        if !fits || !id.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-')) {
            return Err(wrong("transfer_id", id, &"must be 1 to 63 of a-z, 0-9 and -"));
        }
        Ok(Self(id.to_owned()))
    }
}

impl TryFrom<v1::ImportRequest> for ImportRequest {
    type Error = RequestError;

    fn try_from(request: v1::ImportRequest) -> Result<Self, RequestError> {
        let id = TransferId::parse(&request.transfer_id)?;
        let reference: Reference =
            request.reference.parse().map_err(|error| wrong("reference", &request.reference, &error))?;
        if reference.to_string() != request.reference {
            let reason = format!("is not normalized, {reference} is");
            return Err(wrong("reference", &request.reference, &reason));
        }
        let digest: Digest =
            request.digest.parse().map_err(|error| wrong("digest", &request.digest, &error))?;
        if reference.digest().is_some_and(|pinned| *pinned != digest) {
            let reason = format!("differs from the digest in the reference {reference}");
            return Err(wrong("digest", &request.digest, &reason));
        }
        if request.sources.len() > MAX_SOURCES {
            let reason = format!("at most {MAX_SOURCES} are taken");
            return Err(wrong("sources", &request.sources.len().to_string(), &reason));
        }
        let sources = request.sources.into_iter().map(|source| {
            let address = source.address.parse().map_err(|_| {
                wrong("sources.address", &source.address, &"must be ip:port, as in 10.0.0.7:9090")
            })?;
            let (last_resort, relay) = (source.last_resort, source.relay);
            Ok(Source { node: source.node_name, address, last_resort, relay })
        });
        let sources = sources.collect::<Result<_, _>>()?;
        let restriction = request.pulled.map(|pulled| Restriction::parse(pulled, &reference)).transpose();
        let restriction = restriction.map_err(|(field, value, reason)| wrong(field, &value, &reason))?;
        let max_bytes = match u64::try_from(request.max_bytes) {
            Ok(0) => None,
            Ok(most) => Some(most),
            Err(_) => {
                return Err(wrong("max_bytes", &request.max_bytes.to_string(), &"must not be negative"));
            }
        };
        Ok(Self { id, wanted: Wanted { reference, digest }, sources, restriction, max_bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(address: &str) -> v1::Source {
        v1::Source { node_name: "n".to_owned(), address: address.to_owned(), ..v1::Source::default() }
    }

    fn request() -> v1::ImportRequest {
        let digest = Digest::sha256(b"x").to_string();
        v1::ImportRequest {
            term: None,
            transfer_id: "t-1".to_owned(),
            reference: format!("registry.test/a/b@{digest}"),
            digest,
            sources: vec![source("10.0.0.7:9090")],
            pulled: None,
            max_bytes: 0,
        }
    }

    #[test]
    fn takes_a_good_one() {
        let parsed = ImportRequest::try_from(request()).unwrap();
        assert_eq!(parsed.sources[0].address.port(), 9090);
        assert!(ImportRequest::try_from(v1::ImportRequest { sources: vec![], ..request() }).is_ok());
    }

    #[test]
    fn says_which_field_is_wrong() {
        let other = Digest::sha256(b"y").to_string();
        let cases: Vec<(v1::ImportRequest, &str)> = vec![
            (v1::ImportRequest { transfer_id: String::new(), ..request() }, "transfer_id \"\""),
            (v1::ImportRequest { transfer_id: "a/b".to_owned(), ..request() }, "transfer_id \"a/b\""),
            (v1::ImportRequest { transfer_id: "a".repeat(64), ..request() }, "transfer_id"),
            (
                v1::ImportRequest { reference: "nginx".to_owned(), ..request() },
                "docker.io/library/nginx:latest is",
            ),
            (v1::ImportRequest { reference: "a b".to_owned(), ..request() }, "reference \"a b\""),
            (v1::ImportRequest { digest: "sha256:12".to_owned(), ..request() }, "digest \"sha256:12\""),
            (v1::ImportRequest { max_bytes: -1, ..request() }, "max_bytes \"-1\""),
            (v1::ImportRequest { digest: other, ..request() }, "differs from the digest in the reference"),
            (
                v1::ImportRequest { sources: vec![source("somewhere")], ..request() },
                "sources.address \"somewhere\"",
            ),
            (v1::ImportRequest { sources: vec![source("10.0.0.1:1"); 65], ..request() }, "sources \"65\""),
        ];
        for (request, says) in cases {
            let said = ImportRequest::try_from(request).unwrap_err().to_string();
            assert!(said.contains(says), "{said}, which should say {says}");
        }
    }
}
