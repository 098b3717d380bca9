//! This agent with a controller of the version before, made from that version's definition of the protocol. It gives no
//! grants, so blobs do not move until it is replaced; all else works, and what does not says why.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tote_agent::agent::{Settings, run};
use tote_agent::containerd::{Containerd as _, Fake};
use tote_agent::import::{Lifetimes, Patience};
use tote_agent::testing::{Blobs, tar};
use tote_rpc::previous::agent_client::AgentClient;
use tote_rpc::previous::session_request::Message as Up;
use tote_rpc::previous::{self as before, import_event::Event, session_response::Message};
use tote_rpc::testing::{Pki, wire};

const PATIENCE: Patience = Patience {
    head: Duration::from_secs(2),
    piece: Duration::from_secs(2),
    pause: Duration::from_millis(10),
    rounds: 2,
    growth: Duration::from_secs(2),
};

/// An agent of this version.
async fn agent(pki: &Pki, node: &str, fake: &Fake, stop: &CancellationToken) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let settings = Settings {
        node_name: node.to_owned(),
        max_bandwidth: None,
        max_upload: None,
        patience: PATIENCE,
        lifetimes: Lifetimes::default(),
        identity: pki.node(node, "127.0.0.1"),
        mounts: None,
        records: None,
    };
    let (fake, stop) = (fake.clone(), stop.clone());
    tokio::spawn(async move { run(Arc::new(fake), settings, listener, None, stop).await.unwrap() });
    address
}

fn term(transitions: i64) -> before::Term {
    before::Term { lease_uid: "lease".into(), lease_transitions: transitions }
}

#[tokio::test]
async fn a_controller_of_the_version_before_is_understood() {
    let (pki, stop) = (Pki::new(), CancellationToken::new());
    let _stopped = stop.clone().drop_guard();
    let (holder, target) = (Fake::default(), Fake::default());
    let (held, known) = (Blobs::image(&[tar(&[("a", b"1")])]), Blobs::image(&[tar(&[("b", b"2")])]));
    held.pull_into(&holder, "registry.test/held:1");
    known.pull_into(&target, "registry.test/known:1");
    let source = agent(&pki, "source", &holder, &stop).await;
    let address = agent(&pki, "target", &target, &stop).await;
    let (wire, origin) = wire(address, &pki.controller()).await;
    let mut client = AgentClient::with_origin(wire, origin);

    let (requests, outgoing) = tokio::sync::mpsc::channel(1);
    let hello = before::Hello { term: Some(term(7)), node_name: "target".into() };
    requests.send(before::SessionRequest { message: Some(Up::Hello(hello)) }).await.unwrap();
    let mut session = client.session(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
    let mut next = async || session.message().await.unwrap().unwrap().message.unwrap();
    assert!(matches!(next().await, Message::Welcome(welcome) if welcome.node_name == "target"));
    let Message::Snapshot(snapshot) = next().await else { panic!("then the snapshot") };
    assert_eq!(snapshot.images[0].names, ["registry.test/known:1"]);

    let import = |id: &str, image: &Blobs, reference: &str| before::ImportRequest {
        term: Some(term(7)),
        transfer_id: id.to_owned(),
        reference: reference.to_owned(),
        digest: image.target.digest.to_string(),
        sources: vec![before::Source { node_name: "source".into(), address: source.to_string() }],
    };
    // What the node holds needs no other node.
    let mut events =
        client.import(import("one", &known, "registry.test/second:1")).await.unwrap().into_inner();
    let end = loop {
        match events.message().await.unwrap().unwrap().event.unwrap() {
            Event::Progress(_) => {}
            end => break end,
        }
    };
    assert!(matches!(end, Event::Done(_)), "{end:?}");
    assert!(target.image("registry.test/second:1").await.unwrap().is_some());

    let mut events = client.import(import("two", &held, "registry.test/held:1")).await.unwrap().into_inner();
    let end = loop {
        match events.message().await.unwrap().unwrap().event.unwrap() {
            Event::Progress(_) => {}
            end => break end,
        }
    };
    let Event::Failed(failed) = end else { panic!("{end:?}") };
    assert_eq!((failed.cause(), failed.retryable), (before::Cause::NoSource, true));
    assert!(failed.message.contains("not granted"), "{}", failed.message);
    let cancel = before::CancelRequest { term: Some(term(7)), transfer_id: "two".into() };
    assert!(client.cancel(cancel).await.unwrap().into_inner().found);
    let old = before::CancelRequest { term: Some(term(6)), transfer_id: "two".into() };
    assert_eq!(client.cancel(old).await.unwrap_err().code(), tonic::Code::FailedPrecondition);
}
