//! An agent that is played: it certifies as it is told, and its distribution part says who asks.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request as HttpRequest;
use axum::{Extension, Router, middleware, routing};
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http::{Response, Uri};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::codegen::BoxStream;
use tonic::{Request, Response as Answer, Status, Streaming};
use tote_rpc::identity::{Authorities, Identity, Peer, Role};
use tote_rpc::testing::Pki;
use tote_rpc::v1::{self, agent_server::Agent};
use tote_rpc::{BlobClient, OnRefusal, Refusal};

pub const LOOPBACK: &str = "127.0.0.1";

/// The node whose agent is played.
pub const NODE: &str = "n";

pub const TOKEN: &str = "token of a pod";

/// How long anything may take that takes no time.
pub const SOON: Duration = Duration::from_secs(10);

/// How large `/large` is, and a piece of `/pieces`.
pub const LARGE: usize = 5 << 20;
pub const PIECE: &[u8] = &[7; 1000];

struct Played(Arc<Identity>);

#[tonic::async_trait]
impl Agent for Played {
    type SessionStream = BoxStream<v1::SessionResponse>;
    type ImportStream = BoxStream<v1::ImportEvent>;

    /// Never says anything, and never ends.
    async fn session(
        &self,
        _: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Answer<Self::SessionStream>, Status> {
        Ok(Answer::new(stream::pending().boxed()))
    }

    async fn import(&self, _: Request<v1::ImportRequest>) -> Result<Answer<Self::ImportStream>, Status> {
        Err(Status::unimplemented("played"))
    }

    async fn cancel(&self, _: Request<v1::CancelRequest>) -> Result<Answer<v1::CancelResponse>, Status> {
        Ok(Answer::new(v1::CancelResponse::default()))
    }

    async fn attest(&self, _: Request<v1::AttestRequest>) -> Result<Answer<v1::AttestResponse>, Status> {
        Ok(Answer::new(v1::AttestResponse { token: TOKEN.to_owned() }))
    }

    async fn certify(
        &self,
        request: Request<v1::CertifyRequest>,
    ) -> Result<Answer<v1::CertifyResponse>, Status> {
        let request = request.into_inner();
        let wrong = |error: String| Status::invalid_argument(error);
        let authorities = request.authorities.into_iter().map(Into::into).collect();
        let authorities =
            Authorities::from_certificates(authorities).map_err(|error| wrong(error.to_string()))?;
        self.0.trust(&authorities);
        let installed = self.0.install(request.certificate.into(), &Role::Node(NODE.into()));
        installed.map_err(|error| wrong(error.to_string()))?;
        Ok(Answer::new(v1::CertifyResponse::default()))
    }

    async fn grant(&self, _: Request<v1::GrantRequest>) -> Result<Answer<v1::GrantResponse>, Status> {
        Ok(Answer::new(v1::GrantResponse::default()))
    }

    async fn revoke(&self, _: Request<v1::RevokeRequest>) -> Result<Answer<v1::RevokeResponse>, Status> {
        Ok(Answer::new(v1::RevokeResponse::default()))
    }

    async fn remove(&self, _: Request<v1::RemoveRequest>) -> Result<Answer<v1::RemoveResponse>, Status> {
        Ok(Answer::new(v1::RemoveResponse::default()))
    }
}

/// What serves, and what it was told.
pub struct Served {
    pub address: SocketAddr,
    /// How many pieces of `/pieces` may be sent beyond the first of each; closed, the body ends.
    pub pieces: Arc<Semaphore>,
    requests: Arc<AtomicUsize>,
    refusals: watch::Receiver<Vec<Refusal>>,
    stop: CancellationToken,
    serving: JoinHandle<Result<(), rustls::Error>>,
}

/// Serves on loopback.
pub async fn serve(identity: &Arc<Identity>) -> Served {
    serve_on(LOOPBACK, identity).await.unwrap()
}

pub async fn serve_on(ip: &str, identity: &Arc<Identity>) -> std::io::Result<Served> {
    let listener = TcpListener::bind((ip, 0)).await?;
    let address = listener.local_addr()?;
    let (told, refusals) = watch::channel(Vec::new());
    let on_refusal: OnRefusal = Arc::new(move |refusal| told.send_modify(|all| all.push(refusal)));
    let (pieces, requests) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)));
    let app = distribution(pieces.clone(), requests.clone());
    let stop = CancellationToken::new();
    let agent = Played(identity.clone());
    let serving =
        tokio::spawn(tote_rpc::serve(listener, identity.clone(), agent, app, on_refusal, stop.clone()));
    Ok(Served { address, pieces, requests, refusals, stop, serving })
}

fn distribution(pieces: Arc<Semaphore>, requests: Arc<AtomicUsize>) -> Router {
    let in_pieces = move || {
        let later = stream::unfold(pieces.clone(), |pieces| async {
            pieces.acquire().await.ok()?.forget();
            Some((PIECE, pieces))
        });
        let all = stream::once(std::future::ready(PIECE)).chain(later);
        std::future::ready(Body::from_stream(
            all.map(|piece| Ok::<_, std::io::Error>(Bytes::from_static(piece))),
        ))
    };
    let counted = middleware::map_request(move |request: HttpRequest| {
        requests.fetch_add(1, Ordering::SeqCst);
        std::future::ready(request)
    });
    let peer = |Extension(peer): Extension<Peer>| std::future::ready(peer.role.to_string());
    Router::new()
        .route("/peer", routing::get(peer))
        .route("/large", routing::get(|| std::future::ready(vec![1; LARGE])))
        .route("/pieces", routing::get(in_pieces))
        .layer(counted)
}

impl Served {
    /// How many requests the distribution part has had.
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    pub fn refusals(&self) -> Vec<Refusal> {
        self.refusals.borrow().clone()
    }

    /// Waits until so many have been refused, as long as that may take, and says for what.
    pub async fn refused(&mut self, count: usize) -> Vec<Refusal> {
        let _ = timeout(SOON, self.refusals.wait_for(|all| all.len() >= count)).await;
        self.refusals()
    }

    pub fn uri(&self, path: &str) -> Uri {
        format!("https://{}/{path}", self.address).parse().unwrap()
    }

    /// Waits until all is over that was under way.
    pub async fn stopped(self) {
        self.stop.cancel();
        timeout(SOON, self.serving).await.unwrap().unwrap().unwrap();
    }
}

/// Calls the agent of [`NODE`] once, on a connection of its own.
pub async fn call(served: &Served, caller: &Arc<Identity>) -> Result<(), String> {
    let connection =
        tote_rpc::connect(served.address, NODE, caller).await.map_err(|error| error.to_string())?;
    let mut client = connection.into_client().map_err(|error| error.to_string())?;
    client.cancel(v1::CancelRequest::default()).await.map(drop).map_err(|status| status.to_string())
}

/// Certain that the service goes on.
pub async fn goes_on(served: &Served, pki: &Pki) {
    let good = timeout(SOON, call(served, &pki.controller())).await;
    assert_eq!(good, Ok(Ok(())), "a good call after {:?}", served.refusals());
}

/// Asks for something of the distribution part.
pub async fn get(
    client: &BlobClient,
    uri: Uri,
) -> Result<Response<Incoming>, hyper_util::client::legacy::Error> {
    timeout(SOON, client.get(uri)).await.expect("no answer")
}

/// A body, all of it.
pub async fn whole(response: Response<Incoming>) -> Result<Bytes, hyper::Error> {
    Ok(timeout(SOON, response.into_body().collect()).await.expect("no end")?.to_bytes())
}

/// The next so many pieces of a body.
pub async fn pieces(body: &mut Incoming, count: usize) {
    let mut left = count * PIECE.len();
    while left > 0 {
        let frame = timeout(SOON, body.frame()).await.expect("no piece").expect("an end").unwrap();
        left = left.checked_sub(frame.into_data().unwrap().len()).expect("more than was due");
    }
}

/// Its end, and that nothing was cut off.
pub async fn ended(body: &mut Incoming) {
    let frame = timeout(SOON, body.frame()).await.expect("no end");
    assert!(frame.is_none(), "{frame:?}");
}
