//! Tags that the nodes do not explain: the registry is asked, if it may be.

use super::*;

/// With look-ups on. The fleet is settled.
fn asking() -> Bench {
    let mut bench = Bench::new();
    bench.state.policy.look_up = true;
    bench
}

/// Nodes `a` and `c` mean different images by `r.test/x:1`, and a pod on `b` waits for it.
fn ambiguous() -> Bench {
    let mut bench = asking();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.up("c", vec![image(2, &["r.test/x:1"], true)]);
    bench.waits("p", "b", "r.test/x:1");
    bench
}

fn asked(actions: &[Action]) -> Vec<Question> {
    let question = |action: &Action| match action {
        Action::LookUp(question) => Some(question.clone()),
        _ => None,
    };
    actions.iter().filter_map(question).collect()
}

/// Decides, has the one question answered, and decides again.
fn after_answer(bench: &mut Bench, answer: LookupAnswer) -> Vec<Action> {
    let actions = bench.decide();
    let [question] = &asked(&actions)[..] else { panic!("{actions:?}") };
    assert_eq!(
        told(&actions, names::event::IMAGE_NOT_ACTIONABLE).len(),
        0,
        "before the answer nothing is said"
    );
    bench.on(Event::LookedUp { question: Box::new(question.clone()), answer });
    bench.decide()
}

#[test]
fn the_registrys_answer_settles_what_an_ambiguous_tag_means() {
    let mut bench = ambiguous();
    let actions = after_answer(&mut bench, LookupAnswer::Is(digest(2)));
    assert_eq!(imports(&actions), [("b".into(), "r.test/x:1".into(), vec!["c".into()])]);
    let notes = told(&actions, names::event::IMAGE_SALVAGEABLE);
    assert!(notes[0].contains("registry's own answer") && notes[0].contains(digest(2).as_str()), "{notes:?}");
    let spec = &bench.state.jobs["job-1"].0.spec;
    assert_eq!(spec.digest.as_deref(), Some(digest(2).as_str()), "the job needs no second answer");
    let later: Vec<_> = (0..100).flat_map(|_| bench.pass(10)).collect();
    assert_eq!(asked(&later), [], "nobody asks while the job is under way");
}

#[test]
fn what_the_registry_knows_and_no_node_holds_is_told_once() {
    for (mut bench, d) in [(ambiguous(), digest(3)), (asking(), digest(1))] {
        bench.waits("p", "b", "r.test/x:1");
        let mut actions = after_answer(&mut bench, LookupAnswer::Is(d.clone()));
        for _ in 0..5 {
            actions.extend(bench.pass(1));
        }
        let notes = told(&actions, names::event::IMAGE_RESOLVED_UNCACHED);
        assert_eq!(notes.len(), 1);
        assert!(notes[0].contains(d.as_str()) && notes[0].contains("no node holds"), "{notes:?}");
        assert_eq!(told(&actions, names::event::IMAGE_NOT_ACTIONABLE).len(), 0);
        assert_eq!(
            actions.iter().filter(|action| **action == Action::Count(Count::NotActionable)).count(),
            1
        );
        assert_eq!(created(&actions).len(), 0);
    }
}

#[test]
fn an_image_that_bears_another_name_on_its_node_is_found_by_the_registrys_answer() {
    let mut bench = asking();
    bench.up("a", vec![image(1, &["mirror.test/x:1"], true)]);
    bench.waits("p", "b", "r.test/x:1");
    let actions = after_answer(&mut bench, LookupAnswer::Is(digest(1)));
    assert_eq!(imports(&actions), [("b".into(), "r.test/x:1".into(), vec!["a".into()])]);
}

#[test]
fn a_registry_that_does_not_tell_leaves_it_as_it_was_and_is_asked_again() {
    for answer in [
        LookupAnswer::Absent("registry r.test has no such image".into()),
        LookupAnswer::Failed("registry r.test did not answer".into()),
    ] {
        let mut bench = ambiguous();
        let actions = after_answer(&mut bench, answer);
        let notes = told(&actions, names::event::IMAGE_NOT_ACTIONABLE);
        assert!(notes[0].contains("different images") && notes[0].contains("registry r.test"), "{notes:?}");
        assert_eq!(created(&actions).len(), 0);
        let again = bench.pass(31);
        let [question] = &asked(&again)[..] else { panic!("{again:?}") };
        bench.on(Event::LookedUp {
            question: Box::new(question.clone()),
            answer: LookupAnswer::Is(digest(1)),
        });
        assert_eq!(imports(&bench.decide()).len(), 1, "at once");
    }
}

#[test]
fn an_old_answer_is_not_acted_on() {
    let mut bench = ambiguous();
    after_answer(&mut bench, LookupAnswer::Is(digest(3)));
    let mut questions = Vec::new();
    for _ in 0..61 {
        for question in asked(&bench.pass(1)) {
            questions.push(question);
        }
    }
    assert_eq!(questions.len(), 1, "some 30 s after the first; its answer is slow");
    bench.up("a", vec![image(1, &["r.test/x:1"], true), image(3, &["r.test/y:1"], true)]);
    assert_eq!(created(&bench.decide()).len(), 0, "the tag may have moved since");
    bench
        .on(Event::LookedUp { question: Box::new(questions.remove(0)), answer: LookupAnswer::Is(digest(3)) });
    assert_eq!(imports(&bench.decide()), [("b".into(), "r.test/x:1".into(), vec!["a".into()])]);

    let mut bench = ambiguous();
    for _ in 0..8 {
        let actions = bench.pass(700);
        let [question] = &asked(&actions)[..] else { panic!("{actions:?}") };
        bench.on(Event::LookedUp {
            question: Box::new(question.clone()),
            answer: LookupAnswer::Is(digest(3)),
        });
        bench.decide();
    }
    bench.pass(100);
    bench.up("a", vec![image(1, &["r.test/x:1"], true), image(3, &["r.test/y:1"], true)]);
    let actions = bench.decide();
    assert_eq!(
        (asked(&actions).len(), created(&actions).len()),
        (1, 0),
        "before its turn, for now it counts"
    );
}

#[test]
fn who_asks_for_the_same_asks_once_and_with_other_secrets_again() {
    let mut bench = ambiguous();
    bench.waits("q", "b", "r.test/x:1");
    bench.waits_in("shop", "s", "b", "r.test/x:1", |pod| pod.pull_secrets = vec!["corp".into()]);
    let questions = asked(&bench.decide());
    let secrets: Vec<_> = questions.iter().map(|question| question.pull_secrets.len()).collect();
    assert_eq!(secrets, [0, 1]);
    assert_eq!(asked(&bench.pass(100)), [], "the answer always comes");
}

#[test]
fn nobody_is_asked_about_what_is_known_or_where_it_is_switched_off() {
    let mut bench = ambiguous();
    bench.state.policy.look_up = false;
    let actions = bench.decide();
    assert_eq!(asked(&actions), []);
    assert_eq!(told(&actions, names::event::IMAGE_NOT_ACTIONABLE).len(), 1);

    let mut bench = asking();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.up("c", vec![image(2, &["r.test/y:1"], false)]);
    bench.waits("p", "b", "r.test/x:1");
    bench.waits("q", "b", "r.test/y:1");
    bench.waits_in("work", "t", "b", "r.test/other:1", |_| {});
    let actions = bench.decide();
    assert_eq!(asked(&actions), []);
    assert_eq!(told(&actions, names::event::IMAGE_NOT_ACTIONABLE).len(), 1);
}

#[test]
fn what_a_registry_said_vouches_for_that_and_for_nothing_else() {
    let mut bench = asking();
    bench.up("a", vec![image(1, &["elsewhere.test/y:9"], true), image(2, &["evil.test/x:1"], true)]);
    bench.waits("p", "b", "r.test/x:1");
    let actions = after_answer(&mut bench, LookupAnswer::Is(digest(1)));
    let name = created(&actions).remove(0);
    assert_eq!(imports(&actions).len(), 1);
    // Whoever makes a job of that very name gets nothing by it.
    bench.on(Event::JobGone { uid: "job-1".into() });
    let planted = json!({"image": "r.test/x:1", "digest": digest(2).as_str(), "nodeName": "c"});
    let planted = bench.job(&name, planted, true);
    let same = json!({"image": "r.test/x:1", "digest": digest(1).as_str(), "nodeName": "c"});
    let same = bench.job("by-hand", same, false);
    bench.decide();
    assert_eq!(bench.reason(&planted), (Phase::Pending, "DigestUnproven".into()));
    assert_eq!(bench.reason(&same).0, Phase::Transferring, "the registry said so");
    bench.on(Event::JobGone { uid: same.as_str().into() });
    bench.pass(3601);
    let later = json!({"image": "r.test/x:1", "digest": digest(1).as_str(), "nodeName": "c"});
    let later = bench.job("later", later, false);
    bench.decide();
    assert_eq!(bench.reason(&later), (Phase::Pending, "DigestUnproven".into()), "not for ever");
}
