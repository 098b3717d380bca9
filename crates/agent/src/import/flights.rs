//! One mover for each blob: two transfers that want the same blob move it once. Whoever holds the turn moves
//! it; when the turn is given up, by success, failure or cancellation, the next one looks what is there. Meanwhile the mover may
//! ask the sources of all who want the blob: none waits for a source that is not its own alone.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard, watch};
use tote_image::Digest;

use super::request::Source;

/// The turns of all blobs that somebody wants.
#[derive(Debug, Default)]
pub struct Flights(Mutex<HashMap<Digest, Weak<Flight>>>);

/// One blob.
#[derive(Debug, Default)]
pub(super) struct Flight {
    turn: Arc<AsyncMutex<()>>,
    wanted: Mutex<Vec<(u64, watch::Receiver<Vec<Source>>)>>,
}

/// Wanting a blob, until dropped.
#[derive(Debug)]
pub(super) struct Wanting {
    flight: Arc<Flight>,
    number: u64,
}

impl Flights {
    /// Somebody wants a blob, who was told of these sources.
    pub(super) fn want(&self, digest: &Digest, sources: watch::Receiver<Vec<Source>>) -> Wanting {
        let flight = {
            let mut flights = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let flight = flights.get(digest).and_then(Weak::upgrade).unwrap_or_default();
            flights.retain(|_, flight| flight.strong_count() > 0);
            flights.insert(digest.clone(), Arc::downgrade(&flight));
            flight
        };
        let mut wanted = flight.lock();
        let number = wanted.last().map_or(0, |(number, _)| number + 1);
        wanted.push((number, sources));
        drop(wanted);
        Wanting { flight, number }
    }
}

impl Flight {
    fn lock(&self) -> MutexGuard<'_, Vec<(u64, watch::Receiver<Vec<Source>>)>> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wanting {
    /// Waits for the blob's turn, first come first served.
    pub(super) async fn turn(&self) -> OwnedMutexGuard<()> {
        self.flight.turn.clone().lock_owned().await
    }

    /// The blob's turn if nobody has it.
    pub(super) fn try_turn(&self) -> Option<OwnedMutexGuard<()>> {
        self.flight.turn.clone().try_lock_owned().ok()
    }

    /// The sources of all who want the blob, one's own first; of a node what is said of it first.
    pub(super) fn sources(&self) -> Vec<Source> {
        let wanted = self.flight.lock();
        let (own, others): (Vec<_>, Vec<_>) = wanted.iter().partition(|(number, _)| *number == self.number);
        let mut sources: Vec<Source> = Vec::new();
        for (_, named) in own.into_iter().chain(others) {
            for source in named.borrow().iter() {
                if !sources.iter().any(|known| known.node == source.node) {
                    sources.push(source.clone());
                }
            }
        }
        sources
    }
}

impl Drop for Wanting {
    fn drop(&mut self) {
        self.flight.lock().retain(|(number, _)| *number != self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(node: &str, last_resort: bool) -> Source {
        Source { node: node.to_owned(), address: ([127, 0, 0, 1], 1).into(), last_resort, relay: false }
    }

    #[test]
    fn the_sources_of_all_who_want_a_blob_may_be_asked_while_they_do() {
        let (flights, digest) = (Flights::default(), Digest::sha256(b"blob"));
        let (a, b, c) = (source("a", false), source("b", true), source("c", false));
        let one = watch::Sender::new(vec![a.clone(), b.clone()]);
        let two = watch::Sender::new(vec![source("b", false), c.clone()]);
        let first = flights.want(&digest, one.subscribe());
        let other = flights.want(&Digest::sha256(b"other"), two.subscribe());
        assert_eq!(first.sources(), [a.clone(), b.clone()]);
        let second = flights.want(&digest, two.subscribe());
        assert_eq!(first.sources(), [a.clone(), b.clone(), c.clone()], "of b what one's own says");
        assert_eq!(second.sources(), [source("b", false), c.clone(), a.clone()]);
        one.send_replace(vec![]);
        assert_eq!(first.sources(), [source("b", false), c]);
        let turn = first.try_turn().unwrap();
        assert!(second.try_turn().is_none() && other.try_turn().is_some());
        drop(turn);
        drop(second);
        assert_eq!(first.sources(), []);
    }
}
