//! A part of a blob on its way here: from one source, then another, going on at the byte where the one before stopped. Must
//! not know what becomes of the bytes.

mod tried;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tote_image::{Descriptor, Reference};

use super::ahead::{Mover, Room};
use super::context::Context;
use super::fetch::{self, FetchError, Kind, Span};
use super::flights::Wanting;
use super::progress::State;
use super::request::Source;
use super::traffic::{SAMPLE, Seat};

pub(super) use tried::Tried;

/// Bytes that are asked for at once, in one request.
pub const CHUNK: u64 = 2 << 20;

/// How many pieces a chunk may come in without one being taken: more than any will, so that it waits for nobody but its source.
const PIECES: usize = 64;

/// How often it is looked whether others are faster by now.
const LOOK: Duration = Duration::from_millis(500);

/// A blob that is being asked for, and of whom.
#[derive(Clone)]
pub(super) struct Asked {
    context: Arc<Context>,
    reference: Reference,
    blob: Descriptor,
    wanting: Arc<Wanting>,
    /// Of the transfer: who has lied in it.
    states: watch::Receiver<State>,
    mover: Arc<Mover>,
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
    _room: Option<Room>,
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
        transfer: &str,
    ) -> Self {
        let mover = context.ahead.mover(transfer);
        Self { context, reference, blob, wanting, states, mover, tried: Arc::default() }
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
    pub(super) fn room(&self) -> Option<Room> {
        self.mover.room()
    }

    /// Asks for `length` bytes from `from` on; of `only` one source, or of all in turn.
    pub(super) fn chunk(&self, from: u64, length: u64, only: Option<Source>, room: Option<Room>) -> Chunk {
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
                if matches!(error, FetchError::Broken(_)) {
                    self.context.metrics.left(&source.node);
                    if given < SAMPLE {
                        seat.failed();
                    }
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
