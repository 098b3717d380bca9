//! Who is helped, who is left alone, and what is said about it.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;
use tote_api::{Phase, SalvageJob, names};
use tote_e2e::cluster::Node;
use tote_e2e::images::{Descriptor, Image};
use tote_e2e::inspect;
use tote_e2e::registry::Control as _;
use tote_e2e::tenant::{PodShape, Tenant, imported_reason, phase};

use crate::known::agents;
use crate::play::Play;
use crate::stage::{SOON, Scenario};

/// Reasons of a pull that fails.
const PULL: [&str; 2] = ["ErrImagePull", "ImagePullBackOff"];

/// For showing that nothing happens: several times what detection takes.
const A_WHILE: Duration = Duration::from_secs(5);

pub fn all() -> Vec<Scenario> {
    vec![
        Scenario::new("pull_policy_never", "n1", "n2", pull_policy_never),
        Scenario::new("pull_policy_always", "n1", "n3", pull_policy_always),
        Scenario::new("init_container", "n2", "n3", init_container),
        Scenario::new("namespace_not_opted_in", "n1", "n2", namespace_not_opted_in),
        Scenario::new("namespace_opted_in_later", "n1", "n3", namespace_opted_in_later),
        Scenario::new("pod_not_opted_in", "n2", "n1", pod_not_opted_in),
        Scenario::new("nowhere_then_somewhere", "n1", "n2", nowhere_then_somewhere),
        Scenario::new("tag_of_two_meanings", "n1", "n2", tag_of_two_meanings).with("n3"),
        Scenario::new("denied_by_pattern", "n1", "n2", denied_by_pattern),
        Scenario::new("source_that_lies", "n3", "n1", source_that_lies),
        Scenario::new("two_sources_that_lie", "n1", "n2", two_sources_that_lie).with("n3"),
        Scenario::new("one_source_that_lies", "n1", "n2", one_source_that_lies).with("n3"),
        Scenario::new("sources_that_hold_a_part", "n1", "n2", sources_that_hold_a_part).with("n3"),
        Scenario::new("three_pods_one_job", "n1", "n3", three_pods_one_job),
        Scenario::new("two_nodes_at_once", "n1", "n2", two_nodes_at_once).with("n3"),
    ]
}

/// Pulled on the source, then the registry stopped; returns the image and its pinned reference.
async fn cached_on_source(play: &Play) -> Result<(Image, String)> {
    let image = play.image("tiny")?;
    let (_, pinned) = play.push(&image).await?;
    play.pull_on_source(&pinned).await?;
    play.registry.stop()?;
    Ok((image, pinned))
}

async fn no_job(tenant: &Tenant) -> Result<()> {
    let jobs = tenant.jobs();
    let look = || async { Ok(jobs.list(&ListParams::default()).await?.items.into_iter().next()) };
    tenant.never("a job was made", A_WHILE, look).await
}

async fn pull_policy_never(play: Play) -> Result<()> {
    let (image, pinned) = cached_on_source(&play).await?;
    let shape = PodShape { pull_policy: Some("Never"), ..PodShape::new("n2", &pinned) };
    play.tenant.start("waiting", &shape).await?;
    play.tenant.running("waiting", SOON).await?;
    let job = play.tenant.imported(SOON).await?;
    ensure!(job.spec.node_name == "n2");
    play.assert_intact(&image, &pinned).await
}

/// Kubelet asks the registry whatever the node holds.
async fn pull_policy_always(play: Play) -> Result<()> {
    let (_, pinned) = cached_on_source(&play).await?;
    let shape = PodShape { pull_policy: Some("Always"), ..PodShape::new("n3", &pinned) };
    play.tenant.start("waiting", &shape).await?;
    let note = play.tenant.event("waiting", "ImageNotActionable", SOON).await?;
    ensure!(note.contains("Always"), "{note}");
    no_job(&play.tenant).await
}

async fn init_container(play: Play) -> Result<()> {
    let (image, pinned) = cached_on_source(&play).await?;
    let shape = PodShape { init_image: Some(pinned.clone()), ..PodShape::new("n3", &pinned) };
    play.tenant.start("waiting", &shape).await?;
    play.tenant.running("waiting", SOON).await?;
    play.assert_intact(&image, &pinned).await
}

async fn namespace_not_opted_in(play: Play) -> Result<()> {
    let (_, pinned) = cached_on_source(&play).await?;
    let other = Tenant::enter(play.tenant.client(), "namespace-left-alone", false).await?;
    let outcome = async {
        other.start("waiting", &PodShape::new("n2", &pinned)).await?;
        other.failing("waiting", &PULL, SOON).await?;
        no_job(&other).await?;
        ensure!(salvage_events(&other).await?.is_empty(), "events in a namespace left alone");
        Ok(())
    };
    let outcome = outcome.await;
    other.leave().await?;
    outcome
}

/// The namespace's annotation comes when its pod waits already.
async fn namespace_opted_in_later(play: Play) -> Result<()> {
    let (_, pinned) = cached_on_source(&play).await?;
    let client = play.tenant.client();
    let other = Tenant::enter(client.clone(), "namespace-that-comes-later", false).await?;
    let outcome = async {
        other.start("waiting", &PodShape::new("n3", &pinned)).await?;
        other.failing("waiting", &PULL, SOON).await?;
        no_job(&other).await?;
        let yes = json!({"metadata": {"annotations": {names::ALLOW: "true"}}});
        let namespaces: Api<Namespace> = Api::all(client);
        namespaces.patch(other.namespace(), &PatchParams::default(), &Patch::Merge(yes)).await?;
        other.until_job("for a pod that waits already", A_WHILE, |_| true).await?;
        other.imported(SOON).await?;
        other.running("waiting", SOON).await.map(drop)
    };
    let outcome = outcome.await;
    other.leave().await?;
    outcome
}

async fn pod_not_opted_in(play: Play) -> Result<()> {
    let (_, pinned) = cached_on_source(&play).await?;
    let shape = PodShape { opted_in: false, ..PodShape::new("n1", &pinned) };
    play.tenant.start("waiting", &shape).await?;
    play.tenant.failing("waiting", &PULL, SOON).await?;
    no_job(&play.tenant).await?;
    ensure!(salvage_events(&play.tenant).await?.is_empty(), "events on a pod left alone");
    Ok(())
}

async fn salvage_events(tenant: &Tenant) -> Result<Vec<(String, String)>> {
    let events = tenant.events("waiting").await?;
    Ok(events.into_iter().filter(|(reason, _)| reason.starts_with("Image")).collect())
}

/// Nobody has it: said, and no job; then a node gets it, and there is a job within 2 s.
async fn nowhere_then_somewhere(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    let (tagged, _) = play.push(&image).await?;
    play.registry.stop()?;
    play.start_on_target("waiting", &tagged).await?;
    play.tenant.event("waiting", "ImageNotActionable", SOON).await?;
    no_job(&play.tenant).await?;

    let directory = tempfile::tempdir()?;
    let archive = directory.path().join("image.tar");
    image.write_archive(&archive, &tagged)?;
    play.source()?.load_image(&archive)?;
    let there = Instant::now();
    play.tenant.until_job("for it", Duration::from_secs(2), |_| true).await?;
    println!("a job {:.2} s after the image was on a node", there.elapsed().as_secs_f64());
    play.tenant.imported(SOON).await?;
    play.tenant.running("waiting", SOON).await?;
    // The registry is gone, so what the source has is what ctr imported there.
    let shape = PodShape { pull_policy: Some("Never"), opted_in: false, ..PodShape::new("n1", &tagged) };
    play.tenant.start("source", &shape).await?;
    play.tenant.running("source", SOON).await?;
    play.assert_intact(&image, &tagged).await
}

async fn tag_of_two_meanings(play: Play) -> Result<()> {
    let (old, new) = (play.image_seeded("tiny", "old")?, play.image_seeded("tiny", "new")?);
    let (tagged, _) = play.push(&old).await?;
    play.pull_on("old", "n1", &tagged).await?;
    play.push(&new).await?;
    play.pull_on("new", "n3", &tagged).await?;
    play.registry.stop()?;
    play.start_on_target("waiting", &tagged).await?;
    let note = play.tenant.event("waiting", "ImageNotActionable", SOON).await?;
    for part in ["n1", "n3", old.digest(), new.digest()] {
        ensure!(note.contains(part), "{part} is not named: {note}");
    }
    no_job(&play.tenant).await
}

/// The operator's patterns: said, on the pod and in a job by hand, and nothing is moved, under another name neither.
async fn denied_by_pattern(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    let (_, pinned) = play.push_as(&image, "denied").await?;
    play.pull_on_source(&pinned).await?;
    play.registry.stop()?;
    play.start_on_target("waiting", &pinned).await?;
    let note = play.tenant.event("waiting", "ImageNotActionable", SOON).await?;
    ensure!(note.contains("denied by pattern */denied"), "{note}");
    no_job(&play.tenant).await?;
    let other = pinned.replace("/denied@", "/other@");
    play.tenant.declare("by-hand", json!({"image": other, "nodeName": "n2"})).await?;
    let refused = |job: &SalvageJob| imported_reason(job).0 == "ImageDenied";
    play.tenant.until_job("that is refused", SOON, refused).await?;
    inspect::assert_gone(play.target()?, &image)
}

/// The one copy is damaged on its disk: found, tried again, given up, said on the pod; and nothing is left.
async fn source_that_lies(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    let (_, pinned) = play.push(&image).await?;
    play.pull_on_source(&pinned).await?;
    play.registry.stop()?;
    let blobs = image.needed()?;
    let layer = blobs.iter().max_by_key(|blob| blob.size).context("an image without blobs")?;
    damage(play.source()?, layer)?;
    let before = lies(&play, "n1").await?;
    play.start_on_target("waiting", &pinned).await?;
    // Seven attempts with pauses of 1, 2, 4, ... 32 s.
    let note = play.tenant.event("waiting", "ImageSalvageFailed", Duration::from_secs(150)).await?;
    for part in [layer.digest.as_str(), "n3", "backoffLimit"] {
        ensure!(note.contains(part), "{part} is not named: {note}");
    }
    let job = play.tenant.until_job("that is Failed", SOON, |job| phase(job) == Some(Phase::Failed)).await?;
    let (reason, message) = imported_reason(&job);
    ensure!(reason == "BackoffLimitExceeded", "{reason}: {message}");
    for part in [layer.digest.as_str(), "n3"] {
        ensure!(message.contains(part), "{part} is not named by the job's condition: {message}");
    }
    play.tenant.event(&job.name_any(), "BackoffLimitExceeded", SOON).await?;
    let counted = lies(&play, "n1").await?.of("n3") - before.of("n3");
    ensure!(counted >= 7, "{counted} lies of n3 are counted, and there was one in each of seven attempts");
    play.assert_nothing_unfinished(&image).await?;
    inspect::assert_gone(play.target()?, &image)
}

/// What an agent has counted of others' lies.
struct Lies(BTreeMap<&'static str, u64>);

impl Lies {
    fn of(&self, node: &str) -> u64 {
        self.0.get(node).copied().unwrap_or_default()
    }
}

async fn lies(play: &Play, node: &str) -> Result<Lies> {
    let all = agents(play).await?;
    let agent = all.iter().find(|agent| agent.node == node).with_context(|| format!("no agent on {node}"))?;
    let mut counted = BTreeMap::new();
    for liar in ["n1", "n2", "n3"] {
        let name = format!("tote_agent_lies_total{{node=\"{liar}\"}}");
        counted.insert(liar, agent.metric(&play.tenant.client(), &name).await?);
    }
    Ok(Lies(counted))
}

/// Changes a blob on a node's disk, behind containerd's back: in its middle, and each MiB from there.
fn damage(node: &Node, blob: &Descriptor) -> Result<()> {
    let hex = blob.digest.trim_start_matches("sha256:");
    let store = "var/lib/containerd/io.containerd.content.v1.content/blobs/sha256";
    let file = std::fs::OpenOptions::new().write(true).open(node.path(store).join(hex))?;
    let wrong = b"not what it was";
    let mut at = blob.size / 2 % (1 << 20);
    while at + wrong.len() as u64 <= blob.size {
        file.write_all_at(wrong, at)?;
        at += 1 << 20;
    }
    Ok(())
}

/// Each of two copies is damaged, in another layer. Whichever is asked first lies, and what is true comes from the other.
async fn two_sources_that_lie(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    let (_, pinned) = play.push(&image).await?;
    play.pull_on_source(&pinned).await?;
    play.pull_on("other", "n3", &pinned).await?;
    play.registry.stop()?;
    let layers = &image.host()?.layers;
    ensure!(layers.len() == 2, "{layers:?}");
    damage(play.source()?, &layers[0])?;
    damage(play.cluster().node("n3")?, &layers[1])?;
    let before = lies(&play, "n2").await?;
    play.start_on_target("waiting", &pinned).await?;
    let job = play.tenant.imported(SOON).await?;
    named(&job, &before, &lies(&play, "n2").await?)?;
    let status = job.status.unwrap_or_default();
    ensure!(status.attempts == 1, "{} attempts: {status:?}", status.attempts);
    let mut sources = status.source_nodes;
    sources.sort_unstable();
    ensure!(sources == ["n1", "n3"], "it came from {sources:?}");
    play.tenant.running("waiting", SOON).await?;
    play.assert_intact(&image, &pinned).await
}

/// Whom the job's condition names as liars; each was counted. Others may have been, too, by scenarios beside this one.
fn named(job: &SalvageJob, before: &Lies, after: &Lies) -> Result<Vec<String>> {
    let (_, message) = imported_reason(job);
    println!("{message}");
    let named =
        message.split_once("wrong bytes came from ").and_then(|(_, rest)| rest.split_once(", and were"));
    let named: Vec<String> =
        named.map_or_else(Vec::new, |(nodes, _)| nodes.split(", ").map(str::to_owned).collect());
    for node in &named {
        ensure!(after.of(node) > before.of(node), "no lie of {node} is counted: {message}");
    }
    Ok(named)
}

/// One of two copies is damaged throughout: what it gives is thrown away, the other is tried, and it is named.
async fn one_source_that_lies(play: Play) -> Result<()> {
    let image = play.image("random-20")?;
    let (_, pinned) = play.push(&image).await?;
    play.pull_on_source(&pinned).await?;
    play.pull_on("other", "n3", &pinned).await?;
    play.registry.stop()?;
    for layer in &image.host()?.layers {
        damage(play.cluster().node("n3")?, layer)?;
    }
    let before = lies(&play, "n2").await?;
    play.start_on_target("waiting", &pinned).await?;
    let job = play.tenant.imported(SOON).await?;
    let liars = named(&job, &before, &lies(&play, "n2").await?)?;
    ensure!(liars == ["n3"], "{liars:?} are named");
    ensure!(job.status.as_ref().is_some_and(|status| status.attempts == 1), "{:?}", job.status);
    play.tenant.running("waiting", SOON).await?;
    play.assert_intact(&image, &pinned).await
}

/// Each of two nodes lacks another layer, as where unpacked layers are discarded: together they have the image.
async fn sources_that_hold_a_part(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    let (_, pinned) = play.push(&image).await?;
    play.pull_on_source(&pinned).await?;
    play.pull_on("other", "n3", &pinned).await?;
    play.registry.stop()?;
    let layers = &image.host()?.layers;
    ensure!(layers.len() == 2, "{layers:?}");
    tokio::task::block_in_place(|| {
        play.source()?.ctr(&["content", "rm", &layers[0].digest])?;
        play.cluster().node("n3")?.ctr(&["content", "rm", &layers[1].digest])
    })?;
    play.start_on_target("waiting", &pinned).await?;
    let job = play.tenant.imported(SOON).await?;
    let mut sources = job.status.unwrap_or_default().source_nodes;
    sources.sort_unstable();
    ensure!(sources == ["n1", "n3"], "it came from {sources:?}");
    play.tenant.running("waiting", SOON).await?;
    play.assert_intact(&image, &pinned).await
}

async fn three_pods_one_job(play: Play) -> Result<()> {
    let (image, pinned) = cached_on_source(&play).await?;
    for name in ["a", "b", "c"] {
        play.start_on_target(name, &pinned).await?;
    }
    for name in ["a", "b", "c"] {
        play.tenant.running(name, SOON).await?;
    }
    let jobs = play.tenant.jobs().list(&ListParams::default()).await?.items;
    ensure!(jobs.len() == 1, "{} jobs\n{}", jobs.len(), play.tenant.report().await);
    let transfer = jobs[0].status.as_ref().and_then(|status| status.transfer).unwrap_or_default();
    let (moved, total) = (transfer.transferred_bytes, transfer.total_bytes);
    ensure!(total > 4_000_000 && moved == total, "{moved} of {total} bytes were moved for three pods");
    for name in ["b", "c"] {
        play.stop_pod(name).await?;
    }
    play.assert_intact_in(&image, &pinned, "source", "a", play.target()?).await
}

async fn two_nodes_at_once(play: Play) -> Result<()> {
    let (image, pinned) = cached_on_source(&play).await?;
    play.tenant.start("on-n2", &PodShape::new("n2", &pinned)).await?;
    play.tenant.start("on-n3", &PodShape::new("n3", &pinned)).await?;
    play.tenant.running("on-n2", SOON).await?;
    play.tenant.running("on-n3", SOON).await?;
    let jobs = play.tenant.jobs().list(&ListParams::default()).await?.items;
    ensure!(jobs.len() == 2, "{} jobs", jobs.len());
    for (pod, node) in [("on-n2", "n2"), ("on-n3", "n3")] {
        let node = play.cluster().node(node)?;
        play.assert_intact_in(&image, &pinned, "source", pod, node).await?;
    }
    Ok(())
}
