//! The one listener of an agent: gRPC and the distribution API on the same port, for callers whose certificate says who
//! they are.

mod admission;
mod plain;
mod refusal;

use std::net::IpAddr;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::response::IntoResponse as _;
use http::{Request as HttpRequest, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use rustls::pki_types::CertificateDer;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Status};
use tower::ServiceExt as _;

use self::admission::Admission;
pub use self::plain::serve_plain;
pub use self::refusal::Refusal;
use crate::client::MAX_MESSAGE;
use crate::identity::{Identity, Peer, Role};
use crate::v1::agent_server::{Agent, AgentServer};

/// How long a client may take over its handshake, and over a request head.
const HANDSHAKE: Duration = Duration::from_secs(5);
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// The most bytes of a request head (HTTP/1) or of its fields (HTTP/2).
const HEAD: usize = 16 << 10;

/// How long a peer may leave bytes unacknowledged.
const UNACKNOWLEDGED: Duration = Duration::from_secs(120);

/// How long open requests are waited for at shutdown, and a controller's when its certificate has run out.
const DRAIN: Duration = Duration::from_secs(5);

/// Told of whoever is refused.
pub type OnRefusal = Arc<dyn Fn(Refusal) + Send + Sync>;

/// What connections share.
#[derive(Clone)]
struct Shared {
    tls: TlsAcceptor,
    identity: Arc<Identity>,
    app: Router,
    builder: Builder<TokioExecutor>,
    admission: Admission,
    on_refusal: OnRefusal,
    spoken: Spoken,
    stop: CancellationToken,
}

/// Lets a line into the log once a second: whoever knocks without end does not fill it.
#[derive(Clone, Default)]
struct Spoken(Arc<Mutex<Option<Instant>>>);

impl Spoken {
    fn may_speak(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let may = last.is_none_or(|last| last.elapsed() >= Duration::from_secs(1));
        if may {
            *last = Some(Instant::now());
        }
        may
    }
}

/// Serves `agent` by gRPC, to controllers alone, and everything else by `distribution`, whose requests have the [`Peer`]
/// among their extensions; until `stop`, then drains for 5 s at most.
pub async fn serve<A: Agent>(
    listener: TcpListener,
    identity: Arc<Identity>,
    agent: A,
    distribution: Router,
    on_refusal: OnRefusal,
    stop: CancellationToken,
) -> Result<(), rustls::Error> {
    let grpc = AgentServer::new(agent).max_decoding_message_size(MAX_MESSAGE);
    let told = on_refusal.clone();
    let grpc = tonic::service::interceptor::InterceptedService::new(grpc, move |request: Request<()>| {
        controller_only(request).inspect_err(|_| told(Refusal::Role))
    });
    let app = tonic::service::Routes::new(grpc).into_axum_router().fallback_service(distribution);
    serve_app(listener, identity, app, on_refusal, stop).await
}

/// Serves anything to those whose certificate says who they are.
pub(crate) async fn serve_app(
    listener: TcpListener,
    identity: Arc<Identity>,
    app: Router,
    on_refusal: OnRefusal,
    stop: CancellationToken,
) -> Result<(), rustls::Error> {
    let tls = TlsAcceptor::from(Arc::new(identity.server_config()?));
    let shared = Shared {
        tls,
        identity,
        app,
        builder: builder(),
        admission: Admission::default(),
        on_refusal,
        spoken: Spoken::default(),
        stop: stop.clone(),
    };
    let open = TaskTracker::new();
    while let Some((stream, from)) = accepted(&listener, &stop).await {
        let begin = |number| open.spawn(welcome(shared.clone(), stream, number)).abort_handle();
        if shared.admission.enter(from, begin) {
            (shared.on_refusal)(Refusal::Crowded);
        }
    }
    drop(listener);
    open.close();
    if timeout(DRAIN, open.wait()).await.is_err() {
        tracing::info!("connections were still open at shutdown");
    }
    Ok(())
}

fn builder() -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_buf_size(HEAD);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Some(Duration::from_secs(20)))
        .keep_alive_timeout(Duration::from_secs(10))
        .max_header_list_size(u32::try_from(HEAD).unwrap_or(u32::MAX))
        .max_concurrent_streams(256)
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20);
    builder
}

/// Every call of the control plane is a controller's.
fn controller_only(request: Request<()>) -> Result<Request<()>, Status> {
    match request.extensions().get::<Peer>().map(|peer| &peer.role) {
        Some(Role::Controller) => Ok(request),
        Some(other) => Err(Status::permission_denied(format!("{other} may not call this, a controller may"))),
        None => Err(Status::unauthenticated("the caller is not known")),
    }
}

/// Finds out who it is.
async fn welcome(shared: Shared, stream: TcpStream, number: u64) {
    let address = stream.peer_addr().map(|address| address.to_string()).unwrap_or_default();
    let handshake = timeout(HANDSHAKE, shared.tls.accept(stream)).await;
    shared.admission.leave(number);
    let refused = |refusal: Refusal, error: &dyn std::fmt::Display| {
        (shared.on_refusal)(refusal);
        if shared.spoken.may_speak() {
            tracing::info!(%address, reason = refusal.label(), %error, "connection refused");
        }
    };
    let stream = match handshake {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return refused(Refusal::of_handshake(&error), &error),
        Err(late) => return refused(Refusal::Unfinished, &late),
    };
    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let Some(shown) = shown.cloned().map(CertificateDer::into_owned) else {
        return refused(Refusal::NoCertificate, &"no certificate");
    };
    let peer = match Peer::of(&shown) {
        Ok(peer) => peer,
        Err(error) => return refused(Refusal::BadCertificate, &error),
    };
    let Some(place) = shared.admission.place(&peer.role) else {
        return refused(Refusal::TooMany, &peer.role);
    };
    converse(&shared, stream, peer, shown).await;
    drop(place);
}

/// Answers its requests, until its certificate has run out: then it may finish what is under way and has to come again
/// with a new one. A node's reading is bounded by its grant, a controller's streams end.
async fn converse(shared: &Shared, stream: TlsStream<TcpStream>, peer: Peer, shown: CertificateDer<'static>) {
    let (role, expires) = (peer.role.clone(), shared.identity.until(peer.not_after));
    let asked = Notify::new();
    let service = service_fn(|mut request: HttpRequest<Incoming>| {
        asked.notify_one();
        // By HTTP/2 a peer is told to go and goes when it likes: what it asks for later is not served.
        let late = shared.identity.until(peer.not_after + DRAIN).is_zero();
        let app = (!late).then(|| shared.app.clone());
        if late {
            (shared.on_refusal)(Refusal::Expired);
        }
        request.extensions_mut().insert(peer.clone());
        async move {
            match app {
                Some(app) => app.oneshot(request.map(Body::new)).await,
                None => Ok(StatusCode::UNAUTHORIZED.into_response()),
            }
        }
    });
    // A node dials to ask. Until it begins to, nothing else bounds how long it may take: while it is unknown whether
    // it is going to speak HTTP/1 or HTTP/2, no timeout of theirs runs.
    let silent = async {
        let asks =
            async { role == Role::Controller || timeout(HEADER_TIMEOUT, asked.notified()).await.is_ok() };
        if asks.await {
            std::future::pending::<()>().await;
        }
    };
    let mut connection = pin!(shared.builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = silent => Ok(()),
        () = shared.stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
        () = shared.identity.until_distrusted(&shown) => {
            connection.as_mut().graceful_shutdown();
            timeout(DRAIN, connection).await.unwrap_or(Ok(()))
        }
        () = tokio::time::sleep(expires) => {
            connection.as_mut().graceful_shutdown();
            if role == Role::Controller {
                timeout(DRAIN, connection).await.unwrap_or(Ok(()))
            } else {
                connection.await
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%role, %error, "connection ended");
    }
}

/// The next connection; nothing once stopped.
async fn accepted(listener: &TcpListener, stop: &CancellationToken) -> Option<(TcpStream, IpAddr)> {
    loop {
        match stop.run_until_cancelled(listener.accept()).await? {
            Ok((stream, from)) => {
                let _ = stream.set_nodelay(true);
                // A peer that lost its power is noticed, and what it was being sent is dropped.
                let _ = SockRef::from(&stream).set_tcp_user_timeout(Some(UNACKNOWLEDGED));
                return Some((stream, from.ip()));
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                // Out of descriptors, most likely: others will be closed meanwhile.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

fn is_of_one_connection(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}
