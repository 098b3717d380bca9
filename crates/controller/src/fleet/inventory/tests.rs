use tote_rpc::v1;

use super::*;
use crate::access::Pulled;
use crate::fleet::Manifest;

fn digest(n: u8) -> Digest {
    Digest::sha256(&[n])
}

fn image(target: u8, names: &[&str], complete: bool) -> Image {
    Image {
        target: digest(target),
        names: names.iter().map(|&n| n.into()).collect(),
        manifests: vec![Manifest {
            digest: digest(target + 100),
            platform: Platform::new("linux", "amd64", ""),
            complete,
            unpacked: false,
            size: 1 << 20,
            missing: None,
            created: 0,
            image_id: Some(digest(target + 200)),
            pulled: None,
        }],
    }
}

fn fleet(names: &[&str]) -> Inventory {
    let mut inventory = Inventory::default();
    for name in names {
        let platform = Platform::new("linux", "amd64", "");
        inventory.up(&(*name).into(), "10.0.0.1:9090".into(), platform, String::new(), PullRecords::Kept);
    }
    inventory
}

#[test]
fn finds_by_target_and_by_manifest() {
    let mut f = fleet(&["a", "b"]);
    f.upsert(&"a".into(), image(1, &["r/x:1"], true));
    f.upsert(&"b".into(), image(1, &["r/x:1"], false));
    let amd64 = Platform::new("linux", "amd64", "");
    let arm64 = Platform::new("linux", "arm64", "");
    for wanted in [digest(1), digest(101)] {
        let held = f.holders(&wanted, Some(&amd64));
        assert_eq!(held[&NodeName::from("a")], Holder::Complete);
        assert_eq!(held[&NodeName::from("b")], Holder::Incomplete);
        assert_eq!(f.holders(&wanted, Some(&arm64))[&NodeName::from("a")], Holder::OtherPlatform);
    }
    assert_eq!(f.present("a", "r/x:1"), Some(&digest(1)));
    assert_eq!(f.present("b", "r/x:1"), None, "incomplete is not present");
    let mut unpacked = image(1, &["r/x:1"], false);
    unpacked.manifests[0].unpacked = true;
    f.upsert(&"b".into(), unpacked);
    assert_eq!(f.present("b", "r/x:1"), Some(&digest(1)), "unless it stands unpacked");
    assert_eq!(
        f.holders(&digest(1), Some(&amd64))[&NodeName::from("b")],
        Holder::Incomplete,
        "but no source"
    );
}

#[test]
fn forgets_what_went() {
    let mut f = fleet(&["a", "b"]);
    for node in ["a", "b"] {
        f.upsert(&node.into(), image(1, &["r/x:1", "sha256:abc"], true));
    }
    assert_eq!(f.images(), 1, "interned");
    assert_eq!(f.meanings("sha256:abc").count(), 0, "a config ID is no name");
    f.remove(&"a".into(), &digest(1));
    assert_eq!(f.holders(&digest(1), None).len(), 1);
    f.down(&"b".into());
    assert_eq!(f.holders(&digest(1), None).len(), 0);
    assert_eq!(f.meanings("r/x:1").count(), 1, "a node that is away still means it");
    f.forget_all_but(|name| &**name == "b");
    assert_eq!(f.meanings("r/x:1").count(), 1);
    f.forget_all_but(|_| false);
    assert_eq!(f.meanings("r/x:1").count(), 0, "a node that is gone does not");
    assert_eq!((f.images(), f.nodes_up()), (0, 1));
    assert!(f.by_digest.is_empty() && f.by_name.is_empty() && f.away.is_empty() && f.last.is_empty());
}

#[test]
fn remembers_where_an_image_was_while_its_node_does_not_answer() {
    let mut f = fleet(&["a", "b", "c"]);
    f.upsert(&"a".into(), image(1, &["r/x:1"], true));
    f.upsert(&"b".into(), image(1, &["r/x:1"], false));
    f.upsert(&"c".into(), image(1, &["r/x:1"], true));
    assert_eq!(f.away(&digest(1)).len(), 0, "they answer");
    f.down(&"a".into());
    f.down(&"b".into());
    f.set_runtime_down(&"c".into(), true);
    for wanted in [digest(1), digest(101)] {
        assert_eq!(f.holders(&wanted, None).len(), 0);
        assert_eq!(f.away(&wanted), ["a", "c"].map(NodeName::from).into(), "b's was not complete");
    }
    f.set_runtime_down(&"c".into(), false);
    f.up(&"a".into(), String::new(), Platform::new("linux", "amd64", ""), String::new(), PullRecords::Kept);
    assert_eq!((f.away(&digest(1)).len(), f.holders(&digest(1), None).len()), (0, 1));
}

#[test]
fn a_name_that_moved_means_the_new_target_in_either_order() {
    let mut f = fleet(&["a"]);
    let a: NodeName = "a".into();
    f.upsert(&a, image(1, &["r/x:1"], true));
    f.upsert(&a, image(2, &["r/x:1"], true));
    f.remove(&a, &digest(1));
    let meaning: Vec<_> = f.meanings("r/x:1").collect();
    assert_eq!(meaning, vec![(&a, &digest(2))]);
}

#[test]
fn a_node_that_comes_back_means_what_it_says_then() {
    let mut f = fleet(&["a"]);
    f.upsert(&"a".into(), image(1, &["r/x:1"], true));
    f.down(&"a".into());
    let platform = Platform::new("linux", "amd64", "");
    f.up(&"a".into(), String::new(), platform, String::new(), PullRecords::Kept);
    assert_eq!(f.meanings("r/x:1").count(), 0);
}

#[test]
fn a_node_without_a_session_says_nothing() {
    let mut f = fleet(&[]);
    f.upsert(&"a".into(), image(1, &["r/x:1"], true));
    assert_eq!(f.images(), 0);
}

/// All records of an image, under whatever digest.
fn records_of<'a>(f: &'a Inventory, asked: &Digest) -> Vec<&'a Pulled> {
    f.image_ids(asked, None).into_iter().flat_map(|id| f.records(id)).collect()
}

#[test]
fn kubelets_records_are_found_under_whatever_digest_a_node_has_the_image() {
    let record = |namespace: &str| {
        let secret = v1::PullSecret { namespace: namespace.to_owned(), ..v1::PullSecret::default() };
        let repository = v1::PulledRepository { secrets: vec![secret], ..v1::PulledRepository::default() };
        Arc::new(Pulled::from_wire(&v1::PulledRecord { repositories: vec![repository] }))
    };
    let recorded = |target: u8, names: &[&str], record: Option<&Arc<Pulled>>| {
        let mut image = image(target, names, true);
        image.manifests[0].image_id = Some(digest(7));
        image.manifests[0].pulled = record.cloned();
        image
    };
    let (one, other) = (record("shop"), record("work"));
    let mut f = fleet(&["a", "b", "c"]);
    f.upsert(&"a".into(), recorded(1, &["r/x:1"], None));
    assert_eq!(records_of(&f, &digest(1)), Vec::<&Pulled>::new());
    f.upsert(&"b".into(), recorded(2, &["r/y:1"], Some(&one)));
    f.upsert(&"b".into(), recorded(3, &["r/z:1"], Some(&one)));
    f.upsert(&"c".into(), recorded(1, &["r/x:1"], Some(&other)));
    for asked in [digest(1), digest(101), digest(2)] {
        assert_eq!(records_of(&f, &asked), [&*one, &*other], "{asked}");
    }
    assert_eq!(records_of(&f, &digest(9)), Vec::<&Pulled>::new());
    f.remove(&"b".into(), &digest(2));
    assert_eq!(records_of(&f, &digest(1)), [&*one, &*other], "b has it under another digest still");
    f.down(&"b".into());
    assert_eq!(records_of(&f, &digest(1)), [&*one, &*other], "b is away for a moment");
    f.upsert(&"c".into(), recorded(1, &["r/x:1"], None));
    assert_eq!(records_of(&f, &digest(1)), [&*one]);
    f.up(&"b".into(), String::new(), Platform::new("linux", "amd64", ""), String::new(), PullRecords::Kept);
    assert_eq!(records_of(&f, &digest(1)), Vec::<&Pulled>::new(), "b is back and says otherwise");
    f.upsert(&"b".into(), recorded(2, &["r/y:1"], Some(&one)));
    f.down(&"b".into());
    f.forget_all_but(|_| false);
    assert!(f.pulled.is_empty());
}
