//! What to do about pods that wait for an image: have a job made (`ask`), wake them (`wake`), have what is broken removed
//! (`corrupt`), or say why none of it helps.

use jiff::Timestamp;
use tote_api::{Phase, names};
use tote_image::{Digest, Reference};

use super::entry::PodEntry;
use super::{Action, Count, State, inform, sooner};
use crate::detect::class::Class;
use crate::detect::{Consent, Wait, WaitingPod};
use crate::fleet::NodeName;
use crate::resolve::{Missing, Question, Resolution, Why};
use crate::running::Meant;
use crate::salvage::{Job, Run, after, status};
use crate::text;

/// For how many seconds a job's word for its image is taken while the inventory has yet to show it.
const TRUST_SECONDS: i64 = 30;

impl State {
    pub(super) fn decide_pods(&mut self, now: Timestamp, again: &mut Option<Timestamp>) {
        if !self.policy.enabled {
            return;
        }
        let mut pods = std::mem::take(&mut self.pods);
        for entry in pods.values_mut() {
            if self.is_opted_in(&entry.pod) {
                for wait in entry.pod.waits.clone() {
                    self.decide_wait(entry, &wait, now, again);
                }
            }
        }
        self.pods = pods;
    }

    /// Whether the namespace, and the pod or the nearest of its controllers that says anything, want it.
    pub(super) fn is_opted_in(&self, pod: &WaitingPod) -> bool {
        self.world.owners.opted_in(pod.says, pod.controller.as_deref())
            && self.world.consent(&pod.namespace) == Consent::Given
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
            self.actions.push(inform::detected(&entry.pod, wait, now));
            let pod = &entry.pod;
            tracing::info!(namespace = %pod.namespace, pod = %pod.name, node = %pod.node, image = %wait.image,
                reason = wait.reason, class = wait.class.name(), message = %wait.message, "a pod waits for an image");
        }
        let image = &wait.image;
        let reference = match &wait.reference {
            Ok(reference) => reference,
            Err(error) => {
                entry.not_actionable(wait, "InvalidImage", error, &mut self.actions);
                return;
            }
        };
        let class = self.secrets.class_of(&entry.pod, wait, now);
        if let Some(refusal) = self.policy.classes.refusal(class) {
            let remedy = class.remedy();
            let note = format!(
                "{image} is not salvaged. {class}: {remedy}. ({refusal}.) Kubelet says: {}",
                wait.message
            );
            entry.not_actionable(wait, class.name(), &note, &mut self.actions);
            return;
        }
        if wait.policy_always {
            let note = format!(
                "{image} cannot be salvaged: with imagePullPolicy Always kubelet asks the registry at every start, \
                 whatever the node holds. Set imagePullPolicy to IfNotPresent. {class}: {}.",
                class.remedy()
            );
            entry.not_actionable(wait, "PolicyAlways", &note, &mut self.actions);
            return;
        }
        if class == Class::CorruptStore {
            self.corrupt(entry, wait);
        }
        let node = entry.pod.node.clone();
        if self.is_running(reference, &node) {
            return; // Its end is told by the transfer.
        }
        if let Some(digest) = self.present(reference, &node, now) {
            self.wake(entry, wait, reference, &digest, now, again);
            return;
        }
        if !self.world.fleet.is_up(&node) && self.world.may_hold(&node, reference, now) {
            // Its agent is away for a moment: whether the image is there is not known.
            if let Some(at) = self.world.unsettled_until(now) {
                sooner(again, at);
            }
            return;
        }
        entry.wakes.remove(image);
        if reference.digest().is_none()
            && let Some(at) = self.world.unsettled_until(now)
        {
            sooner(again, at);
            return;
        }
        let workload = self.meant(&entry.pod, reference);
        let question = Question { reference, pin: None, target: &node, source: None, workload: &workload };
        match question.resolve(&self.world.fleet, self.policy.tags) {
            Resolution::Found { digest, why, sources, on_target } => {
                let found = (&digest, why, &*sources, on_target);
                self.want(entry, wait, reference, found, now, again);
            }
            Resolution::Missing(missing) => self.missing(entry, wait, reference, &missing, now, again),
        }
    }

    /// What the other pods of a pod's workload run under a name.
    fn meant(&self, pod: &WaitingPod, reference: &Reference) -> Meant {
        let (world, name) = (&self.world, reference.to_string());
        pod.controller.as_ref().map_or_else(Meant::new, |controller| {
            world.running.of_workload(&world.owners, &pod.namespace, controller, &name)
        })
    }

    /// Jobs of any namespace for an image on a node.
    pub(super) fn jobs_for_any<'a>(
        &'a self,
        reference: &Reference,
        node: &str,
    ) -> impl Iterator<Item = &'a Job> {
        let uids = self.by_image.get(&(node.to_owned(), reference.clone()));
        uids.into_iter().flatten().filter_map(|uid| self.jobs.get(uid)).map(|(job, _)| job)
    }

    /// Jobs of a pod's namespace, for its image and node.
    pub(super) fn jobs_for<'a>(
        &'a self,
        namespace: &'a str,
        reference: &Reference,
        node: &str,
    ) -> impl Iterator<Item = &'a Job> {
        let uid = self.world.nodes.get(node).map(|facts| &*facts.uid);
        self.jobs_for_any(reference, node).filter(move |job| {
            *job.namespace == *namespace
                && (job.status.node_uid.is_none() || job.status.node_uid.as_deref() == uid)
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
                && !job.confirmed
                && job.status.completion_time.as_ref().is_some_and(|at| after(at.0, TRUST_SECONDS) > now)
        });
        fresh
            .and_then(Job::digest)
            .or_else(|| self.world.fleet.present(node, &reference.to_string()).cloned())
    }

    #[allow(clippy::too_many_arguments)] // the facts of one decision
    pub(super) fn want(
        &mut self,
        entry: &mut PodEntry,
        wait: &Wait,
        reference: &Reference,
        (digest, why, sources, on_target): (&Digest, Why, &[NodeName], bool),
        now: Timestamp,
        again: &mut Option<Timestamp>,
    ) {
        if let Some((reason, why)) = self.world.refusal(reference, digest, &entry.pod.node) {
            let note = format!("{} is not salvaged: {why}", wait.image);
            entry.not_actionable(wait, reason, &note, &mut self.actions);
            return;
        }
        let access = self.world.access(&entry.pod.namespace, digest, &entry.pod.node);
        if !access.is_given() {
            if let Some(at) = self.world.unsettled_until(now) {
                // An agent that is away may know better.
                sooner(again, at);
                return;
            }
            let says = access.message(&entry.pod.namespace);
            entry.not_actionable(wait, access.reason(), &says, &mut self.actions);
            return;
        }
        let pod = entry.pod.clone();
        let is_open = self
            .jobs_for(&pod.namespace, reference, &pod.node)
            .any(|job| job.is_open() && job.digest().is_none_or(|known| known == *digest));
        if !is_open && !self.ask(entry, wait, reference, digest, sources, now, again) {
            return;
        }
        let place = if on_target {
            format!("on node {} itself under another name", pod.node)
        } else {
            format!("on {}", text::list(sources))
        };
        let note = format!(
            "{} ({}) for {}, but the image is {place}: it is salvaged from there{}. To prevent it: {}.",
            wait.reason,
            wait.class,
            text::image(&wait.image, digest.as_str()),
            why.words().map(|words| format!(" ({words})")).unwrap_or_default(),
            wait.class.remedy()
        );
        let tell = entry.tell(wait, true, names::event::IMAGE_SALVAGEABLE, "Salvage", &note);
        self.actions.extend(tell);
    }

    fn missing(
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
        if wait.class == Class::CorruptStore
            && self.policy.look_up
            && !matches!(missing, Missing::Away { .. })
            && self.stale_record(entry, wait, reference, now, again)
        {
            return;
        }
        let unknown = matches!(
            missing,
            Missing::Nowhere { .. } | Missing::Ambiguous { .. } | Missing::WorkloadDisagrees { .. }
        );
        if unknown && self.policy.look_up && wait.class != Class::CorruptStore {
            self.ask_registry(entry, wait, reference, missing, now, again);
        } else {
            entry.not_actionable(wait, missing.reason(), &missing.message(&wait.image), &mut self.actions);
        }
    }

    /// Tells the pods that wait for a job's image that it failed.
    pub(super) fn tell_failure(&mut self, uid: &str, now: Timestamp) {
        let Some((job, _)) = self.jobs.get(uid) else { return };
        let mut waits = false;
        let note = format!("SalvageJob {}: {}", job.name, status::message(&job.status));
        let owners = &self.world.owners;
        for entry in self.pods.values_mut() {
            let pod = &entry.pod;
            if pod.namespace != job.namespace
                || *pod.node != *job.spec.node_name
                || !owners.opted_in(pod.says, pod.controller.as_deref())
            {
                continue;
            }
            let mut informed = false;
            for wait in entry.pod.waits.clone() {
                if wait.reference.as_ref().is_ok_and(|r| job.is_for(r, &entry.pod.node)) {
                    if !std::mem::replace(&mut informed, true) {
                        self.actions.push(inform::ended(job, &entry.pod.name, now));
                    }
                    let reason = names::event::IMAGE_SALVAGE_FAILED;
                    let tell = entry.tell(&wait, true, reason, "SalvageFailed", &note);
                    self.actions.extend(tell);
                }
            }
            waits |= informed;
        }
        if !waits {
            self.actions.push(inform::ended(job, "", now));
        }
    }
}
