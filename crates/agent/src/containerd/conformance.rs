//! What every [`Containerd`] must do, the in-memory one and the real ones of every version alike. Panics with
//! what differed.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use tote_image::{Descriptor, Digest};

use super::{
    BlobWriter, Change, Containerd, Error, Held, ImageRecord, Ingest, Labels, Layer, Lease, SNAPSHOT_LABEL,
};
use crate::testing::{Blobs, gzip, tar};

const WAIT: Duration = Duration::from_secs(30);

/// Runs the whole suite. The containerd must be empty of images and may be used for this alone; `snapshotter`
/// is the one that its CRI uses.
pub async fn run(containerd: &dyn Containerd, snapshotter: &str) {
    let facts = containerd.facts().await.expect("facts");
    assert_eq!(facts.snapshotter.as_deref(), Ok(snapshotter), "the snapshotter CRI uses");
    assert_eq!(facts.platform.os(), "linux");
    assert!(!facts.version.is_empty() && !facts.version.starts_with('v'), "version {:?}", facts.version);
    content(containerd).await;
    ingests(containerd).await;
    leases(containerd).await;
    unpacking(containerd, snapshotter).await;
    images(containerd, snapshotter).await;
    assert_eq!(containerd.leases().await.expect("leases"), [], "every lease was deleted");
    assert_eq!(containerd.ingests().await.expect("ingests"), [], "every ingest has ended");
}

fn blob(bytes: &[u8]) -> Descriptor {
    let media_type = "application/octet-stream".to_owned();
    Descriptor { media_type, digest: Digest::sha256(bytes), size: bytes.len() as u64 }
}

async fn lease(containerd: &dyn Containerd, id: &str) -> Lease {
    let lease = Lease { id: id.to_owned(), transfer: format!("{id}-transfer") };
    let expires = SystemTime::now() + Duration::from_secs(3600);
    containerd.create_lease(&lease, expires).await.expect("a new lease");
    lease
}

async fn put(containerd: &dyn Containerd, lease: &str, bytes: &[u8], labels: Labels) -> Descriptor {
    let blob = blob(bytes);
    match containerd.ingest(lease, &blob).await.expect("an ingest") {
        Ingest::Present => {
            containerd.label(&blob.digest, &labels).await.expect("labels of a blob that is there");
        }
        Ingest::Open(mut writer) => {
            writer.write(Bytes::copy_from_slice(bytes)).await.expect("a write");
            writer.commit(labels).await.expect("a commit");
        }
    }
    blob
}

async fn content(containerd: &dyn Containerd) {
    let lease = lease(containerd, "conformance-content").await;
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|i| u8::try_from(i % 251).expect("below 251")).collect();
    let absent = Digest::sha256(b"absent");
    assert_eq!(containerd.blob(&absent).await.expect("info"), None, "a blob that is not there");
    let read = match containerd.read(&absent, 0, 1).await {
        Ok(stream) => stream.try_collect::<Vec<Bytes>>().await.map(drop),
        Err(error) => Err(error),
    };
    assert!(matches!(read, Err(Error::NotFound(_))), "reading a blob that is not there: {read:?}");

    let label = ("containerd.io/uncompressed".to_owned(), absent.to_string());
    let stored = put(containerd, &lease.id, &bytes, [label.clone()].into()).await;
    let found = containerd.blob(&stored.digest).await.expect("info").expect("the blob");
    assert_eq!((found.size, found.labels.get(&label.0)), (3_000_000, Some(&label.1)));
    assert!(containerd.blobs().await.expect("all blobs").contains(&(stored.digest.clone(), 3_000_000)));
    for (offset, length) in [(0, 3_000_000), (1, 10), (2_999_999, 1), (1_048_570, 1_100_000), (5, 0)] {
        let pieces = containerd.read(&stored.digest, offset, length).await.expect("a read");
        let read = pieces.try_collect::<Vec<Bytes>>().await.expect("its bytes").concat();
        let (from, to) = (usize::try_from(offset).unwrap(), usize::try_from(offset + length).unwrap());
        assert!(read == bytes[from..to], "{length} bytes from {offset}: {} came", read.len());
    }
    let more: Labels =
        [("tote.dev/a.b".to_owned(), "1".to_owned()), (label.0.clone(), "2".to_owned())].into();
    containerd.label(&stored.digest, &more).await.expect("labels");
    let found = containerd.blob(&stored.digest).await.expect("info").expect("the blob").labels;
    assert!(more.iter().all(|(key, value)| found.get(key) == Some(value)), "{found:?}");
    let again = containerd.ingest(&lease.id, &stored).await.expect("an ingest");
    assert!(matches!(again, Ingest::Present), "a blob that is there is not written again");
    containerd.delete_lease(&lease.id).await.expect("the lease deleted");
    assert_eq!(containerd.blob(&stored.digest).await.expect("info"), None, "nothing held it");
}

async fn ingests(containerd: &dyn Containerd) {
    let held = lease(containerd, "conformance-ingests").await;
    let bytes = vec![7_u8; 2_000_000];
    let blob = blob(&bytes);
    // Part of it, then the writer is gone.
    let Ingest::Open(mut writer) = containerd.ingest(&held.id, &blob).await.expect("an ingest") else {
        panic!("the blob is not there")
    };
    assert_eq!(writer.offset(), 0);
    writer.write(Bytes::copy_from_slice(&bytes[..1_500_000])).await.expect("a write");
    assert_eq!(writer.offset(), 1_500_000);
    drop(writer);
    assert_eq!(containerd.ingests().await.expect("ingests"), std::slice::from_ref(&blob.digest));
    assert_eq!(containerd.blob(&blob.digest).await.expect("info"), None, "not visible before the commit");
    // Resumed, by another lease, which alone keeps it.
    let second = lease(containerd, "conformance-second").await;
    let writer = open_free(containerd, &second.id, &blob).await;
    let at = usize::try_from(writer.offset()).unwrap();
    assert!(at <= 1_500_000, "resumed at {at}");
    drop(writer);
    // A third holds it without having opened it.
    let waiting = lease(containerd, "conformance-waiting").await;
    containerd.hold(&waiting.id, Held::Ingest(&blob.digest)).await.expect("holding an ingest");
    containerd.delete_lease(&second.id).await.expect("the second lease deleted");
    containerd.delete_lease(&held.id).await.expect("the first lease deleted");
    assert_eq!(
        containerd.ingests().await.expect("ingests"),
        std::slice::from_ref(&blob.digest),
        "the third holds it"
    );
    let second = waiting;
    let mut writer = match containerd.ingest(&second.id, &blob).await.expect("an ingest") {
        Ingest::Open(writer) => writer,
        Ingest::Present => panic!("it was not committed"),
    };
    let at = usize::try_from(writer.offset()).unwrap();
    writer.write(Bytes::copy_from_slice(&bytes[at..])).await.expect("a write");
    writer.commit(Labels::new()).await.expect("a commit");
    assert!(containerd.blob(&blob.digest).await.expect("info").is_some());
    containerd.delete_lease(&second.id).await.expect("the second lease deleted");
    refused(containerd, &bytes).await;
    another_size(containerd, &bytes).await;
    // A lease that ends takes the ingest along.
    let third = lease(containerd, "conformance-third").await;
    let Ingest::Open(mut writer) = containerd.ingest(&third.id, &blob).await.expect("an ingest") else {
        panic!("the blob was collected")
    };
    writer.write(Bytes::from_static(b"some")).await.expect("a write");
    drop(writer);
    containerd.delete_lease(&third.id).await.expect("the third lease deleted");
    assert_eq!(containerd.ingests().await.expect("ingests"), [], "nothing holds the ingest");
}

/// What was begun as a blob of another size is not gone on with, nor does any of it stay: the first write truncates.
async fn another_size(containerd: &dyn Containerd, bytes: &[u8]) {
    let held = lease(containerd, "conformance-size").await;
    let right = blob(&bytes[..1_000_000]);
    for wrong in
        [Descriptor { size: 5_000_000, ..right.clone() }, Descriptor { size: 500_000, ..right.clone() }]
    {
        let Ingest::Open(mut writer) = containerd.ingest(&held.id, &wrong).await.expect("an ingest") else {
            panic!("the blob is not there")
        };
        let much = usize::try_from(wrong.size).unwrap().min(bytes.len());
        writer.write(Bytes::copy_from_slice(&bytes[..much])).await.expect("a write");
        drop(writer);
        let opened = open_free(containerd, &held.id, &right).await;
        assert_eq!(opened.offset(), 0, "begun as one of {} bytes", wrong.size);
        drop(opened);
    }
    let mut writer = open_free(containerd, &held.id, &right).await;
    writer.write(Bytes::copy_from_slice(&bytes[..1_000_000])).await.expect("a write");
    writer.commit(Labels::new()).await.expect("a commit");
    containerd.delete_lease(&held.id).await.expect("the lease deleted");
}

/// Opens an ingest whose writer has just been dropped.
async fn open_free(containerd: &dyn Containerd, lease: &str, blob: &Descriptor) -> Box<dyn BlobWriter> {
    let deadline = tokio::time::Instant::now() + WAIT;
    loop {
        match containerd.ingest(lease, blob).await {
            Ok(Ingest::Open(writer)) => return writer,
            Ok(Ingest::Present) => panic!("it was not committed"),
            Err(error) => assert!(tokio::time::Instant::now() < deadline, "resuming: {error}"),
        }
    }
}

/// Bytes that are not what the descriptor said are refused, and can be forgotten.
async fn refused(containerd: &dyn Containerd, bytes: &[u8]) {
    let held = lease(containerd, "conformance-refused").await;
    let wrong = Descriptor { digest: Digest::sha256(b"something else"), ..blob(bytes) };
    for written in [bytes, &bytes[..bytes.len() - 1]] {
        let Ingest::Open(mut writer) = containerd.ingest(&held.id, &wrong).await.expect("an ingest") else {
            panic!("the blob cannot be there")
        };
        assert_eq!(writer.offset(), 0, "what was aborted is forgotten");
        writer.write(Bytes::copy_from_slice(written)).await.expect("a write");
        let outcome = writer.commit(Labels::new()).await;
        assert!(matches!(outcome, Err(Error::Mismatch(_))), "committing wrong bytes: {outcome:?}");
        assert_eq!(containerd.blob(&wrong.digest).await.expect("info"), None);
        containerd.abort(&wrong.digest).await.expect("an abort");
        containerd.abort(&wrong.digest).await.expect("an abort of nothing");
    }
    containerd.delete_lease(&held.id).await.expect("the lease deleted");
}

async fn leases(containerd: &dyn Containerd) {
    let first = lease(containerd, "conformance-a").await;
    let again = containerd.create_lease(&first, SystemTime::now() + WAIT).await;
    assert!(matches!(again, Err(Error::AlreadyExists(_))), "the same lease twice: {again:?}");
    let child = put(containerd, &first.id, b"a child", Labels::new()).await;
    let label = ("containerd.io/gc.ref.content.l.0".to_owned(), child.digest.to_string());
    let parent = put(containerd, &first.id, b"a parent", [label].into()).await;
    let loose = put(containerd, &first.id, b"a loose one", Labels::new()).await;
    let second = lease(containerd, "conformance-b").await;
    let mut all = containerd.leases().await.expect("leases");
    all.sort_by(|a, b| a.id.cmp(&b.id));
    assert_eq!(all, [first.clone(), second.clone()]);
    containerd.hold(&second.id, Held::Blob(&parent.digest)).await.expect("holding a blob");
    containerd.delete_lease(&first.id).await.expect("deleted");
    for (digest, stays) in [(&parent.digest, true), (&child.digest, true), (&loose.digest, false)] {
        let stood = containerd.blob(digest).await.expect("info").is_some();
        assert_eq!(stood, stays, "{digest} after its lease's end");
    }
    containerd.delete_lease(&second.id).await.expect("deleted");
    containerd.delete_lease(&second.id).await.expect("deleting a lease that is gone");
    assert_eq!(containerd.blob(&child.digest).await.expect("info"), None);
}

async fn unpacking(containerd: &dyn Containerd, snapshotter: &str) {
    let held = lease(containerd, "conformance-unpack").await;
    let tars = [tar(&[("etc/one", b"1")]), tar(&[("etc/two", b"22"), ("bin/x", b"\x7fELF")])];
    let base = Digest::sha256(&tars[0]);
    let chain = tote_image::chain_ids(&[base.clone(), Digest::sha256(&tars[1])]);
    let mut blobs = Vec::new();
    for tar in &tars {
        let stored = put(containerd, &held.id, &gzip(tar), Labels::new()).await;
        let media_type = "application/vnd.oci.image.layer.v1.tar+gzip".to_owned();
        blobs.push(Descriptor { media_type, ..stored });
    }
    let first = Layer { blob: &blobs[0], diff_id: &base, parent: None, chain: &chain[0] };
    let wrong = Layer { diff_id: &chain[1], ..first };
    let outcome = containerd.unpack(&held.id, snapshotter, wrong, 0).await;
    assert!(matches!(outcome, Err(Error::Mismatch(_))), "a diff ID that differs: {outcome:?}");
    assert!(!containerd.has_snapshot(snapshotter, &chain[0]).await.expect("stat"));
    for _ in 0..2 {
        containerd.unpack(&held.id, snapshotter, first, 0).await.expect("the first layer");
        assert!(containerd.has_snapshot(snapshotter, &chain[0]).await.expect("stat"));
    }
    let diff = Digest::sha256(&tars[1]);
    let second = Layer { blob: &blobs[1], diff_id: &diff, parent: Some(&chain[0]), chain: &chain[1] };
    containerd.unpack(&held.id, snapshotter, second, 0).await.expect("the second layer");
    // Another lease that finds it done holds it too.
    let other = lease(containerd, "conformance-unpacked").await;
    containerd.unpack(&other.id, snapshotter, second, 0).await.expect("a layer that stands");
    containerd.delete_lease(&held.id).await.expect("deleted");
    for chain in &chain {
        assert!(
            containerd.has_snapshot(snapshotter, chain).await.expect("stat"),
            "held as the other's parent"
        );
    }
    containerd.delete_lease(&other.id).await.expect("deleted");
    for chain in &chain {
        assert!(!containerd.has_snapshot(snapshotter, chain).await.expect("stat"), "held by nothing");
    }
}

async fn images(containerd: &dyn Containerd, snapshotter: &str) {
    let mut changes = containerd.changes().await.expect("changes");
    let held = lease(containerd, "conformance-images").await;
    let image = Blobs::image(&[tar(&[("etc/one", b"1")])]);
    for (bytes, labels) in image.with_labels() {
        put(containerd, &held.id, &bytes, labels).await;
    }
    let unpacked = image.layer(0);
    containerd.unpack(&held.id, snapshotter, unpacked, 0).await.expect("unpacked");
    let label = (format!("{SNAPSHOT_LABEL}{snapshotter}"), unpacked.chain.to_string());
    containerd.label(&image.config.digest, &[label].into()).await.expect("a label");

    let name = "registry.test/conformance/image:1";
    assert_eq!(containerd.image(name).await.expect("get"), None);
    assert_eq!(containerd.image_status(name).await.expect("status"), None);
    let record = ImageRecord { name: name.to_owned(), target: image.target.clone() };
    containerd.create_image(&record).await.expect("a record");
    // The subscription may not have stood by then: change it until that is told.
    let mut change = None;
    for _ in 0..100 {
        change = tokio::time::timeout(Duration::from_millis(100), changes.next()).await.ok();
        if change.is_some() {
            break;
        }
        containerd.retarget_image(&record).await.expect("the same record again");
    }
    assert_eq!(change, Some(Some(Change::Images)), "an event in time");
    let again = containerd.create_image(&record).await;
    assert!(matches!(again, Err(Error::AlreadyExists(_))), "the same record twice: {again:?}");
    assert_eq!(containerd.image(name).await.expect("get"), Some(record.clone()));
    assert!(containerd.images().await.expect("list").contains(&record));
    let deadline = tokio::time::Instant::now() + WAIT;
    loop {
        let id = containerd.image_status(name).await.expect("status");
        if id.is_some() {
            assert_eq!(id.as_deref(), Some(image.config.digest.as_str()), "the config's digest");
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "CRI sees the record");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // With the lease gone, record and labels alone keep everything.
    containerd.delete_lease(&held.id).await.expect("deleted");
    for digest in image.digests() {
        assert!(containerd.blob(&digest).await.expect("info").is_some(), "{digest} is kept by the record");
    }
    assert!(containerd.has_snapshot(snapshotter, unpacked.chain).await.expect("stat"), "kept by the config");
    let other = Blobs::image(&[tar(&[("etc/other", b"2")])]);
    let held = lease(containerd, "conformance-moved").await;
    for (bytes, labels) in other.with_labels() {
        put(containerd, &held.id, &bytes, labels).await;
    }
    let moved = ImageRecord { target: other.target.clone(), ..record };
    containerd.retarget_image(&moved).await.expect("moved");
    assert_eq!(containerd.image(name).await.expect("get"), Some(moved.clone()));
    containerd.delete_lease(&held.id).await.expect("deleted");
    assert_eq!(containerd.blob(&image.target.digest).await.expect("info"), None, "nothing names it");
    assert!(containerd.blob(&other.target.digest).await.expect("info").is_some());
    containerd.delete_image(&moved).await.expect("removed");
    assert_eq!(containerd.image(name).await.expect("get"), None);
    containerd.delete_image(&moved).await.expect("one that is gone is no error");
    let deadline = tokio::time::Instant::now() + WAIT;
    while containerd.image_status(name).await.expect("status").is_some() {
        assert!(tokio::time::Instant::now() < deadline, "CRI sees that the record is gone");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
