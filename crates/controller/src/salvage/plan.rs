//! What to do next about one job.

use jiff::Timestamp;
use tote_api::Phase;
use tote_image::Digest;
use tote_rpc::v1::PullRecords;

use super::job::{Job, Run, Source};
use super::{Wanted, after};
use crate::access::Access;
use crate::detect::Consent;
use crate::resolve::{Missing, Resolution, resolve};
use crate::text;
use crate::world::World;

/// Defaults of the spec.
const ACTIVE_DEADLINE: i64 = 3600;

/// The next step of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Final, or going: nothing.
    Rest,
    /// Pending, for a reason; `cancel` says that a transfer under way must end.
    Wait {
        /// CamelCase.
        reason: &'static str,
        /// For a person.
        message: String,
        /// Whether its transfer must end.
        cancel: bool,
        /// Set where that is what is missing.
        access: Option<Access>,
    },
    /// The next attempt is due later.
    BackOff,
    /// It can start as soon as it has a slot.
    Ready {
        /// What to move.
        digest: Digest,
        /// Where it is to be had; empty if the target holds every blob.
        sources: Vec<Source>,
        /// Why the namespace may have it.
        access: Access,
    },
    /// Its transfer runs as it should.
    Keep,
    /// Its transfer runs and should get other sources.
    Attach {
        /// All that can be used now.
        sources: Vec<Source>,
    },
    /// Give up.
    Fail {
        /// CamelCase.
        reason: &'static str,
        /// For a person.
        message: String,
    },
    /// Delete it: its time after the end is over.
    Expire,
}

/// A step, and when to ask again although nothing else happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What to do.
    pub step: Step,
    /// When time alone changes the answer.
    pub again: Option<Timestamp>,
}

/// Decides over `job`.
pub fn plan(job: &Job, world: &World, now: Timestamp) -> Plan {
    let mut again = None;
    let mut step = decide(job, world, now, &mut again);
    if matches!(step, Step::Wait { cancel: false, .. })
        && let Some(at) = world.first_settled(now)
    {
        // What is missing may only not have been heard of yet.
        sooner(&mut again, at);
        step = Step::Keep;
    }
    Plan { step, again }
}

fn decide(job: &Job, world: &World, now: Timestamp, again: &mut Option<Timestamp>) -> Step {
    if job.terminating {
        return Step::Rest;
    }
    if job.phase().is_final() {
        return expire(job, now, again);
    }
    // What stops the clocks comes before them, a namespace's refusal after.
    if let Some(step) = held(job, world).or_else(|| overdue(job, now, again)).or_else(|| refused(job, world))
    {
        return step;
    }
    let wanted = match &job.wanted {
        Ok(wanted) => wanted,
        Err(message) => return Step::Fail { reason: "InvalidImage", message: message.clone() },
    };
    let node = &*job.spec.node_name;
    match world.nodes.get(node) {
        None => {
            let message = match job.status.node_uid {
                None => format!("there is no node {node}: the job waits for one of that name"),
                Some(_) => {
                    format!("node {node} is gone; one that comes under its name needs a new SalvageJob")
                }
            };
            return wait("NodeNotFound", message);
        }
        Some(uid) if job.status.node_uid.as_ref().is_some_and(|known| **known != **uid) => {
            return Step::Fail {
                reason: "NodeReplaced",
                message: format!(
                    "node {node} is not the one that the job was made for: make a new SalvageJob"
                ),
            };
        }
        Some(_) => {}
    }
    let Some(target) = world.fleet.node(node) else {
        return wait("TargetUnavailable", format!("the agent on node {node} does not answer"));
    };
    if !target.problem.is_empty() {
        return wait("TargetNotUsable", format!("node {node} cannot take images: {}", target.problem));
    }
    if let Run::BackOff { until, .. } = &job.run
        && now < *until
    {
        sooner(again, *until);
        return Step::BackOff;
    }
    let found = look(job, wanted, world, now, again);
    match (&job.run, found) {
        (Run::Running { sources, .. }, Ok((_, available, _))) => reattach(sources, &available),
        (Run::Running { .. }, Err(_)) => Step::Keep,
        (_, Ok((digest, sources, access))) => Step::Ready { digest, sources, access },
        (_, Err(step)) => step,
    }
}

fn wait(reason: &'static str, message: String) -> Step {
    Step::Wait { reason, message, cancel: false, access: None }
}

fn sooner(again: &mut Option<Timestamp>, at: Timestamp) {
    *again = Some(again.map_or(at, |known| known.min(at)));
}

fn expire(job: &Job, now: Timestamp, again: &mut Option<Timestamp>) -> Step {
    let (Some(ttl), Some(ended)) = (job.spec.ttl_seconds_after_finished, &job.status.completion_time) else {
        return Step::Rest;
    };
    let due = after(ended.0, ttl);
    if due <= now {
        return Step::Expire;
    }
    sooner(again, due);
    Step::Rest
}

/// Held by a switch, for as long as it is.
fn held(job: &Job, world: &World) -> Option<Step> {
    let (reason, message) = if !world.enabled {
        ("Disabled", "salvage is switched off: config.enabled is false in the chart's values")
    } else if job.spec.suspend == Some(true) {
        ("Suspended", "spec.suspend is true")
    } else {
        return None;
    };
    Some(Step::Wait { reason, message: message.to_owned(), cancel: true, access: None })
}

/// Not allowed in its namespace.
fn refused(job: &Job, world: &World) -> Option<Step> {
    let namespace = &job.namespace;
    let (reason, message) = match world.consent(namespace) {
        Consent::Given => return None,
        Consent::Denied => ("NamespaceDenied", format!("nothing is ever salvaged in namespace {namespace}")),
        Consent::NotGiven => (
            "NamespaceNotAllowed",
            format!(
                "namespace {namespace} is not opted in: kubectl annotate namespace {namespace} {}=true",
                tote_api::names::ALLOW
            ),
        ),
        Consent::Terminating => ("NamespaceTerminating", format!("namespace {namespace} is being deleted")),
    };
    Some(Step::Wait { reason, message, cancel: true, access: None })
}

fn overdue(job: &Job, now: Timestamp, again: &mut Option<Timestamp>) -> Option<Step> {
    if let Some(started) = &job.status.start_time {
        let seconds = job.spec.active_deadline_seconds.unwrap_or(ACTIVE_DEADLINE);
        let due = after(started.0, seconds);
        if due <= now {
            let message = format!("not done {seconds} s after it began (spec.activeDeadlineSeconds)");
            return Some(Step::Fail { reason: "DeadlineExceeded", message });
        }
        sooner(again, due);
    }
    if job.phase() == Phase::Pending
        && let (Some(seconds), Some(since)) = (job.spec.pending_deadline_seconds, &job.status.pending_time)
    {
        let due = after(since.0, seconds);
        if due <= now {
            let message = format!(
                "still {} after {seconds} s (spec.pendingDeadlineSeconds): {}",
                job.reason(),
                super::status::message(&job.status)
            );
            return Some(Step::Fail { reason: "PendingDeadlineExceeded", message });
        }
        sooner(again, due);
    }
    None
}

/// What to move and from where, or what the job waits for.
fn look(
    job: &Job,
    wanted: &Wanted,
    world: &World,
    now: Timestamp,
    again: &mut Option<Timestamp>,
) -> Result<(Digest, Vec<Source>, Access), Step> {
    let pin = job.digest();
    if pin.is_none()
        && let Some(at) = world.unsettled_until(now)
    {
        sooner(again, at);
        return Err(wait(
            "Resolving",
            "waiting for the agents, to ask all of them what the tag means".to_owned(),
        ));
    }
    let only = job.spec.source_node_name.as_deref();
    match resolve(&wanted.reference, pin.as_ref(), &job.spec.node_name, only, &world.fleet) {
        Resolution::Found { digest, sources, on_target } => {
            let sources = if on_target {
                Vec::new()
            } else {
                sources.iter().filter_map(|node| world.source(node)).collect()
            };
            let access = world.access(&job.namespace, &digest, false);
            if !access.is_given() {
                let message = access.message(&job.namespace);
                return Err(Step::Wait {
                    reason: access.reason(),
                    message,
                    cancel: false,
                    access: Some(access),
                });
            }
            if let Some(at) = world.first_settled(now)
                && access != Access::NotAsked
                && !job.has_begun()
            {
                // A node that has not been heard of yet may restrict the image.
                sooner(again, at);
                return Err(wait(
                    "Resolving",
                    "waiting for the agents, to ask all of them who may have it".to_owned(),
                ));
            }
            let node = &*job.spec.node_name;
            if access.travels()
                && world.fleet.node(node).is_some_and(|n| n.records == PullRecords::Unspecified)
            {
                let message = format!(
                    "the agent on node {node} cannot write down for kubelet who may have this image: it is older than \
                     the controller, or runs without --kubelet-dir (agent.kubeletDir)"
                );
                return Err(wait("TargetNotUsable", message));
            }
            Ok((digest, sources, access))
        }
        Resolution::Missing(Missing::Nowhere { digest }) if only.is_some() => {
            let (source, image) = (only.unwrap_or_default(), &job.spec.image);
            let digest = digest.map(|digest| format!(" ({digest})")).unwrap_or_default();
            Err(if world.fleet.is_up(source) {
                wait("NoSource", format!("node {source} (spec.sourceNodeName) does not hold {image}{digest}"))
            } else {
                wait(
                    "SourceUnavailable",
                    format!("the agent on node {source} (spec.sourceNodeName) does not answer"),
                )
            })
        }
        Resolution::Missing(missing) => Err(wait(missing.reason(), missing.message(&job.spec.image))),
    }
}

/// A transfer gets a new list when one of its sources is gone or moved: first those that it keeps, for they were
/// chosen by load.
fn reattach(given: &[Source], available: &[Source]) -> Step {
    if given.is_empty() || available.is_empty() {
        // With nothing to move from, a new list would only take away what the agent may still be reading.
        return if given.is_empty() && !available.is_empty() {
            Step::Attach { sources: available.to_vec() }
        } else {
            Step::Keep
        };
    }
    let lost = given.iter().any(|source| !available.contains(source));
    if !lost {
        return Step::Keep;
    }
    let (kept, others): (Vec<Source>, Vec<Source>) =
        available.iter().cloned().partition(|source| given.contains(source));
    Step::Attach { sources: kept.into_iter().chain(others).collect() }
}

/// `5.0 MiB from a, b`, for messages.
pub(super) fn moved(transferred: i64, source_nodes: &[String]) -> String {
    match (transferred, source_nodes) {
        (0, _) | (_, []) => "nothing had to be moved".to_owned(),
        (n, nodes) => format!("{} moved from {}", text::bytes(n), text::list(nodes)),
    }
}
