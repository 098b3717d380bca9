//! A real cluster on one machine: etcd, API server, controller manager and
//! scheduler, and nodes that are namespaces with real kubelets and containerds.
//!
//! It outlives the process that made it: a later one attaches. All of its state
//! is in one directory, all of its processes in one branch of the cgroups, all
//! of its links have one prefix, so that it can be removed whatever happened to
//! whoever made it. Must not know what is being tested.

mod api;
mod build;
mod cgroup;
mod control_plane;
mod files;
mod network;
mod node;
mod options;
mod pki;
mod place;
mod service;

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

pub use files::REGISTRY_HOSTS;
pub use node::{Node, NodeSpec};
pub use options::Options;

use crate::host;
use crate::tools;
use build::each;
use cgroup::Cgroups;
use control_plane::ControlPlane;
use network::Network;
use place::{branch, check, check_name, clusters, directory, lock};
use service::Service;

/// What `up` says as it goes on, a line each time.
pub type Progress<'a> = &'a (dyn Fn(&str) + Sync);

/// What is kept of a cluster, in `cluster.json`.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
struct State {
    network: Network,
    nodes: Vec<NodeSpec>,
    #[serde(default)]
    audited: Option<String>,
    /// Whether `up` came to its end.
    ready: bool,
}

/// A running cluster. Dropped, it goes on running: see [`Cluster::down`].
#[derive(Clone, Debug)]
pub struct Cluster {
    name: String,
    dir: PathBuf,
    cgroups: Cgroups,
    network: Network,
    control_plane: ControlPlane,
    nodes: Vec<Node>,
}

/// One line of [`Cluster::status`].
#[derive(Debug)]
pub struct Status {
    /// The daemon, such as `n1-kubelet`.
    pub daemon: String,
    /// Its process, if it runs.
    pub pid: Option<u32>,
    /// Its log.
    pub log: PathBuf,
}

impl Cluster {
    /// Brings a cluster up, and returns when pods can be made on every node. If
    /// one of this name is up, that one; what is left of a broken one is
    /// removed first.
    ///
    /// # Errors
    /// Not root, the options are not valid, a cluster of this name is up with
    /// other nodes, or something does not come up: all is removed again then,
    /// and the message has the end of the log.
    pub fn up(options: &Options, progress: Progress<'_>) -> Result<Self> {
        check(options)?;
        let _lock = lock(&options.name)?;
        if let Ok(cluster) = Self::attach(&options.name) {
            if cluster.options() != *options {
                bail!("a cluster {} is up with other nodes: take it down first", options.name);
            }
            progress(&format!("the cluster {} is up already", options.name));
            return Ok(cluster);
        }
        if directory(&options.name)?.exists() {
            progress("removing what is left of an earlier cluster of this name");
            remove(&options.name)?;
        }
        let cluster = Self::reserve(options)?;
        let built = cluster.build(progress);
        if let Err(error) = built {
            let error = error.context(format!("the cluster {} did not come up", options.name));
            return Err(match remove(&options.name) {
                Ok(()) => error,
                Err(left) => error.context(format!("and what is left of it could not be removed: {left:#}")),
            });
        }
        cluster.save(true)?;
        Ok(cluster)
    }

    /// The cluster of this name, which is up.
    ///
    /// # Errors
    /// There is none, or one of its daemons' processes that hold it together
    /// (control plane, namespaces) is gone.
    pub fn attach(name: &str) -> Result<Self> {
        let dir = directory(name)?;
        let file = dir.join("cluster.json");
        let text = match fs::read(&file) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                bail!("no cluster {name} is up (bring it up with: cargo run -p tote-e2e --bin cluster -- up)")
            }
            other => other.with_context(|| format!("reading {}", file.display()))?,
        };
        let state: State =
            serde_json::from_slice(&text).with_context(|| format!("reading {}", file.display()))?;
        let options = Options { name: name.to_owned(), nodes: state.nodes, audited: state.audited };
        let cluster = Self::new(&options, dir, state.network)?;
        let holders = cluster.nodes.iter().map(|node| &node.holder);
        let gone = cluster
            .control_plane
            .services()
            .into_iter()
            .chain(holders)
            .find(|service| service.pid().is_none());
        if let Some(service) = gone.filter(|_| state.ready) {
            bail!("the cluster {name} is broken: {} does not run; take it down, then up", service.name);
        }
        if !state.ready {
            bail!("the cluster {name} did not come up to its end; take it down, then up");
        }
        Ok(cluster)
    }

    /// Removes the cluster of this name, whatever its condition: processes,
    /// namespaces, mounts, links, cgroups, files. Returns whether there was one.
    ///
    /// # Errors
    /// Something cannot be removed.
    pub fn down(name: &str) -> Result<bool> {
        check_name(name)?;
        let _lock = lock(name)?;
        let was = directory(name)?.exists();
        remove(name)?;
        Ok(was)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory of all that it has.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The kubeconfig of its administrator.
    pub fn kubeconfig(&self) -> PathBuf {
        self.control_plane.kubeconfig()
    }

    /// A client with the administrator's rights.
    ///
    /// # Errors
    /// The kubeconfig cannot be read.
    pub async fn client(&self) -> Result<kube::Client> {
        api::client(&self.kubeconfig()).await
    }

    /// The machine's address that every node and pod reaches: where registries
    /// listen. On the nodes, [`REGISTRY_HOSTS`] mean this address.
    pub fn registry_address(&self) -> Ipv4Addr {
        self.network.gateway()
    }

    /// Its nodes, in the order of the options.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node of this name.
    ///
    /// # Errors
    /// There is none; the message names those that there are.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes.iter().find(|node| node.name() == name).with_context(|| {
            let names: Vec<&str> = self.nodes.iter().map(Node::name).collect();
            format!("no node {name:?} in the cluster {}; there are: {}", self.name, names.join(", "))
        })
    }

    /// Lets every node pull from `host_port` by plain HTTP.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn trust_registry(&self, host_port: &str) -> Result<()> {
        self.nodes.iter().try_for_each(|node| node.trust_registry(host_port))
    }

    /// Imports an image archive on every node, side by side.
    ///
    /// # Errors
    /// A node's `ctr` failed.
    pub fn load_image(&self, archive: &Path) -> Result<()> {
        each(&self.nodes, |node| node.load_image(archive))
    }

    /// A command for `kubectl` with the administrator's rights.
    ///
    /// # Errors
    /// It is not built.
    pub fn kubectl<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Result<Command> {
        let mut command = Command::new(tools::kubernetes()?.join("kubectl"));
        command.env("KUBECONFIG", self.kubeconfig()).args(args);
        Ok(command)
    }

    /// A command for `helm` with the administrator's rights.
    ///
    /// # Errors
    /// It is not built.
    pub fn helm<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Result<Command> {
        let mut command = Command::new(tools::helm()?);
        command.env("KUBECONFIG", self.kubeconfig()).args(args);
        Ok(command)
    }

    /// Every daemon, and whether it runs.
    pub fn status(&self) -> Vec<Status> {
        let nodes = self.nodes.iter().flat_map(Node::services);
        let services = self.control_plane.services().into_iter().chain(nodes);
        services
            .map(|service| Status { daemon: service.name.clone(), pid: service.pid(), log: service.log() })
            .collect()
    }

    /// What of the cluster is not as it must be; None if all is well.
    ///
    /// # Errors
    /// The API server does not answer.
    pub fn unready(&self) -> Result<Option<String>> {
        api::unready(&self.kubeconfig(), self.nodes.len())
    }

    /// Every request that [`Options::audited`] made: events of `audit.k8s.io/v1`, one a line.
    ///
    /// # Errors
    /// Nobody's are written down.
    pub fn audit_log(&self) -> Result<PathBuf> {
        self.control_plane.audited.as_ref().context("the cluster was made without an audit")?;
        Ok(self.control_plane.audit_log())
    }

    /// Processor time that its processes have used, containers included; less that of those which were nobody's children
    /// and have ended, so that only the difference over a time in which no pod ends tells anything.
    pub fn processor_time(&self) -> Duration {
        let processes = self.cgroups.processes(&branch(&self.name));
        processes.into_iter().filter_map(host::processor_time_in_all).sum()
    }

    /// What it was made with.
    fn options(&self) -> Options {
        let nodes = self.nodes.iter().map(|node| node.spec.clone()).collect();
        Options { name: self.name.clone(), nodes, audited: self.control_plane.audited.clone() }
    }

    /// The cluster as it would be, nothing made.
    fn new(options: &Options, dir: PathBuf, network: Network) -> Result<Self> {
        let Options { name, nodes: specs, audited } = options;
        let (cgroups, branch, logs) = (Cgroups::detect()?, branch(name), dir.join("logs"));
        let service = |name: &str, leaf: &str| Service {
            name: name.to_owned(),
            logs: logs.clone(),
            cgroups: cgroups.clone(),
            cgroup: format!("{branch}/{leaf}"),
        };
        let control_plane = ControlPlane {
            dir: dir.join("control-plane"),
            network,
            audited: audited.clone(),
            etcd: service("etcd", "control-plane"),
            api_server: service("kube-apiserver", "control-plane"),
            controller_manager: service("kube-controller-manager", "control-plane"),
            scheduler: service("kube-scheduler", "control-plane"),
        };
        let node = |(index, spec): (usize, &NodeSpec)| {
            let daemon =
                |daemon: &str| service(&format!("{}-{daemon}", spec.name), &format!("{}-daemons", spec.name));
            Node {
                spec: spec.clone(),
                index,
                nodes: specs.len(),
                network,
                dir: dir.join("nodes").join(&spec.name),
                cgroup_root: format!("{branch}/{}", spec.name),
                holder: daemon("namespaces"),
                containerd: daemon("containerd"),
                kubelet: daemon("kubelet"),
                kube_proxy: daemon("kube-proxy"),
            }
        };
        let nodes = specs.iter().enumerate().map(node).collect();
        Ok(Self { name: name.to_owned(), dir, cgroups, network, control_plane, nodes })
    }

    /// Takes a network, and writes down what has to be removed before any of it
    /// is made.
    fn reserve(options: &Options) -> Result<Self> {
        let clusters = clusters()?;
        let lock = File::create(clusters.join(".network.lock"))?;
        lock.lock()?;
        let mut taken = Vec::new();
        for entry in fs::read_dir(&clusters)? {
            if let Ok(text) = fs::read(entry?.path().join("cluster.json")) {
                taken.push(serde_json::from_slice::<State>(&text).context("a cluster's state")?.network);
            }
        }
        let dir = directory(&options.name)?;
        let cluster = Self::new(options, dir, Network::pick(&taken)?)?;
        fs::create_dir_all(cluster.dir.join("logs"))?;
        rustix::fs::chmod(&cluster.dir, rustix::fs::Mode::RWXU)?;
        cluster.save(false)?;
        Ok(cluster)
    }

    fn save(&self, ready: bool) -> Result<()> {
        let Options { nodes, audited, .. } = self.options();
        let text = serde_json::to_vec_pretty(&State { network: self.network, nodes, audited, ready })?;
        let (new, file) = (self.dir.join("cluster.json.new"), self.dir.join("cluster.json"));
        fs::write(&new, text)?;
        fs::rename(&new, &file).with_context(|| format!("writing {}", file.display()))
    }
}

/// Removes all that a cluster made; no error if there is nothing.
fn remove(name: &str) -> Result<()> {
    let (dir, cgroups, branch) = (directory(name)?, Cgroups::detect()?, branch(name));
    cgroups.kill(&branch)?;
    if let Ok(text) = fs::read(dir.join("cluster.json")) {
        let state: State = serde_json::from_slice(&text).context("reading cluster.json")?;
        state.network.remove()?;
    }
    cgroups.remove(&branch)?;
    host::remove_tree(&dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_not_taken_twice() -> Result<()> {
        let first = Network::pick(&[])?;
        let second = Network::pick(&[first])?;
        assert_ne!(first, second);
        assert_ne!(first.gateway(), second.gateway());
        Ok(())
    }
}
