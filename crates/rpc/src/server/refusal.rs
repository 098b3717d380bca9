//! Why a connection or a call was refused, as metrics name it.

use std::io;

use rustls::{CertificateError, Error};

/// Why somebody was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// It showed no certificate.
    NoCertificate,
    /// Its certificate was signed by nobody who is trusted.
    UnknownAuthority,
    /// Its certificate is no longer valid.
    Expired,
    /// Its certificate is not valid yet.
    NotYetValid,
    /// Its certificate may not be used for this, or is malformed.
    BadCertificate,
    /// What it said is no TLS, or of another version.
    NotTls,
    /// It refused this agent's certificate.
    RefusedUs,
    /// It took too long, or went away before its certificate was seen.
    Unfinished,
    /// It gave way to others that came after it, before its certificate was seen.
    Crowded,
    /// It has too many connections already.
    TooMany,
    /// Its certificate does not allow what it asked for.
    Role,
    /// It spoke for a leadership that is over.
    Term,
    /// It asked for what it was not granted.
    Grant,
}

impl Refusal {
    /// All there are.
    pub const ALL: [Self; 13] = [
        Self::NoCertificate,
        Self::UnknownAuthority,
        Self::Expired,
        Self::NotYetValid,
        Self::BadCertificate,
        Self::NotTls,
        Self::RefusedUs,
        Self::Unfinished,
        Self::Crowded,
        Self::TooMany,
        Self::Role,
        Self::Term,
        Self::Grant,
    ];

    /// The value of the label `reason`.
    pub fn label(self) -> &'static str {
        match self {
            Self::NoCertificate => "no_certificate",
            Self::UnknownAuthority => "unknown_authority",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::BadCertificate => "bad_certificate",
            Self::NotTls => "not_tls",
            Self::RefusedUs => "refused_us",
            Self::Unfinished => "unfinished",
            Self::Crowded => "crowded",
            Self::TooMany => "too_many",
            Self::Role => "role",
            Self::Term => "term",
            Self::Grant => "grant",
        }
    }

    /// What a handshake failed with.
    pub(super) fn of_handshake(error: &io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
            Some(Error::NoCertificatesPresented) => Self::NoCertificate,
            Some(Error::InvalidCertificate(problem)) => match problem {
                CertificateError::UnknownIssuer | CertificateError::BadSignature => Self::UnknownAuthority,
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                    Self::NotYetValid
                }
                _ => Self::BadCertificate,
            },
            Some(Error::AlertReceived(_)) => Self::RefusedUs,
            Some(_) => Self::NotTls,
            None => Self::Unfinished,
        }
    }
}
