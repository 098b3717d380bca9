//! Jobs: phases, limits, clocks, status.

use super::*;

#[test]
fn two_nodes_at_once_and_never_more_than_the_bound() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true), image(2, &["r.test/y:1"], true)]);
    bench.waits("p1", "b", "r.test/x:1");
    bench.waits("p2", "c", "r.test/x:1");
    bench.waits("p3", "b", "r.test/y:1");
    let actions = bench.decide();
    assert_eq!(imports(&actions).len(), 2);
    let queued: Vec<_> =
        ["job-1", "job-2", "job-3"].into_iter().filter(|uid| bench.reason(uid).1 == "Queued").collect();
    assert_eq!(queued.len(), 1);
    let running = ["job-1", "job-2", "job-3"].into_iter().find(|uid| !queued.contains(uid)).unwrap();
    bench.transfer(running, done());
    assert_eq!(imports(&bench.decide()).len(), 1, "the slot goes to the one that waits");
}

#[test]
fn jobs_by_hand_say_what_they_wait_for() {
    let d = digest(1).to_string();
    for (spec, reason, says) in [
        (json!({"image": "r.test/x:1", "nodeName": "nowhere"}), "NodeNotFound", "no node nowhere"),
        (
            json!({"image": format!("r.test/x@{d}"), "nodeName": "b"}),
            "NoSource",
            "no node whose agent answers",
        ),
        (
            json!({"image": format!("r.test/x@{d}"), "nodeName": "b", "sourceNodeName": "c"}),
            "NoSource",
            "c (spec.sourceNodeName)",
        ),
        (json!({"image": "r.test/x:1", "nodeName": "b", "suspend": true}), "Suspended", "spec.suspend"),
    ] {
        let mut bench = Bench::new();
        let uid = bench.job("j", spec.clone(), false);
        let actions = bench.decide();
        assert_eq!(bench.reason(&uid), (Phase::Pending, reason.to_owned()), "{spec}");
        assert!(bench.message(&uid).contains(says), "{}", bench.message(&uid));
        assert_eq!(imports(&actions).len(), 0);
        assert!(!deleted(&bench.pass(100_000)), "one by hand stays");
    }
}

#[test]
fn a_job_by_hand_obeys_the_namespace() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    for (says, reason) in [
        (Consent::NotGiven, "NamespaceNotAllowed"),
        (Consent::Denied, "NamespaceDenied"),
        (Consent::Terminating, "NamespaceTerminating"),
    ] {
        bench.on(Event::Namespace { name: "shop".into(), consent: Some(says) });
        let uid = bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
        assert_eq!(imports(&bench.decide()).len(), 0);
        assert_eq!(bench.reason(&uid), (Phase::Pending, reason.to_owned()));
    }
    bench.on(Event::Namespace { name: "shop".into(), consent: Some(Consent::Given) });
    assert_eq!(imports(&bench.decide()).len(), 1, "one of the three; the others wait for it");
}

#[test]
fn a_pin_settles_what_a_tag_means_and_a_source_is_the_only_one() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true), image(3, &["r.test/y:1"], true)]);
    bench.up("c", vec![image(2, &["r.test/x:1"], true), image(3, &["r.test/y:1"], true)]);
    bench.job("j", json!({"image": "r.test/x:1", "digest": digest(2).as_str(), "nodeName": "b"}), false);
    bench.job("k", json!({"image": "r.test/y:1", "sourceNodeName": "c", "nodeName": "b"}), false);
    let started = imports(&bench.decide());
    let from_c = |image: &str| ("b".to_owned(), image.to_owned(), vec!["c".to_owned()]);
    assert_eq!(started, [from_c("r.test/x:1"), from_c("r.test/y:1")]);
}

#[test]
fn priority_goes_first() {
    let mut bench = Bench::new();
    let images = (1..=3).map(|n| image(n, &[&format!("r.test/x:{n}")], true)).collect();
    bench.up("a", images);
    for n in 1..=3 {
        let priority = if n == 3 { 5 } else { 0 };
        bench.job(
            "j",
            json!({"image": format!("r.test/x:{n}"), "nodeName": "b", "priority": priority}),
            false,
        );
    }
    let started = imports(&bench.decide());
    assert_eq!(
        started.iter().map(|(_, image, _)| image.as_str()).collect::<Vec<_>>(),
        ["r.test/x:1", "r.test/x:3"]
    );
}

#[test]
fn failures_are_tried_again_with_a_limit() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    let uid = bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b", "backoffLimit": 2}), false);
    bench.decide();
    for attempt in 1..=2 {
        bench.transfer(&uid, failed(true));
        assert_eq!(imports(&bench.decide()).len(), 0, "back-off");
        assert_eq!(bench.reason(&uid), (Phase::Transferring, "Retrying".into()));
        assert_eq!(imports(&bench.pass(5)).len(), 1, "attempt {}", attempt + 1);
    }
    assert_eq!(bench.state.jobs[&*uid].0.status.attempts, 3);
    bench.transfer(&uid, failed(true));
    let actions = bench.decide();
    assert_eq!(bench.reason(&uid), (Phase::Failed, "BackoffLimitExceeded".into()));
    assert!(
        actions.iter().any(|action| matches!(action, Action::Cancel { .. })),
        "nothing is left on the node"
    );
    assert_eq!(imports(&bench.pass(10_000)).len(), 0, "final");
}

#[test]
fn who_cannot_be_read_from_twice_goes_last() {
    for (lost, order) in [(1, ["a", "c"]), (2, ["c", "a"])] {
        let mut bench = Bench::new();
        bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
        let uid = bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
        bench.decide();
        for n in 1..=lost {
            bench.transfer(&uid, TransferEvent::Lost { message: "broken".into() });
            if n == lost {
                bench.up("c", vec![image(1, &["r.test/x:1"], true)]);
            }
            assert_eq!(imports(&bench.decide()).len(), 0, "back-off");
            let again = imports(&bench.pass(5));
            assert_eq!(again[0].2, if n == lost { &order[..] } else { &["a"] });
        }
        assert_eq!(bench.state.jobs[&*uid].0.status.attempts, 1, "attached again, and not tried again");
    }
}

#[test]
fn a_queue_that_moves_is_not_written_for_those_who_wait_on() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true), image(2, &["r.test/x:2"], true)]);
    let job = |bench: &mut Bench, name: &str, image: &str| {
        bench.job(name, json!({"image": image, "nodeName": "b"}), false)
    };
    job(&mut bench, "one", "r.test/x:1");
    let other = job(&mut bench, "two", "r.test/x:2");
    let waits = job(&mut bench, "three", "r.test/x:1");
    bench.decide();
    assert_eq!(bench.reason(&waits), (Phase::Pending, "Queued".into()));
    bench.transfer(&other, done());
    let written: Vec<_> = bench
        .decide()
        .into_iter()
        .filter_map(|action| match action {
            Action::WriteStatus { uid, .. } => Some(uid),
            _ => None,
        })
        .collect();
    assert_eq!(written, [other.into()], "the other's end, and nothing of who waits");
}

#[test]
fn what_earlier_attempts_moved_counts() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    let uid = bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
    bench.decide();
    let moved = |transferred: i64, reused: i64, nodes: &[&str]| Progress {
        total: 5,
        transferred,
        reused,
        source_nodes: nodes.iter().map(ToString::to_string).collect(),
        ..Progress::default()
    };
    bench.transfer(&uid, TransferEvent::Progress(moved(3, 0, &["a"])));
    bench.transfer(&uid, failed(true));
    bench.pass(5);
    bench.transfer(&uid, TransferEvent::Progress(moved(2, 3, &["c"])));
    bench.transfer(&uid, failed(true));
    bench.pass(5);
    bench.transfer(&uid, TransferEvent::Done(moved(0, 5, &[])));
    bench.decide();
    let status = &bench.state.jobs[&*uid].0.status;
    let transfer = status.transfer.unwrap();
    assert_eq!((transfer.transferred_bytes, transfer.reused_bytes), (5, 0));
    assert_eq!(status.source_nodes, ["a", "c"]);
    assert!(crate::salvage::status::message(status).contains("moved from a, c"), "{status:?}");
}

#[test]
fn a_deleted_job_is_cancelled() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    let uid = bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
    bench.decide();
    bench.on(Event::JobGone { uid: uid.as_str().into() });
    let actions = bench.decide();
    assert!(
        matches!(&actions[..], [Action::Cancel { transfer_id, .. }] if *transfer_id == uid),
        "{actions:?}"
    );
}

#[test]
fn suspending_ends_the_transfer_and_stops_the_clocks() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    let spec = |suspend: bool| {
        json!({"image": "r.test/x:1", "nodeName": "b", "suspend": suspend, "activeDeadlineSeconds": 60,
            "pendingDeadlineSeconds": 60})
    };
    let uid = bench.job("j", spec(false), false);
    bench.decide();
    let edited = |suspend, generation| -> SalvageJob {
        serde_json::from_value(json!({
            "apiVersion": "tote.dev/v1alpha1", "kind": "SalvageJob",
            "metadata": {"namespace": "shop", "name": "j", "uid": "job-1", "generation": generation},
            "spec": spec(suspend)
        }))
        .unwrap()
    };
    bench.on(Event::Job(Box::new(edited(true, 2))));
    let actions = bench.decide();
    assert!(actions.iter().any(|action| matches!(action, Action::Cancel { .. })), "{actions:?}");
    bench.pass(1000);
    assert_eq!(bench.reason(&uid), (Phase::Pending, "Suspended".into()));
    assert_eq!(bench.state.jobs[&*uid].0.status.observed_generation, Some(2));
    bench.on(Event::Job(Box::new(edited(false, 3))));
    assert_eq!(imports(&bench.decide()).len(), 1);
    bench.pass(59);
    assert_eq!(bench.reason(&uid).0, Phase::Transferring);
    let actions = bench.pass(2);
    assert_eq!(bench.reason(&uid), (Phase::Failed, "DeadlineExceeded".into()));
    assert!(actions.iter().any(|action| matches!(action, Action::Cancel { .. })), "{actions:?}");
}

#[test]
fn a_pending_job_fails_by_its_deadline_with_what_it_waited_for() {
    let mut bench = Bench::new();
    let spec = json!({"image": "r.test/x:1", "nodeName": "nowhere", "pendingDeadlineSeconds": 60});
    let uid = bench.job("j", spec, false);
    bench.decide();
    bench.pass(59);
    assert_eq!(bench.reason(&uid).0, Phase::Pending);
    bench.pass(2);
    assert_eq!(bench.reason(&uid), (Phase::Failed, "PendingDeadlineExceeded".into()));
    assert!(bench.message(&uid).contains("no node nowhere"), "{}", bench.message(&uid));
}

#[test]
fn a_finished_job_is_deleted_after_its_time() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    let uid =
        bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b", "ttlSecondsAfterFinished": 60}), false);
    bench.decide();
    bench.transfer(&uid, done());
    assert!(!deleted(&bench.decide()));
    assert!(!deleted(&bench.pass(59)));
    assert!(deleted(&bench.pass(2)));
    assert!(!deleted(&bench.decide()), "once");
}

#[test]
fn progress_is_written_every_five_seconds_and_phases_at_once() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    let uid = bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
    bench.decide();
    let mut writes = Vec::new();
    for second in 1..=21 {
        bench.transfer(
            &uid,
            TransferEvent::Progress(Progress { total: 100, transferred: second, ..Progress::default() }),
        );
        for action in bench.pass(1) {
            if let Action::WriteStatus { status, .. } = action {
                writes.push((second, status.transfer.unwrap().transferred_bytes));
            }
        }
    }
    assert_eq!(writes, [(1, 1), (6, 6), (11, 11), (16, 16), (21, 21)]);
    bench.transfer(&uid, done());
    let actions = bench.decide();
    assert!(actions.iter().any(|action| matches!(action, Action::WriteStatus { status, .. }
        if status.phase == Some(Phase::Imported) && status.transfer.unwrap().total_bytes == 5 << 20)));
}

#[test]
fn conditions_read_as_kstatus_wants_them() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    let uid = bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
    let of = |bench: &Bench| {
        let conditions = &bench.state.jobs["job-1"].0.status.conditions;
        conditions.iter().map(|c| format!("{}={}", c.type_, c.status)).collect::<Vec<_>>().join(" ")
    };
    bench.decide();
    assert_eq!(
        of(&bench),
        "Resolved=True AccessProven=Unknown Imported=False Ready=False Reconciling=True Stalled=False"
    );
    let since = bench.state.jobs["job-1"].0.status.conditions[0].last_transition_time.clone();
    bench.pass(5);
    bench.transfer(&uid, done());
    bench.decide();
    assert_eq!(
        of(&bench),
        "Resolved=True AccessProven=Unknown Imported=True Ready=True Reconciling=False Stalled=False"
    );
    let status = &bench.state.jobs["job-1"].0.status;
    assert_eq!(status.conditions[0].last_transition_time, since, "nothing changed there");
    assert_eq!(status.conditions[2].last_transition_time.0, bench.now);
}

/// A job as it is after an edit.
fn edited(uid: &str, name: &str, generation: i64, spec: &serde_json::Value) -> Event {
    let job: SalvageJob = serde_json::from_value(json!({
        "apiVersion": "tote.dev/v1alpha1", "kind": "SalvageJob",
        "metadata": {"namespace": "shop", "name": name, "uid": uid, "generation": generation},
        "spec": spec
    }))
    .unwrap();
    Event::Job(Box::new(job))
}

#[test]
fn an_edit_of_a_finished_job_is_observed() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    let uid = bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
    bench.decide();
    bench.transfer(&uid, done());
    bench.decide();
    let spec = json!({"image": "r.test/x:1", "nodeName": "b", "ttlSecondsAfterFinished": 9999});
    bench.on(edited(&uid, "j", 2, &spec));
    let written = bench.decide().into_iter().find_map(|action| match action {
        Action::WriteStatus { status, .. } => Some((status.observed_generation, status.phase)),
        _ => None,
    });
    assert_eq!(written, Some((Some(2), Some(Phase::Imported))));
}

#[test]
fn who_waits_for_an_opt_in_waits_by_the_deadline_and_a_switch_stops_the_clocks() {
    let spec = json!({"image": "r.test/x:1", "nodeName": "b", "pendingDeadlineSeconds": 60});
    let mut bench = Bench::new();
    bench.on(Event::Namespace { name: "shop".into(), consent: Some(Consent::NotGiven) });
    let uid = bench.job("j", spec.clone(), false);
    bench.decide();
    bench.pass(61);
    assert_eq!(bench.reason(&uid), (Phase::Failed, "PendingDeadlineExceeded".into()));
    assert!(bench.message(&uid).contains("tote.dev/allow"), "{}", bench.message(&uid));

    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.state.world.enabled = false;
    let uid = bench.job("j", spec, false);
    bench.decide();
    bench.pass(1000);
    assert_eq!(bench.reason(&uid).1, "Disabled");
    bench.state.world.enabled = true;
    assert_eq!(imports(&bench.decide()).len(), 1);
}

#[test]
fn a_job_that_somebody_takes_over_is_not_deleted() {
    let mut bench = Bench::new();
    let spec = json!({"image": "r.test/x:1", "nodeName": "b"});
    let uid = bench.job("j", spec.clone(), true);
    bench.decide();
    bench.on(edited(&uid, "j", 1, &spec));
    assert!(!deleted(&bench.pass(11)) && !deleted(&bench.pass(60)), "its label is gone");
}
