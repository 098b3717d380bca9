//! What the controller does to the world, as values.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tote_api::SalvageJobStatus;
use tote_image::Digest;
use tote_rpc::v1;

use super::Question;
use crate::fleet::NodeName;
use crate::notify::Notification;
use crate::salvage::Source;

/// An effect.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Create a `SalvageJob`.
    CreateJob(NewJob),
    /// Delete a job, if it is still the one of this UID.
    DeleteJob {
        /// Namespace.
        namespace: Arc<str>,
        /// Name.
        name: Arc<str>,
        /// UID.
        uid: Arc<str>,
    },
    /// Write a job's status.
    WriteStatus {
        /// Namespace.
        namespace: Arc<str>,
        /// Name.
        name: Arc<str>,
        /// UID.
        uid: Arc<str>,
        /// What the API server has.
        before: Box<SalvageJobStatus>,
        /// What it should have.
        status: Box<SalvageJobStatus>,
    },
    /// Start a transfer or attach to it, in the place of the job's former stream if there is one.
    Import {
        /// The job's UID.
        uid: Arc<str>,
        /// Comes back with every event of this stream.
        stream: u64,
        /// The target.
        node: NodeName,
        /// Name of the transfer.
        transfer_id: String,
        /// The record to make.
        reference: String,
        /// Its target.
        digest: Digest,
        /// Where blobs are to be had.
        sources: Vec<Source>,
        /// Who alone may have it, for the target's kubelet; `None` if nothing restricts it.
        pulled: Option<v1::PulledRepository>,
        /// The most bytes that it may have; 0 for any.
        max_bytes: i64,
    },
    /// Let go of a job's stream without ending the transfer.
    Detach {
        /// The job's UID.
        uid: Arc<str>,
    },
    /// Let go of a job's stream and end the transfer.
    Cancel {
        /// The job's UID.
        uid: Arc<str>,
        /// The target.
        node: NodeName,
        /// Name of the transfer.
        transfer_id: String,
    },
    /// Remove the records of an image that lacks blobs on a node.
    RemoveImage {
        /// The node.
        node: NodeName,
        /// The records' target.
        digest: Digest,
    },
    /// Ask a registry what a reference means.
    LookUp(Question),
    /// Annotate a pod so that kubelet looks at it.
    WakePod {
        /// Namespace.
        namespace: Arc<str>,
        /// Name.
        name: Arc<str>,
        /// UID: another pod of that name is not meant.
        uid: Arc<str>,
        /// To be set.
        annotations: BTreeMap<String, String>,
    },
    /// Write an event.
    Tell {
        /// About what.
        about: About,
        /// Whether it is a warning.
        warning: bool,
        /// CamelCase.
        reason: String,
        /// What was tried; tells events of one reason apart.
        action: &'static str,
        /// At most 1024 bytes.
        note: String,
    },
    /// Tell the webhook, if there is one.
    Notify(Box<Notification>),
    /// Count.
    Count(Count),
}

/// A job to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewJob {
    /// Its name without the counter.
    pub base: String,
    /// The counter.
    pub number: u32,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: String,
    /// The image as the pod writes it.
    pub image: Arc<str>,
    /// What it was resolved to.
    pub digest: Digest,
    /// The node that waits for it.
    pub node: NodeName,
}

/// The object that an event is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// `Pod`, `SalvageJob` or `Node`.
    pub kind: &'static str,
    /// Namespace; empty for a node.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// UID.
    pub uid: Arc<str>,
    /// `spec.containers{web}`, or empty.
    pub field_path: String,
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    /// A pod that waits for an image, once for each image.
    Detected,
    /// An image that a job was made for.
    Salvageable,
    /// An image that cannot be had.
    NotActionable,
    /// An image that stands on a pod's node with blobs missing.
    Corrupt,
    /// A transfer was begun.
    Attempt,
    /// A job is Imported; seconds since it began, bytes moved.
    Success(Duration, u64),
    /// A job is Failed.
    Failure,
    /// A pod was woken.
    Wake,
}
