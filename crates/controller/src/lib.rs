//! The controller: watches, decides, drives agents. Must not know containerd.
//!
//! watch -> facts -> decide (pure) -> perform. `run` wires it.

pub mod access;
pub mod backoff;
pub mod ca;
pub mod decide;
pub mod detect;
pub mod fleet;
pub mod http;
pub mod leader;
pub mod lookup;
pub mod metrics;
pub mod nodes;
pub mod notify;
pub mod owners;
pub mod patterns;
pub mod perform;
pub mod registry;
pub mod resolve;
pub mod run;
pub mod running;
pub mod salvage;
pub mod tenure;
pub mod text;
pub mod transfer;
pub mod watch;
pub mod world;
