//! The controller's connections to agents.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::pki_types::{CertificateDer, ServerName};
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::Status;

use crate::identity::{Authority, Identity, Peer, Unverified, public_key};
use crate::v1;
use crate::wire::Wire;

/// A client of an agent's control plane.
pub type AgentClient = v1::agent_client::AgentClient<Wire>;

/// The largest control message taken, in bytes: an inventory chunk stays far below.
pub(crate) const MAX_MESSAGE: usize = 16 << 20;

/// The same from one who has yet to be identified: a token.
const SHORT_MESSAGE: usize = 64 << 10;

/// How long a connection may take to stand, each of TCP's and TLS's part.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// A peer that answers no HTTP/2 ping for this long is gone.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long an agent may take over a call that identifies it.
const CALL: Duration = Duration::from_secs(10);

/// Why an agent could not be reached.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// No connection.
    #[error("agent at {0}: {1}")]
    Tcp(SocketAddr, io::Error),
    /// No TLS over it.
    #[error("agent at {0}: TLS: {1}")]
    Tls(SocketAddr, io::Error),
    /// No HTTP/2 over that.
    #[error("agent at {0}: {1}")]
    Http(SocketAddr, hyper::Error),
}

/// A connection to whoever answered at an agent's address. It is asked nothing but who it is before it has shown a
/// certificate of the node's agent there.
#[derive(Debug)]
pub struct Connection {
    client: AgentClient,
    certificate: CertificateDer<'static>,
    verified: Result<Peer, Unverified>,
}

/// Connects to the agent of `node` at `address`. Dead peers are noticed within 15 s by HTTP/2 pings. The connection is
/// never made again behind the caller's back: whom it leads to was verified once.
pub async fn connect(
    address: SocketAddr,
    node: &str,
    identity: &Arc<Identity>,
) -> Result<Connection, ConnectError> {
    let (wire, certificate) = wire(address, identity).await?;
    let verified = identity.verify_node(&certificate, address.ip(), node);
    // Whoever has yet to be identified has little to say.
    let most = if verified.is_ok() { MAX_MESSAGE } else { SHORT_MESSAGE };
    let client = AgentClient::with_origin(wire, origin(address)).max_decoding_message_size(most);
    Ok(Connection { client, certificate, verified })
}

/// A connection to anybody, and the certificate that was shown.
pub(crate) async fn wire(
    address: SocketAddr,
    identity: &Arc<Identity>,
) -> Result<(Wire, CertificateDer<'static>), ConnectError> {
    let config = identity.lenient_config(b"h2");
    let config = config.map_err(|error| ConnectError::Tls(address, io::Error::other(error)))?;
    let stream = dial(address, &TlsConnector::from(Arc::new(config))).await?;
    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let certificate = shown.cloned().map(CertificateDer::into_owned);
    let certificate = certificate
        .ok_or_else(|| ConnectError::Tls(address, io::Error::other("the agent showed no certificate")))?;
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| ConnectError::Http(address, error))?;
    // It ends when the last client is dropped.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%address, %error, "connection to an agent ended");
        }
    });
    Ok((Wire(sender), certificate))
}

/// What requests to an agent are addressed to.
pub(crate) fn origin(address: SocketAddr) -> Uri {
    let parts = Uri::builder().scheme("https").authority(address.to_string()).path_and_query("/");
    parts.build().unwrap_or_default()
}

/// TLS over TCP.
pub(crate) async fn dial(
    address: SocketAddr,
    tls: &TlsConnector,
) -> Result<TlsStream<TcpStream>, ConnectError> {
    let late = |_| io::Error::from(io::ErrorKind::TimedOut);
    let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await.map_err(late);
    let stream = stream.flatten().map_err(|error| ConnectError::Tcp(address, error))?;
    let _ = stream.set_nodelay(true);
    let name = ServerName::IpAddress(address.ip().into());
    let stream = timeout(CONNECT_TIMEOUT, tls.connect(name, stream)).await.map_err(late);
    stream.flatten().map_err(|error| ConnectError::Tls(address, error))
}

impl Connection {
    /// Who answered, by its certificate.
    pub fn peer(&self) -> Result<&Peer, &Unverified> {
        self.verified.as_ref()
    }

    /// Whether this authority signed what it showed.
    pub fn is_issued_by(&self, authority: &Authority) -> bool {
        authority.issued(&self.certificate)
    }

    /// The public key whose holder answered (DER of a `SubjectPublicKeyInfo`).
    pub fn public_key(&self) -> Option<Vec<u8>> {
        public_key(&self.certificate)
    }

    /// Asks for the token that says which pod it is.
    pub async fn attest(&mut self, term: v1::Term) -> Result<String, Status> {
        let request = v1::AttestRequest { term: Some(term) };
        Ok(within(self.client.attest(request)).await?.token)
    }

    /// Hands it a certificate for its key, and the authorities to trust.
    pub async fn certify(&mut self, request: v1::CertifyRequest) -> Result<(), Status> {
        within(self.client.certify(request)).await.map(drop)
    }

    /// The client, if this is the node's agent.
    pub fn into_client(self) -> Result<AgentClient, Unverified> {
        self.verified.map(|_| self.client)
    }
}

async fn within<T>(call: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T, Status> {
    let late = |_| Status::deadline_exceeded(format!("no answer within {CALL:?}"));
    Ok(timeout(CALL, call).await.map_err(late)??.into_inner())
}
