//! One branch of the machine's cgroups for each cluster: whatever it starts,
//! the containers of its pods included, is in there, so that it can be found
//! and ended even if the process that made it was killed. Both cgroup versions.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::Signal;

use crate::host;

/// The cgroup file systems of the machine.
#[derive(Clone, Debug)]
pub(super) struct Cgroups {
    /// Every mount of a hierarchy.
    mounts: Vec<PathBuf>,
    /// The hierarchy that processes are found by.
    tracking: PathBuf,
    /// Whether it is the unified hierarchy.
    v2: bool,
}

/// Controllers that kubelet does not start without, on v2.
const NEEDED: [&str; 4] = ["cpu", "cpuset", "memory", "pids"];

impl Cgroups {
    /// # Errors
    /// No usable hierarchy is mounted at `/sys/fs/cgroup`.
    pub(super) fn detect() -> Result<Self> {
        let info = fs::read_to_string("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?;
        let of = |kind: &str| -> Vec<PathBuf> {
            info.lines()
                .filter(|line| {
                    line.split_once(" - ").is_some_and(|(_, rest)| rest.split(' ').next() == Some(kind))
                })
                .filter_map(|line| line.split(' ').nth(4))
                .map(PathBuf::from)
                .filter(|point| point.starts_with("/sys/fs/cgroup"))
                .collect()
        };
        let (v1, v2) = (of("cgroup"), of("cgroup2"));
        let unified = PathBuf::from("/sys/fs/cgroup");
        if v2.contains(&unified) {
            return Ok(Self { mounts: vec![unified.clone()], tracking: unified, v2: true });
        }
        let tracking = unified.join("pids");
        if !v1.contains(&tracking) {
            bail!(
                "neither cgroup v2 is mounted at /sys/fs/cgroup nor v1's pids hierarchy at {}",
                tracking.display()
            );
        }
        Ok(Self { mounts: v1.into_iter().chain(v2).collect(), tracking, v2: false })
    }

    /// `1` or `2`.
    pub(super) fn version(&self) -> u8 {
        if self.v2 { 2 } else { 1 }
    }

    /// Makes the cgroup `name` (a relative path) in every hierarchy, fit for
    /// processes and for cgroups below it.
    ///
    /// # Errors
    /// It cannot be made, or lacks what kubelet needs.
    pub(super) fn create(&self, name: &str) -> Result<()> {
        for mount in &self.mounts {
            let mut dir = mount.clone();
            for part in Path::new(name) {
                if self.v2 {
                    delegate(&dir)?;
                }
                dir.push(part);
                if let Err(error) = fs::create_dir(&dir)
                    && error.kind() != ErrorKind::AlreadyExists
                {
                    return Err(error).with_context(|| format!("making the cgroup {}", dir.display()));
                }
                if !self.v2 {
                    inherit_cpuset(&dir)?;
                }
            }
        }
        Ok(())
    }

    /// Makes the cgroup `name` fit for kubelet's own ones below it.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub(super) fn create_parent(&self, name: &str) -> Result<()> {
        self.create(name)?;
        if self.v2 { delegate(&self.tracking.join(name)) } else { Ok(()) }
    }

    /// The file that a process writes its pid to in order to join.
    pub(super) fn procs_file(&self, name: &str) -> PathBuf {
        self.tracking.join(name).join("cgroup.procs")
    }

    /// The processes in the cgroup `name` and below it; none if there is none.
    pub(super) fn processes(&self, name: &str) -> Vec<u32> {
        let mut found = Vec::new();
        for dir in tree(&self.tracking.join(name)) {
            let procs = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            found.extend(procs.lines().filter_map(|line| line.parse::<u32>().ok()));
        }
        found
    }

    /// Kills all that runs in the cgroup `name`, and what that starts
    /// meanwhile.
    ///
    /// # Errors
    /// Something still runs after 20 s.
    pub(super) fn kill(&self, name: &str) -> Result<()> {
        host::wait_until(&format!("all in the cgroup {name} is killed"), Duration::from_secs(20), || {
            let pids: Vec<u32> = self.processes(name).into_iter().filter(|pid| host::alive(*pid)).collect();
            for pid in &pids {
                host::signal(*pid, Signal::KILL);
            }
            Ok(pids.is_empty())
        })
    }

    /// Removes the cgroup `name` from every hierarchy, with all below it.
    ///
    /// # Errors
    /// It is still busy after 10 s.
    pub(super) fn remove(&self, name: &str) -> Result<()> {
        host::wait_until(&format!("the cgroup {name} is removed"), Duration::from_secs(10), || {
            let mut gone = true;
            for mount in &self.mounts {
                for dir in tree(&mount.join(name)) {
                    gone &=
                        !matches!(fs::remove_dir(&dir), Err(error) if error.kind() != ErrorKind::NotFound);
                }
            }
            Ok(gone)
        })
    }
}

/// Whether the process is in the cgroup `name` or below it.
pub(super) fn holds(name: &str, pid: u32) -> bool {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    groups
        .lines()
        .filter_map(|line| line.splitn(3, ':').nth(2))
        .any(|path| path.strip_prefix('/').is_some_and(|path| Path::new(path).starts_with(name)))
}

/// A directory and all below it, innermost first; none if there is none.
fn tree(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let below = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let mut found: Vec<PathBuf> = below.flat_map(|entry| tree(&entry.path())).collect();
    found.push(dir.to_owned());
    found
}

/// v2: hands the controllers of `dir` on to the cgroups below it.
fn delegate(dir: &Path) -> Result<()> {
    let read = |file: &str| {
        fs::read_to_string(dir.join(file)).with_context(|| format!("reading {file} of {}", dir.display()))
    };
    for controller in read("cgroup.controllers")?.split_whitespace() {
        // What may be missing is decided below: some controllers refuse.
        let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
    }
    let enabled = read("cgroup.subtree_control")?;
    for needed in NEEDED {
        if !enabled.split_whitespace().any(|controller| controller == needed) {
            bail!(
                "cgroup v2: the controller {needed} cannot be handed on below {} (it has \"{}\"): \
                 kubelet needs it; is this a container without a cgroup tree of its own?",
                dir.display(),
                enabled.trim()
            );
        }
    }
    Ok(())
}

/// v1: a new cgroup of the cpuset hierarchy has no CPU and no memory node, and
/// takes no process, before both are set.
fn inherit_cpuset(dir: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let (own, parents) = (dir.join(file), dir.parent().unwrap_or(dir).join(file));
        if !own.exists() || !fs::read_to_string(&own)?.trim().is_empty() {
            continue;
        }
        let value = fs::read_to_string(&parents).with_context(|| format!("reading {}", parents.display()))?;
        fs::write(&own, value.trim()).with_context(|| format!("writing {}", own.display()))?;
    }
    Ok(())
}
