//! Sending: how many at once, a share of that for each node, and an end to those who do not read.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use thiserror::Error;
use tokio::sync::mpsc::{self, Permit, Sender};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;

use crate::containerd::{self, ByteStream};

/// How many blobs and manifests are sent at once. Each holds up to 4 MiB, a manifest of the largest size; a blob some 3 MiB.
pub(super) const UPLOADS: usize = 32;

/// How many of them to one node: as many as its transfers move at once, and places are left for others.
pub(super) const SHARE: usize = 24;

/// How long a request waits for its turn.
const TURN: Duration = Duration::from_secs(3);

/// How often it is looked whether one who does not read may still do so.
const LOOK: Duration = Duration::from_secs(2);

/// Why a body breaks off.
#[derive(Debug, Error)]
pub(super) enum Cut {
    #[error(transparent)]
    Containerd(containerd::Error),
    #[error("the grant has ended")]
    Ended,
}

/// What is being sent.
#[derive(Debug)]
pub(super) struct Uploads {
    all: Arc<Semaphore>,
    shares: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl Default for Uploads {
    fn default() -> Self {
        Self { all: Arc::new(Semaphore::new(UPLOADS)), shares: Mutex::default() }
    }
}

/// The right to be sent something, until dropped.
pub(super) struct Turn {
    _share: OwnedSemaphorePermit,
    _one: OwnedSemaphorePermit,
}

impl Uploads {
    /// Waits for a turn of a node; not for ever.
    pub(super) async fn turn(&self, node: &str) -> Option<Turn> {
        let share = self.share(node);
        let both = async {
            let share = share.acquire_owned().await.ok()?;
            Some(Turn { _share: share, _one: self.all.clone().acquire_owned().await.ok()? })
        };
        timeout(TURN, both).await.ok().flatten()
    }

    fn share(&self, node: &str) -> Arc<Semaphore> {
        let mut shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever has a turn or waits for one holds another handle.
        shares.retain(|_, share| Arc::strong_count(share) > 1);
        shares.entry(node.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(SHARE))).clone()
    }
}

/// Sends pieces for as long as `may_read`, to a reader that takes each within `stall`. The turn ends with that, even if
/// the connection does not.
pub(super) fn feed(
    mut pieces: ByteStream,
    turn: Turn,
    may_read: impl Fn() -> bool + Send + Sync + 'static,
    sent: impl Fn(u64) + Send + Sync + 'static,
    stall: Duration,
) -> ReceiverStream<Result<Bytes, Cut>> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        let _turn = turn;
        while let Some(piece) = pieces.next().await {
            let Some(place) = place(&sender, &may_read, stall).await else { return };
            if !may_read() {
                place.send(Err(Cut::Ended));
                return;
            }
            match piece {
                Ok(piece) => {
                    sent(piece.len() as u64);
                    place.send(Ok(piece));
                }
                Err(error) => {
                    place.send(Err(Cut::Containerd(error)));
                    return;
                }
            }
        }
    });
    ReceiverStream::new(receiver)
}

async fn place<'a, T>(
    sender: &'a Sender<T>,
    may_read: &(impl Fn() -> bool + Sync),
    stall: Duration,
) -> Option<Permit<'a, T>> {
    let until = tokio::time::Instant::now() + stall;
    loop {
        match timeout(LOOK.min(stall), sender.reserve()).await {
            Ok(place) => return place.ok(),
            Err(_) if !may_read() || tokio::time::Instant::now() >= until => return None,
            Err(_) => {}
        }
    }
}
