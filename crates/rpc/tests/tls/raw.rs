//! Certificates that no authority of the project would sign, and connections below what the project offers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tote_rpc::testing::Pki;

use super::played::{LOOPBACK, SOON};

/// A certificate with its key, and those between it and the authority.
pub struct Forged {
    params: CertificateParams,
    key: KeyPair,
    chain: Vec<CertificateDer<'static>>,
}

/// What a certificate is to say, whatever is right.
pub fn params(uris: &[&str], usages: &[ExtendedKeyUsagePurpose]) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::IpAddress(LOOPBACK.parse().unwrap())];
    let uris = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap()));
    params.subject_alt_names.extend(uris);
    params.extended_key_usages = usages.to_vec();
    params
}

/// Good for calling and for serving.
pub const BOTH: &[ExtendedKeyUsagePurpose] =
    &[ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];

impl Forged {
    /// Signed by an authority.
    pub fn by(pki: &Pki, params: CertificateParams) -> Self {
        let signing = KeyPair::from_pem(pki.authority.key_pem()).unwrap();
        let issuer = Issuer::from_ca_cert_pem(pki.authority.certificate_pem(), signing).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap();
        Self { params, key, chain: vec![certificate.der().clone()] }
    }

    /// Signed by one that is no authority, but was itself signed by one.
    pub fn below(above: &Self, params: CertificateParams) -> Self {
        let key = KeyPair::generate().unwrap();
        let issuer = Issuer::from_params(&above.params, &above.key);
        let mut chain = vec![params.signed_by(&key, &issuer).unwrap().der().clone()];
        chain.extend(above.chain.iter().cloned());
        Self { params, key, chain }
    }

    /// A node's that runs out so many seconds from now.
    pub fn of_node(pki: &Pki, name: &str, seconds: u64) -> (Self, SystemTime) {
        let end = SystemTime::now() + Duration::from_secs(seconds);
        let mut params = params(&[&format!("spiffe://tote.dev/node/{name}")], BOTH);
        (params.not_before, params.not_after) = (SystemTime::UNIX_EPOCH.into(), end.into());
        (Self::by(pki, params), end)
    }

    fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.key.serialize_der().into())
    }

    /// For a server that takes anyone, and hands out what sessions are resumed with.
    pub fn server(&self) -> rustls::ServerConfig {
        let builder = rustls::ServerConfig::builder_with_provider(provider());
        let builder =
            builder.with_protocol_versions(&[&rustls::version::TLS13]).unwrap().with_no_client_auth();
        builder.with_single_cert(self.chain.clone(), self.key()).unwrap()
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// For a client that shows this, or nothing, and would resume a session.
pub fn client(pki: &Pki, shown: Option<&Forged>, protocol: &[u8]) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(pki.authority.certificate().clone()).unwrap();
    let builder = ClientConfig::builder_with_provider(provider());
    let builder =
        builder.with_protocol_versions(&[&rustls::version::TLS13]).unwrap().with_root_certificates(roots);
    let mut config = match shown {
        None => builder.with_no_client_auth(),
        Some(shown) => builder.with_client_auth_cert(shown.chain.clone(), shown.key()).unwrap(),
    };
    config.alpn_protocols = vec![protocol.to_vec()];
    Arc::new(config)
}

/// A connection; of whether the other end believes it nothing is known yet.
pub async fn dial(address: SocketAddr, config: Arc<ClientConfig>) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    TlsConnector::from(config).connect(ServerName::IpAddress(address.ip().into()), stream).await
}

/// All that comes until the other end is done.
pub async fn rest(stream: &mut (impl AsyncRead + Unpin)) -> (Vec<u8>, std::io::Result<()>) {
    rest_within(stream, SOON).await
}

/// The same, within a time.
pub async fn rest_within(
    stream: &mut (impl AsyncRead + Unpin),
    within: Duration,
) -> (Vec<u8>, std::io::Result<()>) {
    let mut all = Vec::new();
    let end = timeout(within, stream.read_to_end(&mut all)).await.expect("the connection is not ended");
    (all, end.map(drop))
}
