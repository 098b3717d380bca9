//! The in-memory containerd behaves as the conformance suite asks, which the real ones are held to too.

use tote_agent::containerd::{FAKE_SNAPSHOTTER, Fake, conformance};

#[tokio::test]
async fn the_fake_conforms() {
    println!("conformance suite on: the in-memory containerd");
    conformance::run(&Fake::default(), FAKE_SNAPSHOTTER).await;
}
