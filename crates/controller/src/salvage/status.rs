//! How a job's status reads. Conditions keep the time of their last transition.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use tote_api::names::condition;
use tote_api::{Phase, SalvageJobStatus, Transfer};

use super::job::{Job, Progress};
use crate::access::Access;
use crate::text;

/// The longest message of a condition, in bytes (metav1.Condition allows 32 KiB; a screen does not).
const MAX_MESSAGE: usize = 2048;

/// The most names of pods in a status.
const MAX_PODS: usize = 10;

/// The message of condition Imported.
pub fn message(status: &SalvageJobStatus) -> &str {
    find(status, condition::IMPORTED).map_or("", |c| &c.message)
}

fn find<'a>(status: &'a SalvageJobStatus, type_: &str) -> Option<&'a Condition> {
    status.conditions.iter().find(|c| c.type_ == type_)
}

/// Sets a condition; its time changes only with its status.
fn set(status: &mut SalvageJobStatus, type_: &str, value: &str, reason: &str, message: &str, now: Timestamp) {
    let generation = status.observed_generation;
    let message = text::bounded(message, MAX_MESSAGE);
    let known = status.conditions.iter_mut().find(|c| c.type_ == type_);
    if let Some(known) = known {
        if known.status != value {
            known.last_transition_time = Time(now);
            value.clone_into(&mut known.status);
        }
        reason.clone_into(&mut known.reason);
        known.message = message;
        known.observed_generation = generation;
        return;
    }
    status.conditions.push(Condition {
        type_: type_.to_owned(),
        status: value.to_owned(),
        reason: reason.to_owned(),
        message,
        last_transition_time: Time(now),
        observed_generation: generation,
    });
}

/// Puts the job into `phase` for `reason`.
pub fn enter(job: &mut Job, phase: Phase, reason: &str, message: &str, now: Timestamp) {
    let before = job.status.phase;
    let suspended = matches!(reason, "Suspended" | "Disabled");
    let status = &mut job.status;
    status.observed_generation = Some(job.generation);
    if phase == Phase::Pending && !suspended {
        if before != Some(Phase::Pending) || status.pending_time.is_none() {
            // A job that was never written waits since it was made.
            let since = if status.conditions.is_empty() { job.created } else { now };
            status.pending_time = Some(Time(since));
        }
    } else {
        status.pending_time = None;
    }
    if suspended {
        status.start_time = None;
    }
    if phase == Phase::Transferring && status.start_time.is_none() {
        status.start_time = Some(Time(now));
    }
    if phase.is_final() && status.completion_time.is_none() {
        status.completion_time = Some(Time(now));
    }
    status.phase = Some(phase);
    let (imported, reconciling, stalled) = match phase {
        Phase::Imported => ("True", "False", "False"),
        Phase::Failed => ("False", "False", "True"),
        Phase::Pending | Phase::Transferring => ("False", "True", "False"),
    };
    match (&status.digest, reason) {
        (Some(digest), _) => {
            let digest = digest.clone();
            set(status, condition::RESOLVED, "True", "Resolved", &format!("the image is {digest}"), now);
        }
        (None, "AmbiguousTag" | "NoSource" | "InvalidImage") => {
            set(status, condition::RESOLVED, "False", reason, message, now);
        }
        (None, _) => set(status, condition::RESOLVED, "Unknown", "NotYet", "not looked up yet", now),
    }
    set(status, condition::IMPORTED, imported, reason, message, now);
    set(status, condition::READY, imported, reason, message, now);
    set(status, condition::RECONCILING, reconciling, reason, message, now);
    set(status, condition::STALLED, stalled, reason, message, now);
}

/// Notes whether the namespace may have the image, and how that is known.
pub fn access(job: &mut Job, access: Access, message: &str, now: Timestamp) {
    let value = match access {
        Access::EveryPod | Access::Named | Access::Runs => "True",
        Access::NotAsked | Access::Unrecorded => "Unknown",
        Access::Unproven { .. } => "False",
    };
    set(&mut job.status, condition::ACCESS_PROVEN, value, access.reason(), message, now);
}

/// Notes that the spec was seen as it is now, where nothing else changes: what watches (kstatus) waits for it.
pub fn observe(job: &mut Job) {
    let status = &mut job.status;
    if !status.conditions.is_empty() && status.observed_generation != Some(job.generation) {
        status.observed_generation = Some(job.generation);
        for condition in &mut status.conditions {
            condition.observed_generation = Some(job.generation);
        }
    }
}

/// Takes in how far the transfer is.
pub fn progress(job: &mut Job, progress: &Progress) {
    if !progress.source_nodes.is_empty() {
        job.status.source_nodes.clone_from(&progress.source_nodes);
    }
    job.status.transfer = Some(Transfer {
        total_bytes: progress.total,
        transferred_bytes: progress.transferred,
        reused_bytes: progress.reused,
    });
}

/// Words for a job that is Imported.
pub fn imported_message(job: &Job, progress: &Progress) -> String {
    let digest = job.status.digest.as_deref().unwrap_or_default();
    let moved = super::plan::moved(progress.transferred, &progress.source_nodes);
    format!("{} is on node {}: {moved}", text::image(&job.spec.image, digest), job.spec.node_name)
}

/// Notes that a pod was woken.
pub fn woke(job: &mut Job, pod: &str) {
    let pods = &mut job.status.pods;
    if pods.len() < MAX_PODS && !pods.iter().any(|known| known == pod) {
        pods.push(pod.to_owned());
    }
}

/// RFC 3339 with whole seconds, as Kubernetes writes times.
pub fn seconds(t: Timestamp) -> String {
    Timestamp::from_second(t.as_second()).unwrap_or(t).to_string()
}
