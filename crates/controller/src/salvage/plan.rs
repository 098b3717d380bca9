//! What to do next about one job.

use jiff::Timestamp;
use tote_api::Phase;
use tote_image::Digest;
use tote_rpc::v1::PullRecords;

use super::job::{Job, Run, Source};
use super::{Wanted, after};
use crate::access::Access;
use crate::detect::Consent;
use crate::resolve::{Missing, Question, Resolution, Why};
use crate::running::Meant;
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
        /// Why this.
        why: Why,
        /// Where it is to be had; empty if the target holds every blob, or has it unpacked.
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
    if let Some(step) = super::target::unfit(job, world) {
        return step;
    }
    if let Run::BackOff { until, .. } = &job.run
        && now < *until
    {
        sooner(again, *until);
        return Step::BackOff;
    }
    let found = look(job, wanted, world, now, again);
    match (&job.run, found) {
        (Run::Running { sources, .. }, Ok((_, _, available, _))) => reattach(sources, &available, world),
        // What it may not have, it may not get either: something was learnt meanwhile.
        (Run::Running { .. }, Err(Step::Wait { reason, message, cancel, access }))
            if cancel || access.is_some() =>
        {
            Step::Wait { reason, message, cancel: true, access }
        }
        (Run::Running { .. }, Err(_)) => Step::Keep,
        (_, Ok((digest, why, sources, access))) => Step::Ready { digest, why, sources, access },
        (_, Err(step)) => step,
    }
}

pub(super) fn wait(reason: &'static str, message: String) -> Step {
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
) -> Result<(Digest, Why, Vec<Source>, Access), Step> {
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
    let question = Question {
        reference: &wanted.reference,
        pin: pin.as_ref(),
        target: &job.spec.node_name,
        source: only,
        workload: &Meant::new(),
    };
    match question.resolve(&world.fleet, world.tags) {
        Resolution::Found { digest, why, sources, on_target } => {
            if let Some((reason, why)) = world.refusal(&wanted.reference, &digest, &job.spec.node_name) {
                let message = format!("{} may not be salvaged: {why}", job.spec.image);
                return Err(Step::Wait { reason, message, cancel: true, access: None });
            }
            if wanted.pin.is_some()
                && wanted.reference.tag().is_some()
                && !world.may_mean(&wanted.reference, &digest)
            {
                // Or whoever may write jobs could give any image any name, on any node.
                let message = format!(
                    "no node has {digest} under a name of repository {}, so nothing shows that tag {} may mean it: name it by \
                     its digest in spec.image, {}",
                    wanted.reference.repository(),
                    wanted.reference.tag().unwrap_or_default(),
                    wanted.reference.pinned(digest.clone())
                );
                return Err(wait("DigestUnproven", message));
            }
            let sources = if on_target {
                Vec::new()
            } else {
                sources.iter().filter_map(|node| world.source(node)).collect()
            };
            let access = world.access(&job.namespace, &digest, &job.spec.node_name);
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
            Ok((digest, why, sources, access))
        }
        Resolution::Missing(missing) => Err(match only {
            Some(only) => from_only(only, &missing, &job.spec.image, world),
            None => wait(missing.reason(), missing.message(&job.spec.image)),
        }),
    }
}

/// What a job waits for whose one source (`spec.sourceNodeName`) does not have it.
fn from_only(source: &str, missing: &Missing, image: &str, world: &World) -> Step {
    if !world.nodes.contains_key(source) {
        return wait(
            "SourceNotFound",
            format!("there is no node {source} (spec.sourceNodeName): make a SalvageJob without it"),
        );
    }
    if !world.fleet.is_up(source) || world.is_runtime_down(source) {
        let who = if world.is_runtime_down(source) { "container runtime" } else { "agent" };
        return wait(
            "SourceUnavailable",
            format!("the {who} on node {source} (spec.sourceNodeName) does not answer"),
        );
    }
    match missing {
        Missing::Nowhere { digest } => {
            let digest = digest.as_ref().map(|digest| format!(" ({digest})")).unwrap_or_default();
            wait("NoSource", format!("node {source} (spec.sourceNodeName) does not hold {image}{digest}"))
        }
        other => wait(other.reason(), other.message(image)),
    }
}

/// A transfer gets a new list when one of its sources is gone or moved: first those that it keeps, for they were
/// chosen by load. One that took from a relay that is gone has the others.
fn reattach(given: &[Source], available: &[Source], world: &World) -> Step {
    if given.is_empty() || available.is_empty() {
        // With nothing to move from, a new list would only take away what the agent may still be reading.
        return if given.is_empty() && !available.is_empty() {
            Step::Attach { sources: available.to_vec() }
        } else {
            Step::Keep
        };
    }
    // Not by what else is said of it: that changes with every cordon.
    let is_among = |source: &Source, list: &[Source]| {
        list.iter().any(|other| (&other.node, &other.address) == (&source.node, &source.address))
    };
    // One that is getting the image itself does not hold it yet. How its transfer goes the agent sees.
    let relays: Vec<Source> = given
        .iter()
        .filter(|source| {
            source.relay && world.source(&source.node).is_some_and(|now| now.address == source.address)
        })
        .cloned()
        .collect();
    let lost = given.iter().any(|source| !is_among(source, available) && !is_among(source, &relays));
    if !lost {
        return Step::Keep;
    }
    let others = available.iter().filter(|source| !is_among(source, &relays)).cloned();
    let others =
        others.map(|source| Source { last_resort: source.last_resort || !relays.is_empty(), ..source });
    let (kept, others): (Vec<Source>, Vec<Source>) = others.partition(|source| is_among(source, given));
    Step::Attach { sources: relays.into_iter().chain(kept).chain(others).collect() }
}

/// `5.0 MiB from a, b`, for messages.
pub(super) fn moved(transferred: i64, source_nodes: &[String]) -> String {
    match (transferred, source_nodes) {
        (0, _) | (_, []) => "nothing had to be moved".to_owned(),
        (n, nodes) => format!("{} moved from {}", text::bytes(n), text::list(nodes)),
    }
}
