//! Where agents are, by the `EndpointSlice`s of their Service. Tells the fleet, not the state.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;

use futures::StreamExt as _;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client};

use crate::fleet::{Endpoint, Fleet};

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
