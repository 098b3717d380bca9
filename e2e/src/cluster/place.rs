//! Where a cluster of a given name lies, and which names and options there may
//! be. Must not know what runs in it.

use std::fs::{self, File};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use super::Options;
use crate::tools;

/// The directory of all clusters.
pub(super) fn clusters() -> Result<PathBuf> {
    let dir = tools::cache()?.join("clusters");
    // Nodes have their own of these: what lies below is out of their sight.
    for hidden in ["/etc", "/run", "/var/lib", "/var/log", "/sys", "/proc"] {
        if dir.starts_with(hidden) {
            bail!(
                "the cache {} is below {hidden}, which nodes do not see: set TOTE_CACHE to another place",
                dir.display()
            );
        }
    }
    fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    Ok(dir)
}

/// The directory of one cluster.
pub(super) fn directory(name: &str) -> Result<PathBuf> {
    Ok(clusters()?.join(name))
}

/// The branch of the cgroups of one cluster.
pub(super) fn branch(name: &str) -> String {
    format!("tote-{name}")
}

/// One process at a time makes or removes a cluster of this name.
pub(super) fn lock(name: &str) -> Result<File> {
    let file = File::create(clusters()?.join(format!(".{name}.lock")))?;
    file.lock().with_context(|| format!("waiting for the lock of the cluster {name}"))?;
    Ok(file)
}

/// # Errors
/// A field of the options is not valid, or the caller is not root.
pub(super) fn check(options: &Options) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("a cluster needs root: it makes namespaces, mounts, links and cgroups");
    }
    check_name(&options.name)?;
    if options.nodes.is_empty() || options.nodes.len() > 50 {
        bail!("nodes: {} given; a cluster has 1 to 50", options.nodes.len());
    }
    for (index, node) in options.nodes.iter().enumerate() {
        let name = &node.name;
        let fits = name.len() <= 6 && name.starts_with(|c: char| c.is_ascii_lowercase());
        if !fits || !name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit()) {
            bail!("node name {name:?}: use a letter and up to five more of a-z0-9");
        }
        if options.nodes[..index].iter().any(|other| other.name == *name) {
            bail!("node name {name:?} is given twice");
        }
    }
    Ok(())
}

/// # Errors
/// The name cannot be that of a directory, a cgroup and links.
pub(super) fn check_name(name: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() || name.len() > 20 || !name.chars().all(allowed) || name.starts_with('-') {
        bail!("cluster name {name:?}: use up to 20 of a-z0-9-, a letter or digit first");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_cannot_name_links_or_directories_are_refused() {
        for bad in ["", "-a", "A", "../x", "a/b", "a.b", "abcdefghijklmnopqrstu"] {
            assert!(check_name(bad).is_err(), "{bad:?} was taken");
        }
        assert!(check_name("demo-2").is_ok());
    }
}
