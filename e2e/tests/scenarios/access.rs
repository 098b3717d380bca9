//! Who may have a private image: what kubelet wrote down when it pulled it goes with it.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tote_api::{SalvageJob, names};
use tote_e2e::cluster::Node;
use tote_e2e::images::Image;
use tote_e2e::inspect;
use tote_e2e::registry::{Control as _, LOGIN};
use tote_e2e::tenant::{PodShape, Tenant, imported_reason};

use crate::play::Play;
use crate::stage::{Alone, SOON, Scenario};

/// Name of the Secret to pull with, in the one namespace that has it.
const SECRET: &str = "registry-login";

/// Reasons of a pull that fails.
const PULL: [&str; 2] = ["ErrImagePull", "ImagePullBackOff"];

/// For showing that nothing happens: several times what detection takes.
const A_WHILE: Duration = Duration::from_secs(5);

pub fn all() -> Vec<Scenario> {
    vec![
        Scenario::new("private_image_two_namespaces", "n1", "n3", private_image_two_namespaces)
            .with("n2")
            .alone(Alone::Node("n3")),
    ]
}

/// The registry wants a login, which one namespace has; then it is gone. A pod of that namespace is helped, and what
/// kubelet wrote down on the source stands on the target. Nothing moves for another namespace.
async fn private_image_two_namespaces(play: Play) -> Result<()> {
    let owner = &play.tenant;
    let stranger = Tenant::enter(owner.client(), "private-image-stranger", true).await?;
    let outcome = two_namespaces(&play, owner, &stranger).await;
    let left = stranger.leave().await;
    outcome?;
    left
}

async fn two_namespaces(play: &Play, owner: &Tenant, stranger: &Tenant) -> Result<()> {
    let image = play.image("tiny")?;
    let (reference, _) = play.push(&image).await?;
    let registry = play.registry.upstream().name();
    owner.pull_secret(SECRET, registry, LOGIN).await?;
    play.registry.demand_login()?;
    let with_secret = |node: &str| PodShape { pull_secret: Some(SECRET), ..PodShape::new(node, &reference) };
    let without = |node: &str| PodShape::new(node, &reference);

    stranger.start("uninvited", &PodShape { opted_in: false, ..without("n1") }).await?;
    stranger.failing("uninvited", &PULL, SOON).await.context("without a login it cannot be pulled")?;
    owner.start("source", &with_secret("n1")).await?;
    owner.running("source", SOON).await?;
    let recorded = record(play.source()?, &image)?.context("kubelet of n1 has no record")?;
    play.registry.stop()?;

    // The namespace without the Secret gets nothing, by detection or by hand, and hears nothing of whose it is.
    stranger.start("waiting", &without("n2")).await?;
    let note = stranger.event("waiting", names::event::IMAGE_NOT_ACTIONABLE, SOON).await?;
    stranger.declare("by-hand", json!({"image": &reference, "nodeName": "n2"})).await?;
    let unproven = |job: &SalvageJob| imported_reason(job).0 == "AccessUnproven";
    let job = stranger.until_job("that is AccessUnproven", SOON, unproven).await?;
    for said in [note, imported_reason(&job).1] {
        ensure!(said.contains(&format!("namespace {}", stranger.namespace())), "{said}");
        let tells = [owner.namespace(), SECRET].into_iter().any(|name| said.contains(name));
        ensure!(!tells, "it tells of another namespace: {said}");
    }
    let blobs: Vec<String> = image.blobs().into_iter().map(|blob| blob.digest).collect();
    let n2 = play.cluster().node("n2")?;
    let moved = || async { Ok(Some(inspect::present(n2, &blobs)?).filter(|there| !there.is_empty())) };
    stranger.never("blobs came to n2", A_WHILE, moved).await?;

    // The one with it is helped.
    owner.start("waiting", &with_secret("n3")).await?;
    let job = owner.imported(SOON).await?;
    owner.running("waiting", SOON).await?;
    let conditions = job.status.map(|status| status.conditions).unwrap_or_default();
    let access = conditions.iter().find(|c| c.type_ == names::condition::ACCESS_PROVEN);
    ensure!(access.is_some_and(|c| c.status == "True" && c.reason == "Named"), "{access:?}");
    let travelled = record(play.target()?, &image)?.context("no record came to n3")?;
    ensure!(travelled == recorded, "{recorded} became {travelled}");

    // A kubelet that runs does not look at what others write: until its next start any pod of that node may use the image.
    let off = |shape: PodShape| PodShape { opted_in: false, ..shape };
    stranger.start("early", &off(without("n3"))).await?;
    stranger.running("early", SOON).await?;
    tokio::task::block_in_place(|| play.target()?.restart_kubelet())?;
    stranger.start("late", &off(without("n3"))).await?;
    let said = stranger.failing("late", &PULL, SOON).await.context("kubelet was to refuse it")?;
    println!("kubelet of n3 refuses the pod without the Secret: {said}");
    owner.start("late", &off(with_secret("n3"))).await?;
    owner.running("late", SOON).await?;
    Ok(())
}

/// Who may have the image by kubelet's record on a node.
fn record(node: &Node, image: &Image) -> Result<Option<Value>> {
    let directory = node.path("/var/lib/kubelet/image_manager/pulled");
    let ids: Vec<&str> = image.platforms.iter().map(|platform| platform.config.digest.as_str()).collect();
    for entry in fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
        let path = entry?.path();
        let bytes = fs::read(&path)?;
        let Ok(mut record) = serde_json::from_slice::<Value>(&bytes) else { continue };
        if record["imageRef"].as_str().is_some_and(|id| ids.contains(&id)) {
            return Ok(Some(record["credentialMapping"].take()));
        }
    }
    Ok(None)
}
