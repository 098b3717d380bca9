//! Measures what the operator costs and how fast it is, on a cluster of its own: see `--help`.

mod identities;
mod sessions;
mod stream;
mod transfer;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use clap::{Parser, ValueEnum};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::block_in_place;
use tote_e2e::cluster::{Cluster, Options};
use tote_e2e::images::{Layout, tiny};
use tote_e2e::registry::{self, Control as _, Registry};
use tote_e2e::rescue::follow;
use tote_e2e::tenant::{PodShape, Tenant, is_ready};
use tote_e2e::{load, operator};

/// The cluster's name.
const CLUSTER: &str = "figures";

/// Salvages a 5 MB image several times and says how long each took; then how long agents wait for a certificate, the
/// memory of controller and agents, and of the controller beside many pods. The cluster is removed then. Then three hundred
/// pods that fail at once, on another. Then what TLS costs a stream, and what idle sessions cost the controller. Last, how fast
/// images go from node to node.
#[derive(Parser)]
struct Arguments {
    /// How many salvages.
    #[arg(long, default_value_t = 11)]
    salvages: usize,
    /// How many pods the API server holds for the last figure.
    #[arg(long, default_value_t = 5000)]
    pods: usize,
    /// How many sessions with idle agents the controller holds for the last figure.
    #[arg(long, default_value_t = 1000)]
    sessions: usize,
    /// Only some of the figures; all, unless said.
    #[arg(long, value_enum)]
    only: Vec<Part>,
    /// Of the figures of images from node to node only these; all, unless said.
    #[arg(long, value_enum)]
    transfer: Vec<transfer::Group>,
    /// Be the agent of this node.
    #[arg(long, hide = true, requires = "authority", requires = "socket")]
    agent: Option<String>,
    /// Its containerd's socket.
    #[arg(long, hide = true)]
    socket: Option<PathBuf>,
    /// The most bytes a second that it gives.
    #[arg(long, hide = true)]
    upload: Option<String>,
    /// Be so many idle agents.
    #[arg(long, hide = true, requires = "authority")]
    simulate: Option<usize>,
    /// Where their certificate authority is.
    #[arg(long, hide = true)]
    authority: Option<PathBuf>,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Salvages, certificates and memory on a cluster.
    Cluster,
    /// Three hundred pods that fail at once.
    Load,
    /// One stream of a blob, by TLS and without.
    Stream,
    /// Idle sessions.
    Sessions,
    /// Images from node to node.
    Transfer,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let (Some(count), Some(authority)) = (arguments.simulate, &arguments.authority) {
        return sessions::simulate(count, authority).await;
    }
    if let (Some(name), Some(socket), Some(authority)) =
        (&arguments.agent, &arguments.socket, &arguments.authority)
    {
        return transfer::agent::be(name, socket, authority, arguments.upload.as_deref()).await;
    }
    Cluster::down(CLUSTER)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut measuring = tokio::spawn(measure(arguments));
    let outcome = tokio::select! {
        outcome = &mut measuring => outcome.map_err(anyhow::Error::from).and_then(|outcome| outcome),
        _ = tokio::signal::ctrl_c() => Err(anyhow!("interrupted")),
        _ = terminate.recv() => Err(anyhow!("told to end")),
    };
    measuring.abort();
    Cluster::down(CLUSTER)?;
    outcome
}

async fn measure(arguments: Arguments) -> Result<()> {
    let is_wanted = |part| arguments.only.is_empty() || arguments.only.contains(&part);
    if is_wanted(Part::Cluster) {
        on_a_cluster(&arguments).await?;
        block_in_place(|| Cluster::down(CLUSTER))?;
    }
    if is_wanted(Part::Load) {
        let report = load::run(CLUSTER, load::IMAGES, |what| println!("{what}")).await?;
        println!("\n{report}");
        report.check()?;
        block_in_place(|| Cluster::down(CLUSTER))?;
    }
    if is_wanted(Part::Stream) {
        // On a thread of its own, which it pins.
        let streaming = std::thread::spawn(stream::tls_against_plain);
        block_in_place(|| streaming.join()).map_err(|_| anyhow!("measuring a stream panicked"))??;
    }
    if is_wanted(Part::Sessions) {
        sessions::memory(arguments.sessions).await?;
    }
    if is_wanted(Part::Transfer) {
        Box::pin(transfer::measure(&arguments.transfer)).await?;
    }
    Ok(())
}

async fn on_a_cluster(arguments: &Arguments) -> Result<()> {
    let cluster = block_in_place(|| {
        let cluster = Cluster::up(&Options::new(CLUSTER), &|line| println!("{line}"))?;
        cluster.load_image(&operator::archive()?)?;
        operator::install(&cluster, &[])?;
        anyhow::Ok(cluster)
    })?;
    let tenant = Tenant::enter(cluster.client().await?, "figures", true).await?;
    salvages(&cluster, &tenant, arguments.salvages).await?;
    certificates(&tenant).await?;
    memory(&cluster, &tenant, "at rest").await?;
    crowd(&tenant, arguments.pods).await?;
    memory(&cluster, &tenant, &format!("with {} pods in the API server", arguments.pods)).await
}

/// From the first failure status to Running, as a client that watches sees it.
async fn salvages(cluster: &Cluster, tenant: &Tenant, count: usize) -> Result<()> {
    println!("\nsalvage   detected   Imported    Running   moved of image (bytes)");
    let mut times = Vec::new();
    for n in 0..count {
        let listen = (cluster.registry_address(), 0).into();
        let registry = Registry::start(&registry::Options { listen, name: None, storage: None })?;
        cluster.trust_registry(registry.upstream().name())?;
        let layout = Layout::temporary()?;
        let image = tiny(&layout, &format!("figures {n} {}", std::process::id()))?;
        let reference = registry.upstream().push(&image, "app", None).await?;
        let source = format!("source-{n}");
        tenant.start(&source, &PodShape { opted_in: false, ..PodShape::new("n1", &reference) }).await?;
        tenant.running(&source, Duration::from_secs(60)).await?;
        registry.stop()?;
        let waiting = format!("waiting-{n}");
        let begin = Instant::now();
        tenant.start(&waiting, &PodShape::new("n2", &reference)).await?;
        let rescue = follow(tenant, |pod| pod.name_any() == waiting, begin, |_| {});
        let timeline =
            tokio::time::timeout(Duration::from_secs(60), rescue).await.context("not salvaged in 60 s")??;
        let job = tenant
            .until_job("of this image", Duration::from_secs(10), |job| job.spec.image == reference)
            .await?;
        let transfer = job.status.and_then(|status| status.transfer).unwrap_or_default();
        let failed = timeline.failed.context("the pod never failed")?;
        let since = |at: Option<Duration>| at.unwrap_or_default().saturating_sub(failed).as_secs_f64();
        println!(
            "{n:7} {:8.2} s {:8.2} s {:8.2} s   {} of {}",
            since(timeline.detected),
            since(timeline.imported),
            since(timeline.running),
            transfer.transferred_bytes,
            image.needed_bytes()?
        );
        times.push(since(timeline.running));
        for pod in [source, waiting] {
            tenant.pods().delete(&pod, &DeleteParams::default().grace_period(0)).await?;
        }
        tenant.jobs().delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
    }
    times.sort_by(f64::total_cmp);
    println!(
        "median from failure to Running: {:.2} s",
        times.get(times.len() / 2).copied().unwrap_or_default()
    );
    Ok(())
}

/// From an agent's start to its first certificate: as installed, and after each has been replaced.
async fn certificates(tenant: &Tenant) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(tenant.client(), operator::NAMESPACE);
    let agents = ListParams::default().labels("app.kubernetes.io/component=agent");
    println!("\nfrom an agent's start to its first certificate");
    for when in ["installed", "replaced"] {
        for pod in pods.list(&agents).await? {
            let path = format!(
                "/api/v1/namespaces/{}/pods/{}:8081/proxy/metrics",
                operator::NAMESPACE,
                pod.name_any()
            );
            let metrics = tenant.client().request_text(http::Request::get(path).body(Vec::new())?).await?;
            let waited =
                metrics.lines().find_map(|line| line.strip_prefix("tote_agent_first_certificate_seconds "));
            let waited: f64 = waited.context("no such metric")?.parse()?;
            println!("  {when:<10} {:<24} {waited:.2} s", pod.name_any());
            if when == "installed" {
                pods.delete(&pod.name_any(), &DeleteParams::default()).await?;
            }
        }
        let replaced = || async {
            let all = pods.list(&agents).await?.items;
            let fresh = |pod: &Pod| pod.metadata.deletion_timestamp.is_none() && is_ready(pod);
            Ok((all.len() == 3 && all.iter().all(fresh)).then_some(()))
        };
        tenant.until("three agents that are ready", Duration::from_secs(90), replaced).await?;
    }
    Ok(())
}

/// Resident memory of every process of the operator.
async fn memory(cluster: &Cluster, tenant: &Tenant, when: &str) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(tenant.client(), operator::NAMESPACE);
    println!("\nresident memory {when}");
    for pod in pods.list(&ListParams::default()).await? {
        let node =
            cluster.node(pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default())?;
        let statuses =
            pod.status.as_ref().and_then(|status| status.container_statuses.as_deref()).unwrap_or_default();
        let id = statuses.first().and_then(|container| container.container_id.as_deref()).unwrap_or_default();
        let id = id.strip_prefix("containerd://").context("no container")?;
        let tasks = node.ctr(&["tasks", "list"])?;
        let row = tasks.lines().find(|line| line.starts_with(id)).context("no task")?;
        let pid = row.split_whitespace().nth(1).context("no pid")?;
        let status = std::fs::read_to_string(Path::new("/proc").join(pid).join("status"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        println!("  {:<24} {}", pod.name_any(), resident.trim());
    }
    Ok(())
}

/// Pods of a realistic size that no scheduler takes, so that they cost the API server and its watchers alone.
async fn crowd(tenant: &Tenant, count: usize) -> Result<()> {
    let begin = Instant::now();
    let filler = "x".repeat(200);
    let variables: Vec<_> =
        (0..12).map(|n| json!({ "name": format!("VARIABLE_{n}"), "value": filler })).collect();
    let pods = tenant.pods();
    let make = |n: usize| {
        let pods = pods.clone();
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": format!("crowd-{n}"), "annotations": { tote_api::names::AUTO_SALVAGE: "true" } },
            "spec": {
                "schedulerName": "nobody", "automountServiceAccountToken": false,
                "containers": [{ "name": "main", "image": format!("registry.test/crowd-{}:v1", n % 200), "env": variables }],
            },
        });
        async move { anyhow::Ok(pods.create(&PostParams::default(), &serde_json::from_value(object)?).await?) }
    };
    futures::stream::iter((0..count).map(make))
        .buffer_unordered(16)
        .try_for_each(|_| async { Ok(()) })
        .await?;
    println!("\n{count} pods made in {:.0} s", begin.elapsed().as_secs_f64());
    Ok(())
}
