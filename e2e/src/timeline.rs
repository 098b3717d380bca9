//! What happens to a pod and its SalvageJob, as lines with elapsed times.
//!
//! Pure: it is fed the objects as they change and the time of each, and says what is new. Knows no client.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use tote_api::{Phase, SalvageJob};

use crate::tenant::{is_ready, waiting};

/// Collects what was seen of pods and of the jobs that salvage their images.
#[derive(Debug, Default)]
pub struct Timeline {
    said: Vec<String>,
    /// When the pod's first failure status was seen.
    pub failed: Option<Duration>,
    /// When a job was first seen.
    pub detected: Option<Duration>,
    /// When the job was seen Imported.
    pub imported: Option<Duration>,
    /// When the pod was seen ready.
    pub running: Option<Duration>,
}

impl Timeline {
    /// Takes in a state of some pod at a time since the beginning; returns a line if something is new.
    pub fn pod(&mut self, pod: &Pod, at: Duration) -> Option<String> {
        let name = pod.name_any();
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or("no node yet");
        if is_ready(pod) {
            self.running.get_or_insert(at);
            return self.line(at, &format!("pod {name} Running on {node}"), "");
        }
        // Until kubelet looks again a pod says what it last said.
        if self.imported.is_some() {
            return None;
        }
        let (reason, message) = waiting(pod).into_iter().find(|(reason, _)| is_failure(reason))?;
        self.failed.get_or_insert(at);
        self.line(at, &format!("pod {name} on {node}: {reason}"), &message)
    }

    /// Takes in a state of some job; returns a line if something is new.
    pub fn job(&mut self, job: &SalvageJob, at: Duration) -> Option<String> {
        self.detected.get_or_insert(at);
        let status = job.status.clone().unwrap_or_default();
        let detail = match status.phase {
            Some(Phase::Transferring) if !status.source_nodes.is_empty() => {
                format!("from {}", status.source_nodes.join(", "))
            }
            Some(Phase::Imported) => {
                self.imported.get_or_insert(at);
                format!("{} moved", mebibytes(status.transfer.map(|transfer| transfer.transferred_bytes)))
            }
            _ => String::new(),
        };
        let phase = status.phase.map_or_else(|| "created".to_owned(), |phase| format!("{phase:?}"));
        self.line(at, &format!("salvagejob {} {phase}", job.name_any()), &detail)
    }

    fn line(&mut self, at: Duration, what: &str, detail: &str) -> Option<String> {
        if self.said.iter().any(|said| said == what) {
            return None;
        }
        self.said.push(what.to_owned());
        let seconds = at.as_secs_f64();
        Some(if detail.is_empty() {
            format!("{seconds:8.2} s  {what}")
        } else {
            format!("{seconds:8.2} s  {what}\n{:12}{detail}", "")
        })
    }
}

fn is_failure(reason: &str) -> bool {
    matches!(reason, "ErrImagePull" | "ImagePullBackOff" | "ErrImageNeverPull")
}

/// Bytes as MiB with one decimal.
#[allow(clippy::cast_precision_loss)]
pub fn mebibytes(bytes: Option<i64>) -> String {
    format!("{:.1} MiB", bytes.unwrap_or_default() as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(status: &serde_json::Value) -> Pod {
        let pod = json!({"metadata": {"name": "web"}, "spec": {"nodeName": "n2", "containers": []}, "status": status});
        serde_json::from_value(pod).unwrap()
    }

    fn job(status: &serde_json::Value) -> SalvageJob {
        let spec = json!({"image": "r.test/x:1", "nodeName": "n2"});
        serde_json::from_value(json!({
            "apiVersion": "tote.dev/v1alpha1", "kind": "SalvageJob", "metadata": {"name": "j"}, "spec": spec,
            "status": status
        }))
        .unwrap()
    }

    #[test]
    fn says_what_is_new_once_and_keeps_the_first_times() {
        let seconds = Duration::from_secs;
        let mut timeline = Timeline::default();
        let waits =
            pod(&json!({"containerStatuses": [{"name": "c", "image": "", "imageID": "", "ready": false,
            "restartCount": 0, "state": {"waiting": {"reason": "ErrImagePull", "message": "refused"}}}]}));
        assert_eq!(timeline.pod(&pod(&json!({})), seconds(0)), None, "it does not fail yet");
        let line = timeline.pod(&waits, seconds(1)).unwrap();
        assert_eq!(line, "    1.00 s  pod web on n2: ErrImagePull\n            refused");
        assert_eq!(timeline.pod(&waits, seconds(2)), None);
        assert!(timeline.job(&job(&json!({"phase": "Pending"})), seconds(3)).unwrap().ends_with("j Pending"));
        let moved = json!({"phase": "Imported", "transfer":
            {"totalBytes": 2 << 20, "transferredBytes": 1 << 20, "reusedBytes": 1 << 20}});
        assert!(timeline.job(&job(&moved), seconds(4)).unwrap().ends_with("1.0 MiB moved"));
        let runs = pod(&json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}));
        assert!(timeline.pod(&runs, seconds(5)).unwrap().ends_with("pod web Running on n2"));
        let times = [timeline.failed, timeline.detected, timeline.imported, timeline.running];
        assert_eq!(times, [1, 3, 4, 5].map(|at| Some(seconds(at))));
    }
}
