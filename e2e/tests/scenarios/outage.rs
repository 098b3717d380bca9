//! A registry that does not answer, in the ways registries do not.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kube::ResourceExt as _;
use kube::api::ListParams;
use tote_api::{Phase, SalvageJob};
use tote_e2e::inspect;
use tote_e2e::registry::{Control as _, Mode};
use tote_e2e::tenant::{PodShape, phase};

use crate::play::Play;
use crate::stage::{Alone, SOON, Scenario};

pub fn all() -> Vec<Scenario> {
    vec![
        Scenario::new("black_hole", "n1", "n2", black_hole).alone(Alone::Node("n2")),
        Scenario::new("stopped_digest", "n1", "n3", stopped_digest),
        Scenario::new("stopped_tag", "n3", "n1", stopped_tag),
        Scenario::new("deleted_upstream", "n2", "n3", deleted_upstream),
        Scenario::new("second_name", "n3", "n1", second_name),
        Scenario::new("removed_and_needed_again", "n1", "n2", removed_and_needed_again),
        Scenario::new("kubelet_requires_a_pull", "n1", "n3", kubelet_requires_a_pull),
        Scenario::new("registry_returns", "n1", "n2", registry_returns),
        Scenario::new("kubelet_restarts", "n1", "n3", kubelet_restarts).alone(Alone::Node("n3")),
    ]
}

async fn stopped_digest(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    play.salvage(&image, false).await
}

async fn stopped_tag(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    play.salvage(&image, true).await
}

/// The registry is up and says 404.
async fn deleted_upstream(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    let (_, pinned) = play.push(&image).await?;
    play.pull_on_source(&pinned).await?;
    play.registry.upstream().delete("app", image.digest()).await?;
    play.start_on_target("waiting", &pinned).await?;
    play.tenant.imported(SOON).await?;
    play.tenant.running("waiting", SOON).await?;
    play.assert_intact(&image, &pinned).await
}

/// A second name for what was salvaged: records only, not a byte.
async fn second_name(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    let (_, first) = play.push_as(&image, "first").await?;
    let (_, second) = play.push_as(&image, "second").await?;
    play.pull_on_source(&first).await?;
    play.registry.stop()?;
    play.start_on_target("waiting", &first).await?;
    play.tenant.running("waiting", SOON).await?;
    play.start_on_target("again", &second).await?;
    play.tenant.running("again", SOON).await?;
    let job = play
        .tenant
        .until_job("for the second name", SOON, |job| {
            job.spec.image == second && phase(job) == Some(Phase::Imported)
        })
        .await?;
    let transfer = job.status.and_then(|status| status.transfer).unwrap_or_default();
    ensure!(transfer.transferred_bytes == 0, "{} bytes were moved again", transfer.transferred_bytes);
    ensure!(transfer.reused_bytes == transfer.total_bytes && transfer.total_bytes > 0, "{transfer:?}");
    inspect::assert_whole(play.target()?, &second)?;
    play.stop_pod("again").await?;
    play.assert_intact(&image, &first).await
}

/// From a job's end to the next one's for the same image on the same node, which tote holds back for a minute.
const NEXT_JOB: Duration = Duration::from_secs(120);

/// What was salvaged is removed from the target and needed once more: the job that says Imported does not stand in the way.
async fn removed_and_needed_again(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    let (_, pinned) = play.push(&image).await?;
    play.pull_on_source(&pinned).await?;
    play.registry.stop()?;
    play.start_on_target("first", &pinned).await?;
    let first = play.tenant.imported(SOON).await?.name_any();
    play.tenant.running("first", SOON).await?;
    play.stop_pod("first").await?;
    tokio::task::block_in_place(|| inspect::remove_whole(play.target()?, &image))?;
    play.start_on_target("waiting", &pinned).await?;
    let is_next = |job: &SalvageJob| job.name_any() != first && phase(job) == Some(Phase::Imported);
    let next = play.tenant.until_job("that is another, and Imported", NEXT_JOB, is_next).await?;
    let transfer = next.status.and_then(|status| status.transfer).unwrap_or_default();
    let (moved, total) = (transfer.transferred_bytes, transfer.total_bytes);
    ensure!(total > 4_000_000 && moved == total, "{moved} of {total} bytes were moved again");
    let kept = play.tenant.jobs().get(&first).await.context("the first job stays")?;
    ensure!(phase(&kept) == Some(Phase::Imported), "{:?}", kept.status);
    play.tenant.running("waiting", SOON).await?;
    play.assert_intact(&image, &pinned).await
}

/// Kubelet's own records name the repository it pulled from: no copy satisfies it, and the event says so.
async fn kubelet_requires_a_pull(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    let (_, first) = play.push_as(&image, "first").await?;
    let (_, second) = play.push_as(&image, "second").await?;
    play.pull_on_source(&second).await?;
    play.pull_on("own", "n3", &first).await?;
    play.registry.stop()?;
    play.start_on_target("waiting", &second).await?;
    let look = || async {
        let events = play.tenant.events("waiting").await?;
        Ok(events.into_iter().find(|(_, note)| note.contains("kubelet requires a pull")))
    };
    play.tenant.until("an event that says: kubelet requires a pull", SOON, look).await?;
    let jobs = play.tenant.jobs().list(&ListParams::default()).await?.items;
    ensure!(jobs.len() <= 1, "{} jobs for a pod that no copy helps", jobs.len());
    Ok(())
}

/// How long containerd waits for a connection in the black hole (`dial_timeout` of hosts.toml, from containerd 2.1
/// on). By default it is 30 s, and a pull then hangs for 2 to 4 minutes (measured with containerd 2.4.2), twelve of them, one
/// after the other, for most of an hour.
const DIAL: Duration = Duration::from_secs(2);

/// Connections get no answer. Kubelet pulls one image at a time, and a pull asks twice (HEAD of the manifest, then of
/// a blob by the same digest), so each of twelve pulls hangs for 4 s, and the last has failed after 48 s. A pod runs
/// as soon as its own pull has failed. The two pods of one image may hold each other up further: while one's pull
/// hangs, its pull intent makes kubelet want a pull for the other, until a back-off (10, 20, 40 s) outlasts a pull:
/// 130 s more at most. With a minute for everything else that is the deadline.
async fn black_hole(play: Play) -> Result<()> {
    let mut references = Vec::new();
    let mut images = Vec::new();
    for n in 0..11 {
        let image = play.image_seeded("tiny", &n.to_string())?;
        let (_, pinned) = play.push_as(&image, &format!("app-{n}")).await?;
        play.pull_on(&format!("source-{n}"), "n1", &pinned).await?;
        references.push(pinned);
        images.push(image);
    }
    let name = play.registry.upstream().name();
    let hosts = play.target()?.path("/etc/containerd/certs.d").join(name).join("hosts.toml");
    std::fs::write(hosts, format!("server = \"http://{name}\"\ndial_timeout = \"{}s\"\n", DIAL.as_secs()))?;
    play.registry.mode(Mode::Dropping)?;
    references.push(references[0].clone());
    for (n, reference) in references.iter().enumerate() {
        play.start_on_target(&format!("waiting-{n}"), reference).await?;
    }
    let begin = Instant::now();
    let deadline = 12 * 2 * DIAL + Duration::from_secs(130 + 60);
    for n in 0..references.len() {
        let left = deadline.saturating_sub(begin.elapsed());
        play.tenant.running(&format!("waiting-{n}"), left).await?;
    }
    println!("twelve pods run {:.0} s after they were made", begin.elapsed().as_secs_f64());
    play.stop_pod("waiting-11").await?;
    for (n, (image, reference)) in images.iter().zip(&references).enumerate() {
        let (source, waiting) = (format!("source-{n}"), format!("waiting-{n}"));
        play.assert_intact_in(image, reference, &source, &waiting, play.target()?).await?;
    }
    Ok(())
}

/// A pull is under way when kubelet restarts, and can never end.
async fn kubelet_restarts(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    let (_, pinned) = play.push(&image).await?;
    play.pull_on_source(&pinned).await?;
    play.registry.forget()?;
    play.registry.mode(Mode::Hanging)?;
    play.start_on_target("waiting", &pinned).await?;
    play.tenant.event("waiting", "Pulling", SOON).await?;
    let target = play.target()?;
    target.kill_kubelet()?;
    play.registry.stop()?;
    target.start_kubelet()?;
    play.tenant.running("waiting", Duration::from_secs(120)).await?;
    play.assert_intact(&image, &pinned).await
}

/// Some 8 s of transfer, in the middle of which the registry is there again and kubelet pulls by itself. That its pull
/// is the first to end is `midway_pull_wins`.
async fn registry_returns(play: Play) -> Result<()> {
    let image = play.image("random-200")?;
    let (_, pinned) = play.push(&image).await?;
    play.pull_on_source(&pinned).await?;
    play.registry.stop()?;
    play.start_on_target("waiting", &pinned).await?;
    play.tenant
        .until_job("that is Transferring", SOON, |job| phase(job) == Some(Phase::Transferring))
        .await?;
    play.registry.heal()?;
    // Always pulls at once; the waiting pod's own next try may be minutes away.
    let shape = PodShape { pull_policy: Some("Always"), opted_in: false, ..PodShape::new("n2", &pinned) };
    play.tenant.start("puller", &shape).await?;
    play.tenant.event("puller", "Pulling", SOON).await?;
    let jobs = play.tenant.jobs().list(&ListParams::default()).await?.items;
    ensure!(
        jobs.iter().any(|job| phase(job) == Some(Phase::Transferring)),
        "the import was over before kubelet pulled\n{}",
        play.tenant.report().await
    );
    play.tenant.running("puller", SOON).await?;
    play.tenant.running("waiting", SOON).await?;
    play.tenant
        .until("the job to end", SOON, || async {
            let jobs = play.tenant.jobs().list(&ListParams::default()).await?.items;
            Ok(jobs.iter().all(|job| phase(job) == Some(Phase::Imported)).then_some(()))
        })
        .await?;
    play.stop_pod("puller").await?;
    play.assert_intact(&image, &pinned).await
}
