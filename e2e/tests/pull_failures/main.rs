//! Every way for an image not to be had that can be caused on a real containerd, and the class that its message gets:
//! through the calls that kubelet makes, on every containerd. Prints version, failure, class and message. Needs root and
//! what `e2e/tools.sh containerd registry` fetches.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::explicit_write, reason = "libtest captures eprintln, but not this")]

mod cri;
mod node;
mod shelf;

use std::net::SocketAddr;

use node::Node;
use rcgen::{CertificateParams, date_time_ymd};
use serde_json::json;
use shelf::{Claim, digest};
use tote_controller::detect::class::Class;
use tote_e2e::images::{Build, BuildIndex, Compression, Entry, Layer, Platform};
use tote_e2e::registry::{Control, Effect, Mode, hosts_toml};
use tote_e2e::tools::Containerd;

#[test]
fn containerd_1_6() {
    all(Containerd::Debian1_6);
}

#[test]
fn containerd_1_7() {
    all(Containerd::V1_7);
}

#[test]
fn containerd_2() {
    all(Containerd::V2);
}

fn all(version: Containerd) {
    let mut node = Node::start(version);
    names(&mut node);
    refusals(&mut node);
    connections(&mut node);
    stalls(&mut node);
    verdicts(&mut node);
    certificates(&mut node);
    bodies(&mut node);
    shapes(&mut node);
    stores(&mut node);
    full(&mut node);
    node.finish();
}

/// What is asked for is not there, or is no name.
fn names(node: &mut Node) {
    node.fails("no reference", Class::InvalidReference, "registry.test/UPPER:1");
    let image = node.image("names");
    let (repository, _) = image.reference.split_once('@').unwrap();
    node.fails("no such tag", Class::NotFound, &format!("{repository}:absent"));
    node.fails("no such digest", Class::NotFound, &format!("{repository}@{}", digest(b"absent")));
    node.rule(&image.layer, Effect::Status(404));
    node.fails("layer lost", Class::BlobMissing, &image.reference);
    let index = node.push("index", |layout| BuildIndex::new([small("index")]).write(layout).unwrap());
    node.rule(&index.manifest, Effect::Status(404));
    node.fails("manifest of the index lost", Class::BlobMissing, &index.reference);
    node.fails("no such host", Class::Dns, "registry.invalid/x:1");
}

/// The registry answers with a status.
fn refusals(node: &mut Node) {
    // 1.6 does not say whether it had a password to show.
    let nobody =
        if node.version() == Containerd::Debian1_6 { Class::BadCredentials } else { Class::NoCredentials };
    for (failure, class, effect) in [
        ("401 without a challenge", Class::BadCredentials, Effect::Status(401)),
        ("401, wants a password", nobody, Effect::AskPassword),
        ("403", Class::Denied, Effect::Status(403)),
        ("429", Class::RateLimited, Effect::Status(429)),
        ("500", Class::RegistryUnavailable, Effect::Status(500)),
        ("502", Class::RegistryUnavailable, Effect::Status(502)),
        ("503", Class::RegistryUnavailable, Effect::Status(503)),
    ] {
        let image = node.image(failure);
        node.rule("", effect);
        node.fails(failure, class, &image.reference);
        node.rule("/blobs/", effect);
        node.fails(&format!("{failure}, for a blob"), class, &image.reference);
    }
    let image = node.image("credentials");
    node.rule("", Effect::AskPassword);
    node.fails_as("wrong password", Class::BadCredentials, &image.reference, ("user", "wrong"));
    for (status, anonymous, known) in [
        (401, Class::NoCredentials, Class::BadCredentials),
        (403, Class::Denied, Class::Denied),
        (503, Class::RegistryUnavailable, Class::RegistryUnavailable),
    ] {
        node.rules(&[("/token", Effect::Status(status)), ("", Effect::AskToken)]);
        node.fails(&format!("no token for nobody: {status}"), anonymous, &image.reference);
        node.rules(&[("/token", Effect::Status(status)), ("", Effect::AskToken)]);
        node.fails_as(&format!("no token: {status}"), known, &image.reference, ("user", "wrong"));
    }
}

/// Nobody answers.
fn connections(node: &mut Node) {
    let image = node.image("connections");
    let (repository, _) = image.reference.split_once('@').unwrap();
    // A digest would be asked for at two paths, and take twice as long.
    let tag = format!("{repository}:1");
    node.registry.mode(Mode::Refusing).unwrap();
    node.fails("closed port", Class::Refused, &tag);
    let address = node.registry.address();
    let usual = node.hosts(&address.to_string(), &brisk(address));
    node.registry.mode(Mode::Dropping).unwrap();
    node.fails("black hole", Class::Timeout, &tag);
    node.hosts(&address.to_string(), &usual);
    // A mirror before a registry, and both down.
    node.registry.mode(Mode::Refusing).unwrap();
    node.hosts("registry.test", &hosts_toml(address));
    node.fails("mirror down", Class::Mirror, "registry.test/x:1");
}

/// As [`hosts_toml`], but 2.x waits 2 s for a connection: its retries would make minutes of 30 s. Those before know no such
/// key.
fn brisk(address: SocketAddr) -> String {
    let dial = "dial_timeout = \"2s\"\n";
    format!("{dial}{}{dial}", hosts_toml(address))
}

/// It begins, and goes no further. 1.6 has no limit to that: such a pull never ends. Nor does one on 2.x if there was not
/// a byte yet.
fn stalls(node: &mut Node) {
    if node.version() == Containerd::Debian1_6 {
        return;
    }
    node.impatient();
    if node.version() == Containerd::V1_7 {
        let image = node.image("no-answer");
        node.registry.mode(Mode::Hanging).unwrap();
        node.fails("no answer", Class::Stalled, &image.reference);
    }
    let image = node.push("stalls", |layout| big().write(layout).unwrap());
    node.rule(&image.layer, Effect::Throttle(1 << 22));
    node.stalls("stalls", Class::Stalled, &image);
}

/// Somebody has said no, on the node. 2.x asks programs; those before do not.
fn verdicts(node: &mut Node) {
    if node.version() == Containerd::V2 {
        let image = node.image("unsigned");
        let program = node.verifier();
        node.fails("verifier says no", Class::Signature, &image.reference);
        std::fs::remove_file(program).unwrap();
    }
}

/// Certificates, and none.
fn certificates(node: &mut Node) {
    let params = |name: &str| CertificateParams::new([name.to_owned()]).unwrap();
    let mut expired = params("127.0.0.1");
    expired.not_after = date_time_ymd(2020, 1, 1);
    for (failure, params, trusted) in [
        ("unknown authority", params("127.0.0.1"), false),
        ("expired", expired, true),
        ("another's certificate", params("other.test"), true),
    ] {
        let (address, pem) = node.shelf.tls(&params);
        let ca = node.ca(&pem);
        let ca = if trusted { format!("ca = \"{}\"\n", ca.display()) } else { String::new() };
        node.hosts(
            &address.to_string(),
            &format!("server = \"https://{address}\"\n[host.\"https://{address}\"]\n{ca}"),
        );
        node.fails(failure, Class::Tls, &format!("{address}/x:1"));
    }
    // 1.6 tries plain HTTP by itself on a loopback address.
    if node.version() != Containerd::Debian1_6 {
        let image = node.image("scheme");
        let address = node.registry.address();
        let plain = node.hosts(&address.to_string(), &format!("server = \"https://{address}\"\n"));
        node.fails("plain HTTP", Class::Scheme, &image.reference);
        node.hosts(&address.to_string(), &plain);
    }
}

/// What comes is not what was to come.
fn bodies(node: &mut Node) {
    let image = node.image("bodies");
    for (failure, class, effect) in [
        ("cut off at once", Class::CutOff, Effect::Cut(0)),
        ("cut off", Class::CutOff, Effect::Cut(1000)),
        ("wrong bytes", Class::CorruptTransfer, Effect::Corrupt),
    ] {
        node.rule(&image.layer, effect);
        node.fails(failure, class, &image.reference);
    }
    let image = node.image("manifests");
    node.rule("/manifests/", Effect::Corrupt);
    node.fails("wrong manifest", Class::CorruptTransfer, &image.reference);
    let tar = node::tar("short");
    let short = Claim { layer: &tar, media_type: node::TAR, size: tar.len() + 512, diff_id: digest(&tar) };
    let short = node.shelf.image("short", &short);
    node.fails("layer shorter than said", Class::CutOff, &short);
}

/// The image itself is at fault.
fn shapes(node: &mut Node) {
    let foreign = if Platform::host().architecture == "arm64" { "amd64" } else { "arm64" };
    let other = || small("foreign").platform(Platform::linux(foreign));
    let index = node.push("foreign-index", |layout| BuildIndex::new([other()]).write(layout).unwrap());
    node.fails("no such platform", Class::WrongPlatform, &index.reference);
    // Before, it is converted.
    if node.version() == Containerd::V2 {
        let old = json!({
            "schemaVersion": 1, "name": "shelf", "tag": "old", "architecture": "amd64",
            "fsLayers": [{"blobSum": digest(b"")}], "history": [{"v1Compatibility": "{\"id\":\"0\"}"}], "signatures": [],
        });
        let old =
            node.shelf.document("old", "application/vnd.docker.distribution.manifest.v1+prettyjws", &old);
        node.fails("schema 1", Class::OldFormat, &old);
    }
    let garbage =
        Claim { layer: b"no tar at all", media_type: node::TAR_GZIP, size: 13, diff_id: digest(b"x") };
    let garbage = node.shelf.image("garbage", &garbage);
    node.fails("layer is no tar", Class::Unpack, &garbage);
    let tar = node::tar("other");
    let wrong = Claim { layer: &tar, media_type: node::TAR, size: tar.len(), diff_id: digest(b"other") };
    let wrong = node.shelf.image("wrong", &wrong);
    node.fails("wrong diff ID", Class::Unpack, &wrong);
}

/// What the node holds is damaged.
fn stores(node: &mut Node) {
    let sandbox = node.cri.sandbox("early");
    node.outcome("no sandbox image", Class::SandboxImage, "FailedCreatePodSandBox", sandbox);
    node.import_pause();
    let sandbox = node.cri.sandbox("pod").unwrap();
    for what in ["manifest", "config"] {
        let image = node.image(&format!("without-{what}"));
        node.pull(&image.reference).unwrap();
        let blob = if what == "config" { &image.config } else { &image.manifest };
        node.remove_blob(blob);
        let made = node.container(&sandbox, what, &image.reference);
        node.outcome(
            &format!("{what} gone from the store"),
            Class::CorruptStore,
            "CreateContainerError",
            made,
        );
        let again = node.pull(&image.reference);
        node.outcome(&format!("{what} gone, pulled again"), Class::CorruptStore, "ErrImagePull", again);
    }
    let image = node.image("without-layer");
    node.fetch_only(&image.reference);
    node.remove_blob(&image.layer);
    let made = node.container(&sandbox, "layer", &image.reference);
    node.outcome("layer gone from the store", Class::CorruptStore, "CreateContainerError", made);
    let again = node.pull(&image.reference);
    node.outcome("layer gone, pulled again", Class::CorruptStore, "ErrImagePull", again);
}

/// No space left.
fn full(node: &mut Node) {
    let image = node.push("full", |layout| big().write(layout).unwrap());
    node.shrink();
    node.fails("disk full", Class::Disk, &image.reference);
}

fn big() -> Build {
    Build::new().layer(Layer::new(Compression::Gzip).with(Entry::random("payload", 8 << 20, "big")))
}

fn small(seed: &str) -> Build {
    Build::new().layer(Layer::new(Compression::Gzip).with(Entry::random("payload", 1 << 18, seed)))
}
