//! Three hundred pods of thirty images begin to fail at once: what becomes of them, and what it costs. The same pods with
//! their images in place say how long the cluster itself takes.

mod audit;
mod report;
mod usage;
mod wave;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::{Event, Pod};
use kube::api::ListParams;
use kube::{Api, ResourceExt as _};
use tokio::task::block_in_place;
use tote_api::{Phase, SalvageJob};

pub use audit::{CONTROLLER, Requests};
pub use report::Report;
pub use wave::Wave;

use crate::cluster::{Cluster, Options};
use crate::images::{Image, Layout, tiny};
use crate::operator;
use crate::registry::{self, Control as _, Registry};
use crate::tenant::{PodShape, Tenant, phase};
use audit::Mark;

/// Of the goal: images that are needed where they are not, as many others being everywhere. They make 300 pods.
pub const IMAGES: usize = 30;

/// Pods of an image on each node that needs it. That is two of three: the third is where it was pulled.
const PODS: usize = 5;

/// Transfers at once.
const CONCURRENT: &str = "2";

/// Nothing is asked of the API server for so long: all has been written.
const QUIET: Duration = Duration::from_secs(5);

/// Longest until then.
const SETTLED: Duration = Duration::from_secs(120);

/// An image that is in the registry.
struct Pushed {
    image: Image,
    /// By digest or by tag.
    reference: String,
    /// The node it is pulled on; for one that is everywhere, the node that no pod of it is on.
    source: String,
}

/// Makes a cluster of this name, has the pods run with their images in place, then with all of them missing, then with
/// those in place that were brought. There are as many `images`, and ten pods of each. Tells what it is about to do. The cluster stays.
///
/// # Errors
/// The cluster or the operator does not come up, or some pod does not run.
pub async fn run(name: &str, images: usize, say: impl Fn(&str)) -> Result<Report> {
    let cluster = block_in_place(|| {
        let cluster = Cluster::up(&Options::crowded(name, CONTROLLER), &|line| println!("{line}"))?;
        cluster.load_image(&operator::archive()?)?;
        operator::install(&cluster, &[("controller.maxConcurrentSalvages", CONCURRENT)])?;
        anyhow::Ok(cluster)
    })?;
    let client = cluster.client().await?;
    let tenant = Tenant::enter(client.clone(), "load", true).await?;
    let listen = (cluster.registry_address(), 0).into();
    let registry = Registry::start(&registry::Options { listen, name: None, storage: None })?;
    cluster.trust_registry(registry.upstream().name())?;

    let layout = Layout::temporary()?;
    let there = push(&cluster, &registry, &layout, ("there", images)).await?;
    let missing = push(&cluster, &registry, &layout, ("missing", images)).await?;
    say("pulling the images");
    let everywhere = there.iter().flat_map(|one| cluster.nodes().iter().map(move |node| (one, node.name())));
    let once = missing.iter().map(|one| (one, one.source.as_str()));
    let pullers: Vec<_> = everywhere
        .chain(once)
        .enumerate()
        .map(|(n, (one, node))| {
            (format!("puller-{n}"), PodShape { opted_in: false, ..PodShape::new(node, &one.reference) })
        })
        .collect();
    wave::run(&cluster, &tenant, &pullers).await.context("pulling the images")?;
    wave::clear(&tenant).await?;
    registry.stop()?;

    say("pods whose images are there");
    let before = wave::run(&cluster, &tenant, &pods(&cluster, &there)).await?;
    wave::clear(&tenant).await?;

    say("pods whose images are missing");
    let audit_log = cluster.audit_log()?;
    let operator = usage::operator(&cluster, &client).await?;
    let daemons = usage::daemons(&cluster)?;
    let counted = Counted::now(&tenant).await?;
    let (mark, begin, busy) = (Mark::now(&audit_log)?, Instant::now(), usage::machine()?);
    let load = wave::run(&cluster, &tenant, &pods(&cluster, &missing)).await?;
    let busy = usage::machine()?.saturating_sub(busy);
    let mut used = Vec::new();
    for watched in operator.iter().chain(&daemons) {
        used.push((watched.name.clone(), watched.before(), watched.used()?));
    }
    settle(&tenant, &audit_log, &mark).await?;
    let requests = mark.since(&audit_log)?;
    let span = begin.elapsed();
    let counted = Counted::now(&tenant).await?.since(counted)?;
    let jobs = tenant.jobs().list(&ListParams::default()).await?.items;
    let events = events(&tenant).await?;
    let metrics = metrics(&tenant, "controller", 8080).await?.concat();
    wave::clear(&tenant).await?;

    say("the same pods again");
    let after = wave::run(&cluster, &tenant, &pods(&cluster, &missing)).await?;
    let mut wanted = BTreeMap::new();
    for one in &missing {
        for node in cluster.nodes().iter().filter(|node| node.name() != one.source) {
            let pair = (one.image.digest().to_owned(), node.name().to_owned());
            wanted.insert(pair, one.image.needed_bytes()?);
        }
    }
    Ok(Report {
        pods: images * PODS * (cluster.nodes().len() - 1),
        before,
        load,
        after,
        wanted,
        jobs,
        counted,
        requests,
        span,
        events,
        metrics,
        used,
        busy,
    })
}

/// Images unlike each other and those of any other run; every second one goes by its tag.
async fn push(
    cluster: &Cluster,
    registry: &Registry,
    layout: &Layout,
    (kind, images): (&str, usize),
) -> Result<Vec<Pushed>> {
    let mut all = Vec::new();
    for n in 0..images {
        let image = tiny(layout, &format!("load {kind} {n} {}", std::process::id()))?;
        let repository = format!("{kind}-{n}");
        let pinned = registry.upstream().push(&image, &repository, Some("v1")).await?;
        let tagged = format!("{}/{repository}:v1", registry.upstream().name());
        let source = cluster.nodes()[n % cluster.nodes().len()].name().to_owned();
        all.push(Pushed { image, reference: if n % 2 == 0 { pinned } else { tagged }, source });
    }
    Ok(all)
}

/// The pods of a wave, those of an image far from each other.
fn pods(cluster: &Cluster, images: &[Pushed]) -> Vec<(String, PodShape)> {
    let mut pods = Vec::new();
    for number in 0..PODS {
        for (n, one) in images.iter().enumerate() {
            for node in cluster.nodes().iter().map(crate::cluster::Node::name) {
                if node != one.source {
                    pods.push((format!("pod-{n}-{node}-{number}"), PodShape::new(node, &one.reference)));
                }
            }
        }
    }
    pods
}

/// Waits until every job is final and the controller asks for nothing more.
async fn settle(tenant: &Tenant, audit_log: &Path, mark: &Mark) -> Result<()> {
    let mut last = (0, Instant::now());
    let jobs = tenant.jobs();
    let deadline = Instant::now() + SETTLED;
    loop {
        let all = jobs.list(&ListParams::default()).await?.items;
        let is_over = all.iter().all(|job| phase(job).is_some_and(Phase::is_final));
        let count = mark.since(audit_log)?.total();
        if count != last.0 || !is_over {
            last = (count, Instant::now());
        }
        if last.1.elapsed() > QUIET {
            return Ok(());
        }
        anyhow::ensure!(Instant::now() < deadline, "no rest within {SETTLED:?}\n{}", tenant.report().await);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// The operator's events of the namespace by kind and reason: objects that have one, and how often it was told.
async fn events(tenant: &Tenant) -> Result<BTreeMap<String, (usize, i32)>> {
    let events: Api<Event> = Api::namespaced(tenant.client(), tenant.namespace());
    let mut found: BTreeMap<String, (usize, i32)> = BTreeMap::new();
    for event in events.list(&ListParams::default()).await? {
        if event.reporting_component.as_deref() == Some(tote_api::names::MANAGER) {
            let kind = event.involved_object.kind.unwrap_or_default();
            let told = event.series.and_then(|series| series.count).unwrap_or(1);
            let entry = found.entry(format!("{kind} {}", event.reason.unwrap_or_default())).or_default();
            entry.0 += 1;
            entry.1 += told;
        }
    }
    Ok(found)
}

/// The metrics of every pod of a component.
async fn metrics(tenant: &Tenant, component: &str, port: u16) -> Result<Vec<String>> {
    let pods: Api<Pod> = Api::namespaced(tenant.client(), operator::NAMESPACE);
    let labels = ListParams::default().labels(&format!("app.kubernetes.io/component={component}"));
    let mut found = Vec::new();
    for pod in pods.list(&labels).await? {
        let path = format!(
            "/api/v1/namespaces/{}/pods/{}:{port}/proxy/metrics",
            operator::NAMESPACE,
            pod.name_any()
        );
        found.push(tenant.client().request_text(http::Request::get(path).body(Vec::new())?).await?);
    }
    Ok(found)
}

/// What all agents have counted together.
#[derive(Clone, Copy, Debug)]
pub struct Counted {
    /// Bytes of blobs given to other nodes,
    pub served: u64,
    /// and got from them.
    pub received: u64,
    /// Requests for parts of blobs that did not bring all that was asked for.
    pub left: u64,
}

impl Counted {
    async fn now(tenant: &Tenant) -> Result<Self> {
        let texts = metrics(tenant, "agent", 8081).await?.concat();
        // A counter with labels is not there until it counts.
        let sum = |name: &str| {
            let values = texts.lines().filter(|line| line.starts_with(name)).map(|line| {
                let value = line.rsplit(' ').next().unwrap_or_default();
                value.parse::<u64>().with_context(|| line.to_owned())
            });
            values.sum::<Result<u64>>()
        };
        Ok(Self {
            served: sum("tote_agent_served_bytes_total")?,
            received: sum("tote_agent_received_bytes_total")?,
            left: sum("tote_agent_requests_left_total")?,
        })
    }

    fn since(self, before: Self) -> Result<Self> {
        let more = |now: u64, before| {
            now.checked_sub(before).context("an agent was started again, and counts from 0 on")
        };
        Ok(Self {
            served: more(self.served, before.served)?,
            received: more(self.received, before.received)?,
            left: more(self.left, before.left)?,
        })
    }
}

/// The digests and nodes of jobs, each job's own.
fn pairs(jobs: &[SalvageJob]) -> Vec<(String, String)> {
    jobs.iter()
        .map(|job| {
            let digest = job.status.as_ref().and_then(|status| status.digest.clone()).unwrap_or_default();
            (digest, job.spec.node_name.clone())
        })
        .collect()
}

/// Whether nothing of a list is in it twice.
fn is_distinct<T: Ord>(all: &[T]) -> bool {
    all.iter().collect::<BTreeSet<_>>().len() == all.len()
}
