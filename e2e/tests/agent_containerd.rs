//! The agent's containerd client does on every real containerd what the conformance suite asks, which the
//! in-memory one is held to as well. Needs root and what `e2e/tools.sh containerd` builds.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::explicit_write, reason = "libtest captures eprintln, but not this")]

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use rustix::fs::{FileType, Mode};
use rustix::mount::{MountFlags, mount};
use tote_agent::containerd::{Client, Containerd as _, Error, Ingest, Lease, conformance};
use tote_agent::testing::{Blobs, tar};
use tote_e2e::containerd::Snapshotter;
use tote_e2e::daemon::{Daemon, Options};
use tote_e2e::tools::Containerd;
use tote_image::{Descriptor, Digest};

async fn conforms(version: Containerd, snapshotter: Snapshotter) {
    let daemon = Daemon::start(Options::new(version).snapshotter(snapshotter)).unwrap();
    let name = snapshotter.to_string();
    // Not captured, so that whoever runs the tests sees what they ran on.
    writeln!(std::io::stderr(), "conformance suite on: {version}, snapshotter {name}").unwrap();
    let client = Client::new(&daemon.socket());
    let facts = client.facts().await.unwrap();
    assert!(facts.version.starts_with(version.version()), "{} is not {version}", facts.version);
    conformance::run(&client, &name).await;
    // The same with blobs read from their files.
    let client = client.with_files();
    conformance::run(&client, &name).await;
}

#[tokio::test]
async fn containerd_1_6_conforms() {
    conforms(Containerd::Debian1_6, Snapshotter::Overlayfs).await;
}

#[tokio::test]
async fn containerd_1_7_conforms() {
    conforms(Containerd::V1_7, Snapshotter::Overlayfs).await;
}

#[tokio::test]
async fn containerd_2_conforms() {
    conforms(Containerd::V2, Snapshotter::Overlayfs).await;
}

#[tokio::test]
async fn another_snapshotter_conforms() {
    for version in Containerd::ALL {
        conforms(version, Snapshotter::Native).await;
    }
}

/// A blob of so many MiB.
fn blob(mebibytes: usize) -> (Bytes, Descriptor) {
    let bytes = Bytes::from(vec![7_u8; mebibytes << 20]);
    let media_type = "application/octet-stream".to_owned();
    let blob = Descriptor { media_type, digest: Digest::sha256(&bytes), size: bytes.len() as u64 };
    (bytes, blob)
}

/// Puts it there, held by a lease of that name.
async fn put(client: &Client, name: &str, bytes: &Bytes, blob: &Descriptor) {
    let lease = Lease { id: name.to_owned(), transfer: name.to_owned() };
    client.create_lease(&lease, SystemTime::now() + Duration::from_secs(3600)).await.unwrap();
    let Ingest::Open(mut writer) = client.ingest(&lease.id, blob).await.unwrap() else { panic!() };
    for piece in 0..bytes.len().div_ceil(4 << 20) {
        let end = bytes.len().min((piece + 1) << 22);
        writer.write(bytes.slice(piece << 22..end)).await.unwrap();
    }
    writer.commit([].into()).await.unwrap();
}

/// The agent sees another directory than containerd does, or something else in a blob's place: the bytes come through
/// containerd, and are right.
#[tokio::test]
async fn what_is_not_the_blob_s_file_is_read_through_containerd() {
    for version in Containerd::ALL {
        let daemon = Daemon::start(Options::new(version)).unwrap();
        let plain = Client::new(&daemon.socket());
        let (bytes, blob) = blob(3);
        put(&plain, "files", &bytes, &blob).await;
        let blobs = daemon.root().join("io.containerd.content.v1.content/blobs");
        let path = blobs.join("sha256").join(blob.digest.hex());
        let read = async |client: &Client, what: &str| {
            for (from, length) in [(0, blob.size), (1 << 20, 100), (blob.size - 1, 1)] {
                let pieces = client.read(&blob.digest, from, length);
                let pieces = tokio::time::timeout(Duration::from_secs(10), pieces).await.expect(what);
                let found = pieces.unwrap().try_collect::<Vec<_>>().await.unwrap().concat();
                let (start, end) = (usize::try_from(from).unwrap(), usize::try_from(from + length).unwrap());
                assert!(found == bytes[start..end], "{version}: {what}: {} bytes of {length}", found.len());
            }
        };
        let client = plain.clone().with_files();
        read(&client, "the file").await;
        // containerd has a mount namespace of its own, and goes on seeing what it saw.
        mount("tmpfs", &blobs, "tmpfs", MountFlags::empty(), c"size=16m").unwrap();
        let wrong = vec![9_u8; bytes.len()];
        let other = blobs.join("other");
        std::fs::write(&other, &wrong).unwrap();
        read(&client, "no directory").await;
        std::fs::create_dir(blobs.join("sha256")).unwrap();
        read(&client, "no file").await;
        std::fs::write(&path, &wrong[..1 << 20]).unwrap();
        read(&client, "a file that is too short").await;
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        read(&client, "a link to something else").await;
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        read(&client, "a directory").await;
        std::fs::remove_dir(&path).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, Mode::RUSR, 0).unwrap();
        read(&client, "a pipe").await;
        // Whoever takes a blob holds it against its digest: a file of the right length is believed here.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, &wrong).unwrap();
        let found = client.read(&blob.digest, 0, 1).await.unwrap().try_collect::<Vec<_>>().await.unwrap();
        assert_eq!(found.concat(), [9], "{version}: it is read from the file at all");
        // A client that does not see the root from the start.
        mount("tmpfs", daemon.root(), "tmpfs", MountFlags::empty(), c"size=1m").unwrap();
        read(&plain.clone().with_files(), "no root").await;
    }
}

/// With less room left than is to be kept, nothing is unpacked, and nothing is left of it; who does not see the file system
/// unpacks.
#[tokio::test]
async fn a_layer_is_not_unpacked_into_what_is_kept_free() {
    for version in Containerd::ALL {
        let daemon = Daemon::start(Options::new(version)).unwrap();
        let client = Client::new(&daemon.socket());
        let image = Blobs::image(&[tar(&[("a", b"1")])]);
        let layer = image.layer(0);
        put(&client, "unpack", &image.bytes[&layer.blob.digest].clone().into(), layer.blob).await;
        let seeing = client.clone().with_files();
        let refused = seeing.unpack("unpack", "overlayfs", layer, u64::MAX).await;
        assert!(matches!(refused, Err(Error::Full(_))), "{version}: {refused:?}");
        let snapshots = daemon.ctr(&["snapshots", "ls"]).unwrap();
        assert_eq!(snapshots.lines().count(), 1, "{version}: snapshots beside the heading: {snapshots}");
        client.unpack("unpack", "overlayfs", layer, u64::MAX).await.unwrap();
        // What is unpacked already needs no room.
        seeing.unpack("unpack", "overlayfs", layer, u64::MAX).await.unwrap();
    }
}

/// A blob that is being read from its file comes to its end though containerd is gone; through containerd it breaks off.
#[tokio::test]
async fn blobs_are_read_from_their_files() {
    for version in Containerd::ALL {
        let mut daemon = Daemon::start(Options::new(version)).unwrap();
        let client = Client::new(&daemon.socket());
        let (bytes, blob) = blob(64);
        put(&client, "files", &bytes, &blob).await;
        for (client, whole) in [(client.clone(), false), (client.with_files(), true)] {
            let mut pieces = client.read(&blob.digest, 0, blob.size).await.unwrap();
            let mut read = pieces.next().await.unwrap().unwrap().len();
            daemon.kill().unwrap();
            let rest: Result<Vec<_>, _> = pieces.try_collect().await;
            read += rest.as_ref().map_or(0, |pieces| pieces.iter().map(Bytes::len).sum());
            assert_eq!((rest.is_ok(), read == bytes.len()), (whole, whole), "{version}: {read} bytes");
            daemon.restart().unwrap();
        }
    }
}

/// The client dials again: no call needs a new client after containerd was restarted.
#[tokio::test]
async fn a_restarted_containerd_is_found_again() {
    for version in Containerd::ALL {
        let mut daemon = Daemon::start(Options::new(version)).unwrap();
        let client = Arc::new(Client::new(&daemon.socket()));
        client.facts().await.unwrap();
        daemon.kill().unwrap();
        let gone = client.images().await;
        assert!(matches!(gone, Err(Error::Unavailable(_))), "{version}: {gone:?}");
        daemon.restart().unwrap();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        while let Err(error) = client.images().await {
            assert!(tokio::time::Instant::now() < deadline, "{version}: {error}");
        }
    }
}
