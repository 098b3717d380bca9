//! The agent as a whole: its parts wired together.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tote_rpc::identity::{Identity, Peer};

use crate::bandwidth::{Bandwidth, Rate};
use crate::containerd::{Containerd, Facts};
use crate::health;
use crate::identity::{Mounts, Standing};
use crate::import::{Context, Imports, Lifetimes, Patience};
use crate::inventory::{self, Inventory};
use crate::kubelet::Records;
use crate::metrics::Metrics;
use crate::serve::{Served, router};
use crate::service::{Service, Terms, epoch};

/// How often containerd is asked who it is; oftener while it does not say.
const FACTS_INTERVAL: Duration = Duration::from_secs(10);
const FACTS_RETRY: Duration = Duration::from_secs(1);

/// So many times in a row it must not have answered to be down: one that is restarted is back by then.
const SILENCES: u32 = 3;

/// What an agent is to be.
pub struct Settings {
    /// The node's name, as Kubernetes has it.
    pub node_name: String,
    /// The cap on what it receives.
    pub max_bandwidth: Option<Rate>,
    /// The cap on what it gives.
    pub max_upload: Option<Rate>,
    /// How patient it is with its peers.
    pub patience: Patience,
    /// How long it keeps transfers.
    pub lifetimes: Lifetimes,
    /// Its key, and its certificate if it has one already.
    pub identity: Arc<Identity>,
    /// What says who it is.
    pub mounts: Option<Mounts>,
    /// Where kubelet writes down who may have an image; without it nothing is known of that.
    pub records: Option<Arc<Records>>,
}

/// Runs an agent until `stop`, then drains.
pub async fn run(
    containerd: Arc<dyn Containerd>,
    settings: Settings,
    control: TcpListener,
    health: Option<TcpListener>,
    stop: CancellationToken,
) -> Result<(), tote_rpc::TlsError> {
    let started = Instant::now();
    let metrics = Arc::new(Metrics::default());
    let mut registry = Registry::default();
    metrics.register(&mut registry);
    let tasks = TaskTracker::new();

    let facts = watch::Sender::new(None);
    let images = watch::Sender::new(None);
    let runtime_down = watch::Sender::new(false);
    let known_runtime_down = runtime_down.subscribe();
    let (known_facts, known_images) = (facts.subscribe(), images.subscribe());
    tasks.spawn(inventory::follow(containerd.clone(), settings.records.clone(), images, stop.clone()));
    tasks.spawn(until(stop.clone(), follow_facts(containerd.clone(), facts, runtime_down)));
    tasks.spawn(until(stop.clone(), count_images(known_images.clone(), metrics.clone())));

    let standing = Arc::new(Standing::new(settings.identity.clone(), &settings.node_name, settings.mounts));
    let (followed, certified) = (standing.clone(), settings.identity.certified());
    tasks.spawn(until(stop.clone(), async move { followed.follow().await }));
    tasks.spawn(until(stop.clone(), count_certificates(certified.clone(), metrics.clone(), started)));

    let peers = tote_rpc::blob_client(&settings.identity)?;
    let context = Context {
        patience: settings.patience,
        metrics: metrics.clone(),
        records: settings.records.clone(),
        ..Context::new(containerd.clone(), peers, Bandwidth::new(settings.max_bandwidth))
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
            } else if certified.borrow().is_none() {
                Some("the controller has not given this agent a certificate yet")
            } else {
                None
            }
        };
        let stop = stop.clone();
        tasks.spawn(health::serve(listener, registry, not_ready, stop));
    }

    let upload = Bandwidth::new(settings.max_upload);
    let mut served = Served::new(containerd, metrics.clone());
    served.upload = upload;
    let grants = served.grants.clone();
    let refused = metrics.clone();
    let service = Service {
        node_name: settings.node_name,
        epoch: epoch(),
        imports: imports.clone(),
        facts: known_facts,
        runtime_down: known_runtime_down,
        inventory: known_images,
        records: settings.records,
        metrics,
        standing,
        grants,
        stop: stop.clone(),
        terms: Terms::default(),
    };
    let stopping = stop.clone();
    let ended = imports.clone();
    tasks.spawn(async move {
        stopping.cancelled().await;
        // So that those who follow a transfer hear that the agent stops.
        ended.stop().await;
    });
    let on_refusal = Arc::new(move |refusal| refused.refused(refusal));
    let stopped = stop.clone();
    let ended = tote_rpc::serve(control, settings.identity, service, router(served), on_refusal, stop).await;
    stopped.cancel();
    tasks.close();
    tasks.wait().await;
    ended
}

async fn until(stop: CancellationToken, task: impl Future<Output = ()>) {
    stop.run_until_cancelled(task).await;
}

async fn follow_facts(
    containerd: Arc<dyn Containerd>,
    known: watch::Sender<Option<Facts>>,
    down: watch::Sender<bool>,
) {
    let mut silences = 0_u32;
    loop {
        let mut pause = FACTS_INTERVAL;
        match containerd.facts().await {
            Ok(facts) => {
                silences = 0;
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
                silences = silences.saturating_add(1);
                pause = FACTS_RETRY;
                tracing::warn!(%error, "waiting for containerd");
            }
        }
        let is_down = silences >= SILENCES;
        down.send_if_modified(|known| std::mem::replace(known, is_down) != is_down);
        tokio::time::sleep(pause).await;
    }
}

async fn count_images(mut known: watch::Receiver<Option<Arc<Inventory>>>, metrics: Arc<Metrics>) {
    while known.changed().await.is_ok() {
        metrics.images(known.borrow_and_update().as_ref().map_or(0, |images| images.len()));
    }
}

async fn count_certificates(
    mut certified: watch::Receiver<Option<Peer>>,
    metrics: Arc<Metrics>,
    started: Instant,
) {
    let mut first = true;
    // One that it had from the beginning counts as well.
    certified.mark_changed();
    while certified.changed().await.is_ok() {
        let Some(peer) = certified.borrow_and_update().clone() else { continue };
        let expires = peer.not_after.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let took = started.elapsed();
        tracing::info!(expires, after_seconds = took.as_secs_f32(), "certificate received");
        metrics.certified(expires, first.then_some(took));
        first = false;
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
