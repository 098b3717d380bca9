//! Several sources of one image: each gives a part, a slow one is left, a liar among honest ones is found.

use std::time::{Duration, Instant};

use tote_agent::bandwidth::Bandwidth;
use tote_agent::containerd::Fake;
use tote_agent::import::{Context, Imports, Lifetimes, Patience};
use tote_agent::testing::{Blobs, tar};

use crate::peers::{Door, PATIENCE, Peer, Trick, agent, context, counted, import, request};
use crate::{NAME, PIECE, check_complete, check_nothing, eventually, noise};

/// One layer of this many MiB.
fn one_layer(mebibytes: usize) -> Blobs {
    Blobs::image(&[tar(&[("a", &noise(mebibytes << 20))])])
}

#[tokio::test]
async fn parts_of_one_blob_come_from_each_and_no_byte_twice() {
    let image = one_layer(24);
    let layer = &image.layers[0].digest;
    let (one, two) = (Peer::holding(&image, NAME).await, Peer::holding(&image, NAME).await);
    // As fast as each other, whatever else the machine does.
    for peer in [&one, &two] {
        peer.trick(layer, Trick::Slow(20 << 20));
    }
    let target = Fake::default();
    let done = import(&agent(&target), request("t", NAME, &image, &[&one, &two])).await.unwrap();
    assert_eq!((done.transferred_bytes, done.source_nodes.len()), (done.total_bytes, 2));
    let mut offsets = [one.offsets(layer), two.offsets(layer)].concat();
    assert!(one.asked(layer) > 2 && two.asked(layer) > 2, "{offsets:?}");
    let asked = offsets.len();
    offsets.sort_unstable();
    offsets.dedup();
    assert_eq!(offsets.len(), asked, "each part once: {offsets:?}");
    check_complete(&target, &image, NAME).await;
}

/// One takes connections, gives some of a part or nothing, and then neither gives nor ends: the other goes on at that byte.
#[tokio::test]
async fn a_source_that_falls_silent_is_left_at_that_byte() {
    let image = one_layer(24);
    let layer = &image.layers[0];
    for (trick, given) in [(Trick::Stall(PIECE + 1000), PIECE + 1000), (Trick::Hang, 0)] {
        let (silent, other) = (Peer::holding(&image, NAME).await, Peer::holding(&image, NAME).await);
        silent.trick(&layer.digest, trick);
        let target = Fake::default();
        // So long that the other one is never taken for silent.
        let patience = Patience { head: Duration::from_secs(3), piece: Duration::from_secs(2), ..PATIENCE };
        let context = Context { patience, ..context(&target, Bandwidth::default()) };
        let agent = Imports::new(context, Lifetimes::default());
        let done = import(&agent, request("t", NAME, &image, &[&silent, &other])).await.unwrap();
        assert_eq!(done.transferred_bytes, done.total_bytes, "no byte is moved twice");
        let (begun, mut offsets) = (silent.offsets(&layer.digest), other.offsets(&layer.digest));
        assert!(!begun.is_empty());
        offsets.sort_unstable();
        let goes_on = |at| if begun.contains(&at) { at + given as u64 } else { at };
        let due: Vec<u64> = (0..layer.size).step_by(2 << 20).map(goes_on).collect();
        assert_eq!(offsets, due, "the silent one was asked for {begun:?}");
        check_complete(&target, &image, NAME).await;
    }
}

/// The only one dies in the middle of a layer and is back at once: the import has waited for it, and goes on.
#[tokio::test]
async fn the_only_source_comes_back() {
    let image = one_layer(12);
    let layer = &image.layers[0].digest;
    let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
    peer.trick(layer, Trick::Slow(4 << 20));
    let door = Door::of(&peer).await;
    let mut wanted = request("t", NAME, &image, &[&peer]);
    wanted.sources[0].address = door.address;
    let patience = Patience::default();
    let context = Context { patience, ..context(&target, Bandwidth::default()) };
    let agent = Imports::new(context, Lifetimes::default());
    let dying = async {
        let some = async || target.partial(layer).is_some_and(|part| part.len() >= PIECE);
        eventually("a part of the layer", some).await;
        let before = peer.asked(layer);
        door.shut();
        eventually("every connection to break", async || door.connections() == 0).await;
        peer.behave();
        door.open();
        before
    };
    let (done, before) = tokio::join!(import(&agent, wanted), dying);
    let done = done.unwrap();
    assert_eq!(done.transferred_bytes, done.total_bytes, "no byte is moved twice");
    let parts = &peer.offsets(layer)[before..];
    assert!(parts.iter().any(|at| at % (2 << 20) != 0), "it went on where it was: {parts:?}");
    check_complete(&target, &image, NAME).await;
}

/// One gives 3 MiB a second, which is not dead; the other has the rest of its part there at once.
#[tokio::test]
async fn a_slow_source_is_left_in_the_middle_of_a_part() {
    let image = one_layer(24);
    let layer = &image.layers[0].digest;
    let (slow, fast) = (Peer::holding(&image, NAME).await, Peer::holding(&image, NAME).await);
    slow.trick(layer, Trick::Slow(3 << 20));
    let target = Fake::default();
    let context = context(&target, Bandwidth::default());
    let metrics = context.metrics.clone();
    let imports = Imports::new(context, Lifetimes::default());
    let began = Instant::now();
    let done = import(&imports, request("t", NAME, &image, &[&slow, &fast])).await.unwrap();
    let took = began.elapsed().as_secs_f64();
    let counted = counted(&metrics, "tote_agent_requests_left_total");
    let of_slow = format!("{{node=\"{}\"}}", slow.node);
    assert!(!counted.is_empty() && counted.iter().all(|line| line.contains(&of_slow)), "{counted:?}");
    assert!(took < 5.0, "{took} s; the slow one alone takes 8");
    assert_eq!(done.transferred_bytes, done.total_bytes, "what the slow one gave is not asked for again");
    assert!(slow.asked(layer) > 0 && fast.asked(layer) > slow.asked(layer));
    let parts = fast.offsets(layer);
    assert!(parts.iter().any(|at| at % (2 << 20) != 0), "it went on where the slow one was: {parts:?}");
    check_complete(&target, &image, NAME).await;
}

/// The bytes of three make no blob; then each is asked alone until one makes it. Though an honest one be asked first, the blob
/// shows who gave other bytes.
#[tokio::test]
async fn a_liar_among_honest_ones_is_found() {
    let image = one_layer(12);
    let layer = &image.layers[0].digest;
    let mut peers = Vec::new();
    for _ in 0..3 {
        peers.push(Peer::holding(&image, NAME).await);
    }
    let sources: Vec<&Peer> = peers.iter().collect();
    for liar in &peers {
        liar.trick(layer, Trick::Wrong);
        let target = Fake::default();
        let done = import(&agent(&target), request("t", NAME, &image, &sources)).await.unwrap();
        assert!(done.transferred_bytes > done.total_bytes, "what was thrown away had been moved too");
        assert_eq!(done.lying_nodes, [liar.node.clone()]);
        check_complete(&target, &image, NAME).await;
        liar.behave();
    }
    // Where nobody is honest all are named.
    for peer in &peers {
        peer.trick(layer, Trick::Wrong);
    }
    let failed = import(&agent(&Fake::default()), request("t", NAME, &image, &sources)).await.unwrap_err();
    for peer in &peers {
        assert!(failed.message.contains(&peer.node), "{}", failed.message);
    }
}

/// Its bytes and another's make no blob. Once that is proven the other alone is asked, or each blob would be moved twice.
#[tokio::test]
async fn who_lies_in_every_layer_spoils_only_the_first() {
    let bytes = noise(36 << 20);
    let image = Blobs::image(&bytes.chunks(4 << 20).map(|layer| tar(&[("a", layer)])).collect::<Vec<_>>());
    let (liar, honest) = (Peer::holding(&image, NAME).await, Peer::holding(&image, NAME).await);
    for layer in &image.layers {
        liar.trick(&layer.digest, Trick::Wrong);
    }
    let target = Fake::default();
    let done = import(&agent(&target), request("t", NAME, &image, &[&liar, &honest])).await.unwrap();
    assert_eq!(done.lying_nodes, [liar.node.clone()]);
    let spoilt = image.layers.iter().filter(|layer| liar.asked(&layer.digest) > 0).count();
    // Three are on their way at once.
    assert!((1..=6).contains(&spoilt), "{spoilt} of {}", image.layers.len());
    check_complete(&target, &image, NAME).await;
}

/// What is on its way when a transfer is cancelled ends with it: nothing is left, and what it took of what all transfers
/// share is given back.
#[tokio::test]
async fn cancelled_in_the_middle_of_parts_from_several_it_frees_everything() {
    let image = one_layer(24);
    let layer = &image.layers[0].digest;
    let mut peers = Vec::new();
    for _ in 0..3 {
        let peer = Peer::holding(&image, NAME).await;
        peer.trick(layer, Trick::Slow(1 << 20));
        peers.push(peer);
    }
    let sources: Vec<&Peer> = peers.iter().collect();
    let target = Fake::default();
    let context = context(&target, Bandwidth::default());
    let ahead = context.ahead.clone();
    let room = ahead.free();
    let imports = Imports::new(context, Lifetimes::default());
    for _ in 0..3 {
        let before: Vec<usize> = peers.iter().map(|peer| peer.asked(layer)).collect();
        let attached = imports.attach(request("t", NAME, &image, &sources)).unwrap();
        let id = request("t", NAME, &image, &[]).id;
        eventually("a part on its way from each", async || {
            peers.iter().zip(&before).all(|(peer, before)| peer.asked(layer) > *before)
        })
        .await;
        assert!(ahead.free() < room);
        assert!(imports.cancel(&id).await.unwrap());
        check_nothing(&target).await;
        eventually("the room to be free", async || ahead.free() == room).await;
        drop(attached);
    }
    for peer in &peers {
        peer.behave();
    }
    let done = import(&imports, request("t", NAME, &image, &sources)).await.unwrap();
    assert_eq!(done.transferred_bytes, done.total_bytes);
    check_complete(&target, &image, NAME).await;
}

#[tokio::test]
async fn a_last_resort_is_asked_last() {
    let image = one_layer(12);
    let layer = &image.layers[0].digest;
    let (spared, other) = (Peer::holding(&image, NAME).await, Peer::holding(&image, NAME).await);
    let mut wanted = request("t", NAME, &image, &[&spared, &other]);
    wanted.sources[0].last_resort = true;
    import(&agent(&Fake::default()), wanted.clone()).await.unwrap();
    assert_eq!(spared.asked(layer), 0);
    other.trick(layer, Trick::Status(500));
    import(&agent(&Fake::default()), wanted).await.unwrap();
    assert!(spared.asked(layer) > 0);
}

/// As nodes that discard unpacked layers may be.
#[tokio::test]
async fn what_each_holds_a_part_of_is_put_together() {
    let image = Blobs::image(&[tar(&[("a", &noise(3 << 20))]), tar(&[("b", &noise(3 << 20))])]).indexed();
    let (one, two) = (Peer::holding(&image, NAME).await, Peer::holding(&image, NAME).await);
    one.fake.remove_blob(&image.layers[0].digest);
    two.fake.remove_blob(&image.layers[1].digest);
    let target = Fake::default();
    let done = import(&agent(&target), request("t", NAME, &image, &[&one, &two])).await.unwrap();
    assert_eq!((done.transferred_bytes, done.source_nodes.len()), (done.total_bytes, 2));
    assert_eq!(done.lying_nodes, [""; 0], "what is not there is no lie");
    check_complete(&target, &image, NAME).await;
}
