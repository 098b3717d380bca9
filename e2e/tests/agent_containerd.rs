//! The agent's containerd client does on every real containerd what the conformance suite asks, which the
//! in-memory one is held to as well. Needs root and what `e2e/tools.sh containerd` builds.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::explicit_write, reason = "libtest captures eprintln, but not this")]

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::{StreamExt as _, TryStreamExt as _};
use tote_agent::containerd::{Client, Containerd as _, Error, Ingest, Lease, conformance};
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

/// A blob that is being read from its file comes to its end though containerd is gone; through containerd it breaks off.
#[tokio::test]
async fn blobs_are_read_from_their_files() {
    for version in Containerd::ALL {
        let mut daemon = Daemon::start(Options::new(version)).unwrap();
        let client = Client::new(&daemon.socket());
        let bytes = bytes::Bytes::from(vec![7_u8; 64 << 20]);
        let media_type = "application/octet-stream".to_owned();
        let blob = Descriptor { media_type, digest: Digest::sha256(&bytes), size: bytes.len() as u64 };
        let lease = Lease { id: "files".to_owned(), transfer: "files".to_owned() };
        client.create_lease(&lease, SystemTime::now() + Duration::from_secs(3600)).await.unwrap();
        let Ingest::Open(mut writer) = client.ingest(&lease.id, &blob).await.unwrap() else { panic!() };
        for piece in 0..16 {
            writer.write(bytes.slice(piece << 22..(piece + 1) << 22)).await.unwrap();
        }
        writer.commit([].into()).await.unwrap();
        for (client, whole) in [(client.clone(), false), (client.with_files(), true)] {
            let mut pieces = client.read(&blob.digest, 0, blob.size).await.unwrap();
            let mut read = pieces.next().await.unwrap().unwrap().len();
            daemon.kill().unwrap();
            let rest: Result<Vec<_>, _> = pieces.try_collect().await;
            read += rest.as_ref().map_or(0, |pieces| pieces.iter().map(bytes::Bytes::len).sum());
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
