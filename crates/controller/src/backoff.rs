//! Exponential back-off with jitter.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::Duration;

/// `first`, doubled each time up to `cap`, less up to a fifth by jitter.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    cap: Duration,
    seed: u64,
    failures: u32,
}

impl Backoff {
    /// `seed` tells loops apart, so that they do not beat in time.
    pub fn new(first: Duration, cap: Duration, seed: &str) -> Self {
        let mut hasher = DefaultHasher::new();
        seed.hash(&mut hasher);
        Self { first, cap, seed: hasher.finish(), failures: 0 }
    }

    /// The next pause.
    pub fn pause(&mut self) -> Duration {
        self.failures = self.failures.saturating_add(1);
        delay(self.first, self.cap, self.failures, self.seed)
    }

    /// Starts again with the shortest pause.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

/// The pause after the `failures`th failure in a row (from 1). The same arguments give the same pause.
pub fn delay(first: Duration, cap: Duration, failures: u32, seed: u64) -> Duration {
    let exponent = failures.saturating_sub(1).min(20);
    let full = first.saturating_mul(1 << exponent).min(cap);
    let mut hasher = DefaultHasher::new();
    (seed, failures).hash(&mut hasher);
    let less = u32::try_from(hasher.finish() % 200).unwrap_or(0);
    full.saturating_sub(full * less / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_to_the_cap_with_jitter() {
        let (first, cap) = (Duration::from_secs(1), Duration::from_secs(10));
        for (failures, full) in [(1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (5, 10.0), (400, 10.0)] {
            for seed in 0..100 {
                let pause = delay(first, cap, failures, seed).as_secs_f64();
                assert!(pause <= full && pause >= full * 0.79, "{failures}: {pause}");
            }
        }
        let spread: std::collections::BTreeSet<_> = (0..100).map(|seed| delay(first, cap, 9, seed)).collect();
        assert!(spread.len() > 20, "jitter");
    }
}
