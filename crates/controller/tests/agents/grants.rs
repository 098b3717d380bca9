//! What the sources of a transfer are told, and when.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::Code;
use tote_controller::decide::{Action, Event, TransferEvent};
use tote_controller::fleet::{FleetEvent, Grants};
use tote_controller::perform::Performer;
use tote_controller::salvage::Source;
use tote_controller::transfer;
use tote_image::Digest;
use tote_rpc::v1::{self, import_event};

use crate::played::{Bench, DEADLINE, Played, bench, serve, silent, term, until_heard};

/// Sessions with a target and two sources.
async fn three(target: &Played, one: &Played, two: &Played) -> (Bench, Vec<SocketAddr>) {
    let mut addresses = Vec::new();
    for played in [target, one, two] {
        addresses.push(serve(played.clone(), None).await.0);
    }
    let mut bench = bench();
    bench.endpoints(&[("target", addresses[0]), ("one", addresses[1]), ("two", addresses[2])]).await;
    let mut up = 0;
    while up < 3 {
        up += usize::from(matches!(bench.next().await, FleetEvent::Up { .. }));
    }
    (bench, addresses)
}

fn request(addresses: &[SocketAddr]) -> v1::ImportRequest {
    let source = |node: &str, at: usize| v1::Source {
        node_name: node.to_owned(),
        address: addresses[at].to_string(),
        ..v1::Source::default()
    };
    v1::ImportRequest {
        transfer_id: "t-1".into(),
        sources: vec![source("one", 1), source("two", 2)],
        ..v1::ImportRequest::default()
    }
}

/// Follows a transfer; returns what it came to.
async fn follow(bench: &Bench, request: v1::ImportRequest, life: Duration) -> Vec<TransferEvent> {
    let (events, mut heard) = mpsc::channel(64);
    let grants = Grants::new(bench.agents.clone(), &request, "target", life);
    let client = bench.agents.client("target");
    timeout(DEADLINE, transfer::follow(client, request, grants, "uid".into(), 3, events)).await.unwrap();
    let mut all = Vec::new();
    while let Some(Event::Transfer { event, .. }) = heard.recv().await {
        all.push(event);
    }
    all
}

fn heard(played: &Played) -> Vec<String> {
    let all = played.heard.lock().unwrap();
    all.iter().filter(|heard| !heard.starts_with("Some(Hello")).cloned().collect()
}

fn done() -> Vec<import_event::Event> {
    vec![import_event::Event::Done(v1::Done::default())]
}

#[tokio::test]
async fn sources_are_told_before_a_transfer_and_after_it() {
    let target = Played { import: Ok(done()), ..Played::new("target") };
    let (one, two) = (Played::new("one"), Played::new("two"));
    let (bench, addresses) = three(&target, &one, &two).await;
    let all = follow(&bench, request(&addresses), DEADLINE).await;
    assert!(matches!(all[..], [TransferEvent::Done(_)]), "{all:?}");
    for source in [&one, &two] {
        assert_eq!(heard(source), ["grant t-1 to target", "revoke t-1"]);
    }
    assert_eq!(heard(&target), ["import t-1 from one two"]);
}

/// What was decided is what the agent is asked for.
#[tokio::test]
async fn an_import_is_asked_for_with_the_size_that_it_may_have() {
    let target = Played { import: Ok(done()), ..Played::new("target") };
    let (bench, addresses) = three(&target, &Played::new("one"), &Played::new("two")).await;
    let (events, mut heard_of) = mpsc::channel(64);
    let agents = (bench.agents.clone(), DEADLINE);
    let mut performer = Performer::new(silent(), "me", agents, term(), events, (Arc::default(), None, None));
    performer.perform(Action::Import {
        uid: "uid".into(),
        stream: 3,
        node: "target".into(),
        transfer_id: "t-1".to_owned(),
        reference: "r.test/x:1".to_owned(),
        digest: Digest::sha256(b"x"),
        sources: vec![Source {
            node: "one".into(),
            address: addresses[1].to_string(),
            last_resort: false,
            relay: false,
        }],
        pulled: None,
        max_bytes: 2 << 30,
    });
    let event = timeout(DEADLINE, heard_of.recv()).await.unwrap();
    assert!(matches!(event, Some(Event::Transfer { event: TransferEvent::Done(_), .. })), "{event:?}");
    assert_eq!(heard(&target), ["import t-1 from one, 2147483648 bytes at most"]);
}

/// One that is getting the image itself may not know it yet; the others must.
#[tokio::test]
async fn a_relay_is_told_that_the_image_is_expected_there() {
    let target = Played { import: Ok(done()), ..Played::new("target") };
    let (one, two) = (Played::new("one"), Played::new("two"));
    let (bench, addresses) = three(&target, &one, &two).await;
    let mut request = request(&addresses);
    request.sources[0].relay = true;
    request.sources[1].last_resort = true;
    follow(&bench, request.clone(), DEADLINE).await;
    assert_eq!(heard(&one), ["grant t-1 to target, expected", "revoke t-1"]);
    assert_eq!(heard(&two), ["grant t-1 to target", "revoke t-1"]);
    assert_eq!(heard(&target), ["import t-1 from one (relay) two (last resort)"]);
    // One that knows nothing of it is done without.
    let one = Played { grant: Err(Code::NotFound), ..Played::new("one") };
    let (bench, addresses) = three(&target, &one, &two).await;
    for (at, source) in request.sources.iter_mut().enumerate() {
        source.address = addresses[at + 1].to_string();
    }
    let all = follow(&bench, request, DEADLINE).await;
    assert!(matches!(all[..], [TransferEvent::Done(_)]), "{all:?}");
    assert_eq!(heard(&target)[1..], ["import t-1 from two (last resort)"]);
}

#[tokio::test]
async fn a_source_that_does_not_let_it_read_is_left_out() {
    let target = Played { import: Ok(done()), ..Played::new("target") };
    let (one, two) = (Played { grant: Err(Code::NotFound), ..Played::new("one") }, Played::new("two"));
    let (bench, addresses) = three(&target, &one, &two).await;
    let all = follow(&bench, request(&addresses), DEADLINE).await;
    assert!(matches!(all[..], [TransferEvent::Done(_)]), "{all:?}");
    assert_eq!(heard(&target), ["import t-1 from two"]);

    let target = Played { import: Ok(done()), ..Played::new("target") };
    let two = Played { grant: Err(Code::ResourceExhausted), ..Played::new("two") };
    let (bench, addresses) = three(&target, &one, &two).await;
    let all = follow(&bench, request(&addresses), DEADLINE).await;
    let [TransferEvent::Lost { message }] = &all[..] else { panic!("{all:?}") };
    assert!(message.contains("one: as told") && message.contains("two: as told"), "{message}");
    assert!(heard(&target).is_empty(), "nothing is begun that cannot be");
}

/// A transfer that the target will not begin, whatever comes, has ended; one that it cannot begin now has not.
#[tokio::test]
async fn what_is_refused_for_good_is_taken_back() {
    for (code, told) in [
        (Code::InvalidArgument, &["grant t-1 to target", "revoke t-1"][..]),
        (Code::Unavailable, &["grant t-1 to target"]),
    ] {
        let target = Played { import: Err(code), ..Played::new("target") };
        let (one, two) = (Played::new("one"), Played::new("two"));
        let (bench, addresses) = three(&target, &one, &two).await;
        follow(&bench, request(&addresses), DEADLINE).await;
        assert_eq!(heard(&one), told, "{code:?}");
    }
}

/// Follows a transfer that does not end, with grants of such a life.
fn follow_on(bench: &Bench, request: v1::ImportRequest, life: Duration) -> tokio::task::JoinHandle<()> {
    let agents = bench.agents.clone();
    tokio::spawn(async move {
        let (events, _heard) = mpsc::channel(64);
        let grants = Grants::new(agents.clone(), &request, "target", life);
        transfer::follow(agents.client("target"), request, grants, "uid".into(), 3, events).await;
    })
}

#[tokio::test]
async fn grants_are_given_again_before_they_run_out() {
    let target = Played { hang: true, ..Played::new("target") };
    let (one, two) = (Played::new("one"), Played::new("two"));
    let (bench, addresses) = three(&target, &one, &two).await;
    let following = follow_on(&bench, request(&addresses), Duration::from_millis(1500));
    let grants = |played: &Played| heard(played).iter().filter(|heard| heard.starts_with("grant")).count();
    let again = async {
        while grants(&one) < 3 || grants(&two) < 3 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(DEADLINE, again).await.expect("each is given again");
    following.abort();
}

#[tokio::test]
async fn an_agent_that_was_started_again_is_told_at_once() {
    let target = Played { hang: true, ..Played::new("target") };
    let (one, two) = (Played::new("one"), Played::new("two"));
    let (mut bench, addresses) = three(&target, &one, &two).await;
    // None of them runs out here.
    let following = follow_on(&bench, request(&addresses), 100 * DEADLINE);
    until_heard(&two, "grant t-1 to target").await;
    two.stop.cancel();
    while !matches!(bench.next().await, FleetEvent::Down { .. }) {}
    let restarted = Played::new("two");
    let _ = serve(restarted.clone(), Some(addresses[2])).await;
    until_heard(&restarted, "grant t-1 to target").await;
    following.abort();
}
