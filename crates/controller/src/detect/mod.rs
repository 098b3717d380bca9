//! What pods wait for and run, and who may be helped. Pure.
//!
//! Must not know the fleet: whether anybody holds the image is `resolve`'s question.

pub mod class;
mod consent;
mod pod;
mod policy;

pub use consent::{Consent, consent, says};
pub use pod::{ContainerView, PodView, VolumeView, Wait, WaitingPod, runs, waiting};
pub use policy::{Classes, ClassesError};
