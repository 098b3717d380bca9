//! Thousands who connect to an agent and say nothing, or next to nothing: they keep nobody out, and cost no memory.
//! Alone, since the agent's memory is measured, and since whoever else connects in the storm may have to come again.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::Pod;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tote_e2e::host;
use tote_e2e::tenant::container_id;

use crate::attacker::{Attacker, Normal};
use crate::known::{Agent, all_connected, objects};
use crate::play::Play;
use crate::stage::{Alone, SOON, Scenario};

/// Connections that are held and say nothing, and how many are opened side by side.
const IDLE: usize = 10_000;
const CHUNK: usize = 100;

/// The same, to the port for health and metrics.
const IDLE_PLAIN: usize = 5_000;

/// Connections that say a byte a second.
const DRIBBLING: usize = 200;

/// Once all are open: how many of the idle ones are replaced by new ones, how often, for an agent has closed those that
/// are older than a few seconds. That is 500 a second.
const AGAIN: usize = 10;
const EACH: Duration = Duration::from_millis(20);

/// Files that this process may have open meanwhile.
const FILES: u64 = 18_000;

/// What the agent's memory may grow by.
const GROWTH: u64 = 32 << 20;

pub fn all() -> Vec<Scenario> {
    vec![Scenario::new("slow_and_many", "n1", "n3", slow_and_many).with("n2").alone(Alone::Operator)]
}

async fn slow_and_many(play: Play) -> Result<()> {
    host::allow_files(FILES)?;
    let attacker = Attacker::enter(&play, "n2").await?;
    let normal = Normal::prepare(&play, "tiny").await?;
    let (agent, client) = (attacker.agent("n1")?.clone(), play.tenant.client());
    let pid = process(&play, &agent).await?;
    let before = host::resident(pid)?;
    let peak = AtomicU64::new(before);
    let (told, mut opened) = watch::channel(0);
    let address = agent.address;
    let (crowd, plain) = (attacker.inside(move || crowd(address, IDLE, told)), agent.health());
    let (told_plain, mut opened_plain) = watch::channel(0);
    let crowd_plain = attacker.inside(move || self::crowd(plain, IDLE_PLAIN, told_plain));
    let meanwhile = async {
        let all =
            timeout(2 * SOON, opened.wait_for(|count| *count >= IDLE)).await.is_ok_and(|all| all.is_ok());
        ensure!(all, "within {:?} only {} of {IDLE} connections stand", 2 * SOON, *opened.borrow());
        let all = timeout(2 * SOON, opened_plain.wait_for(|count| *count >= IDLE_PLAIN)).await;
        ensure!(
            all.is_ok_and(|all| all.is_ok()),
            "the plain port takes no {IDLE_PLAIN} connections within {:?}",
            2 * SOON
        );
        println!("{IDLE} connections have been opened, and {IDLE_PLAIN} to the plain port");
        normal.runs().await.context("during the storm")?;
        // Of those that were opened all but the last few must have given way by now.
        attacker.refused(&agent, ("crowded", 1), "a storm that goes on", std::future::ready(Ok(()))).await
    };
    let name = "tote_agent_refused_total{reason=\"crowded\"}";
    let crowded = agent.metric(&client, name).await?;
    let outcome: Result<()> = tokio::select! {
        ended = crowd => ended.context("the storm broke off"),
        ended = crowd_plain => ended.context("the storm on the plain port broke off"),
        gone = watch_memory(pid, &peak) => gone.with_context(|| format!("{agent} was process {pid}")),
        outcome = meanwhile => outcome,
    };
    let (after, peak) = (host::resident(pid), peak.into_inner());
    let crowded = agent.metric(&client, name).await.unwrap_or_default().saturating_sub(crowded);
    let mib = |bytes: u64| bytes >> 20;
    println!(
        "{agent}: {} MiB resident before, {} MiB at most during, {:?} MiB after; {crowded} connections gave way",
        mib(before),
        mib(peak),
        after.as_ref().map(|after| mib(*after)).ok(),
    );
    outcome?;
    let least = (IDLE - IDLE / 10) as u64;
    ensure!(crowded >= least, "{crowded} connections gave way, of {IDLE} at least {least} are to");
    let grown = peak.max(after?).saturating_sub(before);
    ensure!(grown < GROWTH, "{agent} has grown by {grown} bytes, {GROWTH} are allowed");
    ensure!(process(&play, &agent).await? == pid, "{agent} was started again");
    all_connected(&play).await?;
    normal.is_whole().await
}

/// Notes the most memory that a process has; ends when that does.
async fn watch_memory(pid: u32, peak: &AtomicU64) -> Result<()> {
    loop {
        peak.fetch_max(host::resident(pid)?, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The process of an agent.
async fn process(play: &Play, agent: &Agent) -> Result<u32> {
    let pod = objects::<Pod>(&play.tenant.client()).get(&agent.pod).await?;
    let id = container_id(&pod).with_context(|| format!("{agent} has no container"))?;
    tokio::task::block_in_place(|| play.cluster().node(&agent.node)?.process(id))
}

/// Goes on for good; tells how many of the idle ones have been opened.
async fn crowd(address: SocketAddr, count: usize, told: watch::Sender<usize>) -> Result<()> {
    let mut dribbling = JoinSet::new();
    for _ in 0..DRIBBLING {
        dribbling.spawn(dribble(address));
    }
    let mut held = VecDeque::with_capacity(count + CHUNK);
    while held.len() < count {
        let number = held.len();
        let opened = try_join_all((0..CHUNK).map(|_| open(address))).await;
        held.extend(opened.with_context(|| format!("opening connections from number {number} on"))?);
        told.send_replace(held.len());
    }
    let mut each = interval(EACH);
    each.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        each.tick().await;
        held.drain(..AGAIN);
        held.extend(try_join_all((0..AGAIN).map(|_| open(address))).await.context("opening them again")?);
    }
}

async fn open(address: SocketAddr) -> Result<TcpStream> {
    match timeout(SOON, TcpStream::connect(address)).await {
        Ok(opened) => Ok(opened?),
        Err(_) => bail!("{address} takes no connection within {SOON:?}"),
    }
}

/// Says the beginning of a handshake (RFC 8446, section 5.1: a record of 512 bytes), a byte a second, again and again.
async fn dribble(address: SocketAddr) {
    let mut each = interval(Duration::from_secs(1));
    each.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        each.tick().await;
        let Ok(mut stream) = open(address).await else { continue };
        for byte in [22, 3, 1, 2, 0, 1, 0, 1, 252].into_iter().chain(std::iter::repeat(3)) {
            each.tick().await;
            if stream.write_all(&[byte]).await.is_err() {
                break;
            }
        }
    }
}
