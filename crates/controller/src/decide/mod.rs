//! The state of the controller: takes in events, gives out actions. No effects, no clock of its own.
//!
//! `pods` (with `ask`, `corrupt`, `lookups` and `wake`) decides over pods that wait, `jobs` (with `book`) over `SalvageJob`s, `nodes` over
//! what is said of nodes; all only from what is known here.

mod action;
mod ask;
mod book;
mod corrupt;
mod entry;
mod event;
mod inform;
mod jobs;
mod lookups;
mod nodes;
mod pods;
mod secrets;
#[cfg(test)]
mod tests;
mod wake;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use jiff::Timestamp;
use tote_api::Phase;
use tote_image::Reference;

pub use action::{About, Action, Count, NewJob};
pub use book::version;
pub use event::{CreateAnswer, Event, Kind, LookupAnswer, TransferEvent};
pub use lookups::Question;

use crate::access;
use crate::detect::{Classes, WaitingPod};
use crate::fleet::NodeName;
use crate::patterns::Images;
use crate::resolve::TagPolicy;
use crate::running::Runs;
use crate::salvage::{Job, Limits, after};
use crate::world::World;
use ask::Asked;
use book::Book;
use entry::PodEntry;
use lookups::Lookups;
use nodes::Notes;
use secrets::Secrets;

/// What the operator's flags set.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The kill switch: false, and nothing is created, moved or woken.
    pub enabled: bool,
    /// Which images may be salvaged.
    pub images: Images,
    /// Which failures are answered with a copy.
    pub classes: Classes,
    /// Bounds of what runs at once.
    pub limits: Limits,
    /// What to do about a tag of several meanings.
    pub tags: TagPolicy,
    /// Whether registries are asked where the nodes do not tell what a tag means.
    pub look_up: bool,
    /// What is asked for before an image moves, beside the opt-ins.
    pub access: access::Policy,
}

/// All that is known.
pub struct State {
    policy: Policy,
    world: World,
    pods: BTreeMap<Arc<str>, PodEntry>,
    jobs: BTreeMap<Arc<str>, (Job, Book)>,
    /// UIDs of jobs by node and image.
    by_image: HashMap<(String, Reference), BTreeSet<Arc<str>>>,
    /// Jobs asked for, by base name.
    asked: HashMap<String, Asked>,
    /// What was seen of nodes and said of them.
    notes: Notes,
    lookups: Lookups,
    secrets: Secrets,
    /// When an image's records were last removed from a node.
    removed: HashMap<(NodeName, Arc<str>), Timestamp>,
    synced: HashSet<Kind>,
    streams: u64,
    actions: Vec<Action>,
}

/// What to do now, and when to ask again although nothing happened.
#[derive(Debug)]
pub struct Decision {
    /// To be performed in this order.
    pub actions: Vec<Action>,
    /// When time alone makes a difference.
    pub again: Option<Timestamp>,
}

impl State {
    /// Nothing known yet.
    pub fn new(policy: Policy) -> Self {
        Self {
            world: World::new(policy.enabled, policy.images.clone(), policy.tags, policy.access),
            policy,
            pods: BTreeMap::new(),
            jobs: BTreeMap::new(),
            by_image: HashMap::new(),
            asked: HashMap::new(),
            notes: Notes::default(),
            lookups: Lookups::default(),
            secrets: Secrets::default(),
            removed: HashMap::new(),
            synced: HashSet::new(),
            streams: 0,
            actions: Vec::new(),
        }
    }

    /// Whether every watch has told its first list.
    pub fn is_synced(&self) -> bool {
        Kind::ALL.iter().all(|kind| self.synced.contains(kind))
    }

    /// Jobs by phase, nodes with a session, distinct images, pods that wait.
    pub fn figures(&self) -> Figures {
        let mut jobs = [0; 4];
        for (job, _) in self.jobs.values() {
            jobs[job.phase() as usize] += 1;
        }
        Figures {
            jobs,
            nodes_up: self.world.fleet.nodes_up(),
            images: self.world.fleet.images(),
            waiting: self.pods.len(),
        }
    }

    /// Takes in what happened. Tells whether there is anything to decide: most of what a cluster tells, such
    /// as that a pod still runs, changes nothing.
    pub fn apply(&mut self, event: Event, now: Timestamp) -> bool {
        match event {
            Event::Pod { uid, waiting } => return self.apply_pod(uid, waiting),
            Event::Runs { uid, runs } => return self.apply_runs(&uid, runs.map(|runs| *runs)),
            Event::Owner { uid, owner } => return self.world.owners.set(&uid, owner),
            Event::Namespace { name, consent: Some(consent) } => {
                return self.world.namespaces.insert(name, consent) != Some(consent);
            }
            Event::Namespace { name, consent: None } => {
                return self.world.namespaces.remove(&name).is_some();
            }
            Event::Node { name, facts: Some(facts) } => {
                let before = self.world.nodes.insert(name.clone(), facts);
                return before.is_none_or(|before| self.world.nodes[&name].is_news_after(&before));
            }
            Event::SandboxFailed { node, image, at } => {
                return self.notes.sandbox_failed(node, image, at.min(now));
            }
            Event::Node { name, facts: None } => {
                let was = self.world.nodes.remove(&name).is_some();
                self.world.forget_gone_nodes();
                return was;
            }
            Event::Job(job) => return self.apply_job(*job, true, now),
            Event::JobAnswered(job) => return self.apply_job(*job, false, now),
            Event::JobGone { uid } => self.job_gone(&uid),
            Event::Listed(kind, seen) => self.listed(kind, &seen),
            Event::Unlisted(kind) => return self.synced.insert(kind),
            Event::Fleet(event) => self.world.apply_fleet(event, now),
            Event::Transfer { uid, stream, event } => self.apply_transfer(&uid, stream, event, now),
            Event::Created { base, answer } => self.apply_created(base, answer, now),
            Event::SecretMissing { namespace, uid, at } => {
                return self.secrets.missing(namespace, uid, at, now);
            }
            Event::LookedUp { question, answer } => self.lookups.answered(&question, answer, now),
            Event::StatusWritten { uid, version } => self.status_written(&uid, version, now),
            Event::DeleteFailed { uid } => self.delete_failed(&uid, now),
        }
        true
    }

    /// What to do about all of it.
    pub fn decide(&mut self, now: Timestamp) -> Decision {
        let mut again = None;
        if self.is_synced() {
            self.forget_asked(now);
            self.lookups.forget(now);
            self.secrets.forget(now);
            self.removed.retain(|_, at| after(*at, 600) > now);
            self.world.settle(now);
            self.world.forget_vouched(now);
            self.decide_pods(now, &mut again);
            self.decide_jobs(now, &mut again);
            self.decide_nodes(now, &mut again);
        }
        Decision { actions: std::mem::take(&mut self.actions), again }
    }

    /// What runs matters to pods of its namespace that wait.
    fn apply_runs(&mut self, uid: &Arc<str>, runs: Option<Runs>) -> bool {
        let namespace = runs.as_ref().map(|runs| runs.namespace.clone());
        let matters = namespace.is_some_and(|name| self.pods.values().any(|e| e.pod.namespace == name));
        self.world.running.set(uid, runs) && matters
    }

    fn apply_pod(&mut self, uid: Arc<str>, waiting: Option<WaitingPod>) -> bool {
        let Some(mut pod) = waiting else { return self.pods.remove(&uid).is_some() };
        let Some(entry) = self.pods.get_mut(&uid) else {
            return self.pods.insert(uid, PodEntry::new(pod)).is_none();
        };
        pod.waits = pod.waits.into_iter().map(|wait| wait.remembering(&entry.pod)).collect();
        let before = std::mem::replace(&mut entry.pod, pod);
        if before == entry.pod {
            return false;
        }
        let failed = wake::pulls_that_failed(&before, &entry.pod);
        let node = entry.pod.node.clone();
        if !failed.is_empty() {
            self.pods.values_mut().filter(|entry| entry.pod.node == node).for_each(|e| e.hasten(&failed));
        }
        true
    }

    /// A watch began anew and has told all there is: the rest is gone.
    fn listed(&mut self, kind: Kind, seen: &HashSet<Arc<str>>) {
        self.synced.insert(kind);
        match kind {
            Kind::Pods => {
                self.pods.retain(|uid, _| seen.contains(uid));
                self.world.running.retain(seen);
            }
            Kind::PullSecrets => {}
            Kind::Owners(kind) => self.world.owners.retain(kind, seen),
            Kind::Namespaces => self.world.namespaces.retain(|name, _| seen.contains(name)),
            Kind::Nodes => {
                self.world.nodes.retain(|name, _| seen.contains(name));
                self.world.forget_gone_nodes();
            }
            Kind::Jobs => {
                let absent: Vec<_> = self.jobs.keys().filter(|uid| !seen.contains(*uid)).cloned().collect();
                for uid in absent {
                    // One just made may be younger than the list; the next list will have it.
                    let is_new = self
                        .jobs
                        .get_mut(&uid)
                        .is_some_and(|(_, book)| !std::mem::replace(&mut book.watched, true));
                    if !is_new {
                        self.job_gone(&uid);
                    }
                }
            }
        }
    }
}

/// Numbers for the gauges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// By [`Phase`], in its order.
    pub jobs: [usize; 4],
    /// Nodes whose agent has a session.
    pub nodes_up: usize,
    /// Distinct images of the fleet.
    pub images: usize,
    /// Pods that wait for an image.
    pub waiting: usize,
}

const _: () = assert!(Phase::Pending as usize == 0 && Phase::Failed as usize == 3);

fn sooner(again: &mut Option<Timestamp>, at: Timestamp) {
    *again = Some(again.map_or(at, |known| known.min(at)));
}
