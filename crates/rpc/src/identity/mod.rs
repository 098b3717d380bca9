//! Who is who: roles as certificates state them, the authority that signs them, and a program's own identity.
//!
//! A role is the one URI among a certificate's subject alternative names (RFC 5280, section 4.2.1.6), written as a
//! SPIFFE ID. A certificate without one has no role, whoever signed it.

mod authority;
mod own;
mod trust;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::CertificateDer;
use thiserror::Error;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

#[cfg(feature = "testing")]
pub(crate) use authority::serial;
pub use authority::{Authority, AuthorityError};
pub use own::{Identity, InstallError, Unverified};
pub use trust::{Authorities, BundleError};

/// How far certificates are backdated: clocks of nodes may differ by half of it.
pub const BACKDATED: Duration = Duration::from_secs(600);

const CONTROLLER: &str = "spiffe://tote.dev/controller";
const NODE: &str = "spiffe://tote.dev/node/";

/// What a certificate allows.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// To call agents: `spiffe://tote.dev/controller`.
    Controller,
    /// To serve a node's blobs, and to read what was granted to that node: `spiffe://tote.dev/node/<name>`.
    Node(Arc<str>),
}

/// Why a certificate gives nobody a role.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RoleError {
    /// It is no X.509 certificate.
    #[error("malformed certificate")]
    Malformed,
    /// It has no URI, or several.
    #[error("the certificate names {0} URIs, a role is exactly one")]
    Uris(usize),
    /// Its URI is no role.
    #[error("{0:?} is no role")]
    Unknown(String),
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Controller => f.write_str(CONTROLLER),
            Self::Node(name) => write!(f, "{NODE}{name}"),
        }
    }
}

impl FromStr for Role {
    type Err = RoleError;

    fn from_str(uri: &str) -> Result<Self, RoleError> {
        if uri == CONTROLLER {
            return Ok(Self::Controller);
        }
        match uri.strip_prefix(NODE) {
            Some(name) if is_node_name(name) => Ok(Self::Node(name.into())),
            _ => Err(RoleError::Unknown(uri.chars().take(300).collect())),
        }
    }
}

/// Whether Kubernetes takes it for a node's name (a DNS subdomain, RFC 1123).
pub fn is_node_name(name: &str) -> bool {
    let fits = (1..=253).contains(&name.len());
    fits && name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'))
}

/// Who is at the other end of a connection, by a certificate that was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// What it may do.
    pub role: Role,
    /// From when on the certificate is valid.
    pub not_before: SystemTime,
    /// Until when.
    pub not_after: SystemTime,
}

impl Peer {
    /// Reads a certificate. Whoever calls this has verified it.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, RoleError> {
        let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| RoleError::Malformed)?;
        let names = parsed.subject_alternative_name().map_err(|_| RoleError::Malformed)?;
        let names = names.map(|names| names.value.general_names.as_slice()).unwrap_or_default();
        let uris: Vec<&str> = names
            .iter()
            .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None })
            .collect();
        let [uri] = uris[..] else { return Err(RoleError::Uris(uris.len())) };
        let (not_before, not_after) = validity(&parsed);
        Ok(Self { role: uri.parse()?, not_before, not_after })
    }

    /// When a certificate is to be replaced: at half its life, so that a controller that is away for hours, or a clock
    /// that is ahead, does no harm. The time it was backdated by is none of its life.
    pub fn renew_at(&self) -> SystemTime {
        let issued = self.not_before + BACKDATED;
        issued + self.not_after.duration_since(issued).unwrap_or_default() / 2
    }
}

/// DER of the `SubjectPublicKeyInfo` of a certificate.
pub(crate) fn public_key(certificate: &CertificateDer<'_>) -> Option<Vec<u8>> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    Some(parsed.public_key().raw.to_vec())
}

/// From when until when a certificate is valid.
fn validity(certificate: &X509Certificate<'_>) -> (SystemTime, SystemTime) {
    let time = |time: x509_parser::time::ASN1Time| {
        UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or_default())
    };
    let validity = certificate.validity();
    (time(validity.not_before), time(validity.not_after))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_read_as_they_are_written() {
        for role in [Role::Controller, Role::Node("node-1.example".into())] {
            assert_eq!(role.to_string().parse(), Ok(role));
        }
        for uri in [
            "",
            "spiffe://tote.dev/node/",
            "spiffe://tote.dev/node/a/b",
            "spiffe://tote.dev/node/A",
            "spiffe://tote.dev/controller/",
            "spiffe://other.dev/controller",
        ] {
            assert_eq!(uri.parse::<Role>(), Err(RoleError::Unknown(uri.to_owned())));
        }
    }
}
