//! Sources that are getting the image themselves: whole agents, which give on what they have got, and one peer that has it all.

use std::time::Instant;

use tote_agent::containerd::Containerd as _;
use tote_agent::testing::{Blobs, tar};
use tote_rpc::v1;

use crate::nodes::{GROWTH, Node, ended};
use crate::peers::{Peer, Trick};
use crate::{NAME, check_complete, eventually, noise};

fn first(peer: &Peer) -> v1::Source {
    let (node_name, address) = (peer.node.clone(), peer.address.to_string());
    v1::Source { node_name, address, ..v1::Source::default() }
}

fn last(peer: &Peer) -> v1::Source {
    v1::Source { last_resort: true, ..first(peer) }
}

/// Layers of so many MiB each, all unlike.
fn layers(mebibytes: &[usize]) -> Blobs {
    let bytes = noise(mebibytes.iter().sum::<usize>() << 20);
    let mut rest = &bytes[..];
    let tars = mebibytes.iter().map(|size| {
        let (layer, more) = rest.split_at(size << 20);
        rest = more;
        tar(&[("a", layer)])
    });
    Blobs::image(&tars.collect::<Vec<_>>()).indexed()
}

/// A peer that has the image, lets these read it, and gives each part of a layer at this rate.
async fn origin(image: &Blobs, rate: u64, readers: &[&Node]) -> Peer {
    let origin = Peer::holding(image, NAME).await;
    for node in readers {
        origin.let_read(&node.name, image);
    }
    for layer in &image.layers {
        origin.trick(&layer.digest, Trick::Slow(rate));
    }
    origin
}

/// No part of a layer was asked of it twice.
fn check_each_part_once(origin: &Peer, image: &Blobs) {
    for layer in &image.layers {
        let mut offsets = origin.offsets(&layer.digest);
        let asked = offsets.len();
        offsets.sort_unstable();
        offsets.dedup();
        assert!(asked > 0 && offsets.len() == asked, "each part once, not {asked} of {offsets:?}");
    }
}

/// A chain of three: all begin at once, the last first, and none knows the image when it is to let the next one read it.
#[tokio::test]
async fn a_source_sends_each_part_once_however_many_want_it() {
    let image = layers(&[3, 3, 3, 3]);
    let nodes = [Node::start().await, Node::start().await, Node::start().await];
    let [one, two, three] = &nodes;
    let origin = origin(&image, 2 << 20, &[one, two, three]).await;
    let unknown = one.grant(two, &image, false).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::NotFound, "{unknown}");
    assert_eq!(one.grant(two, &image, true).await.unwrap(), 1);
    assert_eq!(two.grant(three, &image, true).await.unwrap(), 1);
    let imports = [
        three.import(&image, vec![two.relay(), last(&origin)]).await,
        two.import(&image, vec![one.relay(), last(&origin)]).await,
        one.import(&image, vec![first(&origin)]).await,
    ];
    let [third, second, _] = imports;
    for (import, relay) in [(second, one), (third, two)] {
        let done = ended(import).await;
        assert_eq!(done.transferred_bytes, done.total_bytes);
        assert!(done.source_nodes.contains(&relay.name), "{:?}", done.source_nodes);
    }
    check_each_part_once(&origin, &image);
    for node in &nodes {
        check_complete(&node.fake, &image, NAME).await;
    }
}

#[tokio::test]
async fn a_relay_that_dies_is_followed_by_the_source() {
    let image = layers(&[2, 2, 4]);
    let (relay, target) = (Node::start().await, Node::start().await);
    let origin = origin(&image, 2 << 20, &[&relay, &target]).await;
    // It has the first two, and never gets the third.
    origin.trick(&image.layers[2].digest, Trick::Stall(1000));
    relay.grant(&target, &image, true).await.unwrap();
    let _relayed = relay.import(&image, vec![first(&origin)]).await;
    let import = target.import(&image, vec![relay.relay(), last(&origin)]).await;
    eventually("what the relay has is there", async || {
        let there = async |at: usize| target.fake.blob(&image.layers[at].digest).await.unwrap().is_some();
        there(0).await && there(1).await
    })
    .await;
    origin.behave();
    let of_third = origin.asked(&image.layers[2].digest);
    let before = origin.asked(&image.layers[0].digest);
    let Node { stop, .. } = relay;
    drop(stop);
    let done = ended(import).await;
    assert_eq!(done.source_nodes.len(), 2, "{:?}", done.source_nodes);
    assert_eq!(done.transferred_bytes, done.total_bytes, "what the relay gave is not moved again");
    assert_eq!(origin.asked(&image.layers[0].digest), before);
    assert!(origin.asked(&image.layers[2].digest) > of_third);
    check_complete(&target.fake, &image, NAME).await;
}

/// Its source has gone silent; it lives, and says that the layers are on their way, but nothing comes.
#[tokio::test]
async fn a_relay_where_nothing_comes_is_left() {
    let image = layers(&[2, 2]);
    let (relay, target) = (Node::start().await, Node::start().await);
    let origin = origin(&image, 8 << 20, &[&target]).await;
    let silent = Peer::holding(&image, NAME).await;
    silent.let_read(&relay.name, &image);
    for layer in &image.layers {
        silent.trick(&layer.digest, Trick::Stall(1000));
    }
    relay.grant(&target, &image, true).await.unwrap();
    let _relayed = relay.import(&image, vec![first(&silent)]).await;
    eventually("the relay asks for a layer", async || silent.asked(&image.layers[0].digest) > 0).await;
    let began = Instant::now();
    let done = ended(target.import(&image, vec![relay.relay(), last(&origin)]).await).await;
    assert!(began.elapsed() > GROWTH, "it was waited for: {:?}", began.elapsed());
    assert!(done.source_nodes.contains(&origin.node), "{:?}", done.source_nodes);
    check_complete(&target.fake, &image, NAME).await;
}

/// It grows, and gives nothing on for longer than it may stand still: that is a relay's normal life.
#[tokio::test]
async fn a_relay_that_grows_is_waited_for() {
    let image = layers(&[24]);
    let (relay, target) = (Node::start().await, Node::start().await);
    let origin = origin(&image, 1 << 20, &[&relay, &target]).await;
    relay.grant(&target, &image, true).await.unwrap();
    let relayed = relay.import(&image, vec![first(&origin)]).await;
    let began = Instant::now();
    let import = target.import(&image, vec![relay.relay(), last(&origin)]).await;
    ended(relayed).await;
    assert!(began.elapsed() > GROWTH, "{:?}", began.elapsed());
    ended(import).await;
    check_each_part_once(&origin, &image);
}

/// Those for which it waits hold no places: what the relay has already comes meanwhile.
#[tokio::test]
async fn what_a_relay_has_is_not_behind_what_it_will_have() {
    let image = layers(&[1, 1, 1, 1, 1]);
    let (relay, target) = (Node::start().await, Node::start().await);
    let origin = origin(&image, 1 << 16, &[&relay, &target]).await;
    for layer in &image.layers[3..] {
        relay.fake.put(&image.bytes[&layer.digest], [].into());
    }
    relay.grant(&target, &image, true).await.unwrap();
    let _relayed = relay.import(&image, vec![first(&origin)]).await;
    let _import = target.import(&image, vec![relay.relay(), last(&origin)]).await;
    eventually("the last two are there", async || {
        let there = async |at: usize| target.fake.blob(&image.layers[at].digest).await.unwrap().is_some();
        there(3).await && there(4).await
    })
    .await;
    assert!(target.fake.blob(&image.layers[0].digest).await.unwrap().is_none());
    assert_eq!(origin.asked(&image.layers[3].digest), 0);
}
