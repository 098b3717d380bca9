//! Pods that wait: jobs asked for, wakes, events.

use super::*;

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
        bench.waits_in(namespace, "p", "b", "r.test/x:1", |pod| pod.says = Some(opted_in));
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
fn a_second_name_needs_no_source() {
    let mut bench = Bench::new();
    bench.up("b", vec![image(1, &["r.test/x:1"], true)]);
    bench.waits("p", "b", &format!("other.test/y@{}", digest(1)));
    let actions = bench.decide();
    assert_eq!(imports(&actions), [("b".into(), format!("other.test/y@{}", digest(1)), vec![])]);
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
fn a_pending_job_of_detection_goes_with_its_pods() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.on(Event::Fleet(FleetEvent::Down { node: "b".into() }));
    bench.waits("p", "b", &format!("r.test/x@{}", digest(1)));
    bench.decide();
    assert!(
        bench.state.jobs.is_empty(),
        "its agent may come back in a moment, and say that the image is there"
    );
    bench.pass(11);
    assert_eq!(bench.reason("job-1"), (Phase::Pending, "TargetUnavailable".into()));
    assert!(!deleted(&bench.pass(100)));
    bench.on(Event::Pod { uid: "uid-p".into(), waiting: None });
    assert!(!deleted(&bench.pass(5)));
    assert!(deleted(&bench.pass(10)));
}

/// What the API server would answer, in the place of [`Bench::decide`]'s yes.
fn asked(bench: &mut Bench) -> Option<NewJob> {
    let actions = bench.state.decide(bench.now).actions;
    actions.into_iter().find_map(|action| match action {
        Action::CreateJob(job) => Some(job),
        _ => None,
    })
}

#[test]
fn a_name_that_somebody_else_took_is_passed_over() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.waits("p", "b", "r.test/x:1");
    let first = asked(&mut bench).unwrap();
    let squatter = bench.job(&first.name, json!({"image": "other.test/y:1", "nodeName": "nowhere"}), false);
    bench.on(Event::Created { base: first.base, answer: CreateAnswer::Taken(first.number) });
    let second = asked(&mut bench).expect("at once");
    assert!(first.name.ends_with("-1") && second.name.ends_with("-2"), "{} {}", first.name, second.name);
    assert_eq!(bench.reason(&squatter).1, "NodeNotFound", "and it is a job like any other");
}

#[test]
fn a_job_that_exists_and_was_not_known_is_not_made_twice() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.waits("p", "b", "r.test/x:1");
    let first = asked(&mut bench).unwrap();
    bench.job(&first.name, json!({"image": "r.test/x:1", "nodeName": "b"}), true);
    bench.on(Event::Created { base: first.base, answer: CreateAnswer::Taken(first.number) });
    assert_eq!(asked(&mut bench), None);
}

#[test]
fn a_refusal_is_told_and_asked_about_ever_more_rarely() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.waits("p", "b", "r.test/x:1");
    let mut times = Vec::new();
    let mut notes = Vec::new();
    let start = bench.now;
    for _ in 0..300 {
        let actions = bench.state.decide(bench.now).actions;
        let told_now = told(&actions, names::event::IMAGE_NOT_ACTIONABLE);
        assert!(times.len() > 1 || told_now.is_empty(), "one refusal may be a moment's: {told_now:?}");
        notes.extend(told(&actions, names::event::IMAGE_NOT_ACTIONABLE));
        for action in actions {
            if let Action::CreateJob(job) = action {
                times.push(bench.now.duration_since(start).as_secs());
                let answer = CreateAnswer::Refused("exceeded quota: jobs".to_owned());
                bench.on(Event::Created { base: job.base, answer });
            }
        }
        bench.now = after(bench.now, 1);
    }
    assert!((7..=11).contains(&times.len()), "{times:?}");
    assert_eq!(notes.len(), 1);
    assert!(notes[0].contains("exceeded quota: jobs") && notes[0].contains("namespace shop"), "{notes:?}");
}

#[test]
fn an_answer_is_waited_for_and_a_counter_beyond_all_bounds_is_passed_by() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.waits("p", "b", "r.test/x:1");
    let first = asked(&mut bench).unwrap();
    bench.now = after(bench.now, 1000);
    assert_eq!(asked(&mut bench), None, "one call at a time, however long it takes");
    bench.job(
        &format!("{}-{}", first.base, u32::MAX),
        json!({"image": "r.test/x:1", "nodeName": "b"}),
        false,
    );
    let uid = "job-1";
    bench.on(Event::Created { base: first.base.clone(), answer: CreateAnswer::Refused("no".into()) });
    bench.decide();
    bench.transfer(uid, failed(false));
    bench.decide();
    bench.now = after(bench.now, 100);
    assert_eq!(asked(&mut bench).unwrap().name, first.name);
}

#[test]
fn an_image_that_its_node_collects_again_is_not_brought_again_and_again() {
    let mut bench = Bench::new();
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    bench.waits("p", "b", "r.test/x:1");
    let mut times = Vec::new();
    let mut jobs = 0;
    for second in 0..3000 {
        let made = created(&bench.decide()).len();
        if made > 0 {
            jobs += made;
            times.push(second);
            bench.transfer(&format!("job-{jobs}"), done());
        }
        bench.now = after(bench.now, 1);
    }
    assert_eq!(times.len(), 6, "{times:?}");
}

#[test]
fn an_image_that_is_removed_right_after_its_import_is_brought_again() {
    let mut bench = Bench::new();
    let name = "r.test/x:1";
    bench.up("a", vec![image(1, &[name], true)]);
    bench.waits("p", "b", name);
    bench.decide();
    bench.transfer("job-1", done());
    assert_eq!(woken(&bench.decide()).len(), 1, "before the inventory shows it");
    let delta = |upserted, removed| Event::Fleet(FleetEvent::Delta { node: "b".into(), upserted, removed });
    bench.on(delta(vec![image(1, &[name], true)], vec![]));
    bench.decide();
    bench.on(delta(vec![], vec![digest(1)]));
    let actions: Vec<_> = (0..20).flat_map(|_| bench.pass(1)).collect();
    assert_eq!(woken(&actions).len(), 0, "it is gone");
    assert_eq!(created(&bench.pass(60)).len(), 1);
}

#[test]
fn what_the_patterns_refuse_is_not_moved_and_says_so() {
    let mut bench = Bench::under(|policy| policy.images.denied = vec!["*/secret".parse().unwrap()]);
    bench.up("a", vec![image(1, &["r.test/secret:1"], true), image(2, &["r.test/open:1"], true)]);
    bench.waits("p", "b", "r.test/secret:1");
    bench.waits("other-name", "b", &format!("r.test/open@{}", digest(1)));
    bench.waits("open", "b", "r.test/open:1");
    let uid = bench.job("by-hand", json!({"image": "r.test/secret:1", "nodeName": "b"}), false);
    let actions = bench.decide();
    assert_eq!(created(&actions).len(), 1, "only the one that is allowed");
    let notes = told(&actions, names::event::IMAGE_NOT_ACTIONABLE);
    assert_eq!(notes.len(), 2, "{notes:?}");
    assert!(notes.iter().all(|note| note.contains("denied by pattern */secret")), "{notes:?}");
    assert_eq!(bench.reason(&uid), (Phase::Pending, "ImageDenied".into()));
    assert_eq!(imports(&actions).len(), 1);
}

#[test]
fn an_image_that_is_too_large_is_said_to_be_and_left_alone() {
    let mut bench = Bench::under(|policy| policy.images.max_size = Some("1Ki".parse().unwrap()));
    bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
    let uid = bench.job("mine", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
    bench.waits("p", "c", "r.test/x:1");
    let actions = bench.decide();
    assert_eq!((imports(&actions).len(), created(&actions).len()), (0, 0));
    assert_eq!(bench.reason(&uid), (Phase::Pending, "ImageTooLarge".into()));
    let notes = told(&actions, names::event::IMAGE_NOT_ACTIONABLE);
    assert!(notes[0].contains("1.0 MiB") && notes[0].contains("config.images.maxSize"), "{notes:?}");
}

/// By its manifest it may be larger than the nodes say.
#[test]
fn an_agent_is_told_how_large_an_image_may_be() {
    for (size, most) in [(Some("2Gi"), 2 << 30), (None, 0)] {
        let mut bench =
            Bench::under(|policy| policy.images.max_size = size.map(|size| size.parse().unwrap()));
        bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
        bench.waits("p", "b", "r.test/x:1");
        let actions = bench.decide();
        let told = actions.iter().find_map(|action| match action {
            Action::Import { max_bytes, .. } => Some(*max_bytes),
            _ => None,
        });
        assert_eq!(told, Some(most), "{size:?}");
    }
}
