//! A transfer from several sources that is ended in its middle, with parts from each on their way: nothing of it is left, on
//! the target or as a right to read.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Empty;
use kube::api::DeleteParams;
use serde_json::json;
use tokio::time::timeout;
use tote_api::{Phase, SalvageJob};
use tote_e2e::images::Image;
use tote_e2e::inspect;
use tote_e2e::registry::Control as _;
use tote_e2e::tenant::{imported_reason, phase};
use tote_rpc::identity::{Identity, Role};

use crate::attacker::Attacker;
use crate::faults::share_moved;
use crate::known::Agent;
use crate::play::Play;
use crate::stage::{Alone, SOON, Scenario};

/// For an image of 200 MB to be pulled twice.
const LONG: Duration = Duration::from_secs(180);

/// Seconds in which a half of it comes, at the cap.
const DEADLINE: i64 = 4;

pub fn all() -> Vec<Scenario> {
    let scenario = Scenario::new("midway_of_several_sources", "n1", "n2", ended_midway);
    vec![scenario.with("n3").alone(Alone::Operator)]
}

async fn ended_midway(play: Play) -> Result<()> {
    let attacker = Attacker::enter(&play, "n1").await?;
    let image = play.image("random-200")?;
    let (_, pinned) = play.push(&image).await?;
    for (pod, node) in [("source", "n1"), ("other", "n3")] {
        play.pull_on(pod, node, &pinned).await?;
    }
    play.registry.stop()?;
    // As the target's agent asks.
    let asks = attacker.stolen.certified(&Role::Node("n2".into()));
    let granted = async |wanted: StatusCode| {
        for node in ["n1", "n3"] {
            let (agent, asks, digest) = (attacker.agent(node)?, asks.clone(), image.digest().to_owned());
            let look = || async {
                let (agent, asks, digest) = (agent.clone(), asks.clone(), digest.clone());
                let status = attacker.inside(move || asked(agent, asks, digest)).await?;
                Ok((status == wanted).then_some(()))
            };
            play.tenant.until(&format!("{node} to answer n2 {wanted}"), SOON, look).await?;
        }
        Ok::<_, anyhow::Error>(())
    };

    granted(StatusCode::FORBIDDEN).await.context("before")?;
    play.tenant.declare("deleted", json!({ "image": pinned, "nodeName": "n2" })).await?;
    let begun = |job: &SalvageJob| {
        let sources = job.status.as_ref().map_or(&[][..], |status| &status.source_nodes[..]);
        share_moved(job) >= 10 && sources.len() == 2
    };
    let job = play.tenant.until_job("of which some came from both", LONG, begun).await?;
    granted(StatusCode::OK).await.context("meanwhile")?;
    println!("deleted after {} %", share_moved(&job));
    play.tenant.jobs().delete("deleted", &DeleteParams::default()).await?;
    without_trace(&play, &image).await.context("deleted")?;
    granted(StatusCode::FORBIDDEN).await.context("deleted")?;

    let spec = json!({ "image": pinned, "nodeName": "n2", "activeDeadlineSeconds": DEADLINE });
    play.tenant.declare("overdue", spec).await?;
    let failed = |job: &SalvageJob| phase(job) == Some(Phase::Failed);
    let job = play.tenant.until_job("that is Failed", LONG, failed).await?;
    let (reason, message) = imported_reason(&job);
    ensure!(reason == "DeadlineExceeded", "{reason}: {message}");
    let share = share_moved(&job);
    println!("overdue after {share} %");
    ensure!((1..=95).contains(&share), "{share} % were moved");
    without_trace(&play, &image).await.context("overdue")?;
    granted(StatusCode::FORBIDDEN).await.context("overdue")
}

async fn without_trace(play: &Play, image: &Image) -> Result<()> {
    play.assert_nothing_unfinished(image).await?;
    inspect::assert_gone(play.target()?, image)
}

/// What an agent answers to a node that asks for an image.
async fn asked(agent: Agent, who: Arc<Identity>, digest: String) -> Result<StatusCode> {
    let client = tote_rpc::blob_client(&who)?;
    let uri = format!("https://{}/v2/app/manifests/{digest}", agent.address);
    let request = Request::get(uri).body(Empty::<Bytes>::new())?;
    let answer = timeout(SOON, client.request(request)).await.context("no answer")?;
    Ok(answer?.status())
}
