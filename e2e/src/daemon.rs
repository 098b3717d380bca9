//! A private containerd: its own root, state and socket in a temporary
//! directory, of any of the versions, CRI and all. Must not know Kubernetes.
//!
//! Made for tests that talk to a real containerd. Any may be killed at any
//! moment: what it left is removed when the next daemon starts.

use std::ffi::CString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::mount::{MountFlags, mount};
use rustix::process::Signal;

use crate::containerd::{Config, Snapshotter, came_up};
use crate::host;
use crate::tools::{self, Containerd};

/// Daemons' directories lie here; socket paths below it are short enough.
const BASE: &str = "/tmp";
/// How the names of their directories begin.
const PREFIX: &str = "tote-containerd.";
/// What a private containerd is to be.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Which containerd.
    pub version: Containerd,
    /// What CRI unpacks with.
    pub snapshotter: Snapshotter,
    /// CRI's `discard_unpacked_layers`.
    pub discard_unpacked_layers: bool,
    /// Its data lies in memory: on a tmpfs of so many bytes.
    pub tmpfs: Option<u64>,
}

impl Options {
    /// The defaults of containerd itself.
    pub fn new(version: Containerd) -> Self {
        Self { version, snapshotter: Snapshotter::default(), discard_unpacked_layers: false, tmpfs: None }
    }

    /// With another snapshotter for CRI.
    #[must_use]
    pub fn snapshotter(self, snapshotter: Snapshotter) -> Self {
        Self { snapshotter, ..self }
    }

    /// With its data on a tmpfs of so many bytes.
    #[must_use]
    pub fn tmpfs(self, bytes: u64) -> Self {
        Self { tmpfs: Some(bytes), ..self }
    }
}

/// A running containerd. Dropped, it is killed and all that it made removed.
#[derive(Debug)]
pub struct Daemon {
    options: Options,
    dir: PathBuf,
    bin: PathBuf,
    process: Option<Child>,
}

impl Daemon {
    /// Starts a containerd on empty directories; returns when CRI answers.
    ///
    /// # Errors
    /// Not root, the version is not built, or it did not come up within 30 s:
    /// the message then has the end of its log.
    pub fn start(options: Options) -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            bail!("a containerd needs root, and so does this test: run it as root");
        }
        let bin = options.version.bin()?;
        sweep()?;
        let dir = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in(BASE)
            .context("making a directory in /tmp")?
            .keep();
        let mut daemon = Self { options, dir, bin, process: None };
        let pid = std::process::id();
        let owner = format!("{pid} {}", host::started(pid).context("reading /proc/self")?);
        fs::write(daemon.dir.join("owner"), owner)?;
        // Only now: a sweep leaves alone what names no owner.
        if let Some(bytes) = options.tmpfs {
            daemon.mount(bytes)?;
        }
        fs::create_dir(daemon.certs_d())?;
        let config = Config {
            version: options.version,
            root: &daemon.root(),
            state: &daemon.state(),
            socket: &daemon.socket(),
            certs_d: &daemon.certs_d(),
            snapshotter: options.snapshotter,
            discard_unpacked_layers: options.discard_unpacked_layers,
        };
        fs::write(daemon.dir.join("config.toml"), config.to_toml())?;
        daemon.spawn()?;
        Ok(daemon)
    }

    fn mount(&self, bytes: u64) -> Result<()> {
        let (at, size) = (self.data(), CString::new(format!("size={bytes},mode=0755"))?);
        fs::create_dir(&at)?;
        mount("tmpfs", &at, "tmpfs", MountFlags::empty(), size.as_c_str())
            .with_context(|| format!("mounting a tmpfs on {}", at.display()))
    }

    /// Which containerd it is.
    pub fn version(&self) -> Containerd {
        self.options.version
    }

    /// What CRI unpacks with.
    pub fn snapshotter(&self) -> Snapshotter {
        self.options.snapshotter
    }

    /// The directory of all that it has.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The gRPC socket, which CRI answers on as well.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("c.sock")
    }

    /// containerd's persistent data; blobs are in
    /// `io.containerd.content.v1.content/blobs` below it.
    pub fn root(&self) -> PathBuf {
        self.data().join("root")
    }

    /// containerd's run-time data.
    pub fn state(&self) -> PathBuf {
        self.data().join("state")
    }

    /// The directory of both.
    fn data(&self) -> PathBuf {
        if self.options.tmpfs.is_some() { self.dir.join("tmpfs") } else { self.dir.clone() }
    }

    /// The directory of registries' `hosts.toml` files.
    pub fn certs_d(&self) -> PathBuf {
        self.dir.join("certs.d")
    }

    /// containerd's log file.
    pub fn log(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// Whether the process runs.
    pub fn running(&self) -> bool {
        self.process.as_ref().is_some_and(|process| host::alive(process.id()))
    }

    /// The configuration that it runs with, defaults and all.
    ///
    /// # Errors
    /// `containerd config dump` failed.
    pub fn configuration(&self) -> Result<String> {
        let mut command = Command::new(self.bin.join("containerd"));
        host::run(command.arg("--config").arg(self.dir.join("config.toml")).args(["config", "dump"]))
    }

    /// Runs its own `ctr` in the namespace `k8s.io`; returns what it printed.
    ///
    /// # Errors
    /// `ctr` failed.
    pub fn ctr(&self, args: &[&str]) -> Result<String> {
        host::run(
            Command::new(self.bin.join("ctr"))
                .arg("--address")
                .arg(self.socket())
                .args(["-n", "k8s.io"])
                .args(args),
        )
    }

    /// Kills it with SIGKILL, as a crash would.
    ///
    /// # Errors
    /// It does not end.
    pub fn kill(&mut self) -> Result<()> {
        self.end(Signal::KILL)
    }

    /// Ends it as an administrator would, with SIGTERM.
    ///
    /// # Errors
    /// It has not ended after 20 s.
    pub fn stop(&mut self) -> Result<()> {
        self.end(Signal::TERM)
    }

    /// Starts it again on what it had; stops it first if it runs.
    ///
    /// # Errors
    /// It does not end, or does not come up.
    pub fn restart(&mut self) -> Result<()> {
        self.stop()?;
        self.spawn()
    }

    fn end(&mut self, signal: Signal) -> Result<()> {
        let Some(mut process) = self.process.take() else { return Ok(()) };
        host::signal(process.id(), signal);
        let ended = host::wait_until("containerd has ended", Duration::from_secs(20), || {
            Ok(process.try_wait().context("waiting for containerd")?.is_some())
        });
        if ended.is_err() {
            self.process = Some(process);
        }
        ended
    }

    fn spawn(&mut self) -> Result<()> {
        let seen = fs::metadata(self.log()).map_or(0, |log| log.len());
        let log = File::options().create(true).append(true).open(self.log())?;
        // In a mount namespace of its own, what it mounts goes when it goes.
        let process = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "--"])
            .arg(self.bin.join("containerd"))
            .arg("--config")
            .arg(self.dir.join("config.toml"))
            .env("PATH", tools::path_with(&[&self.bin]))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting containerd")?;
        let process = self.process.insert(process);
        let (log, pid) = (self.dir.join("log"), process.id());
        let ready = host::wait_until("containerd serves CRI", Duration::from_secs(30), || {
            if !host::alive(pid) {
                bail!("containerd has ended");
            }
            let text = fs::read(&log)?;
            Ok(came_up(text.get(usize::try_from(seen)?..).unwrap_or_default()))
        });
        ready.with_context(|| format!("{}; its log ends so:\n{}", self.options.version, host::tail(&log, 20)))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let killed = self.kill();
        if let Err(error) = killed.and_then(|()| remove(&self.dir)) {
            eprintln!("{} was not removed: {error:#}", self.options.version);
        }
    }
}

/// Removes a daemon's directory, its shims and what they mounted.
fn remove(dir: &Path) -> Result<()> {
    host::kill_all(&host::processes_naming(dir)?)?;
    host::remove_tree(dir)
}

/// Removes what daemons left whose owner was killed.
fn sweep() -> Result<()> {
    for entry in fs::read_dir(BASE).with_context(|| format!("reading {BASE}"))? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        // Without the file, another process is just making it.
        let Ok(owner) = fs::read_to_string(entry.path().join("owner")) else { continue };
        let Some((pid, started)) = owner.split_once(' ') else { continue };
        let now = pid.parse().ok().and_then(host::started);
        if now.as_deref() != Some(started) {
            // Two sweeps at once get in each other's way; what counts is that it is gone.
            remove(&entry.path()).or_else(|error| if entry.path().exists() { Err(error) } else { Ok(()) })?;
        }
    }
    Ok(())
}
