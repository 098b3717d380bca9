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
use tonic::{Code, Request, Response, Status, Streaming};
use tote_rpc::Refusal;
use tote_rpc::identity::is_node_name;
use tote_rpc::v1::{self, agent_server, session_request};

pub use self::term::Terms;
use crate::containerd::Facts;
use crate::identity::{IdentityError, Standing};
use crate::import::{AttachError, Attached, ImportRequest, Imports, RequestError, TransferId};
use crate::inventory::Inventory;
use crate::kubelet::Records;
use crate::metrics::Metrics;
use crate::remove::{RemoveError, remove};
use crate::serve::{GrantError, Grants, blobs_below};

/// The least time between two progress events.
const PROGRESS_SPACING: Duration = Duration::from_millis(200);

/// How long a new session waits for its `hello`, and for the node's inventory to be known.
const HELLO_DEADLINE: Duration = Duration::from_secs(30);

/// How many messages of a session may wait for a slow controller.
const SESSION_QUEUE: usize = 4;

/// The longest life of a grant, in seconds.
const LONGEST_GRANT: u64 = 86_400;

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
    /// Whether containerd has stopped answering.
    pub runtime_down: watch::Receiver<bool>,
    /// The node's images.
    pub inventory: Known<Arc<Inventory>>,
    /// Where kubelet writes down who may have an image.
    pub records: Option<Arc<Records>>,
    /// Where sessions and refusals are counted.
    pub metrics: Arc<Metrics>,
    /// Who this agent is.
    pub standing: Arc<Standing>,
    /// Who may read what.
    pub grants: Grants,
    /// Ends sessions when the agent stops.
    pub stop: CancellationToken,
    /// Who has led so far.
    pub terms: Terms,
}

impl Service {
    /// Refuses whoever does not lead. (That it is a controller was seen to before.)
    fn leads(&self, term: Option<&v1::Term>) -> Result<(), Status> {
        let term = term.ok_or_else(|| Status::invalid_argument("term: must be set"))?;
        self.terms.admit(term).inspect_err(|status| {
            if status.code() == Code::FailedPrecondition {
                self.metrics.refused(Refusal::Term);
            }
        })
    }
}

/// A name for this start of the agent that no other has.
pub fn epoch() -> String {
    let started = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    format!("{:x}-{}", started.map_or(0, |since| since.as_nanos()), std::process::id())
}

fn wrong(field: &'static str, value: &str, reason: &dyn std::fmt::Display) -> Status {
    RequestError::new(field, value, reason).into()
}

impl From<RequestError> for Status {
    fn from(error: RequestError) -> Self {
        Self::invalid_argument(error.to_string())
    }
}

impl From<IdentityError> for Status {
    fn from(error: IdentityError) -> Self {
        match error {
            IdentityError::NoToken | IdentityError::Token { .. } => Self::unavailable(error.to_string()),
            IdentityError::Authorities(_) | IdentityError::Certificate(_) => {
                Self::invalid_argument(error.to_string())
            }
        }
    }
}

impl From<GrantError> for Status {
    fn from(error: GrantError) -> Self {
        match error {
            GrantError::Unknown(_) => Self::not_found(error.to_string()),
            GrantError::Full => Self::resource_exhausted(error.to_string()),
            GrantError::TooLarge(_) => Self::invalid_argument(error.to_string()),
            GrantError::Containerd(_) => Self::unavailable(error.to_string()),
        }
    }
}

impl From<RemoveError> for Status {
    fn from(error: RemoveError) -> Self {
        match error {
            RemoveError::Complete(_) | RemoveError::Moving(_) => Self::failed_precondition(error.to_string()),
            RemoveError::Containerd(_) => Self::unavailable(error.to_string()),
        }
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
        self.leads(hello.term.as_ref())?;
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
            runtime_down: self.runtime_down.clone(),
            inventory: self.inventory.clone(),
            records: self.records.clone(),
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

    async fn attest(
        &self,
        request: Request<v1::AttestRequest>,
    ) -> Result<Response<v1::AttestResponse>, Status> {
        self.leads(request.into_inner().term.as_ref())?;
        let token = self.standing.token().await?;
        Ok(Response::new(v1::AttestResponse { token }))
    }

    async fn certify(
        &self,
        request: Request<v1::CertifyRequest>,
    ) -> Result<Response<v1::CertifyResponse>, Status> {
        let request = request.into_inner();
        self.leads(request.term.as_ref())?;
        self.standing.certify(request.certificate, request.authorities)?;
        Ok(Response::new(v1::CertifyResponse {}))
    }

    async fn grant(&self, request: Request<v1::GrantRequest>) -> Result<Response<v1::GrantResponse>, Status> {
        let request = request.into_inner();
        self.leads(request.term.as_ref())?;
        let id = TransferId::parse(&request.transfer_id)?;
        let digest = request.digest.parse();
        let digest = digest.map_err(|error| wrong("digest", &request.digest, &error))?;
        if !is_node_name(&request.node_name) {
            return Err(wrong("node_name", &request.node_name, &"is no name of a node"));
        }
        let seconds =
            u64::try_from(request.seconds).ok().filter(|seconds| (1..=LONGEST_GRANT).contains(seconds));
        let seconds = seconds.ok_or_else(|| {
            wrong("seconds", &request.seconds.to_string(), &format!("must be 1 to {LONGEST_GRANT}"))
        })?;
        // Before what is here is looked at: what comes meanwhile is known by it.
        let coming = request.expected.then(|| self.imports.underway().expect(&digest, Instant::now()));
        let blobs = match blobs_below(self.imports.containerd(), &digest).await {
            Err(GrantError::Unknown(root)) if coming.is_some() => [root].into(),
            blobs => blobs?,
        };
        let (count, now) = (blobs.len(), Instant::now());
        let until = now + Duration::from_secs(seconds);
        match coming {
            Some(image) => self.grants.give_coming(id, request.node_name, (blobs, image), until, now)?,
            None => self.grants.give(id, request.node_name, blobs, until, now)?,
        }
        Ok(Response::new(v1::GrantResponse { blobs: i64::try_from(count).unwrap_or(i64::MAX) }))
    }

    async fn revoke(
        &self,
        request: Request<v1::RevokeRequest>,
    ) -> Result<Response<v1::RevokeResponse>, Status> {
        let request = request.into_inner();
        self.leads(request.term.as_ref())?;
        let found = self.grants.revoke(&TransferId::parse(&request.transfer_id)?, Instant::now());
        Ok(Response::new(v1::RevokeResponse { found }))
    }

    async fn remove(
        &self,
        request: Request<v1::RemoveRequest>,
    ) -> Result<Response<v1::RemoveResponse>, Status> {
        let request = request.into_inner();
        self.leads(request.term.as_ref())?;
        let digest = request.digest.parse();
        let digest = digest.map_err(|error| wrong("digest", &request.digest, &error))?;
        let names = remove(&self.imports, &digest).await?;
        Ok(Response::new(v1::RemoveResponse { names }))
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
