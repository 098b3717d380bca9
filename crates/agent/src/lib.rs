//! The agent of a node: reports what images the node's containerd holds, imports images from other nodes,
//! and serves its own blobs to them.
//!
//! Must not know the Kubernetes API: everything here is about one containerd, some peers, and what the node's kubelet
//! has written down.

pub mod agent;
pub mod bandwidth;
pub mod containerd;
pub mod health;
pub mod identity;
pub mod import;
pub mod inventory;
pub mod kubelet;
pub mod metrics;
pub mod remove;
pub mod serve;
pub mod service;
#[cfg(feature = "testing")]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::missing_panics_doc)]
pub mod testing;
