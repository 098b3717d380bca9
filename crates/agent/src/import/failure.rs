//! Why an import failed, in words for a person, and how that is said to the controller.

use thiserror::Error;
use tote_image::{Digest, DocumentError, Platform};
use tote_rpc::v1;

use crate::containerd;

/// Why an import ended without its image.
#[derive(Clone, Debug, Error)]
pub enum Failure {
    /// No source gave a blob.
    #[error("no source gave blob {digest}: {tried}")]
    NoSource {
        /// The blob.
        digest: Digest,
        /// Each source with what it answered.
        tried: String,
    },
    /// Sources gave bytes that are not the blob, and none gave the blob.
    #[error("blob {digest} does not have its digest: {tried}")]
    DigestMismatch {
        /// The blob.
        digest: Digest,
        /// Each source with what it answered.
        tried: String,
    },
    /// A blob of the node's own store is damaged.
    #[error(
        "blob {0} in this node's content store is damaged; remove the images that use it with `crictl rmi` \
         or `ctr -n k8s.io content rm {0}`"
    )]
    Damaged(Digest),
    /// The image is for other platforms.
    #[error("{0}")]
    Platform(String),
    /// The index has a manifest for this platform, but no source holds it.
    #[error("no source holds a manifest for {platform}: {tried}")]
    PlatformNotHeld {
        /// The node's platform.
        platform: Platform,
        /// Each source with what it answered.
        tried: String,
    },
    /// A record of a name to be made stands for something else.
    #[error(
        "{name} stands for {stands} on this node, not {wanted}; a name is never moved: remove it there first \
         (`crictl rmi {name}`) if it is stale"
    )]
    NameConflict {
        /// The record's name.
        name: String,
        /// What it stands for.
        stands: Digest,
        /// What it was to stand for.
        wanted: Digest,
    },
    /// It is larger than the request allows.
    #[error("the image has {size} bytes, compressed, and {most} are the most that may be salvaged")]
    TooLarge {
        /// What this platform needs.
        size: u64,
        /// The bound.
        most: u64,
    },
    /// containerd's file system is full.
    #[error("the file system of containerd is full: {0}")]
    DiskFull(String),
    /// A layer does not unpack to what the image's config says.
    #[error("{0}")]
    DiffId(String),
    /// A layer could not be unpacked.
    #[error("layer {layer} could not be unpacked: {reason}")]
    Unpack {
        /// The layer's digest.
        layer: Digest,
        /// In containerd's words.
        reason: String,
    },
    /// The records stand but CRI does not see them.
    #[error("the records of {name} stand, but CRI does not show the image: {seen}")]
    NotVisible {
        /// The name asked for.
        name: String,
        /// What CRI answered last.
        seen: String,
    },
    /// containerd does not answer.
    #[error("{0}")]
    Away(String),
    /// containerd failed.
    #[error("{0}")]
    Runtime(String),
    /// CRI's snapshotter cannot be unpacked into.
    #[error("{0}")]
    Snapshotter(String),
    /// The image is of a kind that cannot be handled.
    #[error("{0}")]
    Unsupported(String),
    /// Who may have the image could not be written down.
    #[error("who may have the image cannot be written down for kubelet: {0}")]
    PullRecord(String),
    /// The transfer was ended from outside.
    #[error("the transfer was {0}")]
    Cancelled(&'static str),
}

impl Failure {
    /// Whether the same request may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::NoSource { .. }
            | Self::DigestMismatch { .. }
            | Self::PlatformNotHeld { .. }
            | Self::DiskFull(_)
            | Self::Unpack { .. }
            | Self::NotVisible { .. }
            | Self::Away(_)
            | Self::Runtime(_)
            | Self::PullRecord(_)
            | Self::Cancelled(_) => true,
            Self::Damaged(_)
            | Self::Platform(_)
            | Self::NameConflict { .. }
            | Self::DiffId(_)
            | Self::Snapshotter(_)
            | Self::TooLarge { .. }
            | Self::Unsupported(_) => false,
        }
    }

    /// The cause as metrics name it.
    pub fn label(&self) -> &'static str {
        match self.cause() {
            v1::Cause::NoSource => "no_source",
            v1::Cause::DigestMismatch => "digest_mismatch",
            v1::Cause::Platform => "platform",
            v1::Cause::NameConflict => "name_conflict",
            v1::Cause::DiskFull => "disk_full",
            v1::Cause::Unpack => "unpack",
            v1::Cause::NotVisible => "not_visible",
            v1::Cause::Unspecified | v1::Cause::Runtime => "runtime",
            v1::Cause::Snapshotter => "snapshotter",
            v1::Cause::Unsupported => "unsupported",
            v1::Cause::Cancelled => "cancelled",
            v1::Cause::PullRecord => "pull_record",
            v1::Cause::TooLarge => "too_large",
        }
    }

    /// The cause as the wire names it.
    pub fn cause(&self) -> v1::Cause {
        match self {
            Self::NoSource { .. } => v1::Cause::NoSource,
            Self::DigestMismatch { .. } | Self::Damaged(_) => v1::Cause::DigestMismatch,
            Self::Platform(_) | Self::PlatformNotHeld { .. } => v1::Cause::Platform,
            Self::NameConflict { .. } => v1::Cause::NameConflict,
            Self::DiskFull(_) => v1::Cause::DiskFull,
            Self::DiffId(_) | Self::Unpack { .. } => v1::Cause::Unpack,
            Self::NotVisible { .. } => v1::Cause::NotVisible,
            Self::Away(_) | Self::Runtime(_) => v1::Cause::Runtime,
            Self::Snapshotter(_) => v1::Cause::Snapshotter,
            Self::Unsupported(_) => v1::Cause::Unsupported,
            Self::Cancelled(_) => v1::Cause::Cancelled,
            Self::PullRecord(_) => v1::Cause::PullRecord,
            Self::TooLarge { .. } => v1::Cause::TooLarge,
        }
    }
}

impl From<&Failure> for v1::Failed {
    fn from(failure: &Failure) -> Self {
        Self {
            cause: failure.cause().into(),
            message: failure.to_string(),
            retryable: failure.is_retryable(),
            lying_nodes: Vec::new(),
        }
    }
}

impl From<containerd::Error> for Failure {
    fn from(error: containerd::Error) -> Self {
        match error {
            containerd::Error::Full(message) => Self::DiskFull(message),
            error @ containerd::Error::Unavailable(_) => Self::Away(error.to_string()),
            other => Self::Runtime(other.to_string()),
        }
    }
}

impl From<DocumentError> for Failure {
    fn from(error: DocumentError) -> Self {
        match error {
            DocumentError::NoPlatform { .. } => Self::Platform(error.to_string()),
            other => Self::Unsupported(format!("the image cannot be handled: {other}")),
        }
    }
}
