//! What webhooks are told: when a wait is counted, and when a job ends. How it gets there is `notify`'s matter.

use jiff::Timestamp;
use tote_api::Phase;

use super::Action;
use crate::detect::{Wait, WaitingPod};
use crate::notify::{Notification, NotificationType};
use crate::salvage::{Job, status};

/// A pod waits.
pub(super) fn detected(pod: &WaitingPod, wait: &Wait, now: Timestamp) -> Action {
    let pin = wait.reference.as_ref().ok().and_then(|reference| reference.digest());
    notify(Notification {
        type_: NotificationType::Detected,
        pod_name: pod.name.to_string(),
        namespace: pod.namespace.to_string(),
        image_ref: wait.image.to_string(),
        digest: pin.map(ToString::to_string).unwrap_or_default(),
        source_node: String::new(),
        target_node: pod.node.to_string(),
        error: format!("{}: {}: {}", wait.class, wait.reason, wait.message),
        timestamp: now,
    })
}

/// A job is final; `pod` is one that waits for its image, empty if none does.
pub(super) fn ended(job: &Job, pod: &str, now: Timestamp) -> Action {
    let (type_, error) = match job.phase() {
        Phase::Failed => (NotificationType::SalvageFailed, status::message(&job.status)),
        _ => (NotificationType::Salvaged, ""),
    };
    notify(Notification {
        type_,
        pod_name: pod.to_owned(),
        namespace: job.namespace.to_string(),
        image_ref: job.spec.image.clone(),
        digest: job.status.digest.clone().unwrap_or_default(),
        source_node: job.status.source_nodes.join(","),
        target_node: job.spec.node_name.clone(),
        error: error.to_owned(),
        timestamp: now,
    })
}

fn notify(notification: Notification) -> Action {
    Action::Notify(Box::new(notification))
}
