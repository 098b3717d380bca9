//! Every test image on every containerd: pulled from the registry, imported from an archive, unpacked and run.
//! Needs root and what `e2e/tools.sh containerd registry` fetches.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use tote_e2e::daemon::{Daemon, Options};
use tote_e2e::images::{
    Build, Compression, Image, Layout, Operator, PRESETS, busybox, operator, preset, tiny,
};
use tote_e2e::registry::{self, Control, Registry, hosts_toml};
use tote_e2e::tools::Containerd;

fn daemon(version: Containerd) -> Daemon {
    Daemon::start(Options::new(version)).unwrap()
}

/// `ctr images check` of one image: "complete" and unpacked.
fn checked(daemon: &Daemon, reference: &str) -> String {
    let filter = format!("name=={reference}");
    let said = daemon.ctr(&["images", "check", "--snapshotter", "overlayfs", &filter]).unwrap();
    let line =
        said.lines().find(|l| l.starts_with(reference)).unwrap_or_else(|| panic!("{reference}: {said}"));
    line.to_owned()
}

#[test]
fn every_image_is_pulled_whole_by_every_containerd() {
    let options = registry::Options { listen: "127.0.0.1:0".parse().unwrap(), name: None, storage: None };
    let registry = Registry::start(&options).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let padded = || {
        let layer = busybox("padded", Compression::Zstd).unwrap().padded(8 << 20, "padded");
        Build::new().layer(layer).write(&Layout::temporary().unwrap()).unwrap()
    };
    let images: Vec<(Image, String)> = PRESETS
        .iter()
        .map(|name| (*name, preset(name, &Layout::temporary().unwrap(), "pulled").unwrap()))
        .chain([("padded", padded())])
        .map(|(name, image)| {
            let reference = runtime.block_on(registry.upstream().push(&image, name, None)).unwrap();
            (image, reference)
        })
        .collect();
    for version in Containerd::ALL {
        let daemon = daemon(version);
        let certs = daemon.certs_d();
        let host = certs.join(registry.upstream().name());
        std::fs::create_dir_all(&host).unwrap();
        std::fs::write(host.join("hosts.toml"), hosts_toml(registry.address())).unwrap();
        for (image, reference) in &images {
            registry.forget().unwrap();
            let certs = certs.to_str().unwrap();
            daemon
                .ctr(&["images", "pull", "--hosts-dir", certs, "--snapshotter", "overlayfs", reference])
                .unwrap();
            let line = checked(&daemon, reference);
            assert!(line.contains("complete") && !line.contains("incomplete"), "{version}: {line}");
            assert!(line.trim_end().ends_with("true"), "{version}: not unpacked: {line}");
            let moved: u64 = registry
                .requests()
                .unwrap()
                .iter()
                .filter(|r| r.method == "GET" && r.path.contains("/blobs/"))
                .map(|r| r.bytes)
                .sum();
            let host = image.host().unwrap();
            let mut blobs: Vec<_> = host.layers.iter().chain([&host.config]).collect();
            blobs.sort_by_key(|b| &b.digest);
            blobs.dedup_by_key(|b| &b.digest);
            // 2.4's ctr fetches the configs of other platforms too.
            let needed: u64 = blobs.iter().map(|b| b.size).sum();
            assert!(
                (needed..needed + 10_000).contains(&moved),
                "{version}: {reference}: {moved} of {needed}"
            );
        }
        let _ = writeln!(std::io::stderr(), "{} images on {version}", images.len());
    }
}

#[test]
fn archives_are_imported_under_their_name_by_every_containerd() {
    let dir = tempfile::tempdir().unwrap();
    let busybox = || "/bin/busybox".into();
    let parts = Operator { controller: busybox(), agent: busybox(), version: "0.1.0".to_owned() };
    let layout = Layout::temporary().unwrap();
    for (image, name) in [
        (tiny(&layout, "imported").unwrap(), "localhost/tiny:1"),
        (operator(&layout, &parts).unwrap(), "localhost/tote:0.1.0"),
        (preset("two-platforms", &layout, "imported").unwrap(), "localhost/two:1"),
    ] {
        let archive = dir.path().join("image.tar");
        image.write_archive(&archive, name).unwrap();
        for version in Containerd::ALL {
            let daemon = daemon(version);
            daemon.ctr(&["images", "import", archive.to_str().unwrap()]).unwrap();
            let line = checked(&daemon, name);
            assert!(line.contains("complete") && !line.contains("incomplete"), "{version}: {line}");
            // CRI adds a record of the config's digest.
            let names = daemon.ctr(&["images", "ls", "-q"]).unwrap();
            assert!(names.lines().all(|l| l == name || l.starts_with("sha256:")), "{version}: {names}");
        }
        assert_eq!(skopeo(&archive, &dir.path().join(name.replace(['/', ':'], "-"))), Ok(()), "{name}");
    }
}

fn skopeo(archive: &Path, to: &Path) -> Result<(), String> {
    for (from, to) in
        [("oci-archive", to.with_extension("oci")), ("docker-archive", to.with_extension("docker"))]
    {
        let output = Command::new("skopeo")
            .arg("copy")
            .arg(format!("{from}:{}", archive.display()))
            .arg(format!("dir:{}", to.display()))
            .output()
            .unwrap();
        if !output.status.success() {
            return Err(format!("{from}: {}", String::from_utf8_lossy(&output.stderr)));
        }
    }
    Ok(())
}
