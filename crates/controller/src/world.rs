//! The facts that decisions are made over, and when they are complete enough. No effects.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;
use tote_image::{Digest, Reference};

use crate::access::{self, Access, Pulled};
use crate::detect::Consent;
use crate::fleet::{FleetEvent, Inventory, NodeName};
use crate::nodes::{Kubelet, NodeFacts};
use crate::owners::Owners;
use crate::patterns::Images;
use crate::resolve::TagPolicy;
use crate::running::Running;
use crate::salvage::{Source, after};

/// For how many seconds an agent is waited for before the fleet is judged without it.
const SETTLE_SECONDS: i64 = 10;

/// For how many seconds a registry's word stands for what a tag may mean: as long as a job of detection may be Pending.
const VOUCHED_SECONDS: i64 = 3600;

/// Namespaces, nodes, what the nodes hold, and what is known of pods beside those that wait.
#[derive(Debug, Default)]
pub struct World {
    /// The kill switch: false, and nothing moves.
    pub enabled: bool,
    /// Which images may be salvaged.
    pub images: Images,
    /// What is asked for before an image moves, beside the opt-ins.
    pub access: access::Policy,
    /// What each namespace says.
    pub namespaces: HashMap<Arc<str>, Consent>,
    /// What there is to know of each node.
    pub nodes: HashMap<NodeName, NodeFacts>,
    /// What the nodes hold.
    pub fleet: Inventory,
    /// What to do about a tag of several meanings.
    pub tags: TagPolicy,
    /// What controls pods.
    pub owners: Owners,
    /// What runs.
    pub running: Running,
    /// What registries said that references mean, and when; one for each look-up that was acted on.
    vouched: HashMap<(Reference, Digest), Timestamp>,
    /// When it was first asked.
    asked: Option<Timestamp>,
    /// Since when the set of agents is known.
    agents_known: Option<Timestamp>,
    /// Agents without a session, and since when.
    missing: HashMap<NodeName, Timestamp>,
    expected: std::collections::BTreeSet<NodeName>,
    /// Whether the fleet was known well enough once.
    settled: bool,
}

impl World {
    /// An empty world.
    pub fn new(enabled: bool, images: Images, tags: TagPolicy, access: access::Policy) -> Self {
        Self { enabled, images, access, tags, ..Self::default() }
    }

    /// Why the operator's patterns and bounds do not let an image be salvaged to the node `target`, with a condition's reason;
    /// `None` if they do.
    pub fn refusal(
        &self,
        reference: &Reference,
        digest: &Digest,
        target: &str,
    ) -> Option<(&'static str, String)> {
        let platform = self.fleet.node(target).map(|node| &node.platform);
        let denied = self.images.refusal(reference, self.fleet.names_of(digest).into_iter());
        let too_large = || self.images.too_large(self.fleet.size(digest, platform));
        denied.map(|why| ("ImageDenied", why)).or_else(|| too_large().map(|why| ("ImageTooLarge", why)))
    }

    /// Whether a namespace may have an image on the node `target`: by all that kubelets have written down about it, or because
    /// a pod of the namespace runs it.
    pub fn access(&self, namespace: &str, digest: &Digest, target: &str) -> Access {
        if self.access == access::Policy::Any {
            return Access::NotAsked;
        }
        let platform = self.fleet.node(target).map(|node| &node.platform);
        // Where the digest is of an index with several images, a pod may run another than the one that is wanted.
        let is_one = self.fleet.image_ids(digest, None).len() == 1;
        let runs_already = is_one && self.running.runs_in(namespace, digest);
        let images = self.fleet.image_ids(digest, platform);
        let each = images
            .into_iter()
            .map(|id| access::verdict(self.fleet.records(id), namespace, runs_already, self.access));
        match access::strictest(each) {
            Access::Unrecorded | Access::EveryPod if self.fleet.silent_holders(digest) > 0 => {
                Access::Untold { nodes: self.fleet.silent_holders(digest) }
            }
            access => access,
        }
    }

    /// All kubelets' records of the image that a digest is on the node `target`.
    pub fn records(&self, digest: &Digest, target: &str) -> Vec<&Pulled> {
        let platform = self.fleet.node(target).map(|node| &node.platform);
        self.fleet.image_ids(digest, platform).into_iter().flat_map(|id| self.fleet.records(id)).collect()
    }

    /// The registry has just said that a reference means this.
    pub fn vouch(&mut self, reference: &Reference, digest: &Digest, now: Timestamp) {
        self.vouched.insert((reference.clone(), digest.clone()), now);
    }

    /// To be called before decisions: what registries said does not hold for ever.
    pub fn forget_vouched(&mut self, now: Timestamp) {
        self.vouched.retain(|_, said| after(*said, VOUCHED_SECONDS) > now);
    }

    /// Whether a tag may mean a digest: a node knows that by a name of the repository, or the registry has said so.
    pub fn may_mean(&self, reference: &Reference, digest: &Digest) -> bool {
        let names = self.fleet.names_of(digest);
        self.vouched.contains_key(&(reference.clone(), digest.clone()))
            || names.iter().any(|name| {
                name.parse::<Reference>().is_ok_and(|known| known.repository() == reference.repository())
            })
    }

    /// What a namespace says; one that is not known is gone.
    pub fn consent(&self, namespace: &str) -> Consent {
        self.namespaces.get(namespace).copied().unwrap_or(Consent::Terminating)
    }

    /// A node as a source, if its agent has a session.
    pub fn source(&self, node: &NodeName) -> Option<Source> {
        let last_resort = self.is_shaky(node);
        let address = self.fleet.node(node)?.address.clone();
        Some(Source { node: node.clone(), address, last_resort, relay: false })
    }

    /// Whether a node's container runtime does not answer: its agent, or, where that is away itself, kubelet.
    pub fn is_runtime_down(&self, node: &str) -> bool {
        match self.fleet.node(node) {
            Some(known) => known.runtime_down,
            None => self.nodes.get(node).is_some_and(|facts| facts.kubelet == Kubelet::RuntimeDown),
        }
    }

    /// Whether a node had better be left alone where others do as well: it is being taken out of service, or kubelet
    /// deletes images there.
    pub fn is_shaky(&self, node: &str) -> bool {
        self.nodes.get(node).is_some_and(|facts| facts.cordoned || facts.disk_pressure)
    }

    /// When the fleet is known well enough to say that nobody has an image, or what a tag means; `None` if it
    /// is now.
    pub fn unsettled_until(&self, now: Timestamp) -> Option<Timestamp> {
        let Some(known) = self.agents_known else {
            // Not for ever: whoever may not read EndpointSlices is to hear that nobody has the image.
            return match self.asked {
                None => Some(after(now, 1)),
                Some(asked) => Some(after(asked, SETTLE_SECONDS)).filter(|until| *until > now),
            };
        };
        // At first a node without an agent may be one whose agent is being replaced.
        let at_first =
            (!self.settled && self.nodes.keys().any(|node| !self.fleet.is_up(node))).then_some(known);
        let since = self.missing.values().copied().chain(at_first);
        since.map(|since| after(since, SETTLE_SECONDS)).filter(|until| *until > now).max()
    }

    /// Whether a node without a session may hold an image all the same: it did when last heard of, or it may be heard of
    /// in a moment.
    pub fn may_hold(&self, node: &str, reference: &Reference, now: Timestamp) -> bool {
        let known = self.fleet.meanings(&reference.to_string()).any(|(name, _)| **name == *node);
        known || self.unsettled_until(now).is_some()
    }

    /// To be called before decisions: notes that the fleet is known well enough for the first time.
    pub fn settle(&mut self, now: Timestamp) {
        self.asked.get_or_insert(now);
        self.settled = self.settled || self.unsettled_until(now).is_none();
    }

    /// When the fleet will be known well enough for the first time; `None` if it was.
    pub fn first_settled(&self, now: Timestamp) -> Option<Timestamp> {
        if self.settled { None } else { self.unsettled_until(now) }
    }

    /// To be called when a node is gone: what it meant by names counts no more.
    pub fn forget_gone_nodes(&mut self) {
        self.fleet.forget_all_but(|name| self.nodes.contains_key(name));
    }

    /// Takes in what a session tells.
    pub fn apply_fleet(&mut self, event: FleetEvent, now: Timestamp) {
        match event {
            FleetEvent::Expected(nodes) => {
                self.agents_known.get_or_insert(now);
                self.expected = nodes;
            }
            FleetEvent::Up { node, address, platform, problem, records, images } => {
                self.fleet.up(&node, address, platform, problem, records);
                for image in images {
                    self.fleet.upsert(&node, image);
                }
            }
            FleetEvent::Delta { node, upserted, removed } => {
                // First what is new: a name that moved is then known all the time.
                for image in upserted {
                    self.fleet.upsert(&node, image);
                }
                for digest in &removed {
                    self.fleet.remove(&node, digest);
                }
            }
            FleetEvent::Runtime { node, is_down } => self.fleet.set_runtime_down(&node, is_down),
            FleetEvent::Down { node } => {
                self.fleet.down(&node);
                self.forget_gone_nodes();
            }
        }
        self.missing.retain(|node, _| self.expected.contains(node) && !self.fleet.is_up(node));
        for node in &self.expected {
            if !self.fleet.is_up(node) {
                self.missing.entry(node.clone()).or_insert(now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tote_image::Platform;
    use tote_rpc::v1::PullRecords;

    use super::*;

    #[test]
    fn is_settled_when_every_agent_answers_or_was_waited_for() {
        let start = Timestamp::UNIX_EPOCH;
        let mut world = World::new(true, Images::default(), TagPolicy::Refuse, access::Policy::Records);
        assert!(world.unsettled_until(start).is_some(), "the agents are not known yet");
        world.apply_fleet(FleetEvent::Expected(["a".into(), "b".into()].into()), start);
        assert_eq!(world.unsettled_until(start), Some(after(start, 10)));
        let up = |node: &str| FleetEvent::Up {
            node: node.into(),
            address: String::new(),
            platform: Platform::new("linux", "amd64", ""),
            problem: String::new(),
            records: PullRecords::Kept,
            images: vec![],
        };
        world.apply_fleet(up("a"), start);
        assert!(world.unsettled_until(start).is_some());
        assert_eq!(world.unsettled_until(after(start, 11)), None, "b was waited for");
        world.apply_fleet(up("b"), start);
        assert_eq!(world.unsettled_until(start), None);
        world.nodes.insert("c".into(), NodeFacts::ready("uid-c"));
        assert_eq!(
            world.unsettled_until(start),
            Some(after(start, 10)),
            "the agent of c may be between two pods"
        );
        world.nodes.remove("c");
        world.settle(start);
        world.nodes.insert("c".into(), NodeFacts::ready("uid-c"));
        assert_eq!(world.unsettled_until(start), None, "a node that comes later may never have one");
        world.apply_fleet(FleetEvent::Down { node: "a".into() }, after(start, 60));
        assert!(world.unsettled_until(after(start, 61)).is_some());
    }
}
