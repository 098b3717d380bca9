//! Webhook notifications: a receiver outside the cluster is told what happened, one JSON document for each thing.
//!
//! What is told is decided in `decide`; here are its shape, where it goes (`receiver`) and in what order (`delivery`).
//! Must not know pods or jobs.

mod delivery;
mod receiver;

use jiff::Timestamp;
use serde::Serialize;

pub use delivery::{Delivery, Notifier, Pace};
pub use receiver::{Header, Receiver, ReceiverError};

use crate::text;

/// The most bytes of one text of a notification.
const MAX_TEXT: usize = 1024;

/// What happened. The names are API: receivers and the filter are written against them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NotificationType {
    /// A pod waits for an image.
    Detected,
    /// The image is on the node that waited for it.
    Salvaged,
    /// A salvage ended without the image.
    SalvageFailed,
    /// A salvaged image is in the backup registry. Nothing sends it yet.
    Pushed,
    /// A salvaged image could not be pushed to the backup registry. Nothing sends it yet.
    PushFailed,
}

impl NotificationType {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Detected, Self::Salvaged, Self::SalvageFailed, Self::Pushed, Self::PushFailed];

    /// As it is written: `salvage_failed`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Detected => "detected",
            Self::Salvaged => "salvaged",
            Self::SalvageFailed => "salvage_failed",
            Self::Pushed => "pushed",
            Self::PushFailed => "push_failed",
        }
    }
}

impl std::str::FromStr for NotificationType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|type_| type_.name() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::name);
            format!("must be one of {}", names.join(", "))
        })
    }
}

/// One document. A field that says nothing is empty, never absent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Notification {
    /// What happened.
    #[serde(rename = "type")]
    pub type_: NotificationType,
    /// The pod it happened to; empty for a job that no pod waits for.
    pub pod_name: String,
    /// Of the pod, or of the job.
    pub namespace: String,
    /// The image as the pod or the job writes it.
    pub image_ref: String,
    /// What it is resolved to.
    pub digest: String,
    /// The node that the blobs come from; several are separated by commas.
    pub source_node: String,
    /// The node that waits for the image.
    pub target_node: String,
    /// What went wrong.
    pub error: String,
    /// When, RFC 3339.
    pub timestamp: Timestamp,
}

impl Notification {
    /// The document, with every text cut at 1 KiB: pods may name images of any length.
    fn json(&self) -> serde_json::Result<Vec<u8>> {
        let cut = |field: &str| text::bounded(field, MAX_TEXT);
        serde_json::to_vec(&Self {
            type_: self.type_,
            pod_name: cut(&self.pod_name),
            namespace: cut(&self.namespace),
            image_ref: cut(&self.image_ref),
            digest: cut(&self.digest),
            source_node: cut(&self.source_node),
            target_node: cut(&self.target_node),
            error: cut(&self.error),
            timestamp: self.timestamp,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_written_as_they_are_read() {
        for type_ in NotificationType::ALL {
            assert_eq!(type_.name().parse(), Ok(type_));
            assert_eq!(serde_json::to_value(type_).unwrap(), type_.name());
        }
        let error = "salvage-failed".parse::<NotificationType>().unwrap_err();
        assert!(error.contains("salvage_failed, pushed"), "{error}");
    }

    #[test]
    fn a_document_has_a_bound() {
        let long = || "x".repeat(1 << 20);
        let notification = Notification {
            type_: NotificationType::Detected,
            pod_name: long(),
            namespace: long(),
            image_ref: long(),
            digest: long(),
            source_node: long(),
            target_node: long(),
            error: long(),
            timestamp: Timestamp::UNIX_EPOCH,
        };
        let length = notification.json().unwrap().len();
        assert!(length < 8 * MAX_TEXT, "{length}");
    }
}
