//! `e2e/tools.sh` on machines that lack something, and after runs that were cut off. Needs root, and fetches one small
//! Debian package.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tote_e2e::host;
use tote_e2e::operator::checkout;

/// The script and what it reads, where any user may read it, beside an empty cache.
struct Bench(TempDir);

impl Bench {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
        let e2e = dir.path().join("e2e");
        fs::create_dir(&e2e)?;
        host::run(Command::new("cp").arg("-r").arg(checkout().join("e2e/upstream")).arg(&e2e))?;
        fs::copy(checkout().join("e2e/tools.sh"), e2e.join("tools.sh"))?;
        fs::copy(checkout().join("Cargo.toml"), dir.path().join("Cargo.toml"))?;
        host::run(Command::new("chmod").args(["-R", "a+rX"]).arg(dir.path()))?;
        Ok(Self(dir))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn script(&self) -> String {
        self.path("e2e/tools.sh").display().to_string()
    }

    /// What is in the cache, but for the lock.
    fn cached(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path("cache")) else { return vec![] };
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name != ".lock").collect()
    }

    /// Runs the command; returns what it wrote to standard error.
    fn refused(&self, command: &mut Command) -> Result<String> {
        let output = command.env("TOTE_CACHE", self.path("cache")).output()?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1), "{}: {error}", output.status);
        ensure!(error.contains("this machine lacks:"), "{error}");
        ensure!(self.cached().is_empty(), "it made {:?}", self.cached());
        Ok(error)
    }
}

#[test]
fn without_root_it_says_so_and_stops() -> Result<()> {
    let bench = Bench::new()?;
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "bash", &bench.script(), "all"]);
    let error = bench.refused(command.env("HOME", bench.path("")))?;
    ensure!(error.contains("  - root (you are nobody)"), "{error}");
    Ok(())
}

#[test]
fn on_another_distribution_it_says_so_and_stops() -> Result<()> {
    let bench = Bench::new()?;
    let release = bench.path("os-release");
    fs::write(&release, "ID=ubuntu\nVERSION_ID=\"24.04\"\n")?;
    let script =
        format!("mount --bind {} /etc/os-release && exec bash {} cluster", release.display(), bench.script());
    let error = bench.refused(Command::new("unshare").args(["--mount", "sh", "-c", &script]))?;
    ensure!(error.contains("  - Debian 12 (this is ubuntu 24.04)"), "{error}");
    ensure!(!error.contains("root ("), "{error}");
    Ok(())
}

#[test]
fn every_program_that_is_missing_is_named() -> Result<()> {
    let bench = Bench::new()?;
    let bin = bench.path("bin");
    fs::create_dir(&bin)?;
    for program in
        "bash dirname id uname stat readlink mountpoint grep sort head cat mkdir rmdir rm sed cut dpkg-query modprobe"
            .split(' ')
    {
        let found = ["/usr/bin", "/bin", "/usr/sbin", "/sbin"].map(|dir| Path::new(dir).join(program));
        let found = found.iter().find(|path| path.exists());
        if let Some(found) = found {
            symlink(found, bin.join(program))?;
        }
    }
    let mut command = Command::new(bin.join("bash"));
    let error = bench.refused(command.args([&bench.script(), "cluster"]).env("PATH", &bin))?;
    for line in ["  - cargo: install Rust", "  - make: apt-get install make", "  - go 1.26 or later"] {
        ensure!(error.contains(line), "no {line:?} in {error}");
    }
    // Debian's own.
    for (program, says) in [("cargo", "cargo 1.65.0"), ("go", "go1.19.8")] {
        fs::write(bin.join(program), format!("#!/bin/sh\necho {says}\n"))?;
        fs::set_permissions(bin.join(program), fs::Permissions::from_mode(0o755))?;
    }
    let error = bench.refused(command.env("PATH", &bin))?;
    for line in ["or later (this is cargo 1.65.0)", "go 1.26 or later (this is go1.19.8)"] {
        ensure!(error.contains(line), "no {line:?} in {error}");
    }
    Ok(())
}

#[test]
fn a_run_that_was_cut_off_leaves_nothing_that_stops_the_next() -> Result<()> {
    let bench = Bench::new()?;
    let fetch = || {
        // Who runs this in the background of a shell ignores SIGINT, and a shell cannot trap what it came to ignored.
        let mut command = Command::new("env");
        command.args(["--default-signal=INT", "bash", &bench.script(), "registry"]);
        command.env("TOTE_CACHE", bench.path("cache"));
        command
    };
    let remove_scratch = || -> Result<()> {
        for name in bench.cached() {
            let path = bench.path("cache").join(name);
            if path.is_dir() { fs::remove_dir_all(path)? } else { fs::remove_file(path)? }
        }
        Ok(())
    };
    for (signal, code) in [(Signal::KILL, None), (Signal::TERM, Some(143)), (Signal::INT, Some(130))] {
        let mut child = fetch().stdout(Stdio::null()).spawn()?;
        host::wait_until("it has begun to fetch", Duration::from_secs(120), || {
            Ok(bench.cached().iter().any(|name| name.starts_with(".tmp.")))
        })?;
        kill_process(Pid::from_child(&child), signal)?;
        let ended = child.wait()?;
        ensure!(code.is_none() || ended.code() == code, "{signal:?}: {ended}");
        let half: Vec<_> = bench.cached().into_iter().filter(|name| !name.starts_with(".tmp.")).collect();
        ensure!(half.is_empty(), "published by a run that was cut off: {half:?}");
        ensure!(signal == Signal::KILL || bench.cached().is_empty(), "{signal:?} left {:?}", bench.cached());
        if signal != Signal::KILL {
            continue;
        }
        // What the killed run left would be taken for what the next one makes.
        remove_scratch()?;
    }
    let done = |output: Output| -> Result<String> {
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    ensure!(done(fetch().output()?)?.contains("everything is in"), "the next run does it");
    let cached = bench.cached();
    ensure!(cached.len() == 1 && cached[0].starts_with("docker-registry-"), "{cached:?}");
    let program = bench.path("cache").join(&cached[0]).join("bin/docker-registry");
    ensure!(program.is_file(), "no {}", program.display());
    let again = done(fetch().output().context("the second run")?)?;
    ensure!(again.is_empty(), "nothing to do, and yet it says {again}");
    Ok(())
}
