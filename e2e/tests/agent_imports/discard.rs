//! Where CRI discards layers once they are unpacked: what stands unpacked does not move.

use tote_e2e::containerd::Snapshotter::Overlayfs;
use tote_e2e::cri;
use tote_e2e::daemon::Options;
use tote_e2e::images::{Build, Compression, Entry, Image, Layer, Layout, busybox};
use tote_e2e::tools::Containerd;

use crate::node::{Node, Source, block_on};
use crate::same;

/// A layer of random bytes.
fn layer(name: &str) -> Layer {
    Layer::new(Compression::Gzip).with(Entry::random(name, 1 << 20, name))
}

/// Two layers that all of these have, and one of its own.
fn image(version: Containerd, own: &str) -> Image {
    let layout = Layout::temporary().unwrap();
    let base = busybox(&format!("discard {version}"), Compression::Gzip).unwrap();
    Build::new().layer(base).layer(layer("shared")).layer(layer(own)).write(&layout).unwrap()
}

#[test]
fn what_stands_unpacked_does_not_move_where_layers_are_discarded() {
    let registry = Source::start();
    for version in Containerd::ALL {
        let (before, wanted) = (image(version, "before"), image(version, "wanted"));
        let (first, second) =
            (registry.push_image(&before, "before"), registry.push_image(&wanted, "wanted"));
        let holder = Node::start(Containerd::V2, Overlayfs, None);
        registry.pull(&holder, &second);
        let discarding = Options { discard_unpacked_layers: true, ..Options::new(version) };
        let target = Node::start_with(discarding, None);
        registry.trust(&target);
        block_on(cri::pull(&target.daemon.socket(), &first)).unwrap();
        target.collect();
        let content = target.daemon.ctr(&["content", "ls", "-q"]).unwrap();
        let host = wanted.host().unwrap();
        let (shared, own) = host.layers.split_at(2);
        for layer in shared {
            assert!(!content.contains(&layer.digest), "{version} keeps {}", layer.digest);
        }
        let mut session = block_on(target.session());
        block_on(session.inventory());
        let done = target.import("t", &second, wanted.digest(), &[&holder]).unwrap();
        let bytes: u64 = shared.iter().map(|layer| layer.size).sum();
        assert_eq!(done.reused_bytes, i64::try_from(bytes).unwrap(), "{version}");
        assert_eq!(done.transferred_bytes, done.total_bytes - done.reused_bytes, "{version}");
        block_on(session.until_has(wanted.digest(), |manifest| !manifest.complete && manifest.unpacked));
        // What the other image alone keeps goes with it.
        let names = target.daemon.ctr(&["images", "ls", "-q"]).unwrap();
        let before_id = &before.host().unwrap().config.digest;
        let names: Vec<&str> = names.lines().filter(|name| *name == first || name == before_id).collect();
        assert_eq!(names.len(), 2, "{version}: {names:?}");
        target.daemon.ctr(&[&["images", "rm", "--sync"], &names[..]].concat()).unwrap();
        target.collect();
        target.check_tidy();
        same(&holder.tree(&wanted), &target.tree(&wanted), version.version());
        // containerd makes a container of it, and runs it.
        let said = target
            .daemon
            .ctr(&["run", "--rm", "--net-host", &second, "runs", "/bin/sh", "-c", "ls /"])
            .unwrap();
        assert!(said.contains("wanted"), "{version}: {said}");
        // For whoever asks, it has what it has.
        let third = Node::start(version, Overlayfs, None);
        let failed = third.import("u", &second, wanted.digest(), &[&target]).unwrap_err();
        let names_one = shared.iter().any(|layer| failed.message.contains(&layer.digest));
        assert!(names_one, "{version}: {}", failed.message);
        third.import("u", &second, wanted.digest(), &[&target, &holder]).unwrap();
        third.check_whole(&second, version.version());
        let kept = target.daemon.ctr(&["content", "ls", "-q"]).unwrap();
        assert!(own.iter().all(|layer| kept.contains(&layer.digest)), "{version}: {kept}");
        target.check_kept(&wanted, &second, version.version());
    }
}
