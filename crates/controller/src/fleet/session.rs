//! One session an agent: dialled, kept, dialled again. Turns what agents say into [`FleetEvent`]s.
//!
//! Must not know pods or jobs.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tote_image::{Digest, Platform};
use tote_rpc::AgentClient;
use tote_rpc::identity::{Peer, Unverified};
use tote_rpc::v1;
use tote_rpc::v1::session_request::Message as Up;
use tote_rpc::v1::session_response::Message;

use super::agents::{Agents, Endpoint};
use super::enrol::{EnrolError, Enrolment};
use super::image::Image;
use super::inventory::NodeName;
use crate::backoff::Backoff;
use crate::ca::Standing;

/// How long an agent may take to welcome, and then to send its whole inventory.
const WELCOME_DEADLINE: Duration = Duration::from_secs(10);
const SNAPSHOT_DEADLINE: Duration = Duration::from_secs(60);

/// Over how long the renewal of all sessions is spread, and how long after one that failed it is tried again.
const SPREAD: Duration = Duration::from_secs(10);
const RENEWAL_RETRY: Duration = Duration::from_secs(15);

/// The most images taken from one node.
const MAX_IMAGES: usize = 20_000;

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
        /// Whether its kubelet writes down who may have an image.
        records: v1::PullRecords,
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
    /// Whether containerd answers the node's agent, when that changes; it does when a session begins.
    Runtime {
        /// The node.
        node: NodeName,
        /// Whether it does not answer.
        is_down: bool,
    },
    /// The session ended.
    Down {
        /// The node.
        node: NodeName,
    },
}

/// Keeps a session with every endpoint.
pub struct Fleet {
    shared: Shared,
    stop: CancellationToken,
    sessions: HashMap<NodeName, (Endpoint, CancellationToken, JoinHandle<()>)>,
}

/// What all sessions share.
#[derive(Clone)]
struct Shared {
    term: v1::Term,
    agents: Agents,
    events: mpsc::Sender<FleetEvent>,
    enrolment: Arc<Enrolment>,
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
    #[error("there is no certificate authority yet")]
    NoAuthority,
    #[error(transparent)]
    Enrol(#[from] EnrolError),
    #[error("the agent is not who it should be: {0}")]
    Unverified(#[from] Unverified),
}

impl Fleet {
    /// Sessions for `term` that end with `stop`.
    pub fn new(
        term: v1::Term,
        agents: Agents,
        events: mpsc::Sender<FleetEvent>,
        enrolment: Arc<Enrolment>,
        stop: CancellationToken,
    ) -> Self {
        Self { shared: Shared { term, agents, events, enrolment }, stop, sessions: HashMap::new() }
    }

    /// Replaces the set of endpoints. Sessions of those that stay are left alone.
    pub async fn set_endpoints(&mut self, endpoints: Vec<Endpoint>) {
        let expected = endpoints.iter().map(|e| e.node.clone()).collect();
        let wanted: HashMap<NodeName, Endpoint> =
            endpoints.into_iter().map(|endpoint| (endpoint.node.clone(), endpoint)).collect();
        let gone: Vec<NodeName> = self
            .sessions
            .iter()
            .filter(|(node, (former, _, _))| wanted.get(*node).is_none_or(|now| !now.is_same_agent(former)))
            .map(|(node, _)| node.clone())
            .collect();
        for node in gone {
            if let Some((_, stop, task)) = self.sessions.remove(&node) {
                stop.cancel();
                // It tells of its end, before a session with the same node's new address tells of its start.
                let _ = task.await;
            }
        }
        for (node, endpoint) in wanted {
            if self.sessions.contains_key(&node) {
                continue;
            }
            let stop = self.stop.child_token();
            let task = tokio::spawn(keep(endpoint.clone(), self.shared.clone(), stop.clone()));
            self.sessions.insert(node, (endpoint, stop, task));
        }
        let _ = self.shared.events.send(FleetEvent::Expected(expected)).await;
    }
}

async fn keep(endpoint: Endpoint, shared: Shared, stop: CancellationToken) {
    let Endpoint { node, address, .. } = &endpoint;
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10), node);
    loop {
        let mut up = false;
        let ended = tokio::select! {
            () = stop.cancelled() => SessionError::Stopping,
            ended = session(&endpoint, &shared, &mut up) => match ended {
                Ok(()) => SessionError::Ended,
                Err(error) => error,
            },
        };
        if up {
            shared.agents.set(node, None);
            backoff.reset();
            let _ = shared.events.send(FleetEvent::Down { node: node.clone() }).await;
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

/// A session that has told its inventory.
struct Open {
    client: AgentClient,
    incoming: Streaming<v1::SessionResponse>,
    /// Kept open for as long as the session lives.
    _requests: mpsc::Sender<v1::SessionRequest>,
    up: FleetEvent,
    /// By which certificates it stands, and when the agent's is to be replaced.
    standing: Arc<Standing>,
    /// Whether the agent was told whom to trust by it.
    is_told: bool,
    renew_at: SystemTime,
}

/// One session from its beginning to its end. Before a certificate of either side runs out, or when other authorities
/// are to be trusted, another connection takes the place of the first; the session goes on.
async fn session(endpoint: &Endpoint, shared: &Shared, up: &mut bool) -> Result<(), SessionError> {
    let mut standings = shared.enrolment.standing();
    // Large while it runs, and gone then: there are thousands of sessions.
    let mut open = Box::pin(open(endpoint, shared, None)).await?;
    loop {
        let Open { client, mut incoming, _requests, up: event, standing, is_told, mut renew_at } = open;
        shared.agents.set(&endpoint.node, Some(client));
        *up = true;
        let _ = shared.events.send(event).await;
        let mut is_noticed = false;
        open = loop {
            let changed = standings.wait_for(|now| {
                now.as_ref().is_some_and(|now| (now.own, now.trusted) != (standing.own, standing.trusted))
            });
            let due = tokio::time::sleep(renew_at.duration_since(SystemTime::now()).unwrap_or_default());
            tokio::select! {
                response = incoming.message() => {
                    let Some(response) = response? else { return Ok(()) };
                    if let Some(event) = response.message.and_then(|said| event_of(&endpoint.node, &said)) {
                        let _ = shared.events.send(event).await;
                    }
                }
                changed = async { changed.await.is_ok() }, if !is_noticed => {
                    is_noticed = true;
                    if changed {
                        // Not all agents at the same moment.
                        renew_at = renew_at.min(SystemTime::now() + spread(&endpoint.node, SPREAD));
                    }
                }
                () = due => match Box::pin(self::open(endpoint, shared, Some((&standing, is_told)))).await {
                    Ok(next) => break next,
                    Err(error) => {
                        tracing::warn!(node = %endpoint.node, %error, "cannot renew the session; it goes on as it is");
                        renew_at = SystemTime::now() + RENEWAL_RETRY;
                    }
                }
            }
        };
    }
}

fn event_of(node: &NodeName, said: &Message) -> Option<FleetEvent> {
    let node = node.clone();
    match said {
        Message::Delta(delta) => Some(FleetEvent::Delta {
            node,
            upserted: delta.upserted.iter().filter_map(Image::from_wire).collect(),
            removed: delta.removed.iter().filter_map(|digest| digest.parse().ok()).collect(),
        }),
        Message::Runtime(runtime) => Some(FleetEvent::Runtime { node, is_down: runtime.down }),
        Message::Welcome(_) | Message::Snapshot(_) => None,
    }
}

/// Whoever answers is the node's agent.
struct Identified {
    client: AgentClient,
    standing: Arc<Standing>,
    is_told: bool,
    renew_at: SystemTime,
}

/// A connection to the node's agent, which has a certificate that is good for a while.
async fn identified(
    endpoint: &Endpoint,
    shared: &Shared,
    before: Option<(&Standing, bool)>,
) -> Result<Identified, SessionError> {
    let Endpoint { node, address, .. } = endpoint;
    let enrolment = &shared.enrolment;
    let standing = enrolment.standing().borrow().clone().ok_or(SessionError::NoAuthority)?;
    let mut connection = tote_rpc::connect(*address, node, &enrolment.identity).await?;
    let now = SystemTime::now();
    let is_good = match connection.peer() {
        Ok(peer) => now < peer.renew_at() && connection.is_issued_by(standing.authority()),
        Err(reason) => {
            tracing::info!(%node, %address, %reason, "the agent is to be identified");
            false
        }
    };
    // It is told whom to trust as that changes; or in case it was told by an earlier leader, or was not.
    let mut is_told = match before {
        None => !standing.signer.is_changing(),
        Some((before, was_told)) => was_told && before.trusted == standing.trusted,
    };
    let mut is_renewed = true;
    if !is_good || !is_told {
        match enrolment.enrol(&mut connection, endpoint, &standing).await {
            Ok(()) => {
                is_told = true;
                connection = tote_rpc::connect(*address, node, &enrolment.identity).await?;
            }
            // What it has is good for a while, and the API server may answer by then.
            Err(error) if connection.peer().is_ok() && !matches!(error, EnrolError::Refused(_)) => {
                is_renewed = false;
                tracing::warn!(%node, %address, %error, "the agent's certificate is not renewed yet");
            }
            Err(error) => return Err(error.into()),
        }
    }
    let soon = now + RENEWAL_RETRY;
    let due = connection.peer().ok().filter(|_| is_renewed).map(Peer::renew_at);
    let renew_at = due.map_or(soon, |due| due.max(soon));
    Ok(Identified { client: connection.into_client()?, standing, is_told, renew_at })
}

async fn open(
    endpoint: &Endpoint,
    shared: &Shared,
    before: Option<(&Standing, bool)>,
) -> Result<Open, SessionError> {
    let Endpoint { node, address, .. } = endpoint;
    let Identified { mut client, standing, is_told, renew_at } = identified(endpoint, shared, before).await?;
    let (requests, outgoing) = mpsc::channel(1);
    let hello = v1::Hello { term: Some(shared.term.clone()), node_name: node.to_string() };
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
        snapshotter = welcome.snapshotter, problem = welcome.problem, renewed = before.is_some(),
        "session with the agent");
    let records = welcome.pull_records();
    let platform = welcome.platform.unwrap_or_default();
    let up = FleetEvent::Up {
        node: node.clone(),
        address: address.to_string(),
        platform: Platform::new(&platform.os, &platform.architecture, &platform.variant),
        problem: welcome.problem,
        records,
        images,
    };
    Ok(Open { client, incoming, _requests: requests, up, standing, is_told, renew_at })
}

async fn snapshot(incoming: &mut Streaming<v1::SessionResponse>) -> Result<Vec<Image>, SessionError> {
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

/// Spreads what all sessions do at once over some time, each at a moment of its own.
fn spread(node: &NodeName, over: Duration) -> Duration {
    let hash = node.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    over * u32::try_from(hash % 1000).unwrap_or_default() / 1000
}
