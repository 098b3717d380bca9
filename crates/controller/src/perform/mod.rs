//! The one place where the controller acts on the world. Nothing is decided here.

mod calls;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;
use kube::api::Patch;
use kube::runtime::events::{Event as Told, EventType, Recorder, Reporter};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{AbortHandle, JoinSet};
use tote_api::names;
use tote_image::Digest;
use tote_rpc::v1;

use crate::decide::{About, Action, Event, Question};
use crate::fleet::{Agents, Grants, NodeName};
use crate::http::Health;
use crate::lookup::Upstream;
use crate::notify::Notifier;
use crate::transfer;
use calls::{create, delete, limited, object, parameters, write_status};

/// Calls of the API server at once, of each of the two kinds. The API server serves one account's requests in turn (API
/// Priority and Fairness), the renewal of the Lease among them: what is in front of that should be little.
const CALLS_AT_ONCE: usize = 8;

/// Performs actions, each in a task of its own; what comes of it comes back as events.
pub struct Performer {
    client: Client,
    recorder: Recorder,
    agents: Agents,
    term: v1::Term,
    events: mpsc::Sender<Event>,
    health: Arc<Health>,
    notifier: Option<Notifier>,
    calls: Arc<Semaphore>,
    /// Apart, so that pods whose patches hang (an admission webhook that is down) keep nothing else waiting.
    wake_calls: Arc<Semaphore>,
    wakes: HashMap<Arc<str>, AbortHandle>,
    streams: HashMap<Arc<str>, AbortHandle>,
    cancels: HashMap<Arc<str>, AbortHandle>,
    /// What was granted for the transfer of a job, to be taken back when it is cancelled; and when it was last renewed
    /// at the latest.
    granted: HashMap<Arc<str>, (Grants, Instant)>,
    grant_life: Duration,
    upstream: Option<Upstream>,
    tasks: JoinSet<()>,
}

impl Performer {
    /// Acts for a term; everything under way ends when it is dropped.
    pub fn new(
        client: Client,
        me: &str,
        (agents, grant_life): (Agents, Duration),
        term: v1::Term,
        events: mpsc::Sender<Event>,
        (health, notifier, upstream): (Arc<Health>, Option<Notifier>, Option<Upstream>),
    ) -> Self {
        let reporter = Reporter { controller: names::MANAGER.to_owned(), instance: Some(me.to_owned()) };
        Self {
            recorder: Recorder::new(client.clone(), reporter),
            client,
            agents,
            term,
            events,
            health,
            notifier,
            calls: Arc::new(Semaphore::new(CALLS_AT_ONCE)),
            wake_calls: Arc::new(Semaphore::new(CALLS_AT_ONCE)),
            wakes: HashMap::new(),
            streams: HashMap::new(),
            cancels: HashMap::new(),
            granted: HashMap::new(),
            grant_life,
            upstream,
            tasks: JoinSet::new(),
        }
    }

    /// Starts an effect.
    pub fn perform(&mut self, action: Action) {
        self.forget_what_ended();
        let calls = self.calls.clone();
        match action {
            Action::Count(count) => self.health.metrics.count(count),
            Action::Notify(notification) => {
                if let Some(notifier) = &self.notifier {
                    notifier.notify(*notification);
                }
            }
            Action::RemoveImage { node, digest } => self.remove(node, &digest),
            Action::LookUp(question) => self.look_up(question),
            Action::Import {
                uid,
                stream,
                node,
                transfer_id,
                reference,
                digest,
                sources,
                pulled,
                max_bytes,
            } => {
                let sources = sources.into_iter().map(|source| v1::Source {
                    node_name: source.node.to_string(),
                    address: source.address,
                    last_resort: source.last_resort,
                    relay: source.relay,
                });
                let request = v1::ImportRequest {
                    term: Some(self.term.clone()),
                    transfer_id,
                    reference,
                    digest: digest.to_string(),
                    sources: sources.collect(),
                    pulled,
                    max_bytes,
                };
                tracing::info!(job = %uid, transfer = request.transfer_id, image = request.reference, %node,
                    sources = request.sources.len(), "import");
                if let Some(cancel) = self.cancels.remove(&uid) {
                    cancel.abort(); // It is wanted again.
                }
                let client = self.agents.client(&node);
                let grants = Grants::new(self.agents.clone(), &request, &node, self.grant_life);
                if let Some((former, _)) = self.granted.insert(uid.clone(), (grants.clone(), Instant::now()))
                {
                    self.tasks.spawn(former.without(&grants).revoke());
                }
                let events = self.events.clone();
                let follow = transfer::follow(client, request, grants, uid.clone(), stream, events);
                let handle = self.tasks.spawn(follow);
                if let Some(former) = self.streams.insert(uid, handle) {
                    former.abort();
                }
            }
            Action::Detach { uid } => self.detach(&uid),
            Action::Cancel { uid, node, transfer_id } => {
                self.detach(&uid);
                if let Some((grants, _)) = self.granted.remove(&uid) {
                    self.tasks.spawn(grants.revoke());
                }
                tracing::info!(job = %uid, transfer = transfer_id, %node, "cancel");
                let request = v1::CancelRequest { term: Some(self.term.clone()), transfer_id };
                let agents = self.agents.clone();
                let client = move || agents.client(&node);
                let handle = self.tasks.spawn(transfer::cancel(client, request));
                if let Some(former) = self.cancels.insert(uid, handle) {
                    former.abort();
                }
            }
            Action::CreateJob(job) => {
                let api = Api::namespaced(self.client.clone(), &job.namespace);
                self.call(&calls, create(api, job, self.events.clone()));
            }
            Action::DeleteJob { namespace, name, uid } => {
                let api = Api::namespaced(self.client.clone(), &namespace);
                self.call(&calls, delete(api, name, uid, self.events.clone()));
            }
            Action::WriteStatus { namespace, name, uid, before, status } => {
                let api = Api::namespaced(self.client.clone(), &namespace);
                let events = self.events.clone();
                self.call(&calls, async move {
                    let version = match write_status(&api, &name, &uid, &before, &status).await {
                        Ok(version) => Some(version),
                        // Only the watch tells that a job is gone: it may have older news of it on the way.
                        Err(error) if error.is_gone() => None,
                        Err(error) => {
                            tracing::warn!(job = %name, %error, "cannot write a status");
                            None
                        }
                    };
                    let _ = events.send(Event::StatusWritten { uid, version }).await;
                });
            }
            Action::WakePod { namespace, name, uid, annotations } => {
                self.wake(&namespace, name, uid, &annotations);
            }
            Action::Tell { about, warning, reason, action, note } => {
                self.tell(about, warning, reason, action, note);
            }
        }
    }

    fn tell(&mut self, about: About, warning: bool, reason: String, action: &'static str, note: String) {
        let recorder = self.recorder.clone();
        let calls = self.calls.clone();
        self.call(&calls, async move {
            let (name, text) = (about.name.clone(), note.clone());
            let event = Told {
                type_: if warning { EventType::Warning } else { EventType::Normal },
                reason: reason.clone(),
                note: Some(note),
                action: action.to_owned(),
                secondary: None,
            };
            tracing::info!(namespace = %about.namespace, object = %name, reason, note = text, "event");
            let object = object(about);
            if let Err(error) = limited(recorder.publish(&event, &object)).await
                && !error.is_gone()
            {
                tracing::warn!(object = %name, reason, %error, "cannot write an event");
            }
        });
    }

    /// Asks a registry; how many at once is bounded there.
    fn look_up(&mut self, question: Question) {
        let Some(upstream) = self.upstream.clone() else { return };
        let (client, health, events) = (self.client.clone(), self.health.clone(), self.events.clone());
        self.tasks.spawn(async move {
            let answer = upstream.ask(client, &question, &health.metrics).await;
            let _ = events.send(Event::LookedUp { question: Box::new(question), answer }).await;
        });
    }

    fn forget_what_ended(&mut self) {
        while self.tasks.try_join_next().is_some() {}
        self.streams.retain(|_, stream| !stream.is_finished());
        self.granted.retain(|uid, (_, renewed)| {
            if self.streams.contains_key(uid) {
                *renewed = Instant::now();
            }
            renewed.elapsed() < self.grant_life
        });
        self.cancels.retain(|_, cancel| !cancel.is_finished());
        self.wakes.retain(|_, wake| !wake.is_finished());
    }

    /// One patch of a pod at a time.
    fn wake(
        &mut self,
        namespace: &Arc<str>,
        name: Arc<str>,
        uid: Arc<str>,
        annotations: &BTreeMap<String, String>,
    ) {
        if self.wakes.contains_key(&uid) {
            return; // The API server has yet to answer the last one.
        }
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let patch = json!({"metadata": {"uid": &*uid, "annotations": annotations}});
        let namespace = namespace.clone();
        let handle = self.call(&self.wake_calls.clone(), async move {
            match limited(api.patch_metadata(&name, &parameters(), &Patch::Merge(patch))).await {
                Ok(_) => tracing::info!(%namespace, pod = %name, "woken"),
                Err(error) if error.is_gone() => {}
                Err(error) => tracing::warn!(%namespace, pod = %name, %error, "cannot wake"),
            }
        });
        self.wakes.insert(uid, handle);
    }

    fn remove(&mut self, node: NodeName, digest: &Digest) {
        let request = v1::RemoveRequest { term: Some(self.term.clone()), digest: digest.to_string() };
        self.tasks.spawn(transfer::remove(self.agents.client(&node), node, request));
    }

    fn detach(&mut self, uid: &str) {
        if let Some(stream) = self.streams.remove(uid) {
            stream.abort();
        }
    }

    fn call(
        &mut self,
        calls: &Arc<Semaphore>,
        effect: impl Future<Output = ()> + Send + 'static,
    ) -> AbortHandle {
        let calls = calls.clone();
        self.tasks.spawn(async move {
            let _permit = calls.acquire_owned().await;
            effect.await;
        })
    }
}
