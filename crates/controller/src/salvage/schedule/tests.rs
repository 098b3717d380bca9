//! Turns: bounds, order, which sources are given, and who gives on what it is getting.

use super::*;

const LIMITS: Limits = Limits { cluster: 3, target: 2, source: 2 };

fn source(node: &str) -> Source {
    Source { node: node.into(), address: format!("{node}:9090"), last_resort: false, relay: false }
}

fn agent(node: &str) -> Agent {
    Agent { address: format!("{node}:9090"), platform: Platform::new("linux", "amd64", "") }
}

fn demand(origin: &str, digest: u8, node: &str, sources: &[&str]) -> Demand {
    Demand {
        origin: origin.into(),
        digest: Digest::sha256(&[digest]),
        node: node.into(),
        agent: Some(agent(node)),
        relays: true,
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
    let running = Assignment { digest: Digest::sha256(&[1]), node: "m".into(), agent: None, sources: vec![] };
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
    let busy = Assignment {
        digest: Digest::sha256(&[9]),
        node: "z".into(),
        agent: None,
        sources: vec![source("a")],
    };
    let wide = demand("x", 1, "n", &["a", "b", "c", "d", "e", "f"]);
    let turns = schedule(&[wide], &[busy], LIMITS);
    assert_eq!(turns, [Turn::Start(["b", "c", "d", "e"].map(source).into())]);
}

#[test]
fn a_source_to_be_spared_is_given_after_busier_ones_and_alone_all_the_same() {
    let busy = Assignment {
        digest: Digest::sha256(&[9]),
        node: "z".into(),
        agent: None,
        sources: vec![source("a")],
    };
    let mut wide = demand("x", 1, "n", &["a", "b", "c"]);
    wide.reluctance = [("b".into(), 2), ("c".into(), 1)].into();
    let turns = schedule(&[wide.clone()], &[busy], LIMITS);
    assert_eq!(turns, [Turn::Start(vec![source("a"), spared("c"), spared("b")])]);
    wide.sources = vec![source("b")];
    assert_eq!(schedule(&[wide], &[], LIMITS), [Turn::Start(vec![spared("b")])]);
}

#[test]
fn one_that_waits_for_its_node_or_a_source_keeps_nobody_else_waiting() {
    let full = [1, 2].map(|d| Assignment {
        digest: Digest::sha256(&[d]),
        node: "n".into(),
        agent: None,
        sources: vec![source("s")],
    });
    let limits = Limits { cluster: 10, ..LIMITS };
    let mut to_full = demand("a", 3, "n", &["t"]);
    let mut from_full = demand("b", 4, "m", &["s"]);
    (to_full.priority, from_full.priority) = (9, 9);
    let demands = [to_full, from_full, demand("c", 5, "m", &["t"])];
    assert_eq!(started(&schedule(&demands, &full, limits)), [false, false, true]);
}

fn relay(node: &str) -> Source {
    Source { relay: true, ..source(node) }
}

fn spared(node: &str) -> Source {
    Source { last_resort: true, ..source(node) }
}

fn moves(digest: u8, node: &str, sources: Vec<Source>) -> Assignment {
    Assignment { digest: Digest::sha256(&[digest]), node: node.into(), agent: Some(agent(node)), sources }
}

const MANY: Limits = Limits { cluster: 100, target: 2, source: 2 };

#[test]
fn of_many_that_want_an_image_one_takes_from_its_source_and_each_other_from_one_before() {
    let nodes = ["a", "b", "c", "d", "e"];
    let demands = nodes.map(|node| demand(node, 1, node, &["s"]));
    let chain = |before: &str| Turn::Start(vec![relay(before), spared("s")]);
    let turns = schedule(&demands, &[], MANY);
    assert_eq!(turns, [Turn::Start(vec![source("s")]), chain("a"), chain("b"), chain("c"), chain("d")]);
    // The same where some run already; another image has nothing to do with it.
    let running = [moves(1, "x", vec![source("s")]), moves(2, "y", vec![source("s")])];
    let turns = schedule(&demands[..2], &running, Limits { source: 3, ..MANY });
    assert_eq!(turns, [chain("x"), chain("a")]);
}

#[test]
fn a_source_that_feeds_nobody_yet_is_better_than_a_relay() {
    let running = [moves(1, "x", vec![source("s")])];
    let turns = schedule(&[demand("a", 1, "a", &["s", "t"])], &running, MANY);
    assert_eq!(turns, [Turn::Start(vec![source("t"), spared("s")])]);
    // Not if it had better be left alone.
    let mut reluctant = demand("a", 1, "a", &["s", "t"]);
    reluctant.reluctance = [("t".into(), 1)].into();
    let turns = schedule(&[reluctant], &running, MANY);
    assert_eq!(turns, [Turn::Start(vec![relay("x"), spared("s"), spared("t")])]);
}

#[test]
fn sources_that_are_as_busy_as_they_may_be_keep_nobody_waiting_who_has_a_relay() {
    let running = [moves(1, "x", vec![source("s")]), moves(2, "y", vec![source("s")])];
    let wants = demand("a", 1, "a", &["s"]);
    assert_eq!(
        schedule(std::slice::from_ref(&wants), &running, MANY),
        [Turn::Start(vec![relay("x"), spared("s")])]
    );
    // A relay gives to no more than a source does; what is named as a last resort does not count.
    let full =
        [&running[..], &[1, 2].map(|n| moves(3, &format!("z{n}"), vec![source("x"), spared("s")]))].concat();
    assert_eq!(schedule(&[wants], &full, MANY), [Turn::Queued("a source that is less busy")]);
    let other = demand("b", 4, "b", &["s"]);
    assert_eq!(started(&schedule(&[other], &full, Limits { source: 3, ..MANY })), [true]);
}

#[test]
fn nobody_waits_for_one_that_waits_for_it() {
    // Its own transfer broke off; those that took from it still run, and one of them is fed by the source meanwhile.
    let fed = vec![relay("a"), spared("s")];
    let running = [moves(1, "b", fed), moves(1, "c", vec![relay("b"), spared("s")])];
    let again = demand("a", 1, "a", &["s"]);
    assert_eq!(schedule(std::slice::from_ref(&again), &running, MANY), [Turn::Start(vec![source("s")])]);
    let busy = [&running[..], &[moves(1, "d", vec![source("s")])]].concat();
    assert_eq!(schedule(&[again], &busy, MANY), [Turn::Start(vec![relay("d"), spared("s")])]);
}

#[test]
fn a_relay_is_one_whose_agent_can_give_to_this_node() {
    let running = |edit: &dyn Fn(&mut Assignment)| {
        let mut transfer = moves(1, "x", vec![source("s")]);
        edit(&mut transfer);
        transfer
    };
    let unlike = |transfer: &mut Assignment| {
        transfer.agent = Some(Agent { platform: Platform::new("linux", "arm64", ""), ..agent("x") });
    };
    for unfit in [
        running(&|transfer| transfer.agent = None),
        running(&unlike),
        running(&|transfer| transfer.digest = Digest::sha256(&[2])),
    ] {
        let turns = schedule(&[demand("a", 1, "a", &["s"])], std::slice::from_ref(&unfit), MANY);
        assert_eq!(turns, [Turn::Start(vec![source("s")])], "{unfit:?}");
    }
    // Nor one with which it has failed before, nor any where one source alone was named.
    let (mut failed, mut only) = (demand("a", 1, "a", &["s"]), demand("a", 1, "a", &["s"]));
    failed.reluctance = [("x".into(), 2)].into();
    only.relays = false;
    for demand in [failed, only] {
        let turns = schedule(std::slice::from_ref(&demand), &[running(&|_| {})], MANY);
        assert_eq!(turns, [Turn::Start(vec![source("s")])], "{demand:?}");
    }
    // What needs nothing to be moved needs no relay.
    assert_eq!(schedule(&[demand("a", 1, "a", &[])], &[running(&|_| {})], MANY), [Turn::Start(vec![])]);
}

#[test]
fn the_relay_that_fewest_take_from_is_given() {
    let running = [
        moves(1, "x", vec![source("s")]),
        moves(1, "y", vec![source("s")]),
        moves(1, "z", vec![relay("x"), spared("s")]),
        moves(2, "v", vec![source("z")]),
    ];
    let turns = schedule(&[demand("a", 1, "a", &["s"]), demand("b", 1, "b", &["s"])], &running, MANY);
    assert_eq!(
        turns,
        [Turn::Start(vec![relay("y"), spared("s")]), Turn::Start(vec![relay("a"), spared("s")])]
    );
}
