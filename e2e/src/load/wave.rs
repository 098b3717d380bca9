//! Many pods at once: made side by side, followed until all of them run. Knows nothing of the operator but its jobs.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use futures::{StreamExt as _, TryStreamExt as _};
use kube::ResourceExt as _;
use kube::api::{DeleteParams, ListParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use tote_api::Phase;

use crate::cluster::Cluster;
use crate::tenant::{PodShape, Tenant, is_ready, phase, waiting};

/// Requests that make pods at once.
const MAKERS: usize = 32;

/// Longest that all of them may take to run, or to go.
const DEADLINE: Duration = Duration::from_secs(600);

/// When things were seen, since the first pod was asked for; by the object's name.
#[derive(Clone, Debug, Default)]
pub struct Wave {
    /// When the API server had taken the last pod.
    pub made: Duration,
    /// Processor time that the cluster used until the last pod was ready.
    pub processor: Duration,
    /// Pods, first seen with an image that cannot be pulled.
    pub failed: BTreeMap<String, Duration>,
    /// Pods, first seen ready.
    pub ready: BTreeMap<String, Duration>,
    /// Jobs, first seen.
    pub asked: BTreeMap<String, Duration>,
    /// Jobs, first seen Transferring or later.
    pub begun: BTreeMap<String, Duration>,
    /// Jobs, first seen Imported.
    pub imported: BTreeMap<String, Duration>,
}

impl Wave {
    /// When the last pod was seen ready.
    pub fn took(&self) -> Duration {
        self.ready.values().max().copied().unwrap_or_default()
    }
}

/// Makes the pods and follows them, and all jobs of the namespace, until the last pod is ready.
///
/// # Errors
/// One cannot be made, or not all are ready within ten minutes.
pub async fn run(cluster: &Cluster, tenant: &Tenant, pods: &[(String, PodShape)]) -> Result<Wave> {
    let (begin, processor) = (Instant::now(), cluster.processor_time());
    let start = |(name, shape): (String, PodShape)| {
        let tenant = tenant.clone();
        async move { tenant.start(&name, &shape).await }
    };
    let starts: Vec<_> = pods.iter().cloned().map(start).collect();
    let making = async {
        futures::stream::iter(starts).buffer_unordered(MAKERS).try_for_each(|()| async { Ok(()) }).await?;
        anyhow::Ok(begin.elapsed())
    };
    let both = async { tokio::try_join!(making, follow(tenant, pods.len(), begin)) };
    match tokio::time::timeout(DEADLINE, both).await {
        Ok(Ok((made, wave))) => {
            let processor = cluster.processor_time().saturating_sub(processor);
            Ok(Wave { made, processor, ..wave })
        }
        Ok(Err(error)) => Err(error),
        Err(_) => Err(anyhow!("not all pods run after {DEADLINE:?}\n{}", tenant.report().await)),
    }
}

async fn follow(tenant: &Tenant, count: usize, begin: Instant) -> Result<Wave> {
    let mut wave = Wave::default();
    let mut pods = watcher(tenant.pods(), watcher::Config::default()).applied_objects().boxed();
    let mut jobs = watcher(tenant.jobs(), watcher::Config::default()).applied_objects().boxed();
    while wave.ready.len() < count {
        tokio::select! {
            Some(pod) = pods.next() => {
                let (pod, at) = (pod?, begin.elapsed());
                let failure = |reason: &str| matches!(reason, "ErrImagePull" | "ImagePullBackOff");
                if is_ready(&pod) {
                    wave.ready.entry(pod.name_any()).or_insert(at);
                } else if waiting(&pod).iter().any(|(reason, _)| failure(reason)) {
                    wave.failed.entry(pod.name_any()).or_insert(at);
                }
            }
            Some(job) = jobs.next() => {
                let (job, at) = (job?, begin.elapsed());
                let name = job.name_any();
                if phase(&job).is_some_and(|phase| phase != Phase::Pending) {
                    wave.begun.entry(name.clone()).or_insert(at);
                }
                if phase(&job) == Some(Phase::Imported) {
                    wave.imported.entry(name.clone()).or_insert(at);
                }
                wave.asked.entry(name).or_insert(at);
            }
            else => bail!("the API server ended the watch"),
        }
    }
    Ok(wave)
}

/// Deletes all pods of the namespace; returns when they are gone.
///
/// # Errors
/// They are not gone after ten minutes.
pub async fn clear(tenant: &Tenant) -> Result<()> {
    let at_once = DeleteParams::default().grace_period(0);
    tenant.pods().delete_collection(&at_once, &ListParams::default()).await?;
    let pods = tenant.pods();
    tenant
        .until("all pods to go", DEADLINE, || async {
            Ok(pods.list_metadata(&ListParams::default().limit(1)).await?.items.is_empty().then_some(()))
        })
        .await
}
