//! One mover for each blob: two transfers that want the same blob move it once. Whoever holds the turn moves
//! it; when the turn is given up, by success, failure or cancellation, the next one looks what is there.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};
use tote_image::Digest;

/// The turns of all blobs that somebody wants.
#[derive(Debug, Default)]
pub struct Flights(Mutex<HashMap<Digest, Weak<AsyncMutex<()>>>>);

impl Flights {
    /// Waits for the blob's turn, first come first served.
    pub async fn turn(&self, digest: &Digest) -> OwnedMutexGuard<()> {
        self.lock_of(digest).lock_owned().await
    }

    /// The blob's turn if nobody has it.
    pub fn try_turn(&self, digest: &Digest) -> Option<OwnedMutexGuard<()>> {
        self.lock_of(digest).try_lock_owned().ok()
    }

    fn lock_of(&self, digest: &Digest) -> Arc<AsyncMutex<()>> {
        let mut flights = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let lock = flights.get(digest).and_then(Weak::upgrade).unwrap_or_default();
        flights.retain(|_, lock| lock.strong_count() > 0);
        flights.insert(digest.clone(), Arc::downgrade(&lock));
        lock
    }
}
