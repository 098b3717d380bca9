//! The images that scenarios use: whole, of digests of their own, and as their names say.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Read;
use tote_e2e::images::*;

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold("sha256:".to_owned(), |mut out, byte| {
        write!(out, "{byte:02x}").unwrap();
        out
    })
}

fn layout() -> Layout {
    Layout::temporary().unwrap()
}

/// Every blob that a descriptor names is there, of the size and digest it says.
fn verify(image: &Image) {
    for blob in image.blobs() {
        let bytes = std::fs::read(image.layout.blob(&blob.digest)).unwrap();
        assert_eq!((digest(&bytes), bytes.len() as u64), (blob.digest.clone(), blob.size), "{blob:?}");
    }
    for platform in &image.platforms {
        let config: Value = document(image, &platform.config);
        assert_eq!(config["rootfs"]["diff_ids"], json!(platform.diff_ids));
        if platform.platform.os == "unknown" {
            continue;
        }
        for (layer, diff_id) in platform.layers.iter().zip(&platform.diff_ids) {
            assert_eq!(&digest(&tar_of(image, layer)), diff_id, "{layer:?}");
        }
    }
}

fn document(image: &Image, descriptor: &Descriptor) -> Value {
    serde_json::from_slice(&std::fs::read(image.layout.blob(&descriptor.digest)).unwrap()).unwrap()
}

fn tar_of(image: &Image, layer: &Descriptor) -> Vec<u8> {
    let file = std::fs::File::open(image.layout.blob(&layer.digest)).unwrap();
    let mut tar = Vec::new();
    if layer.media_type.ends_with("gzip") {
        flate2::read::MultiGzDecoder::new(file).read_to_end(&mut tar).unwrap();
    } else if layer.media_type.ends_with("zstd") {
        zstd::Decoder::new(file).unwrap().read_to_end(&mut tar).unwrap();
    } else {
        std::io::BufReader::new(file).read_to_end(&mut tar).unwrap();
    }
    tar
}

#[test]
fn the_presets_are_whole_and_differ_by_seed_alone() {
    for name in PRESETS.iter().copied().filter(|n| !n.starts_with("debian") && *n != "pause") {
        let layout = layout();
        let one = preset(name, &layout, "one").unwrap();
        verify(&one);
        assert_eq!(one.digest(), preset(name, &layout, "one").unwrap().digest(), "{name}");
        let two = preset(name, &layout, "two").unwrap();
        let shared: Vec<_> = two.needed().unwrap().into_iter().filter(|b| one.blobs().contains(b)).collect();
        // The upper layers of `awkward` hold no seed; their chainIDs differ by the lowest layer.
        assert!(shared.is_empty() || name == "awkward", "{name} shares {shared:?}");
        assert_ne!(one.host().unwrap().diff_ids[0], two.host().unwrap().diff_ids[0], "{name}");
    }
    let error = preset("nonsense", &layout(), "").unwrap_err().to_string();
    assert!(error.contains("two-platforms") && error.contains("random-<MiB>"), "{error}");
}

#[test]
fn sizes_are_what_the_names_say() {
    let layout = layout();
    let tiny = tiny(&layout, "x").unwrap();
    let bytes = tiny.needed_bytes().unwrap();
    assert!((4_500_000..5_800_000).contains(&bytes), "tiny has {bytes} bytes");
    let many = many_layers(&layout, "x").unwrap();
    let host = many.host().unwrap();
    assert_eq!(host.layers.len(), 20);
    assert_eq!(host.layers[4], host.layers[14]);
    assert_eq!(many.needed().unwrap().len(), 19 + 2, "manifest, config and 19 distinct layers");
}

#[test]
fn padding_is_in_the_blob_and_not_in_the_tar() {
    let build = |padding: Option<(u64, &str)>| {
        let layer = Layer::new(Compression::Zstd).with(Entry::file("small", "small"));
        let layer = padding.into_iter().fold(layer, |layer, (bytes, seed)| layer.padded(bytes, seed));
        Build::new().layer(layer).write(&layout()).unwrap()
    };
    let (plain, padded) = (build(None), build(Some((3 << 20, "one"))));
    verify(&padded);
    let layer = |image: &Image| image.host().unwrap().layers[0].clone();
    assert_eq!(layer(&padded).size, layer(&plain).size + 8 + (3 << 20));
    assert_eq!(tar_of(&padded, &layer(&padded)), tar_of(&plain, &layer(&plain)));
    let blob = std::fs::read(padded.layout.blob(&layer(&padded).digest)).unwrap();
    assert!(zstd::bulk::compress(&blob, 3).unwrap().len() > 3 << 20, "it compresses");
    assert_eq!(padded.digest(), build(Some((3 << 20, "one"))).digest());
    assert_ne!(padded.digest(), build(Some((3 << 20, "two"))).digest());
    let other = Layer::new(Compression::Gzip).padded(1, "x");
    assert!(Build::new().layer(other).write(&layout()).is_err());
}

#[test]
fn docker_media_types_are_used_throughout() {
    let image = docker(&layout(), "x").unwrap();
    assert_eq!(image.target.media_type, DOCKER_INDEX);
    let manifest = document(&image, &image.host().unwrap().manifest);
    assert_eq!(manifest["mediaType"], DOCKER_MANIFEST);
    assert_eq!(manifest["config"]["mediaType"], DOCKER_CONFIG);
    assert_eq!(manifest["layers"][0]["mediaType"], "application/vnd.docker.image.rootfs.diff.tar.gzip");
    let zstd = Build::new().media_types(MediaTypes::Docker).layer(Layer::new(Compression::Zstd));
    assert!(zstd.write(&layout()).unwrap_err().to_string().contains("zstd"));
}

#[test]
fn attestations_name_the_manifest_they_speak_of() {
    let image = attested(&layout(), "x").unwrap();
    let index = document(&image, &image.target);
    let manifests = index["manifests"].as_array().unwrap();
    assert_eq!(manifests.len(), 4);
    for (image, attestation) in manifests[..2].iter().zip(&manifests[2..]) {
        assert_eq!(attestation["platform"], json!({"architecture": "unknown", "os": "unknown"}));
        assert_eq!(attestation["annotations"]["vnd.docker.reference.digest"], image["digest"]);
    }
}

#[test]
fn the_awkward_image_keeps_what_the_entries_say() {
    let image = awkward(&layout(), "x").unwrap();
    let tar = tar_of(&image, &image.host().unwrap().layers[0]);
    let mut seen = BTreeMap::new();
    for entry in tar::Archive::new(tar.as_slice()).entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().to_str().unwrap().to_owned();
        let attributes: Vec<(String, Vec<u8>)> = entry
            .pax_extensions()
            .unwrap()
            .into_iter()
            .flatten()
            .map(|e| e.unwrap())
            .map(|e| (e.key().unwrap().to_owned(), e.value_bytes().to_owned()))
            .collect();
        let header = entry.header().clone();
        assert!(seen.insert(path.clone(), (header, attributes)).is_none(), "{path} is there twice");
    }
    let of = |path: &str| {
        let (header, _) = &seen[path];
        (header.mode().unwrap(), header.uid().unwrap(), header.gid().unwrap())
    };
    assert_eq!(of("data/setuid"), (0o4755, 0, 0));
    assert_eq!(of("data/unreadable"), (0, 100_000, 2_000_000));
    assert!(seen["data/one-again"].0.entry_type().is_hard_link());
    assert_eq!(of("data/one-again"), (0o640, 1000, 2000));
    let lost = Layer::new(Compression::None).with(Entry::hardlink("a", "b"));
    let error = Build::new().layer(lost).write(&layout()).unwrap_err().to_string();
    assert!(error.contains("a links to b"), "{error}");
    assert!(seen["data/pipe"].0.entry_type().is_fifo());
    let binary = ("SCHILY.xattr.user.tote.binary".to_owned(), vec![0, 1, 255]);
    assert!(seen["data/attributes"].1.contains(&binary), "{:?}", seen["data/attributes"].1);
    assert_eq!(seen["data/capability"].1[0].1.len(), 20);
}

#[test]
fn an_archive_is_a_function_of_the_image() {
    let dir = tempfile::tempdir().unwrap();
    let paths = ["one.tar", "two.tar"].map(|f| dir.path().join(f));
    for path in &paths {
        let image = tiny(&layout(), "x").unwrap();
        image.write_archive(path, "localhost/tiny:1").unwrap();
    }
    let bytes = paths.map(|p| std::fs::read(p).unwrap());
    assert_eq!(digest(&bytes[0]), digest(&bytes[1]));
    let mut tar = tar::Archive::new(bytes[0].as_slice());
    let mut index = tar.entries().unwrap().nth(1).unwrap().unwrap();
    assert_eq!(index.path().unwrap().to_str(), Some("index.json"));
    let index: Value = serde_json::from_reader(&mut index).unwrap();
    let named = &index["manifests"][0]["annotations"];
    assert_eq!(named["io.containerd.image.name"], "localhost/tiny:1");
}

#[test]
fn the_operators_image_refuses_a_program_that_needs_a_loader() {
    let parts = |agent: &str| Operator {
        controller: "/bin/busybox".into(),
        agent: agent.into(),
        version: "0.1.0".to_owned(),
    };
    let image = operator(&layout(), &parts("/bin/busybox")).unwrap();
    verify(&image);
    assert_eq!(document(&image, &image.host().unwrap().config)["config"]["User"], "65532:65532");
    let error = operator(&layout(), &parts("/bin/ls")).unwrap_err().to_string();
    assert!(error.contains("/bin/ls is not static"), "{error}");
}

/// Slow the first time: it fills the cache.
#[test]
fn the_debian_image_is_large_and_of_its_own_digests() {
    for make in [debian_gzip, debian_zstd] {
        let layout = layout();
        let (one, two) = (make(&layout, "one").unwrap(), make(&layout, "two").unwrap());
        verify(&one);
        assert!(one.needed_bytes().unwrap() >= 100_000_000, "{} bytes", one.needed_bytes().unwrap());
        let (one, two) = (one.host().unwrap(), two.host().unwrap());
        assert!(one.layers.iter().all(|l| !two.layers.contains(l)));
        assert_eq!(one.diff_ids[1..], two.diff_ids[1..]);
        assert_ne!(one.diff_ids[0], two.diff_ids[0]);
    }
}
