//! What the machine itself offers to those who start daemons on it: waiting,
//! processes, mounts. Must not know containerd or Kubernetes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};

/// Calls `check` until it answers true, from every 5 ms at first to every
/// 100 ms, for at most `limit`.
///
/// # Errors
/// `check` failed, or time ran out: the message then names `what`.
pub fn wait_until(what: &str, limit: Duration, mut check: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(5);
    while !check().with_context(|| format!("waiting until {what}"))? {
        if Instant::now() >= deadline {
            bail!("{what}: not so within {} s", limit.as_secs());
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
    Ok(())
}

/// Runs a command to its end and returns its standard output.
///
/// # Errors
/// It could not be started, or did not exit with 0: the message has the command
/// and what it wrote.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting {}", line(command)))?;
    finished(command, &output)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// # Errors
/// The exit status is not 0.
pub fn finished(command: &Command, output: &Output) -> Result<()> {
    if !output.status.success() {
        bail!(
            "{} failed ({}):\n{}{}",
            line(command),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

/// A command as one would type it.
fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Sends a signal; a process that is gone already is none of the caller's worry.
pub fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// Whether the process runs: neither gone nor a zombie.
pub fn alive(pid: u32) -> bool {
    state(pid).is_some_and(|state| state != "Z")
}

/// The state letter of `/proc/<pid>/stat`, field 3; None if it is gone.
fn state(pid: u32) -> Option<String> {
    stat_field(pid, 0)
}

/// When the process started, in clock ticks since boot (`/proc/<pid>/stat`,
/// field 22). With the pid it names a process for good, for pids are used again.
pub fn started(pid: u32) -> Option<String> {
    stat_field(pid, 19)
}

/// Field `3 + index` of `/proc/<pid>/stat`: what comes before holds the
/// program's name, which may have spaces in it.
fn stat_field(pid: u32, index: usize) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(index).map(str::to_owned)
}

/// How many bytes of the machine's memory a process holds (`VmRSS` in `/proc/<pid>/status`).
///
/// # Errors
/// It does not run.
pub fn resident(pid: u32) -> Result<u64> {
    memory(pid, "VmRSS:")
}

/// As [`resident`], the most that it was (`VmHWM`).
///
/// # Errors
/// It does not run.
pub fn resident_at_most(pid: u32) -> Result<u64> {
    memory(pid, "VmHWM:")
}

fn memory(pid: u32, field: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("reading {path}: does it run?"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.map(|kib| kib << 10).with_context(|| format!("{path} has no {field} has the process ended?"))
}

/// The processor time that a process has used, without its children (`/proc/<pid>/stat`, fields 14 and 15).
pub fn processor_time(pid: u32) -> Option<Duration> {
    let field = |index| stat_field(pid, index)?.parse::<u64>().ok();
    Some(ticks(field(11)? + field(12)?))
}

/// As [`processor_time`], with that of the children which have ended (fields 16 and 17).
pub fn processor_time_in_all(pid: u32) -> Option<Duration> {
    let field = |index| stat_field(pid, index)?.parse::<u64>().ok();
    Some(processor_time(pid)? + ticks(field(13)? + field(14)?))
}

/// Clock ticks as the kernel counts them for programs, always a hundredth of a second here (`USER_HZ`).
pub fn ticks(count: u64) -> Duration {
    Duration::from_millis(count * 10)
}

/// Lets this process have at least so many files open.
///
/// # Errors
/// It has less now, and may not have more.
pub fn allow_files(count: u64) -> Result<()> {
    let now = getrlimit(Resource::Nofile);
    if now.current.is_none_or(|current| current >= count) {
        return Ok(());
    }
    let maximum = now.maximum.map(|maximum| maximum.max(count));
    setrlimit(Resource::Nofile, Rlimit { current: Some(count), maximum })
        .with_context(|| format!("raising the limit of open files from {:?} to {count}", now.current))
}

/// The processes whose command line names something below `dir`, but for the
/// caller's own.
///
/// # Errors
/// `/proc` cannot be read.
pub fn processes_naming(dir: &Path) -> Result<Vec<u32>> {
    let needle = format!("{}/", dir.display());
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("reading /proc")? {
        let Ok(pid) = entry?.file_name().to_string_lossy().parse::<u32>() else { continue };
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if pid != std::process::id() && String::from_utf8_lossy(&command).contains(&needle) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// Kills processes and waits until they are gone.
///
/// # Errors
/// Some still run after 10 seconds.
pub fn kill_all(pids: &[u32]) -> Result<()> {
    for pid in pids {
        signal(*pid, Signal::KILL);
    }
    wait_until(&format!("processes {pids:?} are gone"), Duration::from_secs(10), || {
        Ok(!pids.iter().any(|pid| alive(*pid)))
    })
}

/// The mount points at or below `dir`, innermost first.
///
/// # Errors
/// `/proc/self/mountinfo` cannot be read.
pub fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let info = fs::read_to_string("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?;
    let points = info.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    let mut below: Vec<PathBuf> = points.filter(|point| point.starts_with(dir)).collect();
    below.reverse();
    Ok(below)
}

/// Unmounts all that is mounted at or below `dir`, then removes `dir`. It is no
/// error if there is none.
///
/// # Errors
/// Something is mounted there still, or cannot be removed.
pub fn remove_tree(dir: &Path) -> Result<()> {
    for point in mounts_below(dir)? {
        unmount(&point, UnmountFlags::DETACH).with_context(|| format!("unmounting {}", point.display()))?;
    }
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// The last `count` lines of a file, for messages.
pub fn tail(file: &Path, count: usize) -> String {
    let text = fs::read(file).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
