//! Private containerds of every version. Needs root and what `e2e/tools.sh containerd` builds.

use std::fs;
use std::path::Path;

use anyhow::Result;
use tote_e2e::containerd::Snapshotter;
use tote_e2e::daemon::{Daemon, Options};
use tote_e2e::host;
use tote_e2e::tools::Containerd;

#[test]
fn every_version_comes_up_restarts_and_leaves_nothing() -> Result<()> {
    for version in Containerd::ALL {
        let mut daemon = Daemon::start(Options::new(version).snapshotter(Snapshotter::Native))?;
        assert!(daemon.ctr(&["version"])?.contains(version.version()), "not {version}");
        let plugins = daemon.ctr(&["plugins", "ls"])?;
        assert!(
            plugins.lines().any(|line| line.contains(" cri ") && line.trim_end().ends_with("ok")),
            "{plugins}"
        );
        daemon.ctr(&["leases", "create", "--id", "kept"])?;

        daemon.kill()?;
        assert!(!daemon.running() && daemon.ctr(&["version"]).is_err());
        daemon.restart()?;
        daemon.restart()?;
        assert!(daemon.ctr(&["leases", "ls"])?.contains("kept"));

        let dir = daemon.dir().to_owned();
        drop(daemon);
        assert!(is_gone(&dir)?);
    }
    Ok(())
}

#[test]
fn what_lies_in_memory_is_unmounted_by_the_daemon_or_by_the_next() -> Result<()> {
    let options = Options::new(Containerd::V2).tmpfs(1 << 30);
    let daemon = Daemon::start(options)?;
    let dir = daemon.dir().to_owned();
    let mounts = host::mounts_below(&dir)?;
    assert!(
        mounts.len() == 1 && daemon.root().starts_with(&mounts[0]) && daemon.state().starts_with(&mounts[0])
    );
    drop(daemon);
    assert!(is_gone(&dir)?);

    // As if its owner had been killed.
    let left = Daemon::start(options)?;
    let dir = left.dir().to_owned();
    fs::write(dir.join("owner"), "0 0")?;
    std::mem::forget(left);
    let _next = Daemon::start(Options::new(Containerd::V2))?;
    assert!(is_gone(&dir)?);
    Ok(())
}

fn is_gone(dir: &Path) -> Result<bool> {
    Ok(!fs::exists(dir)? && host::processes_naming(dir)?.is_empty() && host::mounts_below(dir)?.is_empty())
}
