//! How far a transfer is: what those who are attached see.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;
use tote_image::Digest;
use tote_rpc::v1::{self, Stage};

use super::failure::Failure;

/// What has been moved so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Where the transfer stands.
    pub stage: Stage,
    /// Bytes of the image for this platform; 0 until known.
    pub total: u64,
    /// Bytes that came from other nodes.
    pub transferred: u64,
    /// Bytes that were here before.
    pub reused: u64,
    /// Nodes that bytes came from.
    pub sources: BTreeSet<String>,
    /// Nodes that gave bytes that are not what was asked for.
    pub liars: BTreeSet<String>,
}

/// An image that was imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// CRI's ID of it.
    pub image_id: Digest,
    /// The records that stand.
    pub names: Vec<String>,
}

/// Progress, and the end when it has come.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// How far it is.
    pub progress: Progress,
    /// How it ended.
    pub outcome: Option<Result<Imported, Failure>>,
}

/// Where a transfer writes its progress. It survives the transfer's retries.
#[derive(Debug)]
pub struct Tracker {
    state: watch::Sender<State>,
    /// Bytes of each blob that this transfer moved and that were kept; whether the blob is done with.
    blobs: Mutex<HashMap<Digest, (u64, bool)>>,
}

impl Default for Tracker {
    fn default() -> Self {
        Self { state: watch::Sender::new(State::default()), blobs: Mutex::default() }
    }
}

impl Tracker {
    /// Follows the transfer.
    pub fn subscribe(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// Where it stands now.
    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    pub(super) fn stage(&self, stage: Stage) {
        self.state.send_modify(|state| state.progress.stage = stage);
    }

    pub(super) fn total(&self, total: u64) {
        self.state.send_modify(|state| state.progress.total = total);
    }

    /// `bytes` of a blob came from a node.
    pub(super) fn moved(&self, digest: &Digest, bytes: u64, node: &str) {
        self.lock().entry(digest.clone()).or_default().0 += bytes;
        self.state.send_modify(|state| {
            state.progress.transferred += bytes;
            if !state.progress.sources.contains(node) {
                state.progress.sources.insert(node.to_owned());
            }
        });
    }

    /// A node gave a blob otherwise than it is.
    pub(super) fn lied(&self, node: &str) {
        self.state.send_modify(|state| {
            state.progress.liars.insert(node.to_owned());
        });
    }

    /// What had come of a blob was thrown away.
    pub(super) fn lost(&self, digest: &Digest) {
        self.lock().entry(digest.clone()).or_default().0 = 0;
    }

    /// A blob of `size` bytes is there; what this transfer did not move of it was there before.
    pub(super) fn complete(&self, digest: &Digest, size: u64) {
        let reused = {
            let mut blobs = self.lock();
            let (moved, done) = blobs.entry(digest.clone()).or_default();
            if std::mem::replace(done, true) { 0 } else { size.saturating_sub(*moved) }
        };
        self.state.send_modify(|state| state.progress.reused += reused);
    }

    pub(super) fn end(&self, outcome: Result<Imported, Failure>) {
        self.state.send_modify(|state| state.outcome = Some(outcome));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Digest, (u64, bool)>> {
        self.blobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wire(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

impl From<&State> for v1::ImportEvent {
    fn from(State { progress, outcome }: &State) -> Self {
        use v1::import_event::Event;
        let source_nodes = progress.sources.iter().cloned().collect();
        let lying_nodes = progress.liars.iter().cloned().collect();
        let event = match outcome {
            None => Event::Progress(v1::Progress {
                stage: progress.stage.into(),
                total_bytes: wire(progress.total),
                transferred_bytes: wire(progress.transferred),
                reused_bytes: wire(progress.reused),
                source_nodes,
            }),
            Some(Ok(imported)) => Event::Done(v1::Done {
                total_bytes: wire(progress.total),
                transferred_bytes: wire(progress.transferred),
                reused_bytes: wire(progress.reused),
                source_nodes,
                image_id: imported.image_id.to_string(),
                names: imported.names.clone(),
                lying_nodes,
            }),
            Some(Err(failure)) => Event::Failed(v1::Failed { lying_nodes, ..failure.into() }),
        };
        Self { event: Some(event) }
    }
}
