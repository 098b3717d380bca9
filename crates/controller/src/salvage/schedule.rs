//! Whose turn it is: slots are a matter of the whole fleet, not of one job.

use std::collections::{BTreeMap, HashMap, HashSet};

use jiff::Timestamp;
use tote_image::{Digest, Platform};

use super::job::Source;
use crate::fleet::NodeName;

/// The most sources one transfer is given.
pub const MAX_SOURCES: usize = 4;

/// Bounds of what runs at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Transfers of the whole cluster.
    pub cluster: usize,
    /// Transfers to one node.
    pub target: usize,
    /// Transfers that take from one node. One that has it as a last resort, beside others, does not count.
    pub source: usize,
}

/// The agent of a target, by which others may take from there what has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agent {
    /// `ip:port`.
    pub address: String,
    /// The node's platform: to one of another it has not all to give.
    pub platform: Platform,
}

/// Something that wants a transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Demand {
    /// Whose it is: a job's UID.
    pub origin: std::sync::Arc<str>,
    /// What.
    pub digest: Digest,
    /// Where to.
    pub node: NodeName,
    /// The target's agent; `None` if others had better not take from there.
    pub agent: Option<Agent>,
    /// Where it is to be had; empty if nothing needs to be moved.
    pub sources: Vec<Source>,
    /// Whether it may be had of others that are getting it, too.
    pub relays: bool,
    /// Nodes that had better be used after others; the higher, the later. 0 for one that is not named.
    pub reluctance: BTreeMap<NodeName, u8>,
    /// Whether the target's agent may be at it already: it goes first, whatever its priority.
    pub begun: bool,
    /// Higher goes first.
    pub priority: i32,
    /// Of equal priority, older goes first.
    pub since: Timestamp,
}

/// A transfer under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// What.
    pub digest: Digest,
    /// Where to.
    pub node: NodeName,
    /// The target's agent; `None` if others had better not take from there.
    pub agent: Option<Agent>,
    /// The sources it was given.
    pub sources: Vec<Source>,
}

/// What becomes of a demand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Starts, from these sources.
    Start(Vec<Source>),
    /// Waits; for what.
    Queued(&'static str),
}

/// Hands out the free slots: to what has begun, then by priority, then age. One digest goes to one node in one transfer at a time; who
/// else wants it there goes after, and then finds it.
///
/// Where every node that has an image feeds somebody with it already, the next target takes it of one that is getting it, and has the
/// others as a last resort. So what a node gives is about one image, however many want it.
pub fn schedule(demands: &[Demand], running: &[Assignment], limits: Limits) -> Vec<Turn> {
    let mut moving = Moving::default();
    for transfer in running {
        moving.add(transfer.clone());
    }
    let mut order: Vec<usize> = (0..demands.len()).collect();
    order.sort_by(|&a, &b| {
        let (a, b) = (&demands[a], &demands[b]);
        (b.begun, b.priority)
            .cmp(&(a.begun, a.priority))
            .then_with(|| (a.since, &a.origin).cmp(&(b.since, &b.origin)))
    });
    let mut turns = vec![Turn::Queued("a free slot"); demands.len()];
    for index in order {
        let demand = &demands[index];
        if moving.transfers.len() >= limits.cluster {
            continue; // Priority is strict: nobody smaller overtakes for a slot of the cluster.
        }
        if moving.of(&demand.digest).any(|transfer| transfer.node == demand.node) {
            turns[index] = Turn::Queued("the same image that is being moved to this node for another job");
            continue;
        }
        if moving.transfers.iter().filter(|transfer| transfer.node == demand.node).count() >= limits.target {
            turns[index] = Turn::Queued("a free slot of its node");
            continue;
        }
        let sources = moving.sources(demand, limits.source);
        if sources.is_empty() && !demand.sources.is_empty() {
            turns[index] = Turn::Queued("a source that is less busy");
            continue;
        }
        let (digest, node, agent) = (demand.digest.clone(), demand.node.clone(), demand.agent.clone());
        moving.add(Assignment { digest, node, agent, sources: sources.clone() });
        turns[index] = Turn::Start(sources);
    }
    turns
}

/// The transfers under way, and those that were just started.
#[derive(Default)]
struct Moving {
    transfers: Vec<Assignment>,
    /// How many transfers take from a node.
    loads: HashMap<NodeName, usize>,
}

impl Moving {
    fn add(&mut self, transfer: Assignment) {
        for source in givers(&transfer) {
            *self.loads.entry(source.node.clone()).or_default() += 1;
        }
        self.transfers.push(transfer);
    }

    fn of(&self, digest: &Digest) -> impl Iterator<Item = &Assignment> {
        self.transfers.iter().filter(move |transfer| transfer.digest == *digest)
    }

    fn load(&self, node: &NodeName) -> usize {
        self.loads.get(node).copied().unwrap_or(0)
    }

    /// The sources of a demand; none if all are too busy.
    fn sources(&self, demand: &Demand, limit: usize) -> Vec<Source> {
        if demand.sources.is_empty() {
            return Vec::new();
        }
        let reluctance = |node: &NodeName| demand.reluctance.get(node).copied().unwrap_or(0);
        let load = |source: &Source| self.load(&source.node);
        let mut whole = demand.sources.clone();
        whole.sort_by_key(|source| (reluctance(&source.node), load(source), source.node.clone()));
        for source in &mut whole {
            source.last_resort = reluctance(&source.node) > 0;
        }
        let feeding: HashSet<&NodeName> =
            self.of(&demand.digest).flat_map(givers).map(|source| &source.node).collect();
        let idle =
            |source: &Source| !source.last_resort && !feeding.contains(&source.node) && load(source) < limit;
        let (mut first, others) = if demand.relays && whole.iter().any(idle) {
            whole.into_iter().partition(idle)
        } else if let Some(relay) = self.relay(demand, limit) {
            (vec![relay], whole)
        } else {
            whole.retain(|source| load(source) < limit);
            (whole, Vec::new())
        };
        first.extend(others.into_iter().map(|source| Source { last_resort: true, ..source }));
        first.truncate(MAX_SOURCES);
        first
    }

    /// Of the nodes that are getting the image the one that fewest take from; of those that are alike, the first by name.
    fn relay(&self, demand: &Demand, limit: usize) -> Option<Source> {
        let platform = demand.relays.then_some(&demand.agent.as_ref()?.platform)?;
        let getting = self.of(&demand.digest).filter(|transfer| {
            // One without a source brings nothing that is not there, or is not under way now.
            !transfer.sources.is_empty()
                && !demand.reluctance.contains_key(&transfer.node)
                && !demand.sources.iter().any(|source| source.node == transfer.node)
                && !self.waits_for(transfer, &demand.node)
        });
        let agents = getting.filter_map(|transfer| Some((&transfer.node, transfer.agent.as_ref()?)));
        let fitting = agents.filter(|(_, agent)| agent.platform == *platform);
        let loads =
            fitting.map(|(node, agent)| (self.load(node), node, agent)).filter(|(load, ..)| *load < limit);
        let (_, node, agent) = loads.min_by_key(|(load, node, _)| (*load, *node))?;
        Some(Source { node: node.clone(), address: agent.address.clone(), last_resort: false, relay: true })
    }

    /// Whether a transfer gets what `node` is yet to get: from there, or from one that does.
    fn waits_for(&self, transfer: &Assignment, node: &NodeName) -> bool {
        let mut seen = vec![&transfer.node];
        let mut next = 0;
        while let Some(target) = seen.get(next).copied() {
            if target == node {
                return true;
            }
            let transfers = self.of(&transfer.digest).filter(|transfer| transfer.node == *target);
            let relays = transfers.flat_map(|transfer| &transfer.sources).filter(|source| source.relay);
            let more: Vec<&NodeName> =
                relays.map(|source| &source.node).filter(|node| !seen.contains(node)).collect();
            seen.extend(more);
            next += 1;
        }
        false
    }
}

/// The sources that a transfer is to take from: those of last resort only where there is no other.
fn givers(transfer: &Assignment) -> impl Iterator<Item = &Source> {
    let spares = transfer.sources.iter().any(|source| !source.last_resort);
    transfer.sources.iter().filter(move |source| !(spares && source.last_resort))
}

#[cfg(test)]
mod tests;
