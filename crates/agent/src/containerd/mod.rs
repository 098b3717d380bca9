//! The one seam to containerd: what the agent needs of it, in the agent's own terms.
//!
//! Nothing outside this module may know containerd's client or CRI. Behind the trait stand the real client
//! and, for tests, an in-memory one; `conformance` holds both to the same behaviour. Everything happens in
//! the containerd namespace `k8s.io`, the one CRI uses.

mod client;
#[cfg(feature = "testing")]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::missing_panics_doc)]
pub mod conformance;
#[cfg(feature = "testing")]
mod fake;
mod labels;
mod snapshotter;

use std::collections::BTreeMap;
use std::time::SystemTime;

use bytes::Bytes;
use futures::stream::BoxStream;
use thiserror::Error;
use tote_image::{Descriptor, Digest, Platform};

pub use client::Client;
#[cfg(feature = "testing")]
pub use fake::{Fake, SNAPSHOTTER as FAKE_SNAPSHOTTER};
pub use labels::gc_labels;

/// Labels of blobs, records or leases.
pub type Labels = BTreeMap<String, String>;

/// A blob's bytes as they are read, in pieces of at most some MiB.
pub type ByteStream = BoxStream<'static, Result<Bytes, Error>>;

/// The label by which CRI knows that an image record is its own.
pub const MANAGED_LABEL: (&str, &str) = ("io.cri-containerd.image", "managed");

/// The label of a lease that names the transfer it was made for.
pub const TRANSFER_LABEL: &str = "tote.dev/transfer";

/// The label of a layer that gives the digest of its uncompressed form.
pub const UNCOMPRESSED_LABEL: &str = "containerd.io/uncompressed";

/// The prefix of the label of a config that keeps its snapshot; the snapshotter's name follows.
pub const SNAPSHOT_LABEL: &str = "containerd.io/gc.ref.snapshot.";

/// Why containerd did not do what it was asked.
#[derive(Clone, Debug, Error)]
pub enum Error {
    /// There is no such blob, record, lease or snapshot.
    #[error("not found: {0}")]
    NotFound(String),
    /// It stands already.
    #[error("already exists: {0}")]
    AlreadyExists(String),
    /// The bytes written do not have the size or digest they were to have; a diff ID differs.
    #[error("mismatch: {0}")]
    Mismatch(String),
    /// The file system below containerd is full.
    #[error("no space left: {0}")]
    Full(String),
    /// containerd does not answer, or not in time.
    #[error("containerd does not answer: {0}")]
    Unavailable(String),
    /// Anything else, in containerd's words.
    #[error("containerd: {0}")]
    Other(String),
}

/// What is to be known of a containerd before images are imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its version, as `2.4.2`.
    pub version: String,
    /// The platform whose images it runs.
    pub platform: Platform,
    /// The snapshotter that CRI uses, or why none can be settled on, for a person.
    pub snapshotter: Result<String, String>,
}

/// A committed blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    /// Its length in bytes.
    pub size: u64,
    /// Its labels.
    pub labels: Labels,
}

/// A file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Its size in bytes.
    pub size: u64,
    /// Bytes that are free, for root.
    pub free: u64,
}

/// An image record: a name and what it stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageRecord {
    /// `repository:tag`, `repository@digest`, or a config's digest.
    pub name: String,
    /// The index or manifest.
    pub target: Descriptor,
}

/// A lease of an import: what it holds is not collected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Its name, one for every run of a transfer.
    pub id: String,
    /// The transfer it was made for.
    pub transfer: String,
}

/// What a lease can be told to hold.
#[derive(Clone, Copy, Debug)]
pub enum Held<'a> {
    /// A blob, and what its labels refer to.
    Blob(&'a Digest),
    /// What has been written of a blob.
    Ingest(&'a Digest),
    /// A committed snapshot and its parents.
    Snapshot {
        /// The snapshotter it is in.
        snapshotter: &'a str,
        /// The chain ID that names it.
        chain: &'a Digest,
    },
}

/// One layer to unpack.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// The layer's blob.
    pub blob: &'a Descriptor,
    /// What it must be when uncompressed.
    pub diff_id: &'a Digest,
    /// The chain ID of the layers below, if any.
    pub parent: Option<&'a Digest>,
    /// The chain ID with this layer: the name of the snapshot.
    pub chain: &'a Digest,
}

/// What came of opening a blob for writing.
pub enum Ingest {
    /// The blob was committed before.
    Present,
    /// The bytes from `offset()` on are wanted.
    Open(Box<dyn BlobWriter>),
}

/// What has changed on the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// An image record was made, changed or removed.
    Images,
    /// A blob was removed.
    Content,
}

/// A blob as it is written. Dropping it keeps what was written, to be resumed.
#[tonic::async_trait]
pub trait BlobWriter: Send {
    /// How many bytes are there.
    fn offset(&self) -> u64;

    /// Appends bytes, 4 MiB at most. An error may concern bytes of an earlier call.
    async fn write(&mut self, bytes: Bytes) -> Result<(), Error>;

    /// Verifies size and digest and makes the blob visible with these labels. [`Error::Mismatch`] if they are
    /// not what the descriptor said; what was written must be aborted then.
    async fn commit(self: Box<Self>, labels: Labels) -> Result<(), Error>;
}

/// What the agent needs of containerd.
#[tonic::async_trait]
pub trait Containerd: Send + Sync + 'static {
    /// Version, platform and CRI's snapshotter.
    async fn facts(&self) -> Result<Facts, Error>;

    /// A committed blob, if it is there.
    async fn blob(&self, digest: &Digest) -> Result<Option<Blob>, Error>;

    /// Digest and size of all committed blobs.
    async fn blobs(&self) -> Result<Vec<(Digest, u64)>, Error>;

    /// `length` bytes of a blob from `offset` on. [`Error::NotFound`] if it is not there; but whether it is there for this
    /// containerd namespace [`Containerd::blob`] alone tells, which is to be asked first.
    async fn read(&self, digest: &Digest, offset: u64, length: u64) -> Result<ByteStream, Error>;

    /// Opens a blob for writing, at the end of what an earlier writer left. The lease holds the bytes from
    /// here on. At most one writer of a blob at a time.
    async fn ingest(&self, lease: &str, blob: &Descriptor) -> Result<Ingest, Error>;

    /// The blobs that were opened by [`Containerd::ingest`] and neither committed nor aborted.
    async fn ingests(&self) -> Result<Vec<Digest>, Error>;

    /// Forgets what was written of a blob. No error if there is nothing.
    async fn abort(&self, digest: &Digest) -> Result<(), Error>;

    /// Adds labels to a committed blob, or replaces their values.
    async fn label(&self, digest: &Digest, labels: &Labels) -> Result<(), Error>;

    /// The file system that blobs are kept in; `None` if that is not to be seen from here.
    async fn space(&self) -> Result<Option<Space>, Error>;

    /// Makes a lease, which ends by itself at `expires`.
    async fn create_lease(&self, lease: &Lease, expires: SystemTime) -> Result<(), Error>;

    /// All leases that were made by [`Containerd::create_lease`].
    async fn leases(&self) -> Result<Vec<Lease>, Error>;

    /// Makes a lease hold a blob or snapshot.
    async fn hold(&self, lease: &str, held: Held<'_>) -> Result<(), Error>;

    /// Ends a lease and collects, before it returns, what nothing else holds. No error if it is not there.
    async fn delete_lease(&self, id: &str) -> Result<(), Error>;

    /// All image records; those with a malformed target are left out.
    async fn images(&self) -> Result<Vec<ImageRecord>, Error>;

    /// The record of a name.
    async fn image(&self, name: &str) -> Result<Option<ImageRecord>, Error>;

    /// Makes a record that CRI takes for its own. [`Error::AlreadyExists`] if one of that name stands.
    async fn create_image(&self, image: &ImageRecord) -> Result<(), Error>;

    /// Gives the record of a name another target.
    async fn retarget_image(&self, image: &ImageRecord) -> Result<(), Error>;

    /// Removes a record, if it has this target. No error if it is not there; containerd before 2.0 does not look at the
    /// target. What nothing else names is collected some time later.
    async fn delete_image(&self, image: &ImageRecord) -> Result<(), Error>;

    /// Whether a committed snapshot of this chain ID stands.
    async fn has_snapshot(&self, snapshotter: &str, chain: &Digest) -> Result<bool, Error>;

    /// Unpacks a layer whose blob is there onto the snapshot of its parent, compares the diff ID and commits,
    /// all held by the lease. [`Error::Mismatch`] if the diff ID differs, and nothing is left. A snapshot
    /// that stands already, or that another made meanwhile, is success. [`Error::Full`], and nothing is left, as soon as it
    /// is seen that less than `keep` bytes of [`Containerd::space`] are free.
    async fn unpack(&self, lease: &str, snapshotter: &str, layer: Layer<'_>, keep: u64) -> Result<(), Error>;

    /// What CRI's `ImageStatus` gives as the ID of the image of this name: its config's digest.
    async fn image_status(&self, name: &str) -> Result<Option<String>, Error>;

    /// Changes from now on, or from a moment later: containerd does not tell when a subscription stands. The
    /// stream ends when containerd does.
    async fn changes(&self) -> Result<BoxStream<'static, Change>, Error>;
}
