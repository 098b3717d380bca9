//! Getting one blob onto the node: present already, or from the sources, several parts of it at once, resumed where it stopped.

use std::collections::VecDeque;
use std::sync::Arc;

use futures::TryStreamExt as _;
use tote_image::Descriptor;

use super::chunk::{Asked, CHUNK, Chunk, Piece, Tried};
use super::evidence::Evidence;
use super::failure::Failure;
use super::fetch::FetchError;
use super::request::Source;
use super::run::Run;
use crate::containerd::{BlobWriter, Error, Held, Ingest, Labels};

/// How many parts of a blob are on their way at once: what is written waits for no answer of a source, and several sources
/// give parts of one blob.
const WINDOW: usize = 3;

/// What is known of the bytes that an ingest holds.
struct Partial {
    writer: Box<dyn BlobWriter>,
    /// Whose bytes they are; nothing if an earlier writer's are among them.
    givers: Option<Vec<Source>>,
}

impl Partial {
    fn new(writer: Box<dyn BlobWriter>) -> Self {
        let givers = (writer.offset() == 0).then(Vec::new);
        Self { writer, givers }
    }

    /// The one source that gave all bytes, if there is just one.
    fn sole_giver(&self) -> Option<&Source> {
        match self.givers.as_deref() {
            Some([one]) => Some(one),
            _ => None,
        }
    }
}

impl Run<'_> {
    /// Makes a blob present, verified, held by the lease and labelled.
    pub(super) async fn obtain(&self, blob: &Descriptor, labels: Labels) -> Result<(), Failure> {
        let wanting = Arc::new(self.context.flights.want(&blob.digest, self.sources.clone()));
        let turn = wanting.try_turn();
        if turn.is_none() {
            // Another transfer moves it. Should that be cancelled, what it has got stays for this one.
            self.containerd().hold(&self.lease.id, Held::Ingest(&blob.digest)).await?;
        }
        let _turn = match turn {
            Some(turn) => turn,
            None => wanting.turn().await,
        };
        if self.is_present(blob, &labels).await? {
            return Ok(());
        }
        let Some(partial) = self.open(blob).await? else {
            return self.present(blob, &labels).await;
        };
        let (context, states) = (self.context.clone(), self.tracker.subscribe());
        let reference = self.wanted.reference.clone();
        let asked = Asked::new(context, reference, blob.clone(), wanting, states, &self.lease.transfer);
        let mut evidence = Evidence::default();
        let outcome = self.obtain_from(&asked, blob, labels, partial, &mut evidence).await;
        if outcome.is_ok() {
            self.convict(&asked, blob, &evidence).await;
            asked.tried().settle();
        }
        self.note_liars(&asked.tried());
        outcome
    }

    /// Those who gave what was not asked for are told of, however it ended.
    pub(super) fn note_liars(&self, tried: &Tried) {
        for node in tried.liars() {
            self.tracker.lied(node);
            self.context.metrics.lied(node);
        }
    }

    /// Holds what made no blob against the blob, now that it is here.
    async fn convict(&self, asked: &Asked, blob: &Descriptor, evidence: &Evidence) {
        let mut found: Vec<&Source> = Vec::new();
        for given in evidence.suspects() {
            if found.contains(&&given.source) {
                continue;
            }
            let pieces = self.containerd().read(&blob.digest, given.from, given.length).await;
            let Ok(pieces) = pieces else { return };
            let Ok(pieces) = pieces.try_collect::<Vec<_>>().await else { return };
            if !evidence.is(given, &pieces.concat()) {
                found.push(&given.source);
                let wrong = "gave other bytes than the blob has".to_owned();
                asked.tried().note(&given.source, FetchError::Wrong(wrong));
            }
        }
    }

    async fn obtain_from(
        &self,
        asked: &Asked,
        blob: &Descriptor,
        labels: Labels,
        mut partial: Partial,
        evidence: &mut Evidence,
    ) -> Result<(), Failure> {
        // After a mismatch whose cause is not known: one source at a time, that it be found.
        let mut only: Option<Source> = None;
        let mut alone = Vec::new();
        loop {
            if self.fill(blob, asked, &mut partial, only.as_ref(), evidence).await? {
                let sole = partial.sole_giver().cloned();
                let mixed = sole.is_none() && partial.givers.is_some();
                match partial.writer.commit(labels.clone()).await {
                    Ok(()) => {
                        self.tracker.complete(&blob.digest, blob.size);
                        return Ok(());
                    }
                    Err(Error::AlreadyExists(_)) => return self.present(blob, &labels).await,
                    Err(Error::Mismatch(_)) => {}
                    Err(error) => return Err(error.into()),
                }
                if sole.is_none() {
                    evidence.suspect();
                }
                if let Some(giver) = sole {
                    let wrong = "gave bytes with another digest".to_owned();
                    asked.tried().note(&giver, FetchError::Wrong(wrong));
                }
                only = if mixed { asked.alone(&mut alone) } else { None };
                if mixed && only.is_none() {
                    return Err(asked.failure());
                }
            } else {
                // What is left of one source is not gone on with by another, or the bytes would be of two again.
                only = if only.is_some() { asked.alone(&mut alone) } else { None };
                if only.is_none() {
                    return Err(asked.failure());
                }
            }
            evidence.forget();
            match self.reopen(blob).await? {
                Some(fresh) => partial = fresh,
                None => return self.present(blob, &labels).await,
            }
        }
    }

    /// Writes what is still wanted of a blob. Tells whether all of it came.
    async fn fill(
        &self,
        blob: &Descriptor,
        asked: &Asked,
        partial: &mut Partial,
        only: Option<&Source>,
        evidence: &mut Evidence,
    ) -> Result<bool, Failure> {
        let mut next = partial.writer.offset();
        let mut flying: VecDeque<Chunk> = VecDeque::new();
        loop {
            while flying.len() < WINDOW && next < blob.size {
                let room = if flying.is_empty() { None } else { asked.room() };
                if room.is_none() && !flying.is_empty() {
                    break;
                }
                let length = CHUNK.min(blob.size - next);
                flying.push_back(asked.chunk(next, length, only.cloned(), room));
                next += length;
            }
            let Some(chunk) = flying.front_mut() else { return Ok(true) };
            while let Some(Piece { bytes, source }) = chunk.next().await {
                let length = bytes.len() as u64;
                self.check_room(length, blob.digest.as_str()).await?;
                evidence.given(partial.writer.offset(), &bytes, &source);
                partial.writer.write(bytes).await?;
                self.tracker.moved(&blob.digest, length, &source.node);
                if let Some(givers) = partial.givers.as_mut().filter(|givers| !givers.contains(&source)) {
                    givers.push(source);
                }
            }
            let Some(chunk) = flying.pop_front() else { return Ok(true) };
            if !chunk.whole().await {
                return Ok(false);
            }
        }
    }

    /// Holds and labels a blob if it is there.
    pub(super) async fn is_present(&self, blob: &Descriptor, labels: &Labels) -> Result<bool, Failure> {
        if self.containerd().blob(&blob.digest).await?.is_none() {
            return Ok(false);
        }
        // Looked for again once it is held: what is seen then cannot be collected any more.
        self.containerd().hold(&self.lease.id, Held::Blob(&blob.digest)).await?;
        let Some(found) = self.containerd().blob(&blob.digest).await? else { return Ok(false) };
        if found.size != blob.size {
            let (digest, says) = (&blob.digest, blob.size);
            let message = format!("blob {digest} has {} bytes, the image says {says}", found.size);
            return Err(Failure::Unsupported(message));
        }
        let lacks = |(key, value): (&String, &String)| found.labels.get(key) != Some(value);
        if labels.iter().any(lacks) {
            self.containerd().label(&blob.digest, labels).await?;
        }
        self.tracker.complete(&blob.digest, blob.size);
        Ok(true)
    }

    /// The same for one that another has just committed.
    pub(super) async fn present(&self, blob: &Descriptor, labels: &Labels) -> Result<(), Failure> {
        if self.is_present(blob, labels).await? {
            return Ok(());
        }
        Err(Failure::Runtime(format!(
            "containerd says that blob {} exists, and that it does not",
            blob.digest
        )))
    }

    async fn open(&self, blob: &Descriptor) -> Result<Option<Partial>, Failure> {
        match self.containerd().ingest(&self.lease.id, blob).await? {
            Ingest::Present => Ok(None),
            Ingest::Open(writer) => Ok(Some(Partial::new(writer))),
        }
    }

    /// Forgets what was written and starts over.
    async fn reopen(&self, blob: &Descriptor) -> Result<Option<Partial>, Failure> {
        self.tracker.lost(&blob.digest);
        self.containerd().abort(&blob.digest).await?;
        self.open(blob).await
    }
}
