//! A program's own identity: a key that never leaves its memory, the certificate it has at present, and whom it
//! trusts at present. Connections that stand keep what they began with; new ones take what is there then.

use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PublicKeyData as _};
use rustls::client::danger::ServerCertVerifier;
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::{CertifiedKey, SigningKey};
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use rustls::{CipherSuite, ClientConfig, ServerConfig, SignatureScheme};
use thiserror::Error;
use tokio::sync::watch;

use super::authority::AuthorityError;
use super::trust::{Anyone, Authorities, Clients, Servers, Verifiers};
use super::{Peer, Role, RoleError};

/// The only protocol version spoken.
const VERSIONS: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];

/// Why a certificate is not taken.
#[derive(Debug, Error)]
pub enum InstallError {
    /// It is of another key.
    #[error("the certificate is of another key")]
    OtherKey,
    /// It says something else than it should.
    #[error("the certificate is of {0}, this is {1}")]
    OtherRole(Role, Role),
    /// It says nothing.
    #[error(transparent)]
    NoRole(#[from] RoleError),
    /// No trusted authority signed it, or it is not valid now.
    #[error("the certificate is not valid: {0}")]
    Invalid(rustls::Error),
}

/// A key, the certificate for it, and a bundle of authorities.
pub struct Identity {
    provider: Arc<CryptoProvider>,
    time: Arc<dyn TimeProvider>,
    key: Arc<dyn SigningKey>,
    public_key: Vec<u8>,
    shown: RwLock<Arc<CertifiedKey>>,
    trusted: RwLock<Option<Arc<Verifiers>>>,
    /// Counts the changes of those who are trusted.
    changes: watch::Sender<u64>,
    certified: watch::Sender<Option<Peer>>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("certified", &*self.certified.borrow()).finish_non_exhaustive()
    }
}

impl Identity {
    /// A new key (ECDSA on P-256) with a certificate that nobody signed; trusts nobody.
    pub fn new() -> Result<Arc<Self>, AuthorityError> {
        Self::with_time(Arc::new(DefaultTimeProvider))
    }

    /// The same, with a clock of the caller's.
    pub fn with_time(time: Arc<dyn TimeProvider>) -> Result<Arc<Self>, AuthorityError> {
        Self::with_key(&KeyPair::generate()?, time)
    }

    pub(crate) fn with_key(key: &KeyPair, time: Arc<dyn TimeProvider>) -> Result<Arc<Self>, AuthorityError> {
        let mut provider = ring::default_provider();
        // AES-128 first: as good for this, and a quarter faster than AES-256, which comes first otherwise.
        provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
        let provider = Arc::new(provider);
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "tote, not certified yet");
        let shown = params.self_signed(key)?.der().clone();
        let der = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let signing = provider.key_provider.load_private_key(der);
        let signing = signing.map_err(|error| AuthorityError::Malformed("the own key", error.to_string()))?;
        Ok(Arc::new(Self {
            provider,
            time,
            shown: RwLock::new(Arc::new(CertifiedKey::new(vec![shown], signing.clone()))),
            key: signing,
            public_key: key.subject_public_key_info(),
            trusted: RwLock::new(None),
            changes: watch::Sender::new(0),
            certified: watch::Sender::new(None),
        }))
    }

    /// DER of the public key's `SubjectPublicKeyInfo`.
    pub fn public_key(&self) -> &[u8] {
        &self.public_key
    }

    /// The certificate it has, and later ones; `None` until it has one of a trusted authority.
    pub fn certified(&self) -> watch::Receiver<Option<Peer>> {
        self.certified.subscribe()
    }

    /// Replaces those whom it trusts. Nobody is, if there are none.
    pub fn trust(&self, authorities: &Authorities) {
        let verifiers = Verifiers::new(authorities, &self.provider).map(Arc::new);
        *self.trusted.write().unwrap_or_else(PoisonError::into_inner) = verifiers;
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// Takes a certificate for its key, if it is for `role` and a trusted authority signed it.
    pub fn install(&self, certificate: CertificateDer<'static>, role: &Role) -> Result<(), InstallError> {
        if super::public_key(&certificate).as_ref() != Some(&self.public_key) {
            return Err(InstallError::OtherKey);
        }
        let peer = Peer::of(&certificate)?;
        if peer.role != *role {
            return Err(InstallError::OtherRole(peer.role, role.clone()));
        }
        self.verify_own(&certificate).map_err(InstallError::Invalid)?;
        self.show(certificate);
        self.certified.send_replace(Some(peer));
        Ok(())
    }

    /// Shows a certificate from now on.
    pub(crate) fn show(&self, certificate: CertificateDer<'static>) {
        let shown = Arc::new(CertifiedKey::new(vec![certificate], self.key.clone()));
        *self.shown.write().unwrap_or_else(PoisonError::into_inner) = shown;
    }

    fn verify_own(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let now = self.time.current_time().ok_or(rustls::Error::FailedToGetCurrentTime)?;
        let unknown = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        self.verifiers().ok_or(unknown)?.client(certificate, now)
    }

    /// Waits until nobody who is trusted has signed a certificate any more. That it runs out is another matter.
    pub(crate) async fn until_distrusted(&self, certificate: &CertificateDer<'_>) {
        use rustls::CertificateError::{BadSignature, UnknownIssuer};
        let mut changes = self.changes.subscribe();
        loop {
            let verified = self.verify_own(certificate);
            if matches!(verified, Err(rustls::Error::InvalidCertificate(UnknownIssuer | BadSignature))) {
                return;
            }
            if changes.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Whether `certificate`, which its owner has proved to hold the key of, makes it that node's agent at `address`.
    pub(crate) fn verify_node(
        &self,
        certificate: &CertificateDer<'_>,
        address: IpAddr,
        node: &str,
    ) -> Result<Peer, Unverified> {
        let now = self.time.current_time().ok_or(rustls::Error::FailedToGetCurrentTime)?;
        let unknown = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let verifiers = self.verifiers().ok_or(unknown)?;
        verifiers.server(certificate, &ServerName::IpAddress(address.into()), now)?;
        let peer = Peer::of(certificate)?;
        match &peer.role {
            Role::Node(name) if **name == *node => Ok(peer),
            other => Err(Unverified::OtherRole(other.clone())),
        }
    }

    /// How long it is until a time, by this identity's clock.
    pub(crate) fn until(&self, time: SystemTime) -> Duration {
        let now = self
            .time
            .current_time()
            .map_or(UNIX_EPOCH, |now| UNIX_EPOCH + Duration::from_secs(now.as_secs()));
        time.duration_since(now).unwrap_or_default()
    }

    pub(super) fn provider(&self) -> &CryptoProvider {
        &self.provider
    }

    pub(super) fn verifiers(&self) -> Option<Arc<Verifiers>> {
        self.trusted.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// For a listener: a caller shows a certificate of a trusted authority, or is refused. Nothing is resumed, for a
    /// resumed session would verify nothing.
    pub(crate) fn server_config(self: &Arc<Self>) -> Result<ServerConfig, rustls::Error> {
        let config = ServerConfig::builder_with_details(self.provider.clone(), self.time.clone());
        let mut config = config
            .with_protocol_versions(VERSIONS)?
            .with_client_cert_verifier(Arc::new(Clients(self.clone())))
            .with_cert_resolver(Arc::new(Shown(self.clone())));
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    /// For calls to those that have been certified.
    pub(crate) fn client_config(self: &Arc<Self>, protocol: &[u8]) -> Result<ClientConfig, rustls::Error> {
        self.client_config_with(Arc::new(Servers(self.clone())), protocol)
    }

    /// For calls to those that may have yet to be certified: whoever answers is to be verified afterwards.
    pub(crate) fn lenient_config(self: &Arc<Self>, protocol: &[u8]) -> Result<ClientConfig, rustls::Error> {
        self.client_config_with(Arc::new(Anyone(self.clone())), protocol)
    }

    fn client_config_with(
        self: &Arc<Self>,
        verifier: Arc<dyn ServerCertVerifier>,
        protocol: &[u8],
    ) -> Result<ClientConfig, rustls::Error> {
        let config = ClientConfig::builder_with_details(self.provider.clone(), self.time.clone());
        let mut config = config
            .with_protocol_versions(VERSIONS)?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(Arc::new(Shown(self.clone())));
        config.alpn_protocols = vec![protocol.to_vec()];
        config.resumption = Resumption::disabled();
        Ok(config)
    }
}

/// Why whoever answered is not believed to be the node's agent.
#[derive(Debug, Error)]
pub enum Unverified {
    /// Its certificate does not verify for the address.
    #[error("{0}")]
    Certificate(#[from] rustls::Error),
    /// Its certificate has no role.
    #[error(transparent)]
    NoRole(#[from] RoleError),
    /// It is somebody else.
    #[error("it is {0}")]
    OtherRole(Role),
}

/// The certificate that an identity has at the moment of a handshake.
struct Shown(Arc<Identity>);

impl Shown {
    fn now(&self) -> Arc<CertifiedKey> {
        self.0.shown.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Shown")
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.now())
    }
}

impl ResolvesClientCert for Shown {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.now())
    }

    fn has_certs(&self) -> bool {
        true
    }
}
