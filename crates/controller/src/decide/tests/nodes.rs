//! Nodes: what their state makes of jobs.

use super::*;
use crate::nodes::Kubelet;

pub(super) fn bench() -> Bench {
    let mut bench = Bench::new();
    bench.state.policy.limits.cluster = 9;
    bench.up("a", vec![image(1, &["r.test/x:1"], true), image(2, &["r.test/y:1"], true)]);
    bench
}

pub(super) fn down(bench: &mut Bench, node: &str) {
    bench.on(Event::Fleet(FleetEvent::Down { node: node.into() }));
}

pub(super) fn runtime(bench: &mut Bench, node: &str, is_down: bool) {
    bench.on(Event::Fleet(FleetEvent::Runtime { node: node.into(), is_down }));
}

type Happens = fn(&mut Bench);

/// What happens; whether detection made the job; its phase and reason then, and words of the message.
type Row = (&'static str, Happens, bool, Phase, &'static str, &'static [&'static str]);

const ROWS: &[Row] = &[
    (
        "the target is gone",
        |b| b.on(Event::Node { name: "b".into(), facts: None }),
        false,
        Phase::Pending,
        "NodeNotFound",
        &["no node b", "waits for one of that name"],
    ),
    (
        "the target is cordoned",
        |b| b.node("b", |n| n.cordoned = true),
        true,
        Phase::Pending,
        "TargetCordoned",
        &["node b is cordoned", "kubectl uncordon b"],
    ),
    (
        "the target is cordoned, and somebody chose it",
        |b| b.node("b", |n| n.cordoned = true),
        false,
        Phase::Transferring,
        "Transferring",
        &["comes from a"],
    ),
    (
        "the target is under DiskPressure",
        |b| b.node("b", |n| n.disk_pressure = true),
        false,
        Phase::Pending,
        "TargetDiskPressure",
        &["node b is under DiskPressure", "free space"],
    ),
    (
        "the target is not Ready, and its agent answers",
        |b| b.node("b", |n| n.kubelet = Kubelet::NotReady),
        true,
        Phase::Transferring,
        "Transferring",
        &["comes from a"],
    ),
    (
        "kubelet says that the runtime is down, and the agent that it is not",
        |b| b.node("b", |n| n.kubelet = Kubelet::RuntimeDown),
        true,
        Phase::Transferring,
        "Transferring",
        &["comes from a"],
    ),
    (
        "the target's agent is away",
        |b| down(b, "b"),
        false,
        Phase::Pending,
        "TargetUnavailable",
        &["the agent on node b does not answer", "spec.nodeName=b"],
    ),
    (
        "the target's agent is away with the runtime",
        |b| {
            down(b, "b");
            b.node("b", |n| n.kubelet = Kubelet::RuntimeDown);
        },
        false,
        Phase::Pending,
        "RuntimeUnavailable",
        &["the container runtime of node b", "look at containerd"],
    ),
    (
        "the target's agent says that containerd does not answer",
        |b| runtime(b, "b", true),
        false,
        Phase::Pending,
        "RuntimeUnavailable",
        &["the container runtime of node b"],
    ),
    (
        "the source's agent is away",
        |b| down(b, "a"),
        false,
        Phase::Pending,
        "SourceUnavailable",
        &["r.test/x", "but a did when last heard of", "agent runs there"],
    ),
    (
        "the source's containerd does not answer",
        |b| runtime(b, "a", true),
        false,
        Phase::Pending,
        "SourceUnavailable",
        &["but a did when last heard of", "containerd answers"],
    ),
    (
        "the source is gone",
        |b| {
            down(b, "a");
            b.on(Event::Node { name: "a".into(), facts: None });
        },
        false,
        Phase::Pending,
        "NoSource",
        &["no node whose agent answers holds"],
    ),
    (
        "the source is cordoned and under DiskPressure",
        |b| b.node("a", |n| (n.cordoned, n.disk_pressure) = (true, true)),
        true,
        Phase::Transferring,
        "Transferring",
        &["comes from a"],
    ),
];

#[test]
fn each_state_of_a_node_has_a_reason_of_its_own_and_other_jobs_go_on() {
    let mut wrong = Vec::new();
    for (situation, happens, automatic, phase, reason, words) in ROWS {
        let mut bench = bench();
        bench.state.policy.limits.cluster = 2;
        for (node, images) in [("d", vec![image(3, &["r.test/z:1"], true)]), ("e", vec![])] {
            bench.node(node, |_| {});
            bench.up(node, images);
        }
        let pinned = format!("r.test/x@{}", digest(1));
        bench.waits("p", "b", &pinned);
        happens(&mut bench);
        let uid = bench.job("j", json!({"image": pinned, "nodeName": "b", "priority": 9}), *automatic);
        let others = [2, 3].map(|n| {
            let image = format!("r.test/x@{}", digest(n));
            bench.job("other", json!({"image": image, "nodeName": "e"}), false)
        });
        bench.pass(11);
        let (found, message) = (bench.reason(&uid), bench.message(&uid));
        if found != (*phase, (*reason).to_owned()) || !words.iter().all(|word| message.contains(word)) {
            wrong.push(format!("{situation}: {found:?} {message}"));
        }
        if !others.iter().any(|other| bench.reason(other).0 == Phase::Transferring) {
            wrong.push(format!("{situation}: no other job goes on"));
        }
    }
    assert_eq!(wrong, [""; 0]);
}

#[test]
fn a_job_whose_node_waits_goes_on_when_that_ends() {
    let ends: [(Happens, Happens); 4] = [
        (|b| b.node("b", |n| n.cordoned = true), |b| b.node("b", |_| {})),
        (|b| b.node("b", |n| n.disk_pressure = true), |b| b.node("b", |_| {})),
        (|b| runtime(b, "b", true), |b| runtime(b, "b", false)),
        (|b| runtime(b, "a", true), |b| runtime(b, "a", false)),
    ];
    for (n, (begins, ends)) in ends.into_iter().enumerate() {
        let mut bench = bench();
        begins(&mut bench);
        let uid = bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b"}), true);
        bench.waits("p", "b", "r.test/x:1");
        assert_eq!(imports(&bench.decide()), [], "{n}");
        assert_eq!(bench.reason(&uid).0, Phase::Pending, "{n}");
        ends(&mut bench);
        assert_eq!(imports(&bench.decide()).len(), 1, "{n}");
    }
}

#[test]
fn disk_pressure_ends_a_transfer_and_a_cordon_does_not() {
    let mut bench = bench();
    bench.waits("p", "b", "r.test/x:1");
    let uid = bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b"}), true);
    assert_eq!(imports(&bench.decide()).len(), 1);
    bench.node("b", |n| n.cordoned = true);
    bench.decide();
    assert_eq!(bench.reason(&uid).0, Phase::Transferring, "what has begun is let end");
    runtime(&mut bench, "b", true);
    bench.decide();
    assert_eq!(bench.reason(&uid).0, Phase::Transferring, "the agent tells its end");
    bench.node("b", |n| n.disk_pressure = true);
    let cancels = |actions: &[Action]| actions.iter().filter(|a| matches!(a, Action::Cancel { .. })).count();
    assert_eq!(cancels(&bench.decide()), 1);
    assert_eq!(bench.reason(&uid).1, "TargetDiskPressure");
    assert_eq!(cancels(&bench.pass(60)), 0, "once");
}

#[test]
fn a_containerd_that_is_away_costs_no_attempts() {
    let mut bench = bench();
    let spec = json!({"image": "r.test/x:1", "nodeName": "b", "backoffLimit": 1});
    let uid = bench.job("j", spec, false);
    bench.decide();
    bench.transfer(&uid, failed(true));
    bench.decide();
    assert_eq!(bench.reason(&uid).1, "Retrying");
    runtime(&mut bench, "b", true);
    for _ in 0..20 {
        assert_eq!(imports(&bench.pass(30)), []);
        assert_eq!(bench.reason(&uid).1, "RuntimeUnavailable");
    }
    runtime(&mut bench, "b", false);
    assert_eq!(imports(&bench.decide()).len(), 1);
    assert_eq!(bench.state.jobs[&*uid].0.status.attempts, 2);
}

#[test]
fn a_source_that_is_set_and_no_node_is_named() {
    let mut bench = bench();
    for (source, reason, word) in [
        ("nowhere", "SourceNotFound", "no node nowhere (spec.sourceNodeName)"),
        ("c", "NoSource", "node c (spec.sourceNodeName) does not hold"),
        ("a", "SourceUnavailable", "the container runtime on node a"),
    ] {
        runtime(&mut bench, "a", true);
        let image = format!("r.test/x@{}", digest(1));
        let spec = json!({"image": image, "nodeName": "b", "sourceNodeName": source});
        let uid = bench.job("j", spec, false);
        bench.decide();
        assert_eq!(bench.reason(&uid), (Phase::Pending, reason.to_owned()));
        assert!(bench.message(&uid).contains(word), "{}", bench.message(&uid));
    }
}

#[test]
fn nodes_that_are_emptied_are_read_last_and_sources_that_failed_after_them() {
    let mut bench = bench();
    let x = || vec![image(1, &["r.test/x:1"], true)];
    for node in ["d", "e"] {
        bench.node(node, |_| {});
        bench.up(node, x());
    }
    bench.up("c", x());
    bench.node("a", |n| n.cordoned = true);
    bench.node("c", |n| n.disk_pressure = true);
    let uid = bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
    assert_eq!(imports(&bench.decide())[0].2, ["d", "e", "a", "c"]);
    bench.node("f", |_| {});
    bench.up("f", x());
    bench.transfer(&uid, failed(true));
    bench.decide();
    assert_eq!(imports(&bench.pass(5))[0].2, ["f", "d", "e", "a"], "one that was not tried goes first");
}

#[test]
fn a_failed_salvage_is_tried_again_when_a_new_source_appears() {
    let x = || vec![image(1, &["r.test/x:1"], true)];
    let mut bench = bench();
    bench.waits("p", "b", "r.test/x:1");
    bench.decide();
    bench.transfer("job-1", failed(false));
    bench.decide();
    down(&mut bench, "a");
    bench.up("a", x());
    assert_eq!(created(&bench.pass(20)).len(), 0, "one that comes back is none");
    bench.up("c", x());
    assert_eq!(created(&bench.pass(1)).len(), 1, "c had it not when the job failed");
    bench.transfer("job-2", failed(false));
    assert_eq!(created(&bench.pass(30)).len(), 0, "c is known by now");
    assert_eq!(created(&bench.pass(100)).len(), 1);
}

#[test]
fn an_end_that_an_earlier_controller_saw_does_not_hide_a_new_source() {
    let mut bench = bench();
    bench.waits("p", "b", "r.test/x:1");
    bench.decide();
    bench.transfer("job-1", failed(false));
    bench.decide();
    let (job, _) = bench.state.jobs.get_mut("job-1").unwrap();
    job.held_by = None;
    assert_eq!(created(&bench.pass(20)).len(), 0, "status names a");
    bench.up("c", vec![image(1, &["r.test/x:1"], true)]);
    assert_eq!(created(&bench.pass(1)).len(), 1);
}
