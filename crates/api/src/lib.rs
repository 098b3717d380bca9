//! What users and the API server see of tote: the custom resource, and the names of annotations, labels,
//! event reasons and conditions.
//!
//! Must not know clients: nothing here talks to an API server.

mod crd;
mod job;
pub mod names;

pub use crd::{CRD_FILES, crd, to_yaml};
pub use job::{Phase, SalvageJob, SalvageJobSpec, SalvageJobStatus, Transfer};
