//! An image whose record stands on the node while blobs of it are gone: kubelet cannot start it and will not pull it.

use anyhow::{Context as _, Result, ensure};
use tote_api::names;
use tote_e2e::images::Image;
use tote_e2e::inspect;
use tote_e2e::registry::Control as _;
use tote_e2e::tenant::PodShape;

use crate::play::Play;
use crate::stage::{SOON, Scenario};

pub fn all() -> Vec<Scenario> {
    vec![
        Scenario::new("corrupt_repaired_in_place", "n1", "n3", repaired_in_place),
        Scenario::new("corrupt_on_older_containerd", "n3", "n2", repaired_in_place),
        Scenario::new("corrupt_nowhere_else", "n1", "n2", nowhere_else),
        Scenario::new("corrupt_pulled_anew", "n1", "n3", pulled_anew),
    ]
}

/// Pulled on the target, and the config's blob lost there behind containerd's back; returns the image's pinned reference.
async fn lose_config(play: &Play, image: &Image) -> Result<String> {
    let (_, pinned) = play.push(image).await?;
    let target = play.target()?;
    play.pull_on("first", target.name(), &pinned).await?;
    play.stop_pod("first").await?;
    let config = image.host()?.config.digest.clone();
    target.ctr(&["content", "rm", &config])?;
    ensure!(inspect::present(target, &[config])?.is_empty(), "the config is still there");
    Ok(pinned)
}

async fn start_corrupt(play: &Play, pinned: &str) -> Result<String> {
    play.start_on_target("waiting", pinned).await?;
    let note = play.tenant.event("waiting", names::event::IMAGE_CORRUPT, SOON).await?;
    ensure!(note.contains(pinned), "{note}");
    Ok(note)
}

/// A peer holds it: just the blob that is missing comes.
async fn repaired_in_place(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    let pinned = lose_config(&play, &image).await?;
    play.pull_on_source(&pinned).await?;
    play.registry.stop()?;
    start_corrupt(&play, &pinned).await?;
    let job = play.tenant.imported(SOON).await?;
    play.tenant.running("waiting", SOON).await?;
    let transfer = job.status.as_ref().and_then(|status| status.transfer).unwrap_or_default();
    let config = i64::try_from(image.host()?.config.size)?;
    ensure!(transfer.transferred_bytes == config, "{transfer:?} were moved, the config has {config} bytes");
    play.assert_intact(&image, &pinned).await
}

/// No peer holds it and the registry is gone: said, and nothing is removed, for what is left may be the last of it.
async fn nowhere_else(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    let pinned = lose_config(&play, &image).await?;
    play.registry.stop()?;
    start_corrupt(&play, &pinned).await?;
    play.tenant.event("waiting", names::event::IMAGE_NOT_ACTIONABLE, SOON).await?;
    let records = inspect::records(play.target()?, image.digest())?;
    ensure!(!records.is_empty(), "the record was removed though the registry is gone");
    Ok(())
}

/// No peer holds it, but the registry has just answered for that digest: the stale record goes, and kubelet pulls.
async fn pulled_anew(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    let pinned = lose_config(&play, &image).await?;
    start_corrupt(&play, &pinned).await?;
    play.tenant.running("waiting", SOON).await?;
    inspect::assert_whole(play.target()?, &pinned)?;
    let jobs = play.tenant.jobs().list(&kube::api::ListParams::default()).await?;
    ensure!(jobs.items.is_empty(), "kubelet's own pull needs no job");
    let shape = PodShape { pull_policy: Some("Never"), opted_in: false, ..PodShape::new("n3", &pinned) };
    play.tenant.start("again", &shape).await?;
    play.tenant.running("again", SOON).await.context("the image that was pulled anew")?;
    Ok(())
}
