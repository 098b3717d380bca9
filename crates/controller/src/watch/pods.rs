//! Pods, by the few fields that are used.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use kube::api::ObjectMeta;
use kube::runtime::watcher;
use kube::{Api, Client, Resource};
use serde::{Deserialize, Deserializer};
use tokio::sync::mpsc;

use super::owners::controller;
use super::{Meaning, follow};
use crate::decide::{Event, Kind};
use crate::detect::{ContainerView, PodView, VolumeView, runs, waiting};

/// The fields of a Pod that are used.
#[derive(Resource, Clone, Debug, Deserialize)]
#[resource(inherit = "Pod")]
struct SlimPod {
    #[serde(deserialize_with = "slim_metadata")]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: SlimSpec,
    #[serde(default)]
    status: SlimStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct SlimSpec {
    node_name: String,
    init_containers: Vec<SlimContainer>,
    containers: Vec<SlimContainer>,
    ephemeral_containers: Vec<SlimContainer>,
    image_pull_secrets: Vec<Named>,
    volumes: Vec<SlimVolume>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct SlimContainer {
    name: String,
    image: String,
    image_pull_policy: String,
    volume_mounts: Vec<Named>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Named {
    name: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct SlimVolume {
    name: String,
    image: Option<SlimImage>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct SlimImage {
    reference: String,
    pull_policy: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct SlimStatus {
    #[serde(rename = "initContainerStatuses")]
    init: Vec<SlimContainerStatus>,
    #[serde(rename = "containerStatuses")]
    main: Vec<SlimContainerStatus>,
    #[serde(rename = "ephemeralContainerStatuses")]
    ephemeral: Vec<SlimContainerStatus>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct SlimContainerStatus {
    name: String,
    #[serde(rename = "imageID")]
    image_id: String,
    image: String,
    state: SlimState,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct SlimState {
    waiting: Option<SlimWaiting>,
    running: Option<SlimRunning>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct SlimWaiting {
    reason: String,
    message: String,
}

#[derive(Clone, Debug, Deserialize)]
struct SlimRunning {}

/// Metadata without managed fields and labels, and of the owners only the controller.
pub(crate) fn slim_metadata<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Slim {
        name: Option<String>,
        namespace: Option<String>,
        uid: Option<String>,
        resource_version: Option<String>,
        annotations: Option<BTreeMap<String, String>>,
        owner_references: Option<Vec<OwnerReference>>,
        deletion_timestamp: Option<Time>,
    }
    let mut slim = Slim::deserialize(deserializer)?;
    if let Some(owners) = &mut slim.owner_references {
        owners.retain(|owner| owner.controller == Some(true));
    }
    Ok(ObjectMeta {
        name: slim.name,
        namespace: slim.namespace,
        uid: slim.uid,
        resource_version: slim.resource_version,
        annotations: slim.annotations,
        owner_references: slim.owner_references,
        deletion_timestamp: slim.deletion_timestamp,
        ..ObjectMeta::default()
    })
}

impl SlimPod {
    fn view(&self) -> PodView {
        let (spec, status) = (&self.spec, &self.status);
        let kinds = [
            ("initContainers", &spec.init_containers, &status.init),
            ("containers", &spec.containers, &status.main),
            ("ephemeralContainers", &spec.ephemeral_containers, &status.ephemeral),
        ];
        let volumes = spec.volumes.iter().filter_map(|volume| {
            let image = volume.image.as_ref()?;
            Some(VolumeView {
                name: volume.name.clone(),
                image: image.reference.clone(),
                pull_policy: image.pull_policy.clone(),
            })
        });
        PodView {
            namespace: self.metadata.namespace.clone().unwrap_or_default(),
            name: self.metadata.name.clone().unwrap_or_default(),
            uid: self.metadata.uid.clone().unwrap_or_default(),
            annotations: self.metadata.annotations.clone().unwrap_or_default(),
            controller: controller(&self.metadata).map(Into::into),
            terminating: self.metadata.deletion_timestamp.is_some(),
            node: spec.node_name.clone(),
            pull_secrets: spec.image_pull_secrets.iter().map(|secret| secret.name.clone()).collect(),
            volumes: volumes.collect(),
            containers: kinds.into_iter().flat_map(|(kind, specs, all)| views(kind, specs, all)).collect(),
        }
    }
}

fn views(kind: &str, specs: &[SlimContainer], statuses: &[SlimContainerStatus]) -> Vec<ContainerView> {
    let view = |spec: &SlimContainer| {
        let status = statuses.iter().find(|status| status.name == spec.name).cloned().unwrap_or_default();
        let waiting = status.state.waiting.unwrap_or_default();
        ContainerView {
            field_path: format!("spec.{kind}{{{}}}", spec.name),
            image: spec.image.clone(),
            pull_policy: spec.image_pull_policy.clone(),
            mounts: spec.volume_mounts.iter().map(|mount| mount.name.clone()).collect(),
            waiting_reason: waiting.reason,
            waiting_message: waiting.message,
            running_id: if status.state.running.is_some() { status.image_id } else { String::new() },
            running_image: status.image,
        }
    };
    specs.iter().map(view).collect()
}

/// Watches pods, of all namespaces, that have not ended.
pub async fn pods(client: Client, events: mpsc::Sender<Event>) {
    let config = watcher::Config::default().fields("status.phase!=Succeeded,status.phase!=Failed");
    follow(Api::<SlimPod>::all(client), config, None, Kind::Pods, events, meaning).await;
}

fn meaning(pod: &SlimPod, gone: bool) -> Option<Meaning> {
    let uid: Arc<str> = pod.metadata.uid.as_deref()?.into();
    let (waiting, runs) = if gone {
        (None, None)
    } else {
        let view = pod.view();
        (waiting(&view), runs(&view))
    };
    let keep = waiting.is_some() || runs.is_some();
    let events = vec![
        Event::Pod { uid: uid.clone(), waiting },
        Event::Runs { uid: uid.clone(), runs: runs.map(Box::new) },
    ];
    Some(Meaning { key: uid, events, keep })
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tote_image::Digest;

    use super::*;

    fn pod(value: serde_json::Value) -> SlimPod {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_pod_keeps_what_is_used_and_drops_the_rest() {
        let pod = pod(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "web", "namespace": "shop", "uid": "u", "resourceVersion": "1",
                "annotations": {"tote.dev/auto-salvage": "true"}, "labels": {"a": "b"},
                "ownerReferences": [
                    {"apiVersion": "v1", "kind": "X", "name": "x", "uid": "x"},
                    {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "rs", "uid": "rs", "controller": true}],
                "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:status": {}}}]},
            "spec": {"nodeName": "n1", "volumes": [{"name": "tmp", "emptyDir": {}}],
                "imagePullSecrets": [{"name": "pull"}],
                "initContainers": [{"name": "init", "image": "busybox", "imagePullPolicy": "IfNotPresent"}],
                "containers": [{"name": "web", "image": "r.test/x:1", "imagePullPolicy": "Never"}]},
            "status": {"phase": "Pending",
                "initContainerStatuses": [{"name": "init", "state": {"terminated": {"exitCode": 0}}}],
                "containerStatuses": [{"name": "web", "image": "r.test/x:1", "state": {"waiting":
                    {"reason": "ErrImageNeverPull", "message": "m"}}}]}
        }));
        assert!(pod.metadata.managed_fields.is_none() && pod.metadata.labels.is_none());
        assert_eq!(pod.metadata.owner_references.as_ref().map(Vec::len), Some(1));
        let waiting = waiting(&pod.view()).unwrap();
        assert_eq!(waiting.waits.len(), 1);
        assert_eq!(waiting.waits[0].field_path, "spec.containers{web}");
        assert_eq!(waiting.waits[0].reason, "ErrImageNeverPull");
        assert_eq!(&*waiting.waits[0].message, "m");
        assert_eq!((waiting.says, waiting.controller.as_deref()), (Some(true), Some("rs")));
        assert_eq!(waiting.pull_secrets, ["pull".into()]);
    }

    #[test]
    fn a_pod_without_status_is_no_error() {
        assert_eq!(waiting(&pod(json!({"metadata": {"name": "x"}})).view()), None);
    }

    /// A Running pod with a sidecar and an ephemeral container that wait, a container that was started again and waits
    /// for its volume's image, and one that runs.
    #[test]
    fn containers_of_every_kind_are_seen_in_a_running_pod() {
        let digest = Digest::sha256(b"x");
        let waiting_for = |image: &str| json!({"waiting": {"reason": "ImagePullBackOff", "message": format!("Back-off pulling image \"{image}\"")}});
        let pod = pod(json!({
            "metadata": {"name": "web", "namespace": "shop", "uid": "u"},
            "spec": {"nodeName": "n1",
                "volumes": [{"name": "model", "image": {"reference": "r.test/model:1", "pullPolicy": "IfNotPresent"}}],
                "initContainers": [{"name": "proxy", "image": "r.test/proxy:1", "restartPolicy": "Always"}],
                "containers": [
                    {"name": "web", "image": "r.test/x:1", "imagePullPolicy": "Always",
                        "volumeMounts": [{"name": "model", "mountPath": "/model"}]},
                    {"name": "ok", "image": "r.test/ok:1"}],
                "ephemeralContainers": [{"name": "debug", "image": "r.test/debug:1", "imagePullPolicy": "Never"}]},
            "status": {"phase": "Running",
                "initContainerStatuses": [{"name": "proxy", "state": waiting_for("r.test/proxy:1")}],
                "containerStatuses": [
                    {"name": "web", "restartCount": 3, "state": waiting_for("r.test/model:1"),
                        "imageID": format!("r.test/x@{digest}")},
                    {"name": "ok", "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}, "image": "r.test/ok:1",
                        "imageID": format!("r.test/ok@{digest}")}],
                "ephemeralContainerStatuses": [{"name": "debug", "state": {"waiting":
                    {"reason": "ErrImageNeverPull", "message": "m"}}}]}
        }));
        let meaning = meaning(&pod, false).unwrap();
        assert!(meaning.keep);
        let [Event::Pod { waiting: Some(waiting), .. }, Event::Runs { runs: Some(runs), .. }] =
            &meaning.events[..]
        else {
            panic!("{:?}", meaning.events)
        };
        let found: Vec<_> = waiting
            .waits
            .iter()
            .map(|wait| (wait.field_path.as_str(), &*wait.image, wait.policy_always))
            .collect();
        let expected = [
            ("spec.initContainers{proxy}", "r.test/proxy:1", false),
            ("spec.containers{web}", "r.test/model:1", false),
            ("spec.ephemeralContainers{debug}", "r.test/debug:1", false),
        ];
        assert_eq!(found, expected);
        assert_eq!(runs.images, [("r.test/ok:1".into(), digest)], "what ended runs no more");
    }

    #[test]
    fn what_a_pod_runs_no_more_is_told_and_one_that_does_nothing_is_not_listed() {
        let pod = pod(json!({"metadata": {"name": "x", "uid": "u"}}));
        for gone in [false, true] {
            let meaning = meaning(&pod, gone).unwrap();
            assert!(!meaning.keep && meaning.events.len() == 2);
            assert!(meaning.events.iter().all(|event| matches!(
                event,
                Event::Pod { waiting: None, .. } | Event::Runs { runs: None, .. }
            )));
        }
    }
}
