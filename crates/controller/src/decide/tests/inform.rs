//! What webhooks are told.

use super::*;
use crate::notify::{Notification, NotificationType::*};

fn informed(actions: &[Action]) -> Vec<&Notification> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::Notify(notification) => Some(&**notification),
            _ => None,
        })
        .collect()
}

fn expected(bench: &Bench, pod: &str) -> Notification {
    Notification {
        type_: Detected,
        pod_name: pod.into(),
        namespace: "shop".into(),
        image_ref: "r.test/x:1".into(),
        digest: String::new(),
        source_node: String::new(),
        target_node: "b".into(),
        error: "Refused: ErrImagePull: ".into(),
        timestamp: bench.now,
    }
}

#[test]
fn a_wait_is_told_once_and_its_end_to_every_pod() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    for pod in ["p", "q"] {
        // Two containers of one image are one matter.
        bench.waits_in("shop", pod, "b", "r.test/x:1", |pod| {
            let second = Wait { field_path: "spec.containers{side}".into(), ..pod.waits[0].clone() };
            pod.waits.push(second);
        });
    }
    let actions = bench.decide();
    assert_eq!(informed(&actions), [&expected(&bench, "p"), &expected(&bench, "q")]);
    let later = bench.pass(5);
    assert_eq!(informed(&later), [] as [&Notification; 0], "once");

    bench.transfer("job-1", done());
    let actions = bench.decide();
    let salvaged = |pod: &str| Notification {
        type_: Salvaged,
        digest: digest(1).to_string(),
        source_node: "a".into(),
        error: String::new(),
        ..expected(&bench, pod)
    };
    assert_eq!(informed(&actions), [&salvaged("p"), &salvaged("q")]);
    let later = bench.pass(5);
    assert!(!woken(&later).is_empty() && informed(&later).is_empty(), "not at every wake: {later:?}");
}

#[test]
fn a_pod_that_did_not_opt_in_is_not_told_of() {
    let mut bench = Bench::new();
    bench.waits_in("shop", "p", "b", "r.test/x:1", |pod| pod.says = Some(false));
    bench.waits_in("work", "q", "b", "r.test/x:1", |_| {});
    assert_eq!(informed(&bench.decide()), [] as [&Notification; 0]);
}

#[test]
fn a_failure_is_told_with_its_cause() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.waits("p", "b", &format!("r.test/x@{}", digest(1)));
    assert_eq!(informed(&bench.decide())[0].digest, digest(1).to_string(), "it is pinned");
    bench.transfer("job-1", failed(true));
    assert!(informed(&bench.decide()).is_empty(), "it is tried again");
    bench.pass(5);
    bench.transfer("job-1", failed(false));
    let actions = bench.decide();
    let told = informed(&actions);
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(
        (told[0].type_, told[0].pod_name.as_str(), told[0].target_node.as_str()),
        (SalvageFailed, "p", "b")
    );
    assert_eq!((told[0].error.as_str(), told[0].source_node.as_str()), ("taken", "a"));
}

#[test]
fn a_job_that_no_pod_waits_for_is_told_without_one() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true), image(2, &["r.test/y:1"], true)]);
    let one = bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
    let two = bench.job("k", json!({"image": "r.test/y:1", "nodeName": "b"}), false);
    assert!(informed(&bench.decide()).is_empty());
    bench.transfer(&one, done());
    bench.transfer(&two, failed(false));
    let actions = bench.decide();
    let told: Vec<_> = informed(&actions)
        .into_iter()
        .map(|told| (told.type_, told.pod_name.as_str(), told.image_ref.as_str(), told.error.as_str()))
        .collect();
    assert_eq!(told, [(SalvageFailed, "", "r.test/y:1", "taken"), (Salvaged, "", "r.test/x:1", "")]);
    assert!(informed(&bench.pass(100)).is_empty(), "once");
}

#[test]
fn what_ended_before_this_controller_began_is_not_told_again() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    let uid = bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
    bench.decide();
    bench.transfer(&uid, done());
    bench.decide();
    let job: SalvageJob = serde_json::from_value(json!({
        "apiVersion": "tote.dev/v1alpha1", "kind": "SalvageJob",
        "metadata": {"namespace": "shop", "name": "j", "uid": uid, "generation": 1},
        "spec": {"image": "r.test/x:1", "nodeName": "b"},
        "status": bench.state.jobs[&*uid].0.status
    }))
    .unwrap();
    let mut next = Bench::new();
    next.on(Event::Job(Box::new(job)));
    assert!(informed(&next.decide()).is_empty());
}
