//! Getting one blob onto the node: present already, or from the sources in turn, resumed where it stopped.

use std::collections::BTreeMap;
use std::time::Duration;

use tote_image::{Descriptor, Digest, Verifier};

use super::failure::Failure;
use super::fetch::{self, FetchError, Kind};
use super::request::Source;
use super::run::Run;
use crate::containerd::{BlobWriter, Error, Held, Ingest, Labels};

/// The longest pause between two rounds over all sources.
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// What was heard of each source, by node.
#[derive(Debug, Default)]
pub(super) struct Tried {
    heard: BTreeMap<String, FetchError>,
    banned: Vec<Source>,
    mismatched: bool,
}

impl Tried {
    pub(super) fn note(&mut self, source: &Source, error: FetchError) {
        tracing::debug!(node = source.node, %error, "a source did not give a blob");
        if matches!(error, FetchError::Wrong(_)) {
            self.banned.push(source.clone());
            self.mismatched = true;
        }
        self.heard.insert(format!("{} ({})", source.node, source.address), error);
    }

    /// Whether asking `sources` again could help.
    pub(super) fn is_hopeless(&self, sources: &[Source]) -> bool {
        sources.iter().all(|source| self.is_banned(source))
            || (!self.heard.is_empty()
                && self.heard.values().all(|error| matches!(error, FetchError::Missing)))
    }

    pub(super) fn is_banned(&self, source: &Source) -> bool {
        self.banned.contains(source)
    }

    pub(super) fn into_failure(self, digest: &Digest) -> Failure {
        let heard = self.heard.iter().map(|(node, error)| format!("{node}: {error}"));
        let mut tried = heard.collect::<Vec<_>>().join("; ");
        if tried.is_empty() {
            "no sources were named".clone_into(&mut tried);
        }
        let digest = digest.clone();
        if self.mismatched {
            Failure::DigestMismatch { digest, tried }
        } else {
            Failure::NoSource { digest, tried }
        }
    }
}

/// What is known of the bytes that an ingest holds.
struct Partial {
    writer: Box<dyn BlobWriter>,
    /// Hashes all bytes so far; nothing if an earlier writer's are among them.
    verifier: Option<Verifier>,
    /// Whose bytes they are, as far as is known.
    givers: Vec<Source>,
}

impl Partial {
    fn new(writer: Box<dyn BlobWriter>, blob: &Descriptor) -> Self {
        let verifier = (writer.offset() == 0).then(|| blob.digest.verifier());
        Self { writer, verifier, givers: Vec::new() }
    }

    /// The one source that gave all bytes, if there is just one.
    fn sole_giver(&self) -> Option<&Source> {
        match &self.givers[..] {
            [one] if self.verifier.is_some() => Some(one),
            _ => None,
        }
    }
}

/// How one source fared.
enum Given {
    All,
    Failed(FetchError),
    /// All bytes came, and they are not the blob.
    Mismatch,
}

impl Run<'_> {
    /// Makes a blob present, verified, held by the lease and labelled.
    pub(super) async fn obtain(&self, blob: &Descriptor, labels: Labels) -> Result<(), Failure> {
        let turn = self.context.flights.try_turn(&blob.digest);
        if turn.is_none() {
            // Another transfer moves it. Should that be cancelled, what it has got stays for this one.
            self.containerd().hold(&self.lease.id, Held::Ingest(&blob.digest)).await?;
        }
        let _turn = match turn {
            Some(turn) => turn,
            None => self.context.flights.turn(&blob.digest).await,
        };
        if self.is_present(blob, &labels).await? {
            return Ok(());
        }
        let Some(mut partial) = self.open(blob).await? else {
            return self.present(blob, &labels).await;
        };
        let mut tried = Tried::default();
        for round in 0..self.context.patience.rounds {
            self.pause(round).await;
            let sources = self.sources.borrow().clone();
            for source in &sources {
                while !tried.is_banned(source) {
                    match self.pull(blob, source, &mut partial).await? {
                        Given::Failed(error) => {
                            tried.note(source, error);
                            break;
                        }
                        Given::All => {
                            let hashed = partial.verifier.is_some();
                            match partial.writer.commit(labels.clone()).await {
                                Ok(()) => {
                                    self.tracker.complete(&blob.digest, blob.size);
                                    return Ok(());
                                }
                                Err(Error::AlreadyExists(_)) => return self.present(blob, &labels).await,
                                // The bytes of an earlier writer, which nobody hashed, were wrong.
                                Err(Error::Mismatch(_)) if !hashed => match self.reopen(blob).await? {
                                    Some(fresh) => partial = fresh,
                                    None => return self.present(blob, &labels).await,
                                },
                                Err(error) => return Err(error.into()),
                            }
                        }
                        Given::Mismatch => {
                            if let Some(giver) = partial.sole_giver() {
                                let wrong = "gave bytes with another digest".to_owned();
                                tried.note(&giver.clone(), FetchError::Wrong(wrong));
                            }
                            drop(partial);
                            match self.reopen(blob).await? {
                                Some(fresh) => partial = fresh,
                                None => return self.present(blob, &labels).await,
                            }
                        }
                    }
                }
            }
            if tried.is_hopeless(&sources) {
                break;
            }
        }
        Err(tried.into_failure(&blob.digest))
    }

    /// The pause before a round: none, then doubling.
    pub(super) async fn pause(&self, round: u32) {
        if round > 0 {
            let pause = self.context.patience.pause.saturating_mul(1 << (round - 1).min(16));
            tokio::time::sleep(pause.min(MAX_PAUSE)).await;
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
            Ingest::Open(writer) => Ok(Some(Partial::new(writer, blob))),
        }
    }

    /// Forgets what was written and starts over.
    async fn reopen(&self, blob: &Descriptor) -> Result<Option<Partial>, Failure> {
        self.tracker.lost(&blob.digest);
        self.containerd().abort(&blob.digest).await?;
        self.open(blob).await
    }

    /// Takes what is still wanted of a blob from one source.
    async fn pull(
        &self,
        blob: &Descriptor,
        source: &Source,
        partial: &mut Partial,
    ) -> Result<Given, Failure> {
        let offset = partial.writer.offset();
        if offset < blob.size {
            let wanted = (Kind::Blob, &blob.digest);
            let bounds = (Some(blob.size), blob.size);
            let (context, reference) = (self.context, &self.wanted.reference);
            let opened =
                fetch::open(&context.peers, source, reference, wanted, offset, bounds, context.patience);
            let mut body = match opened.await {
                Ok(body) => body,
                Err(error) => return Ok(Given::Failed(error)),
            };
            loop {
                let piece = match body.next(&context.bandwidth).await {
                    Ok(Some(piece)) => piece,
                    Ok(None) => break,
                    Err(error) => return Ok(Given::Failed(error)),
                };
                if !partial.givers.contains(source) {
                    partial.givers.push(source.clone());
                }
                if let Some(verifier) = &mut partial.verifier {
                    verifier.update(&piece);
                }
                let length = piece.len() as u64;
                partial.writer.write(piece).await?;
                self.tracker.moved(&blob.digest, length, &source.node);
                context.metrics.received(length);
            }
        }
        let differs = |verifier: Verifier| verifier.finish() != blob.digest;
        Ok(if partial.verifier.clone().is_some_and(differs) { Given::Mismatch } else { Given::All })
    }
}
