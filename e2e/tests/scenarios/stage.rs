//! What scenarios play on: one cluster with the operator installed, and for each scenario a namespace and a
//! registry of its own.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use kube::api::ListParams;
use kube::{Client, ResourceExt as _};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{OnceCell, RwLock, Semaphore, watch};
use tote_api::names;
use tote_e2e::cluster::{Cluster, Node, Options};
use tote_e2e::images::{Image, Layout, preset};
use tote_e2e::registry::{self, Control as _, Registry};
use tote_e2e::tenant::{PodShape, Tenant};
use tote_e2e::{inspect, operator, rootfs};

/// The cluster's name.
const CLUSTER: &str = "test";

/// Agents are capped, so that a transfer of hundreds of megabytes can be disturbed in its middle.
const VALUES: &[(&str, &str)] = &[("agent.maxBandwidth", "25Mi"), ("controller.maxConcurrentSalvages", "6")];

/// How many scenarios play at once: they mostly wait, but two cores carry no more without missing deadlines.
const TURNS: usize = 7;

/// Longest that a scenario may take.
const SCENARIO: Duration = Duration::from_secs(900);

/// For a pod of an image that any registry or peer serves at once: kubelet, scheduler and a busy machine.
pub const SOON: Duration = Duration::from_secs(60);

/// What a scenario needs for itself alone, since it disturbs others there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alone {
    /// Nothing: it runs beside any other.
    Nothing,
    /// The pulls of one node's kubelet, which are serial: it makes them hang, or restarts its daemons.
    Node(&'static str),
    /// The operator, and so the whole cluster.
    Operator,
}

type Running = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

/// One scenario.
#[derive(Clone, Copy)]
pub struct Scenario {
    /// As `cargo test` shows it.
    pub name: &'static str,
    /// The node that pulls the image while the registry is well.
    pub source: &'static str,
    /// The node that then cannot.
    pub target: &'static str,
    /// A third node, if it takes part.
    pub also: Option<&'static str>,
    /// What it must have for itself.
    pub alone: Alone,
    /// The scenario itself.
    pub play: fn(Play) -> Running,
}

/// Shared by all scenarios.
pub struct Stage {
    runtime: tokio::runtime::Runtime,
    cluster: Cluster,
    client: Client,
    run: String,
    /// How many scenarios wait or play that share the operator; those that want it alone come after them.
    shared: watch::Sender<usize>,
    operator: RwLock<()>,
    nodes: Vec<(String, RwLock<()>)>,
    turns: Semaphore,
    big: OnceCell<Big>,
}

/// An image of 500 MB that n1 holds, shared by the scenarios that disturb its transfer.
pub struct Big {
    /// By digest.
    pub reference: String,
    /// What it consists of.
    pub image: Image,
    _registry: Registry,
    _layout: Layout,
}

impl Stage {
    /// Brings the cluster up and installs the operator.
    pub fn set() -> Result<Self> {
        let runtime = tokio::runtime::Runtime::new()?;
        runtime.spawn(take_down_when_told());
        if Cluster::down(CLUSTER)? {
            println!("removed the cluster that an earlier run left");
        }
        let cluster = Cluster::up(&Options::new(CLUSTER), &|line| println!("{line}"))?;
        println!("installing the operator");
        let archive = operator::archive();
        let installed = archive
            .and_then(|tar| cluster.load_image(&tar))
            .and_then(|()| operator::install(&cluster, VALUES));
        if let Err(error) = installed {
            Cluster::down(CLUSTER)?;
            return Err(error);
        }
        let client = runtime.block_on(cluster.client())?;
        let nodes = cluster.nodes().iter().map(|node| (node.name().to_owned(), RwLock::new(()))).collect();
        let run = format!("{:x}", std::process::id());
        Ok(Self {
            runtime,
            cluster,
            client,
            run,
            shared: watch::Sender::new(0),
            turns: Semaphore::new(TURNS),
            operator: RwLock::new(()),
            nodes,
            big: OnceCell::new(),
        })
    }

    async fn prepare_big(&self) -> Result<Big> {
        let registry = self.registry()?;
        let layout = Layout::temporary()?;
        let image = preset("random-500", &layout, &self.run)?;
        let reference = registry.upstream().push(&image, "big", None).await?;
        let tenant = Tenant::enter(self.client.clone(), "big", true).await?;
        let shape = PodShape { opted_in: false, ..PodShape::new("n1", &reference) };
        tenant.start("source", &shape).await?;
        tenant.running("source", 2 * SOON).await?;
        registry.stop()?;
        Ok(Big { reference, image, _registry: registry, _layout: layout })
    }

    /// A registry at an address of its own that every node trusts.
    fn registry(&self) -> Result<Registry> {
        let listen = SocketAddr::new(IpAddr::V4(self.cluster.registry_address()), 0);
        let registry = Registry::start(&registry::Options { listen, name: None, storage: None })?;
        self.cluster.trust_registry(registry.upstream().name())?;
        Ok(registry)
    }

    /// Plays one scenario to its end, whatever that is, and clears the stage behind it.
    pub fn play(self: &Arc<Self>, scenario: Scenario) -> Result<()> {
        self.runtime.block_on(async {
            if scenario.alone == Alone::Operator {
                let mut shared = self.shared.subscribe();
                shared.wait_for(|waiting| *waiting == 0).await?;
                let _own = self.operator.write().await;
                return self.play_now(scenario).await;
            }
            self.shared.send_modify(|waiting| *waiting += 1);
            let outcome = self.play_beside(scenario).await;
            self.shared.send_modify(|waiting| *waiting -= 1);
            outcome
        })
    }

    /// Waits for the nodes it needs, then for its turn.
    async fn play_beside(self: &Arc<Self>, scenario: Scenario) -> Result<()> {
        let _operator = self.operator.read().await;
        let mut held_shared = Vec::new();
        let mut held_own = Vec::new();
        for (name, lock) in &self.nodes {
            if matches!(scenario.alone, Alone::Node(own) if own == name) {
                held_own.push(lock.write().await);
            } else if [Some(scenario.source), Some(scenario.target), scenario.also]
                .contains(&Some(name.as_str()))
            {
                held_shared.push(lock.read().await);
            }
        }
        let _turn = self.turns.acquire().await?;
        self.play_now(scenario).await
    }

    async fn play_now(self: &Arc<Self>, scenario: Scenario) -> Result<()> {
        let play = Play::enter(self.clone(), scenario).await?;
        let tenant = play.tenant.clone();
        let outcome = match tokio::time::timeout(SCENARIO, (scenario.play)(play)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(anyhow!("not over after {} s\n{}", SCENARIO.as_secs(), tenant.report().await)),
        };
        let left = tenant.leave().await;
        outcome?;
        left
    }

    /// Takes the cluster down.
    pub fn strike(&self) -> Result<()> {
        Cluster::down(self.cluster.name()).map(drop)
    }
}

/// A scenario's own corner of the stage.
pub struct Play {
    stage: Arc<Stage>,
    scenario: Scenario,
    layout: Layout,
    /// Its registry, at an address of its own that every node trusts.
    pub registry: Registry,
    /// Its namespace, opted in.
    pub tenant: Tenant,
}

impl Play {
    async fn enter(stage: Arc<Stage>, scenario: Scenario) -> Result<Self> {
        let registry = stage.registry()?;
        let namespace = scenario.name.replace('_', "-");
        let tenant = Tenant::enter(stage.client.clone(), &namespace, true).await?;
        Ok(Self { layout: Layout::temporary()?, stage, scenario, registry, tenant })
    }

    /// The cluster, for what a scenario does to it.
    pub fn cluster(&self) -> &Cluster {
        &self.stage.cluster
    }

    /// The operator, as it was when the scenario began.
    pub fn install_operator(&self) -> Result<()> {
        operator::install(&self.stage.cluster, VALUES)
    }

    /// The image of 500 MB that n1 holds.
    pub async fn big(&self) -> Result<&Big> {
        self.stage.big.get_or_try_init(|| self.stage.prepare_big()).await
    }

    /// The node that pulls while the registry is well.
    pub fn source(&self) -> Result<&Node> {
        self.stage.cluster.node(self.scenario.source)
    }

    /// The node that cannot pull.
    pub fn target(&self) -> Result<&Node> {
        self.stage.cluster.node(self.scenario.target)
    }

    /// Builds an image of this kind, unlike any other scenario's and any other run's.
    pub fn image(&self, kind: &str) -> Result<Image> {
        self.image_seeded(kind, "")
    }

    /// As [`Play::image`], for a scenario that needs several of one kind.
    pub fn image_seeded(&self, kind: &str, seed: &str) -> Result<Image> {
        preset(kind, &self.layout, &format!("{} {} {seed}", self.stage.run, self.scenario.name))
    }

    /// Pushes it under a tag of the repository `app`; returns the reference by tag and the one by digest.
    pub async fn push(&self, image: &Image) -> Result<(String, String)> {
        self.push_as(image, "app").await
    }

    /// As [`Play::push`], to another repository.
    pub async fn push_as(&self, image: &Image, repository: &str) -> Result<(String, String)> {
        let pinned = self.registry.upstream().push(image, repository, Some("v1")).await?;
        Ok((format!("{}/{repository}:v1", self.registry.upstream().name()), pinned))
    }

    /// Lets kubelet on the source pull the reference, by a pod that runs; its name is `source`.
    pub async fn pull_on_source(&self, reference: &str) -> Result<()> {
        self.pull_on("source", self.scenario.source, reference).await
    }

    /// Lets kubelet on a node pull the reference, by a pod that runs.
    pub async fn pull_on(&self, pod: &str, node: &str, reference: &str) -> Result<()> {
        let shape = PodShape { opted_in: false, ..PodShape::new(node, reference) };
        self.tenant.start(pod, &shape).await?;
        self.tenant.running(pod, SOON).await?;
        Ok(())
    }

    /// A pod on the target, opted in.
    pub async fn start_on_target(&self, pod: &str, reference: &str) -> Result<()> {
        self.tenant.start(pod, &PodShape::new(self.scenario.target, reference)).await
    }

    /// The common path: pulled on the source, the registry stopped, a pod on the target that runs all the same,
    /// and the salvaged image whole in every respect. Returns the pinned reference.
    pub async fn salvage(&self, image: &Image, by_tag: bool) -> Result<()> {
        let (tagged, pinned) = self.push(image).await?;
        let reference = if by_tag { tagged } else { pinned };
        self.pull_on_source(&reference).await?;
        self.registry.stop()?;
        self.start_on_target("waiting", &reference).await?;
        self.tenant.imported(SOON).await?;
        self.tenant.running("waiting", SOON).await?;
        self.assert_told(image).await?;
        self.assert_intact(image, &reference).await
    }

    /// The pod's and the job's events, and the pod's annotations.
    async fn assert_told(&self, image: &Image) -> Result<()> {
        self.tenant.event("waiting", names::event::IMAGE_SALVAGEABLE, SOON).await?;
        self.tenant.event("waiting", names::event::IMAGE_SALVAGED, SOON).await?;
        let job = self.tenant.imported(SOON).await?.name_any();
        for reason in ["Transferring", "Imported"] {
            self.tenant.event(&job, reason, SOON).await?;
        }
        let pod = self.tenant.pods().get("waiting").await?;
        ensure!(pod.annotations().get(names::SALVAGED_DIGEST).map(String::as_str) == Some(image.digest()));
        let at = pod.annotations().get(names::IMPORTED_AT).context("no annotation of the time of import")?;
        at.parse::<k8s_openapi::jiff::Timestamp>().with_context(|| format!("{at:?} is no time"))?;
        Ok(())
    }

    /// After a salvage into pod `waiting` of what pod `source` runs: complete and unpacked by `ctr`, the same root
    /// file system, whole after a forced collection, nothing left unfinished, and nothing left at all once its
    /// records are removed.
    pub async fn assert_intact(&self, image: &Image, reference: &str) -> Result<()> {
        let target = self.target()?;
        let name: tote_image::Reference = reference.parse()?;
        inspect::assert_whole(target, &name.to_string())?;
        let theirs = self.root_of("source", self.source()?).await?;
        let ours = self.root_of("waiting", target).await?;
        ensure!(!theirs.is_empty(), "the source's root file system is empty");
        for (path, line) in &theirs {
            ensure!(ours.get(path) == Some(line), "{}: {line} became {:?}", path.display(), ours.get(path));
        }
        ensure!(theirs.len() == ours.len(), "{} paths became {}", theirs.len(), ours.len());
        inspect::collect_garbage(target)?;
        inspect::assert_whole(target, &name.to_string())?;
        self.assert_nothing_unfinished(image).await?;
        self.stop_pod("waiting").await?;
        inspect::remove_whole(target, image)
    }

    /// No lease and no ingest of this scenario's transfers is left on any node; they may take a moment to go. Those
    /// of other scenarios that are under way do not count, unless this one has the operator for itself.
    pub async fn assert_nothing_unfinished(&self, image: &Image) -> Result<()> {
        self.nothing_unfinished_within(image, SOON).await
    }

    /// As [`Play::assert_nothing_unfinished`], with a deadline of its own.
    pub async fn nothing_unfinished_within(&self, image: &Image, deadline: Duration) -> Result<()> {
        let mut own: Vec<String> = image.blobs().into_iter().map(|blob| blob.digest).collect();
        let jobs = self.tenant.jobs().list(&ListParams::default()).await?;
        own.extend(jobs.into_iter().filter_map(|job| job.metadata.uid));
        let everything = self.scenario.alone == Alone::Operator;
        let begin = Instant::now();
        loop {
            let mut left = Vec::new();
            for node in self.stage.cluster.nodes() {
                let found = inspect::unfinished(node)?.into_iter();
                let counts = |one: &String| everything || own.iter().any(|id| one.contains(id.as_str()));
                left.extend(found.filter(counts).map(|one| format!("{}: {one}", node.name())));
            }
            if left.is_empty() {
                return Ok(());
            }
            ensure!(
                begin.elapsed() < deadline,
                "left behind:\n{}\n{}",
                left.join("\n"),
                self.tenant.report().await
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Deletes a pod and waits until it is gone.
    pub async fn stop_pod(&self, pod: &str) -> Result<()> {
        let pods = self.tenant.pods();
        pods.delete(pod, &kube::api::DeleteParams::default().grace_period(0)).await?;
        self.tenant
            .until(&format!("pod {pod} to go"), SOON, || async {
                Ok(pods.get_opt(pod).await?.is_none().then_some(()))
            })
            .await
    }

    /// The root file system of a pod's container, as its node mounts it.
    async fn root_of(
        &self,
        pod: &str,
        node: &Node,
    ) -> Result<std::collections::BTreeMap<std::path::PathBuf, String>> {
        let object = self.tenant.pods().get(pod).await?;
        let status = object.status.and_then(|status| status.container_statuses).unwrap_or_default();
        let id = status.first().and_then(|container| container.container_id.as_deref());
        let Some(id) = id.and_then(|id| id.strip_prefix("containerd://")) else {
            bail!("pod {pod} has no container")
        };
        let task = format!("run/containerd/io.containerd.runtime.v2.task/k8s.io/{id}/rootfs");
        // A process of the node's mount namespace shows what is mounted there.
        let mut inside = node.command(&["sleep", "600"])?.spawn().context("entering the node")?;
        let root = std::path::Path::new("/proc").join(inside.id().to_string()).join("root").join(task);
        let entered = self
            .tenant
            .until("the node's mount namespace", SOON, || async { Ok(root.exists().then_some(())) });
        let found = match entered.await {
            Ok(()) => rootfs::fingerprint(&root),
            Err(error) => Err(error),
        };
        inside.kill()?;
        inside.wait()?;
        found
    }
}

/// Ctrl-C, or what ends a session or a continuous integration: nothing is left behind.
async fn take_down_when_told() {
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return;
    };
    let code = tokio::select! {
        _ = interrupt.recv() => 130,
        _ = terminate.recv() => 143,
    };
    eprintln!("taking the cluster down");
    if let Err(error) = Cluster::down(CLUSTER) {
        eprintln!("taking the cluster down: {error:#}");
    }
    std::process::exit(code);
}
