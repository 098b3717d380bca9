use tote_rpc::v1::PullRecords;

use super::*;
use crate::fleet::{Image, Manifest};

fn digest(n: u8) -> Digest {
    Digest::sha256(&[n])
}

/// Nodes `a` to `c`, amd64; each item is (node, target, names, platform's architecture, complete).
fn fleet(items: &[(&str, u8, &str, &str, bool)]) -> Inventory {
    let mut fleet = Inventory::default();
    for node in ["a", "b", "c"] {
        fleet.up(
            &node.into(),
            "127.0.0.1:1".into(),
            Platform::new("linux", "amd64", ""),
            String::new(),
            PullRecords::Kept,
        );
    }
    for (node, target, name, architecture, complete) in items {
        fleet.upsert(
            &(*node).into(),
            Image {
                target: digest(*target),
                names: vec![(*name).into()],
                manifests: vec![Manifest {
                    digest: digest(*target + 100),
                    platform: Platform::new("linux", architecture, ""),
                    complete: *complete,
                    unpacked: false,
                    size: 1 << 20,
                    missing: None,
                    created: 0,
                    image_id: None,
                    pulled: None,
                }],
            },
        );
    }
    fleet
}

fn ask(image: &str, fleet: &Inventory) -> Resolution {
    ask_with(image, fleet, &Meant::new(), TagPolicy::Refuse)
}

fn ask_with(image: &str, fleet: &Inventory, workload: &Meant, tags: TagPolicy) -> Resolution {
    let reference = image.parse().unwrap();
    Question { reference: &reference, pin: None, target: "c", source: None, workload }.resolve(fleet, tags)
}

fn found(n: u8, why: Why, sources: &[&str]) -> Resolution {
    Resolution::Found { digest: digest(n), why, sources: nodes(sources), on_target: false }
}

fn nodes(names: &[&str]) -> Vec<NodeName> {
    names.iter().map(|&n| n.into()).collect()
}

#[test]
fn a_tag_is_what_all_nodes_mean_by_it() {
    let f = fleet(&[
        ("a", 1, "docker.io/library/x:1", "amd64", true),
        ("b", 1, "docker.io/library/x:1", "amd64", true),
    ]);
    assert_eq!(ask("x:1", &f), found(1, Why::Agreed { nodes: 2 }, &["a", "b"]));
}

#[test]
fn nodes_that_disagree_are_named() {
    let f = fleet(&[("a", 1, "r.test/x:1", "amd64", true), ("b", 2, "r.test/x:1", "amd64", true)]);
    let Resolution::Missing(missing) = ask("r.test/x:1", &f) else { panic!("resolved") };
    assert_eq!(missing.reason(), "AmbiguousTag");
    let message = missing.message("r.test/x:1");
    for part in [&format!("{} on a", digest(1)), &format!("{} on b", digest(2)), "different images"] {
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn a_digest_is_found_under_any_name_and_as_an_indexs_manifest() {
    let f = fleet(&[("a", 1, "elsewhere.test/y:9", "amd64", true)]);
    for n in [1, 101] {
        assert_eq!(ask(&format!("r.test/x@{}", digest(n)), &f), found(n, Why::Pinned, &["a"]));
    }
}

#[test]
fn says_why_copies_do_not_help() {
    for (f, reason, says) in [
        (fleet(&[]), "NoSource", "no node"),
        (fleet(&[("a", 1, "r.test/x:1", "amd64", false)]), "IncompleteOnly", "blobs of it are missing"),
        (fleet(&[("a", 1, "r.test/x:1", "arm64", true)]), "OtherPlatformOnly", "another platform"),
    ] {
        let Resolution::Missing(missing) = ask("r.test/x:1", &f) else { panic!("resolved") };
        assert_eq!(missing.reason(), reason);
        assert!(missing.message("r.test/x:1").contains(says), "{}", missing.message("r.test/x:1"));
    }
}

#[test]
fn what_the_target_has_needs_no_source() {
    let f = fleet(&[("c", 1, "r.test/other:1", "amd64", true)]);
    let found = ask(&format!("r.test/x@{}", digest(1)), &f);
    let expected =
        Resolution::Found { digest: digest(1), why: Why::Pinned, sources: vec![], on_target: true };
    assert_eq!(found, expected);
}

#[test]
fn what_stands_unpacked_on_the_target_needs_no_source_and_is_none() {
    let held = |node: &str, architecture: &str, unpacked: bool| {
        let mut fleet = fleet(&[]);
        let manifest = Manifest {
            digest: digest(101),
            platform: Platform::new("linux", architecture, ""),
            complete: false,
            unpacked,
            size: 1 << 20,
            missing: Some([digest(11)].into()),
            created: 0,
            image_id: None,
            pulled: None,
        };
        let names = vec!["r.test/other:1".into()];
        fleet.upsert(&node.into(), Image { target: digest(1), names, manifests: vec![manifest] });
        fleet
    };
    for n in [1, 101] {
        let name = format!("r.test/x@{}", digest(n));
        let (sources, why) = (vec![], Why::Pinned);
        let on_target = Resolution::Found { digest: digest(n), why, sources, on_target: true };
        assert_eq!(ask(&name, &held("c", "amd64", true)), on_target);
        for (node, architecture, unpacked) in
            [("c", "amd64", false), ("c", "arm64", true), ("a", "amd64", true)]
        {
            let found = ask(&name, &held(node, architecture, unpacked));
            assert!(matches!(found, Resolution::Missing(_)), "{node} {architecture} {unpacked}: {found:?}");
        }
        let mut down = held("c", "amd64", true);
        down.set_runtime_down(&"c".into(), true);
        assert!(matches!(ask(&name, &down), Resolution::Missing(_)), "its containerd does not answer");
    }
}

#[test]
fn a_set_source_excludes_the_others() {
    let f = fleet(&[("a", 1, "r.test/x:1", "amd64", true), ("b", 1, "r.test/x:1", "amd64", true)]);
    let reference = "r.test/x:1".parse().unwrap();
    let workload = Meant::new();
    let of = |source| {
        Question { reference: &reference, pin: None, target: "c", source: Some(source), workload: &workload }
            .resolve(&f, TagPolicy::Refuse)
    };
    assert_eq!(of("b"), found(1, Why::Agreed { nodes: 2 }, &["b"]));
    assert_eq!(of("z"), Resolution::Missing(Missing::Nowhere { digest: Some(digest(1)) }));
}

#[test]
fn a_tag_is_what_the_workloads_other_pods_run_though_nodes_disagree() {
    let f = fleet(&[("a", 1, "r.test/x:1", "amd64", true), ("b", 2, "r.test/x:1", "amd64", true)]);
    let ask = |workload: &[(u8, usize)]| {
        let workload = workload.iter().map(|(n, count)| (digest(*n), *count)).collect();
        ask_with("r.test/x:1", &f, &workload, TagPolicy::Refuse)
    };
    assert_eq!(ask(&[(2, 3)]), found(2, Why::Workload { containers: 3 }, &["b"]));
    assert_eq!(ask(&[(9, 1)]), Resolution::Missing(Missing::Nowhere { digest: Some(digest(9)) }));
    let Resolution::Missing(missing) = ask(&[(1, 4), (2, 3)]) else { panic!("resolved") };
    let message = missing.message("r.test/x:1");
    assert_eq!(missing.reason(), "AmbiguousTag");
    for part in [&format!("{} in 4", digest(1)), &format!("{} in 3", digest(2)), "of this workload"] {
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn the_newest_is_taken_by_policy_and_only_if_it_is_known_which() {
    let ask = |created: &[i64], tags, workload: &[u8]| {
        let mut f = fleet(&[]);
        for ((node, n), created) in [("a", 1), ("b", 2), ("c", 3)].into_iter().zip(created) {
            let platform = Platform::new("linux", "amd64", "");
            let manifest = Manifest {
                digest: digest(n + 100),
                platform,
                complete: node != "c",
                unpacked: false,
                size: 1 << 20,
                missing: None,
                created: *created,
                image_id: None,
                pulled: None,
            };
            let image =
                Image { target: digest(n), names: vec!["r.test/x:1".into()], manifests: vec![manifest] };
            f.upsert(&node.into(), image);
        }
        let workload = workload.iter().map(|n| (digest(*n), 1)).collect();
        ask_with("r.test/x:1", &f, &workload, tags)
    };
    let taken = found(2, Why::Newest { of: 3 }, &["b"]);
    assert_eq!(ask(&[100, 300, 200], TagPolicy::Newest, &[]), taken);
    let pair = found(1, Why::Newest { of: 2 }, &["a"]);
    assert_eq!(ask(&[300, 200, 400], TagPolicy::Newest, &[1, 2]), pair, "of those that the workload runs");
    for (created, tags) in [
        ([100, 300, 200], TagPolicy::Refuse),
        ([100, 300, 300], TagPolicy::Newest),
        ([0, 300, 200], TagPolicy::Newest),
        ([0, 0, 0], TagPolicy::Newest),
    ] {
        let Resolution::Missing(missing) = ask(&created, tags, &[]) else { panic!("{created:?}") };
        assert_eq!(missing.reason(), "AmbiguousTag", "{created:?}");
    }
}

#[test]
fn what_is_ambiguous_fits_into_an_event_however_much_there_is_of_it() {
    let long = format!("r.test/{}:1", "x".repeat(240));
    let meanings: BTreeMap<Digest, Vec<NodeName>> = (0..200u8)
        .map(|n| (digest(n), (0..25).map(|m| format!("{}-{n}-{m}", "node".repeat(50)).into()).collect()))
        .collect();
    let containers = meanings.keys().map(|digest| (digest.clone(), usize::MAX)).collect();
    for missing in [Missing::Ambiguous { meanings }, Missing::WorkloadDisagrees { meanings: containers }] {
        for image in [&*long, "x", &"y".repeat(5000)] {
            let message = missing.message(image);
            assert!(message.len() <= text::MAX_NOTE, "{}", message.len());
            assert!(message.ends_with("or make a SalvageJob with it"), "{message}");
            assert!(message.contains("sha256:"), "{message}");
        }
    }
}

#[test]
fn says_why() {
    let words = |why: Why| why.words().unwrap_or_default();
    assert_eq!(words(Why::Pinned), "");
    assert_eq!(
        words(Why::Workload { containers: 3 }),
        "what 3 other containers of this workload run by the tag"
    );
    assert_eq!(words(Why::Agreed { nodes: 1 }), "what the tag means on 1 node");
    assert_eq!(words(Why::Newest { of: 2 }), "the newest of 2 images that the tag means");
}

#[test]
fn what_nodes_hold_between_them_is_found() {
    let lacking = |parts: &[(&str, &[u8])]| {
        let mut fleet = fleet(&[]);
        for (node, missing) in parts {
            let manifest = Manifest {
                digest: digest(101),
                platform: Platform::new("linux", "amd64", ""),
                complete: false,
                unpacked: false,
                size: 1 << 20,
                missing: (!missing.is_empty()).then(|| missing.iter().map(|n| digest(*n)).collect()),
                created: 0,
                image_id: None,
                pulled: None,
            };
            let names = vec!["r.test/x:1".into()];
            fleet.upsert(&(*node).into(), Image { target: digest(1), names, manifests: vec![manifest] });
        }
        ask("r.test/x:1", &fleet)
    };
    let agreed = |nodes| Why::Agreed { nodes };
    assert_eq!(lacking(&[("a", &[11]), ("b", &[12, 13])]), found(1, agreed(2), &["a", "b"]));
    assert_eq!(
        lacking(&[("a", &[11]), ("c", &[12])]),
        found(1, agreed(2), &["a"]),
        "the target has the rest"
    );
    let nodes = nodes(&["a", "b"]);
    let incomplete = Resolution::Missing(Missing::Incomplete { digest: digest(1), nodes });
    assert_eq!(lacking(&[("a", &[11, 12]), ("b", &[12, 13])]), incomplete, "nobody has 12");
    assert_eq!(lacking(&[("a", &[11]), ("b", &[])]), incomplete, "one does not tell what it lacks");
}
