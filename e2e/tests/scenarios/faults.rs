//! Kills in the middle of a transfer of 500 MB, whose bandwidth is capped so that there is a middle.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;
use tote_api::{Phase, SalvageJob};
use tote_e2e::cluster::Node;
use tote_e2e::registry::Control as _;
use tote_e2e::tenant::{PodShape, imported_reason, phase};
use tote_e2e::{host, inspect, operator};

use crate::known::{agents, authority_gone};
use crate::play::Play;
use crate::stage::{Alone, SOON, Scenario};

/// For what is left of 500 MB at the cap, once more in the worst case, and for a dead leader's Lease to run out.
const LONG: Duration = Duration::from_secs(180);

/// For showing that nothing happens.
const A_WHILE: Duration = Duration::from_secs(5);

pub fn all() -> Vec<Scenario> {
    let all = [
        Scenario::new("midway_controller_killed", "n1", "n2", controller_killed),
        Scenario::new("midway_target_agent_killed", "n1", "n3", |p| agent_killed(p, "n3")),
        Scenario::new("midway_source_agent_killed", "n1", "n2", |p| agent_killed(p, "n1")),
        Scenario::new("midway_target_containerd_restarted", "n1", "n3", |p| containerd_restarted(p, "n3")),
        Scenario::new("midway_source_containerd_restarted", "n1", "n2", |p| containerd_restarted(p, "n1")),
        Scenario::new("midway_leader_gone", "n1", "n3", leader_gone),
        Scenario::new("midway_rollout", "n1", "n2", rollout),
        Scenario::new("midway_switched_off", "n1", "n3", switched_off),
        Scenario::new("midway_suspended", "n1", "n2", suspended),
        Scenario::new("midway_pull_wins", "n1", "n2", pull_wins),
        Scenario::new("midway_job_deleted", "n1", "n3", job_deleted),
        Scenario::new("midway_namespace_deleted", "n1", "n2", namespace_deleted),
        Scenario::new("midway_helm_uninstalled", "n1", "n3", helm_uninstalled),
    ];
    all.into_iter().map(|one| one.alone(Alone::Operator)).collect()
}

/// Starts a job and waits until its status says that 10 to 90 % were moved.
pub async fn half_way(play: &Play) -> Result<()> {
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
pub fn share_moved(job: &SalvageJob) -> i64 {
    let transfer = job.status.as_ref().and_then(|status| status.transfer).unwrap_or_default();
    transfer.transferred_bytes * 100 / transfer.total_bytes.max(1)
}

/// The job still ends Imported, nothing is left unfinished, and the image is whole: a pod runs it without a pull, on
/// the root file system that the source's has.
pub async fn ends_well(play: &Play) -> Result<SalvageJob> {
    let job = play.tenant.imported(LONG).await?;
    let big = play.big().await?;
    play.assert_nothing_unfinished(&big.image).await?;
    let target = play.target()?;
    let shape = PodShape {
        pull_policy: Some("Never"),
        opted_in: false,
        ..PodShape::new(target.name(), &big.reference)
    };
    play.tenant.start("waiting", &shape).await?;
    play.tenant.running("waiting", SOON).await?;
    play.assert_same_root((&big.tenant, "source"), "waiting", target).await?;
    inspect::assert_whole(target, &big.reference)?;
    inspect::collect_garbage(target)?;
    inspect::assert_whole(target, &big.reference)?;
    play.stop_pod("waiting").await?;
    inspect::remove_whole(target, &big.image)?;
    Ok(job)
}

/// Nothing of the image is on the target, and nothing is under way.
async fn ends_without_trace(play: &Play) -> Result<()> {
    play.assert_nothing_unfinished(&play.big().await?.image).await?;
    inspect::assert_gone(play.target()?, &play.big().await?.image)
}

async fn controller_killed(play: Play) -> Result<()> {
    half_way(&play).await?;
    kill(&play, "controller", None).await?;
    ends_well(&play).await.map(drop)
}

/// The leader dies without giving its Lease back, and never comes again: another waits until it has run out.
async fn leader_gone(play: Play) -> Result<()> {
    half_way(&play).await?;
    let former = leader(&play).await?.context("nobody leads")?;
    kill(&play, "controller", None).await?;
    let pods: Api<Pod> = Api::namespaced(play.tenant.client(), operator::NAMESPACE);
    pods.delete(&former, &DeleteParams::default().grace_period(0)).await?;
    play.tenant
        .until("another controller to lead", LONG, || async {
            Ok(leader(&play).await?.filter(|now| *now != former))
        })
        .await?;
    ends_well(&play).await.map(drop)
}

/// Two controllers for a moment: the second leads and takes up what the first began.
async fn rollout(play: Play) -> Result<()> {
    half_way(&play).await?;
    let former = leader(&play).await?;
    let rollout = |arguments: &[&str]| -> Result<()> {
        let all = [&["-n", operator::NAMESPACE, "rollout"], arguments].concat();
        let mut command = play.cluster().kubectl(&all)?;
        tokio::task::block_in_place(|| host::run(&mut command)).map(drop)
    };
    rollout(&["restart", "deploy/tote"])?;
    rollout(&["status", "deploy/tote", "--timeout=60s"])?;
    play.tenant
        .until("another controller to lead", SOON, || async {
            Ok(leader(&play).await?.filter(|now| Some(now) != former.as_ref()))
        })
        .await?;
    let job = ends_well(&play).await?;
    let attempts = job.status.map_or(0, |status| status.attempts);
    ensure!(attempts == 1, "taken up again, and not begun anew: {attempts} attempts");
    Ok(())
}

/// The controller that leads, by its Lease.
async fn leader(play: &Play) -> Result<Option<String>> {
    let leases: Api<Lease> = Api::namespaced(play.tenant.client(), operator::NAMESPACE);
    Ok(leases.get("tote").await?.spec.and_then(|spec| spec.holder_identity).filter(|name| !name.is_empty()))
}

/// The kill switch ends what runs, though a new controller finds it; released, the job goes on.
/// What runs ends, and what begins to wait meanwhile is seen to when it is lifted.
async fn switched_off(play: Play) -> Result<()> {
    let (_, pinned) = play.push(&play.image("tiny")?).await?;
    play.pull_on_source(&pinned).await?;
    play.registry.stop()?;
    half_way(&play).await?;
    play.upgrade_operator(&["config.enabled=false"])?;
    let off = |job: &SalvageJob| imported_reason(job).0 == "Disabled";
    let outcome = async {
        play.tenant.until_job("that is Disabled", SOON, off).await?;
        play.assert_nothing_unfinished(&play.big().await?.image).await?;
        play.start_on_target("later", &pinned).await?;
        play.tenant.failing("later", &["ErrImagePull", "ImagePullBackOff"], SOON).await
    };
    let outcome = outcome.await;
    let jobs = play.tenant.jobs().list(&ListParams::default()).await?.items.len();
    play.install_operator()?;
    outcome?;
    ensure!(jobs == 1, "{jobs} jobs while it was switched off");
    play.tenant.running("later", SOON).await?;
    let is_big = |job: &SalvageJob| job.name_any() == "big" && phase(job) == Some(Phase::Imported);
    play.tenant.until_job("big that is Imported", LONG, is_big).await?;
    ends_well(&play).await.map(drop)
}

/// Suspended, the transfer ends and leaves nothing on the target, and stays so; released, it begins anew.
async fn suspended(play: Play) -> Result<()> {
    half_way(&play).await?;
    let big = play.big().await?;
    let target = play.target()?.name();
    let suspend = |value: bool| {
        let spec = json!({"image": big.reference, "nodeName": target, "suspend": value});
        play.tenant.declare("big", spec)
    };
    suspend(true).await?;
    let held = |job: &SalvageJob| phase(job) == Some(Phase::Pending) && imported_reason(job).0 == "Suspended";
    play.tenant.until_job("that is Suspended", SOON, held).await?;
    ends_without_trace(&play).await?;
    let moves = || async { Ok(Some(play.tenant.jobs().get("big").await?).filter(|job| !held(job))) };
    play.tenant.never("the job went on", A_WHILE, moves).await?;
    ends_without_trace(&play).await?;
    suspend(false).await?;
    ends_well(&play).await.map(drop)
}

/// The registry is there again and kubelet's own pull is over before the import is.
async fn pull_wins(play: Play) -> Result<()> {
    half_way(&play).await?;
    let big = play.big().await?;
    let shape = PodShape {
        pull_policy: Some("Always"),
        opted_in: false,
        ..PodShape::new(play.target()?.name(), &big.reference)
    };
    big.registry.heal()?;
    play.tenant.start("puller", &shape).await?;
    let pulled = play.tenant.event("puller", "Pulled", LONG).await;
    let job = play.tenant.jobs().get("big").await?;
    big.registry.stop()?;
    println!("{}", pulled?);
    ensure!(phase(&job) == Some(Phase::Transferring), "the import was not under way: {:?}", job.status);
    play.tenant.running("puller", SOON).await?;
    play.tenant.imported(LONG).await?;
    play.stop_pod("puller").await?;
    ends_well(&play).await.map(drop)
}

/// Bytes that have come from other nodes, by the job's status.
fn moved(job: &SalvageJob) -> Result<u64> {
    let transfer = job.status.as_ref().and_then(|status| status.transfer).unwrap_or_default();
    Ok(transfer.transferred_bytes.try_into()?)
}

/// That of what had come before the fault less than a half came again; `all` are the bytes that came in all.
async fn not_again(play: &Play, all: u64, had: u64) -> Result<()> {
    let size = play.big().await?.image.needed_bytes()?;
    println!("{all} bytes came of an image of {size}, {had} of them before the fault");
    ensure!(all < size + had / 2, "{all} bytes came of an image of {size}, {had} of them before the fault");
    Ok(())
}

async fn agent_killed(play: Play, node: &str) -> Result<()> {
    half_way(&play).await?;
    let had = moved(&play.tenant.jobs().get("big").await?)?;
    kill(&play, "agent", Some(node)).await?;
    let job = ends_well(&play).await?;
    let all = if play.target()?.name() == node {
        // It counts from its start on; the status does not tell what came twice within an attempt.
        let agents = agents(&play).await?;
        let agent = agents.iter().find(|agent| agent.node == node).context("no agent on the target")?;
        had + agent.metric(&play.tenant.client(), "tote_agent_received_bytes_total").await?
    } else {
        moved(&job)?
    };
    not_again(&play, all, had).await
}

async fn containerd_restarted(play: Play, node: &str) -> Result<()> {
    half_way(&play).await?;
    let had = moved(&play.tenant.jobs().get("big").await?)?;
    let node = play.cluster().node(node)?;
    node.kill_containerd()?;
    node.start_containerd()?;
    let job = ends_well(&play).await?;
    not_again(&play, moved(&job)?, had).await
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
    authority_gone(&play).await?;
    let job = play.tenant.jobs().get("big").await.context("the CRD and the jobs stay")?;
    ensure!(job.metadata.deletion_timestamp.is_none(), "the job is being deleted");
    play.tenant.clone().leave().await?;
    play.install_operator()?;
    play.nothing_unfinished_within(&play.big().await?.image, LONG).await?;
    ends_without_trace(&play).await
}

/// SIGKILL to the container of a component, on a node or wherever it runs.
pub async fn kill(play: &Play, component: &str, node: Option<&str>) -> Result<()> {
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
