//! What an administrator finds out about the operator: its agents, its metrics, who leads, and the certificate
//! authority as it is kept.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt as _};
use tote_e2e::cluster::Node;
use tote_e2e::operator;
use tote_e2e::tenant::is_ready;
use tote_rpc::identity::{Authorities, Authority};
use tote_rpc::testing::Pki;
use tote_rpc::v1;

use crate::play::Play;
use crate::stage::SOON;

/// Name of the Secret and of the `ConfigMap` that the controller keeps the authority in.
pub const CA: &str = "tote-ca";

/// Keys of the Secret's data, and of the `ConfigMap`'s.
pub const SIGNER: &str = "tls.crt";
pub const SIGNER_KEY: &str = "tls.key";
pub const NEXT: &str = "next.crt";
const FORMER: &str = "former.crt";
pub const BUNDLE: &str = "ca.crt";

/// Where agents listen, where their metrics are, and where the controller's are.
const AGENT: u16 = 9090;
const AGENT_METRICS: u16 = 8081;
const CONTROLLER_METRICS: u16 = 8080;

/// Objects of the operator's namespace.
pub fn objects<K>(client: &Client) -> Api<K>
where
    K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>,
    K::DynamicType: Default,
{
    Api::namespaced(client.clone(), operator::NAMESPACE)
}

/// An agent.
#[derive(Clone, Debug)]
pub struct Agent {
    /// Its pod.
    pub pod: String,
    /// Its pod's UID.
    pub uid: String,
    /// Its node.
    pub node: String,
    /// Where it listens.
    pub address: SocketAddr,
}

impl fmt::Display for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the agent of {} (pod {}, {})", self.node, self.pod, self.address)
    }
}

impl Agent {
    /// One of its counters or gauges; 0 if it has none of that name.
    pub async fn metric(&self, client: &Client, name: &str) -> Result<u64> {
        metric(client, (&self.pod, AGENT_METRICS), name).await
    }

    /// Where its metrics are.
    pub fn health(&self) -> SocketAddr {
        SocketAddr::new(self.address.ip(), AGENT_METRICS)
    }
}

/// The agents of all nodes, by the nodes' names. That one is not ready is an error.
pub async fn agents(play: &Play) -> Result<Vec<Agent>> {
    let labels = ListParams::default().labels("app.kubernetes.io/component=agent");
    let pods = objects::<Pod>(&play.tenant.client()).list(&labels).await.context("listing the agents")?;
    let mut found = Vec::new();
    for pod in pods {
        if !is_ready(&pod) || pod.metadata.deletion_timestamp.is_some() {
            continue;
        }
        let (name, uid) = (pod.name_any(), pod.uid().unwrap_or_default());
        let node = pod.spec.and_then(|spec| spec.node_name).unwrap_or_default();
        let ip = pod.status.and_then(|status| status.pod_ip).unwrap_or_default();
        let ip = ip.parse().with_context(|| format!("pod {name} has the address {ip:?}"))?;
        found.push(Agent { pod: name, uid, node, address: SocketAddr::new(ip, AGENT) });
    }
    found.sort_by(|one, other| one.node.cmp(&other.node));
    let nodes: Vec<&str> = play.cluster().nodes().iter().map(Node::name).collect();
    let have: Vec<&str> = found.iter().map(|agent| agent.node.as_str()).collect();
    ensure!(have == nodes, "agents are ready on {have:?}, nodes are {nodes:?}");
    Ok(found)
}

/// The pod that leads, by its Lease, and since which term.
pub async fn leader(client: &Client) -> Result<(String, v1::Term)> {
    let lease = objects::<Lease>(client).get("tote").await.context("reading the Lease")?;
    let lease_uid = lease.uid().unwrap_or_default();
    let spec = lease.spec.unwrap_or_default();
    let holder = spec.holder_identity.filter(|holder| !holder.is_empty()).context("nobody leads")?;
    let lease_transitions = spec.lease_transitions.context("the Lease has no leaseTransitions")?.into();
    Ok((holder, v1::Term { lease_uid, lease_transitions }))
}

/// The controllers there are, dead ones too.
pub async fn controllers(client: &Client) -> Result<Vec<Pod>> {
    let labels = ListParams::default().labels("app.kubernetes.io/component=controller");
    Ok(objects::<Pod>(client).list(&labels).await.context("listing the controllers")?.items)
}

/// The controllers that take themselves for the leader.
pub async fn leading(client: &Client) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for pod in controllers(client).await? {
        let name = pod.name_any();
        if metric(client, (&name, CONTROLLER_METRICS), "tote_leading").await? == 1 {
            found.push(name);
        }
    }
    Ok(found)
}

/// One of the leader's counters or gauges; 0 if it has none of that name.
pub async fn of_leader(client: &Client, name: &str) -> Result<u64> {
    let (leader, _) = leader(client).await?;
    metric(client, (&leader, CONTROLLER_METRICS), name).await
}

/// Waits until the leader has a session with the agent of every node, and no other.
pub async fn all_connected(play: &Play) -> Result<()> {
    let (client, nodes) = (play.tenant.client(), play.cluster().nodes().len() as u64);
    let look = || async {
        let connected = of_leader(&client, "tote_agents_connected").await?;
        ensure!(connected == nodes, "it has {connected}");
        Ok(Some(()))
    };
    play.tenant.until(&format!("the leader to have {nodes} sessions"), SOON, look).await
}

/// A metric, by way of the API server.
async fn metric(client: &Client, (pod, port): (&str, u16), name: &str) -> Result<u64> {
    let path = format!("/api/v1/namespaces/{}/pods/{pod}:{port}/proxy/metrics", operator::NAMESPACE);
    let request = http::Request::get(&path).body(Vec::new())?;
    let text = client.request_text(request).await.with_context(|| format!("GET {path}"))?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.map_or(Ok(0), |value| value.parse().with_context(|| format!("{name} of {pod} is {value:?}")))
}

/// The certificate authority as the controller keeps it.
#[derive(Clone, Debug)]
pub struct Kept {
    /// PEM texts by the key of the Secret's data.
    data: BTreeMap<String, String>,
    /// The Secret without them.
    pub secret: Secret,
}

impl Kept {
    /// Reads it, if there is one.
    pub async fn find(client: &Client) -> Result<Option<Self>> {
        let found = objects::<Secret>(client).get_opt(CA).await.context("reading the Secret tote-ca")?;
        let Some(mut secret) = found else { return Ok(None) };
        let data = secret.data.take().unwrap_or_default().into_iter();
        let data = data.map(|(key, bytes)| (key, String::from_utf8_lossy(&bytes.0).into_owned())).collect();
        Ok(Some(Self { data, secret }))
    }

    /// Reads it.
    pub async fn read(client: &Client) -> Result<Self> {
        Self::find(client).await?.context("there is no Secret tote-ca")
    }

    /// A part of it.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.data.get(key).map(String::as_str)
    }

    /// Who signs at present, with the key.
    pub fn signer(&self) -> Result<Pki> {
        let part = |key: &str| self.text(key).with_context(|| format!("the Secret tote-ca has no {key}"));
        Ok(Pki { authority: Authority::from_pem(part(SIGNER)?, part(SIGNER_KEY)?)? })
    }

    /// Whom it says to trust: who signs, who will, who did.
    pub fn bundle(&self) -> Result<Authorities> {
        let text: String = [SIGNER, NEXT, FORMER].into_iter().filter_map(|key| self.text(key)).collect();
        Authorities::from_pem(&text).context("the certificates of the Secret tote-ca")
    }

    /// A time that is noted on it.
    pub fn time(&self, annotation: &str) -> Result<k8s_openapi::jiff::Timestamp> {
        let text = self.secret.annotations().get(annotation);
        let text = text.with_context(|| format!("the Secret tote-ca has no annotation {annotation}"))?;
        text.parse().with_context(|| format!("annotation {annotation} of the Secret tote-ca: {text:?}"))
    }
}

/// Whom agents are to trust, as it is published.
pub async fn trusted(client: &Client) -> Result<Authorities> {
    let map = objects::<ConfigMap>(client).get(CA).await.context("reading the ConfigMap tote-ca")?;
    let text = map.data.and_then(|mut data| data.remove(BUNDLE)).unwrap_or_default();
    Authorities::from_pem(&text).with_context(|| format!("{BUNDLE} of the ConfigMap tote-ca: {text:?}"))
}

/// Waits until Secret and `ConfigMap` are gone: nothing of the authority is left behind.
pub async fn authority_gone(play: &Play) -> Result<()> {
    let client = play.tenant.client();
    let look = || async {
        let secret = objects::<Secret>(&client).get_opt(CA).await?;
        let map = objects::<ConfigMap>(&client).get_opt(CA).await?;
        ensure!(
            secret.is_none() && map.is_none(),
            "there are Secret {:?}, ConfigMap {:?}",
            secret.map(|secret| secret.metadata),
            map.map(|map| map.metadata)
        );
        Ok(Some(()))
    };
    play.tenant.until("Secret and ConfigMap tote-ca to go with the release", SOON, look).await
}
