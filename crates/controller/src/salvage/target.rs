//! Whether a job's node can take an image now.

use super::job::{Job, Run};
use super::plan::{Step, wait};
use crate::world::World;

/// What keeps the job's node from taking the image; `None` if nothing does.
///
/// A node that is not Ready is no obstacle as long as its agent and containerd answer: the image is there when kubelet is back.
pub(super) fn unfit(job: &Job, world: &World) -> Option<Step> {
    let node = &*job.spec.node_name;
    let Some(facts) = world.nodes.get(node) else {
        let message = match job.status.node_uid {
            None => format!("there is no node {node}: the job waits for one of that name"),
            Some(_) => format!("node {node} is gone; one that comes under its name needs a new SalvageJob"),
        };
        return Some(wait("NodeNotFound", message));
    };
    if job.status.node_uid.as_ref().is_some_and(|known| **known != *facts.uid) {
        let message = format!("node {node} is not the one that the job was made for: make a new SalvageJob");
        return Some(Step::Fail { reason: "NodeReplaced", message });
    }
    if facts.disk_pressure {
        // kubelet evicts pods and deletes images there: what is brought would make it worse.
        return Some(Step::Wait {
            reason: "TargetDiskPressure",
            message: format!(
                "node {node} is under DiskPressure: free space on the file system of containerd, then the job goes on"
            ),
            cancel: true,
            access: None,
        });
    }
    // Who makes a job by hand has chosen the node; and what has begun is let end.
    if facts.cordoned && job.automatic && !job.has_begun() {
        let message = format!(
            "node {node} is cordoned: kubectl uncordon {node}, let the pod go to another node, or make a SalvageJob by hand"
        );
        return Some(wait("TargetCordoned", message));
    }
    if world.is_runtime_down(node) && !matches!(job.run, Run::Running { .. }) {
        let message =
            format!("the container runtime of node {node} does not answer: look at containerd there");
        return Some(wait("RuntimeUnavailable", message));
    }
    let Some(target) = world.fleet.node(node) else {
        let message = format!(
            "the agent on node {node} does not answer: look at its pod there, kubectl get pods -A -o wide \
             --field-selector spec.nodeName={node}"
        );
        return Some(wait("TargetUnavailable", message));
    };
    if !target.problem.is_empty() {
        let message = format!("node {node} cannot take images: {}", target.problem);
        return Some(wait("TargetNotUsable", message));
    }
    None
}
