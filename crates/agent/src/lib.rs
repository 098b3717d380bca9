//! The agent of a node: reports what images the node's containerd holds, imports images from other nodes,
//! and serves its own blobs to them.
//!
//! Must not know Kubernetes: everything here is about one containerd and some peers.

pub mod agent;
pub mod containerd;
pub mod health;
pub mod identity;
pub mod import;
pub mod inventory;
pub mod metrics;
pub mod remove;
pub mod serve;
pub mod service;
#[cfg(feature = "testing")]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::missing_panics_doc)]
pub mod testing;
