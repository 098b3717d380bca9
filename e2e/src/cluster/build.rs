//! How a cluster comes up: control plane and nodes side by side, until the first pod can be made. Must not know of other
//! clusters, nor clean up after itself: whoever calls removes what is half made.

use std::time::Duration;

use anyhow::{Result, anyhow, bail};

use super::node::Node;
use super::place::branch;
use super::{Cluster, Progress, control_plane, files, pki};
use crate::images::{self, Layout};
use crate::{host, tools};

impl Cluster {
    /// Makes and starts all of it, and returns when pods can be made.
    pub(super) fn build(&self, progress: Progress<'_>) -> Result<()> {
        let branch = branch(&self.name);
        self.cgroups.create(&format!("{branch}/control-plane"))?;
        for node in &self.nodes {
            self.cgroups.create(&format!("{branch}/{}-daemons", node.name()))?;
            self.cgroups.create_parent(&node.cgroup_root)?;
        }
        self.network.make_bridge()?;
        control_plane::make_dirs(&self.control_plane.dir)?;
        let authority = pki::Authority::new(&format!("tote-{}", self.name))?;
        self.control_plane.write_files(&authority)?;
        let pause = self.dir.join("pause.tar");
        images::pause(&Layout::temporary()?)?.write_archive(&pause, crate::containerd::PAUSE)?;

        progress(&format!(
            "starting Kubernetes {} and {} nodes (cgroup v{}, {})",
            tools::kubernetes_version(),
            self.nodes.len(),
            self.cgroups.version(),
            self.network.all()
        ));
        std::thread::scope(|scope| {
            let control_plane = scope.spawn(|| {
                self.control_plane.start()?;
                progress("the API server answers");
                Ok::<(), anyhow::Error>(())
            });
            let nodes = each(&self.nodes, |node| {
                node.prepare(&pause)?;
                progress(&format!("{}: {} answers", node.name(), node.version()));
                files::write_certificates(node, &authority, &self.control_plane.server())
            });
            control_plane.join().map_err(|_| anyhow!("starting the control plane panicked"))?.and(nodes)
        })?;
        each(&self.nodes, Node::join)?;
        self.await_ready(progress)
    }

    /// Waits until the first pod can be made, on any node.
    fn await_ready(&self, progress: Progress<'_>) -> Result<()> {
        let mut last = String::new();
        host::wait_until("every node is Ready", Duration::from_secs(90), || {
            for service in self.nodes.iter().flat_map(Node::services) {
                if service.pid().is_none() {
                    bail!("{} has ended; {}", service.name, service.last_words());
                }
            }
            let unready = self.unready()?;
            if let Some(what) = unready.as_ref().filter(|what| **what != last) {
                progress(what);
                last.clone_from(what);
            }
            Ok(unready.is_none())
        })?;
        host::wait_until("every node reaches the API by its service", Duration::from_secs(60), || {
            Ok(self.nodes.iter().all(Node::reaches_api))
        })?;
        progress(&format!("{} nodes are Ready", self.nodes.len()));
        Ok(())
    }
}

/// Does the same for every node, side by side; the first error counts.
pub(super) fn each(nodes: &[Node], task: impl Fn(&Node) -> Result<()> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = nodes.iter().map(|node| scope.spawn(|| task(node))).collect();
        let results: Vec<Result<()>> = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("a thread panicked"))))
            .collect();
        results.into_iter().collect()
    })
}
