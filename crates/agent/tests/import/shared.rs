//! Transfers beside each other, attached to, left, cancelled; the bandwidth caps.

use std::time::{Duration, Instant};

use tote_agent::bandwidth::Bandwidth;
use tote_agent::containerd::{Containerd as _, Fake};
use tote_agent::import::{AttachError, Lifetimes};
use tote_agent::testing::{Blobs, tar};
use tote_rpc::v1::Cause;

use crate::nodes::{Node, ended};
use crate::peers::{LIFETIMES, Peer, Trick, agent, agent_with, import, request};
use crate::{NAME, PIECE, check_complete, check_nothing, eventually, image, large_image, noise};

const OTHER: &str = "registry.test/other/app:2";

#[tokio::test]
async fn two_transfers_move_a_blob_once() {
    let image = image().indexed();
    let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
    let agent = agent(&target);
    let (one, two) = tokio::join!(
        import(&agent, request("one", NAME, &image, &[&peer])),
        import(&agent, request("two", OTHER, &image, &[&peer])),
    );
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!(one.transferred_bytes + two.transferred_bytes, one.total_bytes);
    for digest in image.digests() {
        assert_eq!(peer.asked(&digest), 1, "{digest}");
    }
    let repository = OTHER.split(':').next().unwrap();
    for name in [OTHER.to_owned(), format!("{repository}@{}", image.target.digest)] {
        assert_eq!(target.image(&name).await.unwrap().unwrap().target, image.target);
    }
    check_complete(&target, &image, NAME).await;
}

#[tokio::test]
async fn a_cancelled_leader_is_followed() {
    let image = large_image();
    let digest = &image.layers[0].digest;
    let (stalling, good) = (Peer::holding(&image, NAME).await, Peer::holding(&image, NAME).await);
    stalling.trick(digest, Trick::Stall(PIECE + 1000));
    let target = Fake::default();
    let agent = agent(&target);
    let leading = agent.attach(request("one", NAME, &image, &[&stalling])).unwrap();
    eventually("half a layer", async || target.partial(digest).is_some_and(|partial| partial.len() == PIECE))
        .await;
    let mut following = agent.attach(request("two", OTHER, &image, &[&good])).unwrap();
    eventually("the follower waits", async || target.leases().await.unwrap().len() == 2).await;
    assert!(agent.cancel(&request("one", NAME, &image, &[]).id).await.unwrap());
    let ended = leading.states.borrow().outcome.clone().unwrap().unwrap_err();
    assert_eq!(ended.cause(), Cause::Cancelled);
    following.states.wait_for(|state| state.outcome.is_some()).await.unwrap();
    following.states.borrow().outcome.clone().unwrap().unwrap();
    assert_eq!(good.offsets(digest)[0], PIECE as u64, "it goes on where the leader was");
    assert!(!good.offsets(digest).contains(&0), "{:?}", good.offsets(digest));
    check_complete(&target, &image, OTHER).await;
}

/// Nor does it wait for ever for one that is not: the one that moves the blob asks the sources of all who want it.
#[tokio::test]
async fn a_leader_whose_source_is_silent_is_given_the_followers_source() {
    let image = large_image();
    let digest = &image.layers[0].digest;
    let (stalling, good) = (Peer::holding(&image, NAME).await, Peer::holding(&image, NAME).await);
    stalling.trick(digest, Trick::Stall(PIECE + 1000));
    let target = Fake::default();
    let agent = agent(&target);
    let mut leading = agent.attach(request("one", NAME, &image, &[&stalling])).unwrap();
    eventually("half a layer", async || target.partial(digest).is_some_and(|partial| partial.len() == PIECE))
        .await;
    let mut following = agent.attach(request("two", OTHER, &image, &[&good])).unwrap();
    for attached in [&mut leading, &mut following] {
        attached.states.wait_for(|state| state.outcome.is_some()).await.unwrap();
        attached.states.borrow().outcome.clone().unwrap().unwrap();
    }
    assert!(leading.states.borrow().progress.sources.contains(&good.node), "the leader moved it");
    assert!(!good.offsets(digest).contains(&0), "{:?}", good.offsets(digest));
    check_complete(&target, &image, OTHER).await;
}

/// What failed and nobody came back for is removed; somebody comes back while that happens.
#[tokio::test]
async fn a_transfer_that_is_started_again_while_others_are_swept_keeps_its_lease() {
    let image = large_image();
    let digest = &image.layers[0].digest;
    let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
    let agent = agent_with(&target, Bandwidth::default(), LIFETIMES);
    // Whichever of two is swept first, the other is started again.
    peer.trick(digest, Trick::Status(500));
    for (id, name) in [("one", NAME), ("two", OTHER)] {
        import(&agent, request(id, name, &image, &[&peer])).await.unwrap_err();
    }
    let kept = target.leases().await.unwrap();
    assert_eq!(kept.len(), 2);
    tokio::time::sleep(LIFETIMES.abandoned).await;
    target.set_deletes(false);
    let sweeping = tokio::spawn({
        let agent = agent.clone();
        async move { agent.sweep().await }
    });
    eventually("one of them to be removed", async || target.deleted().len() == 1).await;
    peer.trick(digest, Trick::Stall(PIECE + 1000));
    let mut again = Vec::new();
    for (id, name) in [("one", NAME), ("two", OTHER)] {
        again.push(agent.attach(request(id, name, &image, &[&peer])).unwrap());
    }
    let fresh = async || {
        let leases = target.leases().await.unwrap();
        leases.into_iter().filter(|lease| !kept.contains(lease)).collect::<Vec<_>>()
    };
    eventually("both to have begun", async || fresh().await.len() == 2).await;
    let begun = fresh().await;
    target.set_deletes(true);
    sweeping.await.unwrap().unwrap();
    assert_eq!(fresh().await, begun, "the leases of those that run");
    for mut attached in again {
        peer.behave();
        attached.states.wait_for(|state| state.outcome.is_some()).await.unwrap();
        attached.states.borrow().outcome.clone().unwrap().unwrap();
    }
}

#[tokio::test]
async fn cancelling_leaves_nothing() {
    let image = large_image();
    let digest = &image.layers[0].digest;
    let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
    peer.trick(digest, Trick::Stall(PIECE + 1000));
    let agent = agent(&target);
    let id = request("t", NAME, &image, &[]).id;
    assert!(!agent.cancel(&id).await.unwrap(), "there is nothing to cancel");
    let attached = agent.attach(request("t", NAME, &image, &[&peer])).unwrap();
    eventually("a part of a layer", async || target.partial(digest).is_some_and(|part| part.len() == PIECE))
        .await;
    assert!(agent.cancel(&id).await.unwrap());
    assert_eq!(attached.states.borrow().outcome.clone().unwrap().unwrap_err().cause(), Cause::Cancelled);
    check_nothing(&target).await;
    // The name is free again.
    peer.behave();
    import(&agent, request("t", NAME, &image, &[&peer])).await.unwrap();
}

/// A blob that was there, which nothing else holds, is held from the moment it is counted on.
#[tokio::test]
async fn a_collection_in_the_middle_takes_nothing() {
    let image = large_image();
    let (present, digest) = (&image.layers[1].digest, &image.layers[0].digest);
    let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
    target.put(&image.bytes[present], [].into());
    peer.trick(digest, Trick::Stall(PIECE + 1000));
    let agent = agent(&target);
    let _attached = agent.attach(request("t", NAME, &image, &[&peer])).unwrap();
    eventually("half a layer", async || target.partial(digest).is_some_and(|part| part.len() >= PIECE)).await;
    target.collect();
    assert!(target.partial(digest).is_some());
    assert!(target.blob(present).await.unwrap().is_some());
    peer.behave();
    import(&agent, request("t", NAME, &image, &[&peer])).await.unwrap();
    assert_eq!(peer.asked(present), 0);
    check_complete(&target, &image, NAME).await;
}

#[tokio::test]
async fn attaching_again_changes_the_sources() {
    let image = image();
    let digest = &image.layers[0].digest;
    let (bad, good) = (Peer::holding(&image, NAME).await, Peer::holding(&image, NAME).await);
    bad.trick(digest, Trick::Cut(1000));
    let target = Fake::default();
    let agent = agent(&target);
    let first = agent.attach(request("t", NAME, &image, &[&bad])).unwrap();
    eventually("a part of a layer", async || bad.asked(digest) > 0).await;
    let done = import(&agent, request("t", NAME, &image, &[&good])).await.unwrap();
    assert_eq!(first.states.borrow().outcome.clone().unwrap().unwrap().names, done.names);
    // Told again, to whoever asks again.
    assert_eq!(import(&agent, request("t", NAME, &image, &[])).await.unwrap(), done);
    let other = Blobs::image(&[tar(&[("x", b"y")])]);
    let refused = agent.attach(request("t", NAME, &other, &[])).err().unwrap();
    assert!(matches!(refused, AttachError::Another(..)), "{refused}");
    check_complete(&target, &image, NAME).await;
}

#[tokio::test]
async fn a_failed_transfer_goes_on_where_it_was() {
    let image = image();
    let digest = &image.layers[0].digest;
    let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
    peer.trick(digest, Trick::Cut(1000));
    let agent = agent(&target);
    import(&agent, request("t", NAME, &image, &[&peer])).await.unwrap_err();
    let kept = target.partial(digest).expect("what came is kept").len() as u64;
    assert!(kept > 0);
    peer.behave();
    import(&agent, request("t", NAME, &image, &[&peer])).await.unwrap();
    assert_eq!(peer.offsets(digest).last(), Some(&kept));
    check_complete(&target, &image, NAME).await;
}

#[tokio::test]
async fn what_nobody_follows_ends() {
    let image = large_image();
    let digest = &image.layers[0].digest;
    let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
    peer.trick(digest, Trick::Stall(PIECE + 1000));
    let patient = agent_with(&target, Bandwidth::default(), LIFETIMES);
    let attached = patient.attach(request("t", NAME, &image, &[&peer])).unwrap();
    tokio::time::sleep(LIFETIMES.abandoned * 2).await;
    patient.sweep().await.unwrap();
    assert!(!attached.is_over(), "somebody follows it");
    drop(attached);
    eventually("it ends and leaves nothing", async || {
        patient.sweep().await.unwrap();
        target.leases().await.unwrap().is_empty() && target.blobs().await.unwrap().is_empty()
    })
    .await;
    check_nothing(&target).await;
    // The same for what a failed one has kept for its retry.
    peer.trick(digest, Trick::Cut(1000));
    import(&patient, request("u", NAME, &image, &[&peer])).await.unwrap_err();
    assert_eq!(target.leases().await.unwrap().len(), 1);
    eventually("what it kept is removed", async || {
        patient.sweep().await.unwrap();
        target.leases().await.unwrap().is_empty()
    })
    .await;
    check_nothing(&target).await;
}

#[tokio::test]
async fn the_cap_holds_over_all_transfers() {
    let (a, b) = (image(), Blobs::image(&[tar(&[("c", &noise(50_000))])]));
    let (from_a, from_b) = (Peer::holding(&a, NAME).await, Peer::holding(&b, OTHER).await);
    let target = Fake::default();
    let bytes = a.size() + b.size();
    let rate = (bytes * 2).to_string();
    let agent = agent_with(&target, Bandwidth::new(Some(rate.parse().unwrap())), Lifetimes::default());
    let started = Instant::now();
    let (one, two) = tokio::join!(
        import(&agent, request("one", NAME, &a, &[&from_a])),
        import(&agent, request("two", OTHER, &b, &[&from_b])),
    );
    one.unwrap();
    two.unwrap();
    let took = started.elapsed();
    assert!(took > Duration::from_millis(380), "{bytes} bytes at {rate} B/s took {took:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
}

/// Of a whole agent: what it is told of its cap is what its readers get.
#[tokio::test]
async fn an_agent_gives_no_faster_than_its_cap() {
    let image = Blobs::image(&[tar(&[("a", &noise(1_000_000))])]);
    let (source, target) = (Node::giving(Some("1M".parse().unwrap())).await, Node::start().await);
    image.pull_into(&source.fake, NAME);
    source.grant(&target, &image, false).await.unwrap();
    let started = Instant::now();
    let done = ended(target.import(&image, vec![source.source()]).await).await;
    let took = started.elapsed();
    assert_eq!(done.transferred_bytes, done.total_bytes);
    // But for what may pass at once after a pause.
    assert!(took > Duration::from_millis(880), "{} bytes took {took:?}", image.size());
    check_complete(&target.fake, &image, NAME).await;
}
