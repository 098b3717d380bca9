//! Connections that are made: the controller's to an agent, and an agent's to its peers.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Empty;
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use thiserror::Error;
use tonic::transport::{Channel, Endpoint};

use crate::v1;

/// A client of an agent's control plane.
pub type AgentClient = v1::agent_client::AgentClient<Channel>;

/// A client of an agent's distribution API. It pools connections by address and follows no redirects.
pub type BlobClient = Client<HttpConnector, Empty<Bytes>>;

/// The largest control message taken, in bytes: an inventory chunk stays far below.
pub(crate) const MAX_MESSAGE: usize = 16 << 20;

/// How long a connection may take to stand.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// A peer that answers no HTTP/2 ping for this long is gone.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Why an agent could not be reached.
#[derive(Debug, Error)]
#[error("agent at {address}: {source}")]
pub struct ConnectError {
    address: SocketAddr,
    source: tonic::transport::Error,
}

/// Connects to the agent at `address`. Dead peers are noticed within 15 s by HTTP/2 pings.
pub async fn connect(address: SocketAddr) -> Result<AgentClient, ConnectError> {
    let failed = |source| ConnectError { address, source };
    let channel = Endpoint::from_shared(format!("http://{address}"))
        .map_err(failed)?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect()
        .await
        .map_err(failed)?;
    Ok(AgentClient::new(channel).max_decoding_message_size(MAX_MESSAGE))
}

/// A client for the peers' blobs.
pub fn blob_client() -> BlobClient {
    let mut connector = HttpConnector::new();
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    connector.set_nodelay(true);
    Client::builder(TokioExecutor::new())
        .pool_idle_timeout(Duration::from_secs(30))
        .pool_timer(TokioTimer::new())
        .pool_max_idle_per_host(4)
        .build(connector)
}
