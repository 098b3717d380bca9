//! Where the real programs lie that `e2e/tools.sh` builds, and their versions.
//! Knows names and paths only, and starts nothing.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// `e2e/upstream/versions`, the one place that names them (`key=version` lines).
const VERSIONS: &str = include_str!("../upstream/versions");

/// The directory that `e2e/tools.sh` fills: `$TOTE_CACHE`, else `tote` in
/// `$XDG_CACHE_HOME`, else in `~/.cache`.
///
/// # Errors
/// None of the three variables is set.
pub fn cache() -> Result<PathBuf> {
    let dir = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    dir("TOTE_CACHE")
        .or_else(|| dir("XDG_CACHE_HOME").map(|base| base.join("tote")))
        .or_else(|| dir("HOME").map(|home| home.join(".cache/tote")))
        .context("none of TOTE_CACHE, XDG_CACHE_HOME and HOME is set: nowhere to look for the built programs")
}

/// The version that `e2e/upstream/versions` gives for `key`.
fn version(key: &str) -> &'static str {
    VERSIONS
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
        .unwrap_or_else(|| panic!("e2e/upstream/versions has no line for {key}"))
}

/// The directory of programs of `name` (as in the cache) at `version`.
fn bin(name: &str, version: &str) -> Result<PathBuf> {
    let dir = cache()?.join(format!("{name}-{version}"));
    if !dir.join(".complete").exists() {
        bail!("{name} {version} is missing ({} is not there or not whole): run e2e/tools.sh", dir.display());
    }
    Ok(dir.join("bin"))
}

/// A containerd that tests run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub enum Containerd {
    /// 1.6.20, as Debian 12 packages it.
    Debian1_6,
    /// The newest 1.7.
    V1_7,
    /// The newest 2.x.
    V2,
}

impl Containerd {
    /// Every version, oldest first.
    pub const ALL: [Self; 3] = [Self::Debian1_6, Self::V1_7, Self::V2];

    /// Its version, such as `2.4.2`.
    pub fn version(self) -> &'static str {
        version(match self {
            Self::Debian1_6 => "containerd_debian",
            Self::V1_7 => "containerd_1_7",
            Self::V2 => "containerd_2",
        })
    }

    /// The directory of `containerd`, `ctr` and `containerd-shim-runc-v2`. Must
    /// come first in the PATH of the daemon, for each needs its own shim.
    ///
    /// # Errors
    /// It has not been built.
    pub fn bin(self) -> Result<PathBuf> {
        bin("containerd", self.version())
    }
}

impl fmt::Display for Containerd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "containerd {}", self.version())
    }
}

/// The directory of `kube-apiserver`, `kubelet`, `kubectl` and the other
/// programs of Kubernetes.
///
/// # Errors
/// They have not been built.
pub fn kubernetes() -> Result<PathBuf> {
    bin("kubernetes", kubernetes_version())
}

/// The version of Kubernetes, such as `1.36.3`.
pub fn kubernetes_version() -> &'static str {
    version("kubernetes")
}

/// The program `etcd`.
///
/// # Errors
/// It has not been built.
pub fn etcd() -> Result<PathBuf> {
    Ok(bin("etcd", version("etcd"))?.join("etcd"))
}

/// The program `helm`.
///
/// # Errors
/// It has not been built.
pub fn helm() -> Result<PathBuf> {
    Ok(bin("helm", version("helm"))?.join("helm"))
}

/// The program `health`: what kstatus, or an Argo CD health check, makes of an object.
///
/// # Errors
/// It has not been built.
pub fn health() -> Result<PathBuf> {
    Ok(bin("health", version("health"))?.join("health"))
}

/// The program `docker-registry`.
///
/// # Errors
/// It has not been unpacked.
pub fn docker_registry() -> Result<PathBuf> {
    Ok(bin("docker-registry", version("docker_registry"))?.join("docker-registry"))
}

/// PATH with `first` before the directories of system programs.
pub fn path_with(first: &[&Path]) -> String {
    let mut path: Vec<String> = first.iter().map(|dir| dir.display().to_string()).collect();
    path.push("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned());
    path.join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_version_is_named() {
        let all: Vec<&str> = Containerd::ALL.iter().map(|containerd| containerd.version()).collect();
        assert!(all.iter().all(|version| version.split('.').count() == 3), "{all:?}");
        assert!(
            ["kubernetes", "etcd", "helm", "health", "docker_registry"]
                .iter()
                .all(|key| version(key).contains('.'))
        );
    }
}
