//! A part of a blob on its way here: from one source, then another, going on at the byte where the one before stopped. Must
//! not know what becomes of the bytes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tote_image::{Descriptor, Digest, Reference};

use super::fetch::{self, FetchError, Kind, Span};
use super::flights::Wanting;
use super::request::Source;
use super::run::Context;

/// Bytes that are asked for at once.
pub(super) const CHUNK: u64 = 2 << 20;

/// How many pieces a chunk may come in without one being taken: more than any will, so that it waits for nobody but its source.
const PIECES: usize = 64;

/// The longest pause between two rounds over all sources.
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// What was heard of the sources of one blob.
#[derive(Debug, Default)]
pub(super) struct Tried {
    heard: BTreeMap<String, FetchError>,
    banned: Vec<Source>,
    /// Those that say that it has another length.
    disputing: Vec<Source>,
    /// Those that have failed in this round.
    out: Vec<Source>,
    round: u32,
    mismatched: bool,
}

impl Tried {
    pub(super) fn note(&mut self, source: &Source, error: FetchError) {
        tracing::debug!(node = source.node, %error, "a source did not give a blob");
        if matches!(error, FetchError::Wrong(_)) && !self.is_banned(source) {
            self.banned.push(source.clone());
            self.mismatched = true;
        }
        if matches!(error, FetchError::Disputed { .. }) && !self.is_banned(source) {
            self.disputing.push(source.clone());
        }
        self.out.push(source.clone());
        self.heard.insert(format!("{} ({})", source.node, source.address), error);
    }

    /// Those of `sources` that may still be asked in this round.
    pub(super) fn left(&self, sources: &[Source]) -> Vec<Source> {
        let left = sources.iter().filter(|source| !self.is_banned(source) && !self.out.contains(source));
        let mut left: Vec<Source> = left.cloned().collect();
        left.sort_by_key(|source| source.last_resort);
        left
    }

    /// Begins another round, of `rounds` in all; not if that could not help.
    pub(super) fn again(&mut self, sources: &[Source], rounds: u32) -> bool {
        if self.is_hopeless(sources) || self.round + 1 >= rounds {
            return false;
        }
        self.round += 1;
        self.out.clear();
        true
    }

    /// The pause before the present round: none, then doubling.
    pub(super) fn pause(&self, first: Duration) -> Duration {
        match self.round {
            0 => Duration::ZERO,
            round => first.saturating_mul(1 << (round - 1).min(16)).min(MAX_PAUSE),
        }
    }

    /// Whether asking `sources` again could help.
    fn is_hopeless(&self, sources: &[Source]) -> bool {
        sources.iter().all(|source| self.is_banned(source))
            || (!self.heard.is_empty()
                && self.heard.values().all(|error| matches!(error, FetchError::Missing)))
    }

    /// The blob was had, as the image says that it is: who said otherwise lied.
    pub(super) fn settle(&mut self) {
        self.banned.append(&mut self.disputing);
    }

    /// Nodes that gave what the blob is not.
    pub(super) fn liars(&self) -> impl Iterator<Item = &str> {
        self.banned.iter().map(|source| source.node.as_str())
    }

    fn is_banned(&self, source: &Source) -> bool {
        self.banned.contains(source) || self.disputing.contains(source)
    }

    pub(super) fn failure(&self, digest: &Digest) -> super::Failure {
        let heard = self.heard.iter().map(|(node, error)| format!("{node}: {error}"));
        let mut tried = heard.collect::<Vec<_>>().join("; ");
        if tried.is_empty() {
            "no sources were named".clone_into(&mut tried);
        }
        let digest = digest.clone();
        if self.mismatched {
            super::Failure::DigestMismatch { digest, tried }
        } else {
            super::Failure::NoSource { digest, tried }
        }
    }
}

/// A blob that is being asked for, and of whom.
#[derive(Clone)]
pub(super) struct Asked {
    context: Arc<Context>,
    reference: Reference,
    blob: Descriptor,
    wanting: Arc<Wanting>,
    tried: Arc<Mutex<Tried>>,
}

/// Bytes as they came, and who gave them.
pub(super) struct Piece {
    pub bytes: Bytes,
    pub source: Source,
}

/// A part of a blob that is on its way. Dropping it ends that.
pub(super) struct Chunk {
    pieces: mpsc::Receiver<Piece>,
    task: AbortOnDropHandle<bool>,
    /// Room for what comes before it can be written.
    _room: Option<OwnedSemaphorePermit>,
}

impl Chunk {
    /// The next piece; nothing when all have come that will.
    pub(super) async fn next(&mut self) -> Option<Piece> {
        self.pieces.recv().await
    }

    /// Whether that was all of it.
    pub(super) async fn whole(self) -> bool {
        self.task.await.unwrap_or(false)
    }
}

impl Asked {
    pub(super) fn new(
        context: Arc<Context>,
        reference: Reference,
        blob: Descriptor,
        wanting: Arc<Wanting>,
    ) -> Self {
        Self { context, reference, blob, wanting, tried: Arc::default() }
    }

    pub(super) fn tried(&self) -> MutexGuard<'_, Tried> {
        self.tried.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the blob could not be had.
    pub(super) fn failure(&self) -> super::Failure {
        self.tried().failure(&self.blob.digest)
    }

    /// A source to be asked alone that was not before: one that has not failed, if there is one.
    pub(super) fn alone(&self, before: &mut Vec<Source>) -> Option<Source> {
        let sources = self.wanting.sources();
        let tried = self.tried();
        let may = |source: &&Source| !tried.is_banned(source) && !before.contains(source);
        let chosen = sources.iter().filter(may).min_by_key(|source| tried.out.contains(source)).cloned();
        before.extend(chosen.clone());
        chosen
    }

    /// Room for one more chunk than is being written, if there is any: all transfers share what memory they take.
    pub(super) fn room(&self) -> Option<OwnedSemaphorePermit> {
        self.context.ahead.clone().try_acquire_owned().ok()
    }

    /// Asks for `length` bytes from `from` on; of `only` one source, or of all in turn.
    pub(super) fn chunk(
        &self,
        from: u64,
        length: u64,
        only: Option<Source>,
        room: Option<OwnedSemaphorePermit>,
    ) -> Chunk {
        let (sender, pieces) = mpsc::channel(PIECES);
        let asked = self.clone();
        let task = tokio::spawn(async move { asked.bring(from, length, only, sender).await });
        Chunk { pieces, task: AbortOnDropHandle::new(task), _room: room }
    }

    /// Whether all of it was brought.
    async fn bring(
        &self,
        mut from: u64,
        mut length: u64,
        only: Option<Source>,
        pieces: mpsc::Sender<Piece>,
    ) -> bool {
        while length > 0 {
            let sources = only.clone().map_or_else(|| self.wanting.sources(), |only| vec![only]);
            let left = self.tried().left(&sources);
            let Some(seat) = self.context.traffic.seat(&left).await else {
                let patience = self.context.patience;
                let pause = {
                    let mut tried = self.tried();
                    if !tried.left(&sources).is_empty() {
                        continue; // Another chunk has begun the next round.
                    }
                    if !tried.again(&sources, patience.rounds) {
                        return false;
                    }
                    tried.pause(patience.pause)
                };
                tokio::time::sleep(pause).await;
                continue;
            };
            let source = seat.source.clone();
            if self.tried().left(std::slice::from_ref(&source)).is_empty() {
                continue; // It failed while a seat was waited for.
            }
            let others: Vec<Source> = left.into_iter().filter(|other| *other != source).collect();
            let begun = Instant::now();
            let mut paid = Duration::ZERO;
            let span = Span::of(self.blob.size, from, length);
            let wanted = (Kind::Blob, &self.blob.digest);
            let (context, mut patience) = (&self.context, self.context.patience);
            // What is asked of it at once shares what it gives.
            patience.piece = patience.piece.saturating_mul(seat.shared());
            let mut given = 0;
            let failed =
                match fetch::open(&context.peers, &source, &self.reference, wanted, span, patience).await {
                    Err(error) => Some(error),
                    Ok(mut body) => loop {
                        let late = context
                            .traffic
                            .patience(&source, length, &others)
                            .map(|patience| begun + patience + paid);
                        let next = match late {
                            Some(late) => tokio::time::timeout_at(late, body.next()).await,
                            None => Ok(body.next().await),
                        };
                        match next {
                            Ok(Ok(Some(bytes))) => {
                                given += bytes.len() as u64;
                                context.metrics.received(bytes.len() as u64);
                                let capped = Instant::now();
                                context.bandwidth.take(bytes.len()).await;
                                let piece = Piece { bytes, source: source.clone() };
                                if pieces.send(piece).await.is_err() {
                                    return false;
                                }
                                paid += capped.elapsed();
                            }
                            Ok(Ok(None)) => break None,
                            Ok(Err(error)) => break Some(error),
                            Err(_) => body.end(FetchError::Broken("is much slower than others".to_owned())),
                        }
                    },
                };
            seat.gave(given, begun.elapsed().saturating_sub(paid));
            from += given;
            length -= given.min(length);
            if let Some(error) = failed
                && length > 0
            {
                self.tried().note(&source, error);
            }
        }
        true
    }
}
