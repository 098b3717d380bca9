//! Sources that are getting the image themselves: how long one is waited for. Must not know how blobs are moved.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tote_image::Descriptor;

use super::fetch::{self, FetchError, Kind};
use super::request::Source;
use super::run::Run;
use super::underway::Arrived;

/// Between two looks at a relay.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_millis(250);

/// How long a relay that did not answer of late may take to do so.
const FAILING_HEAD: Duration = Duration::from_millis(500);

/// For so long a relay is watched before it is said how fast the image grows there.
const WATCHED: Duration = Duration::from_secs(5);

/// One that will have the whole image within this is always worth waiting for. Where it will take longer, a blob that has waited
/// for this long shows how fast the others are.
const SHORT: Duration = Duration::from_secs(30);

/// No blob waits for longer, whatever is said of how the image grows: who said it is not believed any more.
const LONGEST: Duration = Duration::from_secs(600);

/// So much slower than another source is too slow.
const TOO_SLOW: f64 = 4.0;

/// The relays that one run has looked at, by node.
#[derive(Debug, Default)]
pub(super) struct Relays(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    seen: HashMap<String, Seen>,
    /// Whether a blob was asked of the others to see how fast they are.
    tried_others: bool,
}

/// How the image grows at a relay.
#[derive(Clone, Copy, Debug)]
struct Seen {
    first: (Instant, u64),
    last: Arrived,
    changed: Instant,
    is_left: bool,
}

impl Seen {
    fn new(arrived: Arrived, now: Instant) -> Self {
        Self { first: (now, arrived.bytes), last: arrived, changed: now, is_left: false }
    }

    fn look(&mut self, arrived: Arrived, now: Instant) {
        if arrived.bytes < self.last.bytes {
            *self = Self { is_left: self.is_left, ..Self::new(arrived, now) }; // It began anew.
        } else if arrived != self.last {
            (self.last, self.changed) = (arrived, now);
        }
    }

    /// Bytes a second, once it was watched for long enough.
    #[allow(clippy::cast_precision_loss)]
    fn rate(&self, now: Instant) -> Option<f64> {
        let (since, from) = self.first;
        let watched = now.duration_since(since);
        (watched >= WATCHED).then(|| (self.last.bytes - from) as f64 / watched.as_secs_f64())
    }
}

impl Relays {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a relay where the image is so far is worth waiting for, for a blob that has waited for `waited`: its image must grow,
    /// within every `growth`, and not be much slower than the others. These give `others` bytes a second, if that is known.
    #[allow(clippy::cast_precision_loss)]
    fn is_worth(
        &self,
        relay: &str,
        (arrived, now): (Arrived, Instant),
        (waited, growth): (Duration, Duration),
        others: Option<f64>,
    ) -> bool {
        let mut known = self.lock();
        let seen = known.seen.entry(relay.to_owned()).or_insert_with(|| Seen::new(arrived, now));
        seen.look(arrived, now);
        seen.is_left |= waited > LONGEST;
        if seen.is_left || now.duration_since(seen.changed) > growth {
            return false;
        }
        let Some(rate) = seen.rate(now) else { return true };
        let left = arrived.total.saturating_sub(arrived.bytes) as f64;
        if left <= rate * SHORT.as_secs_f64() {
            return true;
        }
        match others {
            Some(others) => rate * TOO_SLOW > others,
            // One blob is enough to learn that.
            None => waited < SHORT || std::mem::replace(&mut known.tried_others, true),
        }
    }
}

impl Run<'_> {
    /// Waits while the only sources that are not of last resort are relays, and one of them will have the blob soon. What comes
    /// of it is not told: whoever asks next finds out.
    pub(super) async fn await_relays(&self, blob: &Descriptor) {
        let begun = Instant::now();
        let mut sources = self.sources.clone();
        let mut pause = FIRST_PAUSE;
        loop {
            let (relays, others) = {
                let named = sources.borrow_and_update();
                let liars = self.tracker.state().progress.liars;
                if named.iter().any(|source| !source.relay && !source.last_resort) {
                    return;
                }
                let honest = named.iter().filter(|source| !liars.contains(&source.node)).cloned();
                honest.partition::<Vec<_>, _>(|source| source.relay)
            };
            if relays.is_empty() || !matches!(self.containerd().blob(&blob.digest).await, Ok(None)) {
                return; // It is here, perhaps meanwhile.
            }
            let mut waits = false;
            for relay in &relays {
                let traffic = &self.context.traffic;
                match self.look(relay, blob).await {
                    Ok(()) => return traffic.answered(&relay.node),
                    Err(FetchError::Coming(arrived)) => {
                        traffic.answered(&relay.node);
                        let (now, growth) = (Instant::now(), self.context.patience.growth);
                        let so_far = (now.duration_since(begun), growth);
                        let others = traffic.rate(&others);
                        if self.relays.is_worth(&relay.node, (arrived, now), so_far, others) {
                            waits = true;
                            self.brings.waits_for(Some(arrived));
                        }
                    }
                    Err(error) => {
                        tracing::debug!(node = relay.node, %error, "a relay has nothing coming");
                        if matches!(error, FetchError::Broken(_)) {
                            traffic.failed(&relay.node);
                        }
                    }
                }
            }
            if !waits {
                self.brings.waits_for(None);
                return;
            }
            let changed = tokio::time::timeout(pause, sources.changed()).await;
            if matches!(changed, Ok(Err(_))) {
                return; // The transfer is over.
            }
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    async fn look(&self, relay: &Source, blob: &Descriptor) -> Result<(), FetchError> {
        let (context, reference) = (self.context, &self.wanted.reference);
        let wanted = (Kind::Blob, &blob.digest);
        let mut patience = context.patience;
        if context.traffic.is_failing(&relay.node) {
            patience.head = patience.head.min(FAILING_HEAD);
        }
        fetch::look(&context.peers, relay, reference, wanted, patience).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROWTH: Duration = Duration::from_secs(10);
    const MIB: u64 = 1 << 20;

    /// Looks at a relay whose image of 1000 MiB grows by `rate` MiB a second, every second from `from` to `to`; tells what the last
    /// look came to.
    fn watch(
        relays: &Relays,
        began: Instant,
        rate: u64,
        (from, to): (u64, u64),
        others: Option<u64>,
    ) -> bool {
        let mut worth = false;
        for second in from..=to {
            let (now, waited) = (began + Duration::from_secs(second), Duration::from_secs(second - from));
            let arrived = Arrived { bytes: second * rate * MIB, total: 1000 * MIB };
            #[allow(clippy::cast_precision_loss)]
            let others = others.map(|others| (others * MIB) as f64);
            worth = relays.is_worth("r", (arrived, now), (waited, GROWTH), others);
        }
        worth
    }

    #[test]
    fn one_that_does_not_grow_is_not_waited_for() {
        let (relays, began) = (Relays::default(), Instant::now());
        assert!(watch(&relays, began, 0, (0, 10), None));
        assert!(!watch(&relays, began, 0, (11, 11), None), "no blob waits for it again");
        assert!(watch(&relays, began, 1, (12, 12), None), "until it grows");
    }

    #[test]
    fn one_that_is_much_slower_than_others_are_is_not_waited_for() {
        for (rate, others, worth) in [(2, 4, true), (2, 9, false), (20, 500, false), (34, 500, true)] {
            let (relays, began) = (Relays::default(), Instant::now());
            assert_eq!(watch(&relays, began, rate, (0, 6), Some(others)), worth, "{rate} against {others}");
        }
    }

    #[test]
    fn none_is_waited_for_for_ever() {
        let (relays, began) = (Relays::default(), Instant::now());
        let looks = |from: u64, to: u64| {
            let at = |second: u64| {
                let now = began + Duration::from_secs(second);
                (Arrived { bytes: 1 + second % 2, total: 2 }, now, Duration::from_secs(second - from))
            };
            (from..=to)
                .map(at)
                .map(|(arrived, now, waited)| relays.is_worth("r", (arrived, now), (waited, GROWTH), None))
                .last()
        };
        assert_eq!(looks(0, 600), Some(true));
        assert_eq!(looks(0, 601), Some(false));
        assert_eq!(looks(602, 603), Some(false), "nor by other blobs");
    }

    #[test]
    fn of_others_that_are_not_known_one_blob_is_asked() {
        let (relays, began) = (Relays::default(), Instant::now());
        assert!(watch(&relays, began, 2, (0, 29), None));
        assert!(!watch(&relays, began, 2, (0, 30), None), "the first that has waited for so long");
        assert!(watch(&relays, began, 2, (0, 31), None), "and no other");
        let (relays, began) = (Relays::default(), Instant::now());
        assert!(watch(&relays, began, 20, (0, 45), None), "it will be done soon");
    }
}
