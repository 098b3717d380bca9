//! A node: a network, mount and UTS namespace with its own containerd, kubelet
//! and kube-proxy, in which every path is the usual one.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::Signal;

use super::files;
use super::network::Network;
use super::service::{Service, words};
use crate::containerd::{PAUSE, Snapshotter, came_up};
use crate::host;
use crate::tools::{self, Containerd};

/// What a node is to be.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct NodeSpec {
    /// Its name: up to six of `a-z0-9`, for its links are named after it.
    pub name: String,
    /// Which containerd it runs.
    pub containerd: Containerd,
    /// What its CRI unpacks with.
    pub snapshotter: Snapshotter,
    /// Whether it is for up to 200 pods whose images are pulled side by side, as fast as they are asked for.
    #[serde(default)]
    pub crowded: bool,
}

impl NodeSpec {
    /// A node with the defaults of its containerd.
    pub fn new(name: &str, containerd: Containerd) -> Self {
        Self { name: name.to_owned(), containerd, snapshotter: Snapshotter::default(), crowded: false }
    }
}

/// A node of a running cluster.
#[derive(Clone, Debug)]
pub struct Node {
    pub(super) spec: NodeSpec,
    pub(super) index: usize,
    pub(super) nodes: usize,
    pub(super) network: Network,
    /// What is bound over the machine's directories, and nothing else.
    pub(super) dir: PathBuf,
    /// The cgroup of its pods.
    pub(super) cgroup_root: String,
    /// Holds the namespaces.
    pub(super) holder: Service,
    pub(super) containerd: Service,
    pub(super) kubelet: Service,
    pub(super) kube_proxy: Service,
}

/// The directories of the machine that a node has its own of.
const OWN: [&str; 4] = ["etc", "run", "var/lib", "var/log"];

/// Becomes the process that holds the namespaces: `$1` the node's directory,
/// `$2` its name. Kubelet sets some of the kernel's settings, which are the
/// machine's: it finds them set already, in files bound over them.
const HOLD: &str = r#"
set -e
node=$1
echo "$2" >/proc/sys/kernel/hostname
for dir in etc run var/lib var/log; do mount --bind "$node/$dir" "/$dir"; done
cd "$node/sysctl"
find . -type f | while read -r file; do
  if [ -e "/proc/sys/$file" ]; then mount --bind "$file" "/proc/sys/$file"; fi
done
cd /
mount --make-rshared /
echo 1 >/proc/sys/net/ipv4/ip_forward
touch "$node/held"
exec sleep infinity
"#;

/// How long a daemon may take to answer; the machine may be busy.
const LIMIT: Duration = Duration::from_secs(60);

impl Node {
    /// Its name, which is the Node's in the API too.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// The containerd it runs.
    pub fn version(&self) -> Containerd {
        self.spec.containerd
    }

    /// Its address.
    ///
    /// # Errors
    /// None: it has been checked when the cluster was made.
    pub fn address(&self) -> Result<Ipv4Addr> {
        self.network.node(self.index)
    }

    /// A path inside the node, as the machine sees it; for `/etc`, `/run`,
    /// `/var/lib` and `/var/log`, without what is mounted below them.
    pub fn path(&self, inside: &str) -> PathBuf {
        self.dir.join(inside.trim_start_matches('/'))
    }

    /// A command that runs inside the node, with its `ctr` first in PATH.
    ///
    /// # Errors
    /// The node is down, or its programs are not built.
    pub fn command<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Result<Command> {
        let mut command = Command::new("nsenter");
        command.args(self.enter()?).args(args).env("PATH", self.path_variable()?);
        command.env("CONTAINERD_NAMESPACE", "k8s.io");
        Ok(command)
    }

    /// Runs a command inside the node; returns what it printed.
    ///
    /// # Errors
    /// It failed; the message has what it wrote.
    pub fn exec<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Result<String> {
        host::run(&mut self.command(args)?).with_context(|| format!("on node {}", self.name()))
    }

    /// Runs the node's `ctr` in the namespace `k8s.io`.
    ///
    /// # Errors
    /// It failed; the message has what it wrote.
    pub fn ctr(&self, args: &[&str]) -> Result<String> {
        let words: Vec<&str> = ["ctr", "-n", "k8s.io"].iter().chain(args).copied().collect();
        self.exec(&words)
    }

    /// The process of a container that runs, as the machine numbers it.
    ///
    /// # Errors
    /// There is no such container; the message has those that there are.
    pub fn process(&self, container: &str) -> Result<u32> {
        let table = self.ctr(&["tasks", "list"])?;
        let mut rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let row = rows.find(|row| row.first() == Some(&container));
        let pid = row.and_then(|row| row.get(1)?.parse().ok());
        pid.with_context(|| format!("container {container} is not on node {}:\n{table}", self.name()))
    }

    /// Imports an image archive (OCI layout or `docker save`, a tar file of the
    /// machine's) under the names that it gives.
    ///
    /// # Errors
    /// `ctr` failed.
    pub fn load_image(&self, archive: &Path) -> Result<()> {
        let file = File::open(archive).with_context(|| format!("opening {}", archive.display()))?;
        let mut command = self.command(&["ctr", "-n", "k8s.io", "images", "import", "-"])?;
        host::run(command.stdin(file))
            .with_context(|| format!("importing {} on node {}", archive.display(), self.name()))
            .map(drop)
    }

    /// Lets its containerd pull from `host_port` (such as `registry.test:5000`)
    /// by plain HTTP; in force with the next pull.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn trust_registry(&self, host_port: &str) -> Result<()> {
        let dir = self.path("/etc/containerd/certs.d").join(host_port);
        fs::create_dir_all(&dir)?;
        let text = format!(
            "server = \"http://{host_port}\"\n\n[host.\"http://{host_port}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
        );
        let (new, file) = (dir.join("hosts.toml.new"), dir.join("hosts.toml"));
        fs::write(&new, text)?;
        fs::rename(new, &file).with_context(|| format!("writing {}", file.display()))
    }

    /// Starts kubelet and waits until it answers.
    ///
    /// # Errors
    /// It runs already, or does not come up.
    pub fn start_kubelet(&self) -> Result<()> {
        self.spawn(&self.kubelet, &tools::kubernetes()?.join("kubelet"), &self.kubelet_flags()?)?;
        self.kubelet.wait(LIMIT, || Ok(self.answers("127.0.0.1/10248", Some("/healthz"))))
    }

    /// Ends kubelet; its pods go on.
    ///
    /// # Errors
    /// It does not end.
    pub fn stop_kubelet(&self) -> Result<()> {
        self.kubelet.end(Signal::TERM)
    }

    /// Kills kubelet with SIGKILL; its pods go on.
    ///
    /// # Errors
    /// It does not end.
    pub fn kill_kubelet(&self) -> Result<()> {
        self.kubelet.end(Signal::KILL)
    }

    /// Ends kubelet and starts it again.
    ///
    /// # Errors
    /// It does not end or does not come up.
    pub fn restart_kubelet(&self) -> Result<()> {
        self.stop_kubelet()?;
        self.start_kubelet()
    }

    /// Starts containerd and waits until it answers, CRI included.
    ///
    /// # Errors
    /// It runs already, or does not come up.
    pub fn start_containerd(&self) -> Result<()> {
        let flags = ["--config".to_owned(), "/etc/containerd/config.toml".to_owned()];
        let log = self.containerd.log();
        let seen = fs::metadata(&log).map_or(0, |log| log.len());
        self.spawn(&self.containerd, &self.spec.containerd.bin()?.join("containerd"), &flags)?;
        self.containerd
            .wait(LIMIT, || Ok(came_up(fs::read(&log)?.get(usize::try_from(seen)?..).unwrap_or_default())))
    }

    /// Ends containerd; containers go on.
    ///
    /// # Errors
    /// It does not end.
    pub fn stop_containerd(&self) -> Result<()> {
        self.containerd.end(Signal::TERM)
    }

    /// Kills containerd with SIGKILL; containers go on.
    ///
    /// # Errors
    /// It does not end.
    pub fn kill_containerd(&self) -> Result<()> {
        self.containerd.end(Signal::KILL)
    }

    /// The log of `containerd`, `kubelet` or `kube-proxy`.
    ///
    /// # Errors
    /// There is no such daemon.
    pub fn log(&self, daemon: &str) -> Result<PathBuf> {
        let service = match daemon {
            "containerd" => &self.containerd,
            "kubelet" => &self.kubelet,
            "kube-proxy" => &self.kube_proxy,
            other => bail!("a node has no daemon {other:?}; know: containerd, kubelet, kube-proxy"),
        };
        Ok(service.log())
    }

    /// Its daemons, in the order of their start.
    pub(super) fn services(&self) -> [&Service; 4] {
        [&self.holder, &self.containerd, &self.kubelet, &self.kube_proxy]
    }

    /// Makes the namespaces and the link, starts containerd and gives it the
    /// image of the pods' sandboxes.
    ///
    /// # Errors
    /// A step failed.
    pub(super) fn prepare(&self, pause: &Path) -> Result<()> {
        for own in OWN {
            fs::create_dir_all(self.dir.join(own))?;
        }
        files::write(self)?;
        let unshare =
            ["unshare", "--net", "--mount", "--uts", "--propagation", "private", "sh", "-c", HOLD, "sh"];
        let mut words: Vec<String> = unshare.iter().map(|word| (*word).to_owned()).collect();
        words.extend([self.dir.display().to_string(), self.name().to_owned()]);
        self.holder.start(&tools::path_with(&[]), &words)?;
        let held = self.dir.join("held");
        self.holder.wait(LIMIT, || Ok(held.exists()))?;
        let pid = self.holder.pid().with_context(|| self.holder.last_words())?;
        self.network.connect(self.name(), self.index, self.nodes, pid)?;
        self.start_containerd()?;
        self.load_image(pause)?;
        self.ctr(&["images", "label", PAUSE, "io.cri-containerd.pinned=pinned"]).map(drop)
    }

    /// Starts kubelet and kube-proxy, without waiting for them.
    ///
    /// # Errors
    /// They cannot be started.
    pub(super) fn join(&self) -> Result<()> {
        let bin = tools::kubernetes()?;
        self.spawn(&self.kubelet, &bin.join("kubelet"), &self.kubelet_flags()?)?;
        let flags = [format!("--config={}", files::KUBE_PROXY_CONFIG)];
        self.spawn(&self.kube_proxy, &bin.join("kube-proxy"), &flags)
    }

    /// Whether the API is reached by its service's address, as pods do.
    pub(super) fn reaches_api(&self) -> bool {
        self.answers(&format!("{}/443", self.network.api_service()), None)
    }

    /// Whether, from inside the node, a TCP connection is accepted and, given a
    /// path, answered with status 200.
    fn answers(&self, host_port: &str, path: Option<&str>) -> bool {
        let ask = path.map_or(String::new(), |path| {
            format!("; printf 'GET {path} HTTP/1.0\\r\\n\\r\\n' >&3; head -n 1 <&3 | grep -q ' 200 '")
        });
        let script = format!("exec 3<>/dev/tcp/{host_port}{ask}");
        let Ok(mut command) = self.command(&["timeout", "2", "bash", "-c", &script]) else { return false };
        command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    }

    fn kubelet_flags(&self) -> Result<Vec<String>> {
        Ok(vec![
            format!("--config={}", files::KUBELET_CONFIG),
            format!("--kubeconfig={}", files::KUBELET_KUBECONFIG),
            format!("--hostname-override={}", self.name()),
            format!("--node-ip={}", self.address()?),
        ])
    }

    /// Starts a daemon inside the node.
    fn spawn(&self, service: &Service, program: &Path, flags: &[String]) -> Result<()> {
        let mut inside = vec!["nsenter".to_owned()];
        inside.extend(self.enter()?);
        inside.extend(words(program, flags));
        service.start(&self.path_variable()?, &inside)
    }

    /// nsenter's options for this node.
    fn enter(&self) -> Result<[String; 6]> {
        let pid = self.holder.pid().with_context(|| format!("node {} is down", self.name()))?;
        Ok(["--target", &pid.to_string(), "--net", "--mount", "--uts", "--"].map(str::to_owned))
    }

    fn path_variable(&self) -> Result<String> {
        Ok(tools::path_with(&[&self.spec.containerd.bin()?, &tools::kubernetes()?]))
    }
}
