//! Images from agent to agent, on real containerds of every version: whole, kept, nothing left behind,
//! whatever is killed on the way. Needs root and what `e2e/tools.sh containerd registry` fetches.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod discard;
mod faults;
mod full;
mod node;
mod stream;
mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tote_e2e::containerd::Snapshotter;
use tote_e2e::images::Layout;
use tote_e2e::images::{PRESETS, preset};
use tote_e2e::tools::Containerd;
use tote_rpc::identity::Role;
use tote_rpc::v1::Cause;

use node::{Node, PKI, Source, block_on};

/// Each version as source and as target, every kind of image, both snapshotters.
#[test]
fn every_image_arrives_whole_on_every_containerd() {
    let source = Source::start();
    let images: Vec<_> = PRESETS.iter().filter(|name| **name != "pause").collect();
    let images: Vec<_> = images.into_iter().map(|name| (*name, source.push(name, "whole"))).collect();
    let [oldest, middle, newest] = Containerd::ALL;
    for (from, to) in [(oldest, newest), (newest, middle), (middle, oldest)] {
        let holder = Node::start(from, Snapshotter::Overlayfs, None);
        for (_, (_, reference)) in &images {
            source.pull(&holder, reference);
        }
        for snapshotter in [Snapshotter::Overlayfs, Snapshotter::Native] {
            let target = Node::start(to, snapshotter, None);
            for (name, (image, reference)) in &images {
                if name.starts_with("debian") && snapshotter == Snapshotter::Native {
                    continue;
                }
                let started = Instant::now();
                let done = target.import("t", reference, image.digest(), &[&holder]).unwrap();
                let took = started.elapsed();
                let what = format!("{name} from {from} to {to} with {snapshotter}");
                let _ = writeln!(std::io::stderr(), "{what}: {} bytes in {took:?}", done.total_bytes);
                let host = image.host().unwrap();
                assert_eq!(done.image_id, host.config.digest, "{what}");
                assert_eq!(done.transferred_bytes + done.reused_bytes, done.total_bytes, "{what}");
                assert!(done.reused_bytes == 0, "{what}: {} bytes were there", done.reused_bytes);
                target.check_whole(reference, &what);
                let tree = target.tree(image);
                target.check_kept(image, reference, &what);
                if snapshotter == Snapshotter::Overlayfs {
                    same(&holder.tree(image), &tree, &what);
                } else {
                    // It keeps less of hard links and the like; as much as with containerd's own pull is asked.
                    source.pull(&target, reference);
                    same(&target.tree(image), &tree, &what);
                    target.remove_all();
                }
            }
        }
    }
}

/// Fails with the entries in which two root file systems differ.
fn same(wanted: &BTreeMap<String, String>, found: &BTreeMap<String, String>, what: &str) {
    let paths: BTreeSet<&String> = wanted.keys().chain(found.keys()).collect();
    let differ = paths.into_iter().filter(|path| wanted.get(*path) != found.get(*path));
    let differ: Vec<_> = differ.map(|path| (path, wanted.get(path), found.get(path))).collect();
    assert!(differ.is_empty(), "{what}: root file systems differ: {differ:#?}");
}

#[test]
fn a_second_name_moves_nothing() {
    let source = Source::start();
    let (image, reference) = source.push("two-platforms", "second");
    for version in Containerd::ALL {
        let target = Node::start(version, Snapshotter::Overlayfs, None);
        source.pull(&target, &reference);
        let second = "registry.test/second/name:1";
        let done = target.import("t", second, image.digest(), &[]).unwrap();
        assert_eq!(done.transferred_bytes, 0, "{version}");
        target.check_whole(second, version.version());
        // What stands for one image cannot stand for another.
        let (other, _) = source.push("tiny", "conflict");
        let failed = target.import("u", second, other.digest(), &[]).unwrap_err();
        assert_eq!(failed.cause(), Cause::NameConflict, "{version}: {}", failed.message);
        target.check_tidy();
    }
}

/// A job within 2 s of a node having an image needs the inventory well before.
#[test]
fn a_session_tells_of_an_image_at_once() {
    let source = Source::start();
    for version in Containerd::ALL {
        let node = Node::start(version, Snapshotter::Overlayfs, None);
        let (image, reference) = source.push("tiny", &format!("told-{version}"));
        let took = block_on(async {
            let mut session = node.session().await;
            let (welcome, before) = session.inventory().await;
            assert!(welcome.containerd_version.starts_with(version.version()), "{welcome:?}");
            assert_eq!((welcome.snapshotter.as_str(), welcome.problem.as_str()), ("overlayfs", ""));
            assert!(before.is_empty(), "{before:?}");
            let pulled = tokio::task::block_in_place(|| {
                source.pull(&node, &reference);
                Instant::now()
            });
            session.until_has(image.digest(), |manifest| manifest.complete).await;
            pulled.elapsed()
        });
        assert!(took < Duration::from_millis(500), "{version}: {took:?} after the pull");
        let _ = writeln!(std::io::stderr(), "{version}: told {took:?} after the pull");
    }
}

/// Writes a certificate for a node and what else a client of a registry needs to show it.
fn files_of(node: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let files = PKI.files(&Role::Node(node.into()), None);
    for (name, text) in
        [("client.cert", &files.certificate), ("client.key", &files.key), ("ca.crt", &files.authority)]
    {
        std::fs::write(directory.path().join(name), text).unwrap();
    }
    directory
}

/// A client that is not ours: skopeo takes an image from an agent by digest, if it was granted to the node whose
/// certificate it shows.
#[test]
fn skopeo_pulls_from_an_agent() {
    let source = Source::start();
    let files = files_of("skopeo");
    let pull = |node: &Node, digest: &str, to: &Path, certificates: &Path| {
        let output = Command::new("skopeo")
            .args(["copy", "--src-cert-dir", certificates.to_str().unwrap()])
            .arg(format!("docker://{}/some/name@{digest}", node.address()))
            .arg(format!("dir:{}", to.display()))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok(()) } else { Err(said) }
    };
    for version in Containerd::ALL {
        let node = Node::start(version, Snapshotter::Overlayfs, None);
        for name in ["tiny", "docker", "many-layers", "debian-zstd"] {
            let (image, reference) = source.push(name, "skopeo");
            source.pull(&node, &reference);
            let to = tempfile::tempdir().unwrap();
            let refused = pull(&node, image.digest(), to.path(), files.path()).unwrap_err();
            assert!(refused.contains("denied"), "{name} of {version}: {refused}");
            block_on(node.grant("for-skopeo", "skopeo", image.digest()));
            pull(&node, image.digest(), to.path(), files.path()).unwrap();
            let host = image.host().unwrap();
            for layer in &host.layers {
                let (_, hex) = layer.digest.split_once(':').unwrap();
                assert_eq!(std::fs::metadata(to.path().join(hex)).unwrap().len(), layer.size, "{name}");
            }
            // Another node's certificate does not do.
            let other = files_of("another");
            let refused = pull(&node, image.digest(), to.path(), other.path()).unwrap_err();
            assert!(refused.contains("denied"), "{name} of {version}: {refused}");
        }
        node.check_tidy();
    }
}

/// Nor is containerd's own pull: by `client` and `ca` of its hosts.toml.
#[test]
fn containerd_pulls_from_an_agent() {
    let source = Source::start();
    let files = files_of("containerd");
    let path = |name: &str| files.path().join(name).display().to_string();
    for version in Containerd::ALL {
        let holder = Node::start(version, Snapshotter::Overlayfs, None);
        let (image, reference) = source.push("two-platforms", "by-containerd");
        source.pull(&holder, &reference);
        let node = Node::start(version, Snapshotter::Overlayfs, None);
        let certs = node.daemon.certs_d();
        let host = certs.join("granted.test");
        std::fs::create_dir_all(&host).unwrap();
        let server = format!("https://{}", holder.address());
        let hosts = format!(
            "server = \"{server}\"\n[host.\"{server}\"]\n  capabilities = [\"pull\", \"resolve\"]\n  \
             ca = \"{}\"\n  client = [[\"{}\", \"{}\"]]\n",
            path("ca.crt"),
            path("client.cert"),
            path("client.key")
        );
        std::fs::write(host.join("hosts.toml"), hosts).unwrap();
        let granted = format!("granted.test/some/name@{}", image.digest());
        let mut pull = vec!["images", "pull", "--hosts-dir", certs.to_str().unwrap()];
        if version == Containerd::V2 {
            pull.push("--local");
        }
        pull.push(&granted);
        assert!(node.daemon.ctr(&pull).is_err(), "{version}: without a grant");
        block_on(holder.grant("for-containerd", "containerd", image.digest()));
        node.daemon.ctr(&pull).unwrap();
        node.check_whole(&granted, version.version());
    }
}

/// The records and content are there; only what the target needs was asked for.
#[test]
fn an_image_for_another_platform_is_refused() {
    let source = Source::start();
    let image = preset("two-platforms", &Layout::temporary().unwrap(), "arm").unwrap();
    let arm = image.platforms.iter().find(|platform| platform.platform.architecture == "arm64").unwrap();
    let node = Node::start(Containerd::V2, Snapshotter::Overlayfs, None);
    let holder = Node::start(Containerd::V1_7, Snapshotter::Overlayfs, None);
    let reference = source.push_image(&image, "arm");
    let certs = holder.daemon.certs_d();
    source.trust(&holder);
    let digest = arm.manifest.digest.clone();
    let repository = reference.split('@').next().unwrap();
    let by_manifest = format!("{repository}@{digest}");
    let pull = ["images", "pull", "--platform", "linux/arm64", "--hosts-dir", certs.to_str().unwrap()];
    holder.daemon.ctr(&[&pull[..], &[&by_manifest]].concat()).unwrap();
    let failed = node.import("t", &by_manifest, &digest, &[&holder]).unwrap_err();
    assert_eq!((failed.cause(), failed.retryable), (Cause::Platform, false));
    assert!(failed.message.contains("linux/arm64"), "{}", failed.message);
    node.check_nothing();
}
