//! One transfer: who is attached, how it is driven to its end, and what is removed after it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::context::Context;
use super::failure::Failure;
use super::progress::{Imported, State, Tracker};
use super::relay::Relays;
use super::request::{ImportRequest, Source, TransferId, Wanted};
use super::run::Run;
use super::underway::Brings;
use crate::containerd::{self, Containerd, Lease};
use crate::kubelet::Restriction;

/// How often a run is repeated because containerd went away under it.
const RESTARTS: u32 = 5;

/// How long containerd is waited for.
const AWAY_DEADLINE: Duration = Duration::from_secs(60);

/// How long what a transfer left may take to be removed; what remains is swept later.
const CLEAN_DEADLINE: Duration = Duration::from_secs(30);

/// A transfer that runs or has ended.
pub(super) struct Transfer {
    id: TransferId,
    wanted: Wanted,
    sources: watch::Sender<Vec<Source>>,
    restriction: watch::Sender<Option<Restriction>>,
    max_bytes: Option<u64>,
    tracker: Tracker,
    cancel: CancellationToken,
    /// Set once nothing more will happen.
    over: CancellationToken,
    status: Mutex<Status>,
}

struct Status {
    attached: usize,
    /// When somebody was last attached.
    since: Instant,
    /// Why it was cancelled.
    reason: &'static str,
    /// The lease of its run, once that has begun.
    lease: Option<String>,
    /// Whether a failed transfer's lease stands, for it to be started again.
    kept: bool,
}

/// Someone who follows a transfer. Dropping it is leaving.
pub struct Attached {
    transfer: Arc<Transfer>,
    /// The transfer's state as it changes. Closed without an outcome if the agent stops.
    pub states: watch::Receiver<State>,
}

impl Attached {
    pub(super) fn new(transfer: Arc<Transfer>) -> Self {
        transfer.status().attached += 1;
        let states = transfer.tracker.subscribe();
        Self { transfer, states }
    }

    /// Resolves when the transfer does nothing more, with or without an outcome.
    pub fn over(&self) -> WaitForCancellationFutureOwned {
        self.transfer.over.clone().cancelled_owned()
    }
}

impl Attached {
    /// Whether the transfer does nothing more.
    pub fn is_over(&self) -> bool {
        self.transfer.has_ended()
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let mut status = self.transfer.status();
        status.attached -= 1;
        status.since = Instant::now();
    }
}

impl Transfer {
    pub(super) fn new(request: ImportRequest) -> Self {
        let ImportRequest { id, wanted, sources, restriction, max_bytes } = request;
        let status =
            Status { attached: 0, since: Instant::now(), reason: "cancelled", lease: None, kept: false };
        Self {
            id,
            wanted,
            sources: watch::Sender::new(sources),
            restriction: watch::Sender::new(restriction),
            max_bytes,
            tracker: Tracker::default(),
            cancel: CancellationToken::new(),
            over: CancellationToken::new(),
            status: Mutex::new(status),
        }
    }

    pub(super) fn id(&self) -> &TransferId {
        &self.id
    }

    pub(super) fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    /// What another attachment says; one that restricts nothing lifts no restriction.
    pub(super) fn replace(&self, sources: Vec<Source>, restriction: Option<Restriction>) {
        self.sources.send_replace(sources);
        if restriction.is_some() {
            self.restriction.send_replace(restriction);
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.over.is_cancelled()
    }

    pub(super) async fn ended(&self) {
        self.over.cancelled().await;
    }

    /// Whether it failed in a way that a new start may mend.
    pub(super) fn may_start_again(&self) -> bool {
        let outcome = self.tracker.state().outcome;
        self.has_ended()
            && outcome.is_some_and(|outcome| outcome.is_err_and(|failure| failure.is_retryable()))
    }

    pub(super) fn is_kept(&self) -> bool {
        self.status().kept
    }

    pub(super) fn forget_kept(&self) {
        self.status().kept = false;
    }

    /// Removes what it kept, and nothing that another run of the same transfer holds.
    pub(super) async fn clean_kept(&self, containerd: &dyn Containerd) -> Result<(), containerd::Error> {
        let lease = self.status().lease.clone();
        if let Some(lease) = lease {
            containerd.delete_lease(&lease).await?;
        }
        self.forget_kept();
        Ok(())
    }

    /// For how long nobody has been attached.
    pub(super) fn alone_for(&self) -> Duration {
        let status = self.status();
        if status.attached > 0 { Duration::ZERO } else { status.since.elapsed() }
    }

    pub(super) fn cancel(&self, reason: &'static str) {
        self.status().reason = reason;
        self.cancel.cancel();
    }

    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs the transfer to its end, or until `stop`, which leaves everything as it is.
    pub(super) async fn drive(&self, context: &Arc<Context>, slots: &Semaphore, stop: &CancellationToken) {
        let _over = self.over.clone().drop_guard();
        context.metrics.import_started();
        let brings = context.underway.begin(&self.wanted.digest, self.tracker.subscribe());
        let outcome = tokio::select! {
            biased;
            () = self.cancel.cancelled() => Err(Failure::Cancelled(self.status().reason)),
            () = stop.cancelled() => return context.metrics.import_ended("interrupted"),
            outcome = self.run(context, slots, &brings) => outcome,
        };
        let id = self.id.as_str();
        let keep = match &outcome {
            Ok(imported) => {
                tracing::info!(transfer = id, image = %self.wanted.reference, image_id = %imported.image_id, "imported");
                false
            }
            Err(failure) => {
                tracing::warn!(transfer = id, image = %self.wanted.reference, %failure, "the import failed");
                failure.is_retryable() && !matches!(failure, Failure::Cancelled(_))
            }
        };
        if !keep {
            let cleaning = tokio::time::timeout(CLEAN_DEADLINE, clean(context.containerd.as_ref(), id));
            if !matches!(cleaning.await, Ok(Ok(_))) {
                tracing::warn!(transfer = id, "what the transfer left could not be removed yet");
            }
        }
        context.metrics.import_ended(outcome.as_ref().map_or_else(Failure::label, |_| "imported"));
        self.status().kept = keep;
        self.status().since = Instant::now();
        self.tracker.end(outcome);
    }

    async fn run(
        &self,
        context: &Arc<Context>,
        slots: &Semaphore,
        brings: &Brings,
    ) -> Result<Imported, Failure> {
        let Ok(_slot) = slots.acquire().await else {
            return Err(Failure::Cancelled("ended: the agent is stopping"));
        };
        let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
        let transfer = self.id.as_str().to_owned();
        let lease = Lease { id: format!("tote-{transfer}-{nanos:x}"), transfer };
        self.status().lease = Some(lease.id.clone());
        let sources = self.sources.subscribe();
        let restriction = self.restriction.subscribe();
        let (wanted, max_bytes, tracker) = (&self.wanted, self.max_bytes, &self.tracker);
        let relays = Relays::default();
        let run = Run { context, wanted, sources, restriction, max_bytes, tracker, lease, brings, relays };
        let mut restarts = 0;
        loop {
            match run.import().await {
                Err(Failure::Away(reason)) if restarts < RESTARTS => {
                    restarts += 1;
                    tracing::warn!(
                        transfer = self.id.as_str(),
                        reason,
                        "containerd went away; waiting for it"
                    );
                    await_containerd(context.containerd.as_ref()).await?;
                }
                outcome => return outcome,
            }
        }
    }
}

async fn await_containerd(containerd: &dyn Containerd) -> Result<(), Failure> {
    let deadline = Instant::now() + AWAY_DEADLINE;
    let mut pause = Duration::from_millis(100);
    loop {
        tokio::time::sleep(pause).await;
        match containerd.facts().await {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() >= deadline => return Err(error.into()),
            Err(_) => pause = (pause * 2).min(Duration::from_secs(2)),
        }
    }
}

/// Deletes the leases of a transfer, and with them what nothing else holds. Tells whether there were any.
pub(super) async fn clean(containerd: &dyn Containerd, transfer: &str) -> Result<bool, containerd::Error> {
    let mut found = false;
    for lease in containerd.leases().await? {
        if lease.transfer == transfer {
            containerd.delete_lease(&lease.id).await?;
            found = true;
        }
    }
    Ok(found)
}
