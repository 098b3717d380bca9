//! What goes over the wire between controller and agents: the code generated from `proto/`, and the one
//! place where clients and servers are constructed, with their limits.
//!
//! Must not know kube or containerd.

/// Generated from `proto/tote/v1/agent.proto`.
#[allow(missing_docs, clippy::pedantic, clippy::all, unused_qualifications)]
pub mod v1 {
    tonic::include_proto!("tote.v1");
}

mod client;
mod server;

pub use client::{AgentClient, BlobClient, ConnectError, blob_client, connect};
pub use server::serve;
