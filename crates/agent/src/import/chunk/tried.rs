//! What was heard of the sources of one blob, and when they are asked again. Must not know how they are asked.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;
use tote_image::Digest;

use super::CHUNK;
use crate::import::failure::Failure;
use crate::import::fetch::{FetchError, Patience};
use crate::import::request::Source;

/// The longest pause between two rounds over all sources.
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// What was heard of the sources of one blob.
#[derive(Debug, Default)]
pub(in crate::import) struct Tried {
    heard: BTreeMap<String, FetchError>,
    banned: Vec<Source>,
    /// Those that say that it has another length.
    disputing: Vec<Source>,
    /// Those that have failed in this round.
    pub(super) out: Vec<Source>,
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
    pub(in crate::import) fn failed(&mut self, source: &Source, error: FetchError, round: u64) {
        if round == self.round {
            self.out.push(source.clone());
        }
        self.note(source, error);
    }

    pub(in crate::import) fn note(&mut self, source: &Source, error: FetchError) {
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
    pub(in crate::import) fn left(&self, sources: &[Source]) -> Vec<Source> {
        let left = sources.iter().filter(|source| !self.is_banned(source) && !self.out.contains(source));
        let mut left: Vec<Source> = left.cloned().collect();
        left.sort_by_key(|source| source.last_resort);
        left
    }

    /// The present round, if it has begun and `source` may be asked in it.
    pub(in crate::import) fn round_of(&self, source: &Source) -> Option<u64> {
        let begun = self.begins.is_none_or(|begins| begins <= Instant::now());
        let may = !self.is_banned(source) && !self.out.contains(source);
        (begun && may).then_some(self.round)
    }

    /// When the present round begins, if not at once.
    pub(in crate::import) fn begins(&self) -> Option<Instant> {
        self.begins
    }

    /// Begins another round, after a pause that doubles; not if that could not help, nor if there have been enough of them in
    /// which little came.
    pub(in crate::import) fn again(&mut self, sources: &[Source], patience: &Patience) -> bool {
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
    pub(in crate::import) fn came(&mut self, bytes: u64) {
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
    pub(in crate::import) fn settle(&mut self) {
        self.banned.append(&mut self.disputing);
    }

    /// Nodes that gave what the blob is not.
    pub(in crate::import) fn liars(&self) -> impl Iterator<Item = &str> {
        self.banned.iter().map(|source| source.node.as_str())
    }

    pub(super) fn is_banned(&self, source: &Source) -> bool {
        self.banned.contains(source) || self.disputing.contains(source)
    }

    pub(in crate::import) fn failure(&self, digest: &Digest) -> Failure {
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
