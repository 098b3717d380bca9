//! Kills in the middle of a transfer of 500 MB, whose bandwidth is capped so that there is a middle.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{DeleteParams, ListParams};
use serde_json::json;
use tote_api::SalvageJob;
use tote_e2e::cluster::Node;
use tote_e2e::{inspect, operator};

use crate::stage::{Alone, Play, Scenario};

/// For what is left of 500 MB at the cap, once more in the worst case, and for a dead leader's Lease to run out.
const LONG: Duration = Duration::from_secs(180);

pub fn all() -> Vec<Scenario> {
    let one = |name, target, play| Scenario {
        name,
        source: "n1",
        target,
        also: None,
        alone: Alone::Operator,
        play,
    };
    vec![
        one("midway_controller_killed", "n2", |p| Box::pin(controller_killed(p))),
        one("midway_target_agent_killed", "n3", |p| Box::pin(agent_killed(p, "n3"))),
        one("midway_source_agent_killed", "n2", |p| Box::pin(agent_killed(p, "n1"))),
        one("midway_target_containerd_restarted", "n3", |p| Box::pin(containerd_restarted(p, "n3"))),
        one("midway_source_containerd_restarted", "n2", |p| Box::pin(containerd_restarted(p, "n1"))),
        one("midway_job_deleted", "n3", |p| Box::pin(job_deleted(p))),
        one("midway_namespace_deleted", "n2", |p| Box::pin(namespace_deleted(p))),
        one("midway_helm_uninstalled", "n3", |p| Box::pin(helm_uninstalled(p))),
    ]
}

/// Starts a job and waits until its status says that 10 to 90 % were moved.
async fn half_way(play: &Play) -> Result<()> {
    let big = play.big().await?;
    let image = big.reference.clone();
    // What an earlier scenario that failed has left would count as moved.
    if !inspect::records(play.target()?, big.image.digest())?.is_empty() {
        inspect::remove_whole(play.target()?, &big.image)?;
    }
    inspect::assert_gone(play.target()?, &big.image)?;
    play.tenant.declare("big", json!({ "image": image, "nodeName": play.target()?.name() })).await?;
    let begun = |job: &SalvageJob| share_moved(job) >= 10;
    let job = play.tenant.until_job("a tenth of which is moved", LONG, begun).await?;
    let share = share_moved(&job);
    ensure!(share <= 90, "{share} % were moved when it was first seen");
    println!("the fault hits at {share} %");
    Ok(())
}

/// Percent of the bytes that have come from other nodes, by the job's status.
fn share_moved(job: &SalvageJob) -> i64 {
    let transfer = job.status.as_ref().and_then(|status| status.transfer).unwrap_or_default();
    transfer.transferred_bytes * 100 / transfer.total_bytes.max(1)
}

/// The job still ends Imported, nothing is left unfinished, and the image is whole.
async fn ends_well(play: &Play) -> Result<()> {
    play.tenant.imported(LONG).await?;
    play.assert_nothing_unfinished(&play.big().await?.image).await?;
    let big = play.big().await?;
    let target = play.target()?;
    inspect::assert_whole(target, &big.reference)?;
    inspect::collect_garbage(target)?;
    inspect::assert_whole(target, &big.reference)?;
    inspect::remove_whole(target, &big.image)
}

/// Nothing of the image is on the target, and nothing is under way.
async fn ends_without_trace(play: &Play) -> Result<()> {
    play.assert_nothing_unfinished(&play.big().await?.image).await?;
    inspect::assert_gone(play.target()?, &play.big().await?.image)
}

async fn controller_killed(play: Play) -> Result<()> {
    half_way(&play).await?;
    kill(&play, "controller", None).await?;
    ends_well(&play).await
}

async fn agent_killed(play: Play, node: &str) -> Result<()> {
    half_way(&play).await?;
    kill(&play, "agent", Some(node)).await?;
    ends_well(&play).await
}

async fn containerd_restarted(play: Play, node: &str) -> Result<()> {
    half_way(&play).await?;
    let node = play.cluster().node(node)?;
    node.kill_containerd()?;
    node.start_containerd()?;
    ends_well(&play).await
}

async fn job_deleted(play: Play) -> Result<()> {
    half_way(&play).await?;
    play.tenant.jobs().delete("big", &DeleteParams::default()).await?;
    ends_without_trace(&play).await
}

async fn namespace_deleted(play: Play) -> Result<()> {
    half_way(&play).await?;
    play.tenant.clone().leave().await?;
    ends_without_trace(&play).await
}

/// Uninstalling does not hang. What the agents left goes two minutes after they are back and nobody claims it.
async fn helm_uninstalled(play: Play) -> Result<()> {
    half_way(&play).await?;
    operator::uninstall(play.cluster())?;
    play.tenant.clone().leave().await?;
    play.install_operator()?;
    play.nothing_unfinished_within(&play.big().await?.image, LONG).await?;
    ends_without_trace(&play).await
}

/// SIGKILL to the container of a component, on a node or wherever it runs.
async fn kill(play: &Play, component: &str, node: Option<&str>) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(play.tenant.client(), operator::NAMESPACE);
    let labels = ListParams::default().labels(&format!("app.kubernetes.io/component={component}"));
    let listed = pods.list(&labels).await?.items;
    let on = |pod: &Pod| pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
    let pod = listed.iter().find(|pod| node.is_none_or(|node| on(pod) == node));
    let pod = pod.with_context(|| format!("no {component} on {node:?}"))?;
    let statuses =
        pod.status.as_ref().and_then(|status| status.container_statuses.as_deref()).unwrap_or_default();
    let id = statuses.first().and_then(|container| container.container_id.as_deref());
    let Some(id) = id.and_then(|id| id.strip_prefix("containerd://")) else {
        bail!("{component} has no container")
    };
    let node: &Node = play.cluster().node(&on(pod))?;
    node.ctr(&["tasks", "kill", "--signal", "SIGKILL", id])?;
    Ok(())
}
