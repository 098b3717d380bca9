//! How a job's status reads. Conditions keep the time of their last transition.

use std::fmt::Display;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use tote_api::names::condition;
use tote_api::{Phase, SalvageJobStatus, Transfer};
use tote_image::Digest;

use super::job::{Job, Progress, Wanted};
use crate::access::Access;
use crate::resolve::Why;
use crate::text;

/// The longest message of a condition, in bytes: that of an event's note, which says the same (metav1.Condition allows
/// 32 KiB; a screen does not).
const MAX_MESSAGE: usize = text::MAX_NOTE;

/// The reason while layers are being unpacked, and nothing moves any more.
pub const UNPACKING: &str = "Unpacking";

/// The most bytes of the names of nodes that lied.
const MAX_LIARS: usize = 600;

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
    let with_liars = failed_message(job, phase, reason, message);
    let message = with_liars.as_deref().unwrap_or(message);
    let suspended = matches!(reason, "Suspended" | "Disabled");
    let status = &mut job.status;
    status.observed_generation = Some(job.generation);
    if phase == Phase::Pending && !suspended {
        if before != Some(Phase::Pending) || status.pending_time.is_none() {
            // A job that was never written waits since it was made.
            let is_new = find(status, condition::IMPORTED).is_none();
            let since = if is_new { job.created } else { now };
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
            // It may say already why it is this one.
            let known = find(status, condition::RESOLVED).filter(|c| c.message.contains(digest.as_str()));
            let message = known.map_or_else(
                || format!("the image is {digest}{}", by_spec(&job.wanted)),
                |c| c.message.clone(),
            );
            set(status, condition::RESOLVED, "True", "Resolved", &message, now);
        }
        (None, "AmbiguousTag" | "NoSource" | "IncompleteOnly" | "OtherPlatformOnly" | "InvalidImage") => {
            set(status, condition::RESOLVED, "False", reason, message, now);
        }
        // Why it failed may have been just that.
        (None, _) if phase == Phase::Failed && find(status, condition::RESOLVED).is_some() => {}
        (None, _) => set(status, condition::RESOLVED, "Unknown", "NotYet", "not looked up yet", now),
    }
    set(status, condition::IMPORTED, imported, reason, message, now);
    set(status, condition::READY, imported, reason, message, now);
    set(status, condition::RECONCILING, reconciling, reason, message, now);
    set(status, condition::STALLED, stalled, reason, message, now);
}

/// Notes what the image is, and why.
pub fn resolved(job: &mut Job, digest: &Digest, why: Why, now: Timestamp) {
    let text = digest.to_string();
    if job.status.digest.as_ref() == Some(&text) {
        return;
    }
    let words = why.words().map_or_else(|| by_spec(&job.wanted).to_owned(), |words| format!(", {words}"));
    let message = format!("the image is {digest}{words}");
    set(&mut job.status, condition::RESOLVED, "True", "Resolved", &message, now);
    job.status.digest = Some(text);
}

/// Where a digest is from that was not found out, for a person.
fn by_spec(wanted: &Result<Wanted, String>) -> &'static str {
    match wanted {
        Ok(wanted) if wanted.pin.is_some() => ", by spec.digest",
        Ok(wanted) if wanted.reference.digest().is_some() => ", by spec.image",
        _ => "",
    }
}

/// Notes whether the namespace may have the image, and how that is known.
pub fn access(job: &mut Job, access: Access, message: &str, now: Timestamp) {
    let value = match access {
        Access::EveryPod | Access::Named | Access::Runs => "True",
        Access::NotAsked | Access::Unrecorded => "Unknown",
        Access::Unproven { .. } | Access::Untold { .. } => "False",
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

/// Notes that all has been moved and layers are being unpacked, of which no count tells.
pub fn unpacking(job: &mut Job, now: Timestamp) {
    let image = text::image(&job.spec.image, job.status.digest.as_deref().unwrap_or_default());
    let node = &job.spec.node_name;
    let message = format!("all blobs are on node {node}, which is unpacking layers of {image}");
    enter(job, Phase::Transferring, UNPACKING, &message, now);
}

/// Words for a job that is Imported. The image comes last: it is the one that can be long.
pub fn imported_message(job: &Job, progress: &Progress) -> String {
    let digest = job.status.digest.as_deref().unwrap_or_default();
    let moved = super::plan::moved(progress.transferred, &progress.source_nodes);
    let lied = lied(&progress.lying_nodes);
    format!("{digest} is on node {}, {moved}{lied}, as {}", job.spec.node_name, job.spec.image)
}

/// Words for a failed attempt, or the last one, if any attempt was lied to. That is said however long the rest is.
fn failed_message(job: &Job, phase: Phase, reason: &str, message: &str) -> Option<String> {
    let has_failed = phase == Phase::Failed || reason == "Retrying";
    if !has_failed || job.liars.is_empty() {
        return None;
    }
    let lied = lied(&job.liars.iter().collect::<Vec<_>>());
    let room = MAX_MESSAGE.saturating_sub(lied.len());
    Some(format!("{}{lied}", text::bounded(message, room)))
}

fn lied<T: Display>(nodes: &[T]) -> String {
    if nodes.is_empty() {
        return String::new();
    }
    let nodes = text::bounded(&text::list(nodes), MAX_LIARS);
    format!(" (wrong bytes came from {nodes}, and were thrown away)")
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tote_api::SalvageJobSpec;
    use tote_image::Digest;

    use super::*;
    use crate::fleet::NodeName;
    use crate::resolve::Missing;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    /// A job with the longest names that the CRD allows.
    fn long() -> Job {
        let image = format!("registry.test/{}", "i".repeat(1024 - "registry.test/".len()));
        let spec = SalvageJobSpec { image, node_name: "n".repeat(253), ..SalvageJobSpec::default() };
        Job::new("shop", "j", "u", Timestamp::UNIX_EPOCH, spec, None)
    }

    fn condition(job: &Job, type_: &str) -> Condition {
        find(&job.status, type_).cloned().unwrap()
    }

    fn fits(job: &Job) {
        for condition in &job.status.conditions {
            assert!(
                condition.message.len() <= 1024,
                "{}: {} bytes",
                condition.type_,
                condition.message.len()
            );
        }
    }

    #[test]
    fn messages_fit_a_kibibyte_though_five_thousand_nodes_disagree() {
        let nodes = |from: usize| -> Vec<NodeName> {
            (from..from + 1000).map(|n| format!("{n:0>253}").as_str().into()).collect()
        };
        let meanings: BTreeMap<Digest, Vec<NodeName>> =
            (0..5).map(|n| (Digest::sha256(&[n]), nodes(usize::from(n) * 1000))).collect();
        let mut job = long();
        let missing = Missing::Ambiguous { meanings };
        let message = missing.message(&job.spec.image) + &", and so on".repeat(100);
        assert!(message.len() > 1024, "{} bytes", message.len());
        enter(&mut job, Phase::Pending, missing.reason(), &message, Timestamp::UNIX_EPOCH);
        fits(&job);
        assert!(condition(&job, condition::RESOLVED).message.ends_with("..."));
        enter(
            &mut job,
            Phase::Failed,
            "PendingDeadlineExceeded",
            "still AmbiguousTag",
            Timestamp::UNIX_EPOCH,
        );
        let resolved = condition(&job, condition::RESOLVED);
        assert_eq!((resolved.status.as_str(), resolved.reason.as_str()), ("False", "AmbiguousTag"));
    }

    #[test]
    fn imported_names_digest_node_and_source_and_when_however_long_the_image() {
        let mut job = long();
        job.status.digest = Some(DIGEST.to_owned());
        let sources = vec!["worker-7".to_owned(), "s".repeat(253), "t".repeat(253)];
        let liars = vec!["worker-8".to_owned()];
        let done = Progress {
            total: 9,
            transferred: 9,
            reused: 0,
            source_nodes: sources,
            lying_nodes: liars,
            ..Progress::default()
        };
        let (began, ended) = (Timestamp::UNIX_EPOCH, Timestamp::from_second(60).unwrap());
        enter(&mut job, Phase::Transferring, "Transferring", "", began);
        progress(&mut job, &done);
        let message = imported_message(&job, &done);
        enter(&mut job, Phase::Imported, "Imported", &message, ended);
        fits(&job);
        for type_ in [condition::IMPORTED, condition::READY] {
            let told = condition(&job, type_);
            for part in
                [DIGEST, &job.spec.node_name, "worker-7", "9 B moved", "wrong bytes came from worker-8"]
            {
                assert!(told.message.contains(part), "{part} is not in {}", told.message);
            }
            assert_eq!((told.status.as_str(), told.last_transition_time.0), ("True", ended));
        }
        assert_eq!(job.status.source_nodes[0], "worker-7");
        assert_eq!(job.status.completion_time.as_ref().map(|time| time.0), Some(ended));
    }

    #[test]
    fn a_failure_names_who_lied_however_long_it_is() {
        let mut job = long();
        let (now, long) = (Timestamp::UNIX_EPOCH, "what went wrong. ".repeat(100));
        enter(&mut job, Phase::Failed, "DiskFull", &long, now);
        assert!(!condition(&job, condition::IMPORTED).message.contains("wrong bytes"));
        job.blame(vec!["worker-8".to_owned(), "n".repeat(253), "no node's name".to_owned()]);
        job.blame((0..1000).map(|n| format!("z{n}")).collect());
        for (phase, reason, named) in [
            (Phase::Transferring, "Retrying", true),
            (Phase::Transferring, "Transferring", false),
            (Phase::Failed, "DiskFull", true),
        ] {
            enter(&mut job, phase, reason, &long, now);
            fits(&job);
            let told = condition(&job, condition::IMPORTED).message;
            assert!(told.starts_with("what went wrong."), "{told}");
            assert!(!told.contains("no node's name"), "{told}");
            for part in ["wrong bytes came from ", "worker-8", " and 59 more", ", and were thrown away"] {
                assert_eq!(told.contains(part), named, "{reason}: {part} in {told}");
            }
        }
    }

    #[test]
    fn unpacking_is_said_with_its_node_however_long_the_image() {
        let mut job = long();
        job.status.digest = Some(DIGEST.to_owned());
        let (began, now) = (Timestamp::UNIX_EPOCH, Timestamp::from_second(60).unwrap());
        enter(&mut job, Phase::Transferring, "Transferring", "", began);
        unpacking(&mut job, now);
        fits(&job);
        assert_eq!((job.phase(), job.reason()), (Phase::Transferring, "Unpacking"));
        let told = condition(&job, condition::RECONCILING);
        assert_eq!((told.status.as_str(), told.last_transition_time.0), ("True", began));
        assert!(told.message.contains(&job.spec.node_name), "{}", told.message);
    }

    #[test]
    fn resolved_says_where_the_digest_is_from() {
        for (image, pin, says) in [
            (format!("x@{DIGEST}"), None, "by spec.image"),
            ("x:1".to_owned(), Some(DIGEST.to_owned()), "by spec.digest"),
            ("x:1".to_owned(), None, "the image is"),
        ] {
            let spec = SalvageJobSpec { image, digest: pin, ..SalvageJobSpec::default() };
            let mut job = Job::new("shop", "j", "u", Timestamp::UNIX_EPOCH, spec, None);
            job.status.digest = Some(DIGEST.to_owned());
            enter(&mut job, Phase::Pending, "Queued", "", Timestamp::UNIX_EPOCH);
            let resolved = condition(&job, condition::RESOLVED);
            assert_eq!(resolved.status, "True");
            assert!(
                resolved.message.contains(DIGEST) && resolved.message.contains(says),
                "{}",
                resolved.message
            );
        }
    }
}
