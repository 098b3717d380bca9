//! Watches: what the API server has, as events. Own slim types hold only the fields that are used; nothing is
//! stored here.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Debug;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{ObjectMeta, PartialObjectMeta};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use tokio::sync::mpsc;
use tote_api::SalvageJob;

use crate::decide::{Event, Kind};
use crate::detect::{ContainerView, PodView, consent, waiting};
use crate::fleet::{Endpoint, Fleet};

/// The fields of a Pod that are used.
#[derive(Resource, Clone, Debug, Deserialize)]
#[resource(inherit = "Pod")]
pub struct SlimPod {
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
    image_pull_secrets: Vec<SlimName>,
    init_containers: Vec<SlimContainer>,
    containers: Vec<SlimContainer>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct SlimName {
    name: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct SlimContainer {
    name: String,
    image: String,
    image_pull_policy: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct SlimStatus {
    init_container_statuses: Vec<SlimContainerStatus>,
    container_statuses: Vec<SlimContainerStatus>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct SlimContainerStatus {
    name: String,
    state: SlimState,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct SlimState {
    waiting: Option<SlimWaiting>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct SlimWaiting {
    reason: String,
}

/// Metadata without managed fields, labels and owners.
fn slim_metadata<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Slim {
        name: Option<String>,
        namespace: Option<String>,
        uid: Option<String>,
        resource_version: Option<String>,
        annotations: Option<BTreeMap<String, String>>,
        deletion_timestamp: Option<Time>,
    }
    let slim = Slim::deserialize(deserializer)?;
    Ok(ObjectMeta {
        name: slim.name,
        namespace: slim.namespace,
        uid: slim.uid,
        resource_version: slim.resource_version,
        annotations: slim.annotations,
        deletion_timestamp: slim.deletion_timestamp,
        ..ObjectMeta::default()
    })
}

impl SlimPod {
    fn view(&self) -> PodView {
        let containers = |kind: &str, specs: &[SlimContainer], statuses: &[SlimContainerStatus]| {
            specs
                .iter()
                .map(|spec| {
                    let status = statuses.iter().find(|status| status.name == spec.name);
                    let waiting = status.and_then(|status| status.state.waiting.as_ref());
                    ContainerView {
                        field_path: format!("spec.{kind}{{{}}}", spec.name),
                        image: spec.image.clone(),
                        pull_policy: spec.image_pull_policy.clone(),
                        waiting_reason: waiting.map(|w| w.reason.clone()).unwrap_or_default(),
                    }
                })
                .collect::<Vec<_>>()
        };
        let status = &self.status;
        let mut all =
            containers("initContainers", &self.spec.init_containers, &status.init_container_statuses);
        all.extend(containers("containers", &self.spec.containers, &status.container_statuses));
        PodView {
            namespace: self.metadata.namespace.clone().unwrap_or_default(),
            name: self.metadata.name.clone().unwrap_or_default(),
            uid: self.metadata.uid.clone().unwrap_or_default(),
            annotations: self.metadata.annotations.clone().unwrap_or_default(),
            terminating: self.metadata.deletion_timestamp.is_some(),
            node: self.spec.node_name.clone(),
            pull_secrets: self
                .spec
                .image_pull_secrets
                .iter()
                .map(|secret| secret.name.as_str().into())
                .collect(),
            containers: all,
        }
    }
}

/// What an object means: the key it is listed under, the event, and whether there is anything to keep.
struct Meaning {
    key: Arc<str>,
    event: Event,
    keep: bool,
}

/// Watches pods, of all namespaces, that have not ended.
pub async fn pods(client: Client, events: mpsc::Sender<Event>) {
    let config = watcher::Config::default().fields("status.phase!=Succeeded,status.phase!=Failed");
    follow(Api::<SlimPod>::all(client), config, Kind::Pods, events, |pod, gone| {
        let key: Arc<str> = pod.metadata.uid.as_deref()?.into();
        let waiting = if gone { None } else { waiting(&pod.view()) };
        let keep = waiting.is_some();
        Some(Meaning { event: Event::Pod { uid: key.clone(), waiting }, key, keep })
    })
    .await;
}

/// Watches what namespaces say.
pub async fn namespaces(client: Client, events: mpsc::Sender<Event>) {
    let api: Api<PartialObjectMeta<Namespace>> = Api::all(client);
    follow(api, watcher::Config::default(), Kind::Namespaces, events, |namespace, gone| {
        let metadata = &namespace.metadata;
        let key: Arc<str> = metadata.name.as_deref()?.into();
        let none = BTreeMap::new();
        let annotations = metadata.annotations.as_ref().unwrap_or(&none);
        let says = (!gone).then(|| consent(&key, annotations, metadata.deletion_timestamp.is_some()));
        let event = Event::Namespace { name: key.clone(), consent: says };
        Some(Meaning { event, key, keep: true })
    })
    .await;
}

/// Watches which nodes there are.
pub async fn nodes(client: Client, events: mpsc::Sender<Event>) {
    let api: Api<PartialObjectMeta<Node>> = Api::all(client);
    follow(api, watcher::Config::default(), Kind::Nodes, events, |node, gone| {
        let key: Arc<str> = node.metadata.name.as_deref()?.into();
        let uid = if gone { None } else { node.metadata.uid.as_deref().map(Into::into) };
        Some(Meaning { event: Event::Node { name: key.clone(), uid }, key, keep: true })
    })
    .await;
}

/// Watches jobs.
pub async fn jobs(client: Client, events: mpsc::Sender<Event>) {
    let api: Api<SalvageJob> = Api::all(client);
    follow(api, watcher::Config::default(), Kind::Jobs, events, |job, gone| {
        let key: Arc<str> = job.metadata.uid.as_deref()?.into();
        let event =
            if gone { Event::JobGone { uid: key.clone() } } else { Event::Job(Box::new(job.clone())) };
        Some(Meaning { event, key, keep: true })
    })
    .await;
}

async fn follow<K, F>(
    api: Api<K>,
    config: watcher::Config,
    kind: Kind,
    events: mpsc::Sender<Event>,
    meaning: F,
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    F: Fn(&K, bool) -> Option<Meaning>,
{
    let mut stream = pin!(watcher(api, config).default_backoff());
    let mut seen = HashSet::new();
    while let Some(item) = stream.next().await {
        let (object, gone, listing) = match item {
            Ok(watcher::Event::Init) => {
                seen.clear();
                continue;
            }
            Ok(watcher::Event::InitDone) => {
                let listed = Event::Listed(kind, std::mem::take(&mut seen));
                if events.send(listed).await.is_err() {
                    return;
                }
                continue;
            }
            Ok(watcher::Event::InitApply(object)) => (object, false, true),
            Ok(watcher::Event::Apply(object)) => (object, false, false),
            Ok(watcher::Event::Delete(object)) => (object, true, false),
            Err(error) => {
                tracing::warn!(?kind, %error, "watch interrupted; it is taken up again");
                continue;
            }
        };
        let Some(Meaning { key, event, keep }) = meaning(&object, gone) else { continue };
        if listing {
            if !keep {
                continue;
            }
            seen.insert(key);
        }
        if events.send(event).await.is_err() {
            return;
        }
    }
}

/// Watches the `EndpointSlice`s of the agents' Service and keeps `fleet` in step.
pub async fn agents(client: Client, namespace: &str, service: &str, port: u16, mut fleet: Fleet) {
    let api: Api<EndpointSlice> = Api::namespaced(client, namespace);
    let config = watcher::Config::default().labels(&format!("kubernetes.io/service-name={service}"));
    let mut stream = pin!(watcher(api, config).default_backoff());
    let mut slices: HashMap<String, Vec<Endpoint>> = HashMap::new();
    let mut listing = false;
    while let Some(item) = stream.next().await {
        match item {
            Ok(watcher::Event::Init) => {
                listing = true;
                slices.clear();
            }
            Ok(watcher::Event::InitDone) => listing = false,
            Ok(watcher::Event::InitApply(slice) | watcher::Event::Apply(slice)) => {
                slices.insert(slice.metadata.name.clone().unwrap_or_default(), endpoints(&slice, port));
            }
            Ok(watcher::Event::Delete(slice)) => {
                slices.remove(&slice.metadata.name.unwrap_or_default());
            }
            Err(error) => {
                tracing::warn!(%error, "watch of the agents' endpoints interrupted; it is taken up again");
                continue;
            }
        }
        if !listing {
            fleet.set_endpoints(one_a_node(slices.values().flatten())).await;
        }
    }
}

fn endpoints(slice: &EndpointSlice, port: u16) -> Vec<Endpoint> {
    slice
        .endpoints
        .iter()
        .flatten()
        .filter_map(|endpoint| {
            let conditions = endpoint.conditions.clone().unwrap_or_default();
            if conditions.terminating == Some(true) {
                return None;
            }
            let ip: IpAddr = endpoint.addresses.first()?.parse().ok()?;
            Some(Endpoint {
                node: endpoint.node_name.as_deref()?.into(),
                address: SocketAddr::new(ip, port),
                // `ready` is always true where not-ready addresses are published; `serving` tells.
                ready: conditions.serving.or(conditions.ready).unwrap_or(true),
                pod_uid: endpoint.target_ref.as_ref().and_then(|pod| pod.uid.clone()),
            })
        })
        .collect()
}

/// While an agent is replaced its node has two endpoints: the one that serves counts.
fn one_a_node<'a>(endpoints: impl Iterator<Item = &'a Endpoint>) -> Vec<Endpoint> {
    let mut by_node: BTreeMap<_, Endpoint> = BTreeMap::new();
    for endpoint in endpoints {
        let known = by_node.entry(endpoint.node.clone()).or_insert_with(|| endpoint.clone());
        if (endpoint.ready, endpoint.address) > (known.ready, known.address) {
            *known = endpoint.clone();
        }
    }
    by_node.into_values().collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_keeps_what_is_used_and_drops_the_rest() {
        let pod: SlimPod = serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "web", "namespace": "shop", "uid": "u", "resourceVersion": "1",
                "annotations": {"tote.dev/auto-salvage": "true"}, "labels": {"a": "b"},
                "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:status": {}}}]},
            "spec": {"nodeName": "n1", "volumes": [], "imagePullSecrets": [{"name": "corp"}],
                "initContainers": [{"name": "init", "image": "busybox", "imagePullPolicy": "IfNotPresent"}],
                "containers": [{"name": "web", "image": "r.test/x:1", "imagePullPolicy": "Never"}]},
            "status": {"phase": "Pending",
                "initContainerStatuses": [{"name": "init", "state": {"terminated": {"exitCode": 0}}}],
                "containerStatuses": [{"name": "web", "image": "r.test/x:1", "state": {"waiting":
                    {"reason": "ErrImageNeverPull", "message": "m"}}}]}
        }))
        .unwrap();
        assert!(pod.metadata.managed_fields.is_none() && pod.metadata.labels.is_none());
        let waiting = waiting(&pod.view()).unwrap();
        assert_eq!(waiting.waits.len(), 1);
        assert_eq!(waiting.pull_secrets, ["corp".into()]);
        assert_eq!(waiting.waits[0].field_path, "spec.containers{web}");
        assert_eq!(waiting.waits[0].reason, "ErrImageNeverPull");
        assert!(waiting.opted_in);
    }

    #[test]
    fn a_pod_without_status_is_no_error() {
        let pod: SlimPod = serde_json::from_value(json!({"metadata": {"name": "x"}})).unwrap();
        assert_eq!(waiting(&pod.view()), None);
    }

    #[test]
    fn the_serving_endpoint_of_a_node_counts_and_a_terminating_one_does_not() {
        let slice: EndpointSlice = serde_json::from_value(json!({
            "metadata": {"name": "s"}, "addressType": "IPv4",
            "endpoints": [
                {"addresses": ["10.0.0.1"], "nodeName": "a", "conditions": {"ready": true, "serving": true}},
                {"addresses": ["10.0.0.9"], "nodeName": "a", "conditions": {"ready": true, "serving": false}},
                {"addresses": ["10.0.0.2"], "nodeName": "b",
                    "conditions": {"ready": false, "serving": true, "terminating": true}},
                {"addresses": ["10.0.0.3"], "nodeName": "c"}
            ]
        }))
        .unwrap();
        let all = endpoints(&slice, 9090);
        let found = one_a_node(all.iter());
        let found: Vec<_> = found.iter().map(|e| (&*e.node, e.address.to_string(), e.ready)).collect();
        assert_eq!(found, [("a", "10.0.0.1:9090".into(), true), ("c", "10.0.0.3:9090".into(), true)]);
    }
}
