//! Opting in by what controls a pod, what a tag means to a workload, and containers of every kind that wait.

use std::fmt::Debug;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, StatefulSet};
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Resource, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tote_api::names::{AUTO_SALVAGE, event};
use tote_e2e::inspect;
use tote_e2e::registry::Control as _;
use tote_e2e::tenant::{PodShape, container_id, is_ready, waiting};

use crate::play::Play;
use crate::stage::{SOON, Scenario};

/// Reasons of a pull that fails.
const PULL: [&str; 2] = ["ErrImagePull", "ImagePullBackOff"];

/// For showing that nothing happens: several times what detection takes.
const A_WHILE: Duration = Duration::from_secs(5);

/// A `CronJob` begins at a full minute.
const NEXT_MINUTE: Duration = Duration::from_secs(150);

pub fn all() -> Vec<Scenario> {
    vec![
        Scenario::new("opted_in_by_deployment", "n1", "n2", |p| opted_in_by::<Deployment>(p, deployment)),
        Scenario::new("opted_in_by_stateful_set", "n2", "n3", |p| {
            opted_in_by::<StatefulSet>(p, stateful_set)
        }),
        Scenario::new("opted_in_by_daemon_set", "n1", "n3", |p| opted_in_by::<DaemonSet>(p, daemon_set)),
        Scenario::new("opted_in_by_job", "n3", "n2", |p| opted_in_by::<Job>(p, job)),
        Scenario::new("opted_in_by_cron_job", "n2", "n1", |p| opted_in_by::<CronJob>(p, cron_job)),
        Scenario::new("opted_in_later", "n1", "n2", opted_in_later),
        Scenario::new("false_on_the_pod", "n2", "n1", false_on_the_pod),
        Scenario::new("tag_by_workload", "n1", "n2", tag_by_workload).with("n3"),
        Scenario::new("ephemeral_container", "n1", "n3", ephemeral_container),
        // The containerd of n3 has no image volumes.
        Scenario::new("image_volume", "n1", "n2", image_volume),
        Scenario::new("restarted_container", "n1", "n3", restarted_container),
    ]
}

/// A pod template of one container, for a node, labelled `app=waiting`.
fn template(node: &str, image: &str) -> Value {
    json!({
        "metadata": { "labels": { "app": "waiting" } },
        "spec": {
            "nodeSelector": { "kubernetes.io/hostname": node },
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": false,
            "dnsPolicy": "Default",
            "tolerations": [{ "operator": "Exists" }],
            "containers": [{ "name": "main", "image": image, "imagePullPolicy": "IfNotPresent" }],
        },
    })
}

fn selecting(kind: &str, template: &Value) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": kind, "metadata": { "name": "waiting" },
        "spec": { "selector": { "matchLabels": { "app": "waiting" } }, "template": template },
    })
}

fn deployment(template: &Value) -> Value {
    selecting("Deployment", template)
}

fn daemon_set(template: &Value) -> Value {
    selecting("DaemonSet", template)
}

fn stateful_set(template: &Value) -> Value {
    let mut object = selecting("StatefulSet", template);
    object["spec"]["serviceName"] = json!("waiting");
    object
}

fn job(template: &Value) -> Value {
    let mut template = template.clone();
    template["spec"]["restartPolicy"] = json!("Never");
    json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": { "name": "waiting" },
        "spec": { "template": template },
    })
}

fn cron_job(template: &Value) -> Value {
    json!({
        "apiVersion": "batch/v1", "kind": "CronJob", "metadata": { "name": "waiting" },
        "spec": {
            "schedule": "* * * * *", "concurrencyPolicy": "Forbid",
            "jobTemplate": { "spec": job(template)["spec"] },
        },
    })
}

async fn create<K>(play: &Play, object: Value) -> Result<Api<K>>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + Debug
        + Serialize
        + DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(play.tenant.client(), play.tenant.namespace());
    api.create(&PostParams::default(), &serde_json::from_value(object)?)
        .await
        .context("creating the owner")?;
    Ok(api)
}

/// The pod of the template, once it satisfies a predicate.
async fn until_one(play: &Play, what: &str, deadline: Duration, is: impl Fn(&Pod) -> bool) -> Result<Pod> {
    let (pods, is) = (play.tenant.pods(), &is);
    let labels = ListParams::default().labels("app=waiting");
    play.tenant
        .until(&format!("a pod {what}"), deadline, || {
            let (pods, labels) = (pods.clone(), labels.clone());
            async move { Ok(pods.list(&labels).await?.into_iter().find(is)) }
        })
        .await
}

fn fails_to_pull(pod: &Pod) -> bool {
    waiting(pod).iter().any(|(reason, _)| PULL.contains(&reason.as_str()))
}

async fn no_job(play: &Play) -> Result<()> {
    let jobs = play.tenant.jobs();
    let look = || async { Ok(jobs.list(&ListParams::default()).await?.items.into_iter().next()) };
    play.tenant.never("a job was made", A_WHILE, look).await
}

async fn nothing_said(play: &Play, pod: &str) -> Result<()> {
    let said = play.tenant.events(pod).await?;
    ensure!(
        !said.iter().any(|(reason, _)| reason.starts_with("Image")),
        "events on a pod left alone: {said:?}"
    );
    Ok(())
}

/// Pulled on the source, then the registry stopped; the pinned reference.
async fn cached_on_source(play: &Play) -> Result<String> {
    let (_, pinned) = play.push(&play.image("tiny")?).await?;
    play.pull_on_source(&pinned).await?;
    play.registry.stop()?;
    Ok(pinned)
}

/// The annotation is on the object alone, not on its pods.
async fn opted_in_by<K>(play: Play, around: fn(&Value) -> Value) -> Result<()>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + Debug
        + Serialize
        + DeserializeOwned,
{
    let pinned = cached_on_source(&play).await?;
    let target = play.target()?.name().to_owned();
    let mut object = around(&template(&target, &pinned));
    object["metadata"]["annotations"] = json!({ AUTO_SALVAGE: "true" });
    create::<K>(&play, object).await?;
    let pod = until_one(&play, "to be ready", NEXT_MINUTE, is_ready).await?;
    ensure!(!pod.annotations().contains_key(AUTO_SALVAGE), "the pod itself says so");
    let job = play.tenant.imported(SOON).await?;
    ensure!(job.spec.node_name == target, "{} is not {target}", job.spec.node_name);
    play.tenant.event(&pod.name_any(), event::IMAGE_SALVAGED, SOON).await.map(drop)
}

async fn opted_in_later(play: Play) -> Result<()> {
    let pinned = cached_on_source(&play).await?;
    let target = play.target()?.name().to_owned();
    let deployments = create::<Deployment>(&play, deployment(&template(&target, &pinned))).await?;
    let pod = until_one(&play, "that cannot pull", SOON, fails_to_pull).await?.name_any();
    no_job(&play).await?;
    nothing_said(&play, &pod).await?;
    let yes = json!({ "metadata": { "annotations": { AUTO_SALVAGE: "true" } } });
    deployments.patch("waiting", &PatchParams::default(), &Patch::Merge(yes)).await?;
    play.tenant.until_job("for a pod that waits already", A_WHILE, |_| true).await?;
    let now = until_one(&play, "to be ready", SOON, is_ready).await?;
    ensure!(now.name_any() == pod, "opting in has replaced the pod");
    Ok(())
}

async fn false_on_the_pod(play: Play) -> Result<()> {
    let pinned = cached_on_source(&play).await?;
    let mut template = template(play.target()?.name(), &pinned);
    template["metadata"]["annotations"] = json!({ AUTO_SALVAGE: "false" });
    let mut object = deployment(&template);
    object["metadata"]["annotations"] = json!({ AUTO_SALVAGE: "true" });
    create::<Deployment>(&play, object).await?;
    let pod = until_one(&play, "that cannot pull", SOON, fails_to_pull).await?;
    no_job(&play).await?;
    nothing_said(&play, &pod.name_any()).await
}

/// The nodes disagree on a tag, and the workload has a pod that runs one of the two.
async fn tag_by_workload(play: Play) -> Result<()> {
    let (old, new) = (play.image_seeded("tiny", "old")?, play.image_seeded("tiny", "new")?);
    let (tagged, _) = play.push(&old).await?;
    let mut object = deployment(&template("n1", &tagged));
    object["metadata"]["annotations"] = json!({ AUTO_SALVAGE: "true" });
    let deployments = create::<Deployment>(&play, object).await?;
    let first = until_one(&play, "to be ready", SOON, is_ready).await?.name_any();
    play.push(&new).await?;
    play.pull_on("other", "n3", &tagged).await?;
    play.registry.stop()?;
    // A rollout that changes nothing but the node leaves the first pod until the second is ready.
    let target = play.target()?.name();
    let moved = json!({ "spec": {
        "strategy": { "rollingUpdate": { "maxUnavailable": 0, "maxSurge": 1 } },
        "template": { "spec": { "nodeSelector": { "kubernetes.io/hostname": target } } },
    } });
    deployments.patch("waiting", &PatchParams::default(), &Patch::Merge(moved)).await?;
    let second = until_one(&play, "to be ready on the other node", SOON, |pod| {
        pod.name_any() != first && is_ready(pod)
    });
    let note = play.tenant.event(&second.await?.name_any(), event::IMAGE_SALVAGEABLE, SOON).await?;
    ensure!(note.contains(old.digest()) && note.contains("of this workload"), "{note}");
    Ok(())
}

/// Two images: one that both nodes have and the target's pod runs, one that only the source has.
async fn one_here_one_there(play: &Play) -> Result<(String, String)> {
    let (_, here) = play.push_as(&play.image_seeded("tiny", "here")?, "here").await?;
    let (_, there) = play.push_as(&play.image_seeded("tiny", "there")?, "there").await?;
    play.pull_on_source(&there).await?;
    play.pull_on("here", play.target()?.name(), &here).await?;
    play.registry.stop()?;
    Ok((here, there))
}

async fn ephemeral_container(play: Play) -> Result<()> {
    let (here, there) = one_here_one_there(&play).await?;
    play.start_on_target("waiting", &here).await?;
    play.tenant.running("waiting", SOON).await?;
    let debug = json!({ "spec": { "ephemeralContainers": [
        { "name": "debug", "image": there, "imagePullPolicy": "IfNotPresent", "targetContainerName": "main" },
    ] } });
    let pods = play.tenant.pods();
    pods.patch_ephemeral_containers("waiting", &PatchParams::default(), &Patch::Strategic(debug)).await?;
    let job = play.tenant.imported(SOON).await?;
    ensure!(job.spec.image == there, "{} was salvaged", job.spec.image);
    let runs = |pod: &Pod| {
        let statuses = pod.status.as_ref().and_then(|status| status.ephemeral_container_statuses.as_ref());
        let states = statuses.into_iter().flatten().filter_map(|status| status.state.as_ref());
        states.into_iter().any(|state| state.running.is_some() || state.terminated.is_some())
    };
    play.tenant.until_pod("waiting", "to run its ephemeral container", SOON, runs).await.map(drop)
}

async fn image_volume(play: Play) -> Result<()> {
    let (here, there) = one_here_one_there(&play).await?;
    let object = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": "waiting", "annotations": { AUTO_SALVAGE: "true" } },
        "spec": {
            "nodeName": play.target()?.name(),
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": false,
            "dnsPolicy": "Default",
            "volumes": [{ "name": "data", "image": { "reference": there, "pullPolicy": "IfNotPresent" } }],
            "containers": [{
                "name": "main", "image": here, "imagePullPolicy": "IfNotPresent",
                "volumeMounts": [{ "name": "data", "mountPath": "/data" }],
            }],
        },
    });
    play.tenant.pods().create(&PostParams::default(), &serde_json::from_value(object)?).await?;
    play.tenant.running("waiting", SOON).await?;
    let job = play.tenant.imported(SOON).await?;
    ensure!(job.spec.image == there, "{} was salvaged, not the volume's image", job.spec.image);
    play.stop_pod("waiting").await
}

/// A container that ends, of a Running pod, whose image is gone from its node when it is to start again. Its layers stand unpacked
/// there, below the container that has ended: they are not moved again, and from then on stand for the image.
async fn restarted_container(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    let (_, pinned) = play.push(&image).await?;
    play.pull_on_source(&pinned).await?;
    play.start_on_target("waiting", &pinned).await?;
    play.tenant.running("waiting", SOON).await?;
    play.registry.stop()?;
    let target = play.target()?;
    let records = tokio::task::block_in_place(|| inspect::records(target, image.digest()))?;
    let remove: Vec<&str> =
        ["images", "remove", "--sync"].into_iter().chain(records.iter().map(String::as_str)).collect();
    tokio::task::block_in_place(|| target.ctr(&remove))?;
    let pod = play.tenant.pods().get("waiting").await?;
    let id = container_id(&pod).context("the pod has no container")?;
    tokio::task::block_in_place(|| target.ctr(&["tasks", "kill", "--signal", "SIGKILL", id]))?;
    let job = play.tenant.imported(SOON).await?;
    ensure!(job.spec.image == pinned && job.spec.node_name == target.name(), "{:?}", job.spec);
    let again = |pod: &Pod| {
        let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
        is_ready(pod) && statuses.into_iter().flatten().any(|status| status.restart_count > 0)
    };
    play.tenant.until_pod("waiting", "to be ready again", SOON, again).await?;
    let transfer = job.status.as_ref().and_then(|status| status.transfer).unwrap_or_default();
    let host = image.host()?;
    let layers: u64 = host.layers.iter().map(|layer| layer.size).sum();
    let (moved, spared) = (u64::try_from(transfer.transferred_bytes)?, u64::try_from(transfer.reused_bytes)?);
    ensure!(spared == layers, "{spared} bytes were not moved, the layers have {layers}");
    ensure!(moved == image.needed_bytes()? - layers, "{moved} bytes were moved, with {layers} of layers");
    // The pod that is gone keeps nothing: what stands for the image now is enough to make another of it.
    play.stop_pod("waiting").await?;
    tokio::task::block_in_place(|| inspect::collect_garbage(target))?;
    let shape =
        PodShape { pull_policy: Some("Never"), opted_in: false, ..PodShape::new(target.name(), &pinned) };
    play.tenant.start("again", &shape).await?;
    play.tenant.running("again", SOON).await?;
    play.assert_same_root((&play.tenant, "source"), "again", target).await?;
    play.assert_nothing_unfinished(&image).await?;
    play.stop_pod("again").await?;
    tokio::task::block_in_place(|| inspect::remove_whole(target, &image))
}
