//! What the nodes hold, and the connections that tell it.
//!
//! `inventory` is the pure index; `session` keeps one stream an agent and turns it into events.

mod inventory;
mod session;

pub use inventory::{Holder, Image, Inventory, Manifest, Node, NodeName};
pub use session::{Agents, Endpoint, Fleet, FleetEvent};
