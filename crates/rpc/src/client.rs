//! The controller's connections to agents.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, ServerName};
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use crate::identity::{Authority, Identity, Peer, Unverified, public_key};
use crate::v1;

/// A client of an agent's control plane.
pub type AgentClient = v1::agent_client::AgentClient<Channel>;

/// The largest control message taken, in bytes: an inventory chunk stays far below.
pub(crate) const MAX_MESSAGE: usize = 16 << 20;

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
    Http(SocketAddr, tonic::transport::Error),
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
    let (channel, certificate) = channel(address, identity).await?;
    let verified = identity.verify_node(&certificate, address.ip(), node);
    let client = AgentClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
    Ok(Connection { client, certificate, verified })
}

/// A connection to anybody, and the certificate that was shown.
pub(crate) async fn channel(
    address: SocketAddr,
    identity: &Arc<Identity>,
) -> Result<(Channel, CertificateDer<'static>), ConnectError> {
    let config = identity.lenient_config(b"h2");
    let config = config.map_err(|error| ConnectError::Tls(address, io::Error::other(error)))?;
    let stream = dial(address, &TlsConnector::from(Arc::new(config))).await?;
    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let certificate = shown.cloned().map(CertificateDer::into_owned);
    let certificate = certificate
        .ok_or_else(|| ConnectError::Tls(address, io::Error::other("the agent showed no certificate")))?;
    let mut once = Some(TokioIo::new(stream));
    let connector = service_fn(move |_| {
        let stream = once.take().ok_or_else(|| io::Error::other("the connection has ended"));
        std::future::ready(stream)
    });
    let endpoint = Endpoint::from_shared(format!("http://{address}"));
    let channel = endpoint
        .map_err(|error| ConnectError::Http(address, error))?
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect_with_connector(connector)
        .await
        .map_err(|error| ConnectError::Http(address, error))?;
    Ok((channel, certificate))
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
