//! What the controller remembers of a job beside the job itself, and how its status is kept in step with the
//! API server's. Decides nothing about transfers.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use kube::api::ObjectMeta;
use tote_api::{Phase, SalvageJob, SalvageJobStatus, names};

use super::jobs::cancel;
use super::{About, Action, Kind, State, inform, sooner};
use crate::backoff::delay;
use crate::salvage::{Job, Run, after, status};
use crate::text;

/// Between two writes of a job's progress, in seconds.
const PROGRESS_SECONDS: i64 = 5;

/// Between two writes that fail, or that somebody else writes over.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_secs(60);

/// For so many seconds nobody else must have written for it to be forgotten.
const QUIET_SECONDS: i64 = 120;

/// The bookkeeping of a job.
#[derive(Default)]
pub(super) struct Book {
    /// The status that the API server has.
    written: SalvageJobStatus,
    /// The newest resource version of which that is known.
    version: u64,
    /// A write that was not answered yet: what it carries.
    writing: Option<Box<SalvageJobStatus>>,
    /// A status newer than `version` was when the write began, to be judged when that is answered.
    heard: Option<Box<SalvageJobStatus>>,
    /// No write before this time: the last one failed, or somebody else writes, too.
    write_after: Option<Timestamp>,
    /// Writes in a row that failed or were written over.
    troubles: u32,
    /// When somebody else's status was last written over.
    corrected: Option<Timestamp>,
    /// When progress may be written.
    pub(super) progress_after: Option<Timestamp>,
    /// Since when its agent has been at nothing but unpacking.
    pub(super) unpacking: Option<Timestamp>,
    /// No deletion before this time: one was asked for.
    pub(super) delete_after: Option<Timestamp>,
    /// Since when nobody has waited for it.
    pub(super) unwanted: Option<Timestamp>,
    /// Phase and reason of the last event about it.
    told: Option<(Phase, String)>,
    /// Whether it was there when this controller began: the one before may have begun its transfer and not come to
    /// write that.
    pub(super) inherited: bool,
    /// Whether the watch has told of it: a list that was under way when it was made does not hold it.
    pub(super) watched: bool,
}

/// A resource version as a number; versions of one kind compare as numbers (Kubernetes KEP-5504, and every
/// version that stores in etcd). 0 if it is none.
pub fn version(metadata: &ObjectMeta) -> u64 {
    metadata.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0)
}

impl Book {
    /// Takes in a status of the API server. Mostly an echo of what was written; but a write of the leader
    /// before this one may land late. Tells whether it was one.
    fn hear(&mut self, version: u64, status: SalvageJobStatus, now: Timestamp) -> bool {
        if version <= self.version {
            return false;
        }
        self.version = version;
        if self.writing.is_some() {
            self.heard = Some(Box::new(status));
            return false;
        }
        self.correct(status, now)
    }

    /// Has what should be there written again; ever more rarely while somebody else goes on writing.
    fn correct(&mut self, status: SalvageJobStatus, now: Timestamp) -> bool {
        let differs = gist(&status) != gist(&self.written);
        if differs {
            self.written = status;
            if self.corrected.is_some_and(|last| after(last, QUIET_SECONDS) > now) {
                self.pause(now);
            } else {
                self.troubles = 0;
            }
            self.corrected = Some(now);
        }
        differs
    }

    fn pause(&mut self, now: Timestamp) {
        self.troubles = self.troubles.saturating_add(1);
        let pause = SignedDuration::try_from(delay(FIRST_PAUSE, LAST_PAUSE, self.troubles, self.version));
        self.write_after = now.checked_add(pause.unwrap_or(SignedDuration::from_secs(1))).ok();
    }

    /// Takes in what came of a write. Tells whether somebody else wrote meanwhile.
    fn answered(&mut self, version: Option<u64>, now: Timestamp) -> bool {
        match (self.writing.take(), version) {
            (Some(status), Some(version)) => {
                self.written = *status;
                if self.corrected.is_none_or(|last| after(last, QUIET_SECONDS) <= now) {
                    self.troubles = 0;
                }
                if version >= self.version {
                    self.version = version;
                    self.heard = None;
                }
            }
            _ => self.pause(now),
        }
        self.heard.take().is_some_and(|heard| self.correct(*heard, now))
    }

    /// Has the status say that layers are being unpacked, once that has taken as long as progress goes unwritten: most images
    /// are there by then, and need no write for it.
    pub(super) fn tell_unpacking(&self, job: &mut Job, now: Timestamp, again: &mut Option<Timestamp>) {
        let Some(since) = self.unpacking else { return };
        let due = after(since, PROGRESS_SECONDS);
        if due > now {
            sooner(again, due);
        } else if job.reason() != status::UNPACKING {
            status::unpacking(job, now);
        }
    }

    /// The leader before this one may have seen the end of a job: then that is its end.
    fn take_over_the_end(&mut self, job: &mut Job) -> Option<Action> {
        if !self.written.phase.is_some_and(Phase::is_final) || job.phase().is_final() {
            return None;
        }
        job.status = self.written.clone();
        self.told = Some((job.phase(), job.reason().to_owned()));
        let was_running = matches!(std::mem::take(&mut job.run), Run::Running { .. });
        match job.phase() {
            Phase::Failed => Some(cancel(job)), // As that leader did; but this one may have begun again since.
            _ => was_running.then(|| Action::Detach { uid: job.uid.clone() }),
        }
    }
}

/// What tells two statuses apart that are not meant to be the same; times lose their fractions on the way.
fn gist(status: &SalvageJobStatus) -> (Option<Phase>, i32, Option<&str>, Option<&str>) {
    let imported = status.conditions.iter().find(|c| c.type_ == names::condition::IMPORTED);
    (status.phase, status.attempts, status.digest.as_deref(), imported.map(|c| c.reason.as_str()))
}

impl State {
    /// Takes in a job as the watch gives it (`watched`), or as an answer to a call did.
    pub(super) fn apply_job(&mut self, object: SalvageJob, watched: bool, now: Timestamp) -> bool {
        let metadata = object.metadata;
        let version = version(&metadata);
        let (Some(namespace), Some(name), Some(uid)) = (metadata.namespace, metadata.name, metadata.uid)
        else {
            return false;
        };
        let uid: Arc<str> = uid.into();
        let generation = metadata.generation.unwrap_or(0);
        let terminating = metadata.deletion_timestamp.is_some();
        let automatic = metadata
            .labels
            .is_some_and(|labels| labels.get(names::MANAGED_BY).is_some_and(|v| v == names::MANAGER));
        if let Some((job, book)) = self.jobs.get_mut(&uid) {
            // An answer and the watch may come in either order; most events echo a status.
            book.watched |= watched;
            let corrected = book.hear(version, object.status.unwrap_or_default(), now);
            if corrected {
                self.actions.extend(book.take_over_the_end(job));
            }
            job.automatic = automatic;
            let news = corrected || generation > job.generation || (terminating && !job.terminating);
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
        job.automatic = automatic;
        if let Ok(wanted) = &job.wanted {
            let key = (job.spec.node_name.clone(), wanted.reference.clone());
            self.by_image.entry(key).or_default().insert(uid.clone());
        }
        let told = (!job.status.conditions.is_empty()).then(|| (job.phase(), job.reason().to_owned()));
        let inherited = !self.synced.contains(&Kind::Jobs);
        let book = Book { written, version, told, inherited, watched, ..Book::default() };
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

    pub(super) fn status_written(&mut self, uid: &str, version: Option<u64>, now: Timestamp) {
        if let Some((job, book)) = self.jobs.get_mut(uid)
            && book.answered(version, now)
        {
            self.actions.extend(book.take_over_the_end(job));
        }
    }

    pub(super) fn delete_failed(&mut self, uid: &str, now: Timestamp) {
        if let Some((_, book)) = self.jobs.get_mut(uid) {
            book.delete_after = Some(after(now, 5));
        }
    }

    /// Tells of a change of phase or reason, once. To be called after pods were decided over: the webhook is told here only of
    /// an import that no pod was woken for.
    pub(super) fn tell_transition(&mut self, uid: &str, now: Timestamp) {
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
        if state.0 == Phase::Imported && job.status.pods.is_empty() {
            self.actions.push(inform::ended(job, "", now));
        }
        book.told = Some(state);
    }

    pub(super) fn write(&mut self, uid: &str, now: Timestamp, again: &mut Option<Timestamp>) {
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
        if without_progress(&job.status) == without_progress(&book.written)
            && let Some(at) = book.progress_after
            && at > now
        {
            sooner(again, at);
            return;
        }
        if job.status.transfer != book.written.transfer {
            book.progress_after = Some(after(now, PROGRESS_SECONDS));
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
