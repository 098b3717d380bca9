//! Caps on what an agent receives, and on what it gives, over all transfers.

use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use thiserror::Error;
use tokio::time::Instant;
use tote_image::quantity;

/// Bytes per second, as `50Mi`, `1.5G`, `500000`: a Kubernetes quantity with the suffixes k, M, G, Ki, Mi, Gi.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate(f64);

/// A string that is no rate.
#[derive(Debug, Error)]
#[error("{0:?} is not a number of bytes per second above 0: write it as 50Mi, 1.5G or 500000")]
pub struct RateError(String);

impl FromStr for Rate {
    type Err = RateError;

    fn from_str(text: &str) -> Result<Self, RateError> {
        match quantity::bytes(text) {
            Some(rate) if rate >= 1.0 => Ok(Self(rate)),
            _ => Err(RateError(text.to_owned())),
        }
    }
}

/// A token bucket; clones share it. Those who wait are served in the order they came.
#[derive(Clone, Debug, Default)]
pub struct Bandwidth(Option<Arc<Bucket>>);

#[derive(Debug)]
struct Bucket {
    rate: f64,
    /// When what was taken so far will have been paid for.
    paid: Mutex<Option<Instant>>,
}

/// What may pass at once after a pause.
const BURST: Duration = Duration::from_millis(100);

impl Bandwidth {
    /// Without a rate there is no cap.
    pub fn new(rate: Option<Rate>) -> Self {
        Self(rate.map(|Rate(rate)| Arc::new(Bucket { rate, paid: Mutex::new(None) })))
    }

    /// Waits until `bytes` more may pass.
    pub async fn take(&self, bytes: usize) {
        let Some(bucket) = &self.0 else { return };
        let until = bucket.book(bytes, Instant::now());
        tokio::time::sleep_until(until).await;
    }
}

impl Bucket {
    /// Books `bytes` and tells when they may pass.
    fn book(&self, bytes: usize, now: Instant) -> Instant {
        #[allow(clippy::cast_precision_loss)]
        let cost = Duration::from_secs_f64(bytes as f64 / self.rate);
        let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        let floor = now.checked_sub(BURST).unwrap_or(now);
        let next = paid.unwrap_or(floor).max(floor) + cost;
        *paid = Some(next);
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses() {
        for (text, rate) in [("50Mi", 52_428_800.0), ("1.5G", 1.5e9), ("500000", 5e5), ("2k", 2000.0)] {
            assert_eq!(text.parse::<Rate>().unwrap(), Rate(rate), "{text}");
        }
        for text in ["", "0", "-1", "fast", "5Xi", "NaN", "infM", "0.1", "50 Mi"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
    }

    #[test]
    fn holds_the_rate_over_all_takers() {
        let bucket = Bucket { rate: 1000.0, paid: Mutex::new(None) };
        let now = Instant::now();
        let mut last = now;
        for _ in 0..20 {
            let until = bucket.book(500, now);
            assert!(until > last, "in the order they came");
            last = until;
        }
        assert_eq!(last + BURST - now, Duration::from_secs(10));
        // A pause is not saved up beyond the burst.
        let later = last + Duration::from_secs(60);
        assert_eq!(bucket.book(500, later) + BURST - later, Duration::from_millis(500));
    }
}
