//! How an image's layers move: several at once, which of them first, unpacked while others arrive, written in large pieces.

use std::time::Duration;

use tote_agent::bandwidth::Bandwidth;
use tote_agent::containerd::{Containerd as _, FAKE_SNAPSHOTTER, Fake};
use tote_agent::import::{Context, Imports, Lifetimes, Patience};
use tote_agent::testing::{Blobs, noise, tar};

use crate::peers::{PATIENCE, Peer, Trick, context, import, request};
use crate::{NAME, PIECE, check_complete, check_nothing, eventually};

/// One that waits for silent peers for longer than a test lasts.
fn patient(fake: &Fake) -> Imports {
    let wait = Duration::from_secs(60);
    let patience = Patience { head: wait, piece: wait, ..PATIENCE };
    let context = Context { patience, ..context(fake, Bandwidth::default()) };
    Imports::new(context, Lifetimes::default())
}

/// Layers of so many bytes each, which are to be unlike.
fn layers(sizes: &[usize]) -> Blobs {
    let tars: Vec<Vec<u8>> = sizes.iter().map(|size| tar(&[("a", &noise(*size))])).collect();
    Blobs::image(&tars)
}

/// Which layers it was asked for.
fn asked(peer: &Peer, image: &Blobs) -> Vec<usize> {
    (0..image.layers.len()).filter(|at| peer.asked(&image.layers[*at].digest) > 0).collect()
}

#[tokio::test]
async fn the_first_layers_are_unpacked_while_the_last_is_on_its_way() {
    let image = layers(&[1000, 2000, 3000]);
    let last = &image.layers[2].digest;
    for trick in [Trick::Stall(1000), Trick::Hang] {
        let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
        peer.trick(last, trick);
        let agent = patient(&target);
        let attached = agent.attach(request("t", NAME, &image, &[&peer])).unwrap();
        for chain in &image.chain[..2] {
            let stands = async || target.has_snapshot(FAKE_SNAPSHOTTER, chain).await.unwrap();
            eventually("a snapshot of a layer that has come", stands).await;
        }
        assert_eq!(target.blob(last).await.unwrap(), None);
        assert!(attached.states.borrow().outcome.is_none());
        assert!(agent.cancel(&request("t", NAME, &image, &[]).id).await.unwrap());
        check_nothing(&target).await;
    }
}

#[tokio::test]
async fn three_layers_come_at_once() {
    let image = layers(&[1000, 2000, 3000]);
    let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
    for layer in &image.layers {
        peer.trick(&layer.digest, Trick::Hang);
    }
    let agent = patient(&target);
    let _attached = agent.attach(request("t", NAME, &image, &[&peer])).unwrap();
    eventually("all three to be asked for", async || asked(&peer, &image) == [0, 1, 2]).await;
}

/// The lowest beside them, for nothing can be unpacked without it.
#[tokio::test]
async fn the_largest_layers_come_first() {
    let image = layers(&[1000, 2000, 3000, 50_000, 40_000]);
    let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
    for layer in &image.layers {
        peer.trick(&layer.digest, Trick::Hang);
    }
    let agent = patient(&target);
    let _attached = agent.attach(request("t", NAME, &image, &[&peer])).unwrap();
    eventually("three to be asked for", async || asked(&peer, &image).len() >= 3).await;
    assert_eq!(asked(&peer, &image), [0, 3, 4]);
}

/// Though what peers send comes in small ones.
#[tokio::test]
async fn writes_have_a_mebibyte_or_more() {
    let image = layers(&[(7 << 20) + 1000]);
    let layer = &image.layers[0];
    let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
    import(&patient(&target), request("t", NAME, &image, &[&peer])).await.unwrap();
    let writes = target.writes(&layer.digest);
    assert_eq!(writes.iter().sum::<usize>() as u64, layer.size, "{writes:?}");
    let (_, all_but_last) = writes.split_last().unwrap();
    assert!(all_but_last.iter().all(|size| *size >= PIECE), "{writes:?}");
    check_complete(&target, &image, NAME).await;
}
