//! What kubelet tells in events alone: of sandboxes that it cannot make, and of pull secrets that it does not find. Nothing is
//! stored here, and nothing decided.

use std::pin::pin;
use std::time::Duration;

use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use kube::api::ObjectMeta;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource};
use serde::Deserialize;
use tokio::sync::mpsc;
use tote_image::Reference;

use super::{Meaning, follow, slim_metadata};
use crate::decide::{Event, Kind};

/// The fields of an Event (core/v1, where kubelet writes them) that are used.
#[derive(Resource, Clone, Debug, Deserialize)]
#[resource(inherit = "k8s_openapi::api::core::v1::Event")]
#[serde(rename_all = "camelCase")]
struct SlimEvent {
    #[serde(deserialize_with = "slim_metadata")]
    metadata: ObjectMeta,
    #[serde(default)]
    involved_object: SlimObject,
    #[serde(default)]
    message: String,
    #[serde(default)]
    source: SlimSource,
    #[serde(default)]
    reporting_instance: String,
    last_timestamp: Option<Time>,
    event_time: Option<MicroTime>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct SlimObject {
    uid: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct SlimSource {
    component: String,
    host: String,
}

impl SlimEvent {
    /// When kubelet said so last. Whoever may write events in a namespace could claim anything; it costs a note on a node, of
    /// a bounded number, or keeps a pod of that namespace from being salvaged.
    fn said_at(&self) -> Option<Timestamp> {
        let at =
            self.last_timestamp.as_ref().map(|at| at.0).or_else(|| self.event_time.as_ref().map(|at| at.0));
        at.filter(|_| self.source.component == "kubelet")
    }

    /// That a node lacks a sandbox image.
    fn sandbox(&self) -> Option<Event> {
        let at = self.said_at()?;
        let node = if self.source.host.is_empty() { &self.reporting_instance } else { &self.source.host };
        let image = sandbox_image(&self.message)?.into();
        Some(Event::SandboxFailed { node: node.as_str().into(), image, at })
    }

    /// That a pod's pull secret is missing. The API server sees to it that an event is in its pod's namespace.
    fn secret(&self) -> Option<Event> {
        let namespace = self.metadata.namespace.as_deref()?.into();
        let (uid, at) = (self.involved_object.uid.as_str().into(), self.said_at()?);
        Some(Event::SecretMissing { namespace, uid, at })
    }
}

/// The image in containerd's words, `failed to get sandbox image "registry.k8s.io/pause:3.10": ...` or, of 2.4, `failed to pull
/// image "registry.k8s.io/pause:3.10": ...`. The quotes may be escaped.
fn sandbox_image(message: &str) -> Option<&str> {
    let words = ["failed to get sandbox image ", "failed to pull image "];
    let (_, rest) = words.iter().find_map(|words| message.split_once(words))?;
    let rest = rest.trim_start_matches(['\\', '"']);
    let image = &rest[..rest.find(['\\', '"'])?];
    image.parse::<Reference>().is_ok().then_some(image)
}

/// How long the state waits for the first list of missing secrets.
const PATIENCE: Duration = Duration::from_secs(10);

fn of_reason(reason: &str) -> watcher::Config {
    watcher::Config::default().fields(&format!("reason={reason},involvedObject.kind=Pod,type=Warning"))
}

/// Watches what kubelet says of pull secrets that it does not find.
pub async fn secrets(client: Client, events: mpsc::Sender<Event>) {
    let (api, config) = (Api::<SlimEvent>::all(client), of_reason("FailedToRetrieveImagePullSecret"));
    let meaning = |event: &SlimEvent, gone: bool| {
        let said = event.secret().filter(|_| !gone)?;
        Some(Meaning::new(event.metadata.uid.as_deref()?.into(), said))
    };
    follow(api, config, Some(PATIENCE), Kind::PullSecrets, events, meaning).await;
}

/// Watches what kubelet says of sandboxes that it cannot make. Unlike with the other watches nothing waits for a first list.
pub async fn sandboxes(client: Client, events: mpsc::Sender<Event>) {
    let config = of_reason("FailedCreatePodSandBox");
    let mut stream = pin!(watcher(Api::<SlimEvent>::all(client), config).default_backoff());
    while let Some(item) = stream.next().await {
        let event = match item {
            Ok(watcher::Event::InitApply(event) | watcher::Event::Apply(event)) => event.sandbox(),
            Ok(_) => None,
            Err(error) => {
                tracing::warn!(%error, "watch of sandbox failures interrupted; it is taken up again");
                None
            }
        };
        if let Some(event) = event
            && events.send(event).await.is_err()
        {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_sandbox_image_is_read_from_kubelets_words() {
        for (message, expected) in [
            (
                "Failed to create pod sandbox: rpc error: code = Unknown desc = failed to get sandbox image \
                 \"registry.k8s.io/pause:3.8\": failed to pull image \"registry.k8s.io/pause:3.8\"",
                Some("registry.k8s.io/pause:3.8"),
            ),
            (
                r#"Failed to create pod sandbox: rpc error: code = Unknown desc = failed to start sandbox \"ab\": failed to get sandbox image \"r.test/pause:3.10\": failed"#,
                Some("r.test/pause:3.10"),
            ),
            (
                "Failed to create pod sandbox: rpc error: code = NotFound desc = failed to start sandbox \"ab\": failed to \
                 pull image \"registry.k8s.io/pause:3.10.1\": failed to pull and unpack image",
                Some("registry.k8s.io/pause:3.10.1"),
            ),
            ("Failed to create pod sandbox: plugin type=\"calico\" failed", None),
            ("failed to get sandbox image \"NOT A REFERENCE\": x", None),
            ("failed to get sandbox image \"cut", None),
        ] {
            assert_eq!(sandbox_image(message), expected, "{message}");
        }
    }

    #[test]
    fn the_node_of_an_event_is_its_kubelets() {
        let event = |component: &str| -> SlimEvent {
            serde_json::from_value(json!({
                "apiVersion": "v1", "kind": "Event", "metadata": {"name": "web.1", "namespace": "shop"},
                "involvedObject": {"kind": "Pod", "name": "web", "uid": "u-web"}, "reason": "FailedCreatePodSandBox",
                "message": "failed to get sandbox image \"r.test/pause:1\": no",
                "source": {"component": component, "host": "n1"}, "eventTime": null,
                "firstTimestamp": "2026-01-01T00:00:00Z", "lastTimestamp": "2026-01-01T00:05:00Z"
            }))
            .unwrap()
        };
        let at: Timestamp = "2026-01-01T00:05:00Z".parse().unwrap();
        let Some(Event::SandboxFailed { node, image, at: said }) = event("kubelet").sandbox() else {
            panic!("nothing")
        };
        assert_eq!((&*node, &*image, said), ("n1", "r.test/pause:1", at));
        assert!(event("somebody").sandbox().is_none() && event("somebody").secret().is_none());
        let Some(Event::SecretMissing { namespace, uid, at: said }) = event("kubelet").secret() else {
            panic!("nothing")
        };
        assert_eq!((&*namespace, &*uid, said), ("shop", "u-web", at));
    }
}
