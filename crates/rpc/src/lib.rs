//! What goes over the wire between controller and agents: the code generated from `proto/`, who is who, and the one
//! place where clients and servers are constructed, with their limits. All of it is mutual TLS 1.3.
//!
//! Must not know kube or containerd.

/// Generated from `proto/tote/v1/agent.proto`.
#[allow(missing_docs, clippy::pedantic, clippy::all, unused_qualifications)]
pub mod v1 {
    tonic::include_proto!("tote.v1");
}

/// Generated from `proto/previous/tote/v1/agent.proto`: what the version before speaks, for tests that it and this one
/// understand each other.
#[cfg(feature = "testing")]
#[allow(missing_docs, clippy::pedantic, clippy::all, unused_qualifications)]
pub mod previous {
    include!(concat!(env!("OUT_DIR"), "/previous/tote.v1.rs"));
}

mod blobs;
mod client;
pub mod identity;
mod server;
#[cfg(feature = "testing")]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::missing_panics_doc)]
pub mod testing;
mod wire;

pub use blobs::{BlobClient, blob_client};
pub use client::{AgentClient, ConnectError, Connection, connect};
pub use rustls::Error as TlsError;
pub use server::{OnRefusal, Refusal, serve, serve_plain};
pub use wire::{SmallCodec, Wire};
