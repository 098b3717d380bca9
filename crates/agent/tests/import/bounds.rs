//! What is refused before a layer moves: an image that is too large, or that does not fit on the disk.

use std::time::Duration;

use tote_agent::bandwidth::Bandwidth;
use tote_agent::containerd::{Containerd as _, Fake};
use tote_agent::import::{Context, Imports, Lifetimes, Patience};
use tote_agent::testing::{Blobs, tar};
use tote_rpc::v1::Cause;

use crate::peers::{PATIENCE, Peer, Trick, agent, context, import, request};
use crate::{NAME, check_complete, check_nothing, eventually, image, large_image};

#[tokio::test]
async fn an_image_that_is_too_large_is_refused_before_a_layer_moves() {
    let image = image().indexed();
    let peer = Peer::holding(&image, NAME).await;
    let mut wanted = request("t", NAME, &image, &[&peer]);
    wanted.max_bytes = Some(image.size() - 1);
    let failed = import(&agent(&Fake::default()), wanted.clone()).await.unwrap_err();
    assert_eq!((failed.cause(), failed.retryable), (Cause::TooLarge, false), "{}", failed.message);
    for layer in &image.layers {
        assert_eq!(peer.asked(&layer.digest), 0);
    }
    wanted.max_bytes = Some(image.size());
    import(&agent(&Fake::default()), wanted).await.unwrap();
}

#[tokio::test]
async fn what_does_not_fit_on_the_disk_is_refused_before_a_layer_moves() {
    let image = image();
    let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
    let layers: u64 = image.layers.iter().map(|layer| image.bytes[&layer.digest].len() as u64).sum();
    // The first and the last are one blob.
    let missing = layers - image.bytes[&image.layers[0].digest].len() as u64;
    target.free_bytes(missing - 1);
    let agent = agent(&target);
    let failed = import(&agent, request("t", NAME, &image, &[&peer])).await.unwrap_err();
    assert_eq!((failed.cause(), failed.retryable), (Cause::DiskFull, true), "{}", failed.message);
    assert_eq!(peer.asked(&image.layers[0].digest), 0);
    // By and by there is room again.
    target.free_bytes(missing);
    import(&agent, request("t", NAME, &image, &[&peer])).await.unwrap();
    check_complete(&target, &image, NAME).await;
}

/// What a transfer that broke off has got is on the disk already: it is not asked for room again.
#[tokio::test]
async fn a_transfer_goes_on_though_the_disk_has_no_room_for_all_of_it_again() {
    let image = image();
    let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
    let layer = &image.layers[0].digest;
    peer.trick(layer, Trick::Cut(1000));
    let agent = agent(&target);
    import(&agent, request("t", NAME, &image, &[&peer])).await.unwrap_err();
    peer.behave();
    target.free_bytes(image.bytes[layer].len() as u64 - 1000);
    import(&agent, request("t", NAME, &image, &[&peer])).await.unwrap();
    check_complete(&target, &image, NAME).await;
}

/// Somebody else fills the disk meanwhile: the import ends before it takes what the node itself needs.
#[tokio::test]
async fn a_disk_that_fills_while_an_image_comes_keeps_its_reserve() {
    let image = large_image();
    let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
    let layer = &image.layers[0].digest;
    let mebibytes = |n: u64| n << 20;
    target.disk_of(mebibytes(100));
    target.free_bytes(mebibytes(50));
    peer.trick(layer, Trick::Slow(10 << 20));
    let agent = agent(&target);
    let failing = import(&agent, request("t", NAME, &image, &[&peer]));
    let filling = async {
        eventually("a part of it", async || target.partial(layer).is_some_and(|had| !had.is_empty())).await;
        // A twentieth is kept, and a piece is one more.
        target.free_bytes(mebibytes(6) - 1);
    };
    let (failed, ()) = tokio::join!(failing, filling);
    let failed = failed.unwrap_err();
    assert_eq!((failed.cause(), failed.retryable), (Cause::DiskFull, true), "{}", failed.message);
    for part in [layer.as_str(), "6291455 are free", "5242880 are kept"] {
        assert!(failed.message.contains(part), "{part} is not in {}", failed.message);
    }
    assert!(agent.cancel(&request("t", NAME, &image, &[]).id).await.unwrap());
    check_nothing(&target).await;
    target.free_bytes(mebibytes(50));
    import(&agent, request("t", NAME, &image, &[&peer])).await.unwrap();
    check_complete(&target, &image, NAME).await;
}

/// What is all there needs no room.
#[tokio::test]
async fn a_second_name_is_given_though_the_disk_is_full() {
    let image = image();
    let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
    import(&agent(&target), request("t", "registry.test/team/other:1", &image, &[&peer])).await.unwrap();
    target.disk_of(100 << 20);
    target.free_bytes(0);
    let done = import(&agent(&target), request("t", NAME, &image, &[])).await.unwrap();
    assert_eq!(done.transferred_bytes, 0);
}

/// Eight at once; the next waits, and asks for nothing, until one of them ends.
#[tokio::test]
async fn a_ninth_transfer_waits() {
    let image = image();
    let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
    let document = &image.target.digest;
    peer.trick(document, Trick::Hang);
    let patience = Patience { head: Duration::from_secs(60), ..PATIENCE };
    let agent_of = |fake: &Fake| {
        let context = Context { patience, ..context(fake, Bandwidth::default()) };
        Imports::new(context, Lifetimes::default())
    };
    let agent = agent_of(&target);
    let of = |n: usize| Blobs::image(&[tar(&[("a", &[u8::try_from(n).unwrap()])])]);
    // One that asks, and waits for the answer.
    let begin = async |agent: &Imports, n: usize| {
        let other = of(n);
        peer.trick(&other.target.digest, Trick::Hang);
        let attached = agent.attach(request(&format!("t{n}"), NAME, &other, &[&peer])).unwrap();
        eventually("to be asked", async || peer.asked(&other.target.digest) == 1).await;
        attached
    };
    let mut attached = Vec::new();
    for n in 0..8 {
        attached.push(begin(&agent, n).await);
    }
    let ninth = agent.attach(request("t", NAME, &image, &[&peer])).unwrap();
    // Another agent's, begun later, has asked by now: this one would have, too.
    attached.push(begin(&agent_of(&Fake::default()), 8).await);
    assert_eq!(peer.asked(document), 0);
    assert_eq!(target.leases().await.unwrap().len(), 8);
    assert!(agent.cancel(&request("t0", NAME, &of(0), &[]).id).await.unwrap());
    eventually("the ninth to begin", async || peer.asked(document) == 1).await;
    drop(ninth);
}
