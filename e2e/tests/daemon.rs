//! Private containerds of every version. Needs root and what `e2e/tools.sh containerd` builds.

use std::fs;

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
        assert!(
            !fs::exists(&dir)?
                && host::processes_naming(&dir)?.is_empty()
                && host::mounts_below(&dir)?.is_empty()
        );
    }
    Ok(())
}
