//! Identities for tests: an authority of their own, and certificates as wrong as wanted.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use tokio_util::sync::CancellationToken;

use crate::identity::{Authorities, Authority, Identity, Role};
use crate::v1;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// An authority of a test.
#[derive(Debug)]
pub struct Pki {
    /// The authority itself.
    pub authority: Authority,
}

impl Default for Pki {
    fn default() -> Self {
        Self::new()
    }
}

/// A clock that is off by so many seconds.
#[derive(Debug)]
pub struct Skewed(pub i64);

impl TimeProvider for Skewed {
    fn current_time(&self) -> Option<rustls::pki_types::UnixTime> {
        let now = DefaultTimeProvider.current_time()?.as_secs();
        let then = now.saturating_add_signed(self.0);
        Some(rustls::pki_types::UnixTime::since_unix_epoch(Duration::from_secs(then)))
    }
}

impl Pki {
    /// A new authority.
    pub fn new() -> Self {
        Self { authority: Authority::generate(SystemTime::now(), DAY).unwrap() }
    }

    /// One whose key is known.
    pub fn of(certificate: &str, key: &str) -> Self {
        Self { authority: Authority::from_pem(certificate, key).unwrap() }
    }

    /// What trusts this authority alone.
    pub fn bundle(&self) -> Authorities {
        Authorities::from_certificates(vec![self.authority.certificate().clone()]).unwrap()
    }

    /// A controller.
    pub fn controller(&self) -> Arc<Identity> {
        self.identity(&Role::Controller, None)
    }

    /// A node's agent at an address.
    pub fn node(&self, name: &str, address: &str) -> Arc<Identity> {
        self.identity(&Role::Node(name.into()), Some(address.parse().unwrap()))
    }

    /// Anyone.
    pub fn identity(&self, role: &Role, address: Option<IpAddr>) -> Arc<Identity> {
        let identity = Identity::new().unwrap();
        self.certify(&identity, role, address);
        identity
    }

    /// Gives an identity a certificate, and this authority alone to trust.
    pub fn certify(&self, identity: &Arc<Identity>, role: &Role, address: Option<IpAddr>) {
        identity.trust(&self.bundle());
        let now = SystemTime::now();
        let certificate = self.authority.sign(role, address, identity.public_key(), now, DAY).unwrap();
        identity.install(certificate, role).unwrap();
    }

    /// A certificate that is valid from and until so many seconds from now, whatever is right, and shown all the same.
    pub fn between(&self, role: &Role, address: Option<IpAddr>, (from, until): (i64, i64)) -> Arc<Identity> {
        let at = |seconds: i64| {
            let by = Duration::from_secs(seconds.unsigned_abs());
            if seconds < 0 { SystemTime::now() - by } else { SystemTime::now() + by }
        };
        let identity = Identity::new().unwrap();
        identity.trust(&self.bundle());
        let serial = crate::identity::serial(SystemTime::now());
        let times = (at(from), at(until));
        let key = identity.public_key();
        let certificate = self.authority.sign_between(role, address, key, times, serial).unwrap();
        identity.show(certificate);
        identity
    }

    /// A certificate and key as PEM, and the authority's, for clients that read files: skopeo, containerd.
    pub fn files(&self, role: &Role, address: Option<IpAddr>) -> Files {
        use rcgen::PublicKeyData as _;
        let key = KeyPair::generate().unwrap();
        let public = key.subject_public_key_info();
        let certificate = self.authority.sign(role, address, &public, SystemTime::now(), DAY).unwrap();
        Files {
            certificate: pem(&certificate),
            key: key.serialize_pem(),
            authority: self.authority.certificate_pem().to_owned(),
        }
    }
}

/// Serves anything to those who are known: an agent of another version, say.
pub async fn serve_app(
    listener: tokio::net::TcpListener,
    identity: Arc<Identity>,
    app: axum::Router,
    stop: CancellationToken,
) {
    crate::server::serve_app(listener, identity, app, Arc::new(|_| {}), stop).await.unwrap();
}

/// A connection to anybody, for a client of another version, and what its requests are addressed to.
pub async fn wire(address: SocketAddr, identity: &Arc<Identity>) -> (crate::Wire, http::Uri) {
    (crate::client::wire(address, identity).await.unwrap().0, crate::client::origin(address))
}

/// An agent that answers nothing, for servers of blobs alone.
#[derive(Clone, Copy, Debug)]
pub struct NoAgent;

type Answer<T> = Result<tonic::Response<T>, tonic::Status>;

fn nothing<T>() -> Answer<T> {
    Err(tonic::Status::unimplemented("no agent"))
}

#[tonic::async_trait]
impl v1::agent_server::Agent for NoAgent {
    type SessionStream = tokio_stream::Empty<Result<v1::SessionResponse, tonic::Status>>;
    type ImportStream = tokio_stream::Empty<Result<v1::ImportEvent, tonic::Status>>;

    async fn session(
        &self,
        _: tonic::Request<tonic::Streaming<v1::SessionRequest>>,
    ) -> Answer<Self::SessionStream> {
        nothing()
    }

    async fn import(&self, _: tonic::Request<v1::ImportRequest>) -> Answer<Self::ImportStream> {
        nothing()
    }

    async fn cancel(&self, _: tonic::Request<v1::CancelRequest>) -> Answer<v1::CancelResponse> {
        nothing()
    }

    async fn attest(&self, _: tonic::Request<v1::AttestRequest>) -> Answer<v1::AttestResponse> {
        nothing()
    }

    async fn certify(&self, _: tonic::Request<v1::CertifyRequest>) -> Answer<v1::CertifyResponse> {
        nothing()
    }

    async fn grant(&self, _: tonic::Request<v1::GrantRequest>) -> Answer<v1::GrantResponse> {
        nothing()
    }

    async fn revoke(&self, _: tonic::Request<v1::RevokeRequest>) -> Answer<v1::RevokeResponse> {
        nothing()
    }

    async fn remove(&self, _: tonic::Request<v1::RemoveRequest>) -> Answer<v1::RemoveResponse> {
        nothing()
    }
}

/// PEM texts.
#[derive(Clone, Debug)]
pub struct Files {
    /// The certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
    /// The authority's certificate.
    pub authority: String,
}

fn pem(certificate: &CertificateDer<'static>) -> String {
    Authorities::from_certificates(vec![certificate.clone()]).unwrap().pem()
}
