//! Imports: the transfers of this agent, started, attached to, cancelled, abandoned, and cleaned up after.
//!
//! State that must survive the agent is in containerd alone: a lease whose label names the transfer, and the
//! partial ingests it holds.

mod ahead;
mod blob;
mod chunk;
mod context;
mod evidence;
mod failure;
mod fetch;
mod flights;
mod progress;
mod publish;
mod relay;
mod request;
mod resolve;
mod room;
mod run;
mod standing;
mod traffic;
mod transfer;
mod underway;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tote_image::Digest;

use crate::containerd;

pub use chunk::CHUNK;
pub use context::Context;
pub use failure::Failure;
pub use fetch::Patience;
pub use flights::Flights;
pub use progress::{Imported, Progress, State};
pub use request::{ImportRequest, RequestError, Source, TransferId, Wanted};
pub use traffic::Traffic;
pub use transfer::Attached;
pub use underway::{Arrived, Bringing, Underway};

use transfer::Transfer;

/// How many transfers run at once; others wait.
const RUNNING: usize = 8;

/// How many transfers are known at once, those that wait and those that are remembered among them.
const KNOWN: usize = 256;

/// How long cancelling waits for a transfer to be gone.
const CANCEL_DEADLINE: Duration = Duration::from_secs(60);

/// How long things are kept.
#[derive(Clone, Copy, Debug)]
pub struct Lifetimes {
    /// How long a transfer runs, or what a failed or earlier one left is kept, with nobody attached.
    pub abandoned: Duration,
    /// How long the end of a transfer is remembered.
    pub remembered: Duration,
}

impl Default for Lifetimes {
    fn default() -> Self {
        Self { abandoned: Duration::from_secs(120), remembered: Duration::from_secs(600) }
    }
}

/// Why a transfer cannot be started or attached to.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The transfer of that name imports something else.
    #[error("transfer_id {0:?}: the transfer of that name imports {1}")]
    Another(String, String),
    /// Too many transfers.
    #[error("{KNOWN} transfers are under way; try again when some have ended")]
    Full,
    /// The agent is being stopped.
    #[error("the agent is stopping")]
    Stopping,
}

/// The transfers of this agent.
pub struct Imports {
    context: Arc<Context>,
    lifetimes: Lifetimes,
    transfers: Mutex<HashMap<TransferId, Arc<Transfer>>>,
    slots: Arc<Semaphore>,
    tasks: TaskTracker,
    stop: CancellationToken,
    started: Instant,
}

impl Imports {
    /// No transfers yet. What earlier agents left is taken up by those who attach, or removed by [`Self::sweep`].
    pub fn new(context: Context, lifetimes: Lifetimes) -> Self {
        Self {
            context: Arc::new(context),
            lifetimes,
            transfers: Mutex::default(),
            slots: Arc::new(Semaphore::new(RUNNING)),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            started: Instant::now(),
        }
    }

    /// The node's containerd.
    pub fn containerd(&self) -> &dyn containerd::Containerd {
        self.context.containerd.as_ref()
    }

    /// The same, to be kept.
    pub fn shared_containerd(&self) -> Arc<dyn containerd::Containerd> {
        self.context.containerd.clone()
    }

    /// What the transfers under way bring.
    pub fn underway(&self) -> &Underway {
        &self.context.underway
    }

    /// Whether a transfer that has not ended brings this image.
    pub fn is_moving(&self, digest: &Digest) -> bool {
        self.lock().values().any(|transfer| !transfer.has_ended() && transfer.wanted().digest == *digest)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TransferId, Arc<Transfer>>> {
        self.transfers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a transfer, or attaches to it; the sources replace those it had. One that failed but may succeed
    /// is started again, with the bytes that it had got; the end of another is told again.
    pub fn attach(&self, request: ImportRequest) -> Result<Attached, AttachError> {
        if self.stop.is_cancelled() {
            return Err(AttachError::Stopping);
        }
        let mut transfers = self.lock();
        if let Some(known) = transfers.get(&request.id) {
            if *known.wanted() != request.wanted {
                let wanted = known.wanted();
                let what = format!("{} as {}", wanted.digest, wanted.reference);
                return Err(AttachError::Another(request.id.as_str().to_owned(), what));
            }
            if !known.may_start_again() {
                known.replace(request.sources, request.restriction);
                return Ok(Attached::new(known.clone()));
            }
        } else if transfers.len() >= KNOWN {
            let ended = transfers.iter().find(|(_, transfer)| transfer.has_ended() && !transfer.is_kept());
            let Some(id) = ended.map(|(id, _)| id.clone()) else { return Err(AttachError::Full) };
            transfers.remove(&id);
        }
        let transfer = Arc::new(Transfer::new(request));
        transfers.insert(transfer.id().clone(), transfer.clone());
        let attached = Attached::new(transfer.clone());
        drop(transfers);
        let (context, slots, stop) = (self.context.clone(), self.slots.clone(), self.stop.clone());
        self.tasks.spawn(async move { transfer.drive(&context, &slots, &stop).await });
        Ok(attached)
    }

    /// Ends a transfer and removes what it, or an earlier agent's transfer of that name, left. Tells whether
    /// there was anything.
    pub async fn cancel(&self, id: &TransferId) -> Result<bool, containerd::Error> {
        let known = self.lock().get(id).cloned();
        if let Some(transfer) = &known {
            transfer.cancel("cancelled");
            let ended = tokio::time::timeout(CANCEL_DEADLINE, transfer.ended()).await;
            if ended.is_err() {
                let message = "the transfer is still ending; it will be cleaned up".to_owned();
                return Err(containerd::Error::Unavailable(message));
            }
            transfer.forget_kept();
        }
        let left = transfer::clean(self.context.containerd.as_ref(), id.as_str()).await?;
        let mut transfers = self.lock();
        if let Some(transfer) = &known
            && transfers.get(id).is_some_and(|now| Arc::ptr_eq(now, transfer))
        {
            transfers.remove(id);
        }
        Ok(known.is_some() || left)
    }

    /// Ends transfers that nobody has attached to for long, forgets old ones, removes what earlier agents
    /// left and nobody came back for. To be called every few seconds.
    pub async fn sweep(&self) -> Result<(), containerd::Error> {
        let Lifetimes { abandoned, remembered } = self.lifetimes;
        let alone: Vec<_> = {
            let mut transfers = self.lock();
            transfers.retain(|_, transfer| {
                !(transfer.has_ended() && !transfer.is_kept() && transfer.alone_for() > remembered)
            });
            transfers.values().filter(|transfer| transfer.alone_for() > abandoned).cloned().collect()
        };
        for transfer in alone {
            {
                let transfers = self.lock();
                let is_known = transfers.get(transfer.id()).is_some_and(|now| Arc::ptr_eq(now, &transfer));
                if !is_known || transfer.alone_for() <= abandoned {
                    continue; // Somebody came back for it, or it was started again.
                }
                if !transfer.has_ended() {
                    tracing::info!(
                        transfer = transfer.id().as_str(),
                        "nobody is attached; ending the transfer"
                    );
                    transfer.cancel("abandoned: nobody was attached to it");
                }
            }
            if transfer.is_kept() {
                transfer.clean_kept(self.context.containerd.as_ref()).await?;
            }
        }
        if self.started.elapsed() > abandoned { self.sweep_orphans().await } else { Ok(()) }
    }

    async fn sweep_orphans(&self) -> Result<(), containerd::Error> {
        let containerd = self.context.containerd.as_ref();
        for lease in containerd.leases().await? {
            let wanted = self.lock().iter().any(|(id, transfer)| {
                id.as_str() == lease.transfer && (!transfer.has_ended() || transfer.is_kept())
            });
            if !wanted {
                tracing::info!(lease = lease.id, transfer = lease.transfer, "removing what a transfer left");
                containerd.delete_lease(&lease.id).await?;
            }
        }
        // Leases hold ingests; only where none is left can one be without.
        if !containerd.ingests().await?.is_empty() && containerd.leases().await?.is_empty() {
            for digest in containerd.ingests().await? {
                if self.lock().values().all(|transfer| transfer.has_ended()) {
                    containerd.abort(&digest).await?;
                }
            }
        }
        Ok(())
    }

    /// Stops all transfers as they are, to be taken up again by the agent's next start.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}
