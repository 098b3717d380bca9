//! The configuration file of a containerd, for a private daemon and for a
//! node's. Builds text; must not start anything.

use std::fmt;
use std::path::Path;

use crate::tools::Containerd;

/// The snapshotter that CRI uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Snapshotter {
    /// containerd's default.
    #[default]
    Overlayfs,
    /// Copies of whole directories.
    Native,
}

impl fmt::Display for Snapshotter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Overlayfs => "overlayfs",
            Self::Native => "native",
        })
    }
}

/// The name of the image that every sandbox of a pod runs, imported by hand.
pub const PAUSE: &str = "localhost/pause:e2e";

/// Logged when CRI is about to answer, and when the socket is served; which
/// comes first differs between the versions.
const READY: [&str; 2] = ["Start streaming server", "containerd successfully booted"];

/// Whether a containerd has come up, by what it has logged since its start.
pub fn came_up(log: &[u8]) -> bool {
    let text = String::from_utf8_lossy(log);
    READY.iter().all(|line| text.contains(line))
}

/// What differs between the daemons of the tests.
#[derive(Debug)]
pub struct Config<'a> {
    /// Decides the version of the file and its keys.
    pub version: Containerd,
    /// Persistent data.
    pub root: &'a Path,
    /// Run-time data.
    pub state: &'a Path,
    /// The gRPC socket.
    pub socket: &'a Path,
    /// Registries' `hosts.toml` files, one directory a registry.
    pub certs_d: &'a Path,
    /// What CRI unpacks with.
    pub snapshotter: Snapshotter,
    /// Whether CRI drops the layers' blobs once they are unpacked.
    pub discard_unpacked_layers: bool,
}

impl Config<'_> {
    /// The text of `config.toml`.
    pub fn to_toml(&self) -> String {
        let (root, state, socket) = (self.root.display(), self.state.display(), self.socket.display());
        let (certs_d, snapshotter, discard) =
            (self.certs_d.display(), self.snapshotter, self.discard_unpacked_layers);
        // NRI's socket and the directory for added programs are the machine's,
        // not the daemon's, unless one says otherwise.
        let common = format!(
            r#"root = "{root}"
state = "{state}"
oom_score = 0

[grpc]
address = "{socket}"

[plugins."io.containerd.internal.v1.opt"]
path = "{root}/opt"
"#
        );
        // Where CAP_SYS_RESOURCE is missing, runc cannot lower a container's
        // oom_score_adj, and dies of it: hence restrict_oom_score_adj.
        let cri = match self.version {
            Containerd::V2 => format!(
                r#"
[plugins."io.containerd.nri.v1.nri"]
disable = true

[plugins."io.containerd.cri.v1.images"]
snapshotter = "{snapshotter}"
discard_unpacked_layers = {discard}

[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{PAUSE}"

[plugins."io.containerd.cri.v1.images".registry]
config_path = "{certs_d}"

[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true

[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["/usr/lib/cni"]
conf_dir = "/etc/cni/net.d"
"#
            ),
            Containerd::V1_7 | Containerd::Debian1_6 => {
                let nri = "[plugins.\"io.containerd.nri.v1.nri\"]\ndisable = true\n";
                format!(
                    r#"
{nri}
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
restrict_oom_score_adj = true

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "{snapshotter}"
discard_unpacked_layers = {discard}

[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "{certs_d}"

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "/etc/cni/net.d"
"#,
                    nri = if self.version == Containerd::V1_7 { nri } else { "" }
                )
            }
        };
        let version = if self.version == Containerd::V2 { 3 } else { 2 };
        format!("version = {version}\n{common}{cri}")
    }
}
