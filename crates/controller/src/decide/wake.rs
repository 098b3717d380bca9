//! Waking pods whose image is on their node, until none waits.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tote_api::{Phase, names};
use tote_image::{Digest, Reference};

use super::entry::{PodEntry, Wake};
use super::{Action, Count, State, inform, sooner};
use crate::backoff::delay;
use crate::detect::class::Class;
use crate::detect::{Wait, WaitingPod};
use crate::salvage::status;
use crate::text;

/// Between two wakes of one pod.
const FIRST_WAKE: Duration = Duration::from_secs(1);
const LAST_WAKE: Duration = Duration::from_secs(10);

/// After so many wakes (some 5 minutes) they become rare.
const MANY_WAKES: u32 = 30;
const RARE_WAKE: Duration = Duration::from_secs(60);

/// After so many wakes (some 25 s, for a node that starts a hundred pods at once is slow) the pod's event says what kubelet is waiting for.
const WAKES_BEFORE_CAUSE: u32 = 6;

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
    pub(super) fn wake(
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
                self.actions.push(inform::ended(job, &pod.name, now));
            }
            let note = format!(
                "{source}. The cause remains: see that the registry serves it before the next pod waits."
            );
            let tell = entry.tell(wait, false, names::event::IMAGE_SALVAGED, "Salvaged", &note);
            self.actions.extend(tell);
        }
        if count == WAKES_BEFORE_CAUSE && wait.class == Class::CorruptStore {
            let note = format!(
                "every blob of {} is on node {}, yet its runtime cannot use it: {}. Remove it there, so that it is pulled or \
                 salvaged anew: crictl rmi {reference}",
                text::image(&wait.image, digest.as_str()),
                pod.node,
                wait.message
            );
            entry.not_actionable(wait, "RuntimeCannotUse", &note, &mut self.actions);
        } else if count == WAKES_BEFORE_CAUSE {
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
}
