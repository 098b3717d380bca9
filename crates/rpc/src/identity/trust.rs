//! Whom a program believes: a bundle of authorities, and the verifiers of rustls that follow it as it changes.

use std::fmt;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme,
};
use thiserror::Error as ThisError;

use super::Identity;

/// The most authorities that are believed at once: two overlap, a third may linger.
const MAX: usize = 8;

/// A bundle of authorities' certificates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Authorities(Vec<CertificateDer<'static>>);

/// Why a bundle cannot be used.
#[derive(Debug, ThisError)]
pub enum BundleError {
    /// It is no PEM, or a certificate in it is none.
    #[error("not a PEM of certificates: {0}")]
    Malformed(String),
    /// There is nothing in it.
    #[error("there is no certificate in it")]
    Empty,
    /// There is too much in it.
    #[error("{0} certificates are in it, at most {MAX} are taken")]
    TooMany(usize),
}

impl Authorities {
    /// Reads certificates from a PEM.
    pub fn from_pem(pem: &str) -> Result<Self, BundleError> {
        let certificates = CertificateDer::pem_slice_iter(pem.as_bytes());
        let certificates: Vec<_> = certificates
            .collect::<Result<_, _>>()
            .map_err(|error| BundleError::Malformed(error.to_string()))?;
        Self::from_certificates(certificates)
    }

    /// From certificates.
    pub fn from_certificates(certificates: Vec<CertificateDer<'static>>) -> Result<Self, BundleError> {
        let mut store = RootCertStore::empty();
        let mut distinct = Vec::new();
        for certificate in certificates {
            store.add(certificate.clone()).map_err(|error| BundleError::Malformed(error.to_string()))?;
            if !distinct.contains(&certificate) {
                distinct.push(certificate);
            }
        }
        match distinct.len() {
            0 => Err(BundleError::Empty),
            1..=MAX => Ok(Self(distinct)),
            n => Err(BundleError::TooMany(n)),
        }
    }

    /// The certificates.
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.0
    }

    /// As PEM.
    pub fn pem(&self) -> String {
        self.0.iter().map(pem).collect()
    }

    /// Those that are among `others` too; nothing if all are.
    pub fn only_of(&self, others: &Self) -> Option<Self> {
        let kept: Vec<_> = self.0.iter().filter(|one| others.0.contains(one)).cloned().collect();
        (kept.len() < self.0.len()).then_some(Self(kept))
    }

    /// Those of both, each once; of too many, those of `self` first.
    #[must_use]
    pub fn and(mut self, other: &Self) -> Self {
        for certificate in &other.0 {
            if self.0.len() < MAX && !self.0.contains(certificate) {
                self.0.push(certificate.clone());
            }
        }
        self
    }
}

/// A certificate as PEM (RFC 7468).
pub(super) fn pem(certificate: &CertificateDer<'_>) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new("CERTIFICATE", certificate.to_vec()), config)
}

/// What verifies certificates against one bundle.
pub(super) struct Verifiers {
    clients: Arc<dyn ClientCertVerifier>,
    servers: Arc<WebPkiServerVerifier>,
}

impl Verifiers {
    pub(super) fn new(authorities: &Authorities, provider: &Arc<CryptoProvider>) -> Option<Self> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(authorities.0.iter().cloned());
        let roots = Arc::new(roots);
        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            // The names of authorities are nobody's business.
            .clear_root_hint_subjects()
            .build();
        let servers = WebPkiServerVerifier::builder_with_provider(roots, provider.clone()).build();
        Some(Self { clients: clients.ok()?, servers: servers.ok()? })
    }

    pub(super) fn server(
        &self,
        certificate: &CertificateDer<'_>,
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), Error> {
        self.servers.verify_server_cert(certificate, &[], name, &[], now).map(drop)
    }
}

impl Verifiers {
    pub(super) fn client(&self, certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), Error> {
        self.clients.verify_client_cert(certificate, &[], now).map(drop)
    }
}

/// Whether a certificate verifies with this authority alone, as a caller's.
pub(super) fn verify_alone(
    authority: &CertificateDer<'static>,
    certificate: &CertificateDer<'_>,
    now: UnixTime,
) -> Result<(), Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifiers = Verifiers::new(&Authorities(vec![authority.clone()]), &provider).ok_or_else(nobody)?;
    verifiers.client(certificate, now)
}

fn nobody() -> Error {
    Error::InvalidCertificate(CertificateError::UnknownIssuer)
}

macro_rules! signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls12_signature(message, certificate, signature, &self.algorithms())
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls13_signature(message, certificate, signature, &self.algorithms())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.algorithms().supported_schemes()
        }
    };
}

/// Verifies those who call, by what the identity trusts at that moment.
pub(crate) struct Clients(pub(crate) Arc<Identity>);

/// Verifies those who are called, by what the identity trusts at that moment.
pub(crate) struct Servers(pub(crate) Arc<Identity>);

/// Lets anyone through who proves to hold the key of its certificate. What it proved is checked afterwards.
pub(crate) struct Anyone(pub(crate) Arc<Identity>);

macro_rules! named {
    ($($name:ident),*) => { $(
        impl $name {
            fn algorithms(&self) -> WebPkiSupportedAlgorithms {
                self.0.provider().signature_verification_algorithms
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(stringify!($name))
            }
        }
    )* };
}

named!(Clients, Servers, Anyone);

impl ClientCertVerifier for Clients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verifiers = self.0.verifiers().ok_or_else(nobody)?;
        verifiers.clients.verify_client_cert(certificate, intermediates, now)
    }

    signatures!();
}

impl ServerCertVerifier for Servers {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verifiers = self.0.verifiers().ok_or_else(nobody)?;
        verifiers.server(certificate, name, now)?;
        Ok(ServerCertVerified::assertion())
    }

    signatures!();
}

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    signatures!();
}
