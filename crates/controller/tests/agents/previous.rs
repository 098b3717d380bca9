//! This controller with an agent of the version before, made from that version's definition of the protocol. What it
//! does not know of, it answers as gRPC has it: unimplemented.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use futures::stream::BoxStream;
use futures::{StreamExt as _, stream};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tote_controller::decide::{Event, TransferEvent};
use tote_controller::fleet::{FleetEvent, Grants};
use tote_controller::transfer;
use tote_rpc::previous::agent_server::{Agent, AgentServer};
use tote_rpc::previous::{self, import_event, session_response::Message};
use tote_rpc::v1;

use crate::played::{DEADLINE, PKI, bench, digest};

#[derive(Clone, Default)]
struct Former {
    node: &'static str,
    heard: Arc<Mutex<Vec<String>>>,
}

#[tonic::async_trait]
impl Agent for Former {
    type SessionStream = BoxStream<'static, Result<previous::SessionResponse, Status>>;
    type ImportStream = BoxStream<'static, Result<previous::ImportEvent, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<previous::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let hello = request.into_inner().message().await?;
        self.heard.lock().unwrap().push(format!("{hello:?}"));
        let welcome = previous::Welcome { node_name: self.node.to_owned(), ..previous::Welcome::default() };
        let image = previous::Image {
            target: Some(previous::Descriptor { digest: digest(1), ..previous::Descriptor::default() }),
            ..previous::Image::default()
        };
        let snapshot = previous::InventorySnapshot { images: vec![image], last: true };
        let said = [Message::Welcome(welcome), Message::Snapshot(snapshot)]
            .map(|message| Ok(previous::SessionResponse { message: Some(message) }));
        Ok(Response::new(stream::iter(said).chain(stream::pending()).boxed()))
    }

    async fn import(
        &self,
        request: Request<previous::ImportRequest>,
    ) -> Result<Response<Self::ImportStream>, Status> {
        let request = request.into_inner();
        let sources: Vec<_> = request.sources.iter().map(|source| source.node_name.as_str()).collect();
        self.heard.lock().unwrap().push(format!("import {} from {}", request.transfer_id, sources.join(" ")));
        let done = previous::Done { total_bytes: 9, transferred_bytes: 9, ..previous::Done::default() };
        let event = previous::ImportEvent { event: Some(import_event::Event::Done(done)) };
        Ok(Response::new(stream::iter([Ok(event)]).boxed()))
    }

    async fn cancel(
        &self,
        request: Request<previous::CancelRequest>,
    ) -> Result<Response<previous::CancelResponse>, Status> {
        self.heard.lock().unwrap().push(format!("cancel {}", request.into_inner().transfer_id));
        Ok(Response::new(previous::CancelResponse { found: true }))
    }
}

async fn serve(former: Former) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let app = tonic::service::Routes::new(AgentServer::new(former.clone())).into_axum_router();
    let identity = PKI.node(former.node, "127.0.0.1");
    tokio::spawn(tote_rpc::testing::serve_app(listener, identity, app, CancellationToken::new()));
    address
}

#[tokio::test]
async fn an_agent_of_the_version_before_is_understood_and_used() {
    let (target, source) =
        (Former { node: "target", ..Former::default() }, Former { node: "source", ..Former::default() });
    let (at, source_at) = (serve(target.clone()).await, serve(source.clone()).await);
    let mut bench = bench();
    bench.endpoints(&[("target", at), ("source", source_at)]).await;
    let mut up = 0;
    while up < 2 {
        if let FleetEvent::Up { images, .. } = bench.next().await {
            assert_eq!(images[0].target.to_string(), digest(1));
            up += 1;
        }
    }
    let (events, mut heard) = mpsc::channel(64);
    let source =
        v1::Source { node_name: "source".into(), address: source_at.to_string(), ..v1::Source::default() };
    let request = v1::ImportRequest {
        transfer_id: "t-1".into(),
        sources: vec![source],
        ..v1::ImportRequest::default()
    };
    let grants = Grants::new(bench.agents.clone(), &request, "target", DEADLINE);
    let client = bench.agents.client("target");
    timeout(DEADLINE, transfer::follow(client, request, grants, "uid".into(), 3, events)).await.unwrap();
    let event = heard.recv().await;
    assert!(
        matches!(&event, Some(Event::Transfer { event: TransferEvent::Done(done), .. }) if done.transferred == 9),
        "{event:?}"
    );
    let request = v1::CancelRequest { term: None, transfer_id: "t-1".into() };
    timeout(DEADLINE, transfer::cancel(|| bench.agents.client("target"), request)).await.unwrap();
    let heard = target.heard.lock().unwrap();
    assert!(heard[0].contains("lease_transitions: 7"), "{heard:?}");
    assert_eq!(heard[1..], ["import t-1 from source", "cancel t-1"]);
}
