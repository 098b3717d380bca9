//! The agents: where they are, and how those with a session are called.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;
use tote_rpc::AgentClient;

use super::inventory::NodeName;

/// An agent as the `EndpointSlice`s of its Service give it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The node it runs on.
    pub node: NodeName,
    /// Where it listens.
    pub address: SocketAddr,
    /// Whether it says that it is ready.
    pub ready: bool,
    /// UID of the pod that listens there, if the endpoint names one.
    pub pod_uid: Option<String>,
}

impl Endpoint {
    /// Whether it is the same agent, ready or not.
    pub(super) fn is_same_agent(&self, other: &Self) -> bool {
        (self.address, &self.pod_uid) == (other.address, &other.pod_uid)
    }
}

/// Clients of the agents with a session.
#[derive(Clone, Default)]
pub struct Agents(Arc<Known>);

#[derive(Default)]
struct Known {
    clients: Mutex<HashMap<NodeName, (u64, AgentClient)>>,
    /// Changes whenever a session begins or ends; the number of the last one begun.
    sessions: watch::Sender<u64>,
}

impl Agents {
    /// The client of a node's agent, if it has a session.
    pub fn client(&self, node: &str) -> Option<AgentClient> {
        self.session(node).map(|(_, client)| client)
    }

    /// The same, with the number of the session.
    pub fn session(&self, node: &str) -> Option<(u64, AgentClient)> {
        self.0.clients.lock().unwrap_or_else(PoisonError::into_inner).get(node).cloned()
    }

    /// Tells when sessions begin and end.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.sessions.subscribe()
    }

    pub(super) fn set(&self, node: &NodeName, client: Option<AgentClient>) {
        self.0.sessions.send_modify(|number| {
            *number += 1;
            let mut clients = self.0.clients.lock().unwrap_or_else(PoisonError::into_inner);
            match client {
                Some(client) => clients.insert(node.clone(), (*number, client)),
                None => clients.remove(node),
            };
        });
    }
}
