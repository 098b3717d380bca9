//! Sessions and transfers against an agent that is played here, over real connections on loopback.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test

mod grants;
mod identity;
mod played;
mod previous;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;
use tote_controller::decide::{Event, TransferEvent};
use tote_controller::fleet::{Agents, FleetEvent, Grants};
use tote_controller::transfer;
use tote_rpc::v1::{self, import_event, session_response::Message};

use played::{DEADLINE, Played, bench, client_of, digest, image, serve};

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
    played.says.send(Message::Delta(delta)).unwrap();
    let delta = bench.next().await;
    let FleetEvent::Delta { upserted, removed, .. } = delta else { panic!("{delta:?}") };
    assert_eq!(
        (upserted[0].target.to_string(), removed.len()),
        (digest(2), 1),
        "what is malformed is left out"
    );
    for down in [true, false] {
        played.says.send(Message::Runtime(v1::Runtime { down })).unwrap();
        let heard = bench.next().await;
        assert!(matches!(heard, FleetEvent::Runtime { is_down, .. } if is_down == down), "{heard:?}");
    }

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
    let client = client_of("a", address).await;
    let (events, mut heard) = mpsc::channel(64);
    let request = v1::ImportRequest { transfer_id: "t-1".into(), ..v1::ImportRequest::default() };
    let grants = Grants::new(Agents::default(), &request, "a", DEADLINE);
    timeout(DEADLINE, transfer::follow(Some(client), request, grants, "uid".into(), 3, events))
        .await
        .unwrap();
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
    let unpacking = v1::Progress { stage: v1::Stage::Unpacking.into(), ..progress.clone() };
    let done = v1::Done { total_bytes: 9, transferred_bytes: 9, ..v1::Done::default() };
    let said = [progress, unpacking].map(import_event::Event::Progress);
    let events = said.into_iter().chain([import_event::Event::Done(done)]).collect();
    let all = follow(Ok(events)).await;
    assert!(
        matches!(&all[..], [TransferEvent::Progress(p), TransferEvent::Progress(u), TransferEvent::Done(d)]
            if (p.transferred, d.transferred) == (4, 9) && !p.is_unpacking && u.is_unpacking),
        "{all:?}"
    );
}

#[tokio::test]
async fn a_failure_keeps_its_cause() {
    let failed = v1::Failed {
        cause: v1::Cause::DiskFull.into(),
        message: "full".into(),
        retryable: true,
        lying_nodes: vec!["n3".to_owned()],
    };
    let all = follow(Ok(vec![import_event::Event::Failed(failed)])).await;
    assert!(
        matches!(&all[..], [TransferEvent::Failed { reason: "DiskFull", message, retryable: true, lying_nodes }]
            if message == "full" && lying_nodes == &["n3"]),
        "{all:?}"
    );
}

#[tokio::test]
async fn a_transfer_that_was_cancelled_is_no_failed_attempt() {
    let failed = v1::Failed {
        cause: v1::Cause::Cancelled.into(),
        message: "ended".into(),
        retryable: true,
        ..Default::default()
    };
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
    let request = v1::ImportRequest::default();
    let grants = Grants::new(Agents::default(), &request, "a", DEADLINE);
    transfer::follow(None, request, grants, "uid".into(), 1, events).await;
    assert!(matches!(heard.recv().await, Some(Event::Transfer { event: TransferEvent::Lost { .. }, .. })));
}

#[tokio::test]
async fn a_cancellation_reaches_the_agent() {
    let played = Played::new("a");
    let (address, _stop) = serve(played.clone(), None).await;
    let client = client_of("a", address).await;
    let request = v1::CancelRequest { term: None, transfer_id: "t-1".into() };
    // At first it has no session.
    let asked = AtomicUsize::new(0);
    let session = || (asked.fetch_add(1, Ordering::Relaxed) >= 2).then(|| client.clone());
    timeout(DEADLINE, transfer::cancel(session, request)).await.unwrap();
    assert_eq!(*played.heard.lock().unwrap(), ["cancel t-1"]);
}
