//! Who may have an image: kubelets' records decide before anything moves, and travel along.

use tote_rpc::v1;

use super::*;
use crate::access::Pulled;

/// The image `r.test/x:1`, with a record that names a Secret of each of these namespaces.
fn private(namespaces: &[&str]) -> Image {
    let secret = |namespace: &&str| v1::PullSecret {
        uid: format!("uid-{namespace}"),
        namespace: (*namespace).to_owned(),
        name: "registry-login".to_owned(),
        credential_hash: "h".to_owned(),
    };
    let repository = v1::PulledRepository {
        repository: "r.test/x".to_owned(),
        secrets: namespaces.iter().map(secret).collect(),
        ..v1::PulledRepository::default()
    };
    let mut image = image(1, &["r.test/x:1"], true);
    let record = Pulled::from_wire(&v1::PulledRecord { repositories: vec![repository] });
    image.manifests[0].pulled = Some(Arc::new(record));
    image
}

fn public() -> Image {
    let mut image = image(1, &["r.test/x:1"], true);
    let repository = v1::PulledRepository {
        repository: "r.test/x".to_owned(),
        every_pod: true,
        ..v1::PulledRepository::default()
    };
    let record = Pulled::from_wire(&v1::PulledRecord { repositories: vec![repository] });
    image.manifests[0].pulled = Some(Arc::new(record));
    image
}

/// What the imports among these tell the targets' kubelets.
fn travelled(actions: &[Action]) -> Vec<Option<v1::PulledRepository>> {
    let pulled = |action: &Action| match action {
        Action::Import { pulled, .. } => Some(pulled.clone()),
        _ => None,
    };
    actions.iter().filter_map(pulled).collect()
}

fn condition(bench: &Bench, uid: &str) -> (String, String, String) {
    let status = &bench.state.jobs[uid].0.status;
    let found = status.conditions.iter().find(|c| c.type_ == names::condition::ACCESS_PROVEN).unwrap();
    (found.status.clone(), found.reason.clone(), found.message.clone())
}

#[test]
fn an_image_that_another_namespace_pulled_does_not_move() {
    let mut bench = Bench::new();
    bench.up("a", vec![private(&["work"])]);
    bench.waits("p", "b", "r.test/x:1");
    let by_hand = bench.job("mine", json!({"image": "r.test/x:1", "nodeName": "c"}), false);
    let actions = bench.decide();
    assert_eq!((created(&actions), imports(&actions)), (vec![], vec![]));
    let notes = told(&actions, names::event::IMAGE_NOT_ACTIONABLE);
    assert_eq!(notes.len(), 1);
    let is_cause = |a: &Action| matches!(a, Action::Tell { action: "AccessUnproven", .. });
    assert!(actions.iter().any(is_cause), "{actions:?}");
    assert_eq!(bench.reason(&by_hand), (Phase::Pending, "AccessUnproven".into()));
    let (status, reason, message) = condition(&bench, &by_hand);
    assert_eq!((status.as_str(), reason.as_str()), ("False", "AccessUnproven"));
    for says in [&notes[0], &message, &bench.message(&by_hand)] {
        assert!(
            says.contains("namespace shop") && !says.contains("work") && !says.contains("login"),
            "{says}"
        );
    }

    // A pod of the namespace has pulled it elsewhere: now it may.
    bench.up("c", vec![private(&["shop"])]);
    let actions = bench.decide();
    assert_eq!(created(&actions).len(), 1);
    assert!(imports(&actions).contains(&("b".into(), "r.test/x:1".into(), vec!["a".into(), "c".into()])));
}

#[test]
fn its_record_travels_with_an_image() {
    let mut bench = Bench::new();
    bench.up("a", vec![private(&["shop", "work"])]);
    bench.up("c", vec![public()]);
    bench.waits("p", "b", "r.test/x:1");
    let [Some(record)] = &travelled(&bench.decide())[..] else { panic!("one import, with a record") };
    let who: Vec<&str> = record.secrets.iter().map(|secret| &*secret.namespace).collect();
    assert_eq!((&*record.repository, who), ("r.test/x", vec!["shop", "work"]));
    assert_eq!(condition(&bench, "job-1").1, "Named");
}

#[test]
fn where_no_kubelet_has_a_record_the_opt_ins_decide_and_status_says_so() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.waits("p", "b", "r.test/x:1");
    assert_eq!(travelled(&bench.decide()), [None]);
    let (status, reason, message) = condition(&bench, "job-1");
    assert_eq!((status.as_str(), reason.as_str()), ("Unknown", "Unrecorded"));
    assert!(message.contains("opted in"), "{message}");
    bench.transfer("job-1", done());
    bench.decide();
    assert_eq!(bench.reason("job-1").0, Phase::Imported);
    assert_eq!(condition(&bench, "job-1").1, "Unrecorded", "it stays to be read");
}

#[test]
fn an_image_that_any_pod_may_have_moves_without_a_record() {
    let mut bench = Bench::new();
    bench.up("a", vec![public()]);
    bench.waits("p", "b", "r.test/x:1");
    assert_eq!(travelled(&bench.decide()), [None]);
    assert_eq!(condition(&bench, "job-1").0, "True");
}

#[test]
fn a_restricted_image_goes_only_where_the_record_can_follow() {
    for (records, moves) in [(PullRecords::Unspecified, false), (PullRecords::None, true)] {
        let mut bench = Bench::new();
        bench.up("a", vec![private(&["shop"])]);
        bench.on(Event::Fleet(FleetEvent::Up {
            node: "b".into(),
            address: "b:9090".into(),
            platform: Platform::new("linux", "amd64", ""),
            problem: String::new(),
            records,
            images: vec![],
        }));
        let uid = bench.job("mine", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
        let actions = bench.decide();
        if moves {
            assert_eq!(travelled(&actions), [None]);
            assert!(condition(&bench, &uid).2.contains("keeps no records"), "{:?}", condition(&bench, &uid));
        } else {
            assert_eq!(imports(&actions), []);
            assert_eq!(bench.reason(&uid), (Phase::Pending, "TargetNotUsable".into()));
            assert!(bench.message(&uid).contains("--kubelet-dir"), "{}", bench.message(&uid));
        }
    }
}

#[test]
fn the_policy_may_be_not_to_ask() {
    let mut bench = Bench::new();
    bench.state.policy.access = AccessPolicy::Any;
    bench.state.world.access = AccessPolicy::Any;
    bench.up("a", vec![private(&["work"])]);
    bench.waits("p", "b", "r.test/x:1");
    assert_eq!(travelled(&bench.decide()), [None]);
    assert_eq!(condition(&bench, "job-1").1, "NotAsked");
}

#[test]
fn a_leader_that_has_just_begun_hears_every_agent_before_it_lets_an_image_move() {
    let mut bench = Bench::cold(true);
    bench.list();
    bench.on(Event::Fleet(FleetEvent::Expected(["a".into(), "b".into(), "c".into()].into())));
    bench.up("b", vec![]);
    bench.up("c", vec![image(1, &["r.test/x:1"], true)]);
    let spec = json!({"image": "r.test/x:1", "digest": digest(1).as_str(), "nodeName": "b"});
    let uid = bench.job("mine", spec, false);
    assert_eq!(imports(&bench.decide()), [], "a may have a record");
    bench.up("a", vec![private(&["work"])]);
    assert_eq!(imports(&bench.decide()), []);
    assert_eq!(bench.reason(&uid), (Phase::Pending, "AccessUnproven".into()));
}

#[test]
fn where_the_agent_of_a_holder_does_not_tell_nothing_moves() {
    let mut bench = Bench::new();
    let amd64 = || Platform::new("linux", "amd64", "");
    bench.up_as("a", (amd64(), PullRecords::Unspecified), vec![image(1, &["r.test/x:1"], true)]);
    let uid = bench.job("mine", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
    bench.waits("p", "c", "r.test/x:1");
    let actions = bench.decide();
    assert_eq!((imports(&actions).len(), created(&actions).len()), (0, 0));
    assert_eq!(bench.reason(&uid), (Phase::Pending, "AccessUnproven".into()));
    assert!(bench.message(&uid).contains("does not tell"), "{}", bench.message(&uid));
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    assert_eq!(imports(&bench.decide()).len(), 2, "by now it tells, and nothing restricts it");
}

#[test]
fn of_an_index_the_image_for_the_targets_platform_counts() {
    let of_both = || {
        let mut both = private(&["shop"]);
        let mut other = private(&["work"]).manifests.remove(0);
        (other.digest, other.image_id) = (digest(150), Some(digest(250)));
        other.platform = Platform::new("linux", "arm64", "");
        both.manifests.push(other);
        both
    };
    for (architecture, moves) in [("amd64", 1), ("arm64", 0)] {
        let mut bench = Bench::new();
        bench.up("a", vec![of_both()]);
        bench.up_as("b", (Platform::new("linux", architecture, ""), PullRecords::Kept), vec![]);
        let runs = Runs {
            namespace: "shop".into(),
            controller: None,
            images: vec![("r.test/x:1".into(), digest(1))],
        };
        bench.on(Event::Runs { uid: "uid-runs".into(), runs: Some(Box::new(runs)) });
        bench.job("mine", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
        assert_eq!(
            imports(&bench.decide()).len(),
            moves,
            "{architecture}: a pod that runs the index proves one only"
        );
    }
}

#[test]
fn what_turns_out_to_be_anothers_is_not_brought_to_its_end() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    let uid = bench.job("mine", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
    assert_eq!(imports(&bench.decide()).len(), 1);
    bench.up("c", vec![private(&["work"])]);
    let actions = bench.decide();
    assert!(actions.iter().any(|action| matches!(action, Action::Cancel { .. })), "{actions:?}");
    assert_eq!(bench.reason(&uid), (Phase::Pending, "AccessUnproven".into()));
}
