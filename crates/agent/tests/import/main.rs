//! Imports on the in-memory containerd: from good peers, from hostile ones, and killed at every step.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(clippy::cloned_ref_to_slice_refs, reason = "an array reads as what is compared")]

mod bounds;
mod hostile;
mod killed;
mod lies;
mod moving;
mod nodes;
mod peers;
mod records;
mod relay;
mod repair;
mod shared;
mod sources;
mod standing;
mod unsteady;

use std::time::Duration;

use tote_agent::bandwidth::Bandwidth;
use tote_agent::containerd::{Containerd as _, FAKE_SNAPSHOTTER, Fake};
use tote_agent::import::{Context, Failure, Imports, Lifetimes};
use tote_agent::testing::{Blobs, noise, tar};
use tote_rpc::v1::import_event::Event;
use tote_rpc::v1::{self, Cause, Stage};

use peers::{Peer, Trick, agent, context, import, request};

const NAME: &str = "registry.test/team/app:1";

/// One whose first layer is written in several pieces.
fn large_image() -> Blobs {
    Blobs::image(&[tar(&[("a", &noise(3 << 20))]), tar(&[("b", b"2")])])
}

/// What of a stalled layer is on the node by the time it stalls.
const PIECE: usize = 1 << 20;

fn image() -> Blobs {
    let big = noise(100_000);
    Blobs::image(&[tar(&[("a", &big)]), tar(&[("b", b"2")]), tar(&[("a", &big)])])
}

/// Everything an import must leave, and nothing else.
async fn check_complete(fake: &Fake, image: &Blobs, name: &str) {
    let repository = name.split([':', '@']).next().unwrap();
    let by_digest = format!("{repository}@{}", image.target.digest);
    for name in [name, &by_digest, image.config.digest.as_str()] {
        let record = fake.image(name).await.unwrap().unwrap_or_else(|| panic!("no record {name}"));
        assert_eq!(record.target, image.target, "{name}");
    }
    assert_eq!(fake.leases().await.unwrap(), []);
    assert_eq!(fake.ingests().await.unwrap(), []);
    fake.collect();
    for digest in image.digests() {
        assert!(fake.blob(&digest).await.unwrap().is_some(), "{digest} is there after a collection");
    }
    for chain in &image.chain {
        assert!(fake.has_snapshot(FAKE_SNAPSHOTTER, chain).await.unwrap(), "{chain} is unpacked");
    }
    for (layer, diff_id) in image.layers.iter().zip(&image.diff_ids) {
        let labels = fake.blob(&layer.digest).await.unwrap().unwrap().labels;
        assert_eq!(labels["containerd.io/uncompressed"], diff_id.to_string());
    }
    for record in fake.images().await.unwrap() {
        fake.remove_image(&record.name);
    }
    fake.collect();
    check_nothing(fake).await;
}

/// As if nothing had ever been asked for.
async fn check_nothing(fake: &Fake) {
    assert_eq!(fake.images().await.unwrap(), []);
    assert_eq!(fake.leases().await.unwrap(), []);
    assert_eq!(fake.ingests().await.unwrap(), []);
    assert_eq!(fake.blobs().await.unwrap(), []);
    assert_eq!(fake.snapshots(), [""; 0]);
}

#[tokio::test]
async fn an_image_arrives_whole() {
    for image in [image(), image().indexed()] {
        let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
        let done = import(&agent(&target), request("t", NAME, &image, &[&peer])).await.unwrap();
        assert_eq!(done.image_id, image.config.digest.as_str());
        assert_eq!(
            (done.total_bytes, done.transferred_bytes, done.reused_bytes),
            (i64::try_from(image.size()).unwrap(), i64::try_from(image.size()).unwrap(), 0,)
        );
        assert_eq!(done.source_nodes, [peer.node.clone()]);
        assert_eq!(done.names.len(), 3);
        check_complete(&target, &image, NAME).await;
    }
}

/// Each stage lasts until it is seen.
#[tokio::test]
async fn the_stages_are_told_in_order() {
    let image = image();
    let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
    peer.trick(&image.config.digest, Trick::Hang);
    target.set_unpacks(false);
    target.set_cri_blind(true);
    let context =
        Context { visible_within: Duration::from_secs(20), ..context(&target, Bandwidth::default()) };
    let imports = Imports::new(context, Lifetimes::default());
    let mut attached = imports.attach(request("t", NAME, &image, &[&peer])).unwrap();
    let mut told = Vec::new();
    let all = async {
        loop {
            attached.states.changed().await.unwrap();
            let event = v1::ImportEvent::from(&*attached.states.borrow_and_update()).event;
            let Some(Event::Progress(progress)) = event else { break event };
            if told.last() == Some(&progress.stage()) {
                continue;
            }
            told.push(progress.stage());
            match progress.stage() {
                Stage::Resolving => {
                    peer.behave();
                    peer.trick(&image.layers[0].digest, Trick::Hang);
                }
                Stage::Moving => peer.behave(),
                Stage::Unpacking => target.set_unpacks(true),
                Stage::Publishing => target.set_cri_blind(false),
                Stage::Unspecified => {}
            }
        }
    };
    let end = tokio::time::timeout(Duration::from_secs(20), all).await;
    assert_eq!(told, [Stage::Resolving, Stage::Moving, Stage::Unpacking, Stage::Publishing]);
    assert!(matches!(end, Ok(Some(Event::Done(_)))), "{end:?}");
}

#[tokio::test]
async fn a_digest_reference_needs_no_tag() {
    let image = image().indexed();
    let (peer, target) = (Peer::holding(&image, "other.test/elsewhere:9").await, Fake::default());
    let name = format!("registry.test/team/app@{}", image.target.digest);
    let done = import(&agent(&target), request("t", &name, &image, &[&peer])).await.unwrap();
    assert_eq!(done.names.len(), 2, "{:?}", done.names);
    check_complete(&target, &image, &name).await;
}

#[tokio::test]
async fn a_second_name_moves_nothing() {
    let image = image().indexed();
    let target = Fake::default();
    image.pull_into(&target, "registry.test/team/other:1");
    let done = import(&agent(&target), request("t", NAME, &image, &[])).await.unwrap();
    assert_eq!((done.transferred_bytes, done.reused_bytes), (0, i64::try_from(image.size()).unwrap()));
    target.remove_image("registry.test/team/other:1");
    check_complete(&target, &image, NAME).await;
}

#[tokio::test]
async fn only_what_is_missing_moves() {
    let image = image();
    let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
    let present = &image.layers[0];
    // No label and no lease: the import must see to both.
    target.put(&image.bytes[&present.digest], [].into());
    let done = import(&agent(&target), request("t", NAME, &image, &[&peer])).await.unwrap();
    assert_eq!(done.reused_bytes, i64::try_from(present.size).unwrap());
    assert_eq!(done.transferred_bytes + done.reused_bytes, done.total_bytes);
    assert_eq!(peer.asked(&present.digest), 0);
    check_complete(&target, &image, NAME).await;
}

#[tokio::test]
async fn a_name_is_never_moved() {
    let (image, other) = (image(), Blobs::image(&[tar(&[("x", b"y")])]));
    let peer = Peer::holding(&image, NAME).await;
    for taken in [NAME.to_owned(), format!("registry.test/team/app@{}", image.target.digest)] {
        let target = Fake::default();
        other.pull_into(&target, &taken);
        let failed = import(&agent(&target), request("t", NAME, &image, &[&peer])).await.unwrap_err();
        assert_eq!((failed.cause(), failed.retryable), (Cause::NameConflict, false));
        assert!(failed.message.contains(other.target.digest.as_str()), "{}", failed.message);
        assert_eq!(target.image(&taken).await.unwrap().unwrap().target, other.target);
        assert_eq!(target.images().await.unwrap().len(), 1);
        assert_eq!(target.leases().await.unwrap(), []);
        assert_eq!(target.blob(&image.config.digest).await.unwrap(), None);
    }
    // The config's record is another matter: CRI itself moves it.
    let target = Fake::default();
    other.pull_into(&target, image.config.digest.as_str());
    import(&agent(&target), request("t", NAME, &image, &[&peer])).await.unwrap();
    check_complete(&target, &image, NAME).await;
}

#[tokio::test]
async fn what_cannot_be_done_says_why() {
    let image = image();
    let peer = Peer::holding(&image, NAME).await;
    let blind = Fake::default();
    blind.set_cri_blind(true);
    let stargz = Fake::default();
    stargz.set_no_snapshotter("CRI's snapshotter stargz is not one that keeps whole layers");
    let full = Fake::default();
    full.set_full(true);
    for (fake, cause, retryable, says) in [
        (blind, Cause::NotVisible, true, NAME),
        (stargz, Cause::Snapshotter, false, "stargz"),
        (full, Cause::DiskFull, true, "full"),
    ] {
        let failed = import(&agent(&fake), request("t", NAME, &image, &[&peer])).await.unwrap_err();
        assert_eq!((failed.cause(), failed.retryable), (cause, retryable), "{}", failed.message);
        assert!(failed.message.contains(says), "{}", failed.message);
    }
    let failed = import(&agent(&Fake::default()), request("t", NAME, &image, &[])).await.unwrap_err();
    assert_eq!(failed.cause(), Cause::NoSource);
    assert!(failed.message.contains("no sources were named"), "{}", failed.message);
}

#[tokio::test]
async fn images_of_other_kinds_are_refused() {
    let lying = Blobs::with_diff_ids(&[tar(&[("a", b"1")])], vec![image().diff_ids[0].clone()]);
    let short = Blobs::with_diff_ids(&[tar(&[("a", b"1")])], vec![]);
    let mut foreign = image().indexed();
    let text = String::from_utf8(foreign.bytes[&foreign.target.digest].clone()).unwrap();
    foreign.retarget(text.replace("amd64", "s390x").into_bytes());
    for (image, cause, says) in [
        (lying, Cause::Unpack, "the image's config says"),
        (short, Cause::Unsupported, "0 diff IDs"),
        (foreign, Cause::Platform, "no manifest for linux/amd64, only for linux/arm64, linux/s390x"),
    ] {
        let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
        let failed = import(&agent(&target), request("t", NAME, &image, &[&peer])).await.unwrap_err();
        assert_eq!((failed.cause(), failed.retryable), (cause, false), "{}", failed.message);
        assert!(failed.message.contains(says), "{}", failed.message);
        check_nothing(&target).await;
    }
}

#[tokio::test]
async fn a_platform_that_no_source_holds_may_come() {
    let image = image().indexed();
    let peer = Peer::holding(&image, NAME).await;
    peer.fake.remove_blob(&image.manifest.digest);
    let failed = import(&agent(&Fake::default()), request("t", NAME, &image, &[&peer])).await.unwrap_err();
    assert_eq!((failed.cause(), failed.retryable), (Cause::Platform, true));
    assert!(failed.message.contains("no source holds a manifest for linux/amd64"), "{}", failed.message);
}

#[test]
fn a_person_reads_each_failure() {
    let failure = Failure::DiskFull("write: no space left on device".to_owned());
    assert_eq!(failure.label(), "disk_full");
    assert!(failure.to_string().contains("no space left"));
}

/// Waits for a condition, 10 s at most.
async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while !condition().await {
        assert!(tokio::time::Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
