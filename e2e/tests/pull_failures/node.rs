//! A private containerd and its registries, and the book of what failed on it.

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use rustix::mount::{MountFlags, mount};
use tokio::runtime::Runtime;
use tote_controller::detect::class::{Class, Evidence, classify};
use tote_e2e::daemon::{Daemon, Options};
use tote_e2e::host::wait_until;
use tote_e2e::images::{Image, Layout, pause};
use tote_e2e::registry::{self, Control, Effect, Mode, Registry, Rule, hosts_toml};
use tote_e2e::tools::Containerd;

use crate::cri::Cri;
use crate::shelf::Shelf;

/// Media types of layers.
pub const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
pub const TAR_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// A pull that does not end by itself is given up: later than containerd has waited 30 s for a connection to each of two
/// hosts.
const LIMIT: Duration = Duration::from_secs(80);

/// An image in the registry, by the digests of its parts.
pub struct Pushed {
    pub reference: String,
    pub manifest: String,
    pub config: String,
    pub layer: String,
}

/// What came of it all.
struct Line {
    failure: String,
    wanted: Class,
    found: Option<Class>,
    message: String,
}

pub struct Node {
    daemon: Daemon,
    pub cri: Cri,
    pub registry: Registry,
    pub shelf: Shelf,
    runtime: Runtime,
    lines: Vec<Line>,
}

impl Node {
    pub fn start(version: Containerd) -> Self {
        let daemon = Daemon::start(Options::new(version)).unwrap();
        let options = registry::Options { listen: "127.0.0.1:0".parse().unwrap(), name: None, storage: None };
        let registry = Registry::start(&options).unwrap();
        let cri = Cri::new(&daemon.socket());
        let runtime = Runtime::new().unwrap();
        let node = Self { daemon, cri, registry, shelf: Shelf::start(), runtime, lines: Vec::new() };
        for address in [node.registry.address(), node.shelf.address()] {
            node.hosts(&address.to_string(), &hosts_toml(address));
        }
        node
    }

    pub fn version(&self) -> Containerd {
        self.daemon.version()
    }

    fn verifiers(&self) -> PathBuf {
        self.daemon.dir().join("verifiers")
    }

    /// Installs a program that refuses every image, until its file is removed.
    pub fn verifier(&self) -> PathBuf {
        let program = self.verifiers().join("refuse");
        std::fs::create_dir_all(self.verifiers()).unwrap();
        std::fs::write(&program, "#!/bin/sh\necho unsigned\nexit 1\n").unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        program
    }

    /// Starts containerd again with 3 s as the time without progress after which it gives a pull up, and a directory of
    /// its own for what verifies images.
    pub fn impatient(&mut self) {
        let file = self.daemon.dir().join("config.toml");
        let config = std::fs::read_to_string(&file).unwrap();
        // A key of the section that has the snapshotter in 2.x, and of CRI's own before.
        let after = match self.version() {
            Containerd::V2 => "discard_unpacked_layers = false\n",
            _ => "restrict_oom_score_adj = true\n",
        };
        assert!(config.contains(after), "{config}");
        let config = config.replace(after, &format!("{after}image_pull_progress_timeout = \"3s\"\n"));
        let verifiers = self.verifiers();
        let section = "[plugins.\"io.containerd.image-verifier.v1.bindir\"]";
        let config = format!("{config}\n{section}\nbin_dir = \"{}\"\n", verifiers.display());
        std::fs::write(&file, config).unwrap();
        self.daemon.restart().unwrap();
    }

    /// Writes a registry's hosts.toml; returns what it was.
    pub fn hosts(&self, registry: &str, text: &str) -> String {
        let dir = self.daemon.certs_d().join(registry);
        std::fs::create_dir_all(&dir).unwrap();
        let file = dir.join("hosts.toml");
        let before = std::fs::read_to_string(&file).unwrap_or_default();
        std::fs::write(&file, text).unwrap();
        before
    }

    /// A file that holds a certificate.
    pub fn ca(&self, pem: &str) -> PathBuf {
        let file = self.daemon.dir().join("ca.pem");
        std::fs::write(&file, pem).unwrap();
        file
    }

    /// Pushes an image.
    pub fn push(&self, repository: &str, write: impl FnOnce(&Layout) -> Image) -> Pushed {
        let image = write(&Layout::temporary().unwrap());
        let reference =
            self.runtime.block_on(self.registry.upstream().push(&image, repository, None)).unwrap();
        let [platform] = image.platforms.as_slice() else { panic!("{repository} has one platform") };
        Pushed {
            reference,
            manifest: platform.manifest.digest.clone(),
            config: platform.config.digest.clone(),
            layer: platform.layers[0].digest.clone(),
        }
    }

    /// Pushes a small image of its own digests.
    pub fn image(&self, seed: &str) -> Pushed {
        let name = seed.to_lowercase().replace(|c: char| !c.is_ascii_alphanumeric(), "");
        self.push(&name, |layout| crate::small(seed).write(layout).unwrap())
    }

    pub fn rule(&self, path: &str, effect: Effect) {
        self.rules(&[(path, effect)]);
    }

    pub fn rules(&self, rules: &[(&str, Effect)]) {
        self.registry.heal().unwrap();
        let rules: Vec<Rule> =
            rules.iter().map(|(path, effect)| Rule { path: (*path).to_owned(), effect: *effect }).collect();
        self.registry.rules(&rules).unwrap();
    }

    /// Pulls as kubelet does.
    pub fn pull(&self, image: &str) -> Result<String, String> {
        self.cri.pull(image, None, LIMIT)
    }

    /// A pull must fail, and its message be of this class. The registry is sound again afterwards.
    pub fn fails(&mut self, failure: &str, class: Class, image: &str) {
        let outcome = self.pull(image);
        self.pulled(failure, class, image, outcome);
    }

    /// With a user's name and password.
    pub fn fails_as(&mut self, failure: &str, class: Class, image: &str, auth: (&str, &str)) {
        let outcome = self.cri.pull(image, Some(auth), LIMIT);
        self.pulled(failure, class, image, outcome);
    }

    /// The registry hangs once it has sent a part of the layer.
    pub fn stalls(&mut self, failure: &str, class: Class, image: &Pushed) {
        let outcome = std::thread::scope(|scope| {
            let pull = scope.spawn(|| self.pull(&image.reference));
            wait_until("a part of the layer has been sent", Duration::from_secs(20), || {
                Ok(self
                    .registry
                    .requests()?
                    .iter()
                    .any(|request| request.path.contains(&image.layer) && request.bytes > 2 << 20))
            })
            .unwrap();
            self.registry.mode(Mode::Hanging).unwrap();
            pull.join().unwrap()
        });
        self.pulled(failure, class, &image.reference, outcome);
    }

    fn pulled(&mut self, failure: &str, class: Class, image: &str, outcome: Result<String, String>) {
        self.registry.heal().unwrap();
        let host = image.split_once('/').map(|(host, _)| host);
        self.note(failure, class, "ErrImagePull", host, outcome);
    }

    /// Another call must have failed so.
    pub fn outcome(&mut self, failure: &str, class: Class, reason: &str, outcome: Result<String, String>) {
        self.note(failure, class, reason, None, outcome);
    }

    fn note(
        &mut self,
        failure: &str,
        wanted: Class,
        reason: &str,
        registry_host: Option<&str>,
        outcome: Result<String, String>,
    ) {
        let (found, message) = match outcome {
            Ok(_) => (None, "(it went well)".to_owned()),
            Err(message) => {
                let evidence = Evidence { reason, message: &message, last_pull_error: None, registry_host };
                (Some(classify(&evidence)), message)
            }
        };
        let shown = found.map_or("-", Class::name);
        let (version, host) = (self.version().version(), registry_host.unwrap_or("-"));
        // The form of crates/controller/src/detect/class/messages.txt.
        let message = message.trim_end().replace('\n', "\\n");
        writeln!(std::io::stderr(), "{version} | {failure} | {shown} | {reason} | {host} | {message}")
            .unwrap();
        self.lines.push(Line { failure: failure.to_owned(), wanted, found, message });
    }

    /// Fetches an image and does not unpack it.
    pub fn fetch_only(&self, reference: &str) {
        let certs = self.daemon.certs_d();
        let fetch = ["content", "fetch", "--hosts-dir", certs.to_str().unwrap(), reference];
        self.daemon.ctr(&fetch).unwrap();
    }

    /// Makes a container in the sandbox of pod `pod`, once CRI knows the image: it hears of new ones a little later.
    pub fn container(&self, sandbox: &str, name: &str, image: &str) -> Result<String, String> {
        let mut outcome = Err(String::new());
        wait_until("CRI knows the image", Duration::from_secs(10), || {
            outcome = self.cri.container(sandbox, "pod", name, image);
            Ok(!matches!(&outcome, Err(message) if message.contains("failed to resolve image")))
        })
        .unwrap();
        outcome
    }

    /// Removes a blob's file behind containerd's back.
    pub fn remove_blob(&self, digest: &str) {
        let blobs = self.daemon.root().join("io.containerd.content.v1.content/blobs/sha256");
        std::fs::remove_file(blobs.join(digest.trim_start_matches("sha256:"))).unwrap();
    }

    pub fn import_pause(&self) {
        let archive = self.daemon.dir().join("pause.tar");
        let image = pause(&Layout::temporary().unwrap()).unwrap();
        image.write_archive(&archive, tote_e2e::containerd::PAUSE).unwrap();
        self.daemon.ctr(&["images", "import", archive.to_str().unwrap()]).unwrap();
    }

    /// Starts containerd again on an empty file system of 4 MiB.
    pub fn shrink(&mut self) {
        self.daemon.stop().unwrap();
        let size = c"size=4m";
        mount("tmpfs", self.daemon.root(), "tmpfs", MountFlags::empty(), size).unwrap();
        self.daemon.restart().unwrap();
    }

    /// Fails if anything was not as it was to be.
    pub fn finish(self) {
        let version = self.daemon.version();
        let wrong: Vec<String> = self
            .lines
            .iter()
            .filter(|line| line.found != Some(line.wanted))
            .map(|line| {
                let found = line.found.map_or("-", Class::name);
                format!("{}: {found}, not {}: {}", line.failure, line.wanted, line.message)
            })
            .collect();
        assert!(wrong.is_empty(), "{version}:\n{}", wrong.join("\n"));
    }
}

/// A tar of one small file.
pub fn tar(name: &str) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    header.set_mode(0o644);
    tar.append_data(&mut header, name, std::io::empty()).unwrap();
    tar.into_inner().unwrap()
}
