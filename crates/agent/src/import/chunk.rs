//! A part of a blob on its way here: from one source, then another, going on at the byte where the one before stopped. Must
//! not know what becomes of the bytes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tote_image::{Descriptor, Digest, Reference};

use super::fetch::{self, FetchError, Kind, Patience, Span};
use super::flights::Wanting;
use super::progress::State;
use super::request::Source;
use super::run::Context;
use super::traffic::{SAMPLE, Seat};

/// Bytes that are asked for at once.
pub(super) const CHUNK: u64 = 2 << 20;

/// How many pieces a chunk may come in without one being taken: more than any will, so that it waits for nobody but its source.
const PIECES: usize = 64;

/// The longest pause between two rounds over all sources.
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// How often it is looked whether others are faster by now.
const LOOK: Duration = Duration::from_millis(500);

/// What was heard of the sources of one blob.
#[derive(Debug, Default)]
pub(super) struct Tried {
    heard: BTreeMap<String, FetchError>,
    banned: Vec<Source>,
    /// Those that say that it has another length.
    disputing: Vec<Source>,
    /// Those that have failed in this round.
    out: Vec<Source>,
    /// The number of this round.
    round: u64,
    /// When this round begins, if not at once.
    begins: Option<Instant>,
    /// How many rounds were begun since a whole chunk has come.
    vain: u32,
    /// What has come since then.
    came: u64,
    mismatched: bool,
}

impl Tried {
    /// A request that began in `round` failed. If that is over it has been counted: what breaks one connection to a source breaks
    /// the others as well.
    pub(super) fn failed(&mut self, source: &Source, error: FetchError, round: u64) {
        if round == self.round {
            self.out.push(source.clone());
        }
        self.note(source, error);
    }

    pub(super) fn note(&mut self, source: &Source, error: FetchError) {
        tracing::debug!(node = source.node, %error, "a source did not give a blob");
        if matches!(error, FetchError::Wrong(_)) && !self.is_banned(source) {
            self.banned.push(source.clone());
            self.mismatched = true;
        }
        if matches!(error, FetchError::Disputed { .. }) && !self.is_banned(source) {
            self.disputing.push(source.clone());
        }
        self.heard.insert(format!("{} ({})", source.node, source.address), error);
    }

    /// Those of `sources` that may still be asked in this round.
    pub(super) fn left(&self, sources: &[Source]) -> Vec<Source> {
        let left = sources.iter().filter(|source| !self.is_banned(source) && !self.out.contains(source));
        let mut left: Vec<Source> = left.cloned().collect();
        left.sort_by_key(|source| source.last_resort);
        left
    }

    /// The present round, if it has begun and `source` may be asked in it.
    pub(super) fn round_of(&self, source: &Source) -> Option<u64> {
        let begun = self.begins.is_none_or(|begins| begins <= Instant::now());
        let may = !self.is_banned(source) && !self.out.contains(source);
        (begun && may).then_some(self.round)
    }

    /// When the present round begins, if not at once.
    pub(super) fn begins(&self) -> Option<Instant> {
        self.begins
    }

    /// Begins another round, after a pause that doubles; not if that could not help, nor if there have been enough of them in
    /// which little came.
    pub(super) fn again(&mut self, sources: &[Source], patience: &Patience) -> bool {
        if self.is_hopeless(sources) || self.vain + 1 >= patience.rounds {
            return false;
        }
        let pause = patience.pause.saturating_mul(1 << self.vain.min(16)).min(MAX_PAUSE);
        self.vain += 1;
        self.round += 1;
        self.begins = Some(Instant::now() + pause);
        self.out.clear();
        true
    }

    /// So many bytes came. Not every one is a reason to go on: else who gives one a round would be asked for ever.
    pub(super) fn came(&mut self, bytes: u64) {
        self.came += bytes;
        if self.came >= CHUNK {
            (self.came, self.vain) = (0, 0);
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
    /// Of the transfer: who has lied in it.
    states: watch::Receiver<State>,
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
        states: watch::Receiver<State>,
    ) -> Self {
        Self { context, reference, blob, wanting, states, tried: Arc::default() }
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

    /// Those of `sources` that may be asked in this round: who has lied in this transfer only if there is nobody else.
    fn left(&self, sources: &[Source]) -> Vec<Source> {
        let left = self.tried().left(sources);
        let liars = &self.states.borrow().progress.liars;
        let honest: Vec<Source> =
            left.iter().filter(|source| !liars.contains(&source.node)).cloned().collect();
        if honest.is_empty() { left } else { honest }
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
            let begins = self.tried().begins();
            if let Some(begins) = begins {
                tokio::time::sleep_until(begins).await;
            }
            let sources = only.clone().map_or_else(|| self.wanting.sources(), |only| vec![only]);
            let left = self.left(&sources);
            let Some(seat) = self.context.traffic.seat(&left).await else {
                let mut tried = self.tried();
                // Unless another chunk has begun the next round.
                if tried.left(&sources).is_empty() && !tried.again(&sources, &self.context.patience) {
                    return false;
                }
                continue;
            };
            let source = seat.source.clone();
            let Some(round) = self.tried().round_of(&source) else {
                continue; // It failed while a seat was waited for.
            };
            let asked = self.ask(&seat, (from, length), only.is_some(), &pieces).await;
            let Some((given, failed)) = asked else {
                return false;
            };
            from += given;
            length -= given.min(length);
            if let Some(error) = failed
                && length > 0
            {
                if matches!(error, FetchError::Broken(_)) && given < SAMPLE {
                    seat.failed();
                }
                self.tried().failed(&source, error, round);
            }
        }
        true
    }

    /// Asks one source for `length` bytes from `from` on, and hands on what comes; unless `alone` until another, whom somebody may
    /// have named meanwhile, would have been much faster. Tells how much came and what ended it; nothing if nobody takes it.
    async fn ask(
        &self,
        seat: &Seat,
        (from, length): (u64, u64),
        alone: bool,
        pieces: &mpsc::Sender<Piece>,
    ) -> Option<(u64, Option<FetchError>)> {
        let (context, source) = (&self.context, &seat.source);
        let mut patience = context.patience;
        // What is asked of it at once shares what it gives.
        patience.piece = patience.piece.saturating_mul(seat.shared());
        let begun = Instant::now();
        let (mut given, mut paid) = (0, Duration::ZERO);
        let late = |paid| {
            let mut others = if alone { Vec::new() } else { self.left(&self.wanting.sources()) };
            others.retain(|other| other != source);
            let patience = context.traffic.patience(source, length, &others)?;
            begun.checked_add(patience.saturating_add(paid))
        };
        let slower = || FetchError::Broken("is much slower than others".to_owned());
        let (wanted, span) = ((Kind::Blob, &self.blob.digest), Span::of(self.blob.size, from, length));
        let opening = fetch::open(&context.peers, source, &self.reference, wanted, span, patience);
        let failed = match until(|| late(paid), opening).await {
            None => Some(slower()),
            Some(Err(error)) => Some(error),
            Some(Ok(mut body)) => loop {
                match until(|| late(paid), body.next()).await {
                    Some(Ok(Some(bytes))) => {
                        given += bytes.len() as u64;
                        context.metrics.received(bytes.len() as u64);
                        self.tried().came(bytes.len() as u64);
                        let capped = Instant::now();
                        context.bandwidth.take(bytes.len()).await;
                        pieces.send(Piece { bytes, source: source.clone() }).await.ok()?;
                        paid += capped.elapsed();
                    }
                    Some(Ok(None)) => break None,
                    Some(Err(error)) => break Some(error),
                    None => body.end(slower()),
                }
            },
        };
        seat.gave(given, begun.elapsed().saturating_sub(paid));
        Some((given, failed))
    }
}

/// What comes of it until it is late. When that is may show only meanwhile, so it is asked again and again.
async fn until<T>(late: impl Fn() -> Option<Instant>, future: impl Future<Output = T>) -> Option<T> {
    let mut future = std::pin::pin!(future);
    loop {
        let look = Instant::now() + LOOK;
        let next = late().map_or(look, |late| late.min(look));
        if let Ok(came) = tokio::time::timeout_at(next, &mut future).await {
            return Some(came);
        }
        if late().is_some_and(|late| late <= Instant::now()) {
            return None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Patience = Patience {
        head: Duration::from_secs(10),
        piece: Duration::from_secs(30),
        pause: Duration::from_secs(1),
        rounds: 3,
        growth: Duration::from_secs(20),
    };

    fn source() -> Source {
        let address = ([127, 0, 0, 1], 1).into();
        Source { node: "a".to_owned(), address, last_resort: false, relay: false }
    }

    fn broken() -> FetchError {
        FetchError::Broken("cut".to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn what_breaks_several_requests_at_once_costs_one_round() {
        let (mut tried, sources) = (Tried::default(), [source()]);
        let rounds: Vec<u64> = (0..3).filter_map(|_| tried.round_of(&sources[0])).collect();
        assert_eq!(rounds, [0, 0, 0]);
        for round in rounds {
            tried.failed(&sources[0], broken(), round);
            if tried.left(&sources).is_empty() {
                assert!(tried.again(&sources, &PATIENCE));
            }
        }
        assert_eq!(tried.round_of(&sources[0]), None, "nobody asks before the pause is over");
        tokio::time::advance(PATIENCE.pause).await;
        assert_eq!(tried.round_of(&sources[0]), Some(1));
        assert!(tried.again(&sources, &PATIENCE));
        tokio::time::advance(PATIENCE.pause).await;
        assert_eq!(tried.round_of(&sources[0]), None, "it doubles");
        assert!(!tried.again(&sources, &PATIENCE));
    }

    #[tokio::test(start_paused = true)]
    async fn rounds_start_over_once_a_whole_part_has_come() {
        let (mut tried, sources) = (Tried::default(), [source()]);
        for _ in 0..10 {
            assert!(tried.again(&sources, &PATIENCE));
            tried.came(CHUNK);
        }
        assert!(tried.again(&sources, &PATIENCE));
        tried.came(1);
        assert!(tried.again(&sources, &PATIENCE));
        tried.came(1);
        assert!(!tried.again(&sources, &PATIENCE), "a byte a round is too little");
    }
}
