//! What to do about pods that wait for an image: make a job, wake them, or say why neither helps.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tote_api::{Phase, names};
use tote_image::{Digest, Reference};

use super::{About, Action, Count, NewJob, State, sooner};
use crate::backoff::delay;
use crate::detect::{Consent, Wait, WaitingPod};
use crate::fleet::NodeName;
use crate::resolve::{Missing, Resolution, resolve};
use crate::salvage::{Job, Run, after, base_name, counter, status};
use crate::text;

/// Between two wakes of one pod.
const FIRST_WAKE: Duration = Duration::from_secs(1);
const LAST_WAKE: Duration = Duration::from_secs(10);

/// After so many wakes (some 5 minutes) they become rare.
const MANY_WAKES: u32 = 30;
const RARE_WAKE: Duration = Duration::from_secs(60);

/// After so many wakes (some 7 s) the pod's event says what kubelet is waiting for.
const WAKES_BEFORE_CAUSE: u32 = 4;

/// For how many seconds a job's word for its image is taken before the inventory must confirm it.
const TRUST_SECONDS: i64 = 30;

/// After a failed job the next one for the same image and node waits this long, doubled each time, in seconds.
const FIRST_PAUSE: i64 = 60;
const LAST_PAUSE: i64 = 3600;

/// A pod that waits, and what was done about it.
pub(super) struct PodEntry {
    pub(super) pod: WaitingPod,
    told: HashSet<(String, &'static str)>,
    counted: HashSet<Arc<str>>,
    wakes: HashMap<Arc<str>, Wake>,
    seed: u64,
}

/// The wakes of a pod for one image.
struct Wake {
    /// The job that brought the image, if one did: another job starts the count again.
    job: Option<Arc<str>>,
    count: u32,
    next: Timestamp,
}

impl PodEntry {
    pub(super) fn new(pod: WaitingPod) -> Self {
        let mut hasher = DefaultHasher::new();
        pod.uid.hash(&mut hasher);
        let seed = hasher.finish();
        Self { pod, told: HashSet::new(), counted: HashSet::new(), wakes: HashMap::new(), seed }
    }

    /// Wakes at the next decision, if it waits for one of these images.
    pub(super) fn hasten(&mut self, images: &[Reference]) {
        for wait in &self.pod.waits {
            if wait.reference.as_ref().is_ok_and(|reference| images.contains(reference))
                && let Some(wake) = self.wakes.get_mut(&wait.image)
            {
                wake.next = Timestamp::UNIX_EPOCH;
            }
        }
    }

    fn about(&self, field_path: &str) -> About {
        About {
            kind: "Pod",
            namespace: self.pod.namespace.clone(),
            name: self.pod.name.clone(),
            uid: self.pod.uid.clone(),
            field_path: field_path.to_owned(),
        }
    }

    /// An event about a container, once for each cause.
    fn tell(
        &mut self,
        wait: &Wait,
        warning: bool,
        reason: &'static str,
        cause: &'static str,
        note: &str,
    ) -> Option<Action> {
        self.told.insert((wait.field_path.clone(), cause)).then(|| Action::Tell {
            about: self.about(&wait.field_path),
            warning,
            reason: reason.to_owned(),
            action: cause,
            note: text::bounded(note, text::MAX_NOTE),
        })
    }

    fn not_actionable(&mut self, wait: &Wait, cause: &'static str, note: &str, actions: &mut Vec<Action>) {
        if let Some(tell) = self.tell(wait, true, names::event::IMAGE_NOT_ACTIONABLE, cause, note) {
            actions.push(tell);
            actions.push(Action::Count(Count::NotActionable));
        }
    }
}

/// Images of which another pull has just failed. While a pull of a name is under way or queued, kubelet lets no
/// pod take the image from the node: the moment at which one has failed may be the one at which none is.
pub(super) fn pulls_that_failed(before: &WaitingPod, after: &WaitingPod) -> Vec<Reference> {
    let was = |path: &str| before.waits.iter().find(|wait| wait.field_path == path);
    let failed_anew = |wait: &&Wait| {
        wait.reason == "ErrImagePull" && was(&wait.field_path).is_some_and(|was| was.reason != wait.reason)
    };
    after.waits.iter().filter(failed_anew).filter_map(|wait| wait.reference.clone().ok()).collect()
}

impl State {
    pub(super) fn decide_pods(&mut self, now: Timestamp, again: &mut Option<Timestamp>) {
        if !self.policy.enabled {
            return;
        }
        let mut pods = std::mem::take(&mut self.pods);
        for entry in pods.values_mut() {
            if entry.pod.opted_in && self.world.consent(&entry.pod.namespace) == Consent::Given {
                for wait in entry.pod.waits.clone() {
                    self.decide_wait(entry, &wait, now, again);
                }
            }
        }
        self.pods = pods;
    }

    fn decide_wait(
        &mut self,
        entry: &mut PodEntry,
        wait: &Wait,
        now: Timestamp,
        again: &mut Option<Timestamp>,
    ) {
        if entry.counted.insert(wait.image.clone()) {
            self.actions.push(Action::Count(Count::Detected));
            let pod = &entry.pod;
            tracing::info!(namespace = %pod.namespace, pod = %pod.name, node = %pod.node, image = %wait.image,
                reason = wait.reason, "a pod waits for an image");
        }
        let image = &wait.image;
        if wait.policy_always {
            let note = format!(
                "{image} cannot be salvaged: with imagePullPolicy Always kubelet asks the registry at every start, \
                 whatever the node holds. Set imagePullPolicy to IfNotPresent."
            );
            entry.not_actionable(wait, "PolicyAlways", &note, &mut self.actions);
            return;
        }
        let reference = match &wait.reference {
            Ok(reference) => reference,
            Err(error) => {
                entry.not_actionable(wait, "InvalidImage", error, &mut self.actions);
                return;
            }
        };
        let node = entry.pod.node.clone();
        if self.is_running(reference, &node) {
            return; // Its end is told by the transfer.
        }
        if let Some(digest) = self.present(reference, &node, now) {
            self.wake(entry, wait, reference, &digest, now, again);
            return;
        }
        entry.wakes.remove(image);
        if reference.digest().is_none()
            && let Some(at) = self.world.unsettled_until(now)
        {
            sooner(again, at);
            return;
        }
        match resolve(reference, None, &node, None, &self.world.fleet) {
            Resolution::Found { digest, sources, on_target } => {
                self.want(entry, wait, reference, &digest, &sources, on_target, now, again);
            }
            Resolution::Missing(missing) => self.cannot(entry, wait, reference, &missing, now, again),
        }
    }

    /// Jobs of any namespace for an image on a node.
    fn jobs_for_any<'a>(&'a self, reference: &Reference, node: &str) -> impl Iterator<Item = &'a Job> {
        let uids = self.by_image.get(&(node.to_owned(), reference.clone()));
        uids.into_iter().flatten().filter_map(|uid| self.jobs.get(uid)).map(|(job, _)| job)
    }

    /// Jobs of a pod's namespace, for its image and node.
    fn jobs_for<'a>(
        &'a self,
        namespace: &'a str,
        reference: &Reference,
        node: &str,
    ) -> impl Iterator<Item = &'a Job> {
        let uid = self.world.nodes.get(node);
        self.jobs_for_any(reference, node).filter(move |job| {
            *job.namespace == *namespace
                && (job.status.node_uid.is_none() || job.status.node_uid.as_deref() == uid.map(AsRef::as_ref))
        })
    }

    fn is_running(&self, reference: &Reference, node: &str) -> bool {
        self.jobs_for_any(reference, node).any(|job| matches!(job.run, Run::Running { .. }))
    }

    /// The digest of an image that is on the node under this name: by a job that just said so, or by the
    /// node's inventory.
    fn present(&self, reference: &Reference, node: &str, now: Timestamp) -> Option<Digest> {
        let fresh = self.jobs_for_any(reference, node).find(|job| {
            job.phase() == Phase::Imported
                && job.status.completion_time.as_ref().is_some_and(|at| after(at.0, TRUST_SECONDS) > now)
        });
        fresh
            .and_then(Job::digest)
            .or_else(|| self.world.fleet.present(node, &reference.to_string()).cloned())
    }

    fn wake(
        &mut self,
        entry: &mut PodEntry,
        wait: &Wait,
        reference: &Reference,
        digest: &Digest,
        now: Timestamp,
        again: &mut Option<Timestamp>,
    ) {
        let pod = entry.pod.clone();
        let job = self
            .jobs_for(&pod.namespace, reference, &pod.node)
            .filter(|job| job.phase() == Phase::Imported)
            .max_by_key(|job| job.status.completion_time.clone().map(|at| at.0));
        let (job, completed) = match job {
            Some(job) => (Some(job.uid.clone()), job.status.completion_time.clone()),
            None => (None, None),
        };
        let wake =
            entry.wakes.entry(wait.image.clone()).or_insert(Wake { job: job.clone(), count: 0, next: now });
        if wake.job != job {
            *wake = Wake { job: job.clone(), count: 0, next: now };
        }
        if wake.next > now {
            sooner(again, wake.next);
            return;
        }
        wake.count = wake.count.saturating_add(1);
        let count = wake.count;
        let longest = if count < MANY_WAKES { LAST_WAKE } else { RARE_WAKE };
        let pause = delay(FIRST_WAKE, longest, count, entry.seed);
        wake.next = now
            .checked_add(SignedDuration::try_from(pause).unwrap_or(SignedDuration::from_secs(1)))
            .unwrap_or(Timestamp::MAX);
        sooner(again, wake.next);
        let mut annotations = BTreeMap::new();
        let imported_at = completed.map(|at| status::seconds(at.0));
        // Then a controller before this one has told it, too.
        let known = imported_at.is_some() && imported_at == pod.imported_at;
        if let Some(at) = &imported_at {
            annotations.insert(names::SALVAGED_DIGEST.to_owned(), digest.to_string());
            annotations.insert(names::IMPORTED_AT.to_owned(), at.clone());
        }
        if count > 1 || known || imported_at.is_none() {
            annotations.insert(names::WAKE.to_owned(), now.to_string());
        }
        self.actions.push(Action::WakePod {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            uid: pod.uid.clone(),
            annotations,
        });
        self.actions.push(Action::Count(Count::Wake));
        if let Some(uid) = &job
            && count == 1
            && !known
        {
            let mut source = String::new();
            if let Some((job, _)) = self.jobs.get_mut(uid) {
                status::woke(job, &pod.name);
                status::message(&job.status).clone_into(&mut source);
            }
            let note = format!(
                "{source}. The cause remains: see that the registry serves it before the next pod waits."
            );
            let tell = entry.tell(wait, false, names::event::IMAGE_SALVAGED, "Salvaged", &note);
            self.actions.extend(tell);
        }
        if count == WAKES_BEFORE_CAUSE {
            let note = self.requires_a_pull(&pod, reference, digest);
            entry.not_actionable(wait, "KubeletRequiresPull", &note, &mut self.actions);
        }
    }

    fn requires_a_pull(&self, pod: &WaitingPod, reference: &Reference, digest: &Digest) -> String {
        let name = reference.to_string();
        let mut others = self.world.fleet.names_on(&pod.node, digest);
        others.retain(|other| {
            other.parse::<Reference>().is_ok_and(|other| other.repository() != reference.repository())
        });
        let others = if others.is_empty() {
            String::new()
        } else {
            format!(", where it is also called {}", text::list(&others))
        };
        let image = text::image(&name, digest.as_str());
        format!(
            "kubelet requires a pull: {image} is on node {}{others}, but kubelet does not take it from \
             there. It does so when it pulled this image itself from another repository, or while a pull of this \
             name hangs or was cut off by its restart. In the first case use the name that was pulled, or serve this \
             one from a registry; in the second it ends with the pull.",
            pod.node
        )
    }

    #[allow(clippy::too_many_arguments)] // the facts of one decision
    fn want(
        &mut self,
        entry: &mut PodEntry,
        wait: &Wait,
        reference: &Reference,
        digest: &Digest,
        sources: &[NodeName],
        on_target: bool,
        now: Timestamp,
        again: &mut Option<Timestamp>,
    ) {
        let pod = entry.pod.clone();
        let Some(node_uid) = self.world.nodes.get(&pod.node) else { return };
        let base = base_name(&pod.namespace, reference, digest, node_uid);
        let open = self
            .jobs_for(&pod.namespace, reference, &pod.node)
            .any(|job| job.is_open() && job.digest().is_none_or(|known| known == *digest));
        if !open {
            if self.creating.contains_key(&base) {
                sooner(again, after(now, 1));
                return;
            }
            let mut number = 0;
            let mut failures = 0;
            let mut resume = None;
            for job in self.jobs_for_any(reference, &pod.node) {
                let Some(n) = counter(&job.name, &base).filter(|_| job.namespace == pod.namespace) else {
                    continue;
                };
                number = number.max(n);
                if job.phase() == Phase::Failed {
                    failures += 1;
                    resume = resume.max(job.status.completion_time.as_ref().map(|at| at.0));
                }
            }
            if let Some(failed) = resume {
                let pause = FIRST_PAUSE.saturating_mul(1 << (failures - 1).min(10)).min(LAST_PAUSE);
                if after(failed, pause) > now {
                    sooner(again, after(failed, pause));
                    return;
                }
            }
            self.creating.insert(base.clone(), after(now, 15));
            sooner(again, after(now, 15));
            self.actions.push(Action::CreateJob(NewJob {
                name: format!("{base}-{}", number + 1),
                base,
                namespace: pod.namespace.clone(),
                image: wait.image.clone(),
                digest: digest.clone(),
                node: pod.node.clone(),
            }));
            self.actions.push(Action::Count(Count::Salvageable));
        }
        let place = if on_target {
            format!("on node {} itself under another name", pod.node)
        } else {
            format!("on {}", text::list(sources))
        };
        let note = format!(
            "{} for {}, but the image is {place}: it is salvaged from there. Find out why the registry does not \
             serve it.",
            wait.reason,
            text::image(&wait.image, digest.as_str())
        );
        let tell = entry.tell(wait, true, names::event::IMAGE_SALVAGEABLE, "Salvage", &note);
        self.actions.extend(tell);
    }

    fn cannot(
        &mut self,
        entry: &mut PodEntry,
        wait: &Wait,
        reference: &Reference,
        missing: &Missing,
        now: Timestamp,
        again: &mut Option<Timestamp>,
    ) {
        if let Some(at) = self.world.unsettled_until(now) {
            sooner(again, at);
            return;
        }
        let pod = entry.pod.clone();
        if self.jobs_for(&pod.namespace, reference, &pod.node).any(Job::is_open) {
            return; // The job says what it waits for.
        }
        let note = missing.message(&wait.image);
        entry.not_actionable(wait, missing.reason(), &note, &mut self.actions);
    }

    /// Tells the pods that wait for a job's image that it failed.
    pub(super) fn tell_failure(&mut self, uid: &str) {
        let Some((job, _)) = self.jobs.get(uid) else { return };
        let note = format!("SalvageJob {}: {}", job.name, status::message(&job.status));
        for entry in self.pods.values_mut() {
            if entry.pod.namespace != job.namespace || *entry.pod.node != *job.spec.node_name {
                continue;
            }
            for wait in entry.pod.waits.clone() {
                if wait.reference.as_ref().is_ok_and(|r| job.is_for(r, &entry.pod.node)) {
                    let reason = names::event::IMAGE_SALVAGE_FAILED;
                    let tell = entry.tell(&wait, true, reason, "SalvageFailed", &note);
                    self.actions.extend(tell);
                }
            }
        }
    }
}
