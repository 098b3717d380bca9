//! Sessions and transfers against an agent that is played here, over real connections on loopback.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{StreamExt as _, stream};
use tokio::net::TcpListener;
use tokio::sync::{broadcast, mpsc};
use tokio::time::timeout;
use tokio_stream::wrappers::BroadcastStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tote_controller::decide::{Event, TransferEvent};
use tote_controller::fleet::{Agents, Endpoint, Fleet, FleetEvent};
use tote_controller::transfer;
use tote_rpc::v1::{self, agent_server::Agent, import_event, session_response::Message};

const DEADLINE: Duration = Duration::from_secs(20);

/// An agent that says what it is told to say.
#[derive(Clone)]
struct Played {
    node: &'static str,
    images: Vec<v1::Image>,
    deltas: broadcast::Sender<v1::InventoryDelta>,
    import: Result<Vec<import_event::Event>, tonic::Code>,
    heard: Arc<Mutex<Vec<String>>>,
    stop: CancellationToken,
}

impl Played {
    fn new(node: &'static str) -> Self {
        Self {
            node,
            images: vec![image(1)],
            deltas: broadcast::channel(16).0,
            import: Ok(vec![]),
            heard: Arc::default(),
            stop: CancellationToken::new(),
        }
    }

    fn heard(&self, what: String) {
        self.heard.lock().unwrap().push(what);
    }
}

fn digest(n: u8) -> String {
    tote_image::Digest::sha256(&[n]).to_string()
}

fn image(n: u8) -> v1::Image {
    v1::Image {
        target: Some(v1::Descriptor { digest: digest(n), ..v1::Descriptor::default() }),
        names: vec![format!("r.test/x:{n}")],
        manifests: vec![],
    }
}

#[allow(clippy::unnecessary_wraps)] // an item of a stream
fn message(message: Message) -> Result<v1::SessionResponse, Status> {
    Ok(v1::SessionResponse { message: Some(message) })
}

#[tonic::async_trait]
impl Agent for Played {
    type SessionStream = BoxStream<'static, Result<v1::SessionResponse, Status>>;
    type ImportStream = BoxStream<'static, Result<v1::ImportEvent, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let hello = request.into_inner().message().await?;
        self.heard(format!("{:?}", hello.and_then(|hello| hello.message)));
        let welcome = v1::Welcome {
            node_name: self.node.to_owned(),
            platform: Some(v1::Platform {
                os: "linux".into(),
                architecture: "amd64".into(),
                ..Default::default()
            }),
            ..v1::Welcome::default()
        };
        let mut parts: Vec<_> = self
            .images
            .iter()
            .map(|image| {
                message(Message::Snapshot(v1::InventorySnapshot { images: vec![image.clone()], last: false }))
            })
            .collect();
        parts.insert(0, message(Message::Welcome(welcome)));
        parts.push(message(Message::Snapshot(v1::InventorySnapshot { images: vec![], last: true })));
        let deltas = BroadcastStream::new(self.deltas.subscribe());
        let deltas = deltas.map(|delta| message(Message::Delta(delta.unwrap())));
        Ok(Response::new(
            stream::iter(parts).chain(deltas).take_until(self.stop.clone().cancelled_owned()).boxed(),
        ))
    }

    async fn import(
        &self,
        request: Request<v1::ImportRequest>,
    ) -> Result<Response<Self::ImportStream>, Status> {
        self.heard(format!("import {}", request.into_inner().transfer_id));
        match &self.import {
            Ok(events) => {
                let events =
                    events.clone().into_iter().map(|event| Ok(v1::ImportEvent { event: Some(event) }));
                Ok(Response::new(stream::iter(events.collect::<Vec<_>>()).boxed()))
            }
            Err(code) => Err(Status::new(*code, "as told")),
        }
    }

    async fn cancel(
        &self,
        request: Request<v1::CancelRequest>,
    ) -> Result<Response<v1::CancelResponse>, Status> {
        self.heard(format!("cancel {}", request.into_inner().transfer_id));
        Ok(Response::new(v1::CancelResponse { found: true }))
    }
}

/// Serves an agent until the token is cancelled; on `address`, or anywhere.
async fn serve(agent: Played, address: Option<SocketAddr>) -> (SocketAddr, CancellationToken) {
    let address = address.unwrap_or_else(|| "127.0.0.1:0".parse().unwrap());
    let listener = TcpListener::bind(address).await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = agent.stop.clone();
    tokio::spawn(tote_rpc::serve(listener, agent, axum::Router::new(), stop.clone()));
    (address, stop)
}

struct Bench {
    fleet: Fleet,
    agents: Agents,
    events: mpsc::Receiver<FleetEvent>,
    _stop: tokio_util::sync::DropGuard,
}

fn bench() -> Bench {
    let (sender, events) = mpsc::channel(64);
    let stop = CancellationToken::new();
    let agents = Agents::default();
    let term = v1::Term { lease_uid: "lease".into(), lease_transitions: 7 };
    let fleet = Fleet::new(term, agents.clone(), sender, stop.clone());
    Bench { fleet, agents, events, _stop: stop.drop_guard() }
}

impl Bench {
    async fn next(&mut self) -> FleetEvent {
        timeout(DEADLINE, self.events.recv()).await.expect("an event of the fleet").unwrap()
    }

    async fn endpoints(&mut self, endpoints: &[(&str, SocketAddr)]) {
        let endpoints = endpoints.iter().map(|(node, address)| Endpoint {
            node: (*node).into(),
            address: *address,
            ready: true,
        });
        self.fleet.set_endpoints(endpoints.collect()).await;
    }
}

#[tokio::test]
async fn a_session_tells_the_inventory_and_what_changes_and_is_taken_up_again() {
    let played = Played::new("a");
    let (address, stop) = serve(played.clone(), None).await;
    let mut bench = bench();
    bench.endpoints(&[("a", address)]).await;
    assert!(matches!(bench.next().await, FleetEvent::Expected(nodes) if nodes.contains("a")));
    let up = bench.next().await;
    let FleetEvent::Up { node, address: at, platform, images, .. } = up else { panic!("{up:?}") };
    assert_eq!((&*node, at, platform.to_string()), ("a", address.to_string(), "linux/amd64".into()));
    assert_eq!(images[0].target.to_string(), digest(1));
    assert!(bench.agents.client("a").is_some());
    let heard = played.heard.lock().unwrap().join("\n");
    assert!(heard.contains("\"lease\"") && heard.contains("lease_transitions: 7"), "{heard}");

    let delta = v1::InventoryDelta { upserted: vec![image(2)], removed: vec![digest(1), "nonsense".into()] };
    played.deltas.send(delta).unwrap();
    let delta = bench.next().await;
    let FleetEvent::Delta { upserted, removed, .. } = delta else { panic!("{delta:?}") };
    assert_eq!(
        (upserted[0].target.to_string(), removed.len()),
        (digest(2), 1),
        "what is malformed is left out"
    );

    stop.cancel();
    assert!(matches!(bench.next().await, FleetEvent::Down { node } if &*node == "a"));
    assert!(bench.agents.client("a").is_none());
    let (_, _stop) = serve(Played::new("a"), Some(address)).await;
    assert!(matches!(bench.next().await, FleetEvent::Up { .. }), "dialled again");
}

#[tokio::test]
async fn an_endpoint_that_goes_or_moves_ends_its_session_first() {
    let (one, _first) = serve(Played::new("a"), None).await;
    let (two, _second) = serve(Played::new("a"), None).await;
    let mut bench = bench();
    bench.endpoints(&[("a", one)]).await;
    bench.next().await;
    assert!(matches!(bench.next().await, FleetEvent::Up { .. }));
    bench.endpoints(&[("a", two)]).await;
    assert!(matches!(bench.next().await, FleetEvent::Down { .. }));
    assert!(matches!(bench.next().await, FleetEvent::Expected(_)));
    let up = bench.next().await;
    assert!(matches!(&up, FleetEvent::Up { address, .. } if *address == two.to_string()), "{up:?}");
    bench.endpoints(&[]).await;
    assert!(matches!(bench.next().await, FleetEvent::Down { .. }));
}

#[tokio::test]
async fn an_agent_of_another_node_is_not_believed() {
    let impostor = Played::new("b");
    let (address, _stop) = serve(impostor.clone(), None).await;
    let mut bench = bench();
    bench.endpoints(&[("a", address)]).await;
    assert!(matches!(bench.next().await, FleetEvent::Expected(_)));
    let asked_twice = async {
        while impostor.heard.lock().unwrap().len() < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(DEADLINE, asked_twice).await.expect("dialled again after it said whose it is");
    assert!(bench.events.try_recv().is_err());
    assert!(bench.agents.client("a").is_none());
}

/// What the transfer of an agent that says `import` comes to.
async fn follow(import: Result<Vec<import_event::Event>, tonic::Code>) -> Vec<TransferEvent> {
    let (address, _stop) = serve(Played { import, ..Played::new("a") }, None).await;
    let client = tote_rpc::connect(address).await.unwrap();
    let (events, mut heard) = mpsc::channel(64);
    let request = v1::ImportRequest { transfer_id: "t-1".into(), ..v1::ImportRequest::default() };
    timeout(DEADLINE, transfer::follow(Some(client), request, "uid".into(), 3, events)).await.unwrap();
    let mut all = Vec::new();
    while let Some(event) = heard.recv().await {
        let Event::Transfer { uid, stream: 3, event } = event else { panic!("{event:?}") };
        assert_eq!(&*uid, "uid");
        all.push(event);
    }
    all
}

#[tokio::test]
async fn a_transfer_is_followed_to_its_end() {
    let progress = v1::Progress { total_bytes: 9, transferred_bytes: 4, ..v1::Progress::default() };
    let done = v1::Done { total_bytes: 9, transferred_bytes: 9, ..v1::Done::default() };
    let events = vec![import_event::Event::Progress(progress), import_event::Event::Done(done)];
    let all = follow(Ok(events)).await;
    assert!(
        matches!(&all[..], [TransferEvent::Progress(p), TransferEvent::Done(d)]
            if (p.transferred, d.transferred) == (4, 9)),
        "{all:?}"
    );
}

#[tokio::test]
async fn a_failure_keeps_its_cause() {
    let failed = v1::Failed { cause: v1::Cause::DiskFull.into(), message: "full".into(), retryable: true };
    let all = follow(Ok(vec![import_event::Event::Failed(failed)])).await;
    assert!(
        matches!(&all[..], [TransferEvent::Failed { reason: "DiskFull", message, retryable: true }]
            if message == "full"),
        "{all:?}"
    );
}

#[tokio::test]
async fn a_transfer_that_was_cancelled_is_no_failed_attempt() {
    let failed = v1::Failed { cause: v1::Cause::Cancelled.into(), message: "ended".into(), retryable: true };
    let all = follow(Ok(vec![import_event::Event::Failed(failed)])).await;
    assert!(matches!(&all[..], [TransferEvent::Lost { message }] if message == "ended"), "{all:?}");
}

#[tokio::test]
async fn what_breaks_is_lost_and_what_is_refused_has_failed() {
    for (import, lost) in [
        (Ok(vec![]), true),
        (Err(tonic::Code::Unavailable), true),
        (Err(tonic::Code::ResourceExhausted), true),
        (Err(tonic::Code::FailedPrecondition), true),
        (Err(tonic::Code::InvalidArgument), false),
    ] {
        let all = follow(import.clone()).await;
        let as_wanted = match &all[..] {
            [TransferEvent::Lost { .. }] => lost,
            [TransferEvent::Failed { retryable: false, .. }] => !lost,
            _ => false,
        };
        assert!(as_wanted, "{import:?}: {all:?}");
    }
    let (events, mut heard) = mpsc::channel(64);
    transfer::follow(None, v1::ImportRequest::default(), "uid".into(), 1, events).await;
    assert!(matches!(heard.recv().await, Some(Event::Transfer { event: TransferEvent::Lost { .. }, .. })));
}

#[tokio::test]
async fn a_cancellation_reaches_the_agent() {
    let played = Played::new("a");
    let (address, _stop) = serve(played.clone(), None).await;
    let client = tote_rpc::connect(address).await.unwrap();
    let request = v1::CancelRequest { term: None, transfer_id: "t-1".into() };
    // At first it has no session.
    let asked = AtomicUsize::new(0);
    let session = || (asked.fetch_add(1, Ordering::Relaxed) >= 2).then(|| client.clone());
    timeout(DEADLINE, transfer::cancel(session, request)).await.unwrap();
    assert_eq!(*played.heard.lock().unwrap(), ["cancel t-1"]);
}
