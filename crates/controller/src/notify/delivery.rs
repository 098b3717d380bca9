//! The queue of notifications: one after the other, each until it is taken or given up. Whoever notifies never waits.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::receiver::Refused;
use super::{Notification, NotificationType, Receiver};
use crate::backoff::Backoff;
use crate::http::Health;

/// The bounds of delivery.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// How many notifications may wait. One that comes when the queue is full is dropped: what happened first is closer
    /// to the cause.
    pub queue: usize,
    /// How long one attempt may take.
    pub deadline: Duration,
    /// How often one notification is tried.
    pub attempts: u32,
    /// The pause after the first failure; it doubles.
    pub first_pause: Duration,
    /// The longest pause.
    pub last_pause: Duration,
    /// The longest pause that a receiver may ask for (`Retry-After`).
    pub longest_request: Duration,
}

impl Default for Pace {
    /// Six attempts within a minute of pauses.
    fn default() -> Self {
        Self {
            queue: 256,
            deadline: Duration::from_secs(10),
            attempts: 6,
            first_pause: Duration::from_secs(2),
            last_pause: Duration::from_secs(30),
            longest_request: Duration::from_secs(60),
        }
    }
}

/// Takes notifications; of clones, all feed one queue.
#[derive(Clone)]
pub struct Notifier {
    queue: mpsc::Sender<Notification>,
    types: Arc<BTreeSet<NotificationType>>,
    health: Arc<Health>,
}

impl fmt::Debug for Notifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Notifier").field("types", &self.types).finish_non_exhaustive()
    }
}

/// The task that sends.
pub struct Delivery {
    task: JoinHandle<()>,
    closing: CancellationToken,
}

impl Notifier {
    /// Begins to deliver what is of these types.
    pub fn start(
        receiver: Receiver,
        types: BTreeSet<NotificationType>,
        pace: Pace,
        health: Arc<Health>,
    ) -> (Self, Delivery) {
        let (queue, incoming) = mpsc::channel(pace.queue);
        health.metrics.notifications(types.iter().copied());
        let closing = CancellationToken::new();
        let task = tokio::spawn(deliver(incoming, receiver, pace, closing.clone(), health.clone()));
        (Self { queue, types: Arc::new(types), health }, Delivery { task, closing })
    }

    /// Queues a notification, or drops it: at once in either case.
    pub fn notify(&self, notification: Notification) {
        let type_ = notification.type_;
        if !self.types.contains(&type_) {
            return;
        }
        if let Err(TrySendError::Full(_) | TrySendError::Closed(_)) = self.queue.try_send(notification) {
            tracing::warn!(r#type = type_.name(), "a notification is dropped: too many wait");
            self.health.metrics.notification(type_, "dropped");
        }
    }
}

impl Delivery {
    /// Takes no more, and gives what is queued this long, with one attempt for each.
    pub async fn drain(mut self, limit: Duration) {
        self.closing.cancel();
        if timeout(limit, &mut self.task).await.is_err() {
            tracing::warn!("not every notification was sent before the end");
            self.task.abort();
        }
    }
}

async fn deliver(
    mut queue: mpsc::Receiver<Notification>,
    receiver: Receiver,
    pace: Pace,
    closing: CancellationToken,
    health: Arc<Health>,
) {
    loop {
        let notification = tokio::select! {
            biased;
            () = closing.cancelled(), if !queue.is_closed() => {
                queue.close();
                continue;
            }
            next = queue.recv() => next,
        };
        let Some(notification) = notification else { return };
        let type_ = notification.type_;
        let result = match send(&notification, &receiver, &pace, &closing).await {
            Ok(()) => "sent",
            Err(error) => {
                tracing::warn!(r#type = type_.name(), namespace = notification.namespace,
                    pod = notification.pod_name, receiver = receiver.origin(), %error, "a notification is given up");
                "failed"
            }
        };
        health.metrics.notification(type_, result);
    }
}

async fn send(
    notification: &Notification,
    receiver: &Receiver,
    pace: &Pace,
    closing: &CancellationToken,
) -> Result<(), Refused> {
    let seed = format!("{} {}", notification.timestamp, notification.pod_name);
    let mut pauses = Backoff::new(pace.first_pause, pace.last_pause, &seed);
    let mut attempt = 1;
    loop {
        let answer = timeout(pace.deadline, receiver.post(notification)).await;
        let error = match answer {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error,
            Err(_) => Refused::for_now(format!("the receiver did not answer within {:?}", pace.deadline)),
        };
        if !error.retryable || attempt >= pace.attempts || closing.is_cancelled() {
            return Err(error);
        }
        tracing::debug!(attempt, %error, "a notification was not taken");
        attempt += 1;
        let asked = error.retry_after.unwrap_or_default().min(pace.longest_request);
        tokio::select! {
            () = tokio::time::sleep(pauses.pause().max(asked)) => {}
            () = closing.cancelled() => {}
        }
    }
}
