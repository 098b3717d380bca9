//! The images that scenarios use, by name. Each takes a seed that goes, with the image's name, into its lowest layer,
//! so that every digest and every chainID differs between images, tests and runs.

use super::elf::needs_loader;
use super::{Build, BuildIndex, Compression, Entry, Image, Layer, Layout, MediaTypes, Platform, debian};
use crate::tools;
use anyhow::{Context, Result, bail, ensure};

/// Names that [`preset`] knows.
pub const PRESETS: [&str; 9] = [
    "tiny",
    "two-platforms",
    "attested",
    "docker",
    "many-layers",
    "awkward",
    "debian-gzip",
    "debian-zstd",
    "pause",
];

const MIB: u64 = 1 << 20;

/// Builds an image by its name in [`PRESETS`], or `random-<N>` for N MiB that do not compress.
///
/// # Errors
/// If the name is unknown, or as the function of that name.
pub fn preset(name: &str, layout: &Layout, seed: &str) -> Result<Image> {
    match name {
        "tiny" => tiny(layout, seed),
        "two-platforms" => two_platforms(layout, seed),
        "attested" => attested(layout, seed),
        "docker" => docker(layout, seed),
        "many-layers" => many_layers(layout, seed),
        "awkward" => awkward(layout, seed),
        "debian-gzip" => debian_gzip(layout, seed),
        "debian-zstd" => debian_zstd(layout, seed),
        "pause" => pause(layout),
        other => match other.strip_prefix("random-").map(str::parse::<u64>) {
            Some(Ok(mib)) => sized(layout, seed, mib * MIB, 4),
            _ => bail!("no image is called {other:?}: take one of {PRESETS:?} or random-<MiB>"),
        },
    }
}

/// A layer with /bin/busybox, links to the applets that tests use, and the file /seed.
///
/// # Errors
/// If this machine has no static busybox (Debian's package busybox-static).
pub fn busybox(seed: &str, compression: Compression) -> Result<Layer> {
    let path = "/bin/busybox";
    let missing = "a static /bin/busybox is needed: apt-get install busybox-static";
    let program = std::fs::read(path).context(missing)?;
    ensure!(!needs_loader(&program), "{missing} ({path} is dynamic)");
    let applets = ["sh", "sleep", "cat", "ls", "httpd", "wget", "find", "stat", "sha256sum", "true", "env"];
    Ok(Layer::new(compression)
        .with(Entry::file("seed", seed.to_owned()))
        .with(Entry::file("bin/busybox", program).mode(0o755))
        .with_all(applets.iter().map(|a| Entry::symlink(&format!("bin/{a}"), "busybox")))
        .with(Entry::directory("tmp").mode(0o1777))
        .with(Entry::file("etc/passwd", "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")))
}

/// About 5 MB in two layers, OCI media types, gzip, no index.
///
/// # Errors
/// As [`busybox`].
pub fn tiny(layout: &Layout, seed: &str) -> Result<Image> {
    sized(layout, seed, 4 * MIB, 1)
}

/// busybox and so many random bytes in so many layers beside it.
///
/// # Errors
/// As [`busybox`], or if the layers number none.
pub fn sized(layout: &Layout, seed: &str, bytes: u64, layers: u64) -> Result<Image> {
    let seed = &format!("random-{bytes}-{layers} {seed}");
    ensure!(layers > 0, "an image of random bytes needs at least one layer for them");
    let mut build = Build::new().layer(busybox(seed, Compression::Gzip)?);
    for i in 0..layers {
        build = build.layer(random(&format!("payload/{i}"), bytes / layers, seed));
    }
    build.write(layout)
}

fn random(path: &str, bytes: u64, seed: &str) -> Layer {
    Layer::new(Compression::Gzip).with(Entry::random(path, bytes, seed))
}

fn both(seed: &str) -> Result<Vec<Build>> {
    ["amd64", "arm64"]
        .into_iter()
        .map(|arch| {
            let seed = format!("{seed}/{arch}");
            Ok(Build::new()
                .platform(Platform::linux(arch))
                .layer(busybox(&seed, Compression::Gzip)?)
                .layer(random("payload", MIB, &seed)))
        })
        .collect()
}

/// An index of linux/amd64 and linux/arm64, about 2 MB each. A node that pulls it holds one of them.
///
/// # Errors
/// As [`busybox`].
pub fn two_platforms(layout: &Layout, seed: &str) -> Result<Image> {
    let seed = &format!("two-platforms {seed}");
    BuildIndex::new(both(seed)?).write(layout)
}

/// An index of two platforms with an attestation manifest (platform unknown/unknown) for each.
///
/// # Errors
/// As [`busybox`].
pub fn attested(layout: &Layout, seed: &str) -> Result<Image> {
    let seed = &format!("attested {seed}");
    BuildIndex::new(both(seed)?).attested().write(layout)
}

/// A manifest list of one platform, Docker schema 2 media types throughout.
///
/// # Errors
/// As [`busybox`].
pub fn docker(layout: &Layout, seed: &str) -> Result<Image> {
    let seed = &format!("docker {seed}");
    let build = Build::new()
        .media_types(MediaTypes::Docker)
        .layer(busybox(seed, Compression::Gzip)?)
        .layer(random("payload", MIB, seed));
    BuildIndex::new([build]).media_types(MediaTypes::Docker).write(layout)
}

/// 20 layers: the 5th and the 15th are one blob, the rest differ.
///
/// # Errors
/// As [`busybox`].
pub fn many_layers(layout: &Layout, seed: &str) -> Result<Image> {
    let seed = &format!("many-layers {seed}");
    let twice = random("twice", MIB / 4, seed);
    let mut build = Build::new().layer(busybox(seed, Compression::Gzip)?);
    for i in 2..=20 {
        build = build.layer(match i {
            5 | 15 => twice.clone(),
            _ => random(&format!("layers/{i}"), MIB / 8, seed),
        });
    }
    build.write(layout)
}

/// Three layers of what file systems have that a careless copy loses: hard links, dangling and absolute symbolic
/// links, set-user-ID, sticky, owners beyond 65535, extended attributes, a file capability, a named pipe, odd names,
/// long paths, an empty directory, whiteouts, an opaque directory, a directory that a file replaces.
///
/// # Errors
/// As [`busybox`].
pub fn awkward(layout: &Layout, seed: &str) -> Result<Image> {
    let seed = &format!("awkward {seed}");
    // struct vfs_cap_data, revision 2, effective, CAP_NET_BIND_SERVICE permitted (linux/capability.h).
    let capability =
        [0x0200_0001_u32, 1 << 10, 0, 0, 0].iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>();
    let long = format!("data/{}/{}", "d".repeat(120), "f".repeat(200));
    let below = busybox(seed, Compression::Gzip)?.with_all([
        Entry::directory("data").mode(0o750).owner(1000, 2000),
        Entry::file("data/one", "one").mode(0o640).owner(1000, 2000),
        Entry::hardlink("data/one-again", "data/one"),
        Entry::symlink("data/absolute", "/seed"),
        Entry::symlink("data/dangling", "../nowhere/at all"),
        Entry::file("data/setuid", "#!/bin/sh\n").mode(0o4755),
        Entry::file("data/setgid", "#!/bin/sh\n").mode(0o2755).owner(0, 42),
        Entry::file("data/unreadable", "secret").mode(0o000).owner(100_000, 2_000_000),
        Entry::file("data/attributes", "x")
            .xattr("user.tote.one", "1")
            .xattr("user.tote.binary", [0, 1, 255]),
        Entry::file("data/capability", "x").mode(0o755).xattr("security.capability", capability),
        Entry::fifo("data/pipe").mode(0o600),
        Entry::file("data/\u{fc}n\u{ef}c\u{f6}de \u{2713} and spaces", "odd"),
        Entry::file("data/-rf", "odd"),
        Entry::file(&long, "long"),
        Entry::directory("data/empty").mode(0o711),
        Entry::file("data/removed", "gone in the next layer"),
        Entry::directory("data/removed-directory"),
        Entry::file("data/removed-directory/file", "gone too"),
        Entry::directory("data/opaque"),
        Entry::file("data/opaque/below", "hidden by the next layer"),
        Entry::directory("data/becomes-a-file"),
        Entry::file("data/becomes-a-file/inside", "gone"),
        Entry::file("data/becomes-a-directory", "gone"),
        Entry::file("data/changes-mode", "same contents").mode(0o600),
    ]);
    let middle = Layer::new(Compression::Gzip).with_all([
        Entry::directory("data").mode(0o750).owner(1000, 2000),
        Entry::whiteout("data/removed"),
        Entry::whiteout("data/removed-directory"),
        Entry::opaque("data/opaque"),
        Entry::file("data/opaque/above", "the only file here"),
        Entry::file("data/becomes-a-file", "now a file"),
        Entry::directory("data/becomes-a-directory"),
        Entry::file("data/becomes-a-directory/inside", "now a directory"),
        Entry::file("data/changes-mode", "same contents").mode(0o644).owner(7, 8),
    ]);
    let above = Layer::new(Compression::Gzip).with_all([
        Entry::directory("data").mode(0o750).owner(1000, 2000),
        Entry::file("data/removed", "back again"),
        // A link to a file of a lower layer brings the file along: overlayfs applies a layer by itself.
        Entry::file("data/opaque/above", "the only file here"),
        Entry::hardlink("data/above-again", "data/opaque/above"),
    ]);
    Build::new().layer(below).layer(middle).layer(above).write(layout)
}

/// A real Debian root file system (python3, git, nginx, a compiler; more than 100 MB in gzip layers).
///
/// # Errors
/// As [`debian()`].
pub fn debian_gzip(layout: &Layout, seed: &str) -> Result<Image> {
    debian(&tools::cache()?)?.image(layout, Compression::Gzip, &format!("gzip {seed}"))
}

/// The same root file system in zstd layers.
///
/// # Errors
/// As [`debian()`].
pub fn debian_zstd(layout: &Layout, seed: &str) -> Result<Image> {
    debian(&tools::cache()?)?.image(layout, Compression::Zstd, &format!("zstd {seed}"))
}

/// The sandbox image of a test node: one small layer, no seed, so that it is the same on every node and run.
///
/// # Errors
/// As [`busybox`].
pub fn pause(layout: &Layout) -> Result<Image> {
    Build::new().layer(busybox("pause", Compression::Gzip)?).write(layout)
}
