//! Room in memory for parts that come before they can be written, shared by all transfers. Must not know what comes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How many chunks of 2 MiB may be here, or on their way, before those that are being written.
const AHEAD: usize = 4;

/// How many of them one transfer may have while another moves a blob: what a slow source gives keeps its room for long.
const SHARE: usize = AHEAD / 2;

/// The room that an agent's transfers share.
#[derive(Clone, Debug, Default)]
pub struct Ahead(Arc<Mutex<HashMap<String, Held>>>);

/// What one transfer has of it.
#[derive(Debug, Default)]
struct Held {
    /// Blobs that it moves.
    blobs: usize,
    /// Chunks that it has room for.
    rooms: usize,
}

/// A blob that a transfer moves, until dropped.
#[derive(Debug)]
pub(super) struct Mover {
    ahead: Ahead,
    transfer: String,
}

/// Room for one chunk, until dropped.
#[derive(Debug)]
pub(super) struct Room(Arc<Mover>);

impl Ahead {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Held>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For how many chunks there is room.
    pub fn free(&self) -> usize {
        AHEAD.saturating_sub(self.lock().values().map(|held| held.rooms).sum())
    }

    /// A transfer begins to move a blob.
    pub(super) fn mover(&self, transfer: &str) -> Arc<Mover> {
        self.lock().entry(transfer.to_owned()).or_default().blobs += 1;
        Arc::new(Mover { ahead: self.clone(), transfer: transfer.to_owned() })
    }
}

impl Mover {
    /// Room for one more chunk, if there is any that this transfer may have.
    pub(super) fn room(self: &Arc<Self>) -> Option<Room> {
        let mut transfers = self.ahead.lock();
        let taken: usize = transfers.values().map(|held| held.rooms).sum();
        let most = if transfers.len() > 1 { SHARE } else { AHEAD };
        let held = transfers.get_mut(&self.transfer)?;
        if taken >= AHEAD || held.rooms >= most {
            return None;
        }
        held.rooms += 1;
        Some(Room(self.clone()))
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        let mut transfers = self.ahead.lock();
        if let Some(held) = transfers.get_mut(&self.transfer) {
            held.blobs -= 1;
            if held.blobs == 0 {
                transfers.remove(&self.transfer);
            }
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Some(held) = self.0.ahead.lock().get_mut(&self.0.transfer) {
            held.rooms -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_transfer_has_all_of_it_and_half_beside_another() {
        let ahead = Ahead::default();
        let rooms = |mover: &Arc<Mover>| std::iter::from_fn(|| mover.room()).collect::<Vec<_>>();
        let (one, other_blob) = (ahead.mover("one"), ahead.mover("one"));
        let mut of_one = rooms(&one);
        assert_eq!((of_one.len(), ahead.free()), (AHEAD, 0));
        assert!(other_blob.room().is_none());
        let two = ahead.mover("two");
        assert!(two.room().is_none());
        // What the first gives back is the second's, up to its half.
        of_one.truncate(1);
        let of_two = rooms(&two);
        assert_eq!(of_two.len(), SHARE);
        of_one.extend(rooms(&other_blob));
        assert_eq!((of_one.len(), ahead.free()), (SHARE, 0), "over all its blobs");
        drop((of_two, two));
        assert_eq!(rooms(&one).len(), AHEAD - SHARE, "alone again");
        drop((of_one, one, other_blob));
        assert_eq!((ahead.free(), ahead.lock().len()), (AHEAD, 0), "nothing is kept of those that are over");
    }
}
