//! What processes use: memory at most, and processor time.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt as _};

use crate::cluster::Cluster;
use crate::tenant::container_id;
use crate::{host, operator};

/// A process that is watched.
#[derive(Clone, Debug)]
pub struct Watched {
    /// `controller`, `agent n1`, `kubelets`, ...; several may share one.
    pub name: String,
    pid: u32,
    began: Used,
}

/// What a process has used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Used {
    /// Resident now, in bytes.
    pub resident: u64,
    /// Resident at most since it has been watched, in bytes.
    pub peak: u64,
    /// Processor time.
    pub cpu: Duration,
}

impl Watched {
    fn new(name: String, pid: u32) -> Result<Self> {
        // Forgets the peak so far, see proc_pid_clear_refs(5).
        let path = format!("/proc/{pid}/clear_refs");
        fs::write(&path, "5").with_context(|| format!("writing {path}"))?;
        Ok(Self { name, pid, began: used(pid)? })
    }

    /// Resident when it began to be watched, in bytes.
    pub fn before(&self) -> u64 {
        self.began.resident
    }

    /// What it has used since.
    ///
    /// # Errors
    /// It does not run any more.
    pub fn used(&self) -> Result<Used> {
        let now = used(self.pid).with_context(|| format!("{} has ended", self.name))?;
        Ok(Used { cpu: now.cpu.saturating_sub(self.began.cpu), ..now })
    }
}

fn used(pid: u32) -> Result<Used> {
    let cpu = host::processor_time(pid).context("the process has ended")?;
    Ok(Used { resident: host::resident(pid)?, peak: host::resident_at_most(pid)?, cpu })
}

/// The operator's processes, first the controller, then the agents by node.
///
/// # Errors
/// One of its pods has no process.
pub async fn operator(cluster: &Cluster, client: &Client) -> Result<Vec<Watched>> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), operator::NAMESPACE);
    let mut found = Vec::new();
    for pod in pods.list(&ListParams::default()).await? {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
        let id = container_id(&pod).with_context(|| format!("{} has no container", pod.name_any()))?;
        let pid = tokio::task::block_in_place(|| cluster.node(&node)?.process(id))?;
        let component = pod.labels().get("app.kubernetes.io/component").map_or("?", String::as_str);
        let name = if component == "agent" { format!("agent {node}") } else { component.to_owned() };
        found.push(Watched::new(name, pid)?);
    }
    found.sort_by_key(|watched| (watched.name.starts_with("agent"), watched.name.clone()));
    Ok(found)
}

/// The cluster's daemons; those of nodes by what they are.
///
/// # Errors
/// One does not run.
pub fn daemons(cluster: &Cluster) -> Result<Vec<Watched>> {
    let mut found = Vec::new();
    for status in cluster.status() {
        let name = cluster
            .nodes()
            .iter()
            .find_map(|node| status.daemon.strip_prefix(node.name())?.strip_prefix('-'))
            .unwrap_or(&status.daemon);
        if name != "namespaces" {
            let pid = status.pid.with_context(|| format!("{} does not run", status.daemon))?;
            found.push(Watched::new(name.to_owned(), pid)?);
        }
    }
    Ok(found)
}

/// Processor time of the whole machine that was not idle, of all processors together.
///
/// # Errors
/// `/proc/stat` cannot be read.
pub fn machine() -> Result<Duration> {
    let text = fs::read_to_string(Path::new("/proc/stat")).context("reading /proc/stat")?;
    let fields: Vec<u64> = text
        .lines()
        .next()
        .context("/proc/stat is empty")?
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    // user, nice, system, idle, iowait, irq, softirq; see proc_stat(5).
    let busy = fields.iter().take(7).sum::<u64>() - fields.iter().skip(3).take(2).sum::<u64>();
    Ok(host::ticks(busy))
}
