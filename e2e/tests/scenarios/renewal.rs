//! Certificates that run out: renewed long before, and given again after a controller was away for longer than they last.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use tote_e2e::{host, operator};

use crate::attacker::Normal;
use crate::known::{agents, all_connected, of_leader};
use crate::play::Play;
use crate::stage::{Alone, Scenario};

/// When an agent's certificate ends.
const ENDS: &str = "tote_agent_certificate_expiry_timestamp_seconds";

pub fn all() -> Vec<Scenario> {
    vec![
        Scenario::new("certificates_renewed", "n1", "n2", renewed),
        Scenario::new("certificates_run_out", "n1", "n2", run_out).alone(Alone::Operator),
    ]
}

fn now() -> Result<u64> {
    Ok(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs())
}

/// Certificates last two minutes here: for three of those halves that they are renewed at, every agent always has one that
/// is good for a while, and a session.
async fn renewed(play: Play) -> Result<()> {
    let (client, agents) = (play.tenant.client(), agents(&play).await?);
    let given = "tote_agent_certificates_total";
    let mut before = Vec::new();
    for agent in &agents {
        before.push(agent.metric(&client, given).await?);
    }
    let look = || async {
        let connected = of_leader(&client, "tote_agents_connected").await?;
        ensure!(connected == agents.len() as u64, "{connected} sessions stand");
        let mut renewals = Vec::new();
        for (agent, before) in agents.iter().zip(&before) {
            let left = agent.metric(&client, ENDS).await?.saturating_sub(now()?);
            ensure!(left >= 25, "the certificate of {agent} is good for {left} s");
            renewals.push(agent.metric(&client, given).await?.saturating_sub(*before));
        }
        Ok(renewals.iter().all(|renewals| *renewals >= 3).then_some(()))
    };
    let deadline = Instant::now() + Duration::from_secs(270);
    loop {
        if look().await?.is_some() {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "not every agent's certificate was renewed three times in 270 s");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// No controller runs until every agent's certificate has run out; then one does, and all is well by itself.
async fn run_out(play: Play) -> Result<()> {
    let normal = Normal::prepare(&play, "tiny").await?;
    let scale = |replicas: &str| -> Result<()> {
        let arguments = ["-n", operator::NAMESPACE, "scale", "deploy/tote", replicas];
        let mut command = play.cluster().kubectl(&arguments)?;
        tokio::task::block_in_place(|| host::run(&mut command)).map(drop)
    };
    let agents = agents(&play).await?;
    scale("--replicas=0")?;
    let client = play.tenant.client();
    let look = || async {
        for agent in &agents {
            let left = agent.metric(&client, ENDS).await?.saturating_sub(now()?);
            ensure!(left == 0, "that of {agent} is good for {left} s");
        }
        Ok(Some(()))
    };
    let ended = play.tenant.until("every certificate to run out", Duration::from_secs(200), look).await;
    let back = scale("--replicas=1");
    ended?;
    back.context("bringing the controller back")?;
    all_connected(&play).await?;
    for agent in &agents {
        ensure!(agent.metric(&client, ENDS).await? > now()?, "{agent} has a session and no certificate");
    }
    normal.works().await
}
