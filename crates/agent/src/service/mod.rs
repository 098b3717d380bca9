//! The control plane: what the controller asks of this agent by gRPC.

mod session;
mod term;

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tote_rpc::v1::{self, agent_server, session_request};

use self::term::Terms;
use crate::containerd::Facts;
use crate::import::{AttachError, Attached, ImportRequest, Imports, RequestError, TransferId};
use crate::inventory::Inventory;
use crate::metrics::Metrics;

/// The least time between two progress events.
const PROGRESS_SPACING: Duration = Duration::from_millis(200);

/// How long a new session waits for its `hello`, and for the node's inventory to be known.
const HELLO_DEADLINE: Duration = Duration::from_secs(30);

/// How many messages of a session may wait for a slow controller.
const SESSION_QUEUE: usize = 4;

/// What is known of the node, as it changes; `None` until containerd has answered.
pub type Known<T> = watch::Receiver<Option<T>>;

/// The agent as the controller sees it.
pub struct Service {
    /// The node's name.
    pub node_name: String,
    /// New with every start.
    pub epoch: String,
    /// The transfers.
    pub imports: Arc<Imports>,
    /// containerd's version, platform and snapshotter.
    pub facts: Known<Facts>,
    /// The node's images.
    pub inventory: Known<Arc<Inventory>>,
    /// Where sessions are counted.
    pub metrics: Arc<Metrics>,
    /// Ends sessions when the agent stops.
    pub stop: CancellationToken,
    terms: Terms,
}

impl Service {
    /// A service for a node, with no leader known yet.
    pub fn new(
        node_name: String,
        imports: Arc<Imports>,
        facts: Known<Facts>,
        inventory: Known<Arc<Inventory>>,
        metrics: Arc<Metrics>,
        stop: CancellationToken,
    ) -> Self {
        let started = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let epoch = format!("{:x}-{}", started.map_or(0, |since| since.as_nanos()), std::process::id());
        Self { node_name, epoch, imports, facts, inventory, metrics, stop, terms: Terms::default() }
    }

    fn leads(&self, term: Option<&v1::Term>) -> Result<(), Status> {
        let term = term.ok_or_else(|| Status::invalid_argument("term: must be set"))?;
        self.terms.admit(term)
    }
}

impl From<RequestError> for Status {
    fn from(error: RequestError) -> Self {
        Self::invalid_argument(error.to_string())
    }
}

impl From<AttachError> for Status {
    fn from(error: AttachError) -> Self {
        match error {
            AttachError::Another(..) => Self::invalid_argument(error.to_string()),
            AttachError::Full => Self::resource_exhausted(error.to_string()),
            AttachError::Stopping => Self::unavailable(error.to_string()),
        }
    }
}

#[tonic::async_trait]
impl agent_server::Agent for Service {
    type SessionStream = BoxStream<'static, Result<v1::SessionResponse, Status>>;
    type ImportStream = BoxStream<'static, Result<v1::ImportEvent, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut requests = request.into_inner();
        let hello = tokio::time::timeout(HELLO_DEADLINE, requests.message()).await;
        let hello = hello.map_err(|_| Status::deadline_exceeded("no hello came"))??;
        let Some(session_request::Message::Hello(hello)) = hello.and_then(|request| request.message) else {
            return Err(Status::invalid_argument("the first message of a session must be hello"));
        };
        if let Some(term) = &hello.term {
            self.terms.admit(term)?;
        }
        if hello.node_name != self.node_name {
            let message =
                format!("this is the agent of node {:?}, not {:?}", self.node_name, hello.node_name);
            return Err(Status::failed_precondition(message));
        }
        let (sender, receiver) = mpsc::channel(SESSION_QUEUE);
        let session = session::Session {
            node_name: self.node_name.clone(),
            epoch: self.epoch.clone(),
            facts: self.facts.clone(),
            inventory: self.inventory.clone(),
        };
        let (stop, metrics) = (self.stop.clone(), self.metrics.clone());
        tokio::spawn(async move {
            metrics.session(1);
            let ended = tokio::select! {
                () = stop.cancelled() => Err(Status::unavailable("the agent is stopping")),
                () = session::drain(&mut requests) => Ok(()),
                ended = session.report(&sender) => ended,
            };
            metrics.session(-1);
            if let Err(status) = ended {
                let _ = sender.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver).boxed()))
    }

    async fn import(
        &self,
        request: Request<v1::ImportRequest>,
    ) -> Result<Response<Self::ImportStream>, Status> {
        let request = request.into_inner();
        self.leads(request.term.as_ref())?;
        let attached = self.imports.attach(ImportRequest::try_from(request)?)?;
        Ok(Response::new(events(attached).boxed()))
    }

    async fn cancel(
        &self,
        request: Request<v1::CancelRequest>,
    ) -> Result<Response<v1::CancelResponse>, Status> {
        let request = request.into_inner();
        self.leads(request.term.as_ref())?;
        let id = TransferId::parse(&request.transfer_id)?;
        let found = self.imports.cancel(&id).await.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(Response::new(v1::CancelResponse { found }))
    }
}

/// A transfer's progress as it is, then as it changes, not too often, then its end.
fn events(attached: Attached) -> impl futures::Stream<Item = Result<v1::ImportEvent, Status>> {
    let first: Option<(Attached, Option<Instant>)> = Some((attached, None));
    stream::unfold(first, |following| async move {
        let (mut attached, sent) = following?;
        if let Some(sent) = sent {
            let outcome_or_time = async {
                let mut ends = attached.states.clone();
                let ended = ends.wait_for(|state| state.outcome.is_some());
                tokio::select! { _ = ended => {}, () = tokio::time::sleep_until(sent + PROGRESS_SPACING) => {} }
            };
            outcome_or_time.await;
            let over = attached.over();
            tokio::select! {
                biased;
                _ = attached.states.changed() => {}
                () = over => {}
            }
        }
        let state = attached.states.borrow_and_update().clone();
        if state.outcome.is_some() {
            return Some((Ok(v1::ImportEvent::from(&state)), None));
        }
        if attached.is_over() {
            return Some((Err(Status::unavailable("the agent is stopping")), None));
        }
        Some((Ok(v1::ImportEvent::from(&state)), Some((attached, Some(Instant::now())))))
    })
}
