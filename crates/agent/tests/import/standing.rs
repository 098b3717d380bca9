//! Layers that the target has unpacked already, with their blobs or without: as where CRI discards them after that.

use tote_agent::containerd::{Containerd as _, FAKE_SNAPSHOTTER, Fake};
use tote_agent::testing::{Blobs, noise, tar};
use tote_image::Descriptor;

use crate::peers::{LIFETIMES, Peer, agent, agent_with, import, request};
use crate::{NAME, check_nothing, eventually};

const OTHER: &str = "registry.test/team/other:1";

/// A layer's tar, of which no two are alike.
fn layer(name: &str) -> Vec<u8> {
    tar(&[(name, &noise(20_000))])
}

/// Has this image under [`OTHER`], unpacked, and discarded the blobs of its layers.
async fn discarding(image: &Blobs) -> Fake {
    let (peer, target) = (Peer::holding(image, OTHER).await, Fake::default());
    import(&agent(&target), request("before", OTHER, image, &[&peer])).await.unwrap();
    for layer in &image.layers {
        target.remove_blob(&layer.digest);
    }
    target
}

/// CRI has the image, unpacked, and a collection takes nothing of that.
async fn check_runs(target: &Fake, image: &Blobs) {
    target.collect();
    assert_eq!(target.image_status(NAME).await.unwrap().as_deref(), Some(image.config.digest.as_str()));
    for chain in &image.chain {
        assert!(target.has_snapshot(FAKE_SNAPSHOTTER, chain).await.unwrap(), "{chain} is unpacked");
    }
    assert_eq!((target.leases().await.unwrap(), target.ingests().await.unwrap()), (vec![], vec![]));
}

/// As if there had never been an image, once the records are gone.
async fn check_leaves_nothing(target: &Fake) {
    for record in target.images().await.unwrap() {
        target.remove_image(&record.name);
    }
    target.collect();
    check_nothing(target).await;
}

fn sizes<'a>(layers: impl IntoIterator<Item = &'a Descriptor>) -> i64 {
    layers.into_iter().map(|layer| i64::try_from(layer.size).unwrap()).sum()
}

#[tokio::test]
async fn a_layer_that_stands_unpacked_does_not_move() {
    let before = Blobs::image(&[layer("base"), layer("tools"), layer("one")]);
    let image = Blobs::image(&[layer("base"), layer("tools"), layer("two")]).indexed();
    let (peer, target) = (Peer::holding(&image, NAME).await, discarding(&before).await);
    // Nor does it take any room.
    target.free_bytes(image.layers[2].size);
    let done = import(&agent(&target), request("t", NAME, &image, &[&peer])).await.unwrap();
    assert_eq!((peer.asked(&image.layers[0].digest), peer.asked(&image.layers[1].digest)), (0, 0));
    assert_eq!(done.reused_bytes, sizes(&image.layers[..2]));
    assert_eq!(done.transferred_bytes + done.reused_bytes, done.total_bytes);
    check_runs(&target, &image).await;
    // What is unpacked is this image's as well.
    target.remove_image(OTHER);
    target.remove_image(before.config.digest.as_str());
    target.remove_image(&format!("registry.test/team/other@{}", before.target.digest));
    check_runs(&target, &image).await;
    check_leaves_nothing(&target).await;
}

#[tokio::test]
async fn an_image_all_of_which_stands_unpacked_takes_its_documents_alone() {
    let image = Blobs::image(&[layer("base"), layer("one")]).indexed();
    let (peer, target) = (Peer::holding(&image, NAME).await, discarding(&image).await);
    let done = import(&agent(&target), request("t", NAME, &image, &[])).await.unwrap();
    assert_eq!((done.transferred_bytes, done.reused_bytes), (0, done.total_bytes), "a second name");
    target.remove_blob(&image.config.digest);
    let done = import(&agent(&target), request("repair", NAME, &image, &[&peer])).await.unwrap();
    assert_eq!(done.transferred_bytes, sizes([&image.config]));
    check_runs(&target, &image).await;
    check_leaves_nothing(&target).await;
}

/// The lowest of its places stands unpacked, another does not.
#[tokio::test]
async fn a_layer_that_stands_at_one_of_its_places_moves_for_the_other() {
    let before = Blobs::image(&[layer("twice")]);
    let image = Blobs::image(&[layer("twice"), layer("between"), layer("twice")]);
    let (peer, target) = (Peer::holding(&image, NAME).await, discarding(&before).await);
    let done = import(&agent(&target), request("t", NAME, &image, &[&peer])).await.unwrap();
    assert_eq!((done.transferred_bytes, done.reused_bytes), (done.total_bytes, 0));
    check_runs(&target, &image).await;
}

/// The same layers on another base make another snapshot.
#[tokio::test]
async fn a_layer_that_stands_on_another_base_moves() {
    let before = Blobs::image(&[layer("one base"), layer("tools")]);
    let image = Blobs::image(&[layer("other base"), layer("tools")]);
    let (peer, target) = (Peer::holding(&image, NAME).await, discarding(&before).await);
    let done = import(&agent(&target), request("t", NAME, &image, &[&peer])).await.unwrap();
    assert_eq!(done.transferred_bytes, done.total_bytes);
    check_runs(&target, &image).await;
}

/// The other image is removed while this one moves, and the agent is killed at each step: what was counted on stays, or moves.
#[tokio::test]
async fn killed_at_every_step_while_the_other_image_goes() {
    let before = Blobs::image(&[layer("base"), layer("one")]);
    let image = Blobs::image(&[layer("base"), layer("two")]);
    let (mut spared, mut moved) = (0, 0);
    for steps in 0.. {
        let (peer, target) = (Peer::holding(&image, NAME).await, discarding(&before).await);
        target.die_after(Some(steps));
        let first = agent_with(&target, tote_agent::bandwidth::Bandwidth::default(), LIFETIMES);
        let mut attached = first.attach(request("t", NAME, &image, &[&peer])).unwrap();
        let mut ended = false;
        eventually("its end or its death", async || {
            let outcome = attached.states.borrow_and_update().outcome.clone();
            ended = outcome.is_some_and(|outcome| outcome.is_ok());
            ended || target.is_dead()
        })
        .await;
        first.stop().await;
        target.die_after(None);
        for record in target.images().await.unwrap() {
            if record.target == before.target {
                target.remove_image(&record.name);
            }
        }
        target.collect();
        let done = import(&agent(&target), request("t", NAME, &image, &[&peer])).await;
        let done = done.unwrap_or_else(|failed| panic!("step {steps}: {failed:?}"));
        assert_eq!(done.transferred_bytes + done.reused_bytes, done.total_bytes, "step {steps}");
        *(if peer.asked(&image.layers[0].digest) == 0 { &mut spared } else { &mut moved }) += 1;
        check_runs(&target, &image).await;
        check_leaves_nothing(&target).await;
        if ended {
            break;
        }
    }
    assert!(spared > 14 && moved > 5, "held in {spared} steps, gone and moved in {moved}");
}
