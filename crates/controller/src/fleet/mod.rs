//! What the nodes hold, and the connections that tell it.
//!
//! `inventory` is the pure index; `agents` is where they are; `session` keeps one stream an agent and turns it into events;
//! `enrol` gives agents their certificates; `grants` lets one agent read from another.

mod agents;
mod enrol;
mod grants;
mod inventory;
mod session;

pub use agents::{Agents, Endpoint};
pub use enrol::Enrolment;
pub use grants::Grants;
pub use inventory::{Holder, Image, Inventory, Manifest, Node, NodeName};
pub use session::{Fleet, FleetEvent};
