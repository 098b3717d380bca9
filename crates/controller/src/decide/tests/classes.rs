//! What becomes of a pod by the class of its failure: salvaged, left alone, repaired, or removed to be pulled anew.

use super::*;
use crate::detect::class::Stance;

fn of_class(bench: &mut Bench, class: Class) {
    bench.waits_in("shop", "p", "b", "r.test/x:1", |pod| {
        pod.waits[0].class = class;
        pod.waits[0].message = "as it says".into();
    });
}

fn removed(actions: &[Action]) -> Vec<(String, Digest)> {
    let removal = |action: &Action| match action {
        Action::RemoveImage { node, digest } => Some((node.to_string(), digest.clone())),
        _ => None,
    };
    actions.iter().filter_map(removal).collect()
}

#[test]
fn each_class_is_salvaged_or_its_remedy_is_told() {
    for class in Class::ALL {
        let mut bench = Bench::new();
        bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
        of_class(&mut bench, class);
        let actions = bench.decide();
        let notes = told(&actions, names::event::IMAGE_NOT_ACTIONABLE);
        if class.stance() == Stance::Salvage {
            assert_eq!((created(&actions).len(), notes.len()), (1, 0), "{class}");
            let said = told(&actions, names::event::IMAGE_SALVAGEABLE);
            assert!(said[0].contains(class.name()) && said[0].contains(class.remedy()), "{said:?}");
        } else {
            assert_eq!((created(&actions).len(), notes.len()), (0, 1), "{class}");
            for part in [class.name(), class.remedy(), "as it says"] {
                assert!(notes[0].contains(part), "{class}: {notes:?}");
            }
            assert_eq!(bench.pass(5), [], "{class}: once");
        }
    }
}

#[test]
fn the_policy_names_classes_to_salvage_and_to_leave_alone() {
    let classes = Classes::new(&[Class::Denied], &[Class::Refused]).unwrap();
    for (class, jobs) in
        [(Class::Denied, 1), (Class::Refused, 0), (Class::BadCredentials, 0), (Class::Timeout, 1)]
    {
        let mut bench = Bench::under(|policy| policy.classes = classes.clone());
        bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
        of_class(&mut bench, class);
        assert_eq!(created(&bench.decide()).len(), jobs, "{class}");
    }
}

#[test]
fn a_failure_that_becomes_another_is_judged_anew() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    of_class(&mut bench, Class::BadCredentials);
    assert_eq!(created(&bench.decide()).len(), 0);
    of_class(&mut bench, Class::Refused);
    assert_eq!(created(&bench.decide()).len(), 1, "now the registry is down");
}

#[test]
fn a_missing_pull_secret_counts_while_kubelet_says_so() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    let says =
        |namespace: &str, at| Event::SecretMissing { namespace: namespace.into(), uid: "uid-p".into(), at };
    bench.on(says("work", bench.now));
    bench.on(says("shop", after(bench.now, 1_000_000)));
    of_class(&mut bench, Class::Refused);
    let notes = told(&bench.decide(), names::event::IMAGE_NOT_ACTIONABLE);
    assert!(notes[0].contains("SecretMissing"), "{notes:?}");
    assert_eq!(created(&bench.pass(601)).len(), 1, "it said so no more, and a time to come is now");
}

#[test]
fn what_another_namespace_says_of_a_pods_secrets_does_not_count() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    for n in 0..2000 {
        let uid: Arc<str> = if n == 0 { "uid-p".into() } else { format!("made-up-{n}").into() };
        bench.on(Event::SecretMissing { namespace: "work".into(), uid, at: bench.now });
    }
    of_class(&mut bench, Class::Refused);
    assert_eq!(created(&bench.decide()).len(), 1);
    bench.on(Event::SecretMissing { namespace: "shop".into(), uid: "uid-q".into(), at: bench.now });
    bench.waits_in("shop", "q", "c", "r.test/x:1", |pod| pod.waits[0].class = Class::Refused);
    assert_eq!(created(&bench.decide()).len(), 0, "its own does, however much the other says");
}

#[test]
fn a_job_that_still_waits_goes_when_its_pod_may_no_longer_have_it() {
    let changes: [(Option<Class>, bool); 3] =
        [(None, true), (Some(Class::Denied), true), (Some(Class::Timeout), false)];
    for (change, goes) in changes {
        let mut bench = Bench::under(|policy| policy.limits.cluster = 0);
        bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
        of_class(&mut bench, Class::Refused);
        assert_eq!(created(&bench.decide()).len(), 1);
        match change {
            Some(class) => of_class(&mut bench, class),
            None => bench.waits_in("shop", "p", "b", "r.test/x:1", |pod| pod.says = Some(false)),
        }
        let mut actions = bench.pass(1);
        actions.extend(bench.pass(30));
        assert_eq!(deleted(&actions), goes, "{:?}", bench.reason("job-1"));
    }
}

#[test]
fn no_job_gives_a_tag_to_a_digest_that_nobody_knows_by_its_repository() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["evil.test/x:1"], true), image(2, &["r.test/x:1"], true)]);
    let spec = |image: &str, n: u8| json!({"image": image, "digest": digest(n).as_str(), "nodeName": "b"});
    let planted = bench.job("planted", spec("r.test/x:2", 1), true);
    let another_tag = bench.job("another-tag", spec("r.test/x:2", 2), false);
    let by_digest = format!("r.test/y@{}", digest(1));
    let pinned = bench.job("pinned", json!({"image": by_digest, "nodeName": "c"}), false);
    bench.decide();
    assert_eq!(bench.reason(&planted), (Phase::Pending, "DigestUnproven".into()));
    assert!(
        bench.message(&planted).contains(&format!("r.test/x@{}", digest(1))),
        "{}",
        bench.message(&planted)
    );
    for uid in [&another_tag, &pinned] {
        assert_eq!(bench.reason(uid).0, Phase::Transferring, "{uid}");
    }
}

#[test]
fn what_is_corrupt_is_said_and_repaired_from_a_peer() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.up("b", vec![image(1, &["r.test/x:1"], false)]);
    of_class(&mut bench, Class::CorruptStore);
    let actions = bench.decide();
    let notes = told(&actions, names::event::IMAGE_CORRUPT);
    assert!(notes.len() == 1 && notes[0].contains("as it says") && notes[0].contains("node b"), "{notes:?}");
    assert!(actions.contains(&Action::Count(Count::Corrupt)));
    assert_eq!(imports(&actions), [("b".into(), "r.test/x:1".into(), vec!["a".into()])]);
}

#[test]
fn what_is_corrupt_and_nowhere_else_is_left_as_it_is_unless_its_registry_answers() {
    for look_up in [false, true] {
        let mut bench = Bench::under(|policy| policy.look_up = look_up);
        bench.up("b", vec![image(1, &["r.test/x:1"], false)]);
        of_class(&mut bench, Class::CorruptStore);
        let actions = bench.decide();
        assert_eq!(removed(&actions), []);
        assert_eq!(told(&actions, names::event::IMAGE_NOT_ACTIONABLE).len(), usize::from(!look_up));
        if !look_up {
            continue;
        }
        let asked = actions.iter().find_map(|action| match action {
            Action::LookUp(question) => Some(question.clone()),
            _ => None,
        });
        let question = asked.expect("the registry is asked");
        assert_eq!(question.reference.digest(), Some(&digest(1)), "for that very digest");
        let answer = |bench: &mut Bench, answer| {
            bench.on(Event::LookedUp { question: Box::new(question.clone()), answer });
            bench.decide()
        };
        let actions = answer(&mut bench, LookupAnswer::Failed("no answer".into()));
        assert_eq!(
            (removed(&actions), told(&actions, names::event::IMAGE_NOT_ACTIONABLE).len()),
            (vec![], 1)
        );
        assert_eq!(removed(&answer(&mut bench, LookupAnswer::Is(digest(2)))), [], "another digest");
        let actions = answer(&mut bench, LookupAnswer::Is(digest(1)));
        assert_eq!(removed(&actions), [("b".to_owned(), digest(1))]);
        assert_eq!(removed(&bench.pass(30)), [], "kubelet is left to pull");
    }
}

#[test]
fn an_answer_that_is_old_removes_nothing() {
    let mut bench = Bench::under(|policy| policy.look_up = true);
    bench.up("b", vec![image(1, &["r.test/x:1"], false)]);
    of_class(&mut bench, Class::CorruptStore);
    let asked = |actions: &[Action]| actions.iter().any(|action| matches!(action, Action::LookUp(_)));
    assert!(asked(&bench.decide()));
    let reference: Reference = "r.test/x:1".parse().unwrap();
    let question =
        Question { namespace: "shop".into(), reference: reference.pinned(digest(1)), pull_secrets: vec![] };
    let answered = |at| Event::LookedUp { question: Box::new(question.clone()), answer: at };
    // Nobody decided for a while after it came.
    bench.on(answered(LookupAnswer::Is(digest(1))));
    bench.now = after(bench.now, 120);
    let actions = bench.decide();
    assert!(removed(&actions).is_empty() && asked(&actions), "asked again: {actions:?}");
}

#[test]
fn what_is_whole_and_still_cannot_be_used_says_what_to_do() {
    let mut bench = Bench::new();
    bench.up("b", vec![image(1, &["r.test/x:1"], true)]);
    of_class(&mut bench, Class::CorruptStore);
    let mut notes = Vec::new();
    for _ in 0..20 {
        notes.extend(told(&bench.pass(2), names::event::IMAGE_NOT_ACTIONABLE));
    }
    assert!(notes.len() == 1 && notes[0].contains("crictl rmi r.test/x:1"), "{notes:?}");
}
