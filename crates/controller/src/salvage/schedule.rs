//! Whose turn it is: slots are a matter of the whole fleet, not of one job.

use std::collections::{BTreeMap, HashMap};

use jiff::Timestamp;
use tote_image::Digest;

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
    /// Transfers that have one node among their sources.
    pub source: usize,
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
    /// Where it is to be had; empty if nothing needs to be moved.
    pub sources: Vec<Source>,
    /// Sources that had better be used after others; the higher, the later. 0 for one that is not named.
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
pub fn schedule(demands: &[Demand], running: &[Assignment], limits: Limits) -> Vec<Turn> {
    let mut total = running.len();
    let mut targets: HashMap<NodeName, usize> = HashMap::new();
    let mut sources: HashMap<NodeName, usize> = HashMap::new();
    let mut moving: Vec<(Digest, NodeName)> = Vec::new();
    for transfer in running {
        *targets.entry(transfer.node.clone()).or_default() += 1;
        for source in &transfer.sources {
            *sources.entry(source.node.clone()).or_default() += 1;
        }
        moving.push((transfer.digest.clone(), transfer.node.clone()));
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
        if total >= limits.cluster {
            continue; // Priority is strict: nobody smaller overtakes for a slot of the cluster.
        }
        if moving.iter().any(|(digest, node)| *digest == demand.digest && *node == demand.node) {
            turns[index] = Turn::Queued("the same image that is being moved to this node for another job");
            continue;
        }
        if targets.get(&demand.node).is_some_and(|&n| n >= limits.target) {
            turns[index] = Turn::Queued("a free slot of its node");
            continue;
        }
        let load = |source: &Source| sources.get(&source.node).copied().unwrap_or(0);
        let mut free: Vec<Source> =
            demand.sources.iter().filter(|source| load(source) < limits.source).cloned().collect();
        if free.is_empty() && !demand.sources.is_empty() {
            turns[index] = Turn::Queued("a source that is less busy");
            continue;
        }
        let reluctance = |source: &Source| demand.reluctance.get(&source.node).copied().unwrap_or(0);
        free.sort_by_key(|source| (reluctance(source), load(source), source.node.clone()));
        free.truncate(MAX_SOURCES);
        for source in &mut free {
            source.last_resort = reluctance(source) > 0;
        }
        total += 1;
        *targets.entry(demand.node.clone()).or_default() += 1;
        for source in &free {
            *sources.entry(source.node.clone()).or_default() += 1;
        }
        moving.push((demand.digest.clone(), demand.node.clone()));
        turns[index] = Turn::Start(free);
    }
    turns
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { cluster: 3, target: 2, source: 2 };

    fn source(node: &str) -> Source {
        Source { node: node.into(), address: format!("{node}:9090"), last_resort: false }
    }

    fn demand(origin: &str, digest: u8, node: &str, sources: &[&str]) -> Demand {
        Demand {
            origin: origin.into(),
            digest: Digest::sha256(&[digest]),
            node: node.into(),
            sources: sources.iter().map(|s| source(s)).collect(),
            reluctance: BTreeMap::new(),
            begun: false,
            priority: 0,
            since: Timestamp::UNIX_EPOCH,
        }
    }

    fn started(turns: &[Turn]) -> Vec<bool> {
        turns.iter().map(|turn| matches!(turn, Turn::Start(_))).collect()
    }

    #[test]
    fn priority_then_age_then_name_within_the_clusters_bound() {
        let limits = Limits { cluster: 2, ..LIMITS };
        let mut demands: Vec<Demand> =
            [("a", 1), ("b", 2), ("c", 3), ("d", 4)].map(|(o, d)| demand(o, d, o, &["s", "t"])).into();
        demands[0].since = Timestamp::from_second(9).unwrap();
        demands[3].priority = 1;
        assert_eq!(started(&schedule(&demands, &[], limits)), [false, true, false, true]);
        demands[0].begun = true;
        assert_eq!(started(&schedule(&demands, &[], limits)), [true, false, false, true]);
        assert_eq!(started(&schedule(&[], &[], limits)), Vec::<bool>::new());
    }

    #[test]
    fn one_digest_to_one_node_once() {
        let demands = [demand("a", 1, "n", &["s"]), demand("b", 1, "n", &["s"]), demand("c", 1, "m", &["s"])];
        let turns = schedule(&demands, &[], LIMITS);
        assert_eq!(started(&turns), [true, false, true], "two nodes at once, one node once");
        assert!(matches!(turns[1], Turn::Queued(why) if why.contains("same image")));
        let running = Assignment { digest: Digest::sha256(&[1]), node: "m".into(), sources: vec![] };
        assert_eq!(started(&schedule(&demands[2..], &[running], LIMITS)), [false]);
    }

    #[test]
    fn targets_and_sources_are_not_overrun() {
        let to_one = [1, 2, 3].map(|d| demand(&d.to_string(), d, "n", &["s", "t"]));
        assert_eq!(started(&schedule(&to_one, &[], LIMITS)), [true, true, false]);
        let from_one = [1, 2, 3].map(|d| demand(&d.to_string(), d, &format!("n{d}"), &["s"]));
        assert_eq!(started(&schedule(&from_one, &[], LIMITS)), [true, true, false]);
        let local = demand("x", 9, "n9", &[]);
        assert_eq!(schedule(&[local], &[], LIMITS), [Turn::Start(vec![])], "nothing to move needs no source");
    }

    #[test]
    fn the_least_busy_sources_are_given() {
        let busy = Assignment { digest: Digest::sha256(&[9]), node: "z".into(), sources: vec![source("a")] };
        let wide = demand("x", 1, "n", &["a", "b", "c", "d", "e", "f"]);
        let turns = schedule(&[wide], &[busy], LIMITS);
        assert_eq!(turns, [Turn::Start(["b", "c", "d", "e"].map(source).into())]);
    }
    #[test]
    fn a_source_to_be_spared_is_given_after_busier_ones_and_alone_all_the_same() {
        let busy = Assignment { digest: Digest::sha256(&[9]), node: "z".into(), sources: vec![source("a")] };
        let mut wide = demand("x", 1, "n", &["a", "b", "c"]);
        wide.reluctance = [("b".into(), 2), ("c".into(), 1)].into();
        let turns = schedule(&[wide.clone()], &[busy], LIMITS);
        let spared = |node: &str| Source { last_resort: true, ..source(node) };
        assert_eq!(turns, [Turn::Start(vec![source("a"), spared("c"), spared("b")])]);
        wide.sources = vec![source("b")];
        assert_eq!(schedule(&[wide], &[], LIMITS), [Turn::Start(vec![spared("b")])]);
    }

    #[test]
    fn one_that_waits_for_its_node_or_a_source_keeps_nobody_else_waiting() {
        let full = [1, 2].map(|d| Assignment {
            digest: Digest::sha256(&[d]),
            node: "n".into(),
            sources: vec![source("s")],
        });
        let limits = Limits { cluster: 10, ..LIMITS };
        let mut to_full = demand("a", 3, "n", &["t"]);
        let mut from_full = demand("b", 4, "m", &["s"]);
        (to_full.priority, from_full.priority) = (9, 9);
        let demands = [to_full, from_full, demand("c", 5, "m", &["t"])];
        assert_eq!(started(&schedule(&demands, &full, limits)), [false, false, true]);
    }
}
