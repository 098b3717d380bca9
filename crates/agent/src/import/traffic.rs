//! How busy each source is and how fast it has been, over all transfers of this agent: whom to ask next. Must not know what is
//! asked for.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::request::Source;

/// How much is asked of one source at once. It lets one node have 24 at once, those before it as well.
const AT_ONCE: usize = 8;

/// How much of what is known of a source's speed the next measurement replaces.
const WEIGHT: f64 = 0.3;

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
    /// Bytes a second that it gives in all; nothing if that is not known.
    rate: Option<f64>,
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
    /// that are alike, the first. Sources of last resort only if there are no others.
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
        let mut standings = self.lock();
        let better = |source: &&Source| !source.last_resort || sources.iter().all(|s| s.last_resort);
        let candidates: Vec<&Source> = sources.iter().filter(better).collect();
        let of = |source: &Source| standings.get(&source.node).copied().unwrap_or_default();
        let fastest = candidates.iter().filter_map(|source| of(source).rate).fold(0.0, f64::max);
        // One of which nothing is known is thought to be as fast as any.
        #[allow(clippy::cast_precision_loss)]
        let due = |standing: Standing| {
            (standing.busy + 1) as f64 / standing.rate.unwrap_or(if fastest > 0.0 { fastest } else { 1.0 })
        };
        candidates.first()?;
        let free = candidates.iter().map(|source| (*source, of(source))).filter(|(_, s)| s.busy < AT_ONCE);
        let chosen =
            free.min_by(|(_, a), (_, b)| due(*a).total_cmp(&due(*b))).map(|(source, _)| source.clone());
        if let Some(source) = &chosen {
            standings.entry(source.node.clone()).or_default().busy += 1;
        }
        Some(chosen)
    }

    /// The most bytes a second that one of `sources` has given in all; nothing if that is not known of any.
    pub(super) fn rate(&self, sources: &[Source]) -> Option<f64> {
        let standings = self.lock();
        sources.iter().filter_map(|source| standings.get(&source.node)?.rate).max_by(f64::total_cmp)
    }

    /// How long a source may take over `bytes` before another of `others` had better be asked; for ever, if nothing is known
    /// of them. With a relay it is longer: the others are busy with feeding that.
    pub(super) fn patience(&self, source: &Source, bytes: u64, others: &[Source]) -> Option<Duration> {
        let standings = self.lock();
        #[allow(clippy::cast_precision_loss)]
        let due = |standing: &Standing| Some((standing.busy + 1) as f64 * bytes as f64 / standing.rate?);
        let best =
            others.iter().filter_map(|source| due(standings.get(&source.node)?)).min_by(f64::total_cmp)?;
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
        // All that is asked of it shares what it gives.
        let rate = bytes as f64 * standing.busy.max(1) as f64 / took.as_secs_f64().max(1e-6);
        standing.rate = Some(standing.rate.map_or(rate, |known| known + WEIGHT * (rate - known)));
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
