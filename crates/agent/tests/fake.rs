//! The in-memory containerd behaves as the conformance suite asks, which the real ones are held to too.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::explicit_write, reason = "libtest captures eprintln, but not this")]

use std::io::Write;

use tote_agent::containerd::{FAKE_SNAPSHOTTER, Fake, conformance};

#[tokio::test]
async fn the_fake_conforms() {
    // Not captured, so that whoever runs the tests sees what they ran on.
    writeln!(std::io::stderr(), "conformance suite on: the in-memory containerd").unwrap();
    conformance::run(&Fake::default(), FAKE_SNAPSHOTTER).await;
}
