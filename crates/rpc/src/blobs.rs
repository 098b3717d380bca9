//! An agent's connections to its peers, for blobs.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::Uri;
use http_body_util::Empty;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tower::Service;

use crate::client::dial;
use crate::identity::{Identity, Peer};

/// A client of agents' distribution API, for URIs `https://ip:port/...`. It pools connections by address and follows
/// no redirects. The extensions of a response hold the [`Peer`] that gave it.
pub type BlobClient = Client<Peers, Empty<Bytes>>;

/// Makes connections to peers that have been certified.
#[derive(Clone)]
pub struct Peers {
    tls: TlsConnector,
}

/// A connection to a peer.
pub struct PeerStream {
    stream: TokioIo<TlsStream<TcpStream>>,
    peer: Peer,
}

type Failed = Box<dyn std::error::Error + Send + Sync>;

/// A client for the peers' blobs, with the certificate that the identity has whenever a connection is made.
pub fn blob_client(identity: &Arc<Identity>) -> Result<BlobClient, rustls::Error> {
    let tls = TlsConnector::from(Arc::new(identity.client_config(b"http/1.1")?));
    Ok(Client::builder(TokioExecutor::new())
        // A peer closes what is idle for 10 s: a request may not meet that.
        .pool_idle_timeout(Duration::from_secs(5))
        .pool_timer(TokioTimer::new())
        .pool_max_idle_per_host(8)
        .build(Peers { tls }))
}

async fn connect(tls: TlsConnector, uri: Uri) -> Result<PeerStream, Failed> {
    if uri.scheme_str() != Some("https") {
        return Err(format!("{uri}: peers are asked by https alone").into());
    }
    let authority = uri.authority().map(ToString::to_string).unwrap_or_default();
    let address: SocketAddr = authority.parse().map_err(|_| format!("{authority} is no ip:port"))?;
    let stream = dial(address, &tls).await?;
    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let peer = Peer::of(shown.ok_or("the peer showed no certificate")?)?;
    Ok(PeerStream { stream: TokioIo::new(stream), peer })
}

impl Service<Uri> for Peers {
    type Response = PeerStream;
    type Error = Failed;
    type Future = Pin<Box<dyn Future<Output = Result<PeerStream, Failed>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Failed>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        Box::pin(connect(self.tls.clone(), uri))
    }
}

impl Connection for PeerStream {
    fn connected(&self) -> Connected {
        Connected::new().extra(self.peer.clone())
    }
}

impl Read for PeerStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl Write for PeerStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
