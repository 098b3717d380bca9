//! The agent's containerd client does on every real containerd what the conformance suite asks, which the
//! in-memory one is held to as well. Needs root and what `e2e/tools.sh containerd` builds.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::explicit_write, reason = "libtest captures eprintln, but not this")]

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use tote_agent::containerd::{Client, Containerd as _, Error, conformance};
use tote_e2e::containerd::Snapshotter;
use tote_e2e::daemon::{Daemon, Options};
use tote_e2e::tools::Containerd;

async fn conforms(version: Containerd, snapshotter: Snapshotter) {
    let daemon = Daemon::start(Options::new(version).snapshotter(snapshotter)).unwrap();
    let name = snapshotter.to_string();
    // Not captured, so that whoever runs the tests sees what they ran on.
    writeln!(std::io::stderr(), "conformance suite on: {version}, snapshotter {name}").unwrap();
    let client = Client::new(&daemon.socket());
    let facts = client.facts().await.unwrap();
    assert!(facts.version.starts_with(version.version()), "{} is not {version}", facts.version);
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
