//! Asking for jobs: under a name that is free, one at a time, with a pause after a failed job or a refusal.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tote_api::Phase;
use tote_image::{Digest, Reference};

use super::entry::PodEntry;
use super::{Action, Count, CreateAnswer, NewJob, State, sooner};
use crate::backoff::delay;
use crate::detect::Wait;
use crate::fleet::NodeName;
use crate::nodes::NodeFacts;
use crate::salvage::{after, base_name, counter};
use crate::text;

/// After a job the next one for the same image and node waits this long, in seconds, doubled for each that failed, and
/// for each of the last hour whose image is gone again: a node that collects it must not be fed for ever.
const FIRST_PAUSE: i64 = 60;
const LAST_PAUSE: i64 = 3600;

/// The same, after a failed job, when a node holds the image that did not then.
const FIRST_PAUSE_NEW_SOURCE: i64 = 1;

/// After a refusal by the API server: a quota, an admission policy, its own absence.
const FIRST_REFUSAL: Duration = Duration::from_secs(2);
const LAST_REFUSAL: Duration = Duration::from_secs(60);

/// Beyond what tote itself counts to.
const MAX_COUNTER: u32 = 1_000_000;

/// After so many seconds in which nobody asked a refusal is forgotten.
const FORGET_SECONDS: i64 = 600;

/// What came of asking for a job, by its name without the counter.
#[derive(Debug, Default)]
pub(super) struct Asked {
    /// The API server has yet to answer.
    waiting: bool,
    /// Nobody asks again before this time.
    until: Timestamp,
    /// In a row.
    refusals: u32,
    /// The last one.
    refusal: Option<String>,
    /// The highest counter that a job which is not ours bears.
    taken: u32,
}

impl State {
    pub(super) fn apply_created(&mut self, base: String, answer: CreateAnswer, now: Timestamp) {
        match answer {
            CreateAnswer::Made => {
                self.asked.remove(&base);
            }
            CreateAnswer::Taken(number) => {
                let asked = self.asked.entry(base).or_default();
                asked.waiting = false;
                asked.taken = asked.taken.max(number);
            }
            CreateAnswer::Refused(message) => {
                let asked = self.asked.entry(base).or_default();
                asked.waiting = false;
                asked.refusals = asked.refusals.saturating_add(1);
                asked.refusal = Some(message);
                let pause = delay(FIRST_REFUSAL, LAST_REFUSAL, asked.refusals, 0);
                let pause = SignedDuration::try_from(pause).unwrap_or(SignedDuration::from_secs(2));
                asked.until = now.checked_add(pause).unwrap_or(Timestamp::MAX);
            }
        }
    }

    pub(super) fn forget_asked(&mut self, now: Timestamp) {
        self.asked.retain(|_, asked| asked.waiting || after(asked.until, FORGET_SECONDS) > now);
    }

    /// Asks for a job, unless it is too soon; tells whether it was asked for.
    #[allow(clippy::too_many_arguments)] // the facts of one decision
    pub(super) fn ask(
        &mut self,
        entry: &mut PodEntry,
        wait: &Wait,
        reference: &Reference,
        digest: &Digest,
        sources: &[NodeName],
        now: Timestamp,
        again: &mut Option<Timestamp>,
    ) -> bool {
        let pod = entry.pod.clone();
        let Some(NodeFacts { uid: node_uid, .. }) = self.world.nodes.get(&pod.node) else { return false };
        let base = base_name(&pod.namespace, reference, digest, node_uid);
        let asked = self.asked.get(&base);
        // Once may be a moment's absence of the API server.
        let refused = asked.filter(|asked| asked.refusals > 1);
        if let Some(refusal) = refused.and_then(|asked| asked.refusal.as_ref()) {
            let note = format!(
                "{} can be salvaged, but the API server takes no SalvageJob in namespace {}: {refusal}",
                text::image(&wait.image, digest.as_str()),
                pod.namespace
            );
            entry.not_actionable(wait, "JobRefused", &note, &mut self.actions);
        }
        if asked.is_some_and(|asked| asked.waiting) {
            return false; // The answer always comes.
        }
        if let Some(asked) = asked.filter(|asked| asked.until > now) {
            sooner(again, asked.until);
            return false;
        }
        let mut number = asked.map_or(0, |asked| asked.taken);
        let mut ends = 0;
        let mut last = None;
        for job in self.jobs_for_any(reference, &pod.node) {
            let Some(n) = counter(&job.name, &base).filter(|_| job.namespace == pod.namespace) else {
                continue;
            };
            if n < MAX_COUNTER {
                number = number.max(n); // Who wrote a higher one by hand is passed by.
            }
            let ended = job.status.completion_time.as_ref().map(|at| at.0);
            if let Some(at) = ended.filter(|at| job.phase() == Phase::Failed || after(*at, LAST_PAUSE) > now)
            {
                ends += 1;
                if last.is_none_or(|(known, _)| known <= at) {
                    last = Some((at, job.phase() == Phase::Failed && job.has_new_source(sources)));
                }
            }
        }
        if let Some((last, has_new_source)) = last {
            let first = if has_new_source { FIRST_PAUSE_NEW_SOURCE } else { FIRST_PAUSE };
            let pause = first.saturating_mul(1 << (ends - 1).min(10)).min(LAST_PAUSE);
            if after(last, pause) > now {
                sooner(again, after(last, pause));
                return false;
            }
        }
        let number = number.saturating_add(1);
        let asked = self.asked.entry(base.clone()).or_default();
        asked.waiting = true;
        asked.until = now;
        self.actions.push(Action::CreateJob(NewJob {
            name: format!("{base}-{number}"),
            base,
            number,
            namespace: pod.namespace,
            image: wait.image.clone(),
            digest: digest.clone(),
            node: pod.node,
        }));
        self.actions.push(Action::Count(Count::Salvageable));
        true
    }
}
