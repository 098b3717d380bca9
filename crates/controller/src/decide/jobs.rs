//! What to do about jobs: start, attach, cancel, finish, delete, and keep their status written.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tote_api::{Phase, SalvageJob, SalvageJobStatus, names};
use tote_image::{Digest, Reference};

use super::{About, Action, Count, State, TransferEvent, sooner};
use crate::backoff::delay;
use crate::salvage::{
    Assignment, Demand, Job, Progress, Run, Source, Step, Turn, after, plan, schedule, status,
};
use crate::text;

/// Between two attempts of a job: 1, 2, 4, ... s.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);

/// Default of `spec.backoffLimit`.
const BACKOFF_LIMIT: i32 = 6;

/// Between two writes of a job's progress, and before the first, in seconds.
const PROGRESS_SECONDS: i64 = 5;
const FIRST_PROGRESS_SECONDS: i64 = 1;

/// For how many seconds nobody must have waited for a pending job of detection before it is deleted.
const UNWANTED_SECONDS: i64 = 10;

/// What the controller remembers of a job beside the job itself.
pub(super) struct Book {
    /// The status that the API server has.
    written: SalvageJobStatus,
    /// A write that was not answered yet: what it carries.
    writing: Option<Box<SalvageJobStatus>>,
    /// No write before this time: the last one failed.
    write_after: Option<Timestamp>,
    /// When progress may be written.
    progress_after: Timestamp,
    /// No deletion before this time: one was asked for.
    delete_after: Option<Timestamp>,
    /// Since when nobody has waited for it.
    unwanted: Option<Timestamp>,
    /// Phase and reason of the last event about it.
    told: Option<(Phase, String)>,
}

impl State {
    pub(super) fn apply_job(&mut self, object: SalvageJob) -> bool {
        let metadata = object.metadata;
        let (Some(namespace), Some(name), Some(uid)) = (metadata.namespace, metadata.name, metadata.uid)
        else {
            return false;
        };
        let uid: Arc<str> = uid.into();
        let generation = metadata.generation.unwrap_or(0);
        let terminating = metadata.deletion_timestamp.is_some();
        if let Some((job, _)) = self.jobs.get_mut(&uid) {
            // A create's answer and the watch may come in either order; most events echo a status.
            let news = generation > job.generation || (terminating && !job.terminating);
            if generation > job.generation {
                job.generation = generation;
                job.spec = object.spec;
            }
            job.terminating |= terminating;
            return news;
        }
        let created = metadata.creation_timestamp.map_or(Timestamp::UNIX_EPOCH, |at| at.0);
        let written = object.status.clone().unwrap_or_default();
        let mut job = Job::new(&namespace, &name, &uid, created, object.spec, object.status);
        job.generation = generation;
        job.terminating = terminating;
        job.automatic = metadata
            .labels
            .is_some_and(|labels| labels.get(names::MANAGED_BY).is_some_and(|v| v == names::MANAGER));
        if let Ok(wanted) = &job.wanted {
            let key = (job.spec.node_name.clone(), wanted.reference.clone());
            self.by_image.entry(key).or_default().insert(uid.clone());
        }
        let told = (!job.status.conditions.is_empty()).then(|| (job.phase(), job.reason().to_owned()));
        let book = Book {
            written,
            writing: None,
            write_after: None,
            progress_after: Timestamp::UNIX_EPOCH,
            delete_after: None,
            unwanted: None,
            told,
        };
        self.jobs.insert(uid, (job, book));
        true
    }

    pub(super) fn job_gone(&mut self, uid: &Arc<str>) {
        let Some((job, _)) = self.jobs.remove(uid) else { return };
        if let Ok(wanted) = &job.wanted {
            let key = (job.spec.node_name.clone(), wanted.reference.clone());
            if let Some(uids) = self.by_image.get_mut(&key) {
                uids.remove(uid);
                if uids.is_empty() {
                    self.by_image.remove(&key);
                }
            }
        }
        if !job.phase().is_final() && job.status.attempts > 0 {
            // Also one that this controller is not attached to: the agent may still be at it.
            self.actions.push(cancel(&job));
        }
    }

    pub(super) fn status_written(&mut self, uid: &str, ok: bool, now: Timestamp) {
        let Some((_, book)) = self.jobs.get_mut(uid) else { return };
        match (book.writing.take(), ok) {
            (Some(status), true) => book.written = *status,
            _ => book.write_after = Some(after(now, 1)),
        }
    }

    pub(super) fn delete_failed(&mut self, uid: &str, now: Timestamp) {
        if let Some((_, book)) = self.jobs.get_mut(uid) {
            book.delete_after = Some(after(now, 5));
        }
    }

    pub(super) fn apply_transfer(&mut self, uid: &str, stream: u64, event: TransferEvent, now: Timestamp) {
        let Some((job, _)) = self.jobs.get_mut(uid) else { return };
        if !matches!(job.run, Run::Running { stream: own, .. } if own == stream) {
            return;
        }
        match event {
            TransferEvent::Progress(progress) => {
                job.lost = 0;
                status::progress(job, &progress);
            }
            TransferEvent::Done(progress) => {
                let took = job.status.start_time.as_ref().map_or(Duration::ZERO, |began| {
                    Duration::try_from(now.duration_since(began.0)).unwrap_or_default()
                });
                finish(job, &progress, now);
                let moved = u64::try_from(progress.transferred).unwrap_or(0);
                self.actions.push(Action::Count(Count::Success(took, moved)));
            }
            TransferEvent::Failed { reason, message, retryable } => {
                let limit = job.spec.backoff_limit.unwrap_or(BACKOFF_LIMIT);
                let attempts = job.status.attempts;
                job.fresh = true;
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
        status::enter(job, Phase::Failed, reason, message, now);
        self.actions.push(Action::Count(Count::Failure));
        self.tell_failure(uid);
    }

    pub(super) fn decide_jobs(&mut self, now: Timestamp, again: &mut Option<Timestamp>) {
        let waited: HashSet<(Arc<str>, String, Reference)> = self
            .pods
            .values()
            .flat_map(|entry| entry.pod.waits.iter().map(move |wait| (&entry.pod, wait)))
            .filter_map(|(pod, wait)| {
                let reference = wait.reference.clone().ok()?;
                Some((pod.namespace.clone(), pod.node.to_string(), reference))
            })
            .collect();
        let mut demands: Vec<Demand> = Vec::new();
        let mut running: Vec<Assignment> = Vec::new();
        let uids: Vec<Arc<str>> = self.jobs.keys().cloned().collect();
        for uid in &uids {
            let demand = self.step(uid, now, again);
            demands.extend(demand);
            let Some((job, _)) = self.jobs.get(uid) else { continue };
            if let Run::Running { digest, sources, .. } = &job.run {
                running.push(Assignment {
                    digest: digest.clone(),
                    node: job.spec.node_name.as_str().into(),
                    sources: sources.clone(),
                });
            }
        }
        let turns = schedule(&demands, &running, self.policy.limits);
        for (demand, turn) in demands.into_iter().zip(turns) {
            match turn {
                Turn::Start(sources) => self.start(&demand.origin, &demand.digest, sources, now),
                Turn::Queued(what) => {
                    if let Some((job, _)) = self.jobs.get_mut(&demand.origin) {
                        status::enter(job, Phase::Pending, "Queued", &format!("waits for {what}"), now);
                    }
                }
            }
        }
        for uid in &uids {
            self.drop_if_unwanted(uid, &waited, now, again);
            self.tell_transition(uid);
            self.write(uid, now, again);
        }
    }

    /// One step of one job; a demand if it wants a slot.
    fn step(&mut self, uid: &Arc<str>, now: Timestamp, again: &mut Option<Timestamp>) -> Option<Demand> {
        let (job, book) = self.jobs.get_mut(uid)?;
        if job.status.node_uid.is_none() && job.is_open() {
            job.status.node_uid = self.world.nodes.get(&*job.spec.node_name).map(ToString::to_string);
        }
        if job.status.digest.is_none() {
            job.status.digest = job.digest().map(|digest| digest.to_string());
        }
        let plan = plan(job, &self.world, now);
        if let Some(at) = plan.again {
            sooner(again, at);
        }
        match plan.step {
            Step::Rest | Step::Keep => {}
            Step::BackOff => {
                if let Run::BackOff { message, .. } = &job.run {
                    let message = message.clone();
                    status::enter(job, Phase::Transferring, "Retrying", &message, now);
                }
            }
            Step::Wait { reason, message, cancel: end } => {
                if end && !matches!(job.run, Run::Idle) {
                    self.actions.push(cancel(job));
                    job.fresh = true;
                } else if matches!(job.run, Run::Running { .. }) {
                    self.actions.push(Action::Detach { uid: uid.clone() });
                }
                job.run = Run::Idle;
                status::enter(job, Phase::Pending, reason, &message, now);
            }
            Step::Ready { digest, sources } => {
                job.status.digest = Some(digest.to_string());
                return Some(Demand {
                    origin: uid.clone(),
                    digest,
                    node: job.spec.node_name.as_str().into(),
                    sources,
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
        if job.fresh {
            job.status.attempts += 1;
            job.fresh = false;
            self.actions.push(Action::Count(Count::Attempt));
        }
        if job.status.start_time.is_none() {
            book.progress_after = after(now, FIRST_PROGRESS_SECONDS);
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
            node: job.spec.node_name.as_str().into(),
            transfer_id: job.transfer_id(),
            reference,
            digest: digest.clone(),
            sources,
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

    fn tell_transition(&mut self, uid: &str) {
        let Some((job, book)) = self.jobs.get_mut(uid) else { return };
        let state = (job.phase(), job.reason().to_owned());
        if state.1.is_empty() || book.told.as_ref() == Some(&state) {
            return;
        }
        self.actions.push(Action::Tell {
            about: About {
                kind: "SalvageJob",
                namespace: job.namespace.clone(),
                name: job.name.clone(),
                uid: job.uid.clone(),
                field_path: String::new(),
            },
            warning: state.0 == Phase::Failed,
            reason: state.1.clone(),
            action: "Salvage",
            note: text::bounded(status::message(&job.status), text::MAX_NOTE),
        });
        book.told = Some(state);
    }

    fn write(&mut self, uid: &str, now: Timestamp, again: &mut Option<Timestamp>) {
        let Some((job, book)) = self.jobs.get_mut(uid) else { return };
        if book.writing.is_some() || job.terminating || job.status == book.written {
            return;
        }
        if let Some(at) = book.write_after
            && at > now
        {
            sooner(again, at);
            return;
        }
        let without_progress = |status: &SalvageJobStatus| {
            let mut status = status.clone();
            status.transfer = None;
            status.source_nodes = Vec::new();
            status
        };
        if without_progress(&job.status) == without_progress(&book.written) && book.progress_after > now {
            sooner(again, book.progress_after);
            return;
        }
        if job.status.transfer != book.written.transfer {
            book.progress_after = after(now, PROGRESS_SECONDS);
        }
        book.write_after = None;
        book.writing = Some(Box::new(job.status.clone()));
        self.actions.push(Action::WriteStatus {
            namespace: job.namespace.clone(),
            name: job.name.clone(),
            uid: job.uid.clone(),
            before: Box::new(book.written.clone()),
            status: Box::new(job.status.clone()),
        });
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

fn pause(job: &Job, failures: u32, now: Timestamp) -> Timestamp {
    let seed = job.created.as_millisecond().unsigned_abs();
    let pause = delay(FIRST_RETRY, LAST_RETRY, failures, seed);
    let pause = SignedDuration::try_from(pause).unwrap_or(SignedDuration::from_secs(1));
    now.checked_add(pause).unwrap_or(Timestamp::MAX)
}

fn cancel(job: &Job) -> Action {
    Action::Cancel {
        uid: job.uid.clone(),
        node: job.spec.node_name.as_str().into(),
        transfer_id: job.transfer_id(),
    }
}

fn delete(job: &Job) -> Action {
    Action::DeleteJob { namespace: job.namespace.clone(), name: job.name.clone(), uid: job.uid.clone() }
}
