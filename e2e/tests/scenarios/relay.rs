//! Two nodes that want one large image at once: one gives it on to the other as it comes.

use std::time::Duration;

use anyhow::{Result, ensure};
use kube::api::ListParams;
use tote_api::Phase;
use tote_e2e::inspect;
use tote_e2e::tenant::{PodShape, phase};

use crate::known::agents;
use crate::play::Play;
use crate::stage::{Alone, SOON, Scenario};

/// For 500 MB at the cap, and for what the second is behind.
const LONG: Duration = Duration::from_secs(180);

/// What each agent has given.
const SERVED: &str = "tote_agent_served_bytes_total";

pub fn all() -> Vec<Scenario> {
    // For itself: what agents have given is counted.
    vec![Scenario::new("given_on_as_it_comes", "n1", "n2", at_once).with("n3").alone(Alone::Operator)]
}

/// The registry is dead; each pod runs, and the source has sent about one image and not two.
async fn at_once(play: Play) -> Result<()> {
    let big = play.big().await?;
    let targets = [play.target()?, play.cluster().node("n3")?];
    for target in targets {
        // An earlier scenario that failed may have left it.
        if !inspect::records(target, big.image.digest())?.is_empty() {
            inspect::remove_whole(target, &big.image)?;
        }
        inspect::assert_gone(target, &big.image)?;
    }
    let before = served(&play).await?;
    for target in targets {
        play.tenant.start(target.name(), &PodShape::new(target.name(), &big.reference)).await?;
    }
    let imported = || async {
        let jobs = play.tenant.jobs().list(&ListParams::default()).await?.items;
        let all = jobs.len() == 2 && jobs.iter().all(|job| phase(job) == Some(Phase::Imported));
        Ok(all.then_some(jobs))
    };
    let jobs = play.tenant.until("both jobs to be Imported", LONG, imported).await?;
    for target in targets {
        play.tenant.running(target.name(), SOON).await?;
    }
    let gave: Vec<u64> = served(&play).await?.iter().zip(&before).map(|(now, before)| now - before).collect();
    let (size, says) = (big.image.needed_bytes()?, jobs.iter().map(|job| &job.status).collect::<Vec<_>>());
    println!("of an image of {size} bytes n1, n2 and n3 gave {gave:?}");
    ensure!(gave[0] >= size && gave[0] < size + size / 4, "n1 gave {} of {size}: {says:?}", gave[0]);
    ensure!(gave.iter().sum::<u64>() < 2 * size + size / 8, "{gave:?} of {size}: {says:?}");
    play.assert_nothing_unfinished(&big.image).await?;
    for target in targets {
        play.assert_same_root((&big.tenant, "source"), target.name(), target).await?;
        inspect::assert_whole(target, &big.reference)?;
        play.stop_pod(target.name()).await?;
        inspect::remove_whole(target, &big.image)?;
    }
    Ok(())
}

/// Bytes that each node's agent has given, by the nodes' names.
async fn served(play: &Play) -> Result<Vec<u64>> {
    let mut found = Vec::new();
    for agent in agents(play).await? {
        found.push(agent.metric(&play.tenant.client(), SERVED).await?);
    }
    Ok(found)
}
