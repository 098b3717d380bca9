//! Watches a tenant's pods and jobs until a pod that could not pull runs, feeding a [`Timeline`].

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::{WatchStreamExt as _, watcher};

use crate::tenant::Tenant;
use crate::timeline::Timeline;

/// How much later than the pod's the job's end may be seen.
const LATE: Duration = Duration::from_secs(5);

/// Follows every pod that `concerns` until one of them is ready, and every job, also until it is Imported, which may be
/// seen a moment later. Each line of the timeline goes to
/// `say` as it comes; times count from `begin`.
///
/// # Errors
/// A watch failed or ended.
pub async fn follow(
    tenant: &Tenant,
    concerns: impl Fn(&Pod) -> bool,
    begin: Instant,
    mut say: impl FnMut(&str),
) -> Result<Timeline> {
    let mut timeline = Timeline::default();
    let mut pods = watcher(tenant.pods(), watcher::Config::default()).applied_objects().boxed();
    let mut jobs = watcher(tenant.jobs(), watcher::Config::default()).applied_objects().boxed();
    let is_over = |timeline: &Timeline| {
        let seen = timeline.detected.is_none() || timeline.imported.is_some();
        timeline.running.is_some_and(|at| seen || begin.elapsed() > at + LATE)
    };
    while !is_over(&timeline) {
        let line = tokio::select! {
            Some(pod) = pods.next() => {
                let pod = pod?;
                if concerns(&pod) { timeline.pod(&pod, begin.elapsed()) } else { None }
            }
            Some(job) = jobs.next() => timeline.job(&job?, begin.elapsed()),
            () = tokio::time::sleep(LATE), if timeline.running.is_some() => None,
            else => bail!("the API server ended the watch"),
        };
        if let Some(line) = line {
            say(&line);
        }
    }
    Ok(timeline)
}
