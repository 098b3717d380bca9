//! Sources that break off, go away and come back, or do not answer.

use std::time::Duration;

use tote_agent::bandwidth::Bandwidth;
use tote_agent::containerd::Fake;
use tote_agent::import::{Context, Imports, Lifetimes, Patience};
use tote_agent::testing::{Blobs, tar};

use crate::peers::{PATIENCE, Peer, Trick, agent, context, import, request};
use crate::{NAME, PIECE, check_complete, eventually, noise};

fn agent_of(fake: &Fake, patience: Patience) -> Imports {
    Imports::new(Context { patience, ..context(fake, Bandwidth::default()) }, Lifetimes::default())
}

/// One layer that comes in twelve parts.
fn large() -> Blobs {
    Blobs::image(&[tar(&[("a", &noise(24 << 20))])])
}

/// Thirty layers of 2 KB each.
fn many() -> Blobs {
    let bytes = noise(60_000);
    Blobs::image(&bytes.chunks(2000).map(|layer| tar(&[("a", layer)])).collect::<Vec<_>>())
}

/// Plays a trick with every layer.
fn trick_all(peer: &Peer, image: &Blobs, trick: &Trick) {
    for layer in &image.layers {
        peer.trick(&layer.digest, trick.clone());
    }
}

/// How often a peer was asked for a layer.
fn asked(peer: &Peer, image: &Blobs) -> usize {
    image.layers.iter().map(|layer| peer.asked(&layer.digest)).sum()
}

/// However many connections break, as long as much comes between.
#[tokio::test]
async fn the_only_source_may_break_off_often() {
    let image = large();
    let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
    trick_all(&peer, &image, &Trick::CutThird(PIECE / 2));
    let done = import(&agent(&target), request("t", NAME, &image, &[&peer])).await.unwrap();
    assert_eq!(done.transferred_bytes, done.total_bytes);
    assert!(asked(&peer, &image) > 12 + 3, "{} requests", asked(&peer, &image));
    check_complete(&target, &image, NAME).await;
}

/// What breaks all that is on its way at once is one failure.
#[tokio::test]
async fn the_only_source_may_be_away_for_a_moment() {
    let image = large();
    let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
    trick_all(&peer, &image, &Trick::Cut(0));
    let agent = agent_of(&target, Patience { pause: Duration::from_millis(200), rounds: 4, ..PATIENCE });
    let importing = import(&agent, request("t", NAME, &image, &[&peer]));
    let coming_back = async {
        eventually("all parts were asked for again", async || asked(&peer, &image) >= 5).await;
        peer.behave();
    };
    let (done, ()) = tokio::join!(importing, coming_back);
    let done = done.unwrap();
    assert_eq!(done.transferred_bytes, done.total_bytes);
    check_complete(&target, &image, NAME).await;
}

/// A source that hangs is found out by the first few blobs, and holds up no others: of that transfer, or of the next.
#[tokio::test]
async fn one_that_does_not_answer_is_not_asked_for_every_blob() {
    let image = many();
    let (hanging, good) = (Peer::holding(&image, NAME).await, Peer::holding(&image, NAME).await);
    trick_all(&hanging, &image, &Trick::Hang);
    trick_all(&good, &image, &Trick::Slow(20_000));
    let target = Fake::default();
    let agent = agent(&target);
    import(&agent, request("t", NAME, &image, &[&hanging, &good])).await.unwrap();
    let before = asked(&hanging, &image);
    assert!((1..=4).contains(&before), "{before} times");
    check_complete(&target, &image, NAME).await;
    import(&agent, request("u", NAME, &image, &[&hanging, &good])).await.unwrap();
    assert_eq!(asked(&hanging, &image), before);
    assert_eq!(hanging.asked(&image.target.digest), 1, "nor for the documents");
    check_complete(&target, &image, NAME).await;
}

/// However patient one is with those that are alone: it is left for one that has shown meanwhile how fast it is.
#[tokio::test]
async fn one_that_does_not_answer_is_left_once_another_is_known() {
    let image = large();
    let (hanging, good) = (Peer::holding(&image, NAME).await, Peer::holding(&image, NAME).await);
    trick_all(&hanging, &image, &Trick::Hang);
    let target = Fake::default();
    let long = Duration::from_secs(600);
    let agent = agent_of(&target, Patience { head: long, piece: long, ..PATIENCE });
    import(&agent, request("t", NAME, &image, &[&hanging, &good])).await.unwrap();
    assert!((1..=3).contains(&asked(&hanging, &image)), "{}", asked(&hanging, &image));
    check_complete(&target, &image, NAME).await;
}

/// Nor is a relay that does not: it is looked at, and then left for the sources of last resort.
#[tokio::test]
async fn a_relay_that_does_not_answer_is_only_looked_at() {
    let image = many();
    let (relay, origin) = (Peer::holding(&image, NAME).await, Peer::holding(&image, NAME).await);
    trick_all(&relay, &image, &Trick::Hang);
    let target = Fake::default();
    let agent = agent(&target);
    let mut wanted = request("t", NAME, &image, &[&relay, &origin]);
    wanted.sources[0].relay = true;
    wanted.sources[1].last_resort = true;
    import(&agent, wanted).await.unwrap();
    let looks = asked(&relay, &image);
    assert!(looks <= image.layers.len() + 3, "{looks} times");
    check_complete(&target, &image, NAME).await;
}
