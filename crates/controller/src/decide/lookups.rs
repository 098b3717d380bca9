//! What registries are asked, what they answered, and when they are asked again. No effects.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tote_api::names;
use tote_image::Reference;

use super::entry::PodEntry;
use super::{Action, Count, LookupAnswer, State, sooner};
use crate::backoff::delay;
use crate::detect::Wait;
use crate::resolve::{self, Missing, Resolution, Why};
use crate::running::Meant;
use crate::salvage::after;
use crate::text;

/// A question may be asked again so long after its answer, doubled each time in a row up to the second.
const AGAIN: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(600));
const AFTER_A_FAILURE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));

/// For how many seconds an answer is acted on: a tag moves.
const FRESH_SECONDS: i64 = 60;

/// Questions that wait for an answer, at most; who comes next looks again after a second.
const AT_ONCE: usize = 32;

/// Questions remembered, at most, and for how many seconds after nobody wants to know any more.
const REMEMBERED: usize = 4096;
const FORGET_SECONDS: i64 = 900;

/// Who asks for what: the answer may depend on the pull secrets.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Question {
    /// The pod's namespace.
    pub namespace: Arc<str>,
    /// What is asked for.
    pub reference: Reference,
    /// Names of the pod's pull secrets.
    pub pull_secrets: Vec<Arc<str>>,
}

/// What is known of a question.
#[derive(Debug)]
struct Known {
    /// The last one, and when it came.
    answer: Option<(LookupAnswer, Timestamp)>,
    /// A look-up is under way; its answer always comes.
    waiting: bool,
    /// When it is asked again, if somebody still wants to know.
    next: Timestamp,
    /// Answers in a row of one kind.
    count: u32,
    wanted: Timestamp,
}

/// All questions.
#[derive(Debug, Default)]
pub(super) struct Lookups {
    known: HashMap<Question, Known>,
    /// How many wait for an answer.
    under_way: usize,
}

impl Lookups {
    /// The last answer, if there is one; asks if that is due.
    pub(super) fn ask(
        &mut self,
        question: Question,
        now: Timestamp,
        again: &mut Option<Timestamp>,
        actions: &mut Vec<Action>,
    ) -> Option<LookupAnswer> {
        let is_full = !self.known.contains_key(&question) && self.known.len() >= REMEMBERED;
        if is_full {
            sooner(again, after(now, 60));
            return None;
        }
        let known = self.known.entry(question.clone()).or_insert(Known {
            answer: None,
            waiting: false,
            next: now,
            count: 0,
            wanted: now,
        });
        known.wanted = now;
        if !known.waiting && known.next <= now {
            if self.under_way >= AT_ONCE {
                sooner(again, after(now, 1));
            } else {
                known.waiting = true;
                self.under_way += 1;
                actions.push(Action::LookUp(question));
            }
        } else if !known.waiting {
            sooner(again, known.next);
        }
        known.answer.as_ref().map(|(answer, _)| answer.clone())
    }

    /// Takes in an answer.
    pub(super) fn answered(&mut self, question: &Question, answer: LookupAnswer, now: Timestamp) {
        let Some(known) = self.known.get_mut(question) else { return };
        let kind = std::mem::discriminant(&answer);
        let is_same = known.answer.as_ref().is_some_and(|(last, _)| std::mem::discriminant(last) == kind);
        known.count = if is_same { known.count.saturating_add(1) } else { 1 };
        let (first, last) = match answer {
            LookupAnswer::Is(_) | LookupAnswer::Absent(_) => AGAIN,
            LookupAnswer::Failed(_) => AFTER_A_FAILURE,
        };
        let pause = SignedDuration::try_from(delay(first, last, known.count, 0))
            .unwrap_or(SignedDuration::from_secs(30));
        known.next = now.checked_add(pause).unwrap_or(Timestamp::MAX);
        self.under_way -= usize::from(std::mem::take(&mut known.waiting));
        known.answer = Some((answer, now));
    }

    /// Has a question whose answer is too old to act on asked at once; tells whether it is.
    pub(super) fn is_stale(&mut self, question: &Question, now: Timestamp) -> bool {
        let Some(known) = self.known.get_mut(question) else { return false };
        let is_stale = known.answer.as_ref().is_some_and(|(_, at)| after(*at, FRESH_SECONDS) <= now);
        if is_stale {
            known.next = now;
        }
        is_stale
    }

    pub(super) fn forget(&mut self, now: Timestamp) {
        self.known.retain(|_, known| known.waiting || after(known.wanted, FORGET_SECONDS) > now);
    }
}

impl State {
    /// The fleet cannot tell what a tag means, or says that nobody has it: its registry may know.
    pub(super) fn ask_registry(
        &mut self,
        entry: &mut PodEntry,
        wait: &Wait,
        reference: &Reference,
        missing: &Missing,
        now: Timestamp,
        again: &mut Option<Timestamp>,
    ) {
        let pod = &entry.pod;
        let (namespace, pull_secrets) = (pod.namespace.clone(), pod.pull_secrets.clone());
        let question = Question { namespace, reference: reference.clone(), pull_secrets };
        let Some(answer) = self.lookups.ask(question.clone(), now, again, &mut self.actions) else {
            return;
        };
        let digest = match answer {
            LookupAnswer::Is(digest) => digest,
            LookupAnswer::Absent(why) | LookupAnswer::Failed(why) => {
                let note = format!("{}; {why}", missing.message(&wait.image));
                entry.not_actionable(wait, missing.reason(), &note, &mut self.actions);
                return;
            }
        };
        let target = entry.pod.node.clone();
        let workload = Meant::new();
        let by_digest = resolve::Question {
            reference,
            pin: Some(&digest),
            target: &target,
            source: None,
            workload: &workload,
        };
        match by_digest.resolve(&self.world.fleet, self.world.tags) {
            Resolution::Found { .. } if self.lookups.is_stale(&question, now) => {
                self.lookups.ask(question, now, again, &mut self.actions);
            }
            Resolution::Found { digest, sources, on_target, .. } => {
                self.world.vouch(reference, &digest, now);
                let found = (&digest, Why::Upstream, &*sources, on_target);
                self.want(entry, wait, reference, found, now, again);
            }
            Resolution::Missing(Missing::Nowhere { .. }) => {
                let note = format!(
                    "{}: so its registry answers, but no node holds that image, so none can be salvaged. Find out why \
                     kubelet cannot pull it.",
                    text::image(&wait.image, digest.as_str())
                );
                let reason = names::event::IMAGE_RESOLVED_UNCACHED;
                if let Some(tell) = entry.tell(wait, true, reason, "ResolvedUncached", &note) {
                    self.actions.push(tell);
                    self.actions.push(Action::Count(Count::NotActionable));
                }
            }
            Resolution::Missing(missing) => {
                entry.not_actionable(
                    wait,
                    missing.reason(),
                    &missing.message(&wait.image),
                    &mut self.actions,
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tote_image::Digest;

    use super::*;

    fn question(n: usize) -> Question {
        Question {
            namespace: "shop".into(),
            reference: format!("r.test/x:{n}").parse().unwrap(),
            pull_secrets: vec![],
        }
    }

    /// Asks at every second while somebody wants to know, with the answer coming at once; the seconds of the look-ups.
    fn times(answer: &LookupAnswer, seconds: i64) -> Vec<i64> {
        let mut lookups = Lookups::default();
        let start = Timestamp::UNIX_EPOCH;
        let mut times = Vec::new();
        for second in 0..seconds {
            let mut actions = Vec::new();
            let now = after(start, second);
            let says = lookups.ask(question(1), now, &mut None, &mut actions);
            assert_eq!(says, (second > 0).then(|| answer.clone()));
            if !actions.is_empty() {
                times.push(second);
                lookups.answered(&question(1), answer.clone(), now);
            }
        }
        times
    }

    #[test]
    fn a_question_is_repeated_ever_more_rarely() {
        let is = times(&LookupAnswer::Is(Digest::sha256(b"")), 3600);
        assert!((8..=11).contains(&is.len()) && is[1] >= 24, "{is:?}");
        let failed = times(&LookupAnswer::Failed("no".into()), 3600);
        assert!((16..=20).contains(&failed.len()) && (4..=5).contains(&failed[1]), "{failed:?}");
    }

    #[test]
    fn what_is_under_way_and_what_is_remembered_have_bounds() {
        let mut lookups = Lookups::default();
        let start = Timestamp::UNIX_EPOCH;
        let (mut again, mut actions) = (None, Vec::new());
        for _ in 0..2 {
            for n in 0..REMEMBERED + 100 {
                assert_eq!(lookups.ask(question(n), start, &mut again, &mut actions), None);
            }
        }
        assert_eq!((actions.len(), lookups.known.len()), (AT_ONCE, REMEMBERED));
        assert_eq!(again, Some(after(start, 1)));
        let Action::LookUp(first) = &actions[0] else { panic!("{:?}", actions[0]) };
        lookups.answered(first, LookupAnswer::Absent(String::new()), start);
        lookups.forget(after(start, FORGET_SECONDS));
        assert_eq!(lookups.known.len(), AT_ONCE - 1, "those whose answer is to come");
        lookups.answered(&question(REMEMBERED), LookupAnswer::Failed(String::new()), start);
        assert_eq!(lookups.known.len(), AT_ONCE - 1);
    }
}
