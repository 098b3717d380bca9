//! What is said of nodes themselves.

use super::nodes::{bench, down, runtime};
use super::*;
use crate::nodes::Kubelet;

/// Notes of events about nodes: the node, the reason, the note.
fn of_nodes(actions: &[Action]) -> Vec<(String, String, String)> {
    let tell = |action: &Action| match action {
        Action::Tell { about, reason, note, warning: true, .. } if about.kind == "Node" => {
            assert!(about.namespace.is_empty() && *about.uid == *format!("uid-{}", about.name));
            Some((about.name.to_string(), reason.clone(), note.clone()))
        }
        _ => None,
    };
    actions.iter().filter_map(tell).collect()
}

const PAUSE: &str = "registry.k8s.io/pause:3.10";

fn no_sandbox(bench: &mut Bench, node: &str) -> bool {
    let event = Event::SandboxFailed { node: node.into(), image: PAUSE.into(), at: bench.now };
    bench.state.apply(event, bench.now)
}

#[test]
fn a_sandbox_image_that_is_missing_is_told_on_the_node_once_an_hour() {
    let mut bench = bench();
    bench.up("c", vec![image(7, &[PAUSE], true)]);
    assert!(no_sandbox(&mut bench, "b"));
    let told = of_nodes(&bench.decide());
    let [(node, reason, words)] = &told[..] else { panic!("{told:?}") };
    assert_eq!((node.as_str(), reason.as_str()), ("b", names::event::SANDBOX_IMAGE_MISSING));
    for word in [PAUSE, "It is on c", "nodeName b", "io.cri-containerd.pinned=pinned"] {
        assert!(words.contains(word), "{words}");
    }
    for _ in 0..59 {
        bench.now = after(bench.now, 60);
        assert!(!no_sandbox(&mut bench, "b"), "nothing to decide");
        assert_eq!(of_nodes(&bench.decide()), []);
    }
    bench.now = after(bench.now, 60);
    assert!(no_sandbox(&mut bench, "b"));
    assert_eq!(of_nodes(&bench.decide()).len(), 1, "it lasts");
    assert_eq!(of_nodes(&bench.pass(7200)), [], "it is over");
}

#[test]
fn a_sandbox_image_that_nobody_holds_is_told_too_and_what_is_long_past_is_not() {
    let mut bench = bench();
    let old = after(bench.now, -700);
    bench.on(Event::SandboxFailed { node: "b".into(), image: PAUSE.into(), at: old });
    bench.on(Event::SandboxFailed { node: "unknown".into(), image: PAUSE.into(), at: bench.now });
    assert_eq!(of_nodes(&bench.decide()), []);
    no_sandbox(&mut bench, "b");
    let told = of_nodes(&bench.decide());
    assert!(told.len() == 1 && told[0].2.contains("no node whose agent answers holds"), "{told:?}");
    bench.up("c", vec![image(7, &[PAUSE], true), image(8, &["r.test/other:1"], true)]);
    bench.up("b", vec![image(7, &["r.test/other:1"], true)]);
    bench.now = after(bench.now, 3600);
    no_sandbox(&mut bench, "b");
    let told = of_nodes(&bench.decide());
    assert!(told.len() == 1 && told[0].2.contains("under another name: make a SalvageJob"), "{told:?}");
    // A clock that is ahead does not make it last.
    let ahead = after(bench.now, 86_400);
    bench.on(Event::SandboxFailed {
        node: "c".into(),
        image: "registry.k8s.io/pause:3.11".into(),
        at: ahead,
    });
    assert_eq!(of_nodes(&bench.decide()).len(), 1);
    assert_eq!(of_nodes(&bench.pass(7200)), []);
    for n in 0..5000 {
        let image = format!("r.test/pause:{n}").into();
        bench.on(Event::SandboxFailed { node: "b".into(), image, at: bench.now });
    }
    let told = of_nodes(&bench.decide()).len();
    assert!((1000..=1100).contains(&told), "a bound: {told}");
}

#[test]
fn a_sandbox_image_that_its_node_seems_to_hold_is_told_when_its_agent_has_said_that_it_is_gone() {
    for is_gone in [true, false] {
        let mut bench = bench();
        bench.up("b", vec![image(7, &[PAUSE], true)]);
        bench.up("c", vec![image(7, &[PAUSE], true)]);
        no_sandbox(&mut bench, "b");
        assert_eq!(of_nodes(&bench.decide()), [], "kubelet was quicker than the agent, or it is back");
        if is_gone {
            bench.up("b", vec![]);
        }
        let told = of_nodes(&bench.pass(10));
        assert_eq!(told.len(), usize::from(is_gone), "{told:?}");
        assert!(told.iter().all(|told| told.2.contains("It is on c")), "{told:?}");
        assert_eq!(of_nodes(&bench.pass(60)), [], "once");
    }
}

#[test]
fn a_runtime_that_is_down_is_told_on_the_node_once_for_each_outage() {
    let mut bench = bench();
    runtime(&mut bench, "b", true);
    bench.node("c", |n| (n.kubelet, n.message) = (Kubelet::RuntimeDown, "container runtime is down".into()));
    assert_eq!(of_nodes(&bench.decide()), [], "one that is restarted is back in a moment");
    let told = of_nodes(&bench.pass(10));
    let [(node, reason, words)] = &told[..] else { panic!("{told:?}") };
    assert_eq!((node.as_str(), reason.as_str()), ("b", names::event::RUNTIME_DOWN));
    assert!(
        words.contains("no answer from containerd") && words.contains("salvages elsewhere go on"),
        "{words}"
    );
    down(&mut bench, "c");
    bench.decide();
    let told = of_nodes(&bench.pass(10));
    assert!(told.len() == 1 && told[0].2.contains("kubelet says: container runtime is down"), "{told:?}");
    assert_eq!(of_nodes(&bench.pass(5000)), []);
    runtime(&mut bench, "b", false);
    bench.decide();
    runtime(&mut bench, "b", true);
    bench.decide();
    assert_eq!(of_nodes(&bench.pass(10)).len(), 1, "another outage");
}

#[test]
fn nothing_is_said_of_nodes_while_switched_off() {
    let mut bench = bench();
    bench.state.policy.enabled = false;
    no_sandbox(&mut bench, "b");
    runtime(&mut bench, "b", true);
    bench.decide();
    assert_eq!(of_nodes(&bench.pass(60)), []);
}
