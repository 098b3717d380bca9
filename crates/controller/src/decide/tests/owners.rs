//! Pods by what controls them: who is opted in, and what a tag means to a workload.

use super::*;
use crate::owners::{Owner, OwnerKind};

fn owner(uid: &str, kind: OwnerKind, controller: Option<&str>, says: Option<bool>) -> Event {
    Event::Owner {
        uid: uid.into(),
        owner: Some(Owner { kind, controller: controller.map(Into::into), says }),
    }
}

fn runs(pod: &str, namespace: &str, controller: &str, image: &str, n: u8) -> Event {
    let runs = Runs {
        namespace: namespace.into(),
        controller: Some(controller.into()),
        images: vec![(image.into(), digest(n))],
    };
    Event::Runs { uid: pod.into(), runs: Some(Box::new(runs)) }
}

/// Pod `p` of `ReplicaSet` rs waits for an image that is on `a`, and says itself what it says.
fn waits(bench: &mut Bench, says: Option<bool>) {
    bench.waits_in("shop", "p", "b", "r.test/x:1", |pod| {
        pod.says = says;
        pod.controller = Some("rs".into());
    });
}

#[test]
fn opting_in_later_on_the_deployment_acts_on_pods_that_wait() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.on(owner("rs", OwnerKind::ReplicaSet, Some("deploy"), None));
    bench.on(owner("deploy", OwnerKind::Deployment, None, None));
    waits(&mut bench, None);
    assert_eq!(bench.decide(), [], "nobody says anything");
    let yes = owner("deploy", OwnerKind::Deployment, None, Some(true));
    assert!(bench.state.apply(yes, bench.now), "there is something to decide");
    assert_eq!(created(&bench.decide()).len(), 1);
    let yes = owner("deploy", OwnerKind::Deployment, None, Some(true));
    assert!(!bench.state.apply(yes, bench.now), "its status changed, say");
}

#[test]
fn the_nearest_word_wins_and_an_owner_that_goes_says_nothing() {
    for (pod, job, cron, acts) in [
        (None, None, Some(true), true),
        (Some(false), None, Some(true), false),
        (Some(true), Some(false), Some(false), true),
        (None, Some(false), Some(true), false),
        (None, Some(true), Some(false), true),
    ] {
        let mut bench = Bench::new();
        bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
        bench.on(owner("rs", OwnerKind::Job, Some("cron"), job));
        bench.on(owner("cron", OwnerKind::CronJob, None, cron));
        waits(&mut bench, pod);
        assert_eq!(created(&bench.decide()).len(), usize::from(acts), "{pod:?} {job:?} {cron:?}");
    }
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.on(owner("rs", OwnerKind::StatefulSet, None, Some(true)));
    bench.on(Event::Listed(Kind::Owners(OwnerKind::StatefulSet), HashSet::new()));
    waits(&mut bench, None);
    assert_eq!(bench.decide(), [], "it was not in the new list");
}

#[test]
fn a_kind_that_cannot_be_listed_is_done_without() {
    let mut bench = Bench::cold(true);
    let forbidden = Kind::Owners(OwnerKind::CronJob);
    for kind in Kind::ALL.into_iter().filter(|kind| *kind != forbidden) {
        bench.on(Event::Listed(kind, ["shop", "a", "b", "c"].map(Arc::from).into()));
    }
    bench.on(Event::Fleet(FleetEvent::Expected(["a".into(), "b".into()].into())));
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.up("b", vec![]);
    bench.waits("p", "b", "r.test/x:1");
    bench.now = after(bench.now, 11);
    assert!(bench.decide().is_empty() && !bench.state.is_synced());
    assert!(bench.state.apply(Event::Unlisted(forbidden), bench.now));
    assert!(bench.state.is_synced());
    assert_eq!(created(&bench.decide()).len(), 1);
    assert!(!bench.state.apply(Event::Unlisted(forbidden), bench.now), "once");
}

#[test]
fn a_tag_is_what_the_workload_runs_and_the_event_says_so() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.up("c", vec![image(2, &["r.test/x:1"], true)]);
    bench.on(owner("rs", OwnerKind::ReplicaSet, Some("deploy"), Some(true)));
    bench.on(owner("older", OwnerKind::ReplicaSet, Some("deploy"), Some(true)));
    bench.on(runs("q", "shop", "other", "r.test/x:1", 1));
    waits(&mut bench, None);
    let notes = told(&bench.decide(), names::event::IMAGE_NOT_ACTIONABLE);
    assert!(notes[0].contains("on different nodes"), "another workload's pods do not count: {notes:?}");

    assert!(bench.state.apply(runs("r", "shop", "older", "r.test/x:1", 2), bench.now), "it may matter");
    assert!(!bench.state.apply(runs("s", "work", "older", "r.test/x:1", 1), bench.now), "nobody waits there");
    let actions = bench.decide();
    assert_eq!(imports(&actions), [("b".into(), "r.test/x:1".into(), vec!["c".into()])]);
    let notes = told(&actions, names::event::IMAGE_SALVAGEABLE);
    assert!(notes[0].contains("what 1 other container of this workload runs by the tag"), "{notes:?}");
}

#[test]
fn a_workload_that_runs_two_images_by_one_tag_is_told_which() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.on(runs("q", "shop", "rs", "r.test/x:1", 1));
    bench.on(runs("r", "shop", "rs", "r.test/x:1", 2));
    waits(&mut bench, Some(true));
    let actions = bench.decide();
    let notes = told(&actions, names::event::IMAGE_NOT_ACTIONABLE);
    for n in [1, 2] {
        assert!(notes[0].contains(digest(n).as_str()), "{notes:?}");
    }
    bench.on(Event::Runs { uid: "r".into(), runs: None });
    assert_eq!(created(&bench.pass(1)).len(), 1, "one of them went");
}

#[test]
fn pods_that_are_gone_from_a_new_list_run_nothing() {
    let mut bench = Bench::new();
    bench.on(runs("q", "shop", "rs", "r.test/x:1", 1));
    assert!(bench.state.world.running.runs_in("shop", &digest(1)));
    bench.on(Event::Listed(Kind::Pods, HashSet::new()));
    assert!(!bench.state.world.running.runs_in("shop", &digest(1)));
}

#[test]
fn what_the_last_pull_failed_of_is_remembered_while_kubelet_backs_off() {
    let mut bench = Bench::new();
    let mut sees = |reason: &str, message: &str, error: Option<&str>| {
        bench.waits_in("shop", "p", "b", "r.test/x:1", |pod| {
            let wait = &mut pod.waits[0];
            (wait.reason, wait.message) = (reason.into(), message.into());
            wait.last_pull_error = error.map(Into::into);
        });
        bench.state.pods["uid-p"].pod.waits[0].last_pull_error.clone()
    };
    assert_eq!(sees("ErrImagePull", "refused", Some("refused")).as_deref(), Some("refused"));
    for _ in 0..3 {
        assert_eq!(sees("ImagePullBackOff", "Back-off", None).as_deref(), Some("refused"));
    }
    assert_eq!(sees("ErrImagePull", "timeout", Some("timeout")).as_deref(), Some("timeout"));
    assert_eq!(sees("ImagePullBackOff", "Back-off", None).as_deref(), Some("timeout"));
    let pod = bench.state.pods["uid-p"].pod.clone();
    let same = Event::Pod { uid: "uid-p".into(), waiting: Some(pod) };
    assert!(!bench.state.apply(same, bench.now), "no news, no decision");
}

#[test]
fn what_a_node_refuses_by_its_signature_is_not_brought_in_by_another_way() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.waits_in("shop", "p", "b", "r.test/x:1", |pod| {
        pod.waits[0].reason = "SignatureValidationFailed".into();
        pod.waits[0].message = "no signature of ours".into();
        pod.waits[0].class = Class::Signature;
    });
    let actions = bench.decide();
    assert_eq!(created(&actions).len(), 0);
    assert!(told(&actions, names::event::IMAGE_NOT_ACTIONABLE)[0].contains("no signature of ours"));
}

#[test]
fn a_container_is_told_of_each_image_it_waits_for() {
    let mut bench = Bench::new();
    let mut waits_for = |image: &str| {
        bench.waits("p", "b", image);
        told(&bench.decide(), names::event::IMAGE_NOT_ACTIONABLE).len()
    };
    assert_eq!(waits_for("r.test/volume:1"), 1);
    assert_eq!(waits_for("r.test/x:1"), 1, "its volume is there, its own image is not");
    assert_eq!(waits_for("r.test/volume:1"), 0);
}

#[test]
fn a_pod_that_is_not_opted_in_hears_nothing_of_a_failed_job_either() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.waits("p", "b", "r.test/x:1");
    bench.waits_in("shop", "silent", "b", "r.test/x:1", |pod| pod.says = None);
    bench.decide();
    bench.transfer("job-1", failed(false));
    assert_eq!(told(&bench.decide(), names::event::IMAGE_SALVAGE_FAILED).len(), 1);
}

#[test]
fn a_job_by_tag_says_why_its_digest_is_the_one() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    let uid = bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
    bench.decide();
    let resolved = |bench: &Bench| {
        let conditions = &bench.state.jobs[&*uid].0.status.conditions;
        conditions.iter().find(|c| c.type_ == names::condition::RESOLVED).unwrap().message.clone()
    };
    let expected = format!("the image is {}, what the tag means on 1 node", digest(1));
    assert_eq!(resolved(&bench), expected);
    bench.transfer(&uid, done());
    bench.decide();
    assert_eq!(resolved(&bench), expected, "also when it is done");
}

#[test]
fn a_namespace_that_opts_in_later_acts_on_pods_that_wait() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.waits_in("work", "p", "b", "r.test/x:1", |_| {});
    assert_eq!(bench.decide(), []);
    bench.on(Event::Namespace { name: "work".into(), consent: Some(Consent::Given) });
    assert!(!created(&bench.decide()).is_empty());
}
