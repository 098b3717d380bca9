//! Nodes, as the API server has them: only the fields that are used.

use std::sync::Arc;

use kube::api::ObjectMeta;
use kube::runtime::watcher;
use kube::{Api, Client, Resource};
use serde::Deserialize;
use tokio::sync::mpsc;

use super::{Meaning, follow, slim_metadata};
use crate::decide::{Event, Kind};
use crate::nodes::{Kubelet, NodeFacts};
use crate::text;

/// The most bytes that are kept of what kubelet says.
const MAX_MESSAGE: usize = 512;

/// The fields of a Node that are used.
#[derive(Resource, Clone, Debug, Deserialize)]
#[resource(inherit = "k8s_openapi::api::core::v1::Node")]
struct SlimNode {
    #[serde(deserialize_with = "slim_metadata")]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: SlimSpec,
    #[serde(default)]
    status: SlimStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct SlimSpec {
    unschedulable: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct SlimStatus {
    conditions: Vec<SlimCondition>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct SlimCondition {
    #[serde(rename = "type")]
    type_: String,
    status: String,
    message: String,
}

impl SlimNode {
    fn facts(&self) -> Option<NodeFacts> {
        let condition = |type_: &str| self.status.conditions.iter().find(|c| c.type_ == type_);
        let ready = condition("Ready");
        let message = ready.map_or("", |c| c.message.as_str());
        let kubelet = match ready.map_or("", |c| c.status.as_str()) {
            "True" => Kubelet::Ready,
            "False" if is_runtime_down(message) => Kubelet::RuntimeDown,
            _ => Kubelet::NotReady,
        };
        let message = if kubelet == Kubelet::Ready { "" } else { message };
        Some(NodeFacts {
            uid: self.metadata.uid.as_deref()?.into(),
            cordoned: self.spec.unschedulable,
            disk_pressure: condition("DiskPressure").is_some_and(|c| c.status == "True"),
            kubelet,
            message: text::bounded(message, MAX_MESSAGE).into(),
        })
    }
}

/// kubelet's words (pkg/kubelet/runtime.go) when CRI has not answered for 30 s, and when it says itself that it is not
/// ready. A network that is not ready is another matter.
fn is_runtime_down(message: &str) -> bool {
    message.contains("container runtime is down") || message.contains("container runtime not ready")
}

/// Watches nodes.
pub async fn nodes(client: Client, events: mpsc::Sender<Event>) {
    let api = Api::<SlimNode>::all(client);
    follow(api, watcher::Config::default(), None, Kind::Nodes, events, |node, gone| {
        let key: Arc<str> = node.metadata.name.as_deref()?.into();
        let facts = if gone { None } else { node.facts() };
        Some(Meaning::new(key.clone(), Event::Node { name: key, facts }))
    })
    .await;
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn facts(spec: &Value, conditions: &Value) -> NodeFacts {
        let node: SlimNode = serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": "n1", "uid": "u", "labels": {"a": "b"}},
            "spec": spec, "status": {"conditions": conditions, "images": [{"names": ["x"], "sizeBytes": 1}]}
        }))
        .unwrap();
        node.facts().unwrap()
    }

    #[test]
    fn a_node_says_whether_it_is_cordoned_under_pressure_or_without_a_runtime() {
        let ready =
            |status: &str, message: &str| json!({"type": "Ready", "status": status, "message": message});
        let well = facts(&json!({}), &json!([ready("True", "kubelet is posting ready status")]));
        assert_eq!(well, NodeFacts::ready("u"));
        let full = json!([ready("True", ""), {"type": "DiskPressure", "status": "True"}]);
        assert_eq!(
            facts(&json!({"unschedulable": true}), &full),
            NodeFacts { cordoned: true, disk_pressure: true, ..NodeFacts::ready("u") }
        );
        let calm = json!([ready("True", ""), {"type": "DiskPressure", "status": "Unknown"}]);
        assert!(!facts(&json!({}), &calm).disk_pressure);
        for (status, message, expected) in [
            ("False", "[container runtime is down, PLEG is not healthy]", Kubelet::RuntimeDown),
            ("False", "container runtime not ready: RuntimeReady=false reason:x", Kubelet::RuntimeDown),
            ("False", "container runtime network not ready: NetworkReady=false", Kubelet::NotReady),
            ("Unknown", "Kubelet stopped posting node status.", Kubelet::NotReady),
        ] {
            let found = facts(&json!({}), &json!([ready(status, message)]));
            assert_eq!((found.kubelet, &*found.message), (expected, message));
        }
        assert_eq!(facts(&json!({}), &json!([])).kubelet, Kubelet::NotReady, "never told");
    }
}
