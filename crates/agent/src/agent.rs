//! The agent as a whole: its parts wired together.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::containerd::{Containerd, Facts};
use crate::health;
use crate::import::{Bandwidth, Context, Imports, Lifetimes, Patience, Rate};
use crate::inventory::{self, Inventory};
use crate::metrics::Metrics;
use crate::serve::{Served, router};
use crate::service::Service;

/// How often containerd is asked who it is; oftener while it does not say.
const FACTS_INTERVAL: Duration = Duration::from_secs(10);
const FACTS_RETRY: Duration = Duration::from_secs(1);

/// What an agent is to be.
pub struct Settings {
    /// The node's name, as Kubernetes has it.
    pub node_name: String,
    /// The cap on what it receives.
    pub max_bandwidth: Option<Rate>,
    /// How patient it is with its peers.
    pub patience: Patience,
    /// How long it keeps transfers.
    pub lifetimes: Lifetimes,
}

/// Runs an agent until `stop`, then drains. Plain connections: whoever reaches `control` may ask anything.
pub async fn run(
    containerd: Arc<dyn Containerd>,
    settings: Settings,
    control: TcpListener,
    health: Option<TcpListener>,
    stop: CancellationToken,
) {
    let metrics = Arc::new(Metrics::default());
    let mut registry = Registry::default();
    metrics.register(&mut registry);
    let tasks = TaskTracker::new();

    let facts = watch::Sender::new(None);
    let images = watch::Sender::new(None);
    let (known_facts, known_images) = (facts.subscribe(), images.subscribe());
    tasks.spawn(inventory::follow(containerd.clone(), images, stop.clone()));
    tasks.spawn(until(stop.clone(), follow_facts(containerd.clone(), facts)));
    tasks.spawn(until(stop.clone(), count_images(known_images.clone(), metrics.clone())));

    let context = Context {
        patience: settings.patience,
        metrics: metrics.clone(),
        ..Context::new(containerd.clone(), tote_rpc::blob_client(), Bandwidth::new(settings.max_bandwidth))
    };
    let imports = Arc::new(Imports::new(context, settings.lifetimes));
    tasks.spawn(until(stop.clone(), sweep(imports.clone(), settings.lifetimes.abandoned)));

    if let Some(listener) = health {
        let (facts, images) = (known_facts.clone(), known_images.clone());
        let not_ready = move || {
            if facts.borrow().is_none() {
                Some("containerd does not answer")
            } else if images.borrow().is_none() {
                Some("the node's images have not been looked at yet")
            } else {
                None
            }
        };
        let stop = stop.clone();
        tasks.spawn(async move {
            if let Err(error) = health::serve(listener, registry, not_ready, stop).await {
                tracing::error!(%error, "health and metrics are no longer served");
            }
        });
    }

    let served = Served { containerd, metrics: metrics.clone() };
    let service =
        Service::new(settings.node_name, imports.clone(), known_facts, known_images, metrics, stop.clone());
    let stopping = stop.clone();
    let ended = imports.clone();
    tasks.spawn(async move {
        stopping.cancelled().await;
        // So that those who follow a transfer hear that the agent stops.
        ended.stop().await;
    });
    tote_rpc::serve(control, service, router(served), stop).await;
    tasks.close();
    tasks.wait().await;
}

async fn until(stop: CancellationToken, task: impl Future<Output = ()>) {
    stop.run_until_cancelled(task).await;
}

async fn follow_facts(containerd: Arc<dyn Containerd>, known: watch::Sender<Option<Facts>>) {
    loop {
        let mut pause = FACTS_INTERVAL;
        match containerd.facts().await {
            Ok(facts) => {
                if facts.snapshotter.is_err() {
                    pause = FACTS_RETRY;
                }
                known.send_if_modified(|current| {
                    let differs = current.as_ref() != Some(&facts);
                    if differs {
                        let (version, platform) = (&facts.version, &facts.platform);
                        match &facts.snapshotter {
                            Ok(name) => tracing::info!(version, %platform, snapshotter = name, "containerd"),
                            Err(problem) => tracing::warn!(version, %platform, problem, "containerd"),
                        }
                        *current = Some(facts);
                    }
                    differs
                });
            }
            Err(error) => {
                pause = FACTS_RETRY;
                tracing::warn!(%error, "waiting for containerd");
            }
        }
        tokio::time::sleep(pause).await;
    }
}

async fn count_images(mut known: watch::Receiver<Option<Arc<Inventory>>>, metrics: Arc<Metrics>) {
    while known.changed().await.is_ok() {
        metrics.images(known.borrow_and_update().as_ref().map_or(0, |images| images.len()));
    }
}

async fn sweep(imports: Arc<Imports>, abandoned: Duration) {
    let interval = (abandoned / 8).clamp(Duration::from_millis(50), Duration::from_secs(15));
    loop {
        tokio::time::sleep(interval).await;
        if let Err(error) = imports.sweep().await {
            tracing::warn!(%error, "what transfers left is not removed yet");
        }
    }
}
