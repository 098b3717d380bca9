//! Nodes that are taken out of service, fill up, lose their agent or runtime, are replaced, or lack the sandbox image: each is
//! said, and a salvage between other nodes goes on meanwhile.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Node as NodeObject;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;
use tote_api::{Phase, SalvageJob, names};
use tote_e2e::containerd::PAUSE;
use tote_e2e::host;
use tote_e2e::registry::Control as _;
use tote_e2e::tenant::{PodShape, Tenant, imported_reason, phase};

use crate::faults::kill;
use crate::play::Play;
use crate::stage::{Alone, SOON, Scenario};

/// For a daemon that is ended and started again, and for kubelet to come back with all its pods.
const LONG: Duration = Duration::from_secs(120);

pub fn all() -> Vec<Scenario> {
    let all = [
        Scenario::new("target_cordoned", "n1", "n2", cordoned),
        Scenario::new("source_cordoned", "n1", "n2", source_cordoned),
        Scenario::new("target_under_disk_pressure", "n1", "n2", disk_pressure),
        Scenario::new("target_agent_away", "n1", "n3", target_agent_away),
        Scenario::new("source_agent_away", "n1", "n2", source_agent_away),
        Scenario::new("target_runtime_down", "n1", "n3", runtime_down),
        Scenario::new("target_replaced", "n1", "n3", replaced),
        Scenario::new("sandbox_image_missing", "n1", "n2", sandbox_image_missing),
    ];
    all.into_iter().map(|one| one.alone(Alone::Operator)).collect()
}

/// Pulled on the source, the registry stopped; the reference by digest.
async fn on_source(play: &Play) -> Result<String> {
    let (_, pinned) = play.push(&play.image("tiny")?).await?;
    play.pull_on_source(&pinned).await?;
    play.registry.stop()?;
    Ok(pinned)
}

/// Waits until the named job is in a phase for a reason, and returns the message.
async fn until(tenant: &Tenant, name: &str, wanted: Phase, reason: &str) -> Result<String> {
    let is = |job: &SalvageJob| {
        job.name_any() == name && phase(job) == Some(wanted) && imported_reason(job).0 == reason
    };
    let job = tenant.until_job(&format!("{name} that is {wanted:?} for {reason}"), LONG, is).await?;
    Ok(imported_reason(&job).1)
}

/// A job by hand for the scenario's image on a node.
async fn declare(play: &Play, name: &str, image: &str, node: &str) -> Result<()> {
    play.tenant.declare(name, json!({ "image": image, "nodeName": node })).await?;
    Ok(())
}

/// Another salvage to another node goes on.
async fn others_go_on(play: &Play, image: &str, node: &str) -> Result<()> {
    declare(play, "other", image, node).await?;
    until(&play.tenant, "other", Phase::Imported, "Imported").await.map(drop)
}

fn nodes(play: &Play) -> Api<NodeObject> {
    Api::all(play.tenant.client())
}

/// Waits for an event of tote's about a node; they are kept in namespace `default`.
async fn node_event(play: &Play, node: &str, reason: &str) -> Result<String> {
    let default = Tenant::of(play.tenant.client(), "default");
    play.tenant
        .until(&format!("event {reason} on node {node}"), LONG, || async {
            let events = default.events(node).await?;
            Ok(events.into_iter().find(|(r, _)| r == reason).map(|(_, note)| note))
        })
        .await
}

/// `kubectl cordon` or `uncordon`.
fn kubectl(play: &Play, word: &str, node: &str) -> Result<()> {
    let mut command = play.cluster().kubectl(&[word, node])?;
    tokio::task::block_in_place(|| host::run(&mut command)).map(drop)
}

async fn cordoned(play: Play) -> Result<()> {
    let image = on_source(&play).await?;
    kubectl(&play, "cordon", "n2")?;
    let seen = async {
        play.start_on_target("waiting", &image).await?;
        let is = |job: &SalvageJob| imported_reason(job).0 == "TargetCordoned";
        let job = play.tenant.until_job("that is held by the cordon", SOON, is).await?;
        ensure!(imported_reason(&job).1.contains("kubectl uncordon n2"), "{:?}", job.status);
        others_go_on(&play, &image, "n3").await
    };
    let seen = seen.await;
    kubectl(&play, "uncordon", "n2")?;
    seen?;
    play.tenant.running("waiting", SOON).await.map(drop)
}

/// A node that is to be drained may hold the last copy: it takes no more, and gives what it has.
async fn source_cordoned(play: Play) -> Result<()> {
    let image = on_source(&play).await?;
    kubectl(&play, "cordon", "n1")?;
    let seen = async {
        play.start_on_target("waiting", &image).await?;
        let job = play.tenant.imported(SOON).await?;
        let sources = job.status.map(|status| status.source_nodes).unwrap_or_default();
        ensure!(sources == ["n1"], "it came from {sources:?}");
        let given = nodes(&play).get("n1").await?;
        ensure!(given.spec.and_then(|spec| spec.unschedulable) == Some(true), "n1 is not cordoned any more");
        play.tenant.running("waiting", SOON).await.map(drop)
    };
    let seen = seen.await;
    kubectl(&play, "uncordon", "n1")?;
    seen
}

/// kubelet would take the condition back within 10 s; while it is away nobody does, for the 40 s that it is waited for.
async fn disk_pressure(play: Play) -> Result<()> {
    let image = on_source(&play).await?;
    let node = play.cluster().node("n2")?;
    node.stop_kubelet()?;
    let seen = async {
        let full = json!({"status": {"conditions": [{"type": "DiskPressure", "status": "True",
            "reason": "KubeletHasDiskPressure", "message": "as a test has it"}]}});
        let patch = Patch::Strategic(full);
        nodes(&play).patch_status("n2", &PatchParams::default(), &patch).await?;
        declare(&play, "full", &image, "n2").await?;
        let message = until(&play.tenant, "full", Phase::Pending, "TargetDiskPressure").await?;
        ensure!(message.contains("free space"), "{message}");
        others_go_on(&play, &image, "n3").await
    };
    let seen = seen.await;
    node.start_kubelet()?;
    seen?;
    until(&play.tenant, "full", Phase::Imported, "Imported").await.map(drop)
}

/// Without kubelet nobody starts an agent again that dies.
async fn without_agent<F: Future<Output = Result<()>>>(play: &Play, node: &str, seen: F) -> Result<()> {
    let daemon = play.cluster().node(node)?;
    daemon.stop_kubelet()?;
    let outcome = match kill(play, "agent", Some(node)).await {
        Ok(()) => seen.await,
        Err(error) => Err(error),
    };
    daemon.start_kubelet()?;
    outcome
}

async fn target_agent_away(play: Play) -> Result<()> {
    let image = on_source(&play).await?;
    let seen = Box::pin(async {
        declare(&play, "away", &image, "n3").await?;
        let message = until(&play.tenant, "away", Phase::Pending, "TargetUnavailable").await?;
        ensure!(message.contains("the agent on node n3"), "{message}");
        others_go_on(&play, &image, "n2").await
    });
    without_agent(&play, "n3", seen).await?;
    until(&play.tenant, "away", Phase::Imported, "Imported").await.map(drop)
}

async fn source_agent_away(play: Play) -> Result<()> {
    let image = on_source(&play).await?;
    let elsewhere = play.image_seeded("tiny", "elsewhere")?;
    play.registry.heal()?;
    let (_, elsewhere) = play.push_as(&elsewhere, "elsewhere").await?;
    play.pull_on("elsewhere", "n3", &elsewhere).await?;
    play.registry.stop()?;
    let seen = Box::pin(async {
        declare(&play, "away", &image, "n2").await?;
        let message = until(&play.tenant, "away", Phase::Pending, "SourceUnavailable").await?;
        ensure!(message.contains("n1 did when last heard of"), "{message}");
        others_go_on(&play, &elsewhere, "n2").await
    });
    without_agent(&play, "n1", seen).await?;
    until(&play.tenant, "away", Phase::Imported, "Imported").await.map(drop)
}

async fn runtime_down(play: Play) -> Result<()> {
    let image = on_source(&play).await?;
    let node = play.cluster().node("n3")?;
    node.stop_containerd()?;
    let seen = async {
        let told = node_event(&play, "n3", names::event::RUNTIME_DOWN).await?;
        ensure!(told.contains("node n3 is down"), "{told}");
        declare(&play, "down", &image, "n3").await?;
        until(&play.tenant, "down", Phase::Pending, "RuntimeUnavailable").await?;
        others_go_on(&play, &image, "n2").await
    };
    let seen = seen.await;
    node.start_containerd()?;
    seen?;
    until(&play.tenant, "down", Phase::Imported, "Imported").await.map(drop)
}

/// The Node object is deleted; kubelet registers another one when it starts again.
async fn replaced(play: Play) -> Result<()> {
    let image = on_source(&play).await?;
    let nowhere = format!("registry.test/x@sha256:{}", "ef".repeat(32));
    declare(&play, "old", &nowhere, "n3").await?;
    until(&play.tenant, "old", Phase::Pending, "NoSource").await?;
    nodes(&play).delete("n3", &DeleteParams::default()).await?;
    let seen = async {
        let message = until(&play.tenant, "old", Phase::Pending, "NodeNotFound").await?;
        ensure!(message.contains("node n3 is gone"), "{message}");
        others_go_on(&play, &image, "n2").await
    };
    let seen = seen.await;
    play.cluster().node("n3")?.restart_kubelet()?;
    seen?;
    until(&play.tenant, "old", Phase::Failed, "NodeReplaced").await?;
    declare(&play, "new", &image, "n3").await?;
    until(&play.tenant, "new", Phase::Imported, "Imported").await.map(drop)
}

async fn sandbox_image_missing(play: Play) -> Result<()> {
    let outcome = without_sandbox_image(&play).await;
    // For those who come after: without it no pod would start there, and what was salvaged may be without its layer's blob, for that
    // stands unpacked below the sandboxes that run.
    let archive = play.cluster().dir().join("pause.tar");
    let loaded = tokio::task::block_in_place(|| play.target()?.load_image(&archive));
    outcome?;
    loaded
}

async fn without_sandbox_image(play: &Play) -> Result<()> {
    let image = on_source(play).await?;
    let node = play.target()?;
    declare(play, "image", &image, "n2").await?;
    until(&play.tenant, "image", Phase::Imported, "Imported").await?;
    // No registry serves it: its name leads to a port of the node itself where nobody listens.
    node.ctr(&["images", "remove", "--sync", PAUSE])?;
    let shape = PodShape { opted_in: false, ..PodShape::new("n2", &image) };
    play.tenant.start("stuck", &shape).await?;
    let told = node_event(play, "n2", names::event::SANDBOX_IMAGE_MISSING).await?;
    for word in [PAUSE, "SalvageJob", "nodeName n2", "io.cri-containerd.pinned=pinned"] {
        ensure!(told.contains(word), "{word} is not in {told}");
    }
    others_go_on(play, &image, "n3").await?;
    // What the note says to do.
    declare(play, "sandbox", PAUSE, "n2").await?;
    until(&play.tenant, "sandbox", Phase::Imported, "Imported").await?;
    node.ctr(&["images", "label", PAUSE, "io.cri-containerd.pinned=pinned"])?;
    play.tenant.running("stuck", LONG).await.context("the sandbox image is there")?;
    Ok(())
}
