//! What scenarios play on: one cluster with the operator installed, and who plays when. What a scenario does there
//! is `play`'s.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use kube::Client;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{OnceCell, RwLock, Semaphore, watch};
use tote_e2e::cluster::{Cluster, Options};
use tote_e2e::images::{Image, Layout, preset};
use tote_e2e::operator;
use tote_e2e::registry::{self, Control as _, Registry};
use tote_e2e::tenant::{PodShape, Tenant};

use crate::outputs::{Receiver, SECRET};
use crate::play::Play;

/// The cluster's name.
const CLUSTER: &str = "test";

/// Agents are capped, so that a transfer of hundreds of megabytes can be disturbed in its middle. Certificates are renewed
/// every minute, so that every scenario has renewals in its middle.
const VALUES: &[(&str, &str)] = &[
    ("agent.maxBandwidth", "25Mi"),
    ("controller.maxConcurrentSalvages", "6"),
    ("tls.certificateLifetime", "2m"),
    ("config.images.denied[0]", "*/denied"),
    ("registryResolve.enabled", "true"),
];

/// Name of the Secret with what proves to the receiver who sends.
const HOOK: &str = "hook";

static RECEIVER: OnceLock<Receiver> = OnceLock::new();

/// What is told of all scenarios' salvages; it listens before the operator is installed.
pub fn receiver() -> &'static Receiver {
    RECEIVER.get().unwrap_or_else(|| unreachable!("the stage was set"))
}

/// Installs the operator as every scenario expects it, with these values on top. The scenarios' registries may be asked.
pub fn install(cluster: &Cluster, more: &[(&str, &str)]) -> Result<()> {
    let registries = format!("{}:*", cluster.registry_address());
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": { "name": HOOK, "namespace": operator::NAMESPACE },
        "stringData": { "value": SECRET.1 },
    });
    operator::make_namespace(cluster)?;
    operator::apply(cluster, &secret.to_string())?;
    let url = format!("http://{}/hook", receiver().address);
    let asked = [
        ("notifications.url", url.as_str()),
        ("notifications.header.name", SECRET.0),
        ("notifications.header.existingSecret", HOOK),
        ("notifications.header.key", "value"),
        ("registryResolve.registries[0]", registries.as_str()),
        ("registryResolve.insecureRegistries[0]", registries.as_str()),
    ];
    operator::install(cluster, &[VALUES, &asked, more].concat())
}

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
#[derive(Clone)]
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
    play: Arc<dyn Fn(Play) -> Running + Send + Sync>,
}

impl Scenario {
    /// One that runs beside any other.
    pub fn new<F, R>(name: &'static str, source: &'static str, target: &'static str, play: F) -> Self
    where
        F: Fn(Play) -> R + Send + Sync + 'static,
        R: Future<Output = Result<()>> + Send + 'static,
    {
        let play = Arc::new(move |corner| Box::pin(play(corner)) as Running);
        Self { name, source, target, also: None, alone: Alone::Nothing, play }
    }

    /// With a third node.
    pub fn with(self, also: &'static str) -> Self {
        Self { also: Some(also), ..self }
    }

    /// With something for itself.
    pub fn alone(self, alone: Alone) -> Self {
        Self { alone, ..self }
    }
}

/// Shared by all scenarios.
pub struct Stage {
    runtime: tokio::runtime::Runtime,
    /// The cluster.
    pub cluster: Cluster,
    /// With the administrator's rights.
    pub client: Client,
    /// Tells this run's images from any other's.
    pub run: String,
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
    /// Where it came from; stopped.
    pub registry: Registry,
    /// Where pod `source` runs it.
    pub tenant: Tenant,
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
        let listening = runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind((cluster.registry_address(), 0)).await?;
            Receiver::start(listener)
        })?;
        let _ = RECEIVER.set(listening);
        println!("installing the operator");
        let archive = operator::archive();
        let installed =
            archive.and_then(|tar| cluster.load_image(&tar)).and_then(|()| install(&cluster, &[]));
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

    /// The image of 500 MB that n1 holds; made when first asked for.
    pub async fn big(&self) -> Result<&Big> {
        self.big.get_or_try_init(|| self.prepare_big()).await
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
        Ok(Big { reference, image, registry, tenant, _layout: layout })
    }

    /// A registry at an address of its own that every node trusts.
    pub fn registry(&self) -> Result<Registry> {
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
        let (name, run) = (scenario.name, scenario.play.clone());
        let play = Play::enter(self.clone(), scenario).await?;
        let tenant = play.tenant.clone();
        let began = Instant::now();
        let outcome = match tokio::time::timeout(SCENARIO, run(play)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(anyhow!("not over after {} s\n{}", SCENARIO.as_secs(), tenant.report().await)),
        };
        let left = tenant.leave().await;
        println!("{name} took {:.0} s", began.elapsed().as_secs_f64());
        outcome?;
        left
    }

    /// Takes the cluster down.
    pub fn strike(&self) -> Result<()> {
        Cluster::down(self.cluster.name()).map(drop)
    }
}

/// Ctrl-C (SIGINT) or SIGTERM: nothing is left behind.
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
