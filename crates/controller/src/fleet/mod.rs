//! What the nodes hold, and the connections that tell it.
//!
//! `image` is one image on one node, `inventory` the pure index of them all; `agents` is where they are; `session` keeps
//! one stream an agent and turns it into events; `enrol` gives agents their certificates; `grants` lets one agent read from another.

mod agents;
mod enrol;
mod grants;
mod image;
mod inventory;
mod session;

pub use agents::{Agents, Endpoint};
pub use enrol::Enrolment;
pub use grants::Grants;
pub use image::{Holder, Image, Manifest};
pub use inventory::{Inventory, Node, NodeName};
pub use session::{Fleet, FleetEvent};
