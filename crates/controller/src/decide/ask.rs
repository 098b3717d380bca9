//! Asking for jobs: under a name that is free, one at a time, with a pause after a failed job or a refusal.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tote_api::Phase;
use tote_image::{Digest, Reference};

use super::pods::PodEntry;
use super::{Action, Count, CreateAnswer, NewJob, State, sooner};
use crate::backoff::delay;
use crate::detect::Wait;
use crate::salvage::{after, base_name, counter};
use crate::text;

/// After a failed job the next one for the same image and node waits this long, doubled each time, in seconds.
const FIRST_PAUSE: i64 = 60;
const LAST_PAUSE: i64 = 3600;

/// For so many seconds the API server's answer is waited for.
const ANSWER_SECONDS: i64 = 15;

/// After a refusal by the API server: a quota, an admission policy, its own absence.
const FIRST_REFUSAL: Duration = Duration::from_secs(2);
const LAST_REFUSAL: Duration = Duration::from_secs(60);

/// After so many seconds in which nobody asked a refusal is forgotten.
const FORGET_SECONDS: i64 = 600;

/// What came of asking for a job, by its name without the counter.
#[derive(Debug, Default)]
pub(super) struct Asked {
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
                asked.taken = asked.taken.max(number);
                asked.until = now;
            }
            CreateAnswer::Refused(message) => {
                let asked = self.asked.entry(base).or_default();
                asked.refusals = asked.refusals.saturating_add(1);
                asked.refusal = Some(message);
                let pause = delay(FIRST_REFUSAL, LAST_REFUSAL, asked.refusals, 0);
                let pause = SignedDuration::try_from(pause).unwrap_or(SignedDuration::from_secs(2));
                asked.until = now.checked_add(pause).unwrap_or(Timestamp::MAX);
            }
        }
    }

    pub(super) fn forget_asked(&mut self, now: Timestamp) {
        self.asked.retain(|_, asked| after(asked.until, FORGET_SECONDS) > now);
    }

    /// Asks for a job, unless it is too soon; tells whether it was asked for.
    pub(super) fn ask(
        &mut self,
        entry: &mut PodEntry,
        wait: &Wait,
        reference: &Reference,
        digest: &Digest,
        now: Timestamp,
        again: &mut Option<Timestamp>,
    ) -> bool {
        let pod = entry.pod.clone();
        let Some(node_uid) = self.world.nodes.get(&pod.node) else { return false };
        let base = base_name(&pod.namespace, reference, digest, node_uid);
        let asked = self.asked.get(&base);
        if let Some(refusal) = asked.and_then(|asked| asked.refusal.as_ref()) {
            let note = format!(
                "{} can be salvaged, but the API server takes no SalvageJob in namespace {}: {refusal}",
                text::image(&wait.image, digest.as_str()),
                pod.namespace
            );
            entry.not_actionable(wait, "JobRefused", &note, &mut self.actions);
        }
        if let Some(asked) = asked.filter(|asked| asked.until > now) {
            sooner(again, asked.until);
            return false;
        }
        let mut number = asked.map_or(0, |asked| asked.taken);
        let mut failures = 0;
        let mut failed = None;
        for job in self.jobs_for_any(reference, &pod.node) {
            let Some(n) = counter(&job.name, &base).filter(|_| job.namespace == pod.namespace) else {
                continue;
            };
            number = number.max(n);
            if job.phase() == Phase::Failed {
                failures += 1;
                failed = failed.max(job.status.completion_time.as_ref().map(|at| at.0));
            }
        }
        if let Some(failed) = failed {
            let pause = FIRST_PAUSE.saturating_mul(1 << (failures - 1).min(10)).min(LAST_PAUSE);
            if after(failed, pause) > now {
                sooner(again, after(failed, pause));
                return false;
            }
        }
        let number = number.saturating_add(1);
        let until = after(now, ANSWER_SECONDS);
        self.asked.entry(base.clone()).or_default().until = until;
        sooner(again, until);
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
