//! Several nodes that want one image: who takes it from whom, and what becomes of that.

use super::*;
use crate::salvage::Source;

const IMAGE: &str = "r.test/x:1";

/// Node `a` has the image.
fn bench() -> Bench {
    let limits = Limits { cluster: 9, target: 2, source: 1 };
    let mut bench = Bench::under(|policy| policy.limits = limits);
    bench.up("a", vec![image(1, &[IMAGE], true)]);
    bench
}

fn by_hand(bench: &mut Bench, node: &str) -> String {
    bench.job("j", json!({"image": IMAGE, "nodeName": node}), false)
}

/// Where each import comes from: `+` marks a relay, `-` a last resort.
fn sources(actions: &[Action]) -> Vec<(String, Vec<String>)> {
    let told = |source: &Source| {
        let marks = [(source.relay, "+"), (source.last_resort, "-")];
        let marks: String = marks.into_iter().filter(|(is, _)| *is).map(|(_, mark)| mark).collect();
        format!("{marks}{} {}", source.node, source.address)
    };
    let of = |action: &Action| match action {
        Action::Import { node, sources, .. } => Some((node.to_string(), sources.iter().map(told).collect())),
        _ => None,
    };
    actions.iter().filter_map(of).collect()
}

fn import(node: &str, sources: &[&str]) -> (String, Vec<String>) {
    (node.to_owned(), sources.iter().map(ToString::to_string).collect())
}

#[test]
fn the_second_takes_it_from_the_first_as_it_comes() {
    let mut bench = bench();
    let first = by_hand(&mut bench, "b");
    let second = by_hand(&mut bench, "c");
    let started = sources(&bench.decide());
    assert_eq!(
        started,
        [import("b", &["a a:9090"]), import("c", &["+b b:9090", "-a a:9090"])],
        "though its source may feed no more than one"
    );
    assert!(bench.message(&second).contains("comes from b, a"), "{}", bench.message(&second));
    // Nothing that changes for the better changes who gives: progress, the first's end, and its inventory.
    bench.transfer(&first, done());
    assert_eq!(sources(&bench.pass(1)), []);
    bench.on(Event::Fleet(FleetEvent::Delta {
        node: "b".into(),
        upserted: vec![image(1, &[IMAGE], true)],
        removed: vec![],
    }));
    assert_eq!(sources(&bench.pass(1)), []);
}

#[test]
fn where_the_relay_is_gone_the_source_gives() {
    let mut bench = bench();
    by_hand(&mut bench, "b");
    by_hand(&mut bench, "c");
    bench.decide();
    bench.on(Event::Fleet(FleetEvent::Down { node: "b".into() }));
    assert_eq!(sources(&bench.pass(1)), [import("c", &["a a:9090"])]);
}

#[test]
fn where_the_source_is_gone_the_relay_gives_on() {
    let mut bench = bench();
    by_hand(&mut bench, "b");
    by_hand(&mut bench, "c");
    bench.decide();
    // Another has it by now.
    bench.node("d", |_| {});
    bench.up("d", vec![image(1, &[IMAGE], true)]);
    bench.on(Event::Fleet(FleetEvent::Down { node: "a".into() }));
    let mut attached = sources(&bench.pass(1));
    attached.sort();
    assert_eq!(attached, [import("b", &["d d:9090"]), import("c", &["+b b:9090", "-d d:9090"])]);
}

/// The first failed and is tried again while the second, which took from it, goes on.
#[test]
fn one_that_starts_again_does_not_wait_for_what_waits_for_it() {
    let mut bench = bench();
    let first = by_hand(&mut bench, "b");
    by_hand(&mut bench, "c");
    bench.decide();
    bench.transfer(&first, failed(true));
    bench.decide();
    assert_eq!(sources(&bench.pass(5)), [import("b", &["-a a:9090"])]);
}

#[test]
fn who_names_a_source_gets_it_from_there() {
    let mut bench = bench();
    by_hand(&mut bench, "b");
    let only = bench.job("j", json!({"image": IMAGE, "nodeName": "c", "sourceNodeName": "a"}), false);
    assert_eq!(sources(&bench.decide()), [import("b", &["a a:9090"])]);
    assert_eq!(bench.reason(&only).1, "Queued");
}

/// Neither a node that is being emptied nor one whose containerd is silent is to give.
#[test]
fn a_node_that_is_to_be_left_alone_is_no_relay() {
    let mut bench = bench();
    by_hand(&mut bench, "b");
    bench.decide();
    bench.node("b", |facts| facts.cordoned = true);
    let second = by_hand(&mut bench, "c");
    assert_eq!(sources(&bench.decide()), []);
    assert_eq!(bench.reason(&second).1, "Queued");
    bench.node("b", |_| {});
    assert_eq!(sources(&bench.decide()), [import("c", &["+b b:9090", "-a a:9090"])]);
}
