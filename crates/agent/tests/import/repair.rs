//! Images that lost blobs: repaired in place, or, where nobody can, removed so that they are pulled anew.

use tote_agent::containerd::{Containerd as _, Fake};
use tote_agent::remove::{RemoveError, remove};
use tote_image::Digest;

use crate::peers::{Peer, Trick, agent, import, request};
use crate::{NAME, check_complete, eventually, image};

#[tokio::test]
async fn just_the_missing_blobs_come() {
    let image = image().indexed();
    let several = [&image.target, &image.manifest, &image.config, &image.layers[0], &image.layers[1]];
    let alone = several.iter().map(std::slice::from_ref);
    for lost in alone.chain([&several[2..], &several[..4], &several[..]]) {
        let (peer, target) = (Peer::holding(&image, "other.test/elsewhere:9").await, Fake::default());
        let agent = agent(&target);
        import(&agent, request("first", NAME, &image, &[&peer])).await.unwrap();
        for blob in lost {
            target.remove_blob(&blob.digest);
        }
        // A layer that stands unpacked would not be missing.
        target.remove_snapshots();
        let done = import(&agent, request("repair", NAME, &image, &[&peer])).await.unwrap();
        let missing: u64 = lost.iter().map(|blob| blob.size).sum();
        assert_eq!(done.transferred_bytes, i64::try_from(missing).unwrap(), "{lost:?}");
        assert_eq!(done.transferred_bytes + done.reused_bytes, done.total_bytes);
        check_complete(&target, &image, NAME).await;
    }
}

#[tokio::test]
async fn what_lacks_blobs_is_removed_under_all_its_names() {
    let (image, other) = (image().indexed(), image());
    let target = Fake::default();
    image.pull_into(&target, NAME);
    image.pull_into(&target, "registry.test/second:2");
    other.pull_into(&target, "registry.test/other:1");
    let agent = agent(&target);
    let refused = remove(&agent, &image.target.digest).await;
    assert!(matches!(refused, Err(RemoveError::Complete(_))), "nothing is missing: {refused:?}");
    // They share their blobs but for the index. One that lacks a layer may be well by its snapshots.
    target.remove_blob(&image.layers[0].digest);
    assert!(matches!(remove(&agent, &image.target.digest).await, Err(RemoveError::Complete(_))));
    target.remove_blob(&image.config.digest);
    other.pull_into(&Fake::default(), "elsewhere.test/x:1");
    let mut names = remove(&agent, &image.target.digest).await.unwrap();
    names.sort();
    assert!(
        names.contains(&NAME.to_owned()) && names.contains(&"registry.test/second:2".to_owned()),
        "{names:?}"
    );
    let left = target.images().await.unwrap();
    assert!(!left.is_empty() && left.iter().all(|record| record.target == other.target), "{left:?}");
    assert_eq!(remove(&agent, &image.target.digest).await.unwrap(), [""; 0], "again is no error");
    assert_eq!(remove(&agent, &Digest::sha256(b"unknown")).await.unwrap(), [""; 0]);
}

#[tokio::test]
async fn what_is_being_repaired_is_left_alone() {
    let image = image();
    let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
    image.pull_into(&target, NAME);
    let config = &image.config.digest;
    target.remove_blob(config);
    peer.trick(config, Trick::Hang);
    let agent = agent(&target);
    let _attached = agent.attach(request("repair", NAME, &image, &[&peer])).unwrap();
    eventually("it asks for the config", async || peer.asked(config) > 0).await;
    let refused = remove(&agent, &image.target.digest).await;
    assert!(matches!(refused, Err(RemoveError::Moving(_))), "{refused:?}");
    assert!(target.image(NAME).await.unwrap().is_some());
}
