//! The inventory over the fake containerd: what is told, and when.

use std::time::SystemTime;

use super::*;
use crate::containerd::{FAKE_SNAPSHOTTER, Fake, Lease};
use crate::testing::{Blobs, tar};

const NAME: &str = "registry.test/a:1";

async fn scan(fake: &Fake) -> Inventory {
    Scanner::new(Arc::new(fake.clone()), None).scan().await.unwrap()
}

#[tokio::test]
async fn tells_what_is_complete() {
    let fake = Fake::default();
    let image = Blobs::image(&[tar(&[("a", b"1")]), tar(&[("b", b"2")])]).indexed();
    image.pull_into(&fake, NAME);
    fake.put_image("registry.test/b:1", &image.target);
    let inventory = scan(&fake).await;
    let found = &inventory[&image.target.digest];
    assert_eq!(found.names, [NAME, "registry.test/b:1"]);
    let [manifest] = &found.manifests[..] else { panic!("one manifest is here: {found:?}") };
    assert_eq!(manifest.digest, image.manifest.digest.as_str());
    assert_eq!(manifest.platform.as_ref().unwrap().architecture, "amd64");
    assert_eq!(manifest.config_digest, image.config.digest.as_str());
    assert!(manifest.complete);
    assert_eq!(manifest.created, 1_767_225_600, "by the config, also below an index that names the platform");
    let index = image.target.size;
    assert_eq!(u64::try_from(manifest.size).unwrap(), image.size() - index);
    for absent in [&image.layers[1], &image.config] {
        fake.remove_blob(&absent.digest);
        assert!(!scan(&fake).await[&image.target.digest].manifests[0].complete, "without {absent:?}");
        fake.put(&image.bytes[&absent.digest], [].into());
    }
    fake.remove_blob(&image.manifest.digest);
    assert_eq!(scan(&fake).await[&image.target.digest].manifests, []);
}

/// Unpacks so many of its layers.
async fn unpack(fake: &Fake, image: &Blobs, layers: usize) {
    let lease = Lease { id: "lease".to_owned(), transfer: "t".to_owned() };
    fake.create_lease(&lease, SystemTime::now()).await.unwrap();
    for at in 0..layers {
        fake.unpack(&lease.id, FAKE_SNAPSHOTTER, image.layer(at), 0).await.unwrap();
    }
}

#[tokio::test]
async fn tells_what_stands_unpacked_though_layers_are_missing() {
    let fake = Fake::default();
    let image = Blobs::image(&[tar(&[("a", b"1")]), tar(&[("b", b"2")])]).indexed();
    image.pull_into(&fake, NAME);
    unpack(&fake, &image, 2).await;
    let mut scanner = Scanner::new(Arc::new(fake.clone()), None);
    let mut told = async |calls: u32| {
        fake.die_after(Some(calls));
        let told = scanner.scan().await.unwrap()[&image.target.digest].manifests[0].clone();
        fake.die_after(None);
        (told.complete, told.unpacked)
    };
    assert_eq!(told(99).await, (true, false), "it is not asked");
    assert_eq!(told(2).await, (true, false), "for records and blobs alone");
    for layer in &image.layers {
        fake.remove_blob(&layer.digest);
    }
    assert_eq!(told(99).await, (false, true));
    assert_eq!(told(3).await, (false, true), "the snapshotter is known by now");
    fake.remove_blob(&image.config.digest);
    assert_eq!(told(2).await, (false, false), "without its config");
    fake.put(&image.bytes[&image.config.digest], [].into());
    assert_eq!(told(99).await, (false, true));
    fake.remove_snapshots();
    assert_eq!(told(99).await, (false, false), "at the next scan, though no event tells");
}

#[tokio::test]
async fn what_is_unpacked_in_part_or_nobody_knows_where_is_not_unpacked() {
    let image = Blobs::image(&[tar(&[("a", b"1")]), tar(&[("b", b"2")])]);
    let (in_part, unsettled) = (Fake::default(), Fake::default());
    for (fake, layers) in [(&in_part, 1), (&unsettled, 2)] {
        image.pull_into(fake, NAME);
        unpack(fake, &image, layers).await;
        fake.remove_blob(&image.layers[0].digest);
    }
    unsettled.set_no_snapshotter("CRI does not tell");
    for fake in [in_part, unsettled] {
        let told = scan(&fake).await[&image.target.digest].manifests[0].clone();
        assert_eq!((told.complete, told.unpacked), (false, false));
    }
}

#[tokio::test]
async fn takes_the_platform_from_the_config_without_an_index() {
    let fake = Fake::default();
    let image = Blobs::image(&[tar(&[("a", b"1")])]);
    image.pull_into(&fake, NAME);
    let inventory = scan(&fake).await;
    let platform = inventory[&image.target.digest].manifests[0].platform.clone().unwrap();
    assert_eq!((platform.os.as_str(), platform.architecture.as_str()), ("linux", "amd64"));
}

#[tokio::test]
async fn tells_differences() {
    let fake = Fake::default();
    let (a, b) = (Blobs::image(&[tar(&[("a", b"1")])]), Blobs::image(&[tar(&[("b", b"2")])]));
    a.pull_into(&fake, NAME);
    let before = scan(&fake).await;
    assert_eq!(difference(&before, &scan(&fake).await), v1::InventoryDelta::default());
    assert_eq!(difference(&Inventory::new(), &before).upserted.len(), 1);
    b.pull_into(&fake, "registry.test/b:1");
    fake.remove_image(NAME);
    let delta = difference(&before, &scan(&fake).await);
    assert_eq!(delta.upserted[0].names, ["registry.test/b:1"]);
    assert_eq!(delta.removed, [a.target.digest.to_string()]);
}

#[tokio::test]
async fn follows_events() {
    let fake = Fake::default();
    let sender = watch::Sender::new(None);
    let mut inventory = sender.subscribe();
    let stop = CancellationToken::new();
    let following = tokio::spawn(follow(Arc::new(fake.clone()), None, sender, stop.clone()));
    let wait = Duration::from_secs(10);
    tokio::time::timeout(wait, inventory.wait_for(Option::is_some)).await.unwrap().unwrap();
    let image = Blobs::image(&[tar(&[("a", b"1")])]);
    let started = Instant::now();
    image.pull_into(&fake, NAME);
    let has_it = |seen: &Option<Arc<Inventory>>| {
        seen.as_ref().is_some_and(|seen| seen.contains_key(&image.target.digest))
    };
    tokio::time::timeout(wait, inventory.wait_for(has_it)).await.unwrap().unwrap();
    assert!(started.elapsed() < Duration::from_millis(500), "by event: {:?}", started.elapsed());
    stop.cancel();
    following.await.unwrap();
}

/// A kubelet's directory, and the record of an image in it.
fn kubelet() -> (tempfile::TempDir, Arc<Records>) {
    let directory = tempfile::tempdir().unwrap();
    for name in ["pulled", "pulling"] {
        std::fs::create_dir_all(directory.path().join("image_manager").join(name)).unwrap();
    }
    let records = Arc::new(Records::new(directory.path()));
    (directory, records)
}

fn say(directory: &tempfile::TempDir, kind: &str, about: &str, content: &serde_json::Value) {
    let name = format!("sha256-{}", Digest::sha256(about.as_bytes()).hex());
    let path = directory.path().join("image_manager").join(kind).join(name);
    std::fs::write(path, content.to_string()).unwrap();
}

fn record(id: &Digest) -> serde_json::Value {
    serde_json::json!({"kind": "ImagePulledRecord", "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "lastUpdatedTime": "2026-01-01T00:00:00Z", "imageRef": id.as_str(),
        "credentialMapping": {"registry.test/a": {"nodePodsAccessible": true}}})
}

#[tokio::test]
async fn tells_who_may_have_an_image_and_when_that_changes() {
    let (fake, (directory, records)) = (Fake::default(), kubelet());
    let image = Blobs::image(&[tar(&[("a", b"1")])]);
    image.pull_into(&fake, NAME);
    let sender = watch::Sender::new(None);
    let mut inventory = sender.subscribe();
    let stop = CancellationToken::new();
    let following = tokio::spawn(follow(Arc::new(fake), Some(records), sender, stop.clone()));
    let wait = Duration::from_secs(10);
    let pulled = |seen: &Option<Arc<Inventory>>| {
        seen.as_ref().map(|seen| seen[&image.target.digest].manifests[0].pulled.clone())
    };
    let seen =
        tokio::time::timeout(wait, inventory.wait_for(Option::is_some)).await.unwrap().unwrap().clone();
    assert_eq!(pulled(&seen), Some(None));
    say(&directory, "pulled", image.config.digest.as_str(), &record(&image.config.digest));
    let told = inventory.wait_for(|seen| pulled(seen).flatten().is_some_and(|r| r.repositories[0].every_pod));
    tokio::time::timeout(wait, told).await.unwrap().unwrap();
    stop.cancel();
    following.await.unwrap();
}

#[tokio::test]
async fn an_image_that_kubelet_pulls_is_told_of_with_its_record() {
    let (fake, (directory, records)) = (Fake::default(), kubelet());
    let image = Blobs::image(&[tar(&[("a", b"1")])]);
    let mut scanner = Scanner::new(Arc::new(fake.clone()), Some(records));
    let intent = serde_json::json!({"kind": "ImagePullIntent", "apiVersion": "kubelet.config.k8s.io/v1beta1", "image": NAME});
    say(&directory, "pulling", NAME, &intent);
    image.pull_into(&fake, NAME);
    assert!(scanner.scan().await.unwrap().is_empty(), "kubelet has not said who may have it");
    assert!(scanner.holds_back());
    say(&directory, "pulled", image.config.digest.as_str(), &record(&image.config.digest));
    let told = scanner.scan().await.unwrap();
    assert!(told[&image.target.digest].manifests[0].pulled.is_some());
    assert!(!scanner.holds_back());
}

#[tokio::test]
async fn an_image_is_not_held_back_for_ever() {
    let (fake, (directory, records)) = (Fake::default(), kubelet());
    let image = Blobs::image(&[tar(&[("a", b"1")])]);
    let mut scanner = Scanner::new(Arc::new(fake.clone()), Some(records));
    let intent = serde_json::json!({"kind": "ImagePullIntent", "apiVersion": "kubelet.config.k8s.io/v1beta1", "image": NAME});
    say(&directory, "pulling", NAME, &intent);
    image.pull_into(&fake, NAME);
    assert!(scanner.scan().await.unwrap().is_empty());
    *scanner.held.get_mut(&image.target.digest).unwrap() -= RECORD_PATIENCE;
    // Nor is one that was told of taken back; but nobody is known to may have it until kubelet's pull has ended.
    for _ in 0..2 {
        let told = scanner.scan().await.unwrap();
        let pulled = told[&image.target.digest].manifests[0].pulled.clone();
        assert_eq!(pulled, Some(v1::PulledRecord::default()));
        assert!(!scanner.holds_back());
    }
    let intents = directory.path().join("image_manager/pulling");
    for intent in std::fs::read_dir(&intents).unwrap() {
        std::fs::remove_file(intent.unwrap().path()).unwrap();
    }
    let told = scanner.scan().await.unwrap();
    assert_eq!(told[&image.target.digest].manifests[0].pulled, None);
}

#[tokio::test]
async fn a_manifest_that_an_index_names_often_is_told_once() {
    let fake = Fake::default();
    let mut image = Blobs::image(&[tar(&[("a", b"1")])]).indexed();
    let mut index: serde_json::Value = serde_json::from_slice(&image.bytes[&image.target.digest]).unwrap();
    let entries = index["manifests"].as_array().unwrap().clone();
    index["manifests"] = std::iter::repeat_n(entries, 100).flatten().collect();
    image.retarget(index.to_string().into_bytes());
    image.pull_into(&fake, NAME);
    let told = Scanner::new(Arc::new(fake), None).scan().await.unwrap();
    assert_eq!(told[&image.target.digest].manifests.len(), 1);
}
