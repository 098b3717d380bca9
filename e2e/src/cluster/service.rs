//! Daemons that outlive the process which starts them: each has a pid file, a
//! log, and is in the cluster's cgroup from its first instruction on.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::Signal;

use super::cgroup::{self, Cgroups};
use crate::{host, tools};

/// A daemon of the cluster, running or not.
#[derive(Clone, Debug)]
pub(super) struct Service {
    /// What it is called in messages, and its files.
    pub(super) name: String,
    /// The directory of pid files and logs.
    pub(super) logs: PathBuf,
    /// The cgroup file systems.
    pub(super) cgroups: Cgroups,
    /// The cgroup it runs in.
    pub(super) cgroup: String,
}

/// Joins the cgroup, writes the pid file, becomes the program.
const LAUNCH: &str = r#"echo $$ >"$1" && echo $$ >"$2.new" && mv "$2.new" "$2" && shift 2 && exec "$@""#;

impl Service {
    /// The file with all that it wrote.
    pub(super) fn log(&self) -> PathBuf {
        self.logs.join(format!("{}.log", self.name))
    }

    fn pid_file(&self) -> PathBuf {
        self.logs.join(format!("{}.pid", self.name))
    }

    /// The process, if it runs.
    pub(super) fn pid(&self) -> Option<u32> {
        let pid = fs::read_to_string(self.pid_file()).ok()?.trim().parse().ok()?;
        (host::alive(pid) && cgroup::holds(&self.cgroup, pid)).then_some(pid)
    }

    /// Starts it, detached from this process, its terminal and its environment
    /// (PATH excepted, which is `path`).
    ///
    /// # Errors
    /// It runs already, or cannot be started.
    pub(super) fn start(&self, path: &str, words: &[String]) -> Result<()> {
        if let Some(pid) = self.pid() {
            bail!("{} runs already (pid {pid})", self.name);
        }
        let pid_file = self.pid_file();
        let _ = fs::remove_file(&pid_file);
        let log = File::options().create(true).append(true).open(self.log()).context("opening its log")?;
        let mut command = Command::new("setsid");
        command
            .args(["--fork", "sh", "-c", LAUNCH, "sh"])
            .arg(self.cgroups.procs_file(&self.cgroup))
            .arg(&pid_file)
            .args(words)
            .env_clear()
            .envs([("PATH", path), ("HOME", "/root")])
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let status = command.status().with_context(|| format!("starting {}", self.name))?;
        if !status.success() {
            bail!("{} could not be started ({status}): {}", self.name, self.last_words());
        }
        host::wait_until(&format!("{} is started", self.name), Duration::from_secs(10), || {
            Ok(pid_file.exists())
        })
        .with_context(|| self.last_words())
    }

    /// The end of its log, for messages.
    pub(super) fn last_words(&self) -> String {
        format!(
            "the log of {} ({}) ends so:\n{}",
            self.name,
            self.log().display(),
            host::tail(&self.log(), 15)
        )
    }

    /// Waits until `ready` answers true.
    ///
    /// # Errors
    /// The service has ended, `ready` failed, or time ran out; with the end of
    /// its log.
    pub(super) fn wait(&self, limit: Duration, mut ready: impl FnMut() -> Result<bool>) -> Result<()> {
        host::wait_until(&format!("{} is ready", self.name), limit, || {
            if self.pid().is_none() {
                bail!("{} has ended", self.name);
            }
            ready()
        })
        .with_context(|| self.last_words())
    }

    /// Sends `signal` and waits for the end; no error if it does not run.
    ///
    /// # Errors
    /// It still runs after 20 s.
    pub(super) fn end(&self, signal: Signal) -> Result<()> {
        let Some(pid) = self.pid() else { return Ok(()) };
        host::signal(pid, signal);
        host::wait_until(&format!("{} (pid {pid}) has ended", self.name), Duration::from_secs(20), || {
            Ok(self.pid().is_none())
        })
    }
}

/// The words of a program and its flags.
pub(super) fn words(program: &std::path::Path, flags: &[String]) -> Vec<String> {
    std::iter::once(program.display().to_string()).chain(flags.iter().cloned()).collect()
}

/// PATH of the control plane.
pub(super) fn plain_path() -> String {
    tools::path_with(&[])
}
