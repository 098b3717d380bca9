//! What to do about jobs: start, attach, cancel, finish, delete.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tote_api::Phase;
use tote_image::{Digest, Reference};
use tote_rpc::v1::PullRecords;

use super::{Action, Count, State, TransferEvent, sooner};
use crate::access::travelling;
use crate::backoff::delay;
use crate::detect::{Wait, WaitingPod};
use crate::fleet::NodeName;
use crate::salvage::{
    Agent, Assignment, Demand, Job, MAX_HELD_BY, Progress, Run, Source, Step, Turn, after, plan, schedule,
    status,
};
use crate::text;
use crate::world::World;

/// Between two attempts of a job: 1, 2, 4, ... s.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);

/// Default of `spec.backoffLimit`.
const BACKOFF_LIMIT: i32 = 6;

/// Before a job's progress is written for the first time, in seconds.
const FIRST_PROGRESS_SECONDS: i64 = 1;

/// For how many seconds nobody must have waited for a pending job of detection before it is deleted.
const UNWANTED_SECONDS: i64 = 10;

impl State {
    pub(super) fn apply_transfer(&mut self, uid: &str, stream: u64, event: TransferEvent, now: Timestamp) {
        let Some((job, book)) = self.jobs.get_mut(uid) else { return };
        if !matches!(job.run, Run::Running { stream: own, .. } if own == stream) {
            return;
        }
        match event {
            TransferEvent::Progress(progress) => {
                job.lost = 0;
                book.unpacking = progress.is_unpacking.then(|| book.unpacking.unwrap_or(now));
                let progress = job.in_all(progress);
                status::progress(job, &progress);
            }
            TransferEvent::Done(progress) => {
                let took = job.status.start_time.as_ref().map_or(Duration::ZERO, |began| {
                    Duration::try_from(now.duration_since(began.0)).unwrap_or_default()
                });
                let progress = job.in_all(progress);
                finish(job, &progress, now);
                let moved = u64::try_from(progress.transferred).unwrap_or(0);
                self.actions.push(Action::Count(Count::Success(took, moved)));
            }
            TransferEvent::Failed { reason, message, retryable, lying_nodes } => {
                job.blame(lying_nodes);
                let limit = job.spec.backoff_limit.unwrap_or(BACKOFF_LIMIT);
                let attempts = job.status.attempts;
                job.fresh = true;
                if let Run::Running { sources, .. } = &job.run {
                    job.tried.extend(sources.iter().map(|source| source.node.clone()));
                }
                if retryable && attempts <= limit {
                    let failures = u32::try_from(attempts).unwrap_or(1);
                    let pause = pause(job, failures, now);
                    let message =
                        format!("attempt {attempts} of {} failed: {message}", limit.saturating_add(1));
                    job.run = Run::BackOff { until: pause, message };
                } else {
                    let (reason, message) = if retryable {
                        let message =
                            format!("{attempts} attempts failed (spec.backoffLimit), the last: {message}");
                        ("BackoffLimitExceeded", message)
                    } else {
                        (reason, message)
                    };
                    self.fail(uid, reason, &message, now);
                }
            }
            TransferEvent::Lost { message } => {
                job.lost = job.lost.saturating_add(1);
                if job.lost > 1
                    && let Run::Running { sources, .. } = &job.run
                {
                    // Perhaps none of them lets it read.
                    job.tried.extend(sources.iter().map(|source| source.node.clone()));
                }
                let until = pause(job, job.lost, now);
                job.run = Run::BackOff { until, message: format!("attaching again: {message}") };
            }
        }
    }

    fn fail(&mut self, uid: &str, reason: &str, message: &str, now: Timestamp) {
        let Some((job, _)) = self.jobs.get_mut(uid) else { return };
        if job.status.attempts > 0 {
            // Also after a failed attempt: the agent keeps what it got, for another one.
            self.actions.push(cancel(job));
        }
        job.run = Run::Idle;
        let digest = job.digest();
        job.held_by = digest.map(|digest| {
            let holders = self.world.fleet.holders(&digest, None);
            holders.into_keys().take(MAX_HELD_BY).collect()
        });
        status::enter(job, Phase::Failed, reason, message, now);
        self.actions.push(Action::Count(Count::Failure));
        self.tell_failure(uid, now);
    }

    pub(super) fn decide_jobs(&mut self, now: Timestamp, again: &mut Option<Timestamp>) {
        let waited = self.wanted(now);
        let mut demands: Vec<Demand> = Vec::new();
        let mut running: Vec<Assignment> = Vec::new();
        let uids: Vec<Arc<str>> = self.jobs.keys().cloned().collect();
        for uid in &uids {
            if let Some(demand) = self.step(uid, now, again) {
                demands.push(demand);
            } else {
                running.extend(self.assignment(uid, now));
            }
        }
        let turns = schedule(&demands, &running, self.policy.limits);
        for (demand, turn) in demands.into_iter().zip(turns) {
            match turn {
                Turn::Start(sources) => self.start(&demand.origin, &demand.digest, sources, now),
                Turn::Queued(what) => {
                    if let Some((job, _)) = self.jobs.get_mut(&demand.origin) {
                        // What exactly it waits for may change with every transfer that ends: not worth a write each.
                        if job.phase() == Phase::Pending && job.reason() == "Queued" {
                            status::observe(job);
                        } else {
                            status::enter(job, Phase::Pending, "Queued", &format!("waits for {what}"), now);
                        }
                    }
                }
            }
        }
        for uid in &uids {
            self.drop_if_unwanted(uid, &waited, now, again);
            self.tell_transition(uid, now);
            self.write(uid, now, again);
        }
    }

    /// What pods wait for that may be salvaged for them.
    fn wanted(&self, now: Timestamp) -> HashSet<(Arc<str>, String, Reference)> {
        let pods = self.pods.values().map(|entry| &entry.pod).filter(|pod| self.is_opted_in(pod));
        let waits = pods.flat_map(|pod| pod.waits.iter().map(move |wait| (pod, wait)));
        let allowed = waits.filter(|(pod, wait)| {
            let class = self.secrets.class_of(pod, wait, now);
            !wait.policy_always && self.policy.classes.refusal(class).is_none()
        });
        let key = |(pod, wait): (&WaitingPod, &Wait)| {
            Some((pod.namespace.clone(), pod.node.to_string(), wait.reference.clone().ok()?))
        };
        allowed.filter_map(key).collect()
    }

    /// The slot that a job holds: also one whose agent may be at it although this controller is not attached, because
    /// its stream has just broken, or because this controller or the agent's session is new.
    fn assignment(&self, uid: &str, now: Timestamp) -> Option<Assignment> {
        let (job, _) = self.jobs.get(uid)?;
        let (digest, sources) = match &job.run {
            Run::Running { digest, sources, .. } => (digest.clone(), sources.clone()),
            Run::BackOff { .. } if job.has_begun() => (job.digest()?, vec![]),
            Run::Idle if job.has_begun() && self.world.unsettled_until(now).is_some() => {
                (job.digest()?, vec![])
            }
            Run::Idle | Run::BackOff { .. } => return None,
        };
        let node: NodeName = job.spec.node_name.as_str().into();
        Some(Assignment { digest, agent: agent(&self.world, &node), node, sources })
    }

    /// One step of one job; a demand if it wants a slot.
    fn step(&mut self, uid: &Arc<str>, now: Timestamp, again: &mut Option<Timestamp>) -> Option<Demand> {
        let (job, book) = self.jobs.get_mut(uid)?;
        if job.status.node_uid.is_none() && job.is_open() {
            job.status.node_uid =
                self.world.nodes.get(&*job.spec.node_name).map(|facts| facts.uid.to_string());
        }
        if job.status.digest.is_none() {
            job.status.digest = job.digest().map(|digest| digest.to_string());
        }
        if job.phase() == Phase::Imported
            && !job.confirmed
            && let Ok(wanted) = &job.wanted
        {
            let name = wanted.reference.to_string();
            job.confirmed = self.world.fleet.present(&job.spec.node_name, &name).is_some();
        }
        let plan = plan(job, &self.world, now);
        if let Some(at) = plan.again {
            sooner(again, at);
        }
        match plan.step {
            Step::Rest | Step::Keep => {
                status::observe(job);
                if matches!(job.run, Run::Running { .. }) {
                    book.tell_unpacking(job, now, again);
                }
            }
            Step::BackOff => {
                if let Run::BackOff { message, .. } = &job.run {
                    let message = message.clone();
                    status::enter(job, Phase::Transferring, "Retrying", &message, now);
                }
            }
            Step::Wait { reason, message, cancel: end, access } => {
                // Also one that another leader started, and that this one is not attached to.
                let may_run = !(matches!(job.run, Run::Idle) && job.fresh) || book.inherited;
                if end && may_run {
                    book.inherited = false;
                    self.actions.push(cancel(job));
                    job.fresh = true;
                } else if matches!(job.run, Run::Running { .. }) {
                    self.actions.push(Action::Detach { uid: uid.clone() });
                }
                job.run = Run::Idle;
                status::enter(job, Phase::Pending, reason, &message, now);
                if let Some(access) = access {
                    status::access(job, access, &message, now);
                }
            }
            Step::Ready { digest, why, sources, access } => {
                status::resolved(job, &digest, why, now);
                let mut message = access.message(&job.namespace);
                let node = &job.spec.node_name;
                if access.travels()
                    && self.world.fleet.node(node).is_some_and(|node| node.records == PullRecords::None)
                {
                    let _ = write!(
                        message,
                        "; kubelet of node {node} keeps no records, so any pod there may use it"
                    );
                }
                status::access(job, access, &message, now);
                let node: NodeName = job.spec.node_name.as_str().into();
                return Some(Demand {
                    origin: uid.clone(),
                    digest,
                    agent: agent(&self.world, &node),
                    node,
                    relays: job.spec.source_node_name.is_none(),
                    reluctance: reluctance(job, &self.world, &sources),
                    sources,
                    begun: job.has_begun(),
                    priority: job.spec.priority.unwrap_or(0),
                    since: job.created,
                });
            }
            Step::Attach { sources } => {
                if let Run::Running { digest, .. } = &job.run {
                    let digest = digest.clone();
                    let sources = sources.into_iter().take(crate::salvage::MAX_SOURCES).collect();
                    self.start(uid, &digest, sources, now);
                }
            }
            Step::Fail { reason, message } => self.fail(uid, reason, &message, now),
            Step::Expire => {
                if book.delete_after.is_none_or(|at| at <= now) {
                    book.delete_after = Some(after(now, 30));
                    self.actions.push(delete(job));
                }
                book.delete_after.iter().for_each(|at| sooner(again, *at));
            }
        }
        None
    }

    fn start(&mut self, uid: &Arc<str>, digest: &Digest, sources: Vec<Source>, now: Timestamp) {
        let Some((job, book)) = self.jobs.get_mut(uid) else { return };
        let Ok(wanted) = &job.wanted else { return };
        let reference = wanted.reference.to_string();
        let node: NodeName = job.spec.node_name.as_str().into();
        let is_kept = self.world.fleet.node(&node).is_some_and(|node| node.records == PullRecords::Kept);
        let records = self.world.records(digest, &job.spec.node_name);
        let pulled =
            travelling(records, &job.namespace, &job.spec.image, self.policy.access).filter(|_| is_kept);
        if job.fresh {
            job.status.attempts += 1;
            job.carried = job.status.transfer.map_or(0, |transfer| transfer.transferred_bytes);
            job.fresh = false;
            self.actions.push(Action::Count(Count::Attempt));
        }
        book.inherited = false;
        book.unpacking = None;
        if job.status.start_time.is_none() {
            book.progress_after = Some(after(now, FIRST_PROGRESS_SECONDS));
        }
        self.streams += 1;
        job.run = Run::Running { stream: self.streams, digest: digest.clone(), sources: sources.clone() };
        let names: Vec<String> = sources.iter().map(|source| source.node.to_string()).collect();
        let image = text::image(&job.spec.image, digest.as_str());
        let message = if names.is_empty() {
            format!("{image} needs no blobs from other nodes")
        } else {
            format!("{image} comes from {}", text::list(&names))
        };
        if job.status.transfer.is_none_or(|transfer| transfer.transferred_bytes == 0) {
            job.status.source_nodes = names;
        }
        status::enter(job, Phase::Transferring, "Transferring", &message, now);
        self.actions.push(Action::Import {
            uid: uid.clone(),
            stream: self.streams,
            node,
            transfer_id: job.transfer_id(),
            reference,
            digest: digest.clone(),
            sources,
            pulled,
            max_bytes: self
                .policy
                .images
                .max_size
                .map_or(0, |size| i64::try_from(size.bytes()).unwrap_or(i64::MAX)),
        });
    }

    /// A pending job of detection goes when no pod has waited for it for a while.
    fn drop_if_unwanted(
        &mut self,
        uid: &str,
        waited: &HashSet<(Arc<str>, String, Reference)>,
        now: Timestamp,
        again: &mut Option<Timestamp>,
    ) {
        let Some((job, book)) = self.jobs.get_mut(uid) else { return };
        if !job.automatic || job.terminating || job.phase() != Phase::Pending {
            book.unwanted = None;
            return;
        }
        let is_waited_for = job.wanted.as_ref().is_ok_and(|wanted| {
            let key = (job.namespace.clone(), job.spec.node_name.clone(), wanted.reference.clone());
            waited.contains(&key)
        });
        if is_waited_for {
            book.unwanted = None;
            return;
        }
        let since = *book.unwanted.get_or_insert(now);
        let due = book.delete_after.unwrap_or(since).max(after(since, UNWANTED_SECONDS));
        if due > now {
            sooner(again, due);
            return;
        }
        book.delete_after = Some(after(now, 30));
        sooner(again, after(now, 30));
        self.actions.push(delete(job));
    }
}

fn finish(job: &mut Job, progress: &Progress, now: Timestamp) {
    status::progress(job, progress);
    if progress.source_nodes.is_empty() {
        job.status.source_nodes.clear(); // Nobody gave a byte.
    }
    job.run = Run::Idle;
    let message = status::imported_message(job, progress);
    status::enter(job, Phase::Imported, "Imported", &message, now);
}

/// The agent of a target, where others may take from it what has come.
fn agent(world: &World, node: &NodeName) -> Option<Agent> {
    let known = world.fleet.node(node).filter(|_| !world.is_shaky(node) && !world.is_runtime_down(node))?;
    Some(Agent { address: known.address.clone(), platform: known.platform.clone() })
}

/// Nodes that an earlier attempt failed with come last, before them sources on nodes that had better be left alone.
fn reluctance(job: &Job, world: &World, sources: &[Source]) -> BTreeMap<NodeName, u8> {
    let of = |node: &NodeName| u8::from(world.is_shaky(node)) + 2 * u8::from(job.tried.contains(node));
    let nodes = sources.iter().map(|source| &source.node).chain(&job.tried);
    nodes.map(|node| (node.clone(), of(node))).filter(|(_, late)| *late > 0).collect()
}

fn pause(job: &Job, failures: u32, now: Timestamp) -> Timestamp {
    let seed = job.created.as_millisecond().unsigned_abs();
    let pause = delay(FIRST_RETRY, LAST_RETRY, failures, seed);
    let pause = SignedDuration::try_from(pause).unwrap_or(SignedDuration::from_secs(1));
    now.checked_add(pause).unwrap_or(Timestamp::MAX)
}

pub(super) fn cancel(job: &Job) -> Action {
    Action::Cancel {
        uid: job.uid.clone(),
        node: job.spec.node_name.as_str().into(),
        transfer_id: job.transfer_id(),
    }
}

fn delete(job: &Job) -> Action {
    Action::DeleteJob { namespace: job.namespace.clone(), name: job.name.clone(), uid: job.uid.clone() }
}
