//! What a containerd pulls with, as it says itself.

use anyhow::{Context as _, Result};
use tote_e2e::daemon::Daemon;

/// In the log of one that does not use the transfer service, although its configuration does not say so.
const FALLEN_BACK: &str = "Falling back to local image pull";

/// In one line: its version, what it unpacks with, how it pulls and how much at once. Knows containerd 2.
pub fn of(daemon: &Daemon) -> Result<String> {
    let said = daemon.ctr(&["version"])?;
    let server = said.lines().skip_while(|line| *line != "Server:").find_map(|line| {
        let version = line.trim().strip_prefix("Version:")?.trim();
        Some(version.trim_start_matches('v'))
    });
    let server = server.with_context(|| format!("no version of the server in {said}"))?;
    let has_fallen_back = std::fs::read_to_string(daemon.log())?.contains(FALLEN_BACK);
    Ok(format!("containerd {server}, {}", line(&daemon.configuration()?, has_fallen_back)?))
}

fn line(dump: &str, has_fallen_back: bool) -> Result<String> {
    let (images, transfer) = ("io.containerd.cri.v1.images", "io.containerd.transfer.v1.local");
    let of = |plugin, key| setting(dump, plugin, key).with_context(|| format!("{plugin} has no {key}"));
    let snapshotter = of(images, "snapshotter")?;
    let is_local = has_fallen_back || of(images, "use_local_image_pull")? == "true";
    let how = if is_local {
        format!("local pull, max_concurrent_downloads {}", of(images, "max_concurrent_downloads")?)
    } else {
        let (downloads, unpacks) =
            (of(transfer, "max_concurrent_downloads")?, of(transfer, "max_concurrent_unpacks")?);
        format!("transfer service, max_concurrent_downloads {downloads}, max_concurrent_unpacks {unpacks}")
    };
    Ok(format!("{snapshotter}, {how}"))
}

/// A plugin's own setting in what `containerd config dump` prints.
fn setting<'a>(dump: &'a str, plugin: &str, key: &str) -> Option<&'a str> {
    let table = format!("[plugins.'{plugin}']");
    let lines = dump.lines().map(str::trim).skip_while(|line| *line != table).skip(1);
    let mut own = lines.take_while(|line| !line.starts_with('['));
    own.find_map(|line| Some(line.strip_prefix(key)?.strip_prefix(" = ")?.trim_matches('\'')))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DUMP: &str = "
[plugins]
  [plugins.'io.containerd.cri.v1.images']
    snapshotter = 'overlayfs'
    max_concurrent_downloads = 2
    use_local_image_pull = false

    [plugins.'io.containerd.cri.v1.images'.registry]
      config_path = '/c'

  [plugins.'io.containerd.transfer.v1.local']
    max_concurrent_downloads = 3
    max_concurrent_unpacks = 1
";

    #[test]
    fn the_settings_are_those_of_the_way_it_pulls() {
        let transfer = "overlayfs, transfer service, max_concurrent_downloads 3, max_concurrent_unpacks 1";
        let local = "overlayfs, local pull, max_concurrent_downloads 2";
        assert_eq!(line(DUMP, false).unwrap(), transfer);
        assert_eq!(line(DUMP, true).unwrap(), local);
        assert_eq!(line(&DUMP.replace("pull = false", "pull = true"), false).unwrap(), local);
        assert!(
            line("", false).is_err() && setting(DUMP, "io.containerd.cri.v1.images", "config_path").is_none()
        );
    }
}
