//! One session an agent: dialled, kept, dialled again. Turns what agents say into [`FleetEvent`]s.
//!
//! Must not know pods or jobs.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tote_image::{Digest, Platform};
use tote_rpc::AgentClient;
use tote_rpc::v1;
use tote_rpc::v1::session_request::Message as Up;
use tote_rpc::v1::session_response::Message;

use super::inventory::{Image, NodeName};
use crate::backoff::Backoff;

/// How long an agent may take to welcome, and then to send its whole inventory.
const WELCOME_DEADLINE: Duration = Duration::from_secs(10);
const SNAPSHOT_DEADLINE: Duration = Duration::from_secs(60);

/// The most images taken from one node.
const MAX_IMAGES: usize = 20_000;

/// An agent as the `EndpointSlice`s of its Service give it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The node it runs on.
    pub node: NodeName,
    /// Where it listens.
    pub address: SocketAddr,
    /// Whether it says that it is ready.
    pub ready: bool,
}

/// What the sessions tell.
#[derive(Debug)]
pub enum FleetEvent {
    /// The nodes that have an agent, so that sessions with them are to be expected.
    Expected(BTreeSet<NodeName>),
    /// A session stands; the whole inventory of the node.
    Up {
        /// The node.
        node: NodeName,
        /// `ip:port` of its agent.
        address: String,
        /// The node's platform.
        platform: Platform,
        /// Why the node cannot be a target; empty when it can.
        problem: String,
        /// All that it holds.
        images: Vec<Image>,
    },
    /// The node's inventory changed.
    Delta {
        /// The node.
        node: NodeName,
        /// Replace what was known of the same targets.
        upserted: Vec<Image>,
        /// Targets without a record.
        removed: Vec<Digest>,
    },
    /// The session ended.
    Down {
        /// The node.
        node: NodeName,
    },
}

/// Clients of the agents with a session.
#[derive(Clone, Default)]
pub struct Agents(Arc<Mutex<HashMap<NodeName, AgentClient>>>);

impl Agents {
    /// The client of a node's agent, if it has a session.
    pub fn client(&self, node: &str) -> Option<AgentClient> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(node).cloned()
    }

    fn set(&self, node: &NodeName, client: Option<AgentClient>) {
        let mut clients = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match client {
            Some(client) => clients.insert(node.clone(), client),
            None => clients.remove(node),
        };
    }
}

/// Keeps a session with every endpoint.
pub struct Fleet {
    term: v1::Term,
    agents: Agents,
    events: mpsc::Sender<FleetEvent>,
    stop: CancellationToken,
    sessions: HashMap<NodeName, (SocketAddr, CancellationToken, JoinHandle<()>)>,
}

#[derive(Debug, Error)]
enum SessionError {
    #[error(transparent)]
    Connect(#[from] tote_rpc::ConnectError),
    #[error("session refused or broken: {}", .0.message())]
    Status(#[from] tonic::Status),
    #[error("{0} took longer than {1:?}")]
    Deadline(&'static str, Duration),
    #[error("the agent is of node {0}, not of the one its endpoint names")]
    OtherNode(String),
    #[error("the agent did not begin with a welcome")]
    NoWelcome,
    #[error("the agent ended the session")]
    Ended,
    #[error("the controller is stopping")]
    Stopping,
}

impl Fleet {
    /// Sessions for `term` that end with `stop`.
    pub fn new(
        term: v1::Term,
        agents: Agents,
        events: mpsc::Sender<FleetEvent>,
        stop: CancellationToken,
    ) -> Self {
        Self { term, agents, events, stop, sessions: HashMap::new() }
    }

    /// Replaces the set of endpoints. Sessions of those that stay are left alone.
    pub async fn set_endpoints(&mut self, endpoints: Vec<Endpoint>) {
        let expected = endpoints.iter().map(|e| e.node.clone()).collect();
        let wanted: HashMap<NodeName, SocketAddr> =
            endpoints.into_iter().map(|e| (e.node, e.address)).collect();
        let gone: Vec<NodeName> = self
            .sessions
            .iter()
            .filter(|(node, (address, _, _))| wanted.get(*node) != Some(address))
            .map(|(node, _)| node.clone())
            .collect();
        for node in gone {
            if let Some((_, stop, task)) = self.sessions.remove(&node) {
                stop.cancel();
                // It tells of its end, before a session with the same node's new address tells of its start.
                let _ = task.await;
            }
        }
        for (node, address) in wanted {
            if self.sessions.contains_key(&node) {
                continue;
            }
            let stop = self.stop.child_token();
            let task = tokio::spawn(keep(
                node.clone(),
                address,
                self.term.clone(),
                self.agents.clone(),
                self.events.clone(),
                stop.clone(),
            ));
            self.sessions.insert(node, (address, stop, task));
        }
        let _ = self.events.send(FleetEvent::Expected(expected)).await;
    }
}

async fn keep(
    node: NodeName,
    address: SocketAddr,
    term: v1::Term,
    agents: Agents,
    events: mpsc::Sender<FleetEvent>,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10), &node);
    loop {
        let mut up = false;
        let ended = tokio::select! {
            () = stop.cancelled() => SessionError::Stopping,
            ended = session(&node, address, &term, &agents, &events, &mut up) => match ended {
                Ok(()) => SessionError::Ended,
                Err(error) => error,
            },
        };
        if up {
            agents.set(&node, None);
            backoff.reset();
            let _ = events.send(FleetEvent::Down { node: node.clone() }).await;
        }
        if stop.is_cancelled() {
            return;
        }
        tracing::info!(%node, %address, error = %ended, was_up = up, "no session with the agent");
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(backoff.pause()) => {}
        }
    }
}

async fn session(
    node: &NodeName,
    address: SocketAddr,
    term: &v1::Term,
    agents: &Agents,
    events: &mpsc::Sender<FleetEvent>,
    up: &mut bool,
) -> Result<(), SessionError> {
    let mut client = tote_rpc::connect(address).await?;
    // Kept open for as long as the session lives.
    let (requests, outgoing) = mpsc::channel(1);
    let hello = v1::Hello { term: Some(term.clone()), node_name: node.to_string() };
    let _ = requests.send(v1::SessionRequest { message: Some(Up::Hello(hello)) }).await;
    let opened = timeout(WELCOME_DEADLINE, client.session(ReceiverStream::new(outgoing))).await;
    let mut incoming =
        opened.map_err(|_| SessionError::Deadline("opening the session", WELCOME_DEADLINE))??.into_inner();
    let first = timeout(WELCOME_DEADLINE, incoming.message()).await;
    let first = first.map_err(|_| SessionError::Deadline("the welcome", WELCOME_DEADLINE))??;
    let Some(Message::Welcome(welcome)) = first.and_then(|response| response.message) else {
        return Err(SessionError::NoWelcome);
    };
    if *welcome.node_name != **node {
        return Err(SessionError::OtherNode(welcome.node_name));
    }
    let snapshot = timeout(SNAPSHOT_DEADLINE, snapshot(&mut incoming)).await;
    let images = snapshot.map_err(|_| SessionError::Deadline("the inventory", SNAPSHOT_DEADLINE))??;
    tracing::info!(%node, %address, images = images.len(), containerd = welcome.containerd_version,
        snapshotter = welcome.snapshotter, problem = welcome.problem, "session with the agent");
    let platform = welcome.platform.unwrap_or_default();
    agents.set(node, Some(client));
    *up = true;
    let event = FleetEvent::Up {
        node: node.clone(),
        address: address.to_string(),
        platform: Platform::new(&platform.os, &platform.architecture, &platform.variant),
        problem: welcome.problem,
        images,
    };
    let _ = events.send(event).await;
    while let Some(response) = incoming.message().await? {
        let Some(Message::Delta(delta)) = response.message else { continue };
        let event = FleetEvent::Delta {
            node: node.clone(),
            upserted: delta.upserted.iter().filter_map(Image::from_wire).collect(),
            removed: delta.removed.iter().filter_map(|digest| digest.parse().ok()).collect(),
        };
        let _ = events.send(event).await;
    }
    drop(requests);
    Ok(())
}

async fn snapshot(incoming: &mut tonic::Streaming<v1::SessionResponse>) -> Result<Vec<Image>, SessionError> {
    let mut images = Vec::new();
    while let Some(response) = incoming.message().await? {
        let Some(Message::Snapshot(part)) = response.message else { continue };
        images.extend(part.images.iter().filter_map(Image::from_wire));
        if images.len() > MAX_IMAGES {
            tracing::warn!(images = images.len(), "a node reports more images than are taken");
            images.truncate(MAX_IMAGES);
        }
        if part.last {
            return Ok(images);
        }
    }
    Err(SessionError::Ended)
}
