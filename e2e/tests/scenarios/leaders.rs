//! Two controllers, and the one that leads killed or paused at every step of a salvage: the other takes over in time, does
//! no work twice and loses none.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures::{FutureExt as _, TryStreamExt as _};
use kube::ResourceExt as _;
use kube::api::{ListParams, WatchEvent, WatchParams};
use rustix::process::Signal;
use serde_json::json;
use tokio::time::timeout;
use tote_api::{Phase, SalvageJob};
use tote_e2e::images::Image;
use tote_e2e::registry::Control as _;
use tote_e2e::tenant::{imported_reason, phase};
use tote_e2e::{host, inspect};

use crate::faults::{ends_well, half_way, share_moved};
use crate::known::{agents, controllers, leader};
use crate::play::Play;
use crate::reign::{Reign, TAKEOVER, process, stands_by, two};
use crate::stage::{Alone, SOON, Scenario};

/// For what is left of 500 MB at the cap, and for two Leases that run out.
const LONG: Duration = Duration::from_secs(180);

/// What the agents count.
const RECEIVED: &str = "tote_agent_received_bytes_total";
const IMPORTED: &str = "tote_agent_imports_total{result=\"imported\"}";

/// When the leader dies, of a salvage for a pod.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// Before the pod waits: nobody leads while it begins to.
    NobodyLeads,
    /// The job is made.
    Made,
    /// So many milliseconds after its status says Transferring: the agent is asked, at work, or done.
    Transferring(u64),
    /// Its status says Imported; the pod is not woken yet, or has just been.
    Imported,
    /// The pod runs.
    Running,
}

const MOMENTS: [Moment; 10] = [
    Moment::NobodyLeads,
    Moment::Made,
    Moment::Transferring(0),
    Moment::Transferring(50),
    Moment::Transferring(100),
    Moment::Transferring(200),
    Moment::Transferring(350),
    Moment::Transferring(500),
    Moment::Imported,
    Moment::Running,
];

pub fn all() -> Vec<Scenario> {
    let all = [
        Scenario::new("leader_killed_at_every_step", "n1", "n2", |p| {
            two(p, &[], |p| killed_at_every_step(p).boxed())
        }),
        Scenario::new("leader_killed_midway", "n1", "n3", |p| {
            two(p, &[ONE_SLOT], |p| killed_midway(p).boxed())
        }),
        Scenario::new("leader_paused", "n1", "n2", |p| two(p, &[], |p| paused(p).boxed())),
        Scenario::new("leader_and_standby_killed", "n1", "n3", |p| {
            two(p, &[ONE_SLOT], |p| all_killed(p).boxed())
        }),
    ];
    all.into_iter().map(|one| one.alone(Alone::Operator)).collect()
}

/// So that jobs queue.
const ONE_SLOT: &str = "controller.maxConcurrentSalvages=1";

/// The sum of a counter over all agents.
async fn counted(play: &Play, name: &str) -> Result<u64> {
    let client = play.tenant.client();
    let mut sum = 0;
    for agent in agents(play).await? {
        sum += agent.metric(&client, name).await?;
    }
    Ok(sum)
}

/// There is one job for an image; it is Imported at its first attempt, and the image was moved once.
async fn moved_once(play: &Play, reference: &str, image: &Image, received: u64) -> Result<()> {
    let jobs = play.tenant.jobs().list(&ListParams::default()).await?;
    let jobs: Vec<SalvageJob> = jobs.into_iter().filter(|job| job.spec.image == reference).collect();
    ensure!(jobs.len() == 1, "{} jobs for {reference}", jobs.len());
    let status = jobs[0].status.clone().unwrap_or_default();
    ensure!(status.phase == Some(Phase::Imported) && status.attempts == 1, "{status:?}");
    let transfer = status.transfer.unwrap_or_default();
    let (size, moved) = (image.needed_bytes()?, counted(play, RECEIVED).await? - received);
    ensure!(moved == size, "the agents received {moved} bytes of an image of {size}: {status:?}");
    ensure!(
        transfer.transferred_bytes.cast_unsigned() == size && transfer.reused_bytes == 0,
        "{size} bytes, and {status:?}"
    );
    Ok(())
}

/// Follows the namespace's jobs until one is at a moment; from before the pod was started.
async fn reach(play: &Play, reference: &str, pod: &str, moment: Moment) -> Result<()> {
    let jobs = play.tenant.jobs();
    let is = |job: &SalvageJob| {
        job.spec.image == reference
            && match moment {
                Moment::NobodyLeads | Moment::Made | Moment::Running => true,
                Moment::Transferring(_) => phase(job) == Some(Phase::Transferring),
                Moment::Imported => phase(job) == Some(Phase::Imported),
            }
    };
    let listed = jobs.list(&ListParams::default()).await?;
    let version = listed.metadata.resource_version.unwrap_or_default();
    let changes = jobs.watch(&WatchParams::default(), &version).await?;
    play.start_on_target(pod, reference).await?;
    let mut changes = std::pin::pin!(changes);
    while let Some(change) = changes.try_next().await? {
        if matches!(&change, WatchEvent::Added(job) | WatchEvent::Modified(job) if is(job)) {
            break;
        }
    }
    match moment {
        Moment::Transferring(after) => tokio::time::sleep(Duration::from_millis(after)).await,
        Moment::Running => drop(play.tenant.running(pod, SOON).await?),
        Moment::NobodyLeads | Moment::Made | Moment::Imported => {}
    }
    Ok(())
}

/// Images that n1 alone holds, where pod `source-<number>` runs them; the registry stopped.
async fn on_source(play: &Play, count: usize) -> Result<Vec<(Image, String)>> {
    let mut images = Vec::new();
    for number in 0..count {
        let image = play.image_seeded("tiny", &number.to_string())?;
        let (reference, _) = play.push_as(&image, &format!("app-{number}")).await?;
        play.pull_on(&format!("source-{number}"), "n1", &reference).await?;
        images.push((image, reference));
    }
    play.registry.stop()?;
    Ok(images)
}

/// Ten salvages, and the leader of each dies.
async fn killed_at_every_step(play: &Play) -> Result<()> {
    let images = on_source(play, MOMENTS.len()).await?;
    let mut unheard = 0;
    for (number, (moment, (image, reference))) in MOMENTS.into_iter().zip(&images).enumerate() {
        let pod = format!("waiting-{number}");
        stands_by(play).await?;
        let (received, imported) = (counted(play, RECEIVED).await?, counted(play, IMPORTED).await?);
        let reign = Reign::present(play).await?;
        let died = if matches!(moment, Moment::NobodyLeads) {
            let died = reign.kill(play).await?;
            play.start_on_target(&pod, reference).await?;
            died
        } else {
            timeout(SOON, reach(play, reference, &pod, moment)).await.context("no such moment")??;
            reign.kill(play).await?
        };
        let job = job_for(play, reference).await?;
        let left = job.map(|job| (phase(&job), imported_reason(&job).0));
        println!("{moment:?}: the leader left the job as {left:?}");
        if left.is_some_and(|(phase, _)| phase == Some(Phase::Transferring)) {
            unheard += usize::from(ends_unheard(play, imported, &reign).await);
        }
        reign.succeeded(play, died).await?;
        play.tenant.running(&pod, SOON).await.with_context(|| format!("{moment:?}"))?;
        play.tenant
            .until_job("that is Imported", SOON, |job| {
                job.spec.image == *reference && phase(job) == Some(Phase::Imported)
            })
            .await?;
        moved_once(play, reference, image, received).await.with_context(|| format!("{moment:?}"))?;
    }
    stands_by(play).await?;
    println!("{unheard} imports ended while nobody led");
    ensure!(unheard > 0, "no leader died between the beginning of an import and hearing of its end");
    for (number, (image, reference)) in images.iter().enumerate() {
        let (source, waiting) = (format!("source-{number}"), format!("waiting-{number}"));
        play.assert_intact_in(image, reference, &source, &waiting, play.target()?).await?;
    }
    Ok(())
}

async fn job_for(play: &Play, reference: &str) -> Result<Option<SalvageJob>> {
    let jobs = play.tenant.jobs().list(&ListParams::default()).await?;
    Ok(jobs.into_iter().find(|job| job.spec.image == reference))
}

/// Whether an agent ends its import before anybody leads again: the next leader hears of the end alone.
async fn ends_unheard(play: &Play, imported: u64, dead: &Reign) -> bool {
    let look = || async { Ok((counted(play, IMPORTED).await? > imported).then_some(())) };
    let ended = play.tenant.until("the import to end", TAKEOVER / 3, look).await.is_ok();
    ended && leader(&play.tenant.client()).await.is_ok_and(|(holder, _)| holder == dead.pod)
}

/// A transfer under way, jobs that wait for its slot, and two leaders that die one after the other.
async fn killed_midway(play: &Play) -> Result<()> {
    let queued = Queued::behind_big(play, 1).await?;
    for _ in 0..2 {
        let reign = Reign::present(play).await?;
        println!("the leader dies at {} %", share_moved(&play.tenant.jobs().get("big").await?));
        let died = reign.kill(play).await?;
        reign.succeeded(play, died).await?;
        stands_by(play).await?;
    }
    queued.end_well(play).await
}

/// Nobody is left; those that are started again take up every job.
async fn all_killed(play: &Play) -> Result<()> {
    let queued = Queued::behind_big(play, 4).await?;
    for pod in controllers(&play.tenant.client()).await? {
        host::signal(process(play, &pod)?, Signal::KILL);
    }
    queued.end_well(play).await?;
    stands_by(play).await
}

/// Job `big` Transferring, the others Pending.
struct Queued {
    received: u64,
    images: Vec<(Image, String)>,
}

impl Queued {
    async fn behind_big(play: &Play, count: usize) -> Result<Self> {
        let images = on_source(play, count).await?;
        play.big().await?;
        let received = counted(play, RECEIVED).await?;
        half_way(play).await?;
        for (number, (_, reference)) in images.iter().enumerate() {
            let name = format!("small-{number}");
            let spec = json!({ "image": reference, "nodeName": play.target()?.name() });
            play.tenant.declare(&name, spec).await?;
            until_named(play, &name, Phase::Pending, "Queued").await?;
        }
        let big = play.tenant.jobs().get("big").await?;
        ensure!(phase(&big) == Some(Phase::Transferring), "{:?}", big.status);
        Ok(Self { received, images })
    }

    /// All end Imported, at the first attempt, and every byte came once.
    async fn end_well(self, play: &Play) -> Result<()> {
        let mut names = vec!["big".to_owned()];
        names.extend((0..self.images.len()).map(|number| format!("small-{number}")));
        for name in names {
            let job = until_named(play, &name, Phase::Imported, "Imported").await?;
            let attempts = job.status.map(|status| status.attempts);
            ensure!(attempts == Some(1), "{name}: {attempts:?} attempts");
        }
        let mut size = play.big().await?.image.needed_bytes()?;
        for (image, reference) in &self.images {
            size += image.needed_bytes()?;
            inspect::assert_whole(play.target()?, reference)?;
            inspect::remove_whole(play.target()?, image)?;
        }
        let moved = counted(play, RECEIVED).await? - self.received;
        ensure!(moved == size, "the agents received {moved} bytes of images of {size}");
        ends_well(play).await.map(drop)
    }
}

async fn until_named(play: &Play, name: &str, at: Phase, reason: &str) -> Result<SalvageJob> {
    let is = |job: &SalvageJob| {
        job.name_any() == name && phase(job) == Some(at) && imported_reason(job).0 == reason
    };
    play.tenant.until_job(&format!("{name} that is {at:?} for {reason}"), LONG, is).await
}

/// Paused for longer than its Lease lasts, a leader wakes up and takes itself for one.
async fn paused(play: &Play) -> Result<()> {
    let moments = [Moment::NobodyLeads, Moment::Made, Moment::Transferring(0)];
    let images = on_source(play, moments.len()).await?;
    for (number, (moment, (image, reference))) in moments.into_iter().zip(&images).enumerate() {
        let pod = format!("waiting-{number}");
        stands_by(play).await?;
        let received = counted(play, RECEIVED).await?;
        let reign = Reign::present(play).await?;
        if matches!(moment, Moment::NobodyLeads) {
            host::signal(reign.pid, Signal::STOP);
            play.start_on_target(&pod, reference).await?;
        } else {
            timeout(SOON, reach(play, reference, &pod, moment)).await.context("no such moment")??;
            host::signal(reign.pid, Signal::STOP);
        }
        let outcome = async {
            reign.succeeded(play, Instant::now()).await?;
            play.tenant.running(&pod, SOON).await
        };
        let outcome = outcome.await;
        host::signal(reign.pid, Signal::CONT);
        outcome.with_context(|| format!("{moment:?}"))?;
        stands_by(play).await.context("the one that was paused steps down")?;
        let (now, _) = leader(&play.tenant.client()).await?;
        ensure!(now != reign.pod, "it took the leadership back");
        moved_once(play, reference, image, received).await.with_context(|| format!("{moment:?}"))?;
        let source = format!("source-{number}");
        play.assert_intact_in(image, reference, &source, &pod, play.target()?).await?;
    }
    Ok(())
}
