//! What a session tells beside the inventory.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tote_agent::agent::{Settings, run};
use tote_agent::containerd::Fake;
use tote_agent::import::{Lifetimes, Patience};
use tote_rpc::testing::{Pki, wire};
use tote_rpc::v1::agent_client::AgentClient;
use tote_rpc::v1::{self, session_request::Message as Up, session_response::Message};

/// Longer than containerd is asked rarely, and then often enough to be called silent.
const DEADLINE: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_session_tells_when_containerd_stops_answering_and_when_it_answers_again() {
    let (pki, stop, fake) = (Pki::new(), CancellationToken::new(), Fake::default());
    let _stopped = stop.clone().drop_guard();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let settings = Settings {
        node_name: "n".to_owned(),
        max_bandwidth: None,
        max_upload: None,
        patience: Patience {
            head: Duration::from_secs(2),
            piece: Duration::from_secs(2),
            pause: Duration::from_millis(10),
            rounds: 2,
            growth: Duration::from_secs(2),
        },
        records: None,
        lifetimes: Lifetimes::default(),
        identity: pki.node("n", "127.0.0.1"),
        mounts: None,
    };
    let agent = run(Arc::new(fake.clone()), settings, listener, None, stop.clone());
    tokio::spawn(async move { agent.await.unwrap() });

    let (wire, origin) = wire(address, &pki.controller()).await;
    let mut client = AgentClient::with_origin(wire, origin);
    let (requests, outgoing) = tokio::sync::mpsc::channel(1);
    let term = v1::Term { lease_uid: "lease".into(), lease_transitions: 7 };
    let hello = v1::Hello { term: Some(term), node_name: "n".into() };
    requests.send(v1::SessionRequest { message: Some(Up::Hello(hello)) }).await.unwrap();
    let mut session = client.session(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
    let mut next = async || {
        let response = timeout(DEADLINE, session.message()).await.expect("within the deadline");
        response.unwrap().unwrap().message.unwrap()
    };
    assert!(matches!(next().await, Message::Welcome(_)));
    assert!(matches!(next().await, Message::Snapshot(_)));
    fake.die_after(Some(0));
    let said = next().await;
    assert!(matches!(said, Message::Runtime(v1::Runtime { down: true })), "{said:?}");
    fake.die_after(None);
    let said = next().await;
    assert!(matches!(said, Message::Runtime(v1::Runtime { down: false })), "{said:?}");
}
