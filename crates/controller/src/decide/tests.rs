//! Events in, actions out: the whole of what the controller decides, without a cluster.

use serde_json::json;
use tote_api::{SalvageJob, names};
use tote_image::{Digest, Platform};

use super::*;
use crate::detect::{Consent, Wait};
use crate::fleet::{FleetEvent, Image, Manifest};
use crate::salvage::{Progress, after};

struct Bench {
    state: State,
    now: Timestamp,
    jobs: i64,
}

fn digest(n: u8) -> Digest {
    Digest::sha256(&[n])
}

fn image(n: u8, names: &[&str], complete: bool) -> Image {
    Image {
        target: digest(n),
        names: names.iter().map(|&name| name.into()).collect(),
        manifests: vec![Manifest {
            digest: digest(n + 100),
            platform: Platform::new("linux", "amd64", ""),
            complete,
        }],
    }
}

impl Bench {
    /// Nodes `a`, `b`, `c` with agents and nothing on them; namespace `shop` opted in.
    fn new() -> Self {
        let mut bench = Self::cold(true);
        for kind in Kind::ALL {
            let seen = match kind {
                Kind::Namespaces => ["shop", "work", "kube-system"].map(Arc::from).into(),
                Kind::Nodes => ["a", "b", "c"].map(Arc::from).into(),
                _ => HashSet::new(),
            };
            bench.on(Event::Listed(kind, seen));
        }
        bench.on(Event::Fleet(FleetEvent::Expected(["a".into(), "b".into(), "c".into()].into())));
        for node in ["a", "b", "c"] {
            bench.up(node, vec![]);
        }
        assert_eq!(bench.decide(), []);
        bench
    }

    fn cold(enabled: bool) -> Self {
        let limits = Limits { fleet: 2, target: 2, source: 2 };
        let state = State::new(Policy { enabled, limits });
        let mut bench = Self { state, now: "2026-01-01T00:00:00Z".parse().unwrap(), jobs: 0 };
        for (name, says) in
            [("shop", Consent::Given), ("work", Consent::NotGiven), ("kube-system", Consent::Denied)]
        {
            bench.on(Event::Namespace { name: name.into(), consent: Some(says) });
        }
        for node in ["a", "b", "c"] {
            bench.on(Event::Node { name: node.into(), uid: Some(format!("uid-{node}").into()) });
        }
        bench
    }

    fn on(&mut self, event: Event) {
        self.state.apply(event, self.now);
    }

    fn up(&mut self, node: &str, images: Vec<Image>) {
        self.on(Event::Fleet(FleetEvent::Up {
            node: node.into(),
            address: format!("{node}:9090"),
            platform: Platform::new("linux", "amd64", ""),
            problem: String::new(),
            images,
        }));
    }

    fn waits(&mut self, pod: &str, node: &str, image: &str) {
        self.waits_in("shop", pod, node, image, |_| {});
    }

    fn waits_in(
        &mut self,
        namespace: &str,
        pod: &str,
        node: &str,
        image: &str,
        edit: impl Fn(&mut WaitingPod),
    ) {
        let wait = Wait {
            field_path: "spec.containers{web}".into(),
            image: image.into(),
            reference: image.parse().map_err(|error: tote_image::ReferenceError| error.to_string()),
            policy_always: false,
            reason: "ErrImagePull".into(),
        };
        let mut waiting = WaitingPod {
            namespace: namespace.into(),
            name: pod.into(),
            uid: format!("uid-{pod}").into(),
            node: node.into(),
            opted_in: true,
            imported_at: None,
            waits: vec![wait],
        };
        edit(&mut waiting);
        self.on(Event::Pod { uid: waiting.uid.clone(), waiting: Some(waiting) });
    }

    #[allow(clippy::needless_pass_by_value)] // reads better at the call
    fn job(&mut self, name: &str, spec: serde_json::Value, automatic: bool) -> String {
        self.jobs += 1;
        let uid = format!("job-{}", self.jobs);
        let labels = if automatic { json!({names::MANAGED_BY: names::MANAGER}) } else { json!({}) };
        let job: SalvageJob = serde_json::from_value(json!({
            "apiVersion": "tote.dev/v1alpha1", "kind": "SalvageJob",
            "metadata": {"namespace": "shop", "name": name, "uid": uid, "generation": 1, "labels": labels,
                "creationTimestamp": self.now.to_string()},
            "spec": spec, "status": {"observedGeneration": -1, "phase": "Pending"}
        }))
        .unwrap();
        self.on(Event::Job(Box::new(job)));
        uid
    }

    /// Decides, and plays the API server: makes jobs that are asked for, acknowledges statuses.
    fn decide(&mut self) -> Vec<Action> {
        let mut all = Vec::new();
        for _ in 0..10 {
            let actions = self.state.decide(self.now).actions;
            let mut changed = false;
            for action in &actions {
                match action {
                    Action::CreateJob(new) => {
                        let spec = json!({"image": &*new.image, "digest": new.digest.as_str(), "nodeName": &*new.node,
                            "pendingDeadlineSeconds": 3600, "ttlSecondsAfterFinished": 604_800});
                        self.job(&new.name, spec, true);
                        self.on(Event::Created { base: new.base.clone(), ok: true });
                        changed = true;
                    }
                    Action::WriteStatus { uid, .. } => {
                        self.on(Event::StatusWritten { uid: uid.clone(), ok: true });
                        changed = true;
                    }
                    _ => {}
                }
            }
            all.extend(actions);
            if !changed {
                break;
            }
        }
        all
    }

    fn pass(&mut self, seconds: i64) -> Vec<Action> {
        self.now = after(self.now, seconds);
        self.decide()
    }

    fn transfer(&mut self, uid: &str, event: TransferEvent) {
        let crate::salvage::Run::Running { stream, .. } = self.state.jobs[uid].0.run else {
            panic!("{uid} does not run: {:?}", self.state.jobs[uid].0.run)
        };
        self.on(Event::Transfer { uid: uid.into(), stream, event });
    }

    fn reason(&self, uid: &str) -> (Phase, String) {
        let (job, _) = &self.state.jobs[uid];
        (job.phase(), job.reason().to_owned())
    }

    fn message(&self, uid: &str) -> String {
        crate::salvage::status::message(&self.state.jobs[uid].0.status).to_owned()
    }
}

fn told(actions: &[Action], wanted: &str) -> Vec<String> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::Tell { reason, note, about, .. } if reason == wanted && about.kind == "Pod" => {
                Some(note.clone())
            }
            _ => None,
        })
        .collect()
}

fn imports(actions: &[Action]) -> Vec<(String, String, Vec<String>)> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::Import { node, reference, sources, .. } => Some((
                node.to_string(),
                reference.clone(),
                sources.iter().map(|source| source.node.to_string()).collect(),
            )),
            _ => None,
        })
        .collect()
}

fn woken(actions: &[Action]) -> Vec<(String, BTreeMap<String, String>)> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::WakePod { name, annotations, .. } => Some((name.to_string(), annotations.clone())),
            _ => None,
        })
        .collect()
}

fn created(actions: &[Action]) -> Vec<String> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::CreateJob(job) => Some(job.name.clone()),
            _ => None,
        })
        .collect()
}

fn deleted(actions: &[Action]) -> bool {
    actions.iter().any(|action| matches!(action, Action::DeleteJob { .. }))
}

fn done() -> TransferEvent {
    TransferEvent::Done(Progress {
        total: 5 << 20,
        transferred: 5 << 20,
        reused: 0,
        source_nodes: vec!["a".into()],
    })
}

fn failed(retryable: bool) -> TransferEvent {
    TransferEvent::Failed { reason: "NameConflict", message: "taken".into(), retryable }
}

#[test]
fn a_pod_that_waits_gets_its_image_and_is_woken_until_it_runs() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    for pod in ["p1", "p2", "p3"] {
        bench.waits(pod, "b", "r.test/x:1");
    }
    let actions = bench.decide();
    assert_eq!(created(&actions).len(), 1, "three pods, one job");
    assert_eq!(imports(&actions), [("b".into(), "r.test/x:1".into(), vec!["a".into()])]);
    let notes = told(&actions, names::event::IMAGE_SALVAGEABLE);
    assert_eq!(notes.len(), 3);
    assert!(notes[0].contains("on a") && notes[0].contains(digest(1).as_str()), "{notes:?}");
    assert_eq!(bench.reason("job-1"), (Phase::Transferring, "Transferring".into()));
    assert_eq!(bench.decide(), [], "nothing is done twice");

    bench.transfer("job-1", done());
    let actions = bench.decide();
    let woken_now = woken(&actions);
    assert_eq!(woken_now.len(), 3);
    assert_eq!(woken_now[0].1[names::SALVAGED_DIGEST], digest(1).as_str());
    assert_eq!(woken_now[0].1[names::IMPORTED_AT], "2026-01-01T00:00:00Z");
    assert!(!woken_now[0].1.contains_key(names::WAKE));
    assert_eq!(told(&actions, names::event::IMAGE_SALVAGED).len(), 3);
    assert_eq!(bench.reason("job-1"), (Phase::Imported, "Imported".into()));
    assert_eq!(bench.state.jobs["job-1"].0.status.pods, ["p1", "p2", "p3"]);

    for pod in ["p1", "p2"] {
        bench.on(Event::Pod { uid: format!("uid-{pod}").into(), waiting: None });
    }
    bench.waits_in("shop", "p3", "b", "r.test/x:1", |pod| {
        pod.imported_at = Some("2026-01-01T00:00:00Z".to_owned());
    });
    let again = woken(&bench.pass(2));
    assert_eq!(again.len(), 1, "p3 still waits");
    assert!(again[0].1.contains_key(names::WAKE), "a patch that changes nothing wakes nobody");
    assert_eq!(again[0].1[names::IMPORTED_AT], "2026-01-01T00:00:00Z", "stays true");
}

#[test]
fn a_pod_that_kubelet_keeps_waiting_is_told_why_and_causes_no_other_job() {
    let mut bench = Bench::new();
    bench.up("b", vec![image(1, &["r.test/x:1", "other.test/y:1"], true)]);
    bench.waits("p", "b", "r.test/x:1");
    let mut actions = bench.decide();
    for _ in 0..60 {
        actions.extend(bench.pass(1));
    }
    let wakes = woken(&actions).len();
    assert!((7..=14).contains(&wakes), "{wakes} wakes in a minute");
    assert_eq!(created(&actions), Vec::<String>::new());
    let notes = told(&actions, names::event::IMAGE_NOT_ACTIONABLE);
    assert_eq!(notes.len(), 1);
    assert!(notes[0].contains("kubelet requires a pull") && notes[0].contains("other.test/y:1"), "{notes:?}");
}

#[test]
fn a_pull_that_fails_again_wakes_all_that_wait_for_its_image_there() {
    let mut bench = Bench::new();
    for node in ["b", "c"] {
        bench.up(node, vec![image(1, &["r.test/x:1"], true)]);
    }
    let back_off = |pod: &mut WaitingPod| pod.waits[0].reason = "ImagePullBackOff".into();
    for (pod, node) in [("p1", "b"), ("p2", "b"), ("p3", "c")] {
        bench.waits_in("shop", pod, node, "r.test/x:1", back_off);
    }
    assert_eq!(woken(&bench.decide()).len(), 3);
    bench.waits("p1", "b", "r.test/x:1");
    let now: Vec<_> = woken(&bench.decide()).into_iter().map(|(pod, _)| pod).collect();
    assert_eq!(now, ["p1", "p2"], "at once, and not on another node");
    bench.waits_in("shop", "p1", "b", "r.test/x:1", back_off);
    assert_eq!(woken(&bench.decide()).len(), 0);
}

#[test]
fn who_is_not_opted_in_is_left_alone() {
    for (namespace, opted_in) in [("work", true), ("kube-system", true), ("shop", false), ("gone", true)] {
        let mut bench = Bench::new();
        bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
        bench.waits_in(namespace, "p", "b", "r.test/x:1", |pod| pod.opted_in = opted_in);
        assert_eq!(bench.decide(), [], "{namespace} {opted_in}");
    }
    let mut bench = Bench::cold(false);
    for kind in Kind::ALL {
        bench.on(Event::Listed(kind, ["shop", "a", "b"].map(Arc::from).into()));
    }
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.waits("p", "b", "r.test/x:1");
    assert_eq!(bench.decide(), [], "switched off");
    let uid = bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
    assert_eq!(imports(&bench.decide()).len(), 0, "by hand and switched off");
    assert_eq!(bench.reason(&uid), (Phase::Pending, "Disabled".to_owned()));
}

#[test]
fn what_changes_nothing_asks_for_no_decision() {
    let mut bench = Bench::new();
    let now = bench.now;
    let mut news = |event: Event| bench.state.apply(event, now);
    assert!(!news(Event::Pod { uid: "unknown".into(), waiting: None }));
    assert!(!news(Event::Node { name: "a".into(), uid: Some("uid-a".into()) }));
    assert!(news(Event::Node { name: "a".into(), uid: Some("uid-other".into()) }));
    assert!(!news(Event::Namespace { name: "shop".into(), consent: Some(Consent::Given) }));
    assert!(news(Event::Namespace { name: "shop".into(), consent: Some(Consent::NotGiven) }));
}

#[test]
fn nothing_is_decided_before_every_list_is_known() {
    let mut bench = Bench::cold(true);
    bench.on(Event::Fleet(FleetEvent::Expected(["a".into()].into())));
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.waits("p", "b", "r.test/x:1");
    for kind in [Kind::Pods, Kind::Namespaces, Kind::Nodes] {
        let seen = ["uid-p", "shop", "a", "b"].map(Arc::from).into();
        bench.on(Event::Listed(kind, seen));
        assert_eq!(bench.decide(), []);
    }
    bench.on(Event::Listed(Kind::Jobs, HashSet::new()));
    assert_eq!(created(&bench.decide()).len(), 1);
}

#[test]
fn what_cannot_be_had_is_told_once_and_a_copy_makes_a_job_at_once() {
    let mut bench = Bench::new();
    bench.waits("p", "b", "r.test/x:1");
    let actions = bench.decide();
    assert_eq!(told(&actions, names::event::IMAGE_NOT_ACTIONABLE).len(), 1);
    assert_eq!(created(&actions).len(), 0);
    assert_eq!(bench.pass(100), [], "not at every look");
    let delta = FleetEvent::Delta {
        node: "c".into(),
        upserted: vec![image(1, &["r.test/x:1"], true)],
        removed: vec![],
    };
    bench.on(Event::Fleet(delta));
    assert_eq!(imports(&bench.decide()).len(), 1, "by the event alone, no time has passed");
}

#[test]
fn an_ambiguous_tag_is_not_acted_on() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.up("c", vec![image(2, &["r.test/x:1"], true)]);
    bench.waits("p", "b", "r.test/x:1");
    let actions = bench.decide();
    assert_eq!(created(&actions).len(), 0);
    let notes = told(&actions, names::event::IMAGE_NOT_ACTIONABLE);
    assert!(notes[0].contains("different images") && notes[0].len() <= 1024, "{notes:?}");
}

#[test]
fn a_tag_waits_for_agents_that_are_about_to_answer_and_a_digest_does_not() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.on(Event::Fleet(FleetEvent::Down { node: "c".into() }));
    bench.waits("p", "b", "r.test/x:1");
    assert_eq!(created(&bench.decide()).len(), 0, "c may mean something else");
    bench.waits("q", "b", &format!("r.test/x@{}", digest(1)));
    assert_eq!(created(&bench.decide()).len(), 1);
    bench.on(Event::Pod { uid: "uid-q".into(), waiting: None });
    assert_eq!(created(&bench.pass(11)).len(), 1, "c was waited for");
}

#[test]
fn policy_always_is_explained() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.waits_in("shop", "p", "b", "r.test/x:1", |pod| pod.waits[0].policy_always = true);
    let actions = bench.decide();
    assert!(told(&actions, names::event::IMAGE_NOT_ACTIONABLE)[0].contains("imagePullPolicy Always"));
    assert_eq!(created(&actions).len(), 0);
}

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
fn a_second_name_needs_no_source() {
    let mut bench = Bench::new();
    bench.up("b", vec![image(1, &["r.test/x:1"], true)]);
    bench.waits("p", "b", &format!("other.test/y@{}", digest(1)));
    let actions = bench.decide();
    assert_eq!(imports(&actions), [("b".into(), format!("other.test/y@{}", digest(1)), vec![])]);
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
fn a_tag_of_two_meanings_stays_one_while_a_node_is_away() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.up("c", vec![image(2, &["r.test/x:1"], true)]);
    bench.on(Event::Fleet(FleetEvent::Down { node: "c".into() }));
    bench.on(Event::Fleet(FleetEvent::Expected(["a".into()].into())));
    bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
    assert_eq!(imports(&bench.decide()).len(), 0, "the agent on c is away for a moment");
    bench.on(Event::Node { name: "c".into(), uid: None });
    assert_eq!(imports(&bench.decide()).len(), 1, "c is gone");
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
fn thousands_of_waiting_pods_are_decided_over_in_time() {
    const PODS: usize = 3000;
    let mut bench = Bench::new();
    let images = (0..PODS).map(|n| {
        let mut image = image(1, &[&format!("r.test/x:{n}")], true);
        image.target = Digest::sha256(format!("{n}").as_bytes());
        image
    });
    bench.up("a", images.collect());
    for n in 0..PODS {
        bench.waits(&format!("p{n}"), "b", &format!("r.test/x:{n}"));
    }
    assert_eq!(created(&bench.decide()).len(), PODS);
    let began = std::time::Instant::now();
    bench.state.decide(bench.now);
    let took = began.elapsed();
    // Some 0.1 s without optimization; looking at every job for every pod takes a minute.
    assert!(took < std::time::Duration::from_secs(3), "{took:?}");
    println!("{PODS} pods and jobs: {took:?}");
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
fn what_cannot_succeed_fails_at_once_and_the_pod_is_told() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.waits("p", "b", "r.test/x:1");
    bench.decide();
    bench.transfer("job-1", failed(false));
    let actions = bench.decide();
    assert_eq!(bench.reason("job-1"), (Phase::Failed, "NameConflict".into()));
    assert!(told(&actions, names::event::IMAGE_SALVAGE_FAILED)[0].contains("taken"));
    assert_eq!(created(&actions).len(), 0, "not again at once");
    assert_eq!(created(&bench.pass(30)).len(), 0);
    let later = created(&bench.pass(31));
    assert!(later[0].ends_with("-2"), "{later:?}");
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
fn a_pending_job_of_detection_goes_with_its_pods() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.on(Event::Fleet(FleetEvent::Down { node: "b".into() }));
    bench.waits("p", "b", &format!("r.test/x@{}", digest(1)));
    bench.decide();
    assert_eq!(bench.reason("job-1"), (Phase::Pending, "TargetUnavailable".into()));
    assert!(!deleted(&bench.pass(100)));
    bench.on(Event::Pod { uid: "uid-p".into(), waiting: None });
    assert!(!deleted(&bench.pass(5)));
    assert!(deleted(&bench.pass(10)));
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
    assert_eq!(of(&bench), "Resolved=True Imported=False Ready=False Reconciling=True Stalled=False");
    let since = bench.state.jobs["job-1"].0.status.conditions[0].last_transition_time.clone();
    bench.pass(5);
    bench.transfer(&uid, done());
    bench.decide();
    assert_eq!(of(&bench), "Resolved=True Imported=True Ready=True Reconciling=False Stalled=False");
    let status = &bench.state.jobs["job-1"].0.status;
    assert_eq!(status.conditions[0].last_transition_time, since, "nothing changed there");
    assert_eq!(status.conditions[1].last_transition_time.0, bench.now);
}
