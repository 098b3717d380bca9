//! What is known, and when it is enough: first lists, agents that go and come, a new leader.

use super::*;
use crate::nodes::Kubelet;

#[test]
fn what_changes_nothing_asks_for_no_decision() {
    let mut bench = Bench::new();
    let now = bench.now;
    let mut news = |event: Event| bench.state.apply(event, now);
    assert!(!news(Event::Pod { uid: "unknown".into(), waiting: None }));
    let node = |facts: NodeFacts| Event::Node { name: "a".into(), facts: Some(facts) };
    assert!(!news(node(NodeFacts::ready("uid-a"))));
    assert!(news(node(NodeFacts::ready("uid-other"))));
    let down = |message: &str| NodeFacts {
        kubelet: Kubelet::RuntimeDown,
        message: message.into(),
        ..NodeFacts::ready("uid-other")
    };
    assert!(news(node(down("container runtime is down, last seen 3m ago"))));
    assert!(!news(node(down("container runtime is down, last seen 4m ago"))), "kubelet counts the time");
    assert!(news(node(NodeFacts { cordoned: true, ..down("") })));
    assert!(news(node(NodeFacts { disk_pressure: true, cordoned: true, ..down("") })));
    assert!(!news(Event::Namespace { name: "shop".into(), consent: Some(Consent::Given) }));
    assert!(news(Event::Namespace { name: "shop".into(), consent: Some(Consent::NotGiven) }));
}

#[test]
fn nothing_is_decided_before_every_list_is_known() {
    let mut bench = Bench::cold(true);
    bench.on(Event::Fleet(FleetEvent::Expected(["a".into(), "b".into()].into())));
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.up("b", vec![]);
    bench.waits("p", "b", "r.test/x:1");
    for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::Jobs) {
        let seen = ["uid-p", "shop", "a", "b"].map(Arc::from).into();
        bench.on(Event::Listed(kind, seen));
        assert_eq!(bench.decide(), []);
    }
    bench.on(Event::Listed(Kind::Jobs, HashSet::new()));
    assert_eq!(created(&bench.decide()).len(), 1);
}

#[test]
fn a_tag_of_two_meanings_stays_one_while_a_node_is_away() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.up("c", vec![image(2, &["r.test/x:1"], true)]);
    bench.on(Event::Fleet(FleetEvent::Down { node: "c".into() }));
    bench.on(Event::Fleet(FleetEvent::Expected(["a".into()].into())));
    bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
    assert_eq!(imports(&bench.decide()).len(), 0, "the agent on c is away for a moment");
    bench.on(Event::Node { name: "c".into(), facts: None });
    assert_eq!(imports(&bench.decide()).len(), 1, "c is gone");
}

#[test]
fn an_agent_that_goes_is_waited_for_and_attached_to_again() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    let uid = bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
    let first = bench.decide();
    bench.transfer(&uid, TransferEvent::Lost { message: "broken".into() });
    bench.on(Event::Fleet(FleetEvent::Down { node: "b".into() }));
    bench.decide();
    assert_eq!(bench.reason(&uid), (Phase::Pending, "TargetUnavailable".into()));
    assert_eq!(imports(&bench.pass(600)).len(), 0);
    bench.up("b", vec![]);
    let second = bench.decide();
    assert_eq!(imports(&second), imports(&first));
    assert_eq!(bench.state.jobs[&*uid].0.status.attempts, 1, "waiting is no attempt");
}

#[test]
fn a_source_that_comes_back_elsewhere_replaces_the_old_one() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    let uid = bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
    bench.decide();
    bench.on(Event::Fleet(FleetEvent::Down { node: "a".into() }));
    assert_eq!(imports(&bench.decide()).len(), 0, "the agent decides what it can still do");
    assert_eq!(bench.reason(&uid).0, Phase::Transferring);
    bench.on(Event::Fleet(FleetEvent::Up {
        node: "a".into(),
        address: "elsewhere:9090".into(),
        platform: Platform::new("linux", "amd64", ""),
        problem: String::new(),
        records: PullRecords::Kept,
        images: vec![image(1, &["r.test/x:1"], true)],
    }));
    let actions = bench.decide();
    let again = actions.iter().any(
        |action| matches!(action, Action::Import { sources, .. } if sources[0].address == "elsewhere:9090"),
    );
    assert!(again, "{actions:?}");
}

#[test]
fn a_controller_that_starts_anew_attaches_to_what_runs() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    let job: SalvageJob = serde_json::from_value(json!({
        "apiVersion": "tote.dev/v1alpha1", "kind": "SalvageJob",
        "metadata": {"namespace": "shop", "name": "j", "uid": "u", "generation": 1},
        "spec": {"image": "r.test/x:1", "nodeName": "b"},
        "status": {"phase": "Transferring", "attempts": 2, "digest": digest(1).as_str(),
            "startTime": "2025-12-31T23:59:00Z"}
    }))
    .unwrap();
    bench.on(Event::Job(Box::new(job)));
    let actions = bench.decide();
    let id = actions.iter().find_map(|action| match action {
        Action::Import { transfer_id, .. } => Some(transfer_id.clone()),
        _ => None,
    });
    assert_eq!(id.as_deref(), Some("u"));
    assert_eq!(bench.state.jobs["u"].0.status.attempts, 2, "the same attempt");
}

#[test]
fn a_controller_that_starts_anew_says_nothing_new_before_it_knows_the_agents() {
    let mut bench = Bench::cold(true);
    let job: SalvageJob = serde_json::from_value(json!({
        "apiVersion": "tote.dev/v1alpha1", "kind": "SalvageJob",
        "metadata": {"namespace": "shop", "name": "j", "uid": "u", "generation": 1},
        "spec": {"image": "r.test/x:1", "nodeName": "b"},
        "status": {"phase": "Transferring", "attempts": 1, "digest": digest(1).as_str(),
            "nodeUID": "uid-b", "startTime": "2025-12-31T23:59:00Z"}
    }))
    .unwrap();
    bench.on(Event::Job(Box::new(job)));
    for kind in Kind::ALL {
        bench.on(Event::Listed(kind, ["shop", "a", "b", "u"].map(Arc::from).into()));
    }
    assert_eq!(bench.decide(), [], "the agents are not known");
    bench.on(Event::Fleet(FleetEvent::Expected(["a".into(), "b".into()].into())));
    assert_eq!(bench.decide(), [], "they have not answered");
    bench.up("b", vec![]);
    assert_eq!(bench.decide(), [], "the source has not answered");
    bench.pass(11);
    assert_eq!(bench.reason("u"), (Phase::Pending, "NoSource".into()), "it was waited for");
}

/// A job as a new leader finds it: an earlier one has begun its transfer to `b`.
fn begun(phase: &str, version: u64) -> Box<SalvageJob> {
    let job = json!({
        "apiVersion": "tote.dev/v1alpha1", "kind": "SalvageJob",
        "metadata": {"namespace": "shop", "name": "j", "uid": "u", "generation": 1,
            "resourceVersion": version.to_string()},
        "spec": {"image": "r.test/x:1", "nodeName": "b"},
        "status": {"phase": phase, "attempts": 1, "digest": digest(1).as_str(), "nodeUID": "uid-b",
            "startTime": "2025-12-31T23:59:00Z"}
    });
    Box::new(serde_json::from_value(job).unwrap())
}

fn cancels(actions: &[Action]) -> usize {
    actions.iter().filter(|action| matches!(action, Action::Cancel { .. })).count()
}

#[test]
fn a_controller_that_starts_anew_and_switched_off_ends_what_runs() {
    let mut bench = Bench::cold(false);
    bench.on(Event::Job(begun("Transferring", 1)));
    for kind in Kind::ALL {
        bench.on(Event::Listed(kind, ["shop", "a", "b", "c", "u"].map(Arc::from).into()));
    }
    let actions = bench.decide();
    assert_eq!((cancels(&actions), imports(&actions).len()), (1, 0), "{actions:?}");
    assert_eq!(bench.reason("u"), (Phase::Pending, "Disabled".into()));
    assert_eq!(cancels(&bench.pass(60)), 0, "once");

    // The one before was ended before it could write that it had begun.
    let mut bench = Bench::cold(false);
    let inherited = bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
    for kind in Kind::ALL {
        bench.on(Event::Listed(kind, ["shop", "a", "b", "c", inherited.as_str()].map(Arc::from).into()));
    }
    assert_eq!(cancels(&bench.decide()), 1);
    bench.job("k", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
    assert_eq!(cancels(&bench.pass(60)), 0, "one that is new was begun by nobody");
}

#[test]
fn a_status_that_an_earlier_leader_writes_late_is_written_over() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.on(Event::Job(begun("Transferring", 1)));
    bench.version = 1;
    bench.decide();
    bench.transfer("u", done());
    bench.decide();
    let written = bench.version;
    let of = |actions: &[Action]| {
        actions.iter().find_map(|action| match action {
            Action::WriteStatus { before, status, .. } => Some((before.phase, status.phase)),
            _ => None,
        })
    };
    bench.on(Event::Job(begun("Transferring", written)));
    assert_eq!(of(&bench.decide()), None, "an echo, and an older one");
    bench.on(Event::Job(begun("Pending", written + 1)));
    let actions = bench.decide();
    assert_eq!(of(&actions), Some((Some(Phase::Pending), Some(Phase::Imported))), "{actions:?}");
    assert_eq!(imports(&actions).len(), 0, "it remains Imported");
}

#[test]
fn a_status_that_comes_late_while_one_is_written_is_written_over() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.on(Event::Job(begun("Transferring", 1)));
    bench.decide();
    bench.transfer("u", done());
    let writes = |actions: Vec<Action>| {
        actions.iter().filter(|action| matches!(action, Action::WriteStatus { .. })).count()
    };
    assert_eq!(writes(bench.state.decide(bench.now).actions), 1);
    bench.on(Event::Job(begun("Transferring", 101)));
    bench.on(Event::StatusWritten { uid: "u".into(), version: Some(100) });
    assert_eq!(writes(bench.state.decide(bench.now).actions), 1, "101 came after it");
    bench.on(Event::Job(begun("Transferring", 102)));
    bench.on(Event::StatusWritten { uid: "u".into(), version: Some(102) });
    assert_eq!(writes(bench.state.decide(bench.now).actions), 0, "102 was itself");
}

#[test]
fn a_list_that_is_older_than_a_new_job_does_not_end_it() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.on(Event::JobAnswered(begun("Pending", 1)));
    assert_eq!(imports(&bench.decide()).len(), 1);
    bench.on(Event::Listed(Kind::Jobs, HashSet::new()));
    assert_eq!(cancels(&bench.decide()), 0, "the list began before the job was made");
    bench.on(Event::Listed(Kind::Jobs, HashSet::new()));
    assert_eq!(cancels(&bench.decide()), 1, "this one did not");
}

#[test]
fn a_leader_does_not_take_a_tag_for_agreed_while_an_agent_is_between_two_pods() {
    let mut bench = Bench::cold(true);
    for kind in Kind::ALL {
        bench.on(Event::Listed(kind, ["shop", "a", "b", "c"].map(Arc::from).into()));
    }
    bench.on(Event::Fleet(FleetEvent::Expected(["a".into(), "b".into()].into())));
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.up("b", vec![]);
    bench.waits("p", "b", "r.test/x:1");
    assert_eq!(created(&bench.decide()).len(), 0, "c has no endpoint yet, and may mean something else");
    bench.up("c", vec![image(2, &["r.test/x:1"], true)]);
    let actions = bench.decide();
    assert_eq!((created(&actions).len(), told(&actions, names::event::IMAGE_NOT_ACTIONABLE).len()), (0, 1));
}

#[test]
fn a_leader_that_starts_leaves_the_slots_to_what_runs() {
    let mut bench = Bench::cold(true);
    bench.state.policy.limits.cluster = 1;
    bench.on(Event::Job(begun("Transferring", 1)));
    bench.job("queued", json!({"image": "r.test/y:1", "digest": digest(2).as_str(), "nodeName": "c"}), false);
    for kind in Kind::ALL {
        bench.on(Event::Listed(kind, ["shop", "a", "b", "c", "u", "job-1"].map(Arc::from).into()));
    }
    bench.on(Event::Fleet(FleetEvent::Expected(["a".into(), "b".into(), "c".into()].into())));
    bench.up("a", vec![image(1, &["r.test/x:1"], true), image(2, &["r.test/y:1"], true)]);
    bench.up("c", vec![]);
    assert_eq!(imports(&bench.decide()), [], "b's agent is at it, and has not answered yet");
    bench.up("b", vec![]);
    assert_eq!(imports(&bench.decide())[0].0, "b");
    assert_eq!(bench.reason("job-1").1, "Queued");
}

#[test]
fn a_stream_that_breaks_keeps_its_slot() {
    let mut bench = Bench::new();
    bench.state.policy.limits.cluster = 1;
    bench.up("a", vec![image(1, &["r.test/x:1"], true), image(2, &["r.test/y:1"], true)]);
    let uid = bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
    assert_eq!(imports(&bench.decide()).len(), 1);
    bench.job("k", json!({"image": "r.test/y:1", "nodeName": "c", "priority": 9}), false);
    bench.transfer(&uid, TransferEvent::Lost { message: "broken".into() });
    assert_eq!(imports(&bench.decide()), []);
    assert_eq!(imports(&bench.pass(2))[0].0, "b");
}

#[test]
fn the_end_that_an_earlier_leader_saw_is_the_end() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.on(Event::Job(begun("Transferring", 1)));
    bench.version = 1;
    assert_eq!(imports(&bench.decide()).len(), 1);
    let version = bench.version + 1;
    bench.on(Event::Job(begun("Imported", version)));
    let actions = bench.decide();
    assert!(matches!(&actions[..], [Action::Detach { .. }]), "{actions:?}");
    assert_eq!(bench.reason("u").0, Phase::Imported);
}

#[test]
fn the_end_that_an_earlier_leader_saw_is_the_end_also_while_a_status_is_written() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.on(Event::Job(begun("Transferring", 1)));
    let written = |actions: &[Action]| actions.iter().any(|one| matches!(one, Action::WriteStatus { .. }));
    assert!(written(&bench.state.decide(bench.now).actions));
    bench.on(Event::Job(begun("Failed", 101)));
    bench.on(Event::StatusWritten { uid: "u".into(), version: Some(100) });
    let actions = bench.state.decide(bench.now).actions;
    assert_eq!((cancels(&actions), written(&actions)), (1, false), "{actions:?}");
    assert_eq!(bench.reason("u").0, Phase::Failed);
}

#[test]
fn somebody_who_goes_on_writing_status_is_not_raced_with() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.on(Event::Job(begun("Transferring", 1)));
    bench.version = 1;
    bench.decide();
    let mut writes = 0;
    for _ in 0..300 {
        bench.version += 1;
        bench.on(Event::Job(begun("Pending", bench.version)));
        let actions = bench.pass(1);
        writes += actions.iter().filter(|action| matches!(action, Action::WriteStatus { .. })).count();
    }
    assert!((3..=14).contains(&writes), "{writes} writes in 300 s");
}

#[test]
fn a_status_that_cannot_be_written_is_tried_ever_more_rarely() {
    let mut bench = Bench::new();
    bench.job("j", json!({"image": "r.test/x:1", "nodeName": "nowhere"}), false);
    let mut tries = 0;
    for _ in 0..300 {
        for action in bench.state.decide(bench.now).actions {
            if let Action::WriteStatus { uid, .. } = action {
                tries += 1;
                bench.on(Event::StatusWritten { uid, version: None });
            }
        }
        bench.now = after(bench.now, 1);
    }
    assert!((7..=12).contains(&tries), "{tries} tries in 300 s");
}

#[test]
fn an_image_on_a_node_whose_agent_is_replaced_is_not_salvaged_again() {
    let mut bench = Bench::new();
    for node in ["a", "b"] {
        bench.up(node, vec![image(1, &["r.test/x:1"], true)]);
    }
    bench.waits("p", "b", "r.test/x:1");
    assert_eq!(woken(&bench.decide()).len(), 1);
    bench.on(Event::Fleet(FleetEvent::Down { node: "b".into() }));
    bench.on(Event::Fleet(FleetEvent::Expected(["a".into(), "c".into()].into())));
    assert_eq!(created(&bench.pass(60)), Vec::<String>::new());
    bench.up("b", vec![]);
    assert_eq!(created(&bench.decide()).len(), 1, "it is not there any more");
}

#[test]
fn a_fleet_that_may_not_be_looked_at_is_said_to_have_nothing() {
    let mut bench = Bench::cold(true);
    for kind in Kind::ALL {
        bench.on(Event::Listed(kind, ["shop", "a", "b", "c"].map(Arc::from).into()));
    }
    bench.waits("p", "b", "r.test/x:1");
    let uid = bench.job("j", json!({"image": "r.test/y:1", "nodeName": "b"}), false);
    let actions = bench.decide();
    assert!(told(&actions, names::event::IMAGE_NOT_ACTIONABLE).is_empty(), "{actions:?}");
    assert_eq!(bench.reason(&uid).1, "", "nothing is said yet");
    assert_eq!(told(&bench.pass(11), names::event::IMAGE_NOT_ACTIONABLE).len(), 1);
    assert_eq!(bench.reason(&uid).1, "TargetUnavailable");
}
