//! Two controllers, which of them leads, and how its reign ends.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::DeleteParams;
use rustix::process::Signal;
use tote_e2e::host;
use tote_e2e::tenant::{container_id, is_ready};

use crate::known::{all_connected, controllers, leader, leading, objects};
use crate::play::Play;
use crate::stage::SOON;

/// From the death of a leader to the next one's election.
pub const TAKEOVER: Duration = Duration::from_secs(15);

/// What is played with two controllers.
pub type Body = for<'a> fn(&'a Play) -> BoxFuture<'a, Result<()>>;

/// Plays with two controllers; afterwards there is one again.
pub async fn two(play: Play, values: &[&str], body: Body) -> Result<()> {
    play.upgrade_operator(&[&["controller.replicas=2"], values].concat())?;
    let outcome = async {
        stands_by(&play).await?;
        body(&play).await
    };
    let outcome = outcome.await;
    play.install_operator()?;
    outcome
}

/// Waits until there are two controllers, one of which leads and has a session with every agent.
pub async fn stands_by(play: &Play) -> Result<()> {
    let client = play.tenant.client();
    let look = || async {
        let all = controllers(&client).await?;
        let ready = all.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none() && is_ready(pod));
        ensure!(ready.count() == 2 && all.len() == 2, "{} controllers", all.len());
        one_leads(play).await.map(Some)
    };
    play.tenant.until("two controllers, one of which leads", SOON, look).await?;
    all_connected(play).await
}

async fn one_leads(play: &Play) -> Result<()> {
    let client = play.tenant.client();
    let (holder, _) = leader(&client).await?;
    let found = leading(&client).await?;
    ensure!(found == [holder.clone()], "{holder} has the Lease, and {found:?} lead");
    Ok(())
}

/// The process that leads.
pub struct Reign {
    /// Its pod.
    pub pod: String,
    /// Its process, on this machine.
    pub pid: u32,
}

impl Reign {
    /// As the Lease has it.
    pub async fn present(play: &Play) -> Result<Self> {
        let client = play.tenant.client();
        let (pod, _) = leader(&client).await?;
        let pid = process(play, &objects::<Pod>(&client).get(&pod).await?)?;
        Ok(Self { pod, pid })
    }

    /// At once, and for good: the pod goes too, so that its container does not go on under its name.
    pub async fn kill(&self, play: &Play) -> Result<Instant> {
        host::signal(self.pid, Signal::KILL);
        let at = Instant::now();
        let pods = objects::<Pod>(&play.tenant.client());
        pods.delete(&self.pod, &DeleteParams::default().grace_period(0)).await?;
        Ok(at)
    }

    /// Waits until another leads.
    pub async fn succeeded(&self, play: &Play, since: Instant) -> Result<()> {
        let client = play.tenant.client();
        let look = || async { Ok(Some(leader(&client).await?.0).filter(|now| *now != self.pod)) };
        play.tenant.until("another controller to lead", 2 * TAKEOVER, look).await?;
        let took = since.elapsed();
        all_connected(play).await?;
        println!(
            "another leads after {:.1} s, and has its sessions after {:.1} s",
            took.as_secs_f64(),
            since.elapsed().as_secs_f64()
        );
        ensure!(took < TAKEOVER, "another led only after {took:?}");
        Ok(())
    }
}

/// The process of a controller, on this machine.
pub fn process(play: &Play, pod: &Pod) -> Result<u32> {
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default();
    let id = container_id(pod).with_context(|| format!("pod {} has no container", pod.name_any()))?;
    tokio::task::block_in_place(|| play.cluster().node(node)?.process(id))
}
