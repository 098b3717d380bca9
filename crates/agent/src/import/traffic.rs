//! How busy each source is and how fast it has been, over all transfers of this agent: whom to ask next. Must not know what is
//! asked for.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::request::Source;

/// How much is asked of one source at once. It lets one node have 24 at once, those before it as well.
const AT_ONCE: usize = 8;

/// How much of what is known of a source's speed the next measurement replaces.
const WEIGHT: f64 = 0.3;

/// Nothing is learnt of a source's speed by less: that takes no longer than the answer's head.
pub(super) const SAMPLE: u64 = 256 << 10;

/// How long what is known of a source is believed.
const BELIEVED: Duration = Duration::from_secs(60);

/// So much longer than another source would have taken is too long.
const TOO_LONG: f64 = 4.0;

/// Nothing is too long before that.
const LEAST: Duration = Duration::from_millis(500);

/// The same where the source is getting the image itself.
const LEAST_OF_RELAYS: Duration = Duration::from_secs(5);

/// The sources of an agent's transfers.
#[derive(Clone, Debug, Default)]
pub struct Traffic(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    standings: Mutex<HashMap<String, Standing>>,
    freed: Notify,
}

#[derive(Clone, Copy, Debug, Default)]
struct Standing {
    /// What is being asked of it.
    busy: usize,
    /// Bytes a second that it gave in all, and when; nothing if that was never known.
    measured: Option<(f64, Instant)>,
    /// When it failed, if it has given nothing since.
    failed: Option<Instant>,
}

impl Standing {
    /// Bytes a second that it gives in all; nothing if that is not known, or not any more.
    fn rate(&self, now: Instant) -> Option<f64> {
        self.measured.filter(|(_, at)| now.duration_since(*at) < BELIEVED).map(|(rate, _)| rate)
    }

    fn is_failing(&self, now: Instant) -> bool {
        self.failed.is_some_and(|at| now.duration_since(at) < BELIEVED)
    }
}

/// The right to ask a source for something, until dropped.
#[derive(Debug)]
pub(super) struct Seat {
    traffic: Traffic,
    pub source: Source,
}

impl Traffic {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Standing>> {
        self.0.standings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a seat at that one of `sources` (of which there is one at least) that will probably be done first; of those
    /// that are alike, the first. Sources of last resort only if there are no others, and after these those that are failing.
    pub(super) async fn seat(&self, sources: &[Source]) -> Option<Seat> {
        loop {
            let freed = self.0.freed.notified();
            let mut freed = std::pin::pin!(freed);
            freed.as_mut().enable();
            if let Some(source) = self.choose(sources)? {
                return Some(Seat { traffic: self.clone(), source });
            }
            freed.await;
        }
    }

    /// Nothing if there are no sources; none of them if all are busy.
    #[allow(clippy::option_option)]
    fn choose(&self, sources: &[Source]) -> Option<Option<Source>> {
        let (mut standings, now) = (self.lock(), Instant::now());
        let of = |source: &Source| standings.get(&source.node).copied().unwrap_or_default();
        let rank = |source: &Source| (of(source).is_failing(now), source.last_resort);
        let best = sources.iter().map(rank).min()?;
        let candidates: Vec<&Source> = sources.iter().filter(|source| rank(source) == best).collect();
        let fastest = candidates.iter().filter_map(|source| of(source).rate(now)).fold(0.0, f64::max);
        // One of which nothing is known is thought to be as fast as any.
        #[allow(clippy::cast_precision_loss)]
        let due = |standing: Standing| {
            let rate = standing.rate(now).unwrap_or(if fastest > 0.0 { fastest } else { 1.0 });
            (standing.busy + 1) as f64 / rate
        };
        let free = candidates.iter().map(|source| (*source, of(source))).filter(|(_, s)| s.busy < AT_ONCE);
        let chosen =
            free.min_by(|(_, a), (_, b)| due(*a).total_cmp(&due(*b))).map(|(source, _)| source.clone());
        if let Some(source) = &chosen {
            standings.entry(source.node.clone()).or_default().busy += 1;
        }
        Some(chosen)
    }

    /// A node that was asked for something broke off, or did not answer: it is not asked before others for a while.
    pub(super) fn failed(&self, node: &str) {
        self.lock().entry(node.to_owned()).or_default().failed = Some(Instant::now());
    }

    /// A node gave something, or said what it will give.
    pub(super) fn answered(&self, node: &str) {
        if let Some(standing) = self.lock().get_mut(node) {
            standing.failed = None;
        }
    }

    /// Whether a node has failed of late.
    pub(super) fn is_failing(&self, node: &str) -> bool {
        self.lock().get(node).is_some_and(|standing| standing.is_failing(Instant::now()))
    }

    /// The most bytes a second that one of `sources` was last seen to give in all; nothing if that is not known of any.
    pub(super) fn rate(&self, sources: &[Source]) -> Option<f64> {
        let standings = self.lock();
        let measured = |source: &Source| Some(standings.get(&source.node)?.measured?.0);
        sources.iter().filter_map(measured).max_by(f64::total_cmp)
    }

    /// How long a source may take over `bytes` before another of `others` had better be asked; for ever, if nothing is known
    /// of them. With a relay it is longer: the others are busy with feeding that.
    pub(super) fn patience(&self, source: &Source, bytes: u64, others: &[Source]) -> Option<Duration> {
        let (standings, now) = (self.lock(), Instant::now());
        #[allow(clippy::cast_precision_loss)]
        let due = |standing: &Standing| Some((standing.busy + 1) as f64 * bytes as f64 / standing.rate(now)?);
        let others = others.iter().filter_map(|source| standings.get(&source.node));
        let best = others.filter(|other| !other.is_failing(now)).filter_map(due).min_by(f64::total_cmp)?;
        let least = if source.relay { LEAST_OF_RELAYS } else { LEAST };
        Some(Duration::try_from_secs_f64(best * TOO_LONG).unwrap_or(Duration::MAX).max(least))
    }
}

impl Seat {
    /// How many have a seat at this source.
    pub(super) fn shared(&self) -> u32 {
        let busy = self.traffic.lock().get(&self.source.node).map_or(1, |standing| standing.busy.max(1));
        u32::try_from(busy).unwrap_or(u32::MAX)
    }

    /// The source gave `bytes` within `took`.
    #[allow(clippy::cast_precision_loss)]
    pub(super) fn gave(&self, bytes: u64, took: Duration) {
        if bytes == 0 {
            return;
        }
        let mut standings = self.traffic.lock();
        let Some(standing) = standings.get_mut(&self.source.node) else { return };
        standing.failed = None;
        if bytes < SAMPLE {
            return;
        }
        // All that is asked of it shares what it gives.
        let rate = bytes as f64 * standing.busy.max(1) as f64 / took.as_secs_f64().max(1e-6);
        let now = Instant::now();
        let rate = standing.rate(now).map_or(rate, |known| known + WEIGHT * (rate - known));
        standing.measured = Some((rate, now));
    }

    /// The source broke off, or did not answer.
    pub(super) fn failed(&self) {
        self.traffic.failed(&self.source.node);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some(standing) = self.traffic.lock().get_mut(&self.source.node) {
            standing.busy = standing.busy.saturating_sub(1);
        }
        self.traffic.0.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(node: &str) -> Source {
        Source {
            node: node.to_owned(),
            address: ([127, 0, 0, 1], 1).into(),
            last_resort: false,
            relay: false,
        }
    }

    async fn seat(traffic: &Traffic, sources: &[Source]) -> Seat {
        traffic.seat(sources).await.unwrap()
    }

    #[tokio::test]
    async fn sources_are_asked_in_turn_and_the_fast_ones_more() {
        let (traffic, sources) = (Traffic::default(), [source("a"), source("b")]);
        let mut seats = Vec::new();
        for node in ["a", "b", "a", "b"] {
            seats.push(seat(&traffic, &sources).await);
            assert_eq!(seats.last().unwrap().source.node, node);
        }
        // a gives in a second what b gives in four.
        seats[0].gave(1 << 20, Duration::from_secs(1));
        seats[1].gave(1 << 20, Duration::from_secs(4));
        drop(seats);
        let mut seats = Vec::new();
        for _ in 0..5 {
            seats.push(seat(&traffic, &sources).await);
        }
        let of_b = seats.iter().filter(|seat| seat.source.node == "b").count();
        assert_eq!(of_b, 1, "{seats:?}");
    }

    #[tokio::test]
    async fn last_resorts_wait_until_there_is_nobody_else() {
        let (traffic, last) = (Traffic::default(), Source { last_resort: true, ..source("a") });
        for _ in 0..3 {
            assert_eq!(seat(&traffic, &[last.clone(), source("b")]).await.source.node, "b");
        }
        assert_eq!(seat(&traffic, std::slice::from_ref(&last)).await.source.node, "a");
        assert!(traffic.seat(&[]).await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_failed_is_asked_last_for_a_while_or_until_it_gives() {
        let (traffic, sources) = (Traffic::default(), [source("a"), source("b")]);
        let last = Source { last_resort: true, ..source("l") };
        let chosen = async |sources: &[Source]| seat(&traffic, sources).await.source.node.clone();
        traffic.failed("a");
        assert_eq!(chosen(&sources).await, "b");
        assert_eq!(chosen(&[source("a"), last.clone()]).await, "l");
        assert_eq!(chosen(&sources[..1]).await, "a", "there is no other");
        tokio::time::advance(BELIEVED).await;
        assert_eq!(chosen(&sources).await, "a");
        traffic.failed("a");
        let left = seat(&traffic, &sources[..1]).await;
        left.gave(0, Duration::from_secs(1));
        assert_eq!(chosen(&sources).await, "b", "nothing came");
        left.gave(1, Duration::from_secs(1));
        drop(left);
        assert_eq!(chosen(&sources).await, "a");
        // Nobody is left for the sake of one that fails.
        seat(&traffic, &sources[1..]).await.gave(1 << 20, Duration::from_secs(1));
        assert!(traffic.patience(&sources[0], 1, &sources[1..]).is_some());
        traffic.failed("b");
        assert_eq!(traffic.patience(&sources[0], 1, &sources[1..]), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_is_of_enough_bytes_and_not_old() {
        let (traffic, sources) = (Traffic::default(), [source("a"), source("b")]);
        seat(&traffic, &sources[..1]).await.gave(SAMPLE - 1, Duration::from_secs(1));
        assert_eq!(traffic.rate(&sources), None, "that says little");
        seat(&traffic, &sources[..1]).await.gave(SAMPLE, Duration::from_secs(100));
        seat(&traffic, &sources[1..]).await.gave(SAMPLE, Duration::from_secs(1));
        let of_b = [seat(&traffic, &sources).await, seat(&traffic, &sources).await];
        assert!(of_b.iter().all(|seat| seat.source.node == "b"), "{of_b:?}");
        drop(of_b);
        assert!(traffic.patience(&sources[0], 1 << 20, &sources[1..]).is_some());
        tokio::time::advance(BELIEVED).await;
        assert_eq!(traffic.patience(&sources[0], 1 << 20, &sources[1..]), None);
        let again = seat(&traffic, &sources).await;
        assert_eq!(again.source.node, "a", "it may be faster by now");
        // What was known before does not count any more.
        again.gave(1 << 30, Duration::from_secs(1));
        assert!(traffic.rate(&sources).unwrap() > 1e9);
    }

    #[tokio::test]
    async fn one_source_is_asked_for_so_much_at_once() {
        let (traffic, sources) = (Traffic::default(), [source("a")]);
        let mut seats = Vec::new();
        for _ in 0..AT_ONCE {
            seats.push(seat(&traffic, &sources).await);
        }
        let waiting = tokio::spawn({
            let traffic = traffic.clone();
            async move { traffic.seat(&[source("a")]).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        seats.pop();
        assert!(waiting.await.unwrap().is_some());
    }

    #[tokio::test]
    async fn patience_is_as_long_as_others_are_slow() {
        let (traffic, others) = (Traffic::default(), [source("a"), source("b")]);
        assert_eq!(traffic.patience(&others[0], 1 << 20, &others), None, "nothing is known");
        seat(&traffic, &others[..1]).await.gave(1 << 20, Duration::from_secs(1));
        let known = traffic.patience(&others[0], 1 << 20, &others).unwrap();
        assert_eq!(known, Duration::from_secs(4));
        assert_eq!(traffic.patience(&others[0], 1, &others), Some(LEAST));
        let relay = Source { relay: true, ..source("r") };
        assert_eq!(traffic.patience(&relay, 1, &others), Some(LEAST_OF_RELAYS));
        assert_eq!(traffic.patience(&others[0], 1 << 20, &others[1..]), None);
    }
}
