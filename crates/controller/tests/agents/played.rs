//! An agent that is played, a fleet that speaks to it, and what both need.

use std::net::SocketAddr;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{StreamExt as _, stream};
use tokio::net::TcpListener;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::BroadcastStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tote_controller::ca::{Ca, Standing};
use tote_controller::fleet::{Agents, Endpoint, Enrolment, Fleet, FleetEvent};
use tote_controller::http::Health;
use tote_rpc::AgentClient;
use tote_rpc::identity::{Authorities, Authority, Identity, Role};
use tote_rpc::testing::Pki;
use tote_rpc::v1::{self, agent_server::Agent, import_event, session_response::Message};

pub const DEADLINE: Duration = Duration::from_secs(20);

/// An agent that says what it is told to say.
#[derive(Clone)]
pub struct Played {
    pub node: &'static str,
    pub images: Vec<v1::Image>,
    /// What it says after its inventory.
    pub says: broadcast::Sender<Message>,
    pub import: Result<Vec<import_event::Event>, tonic::Code>,
    pub grant: Result<(), tonic::Code>,
    /// Whether an import never ends.
    pub hang: bool,
    /// Takes the certificates that are handed over.
    pub identity: Option<Arc<Identity>>,
    pub heard: Arc<Mutex<Vec<String>>>,
    pub stop: CancellationToken,
}

impl Played {
    pub fn new(node: &'static str) -> Self {
        Self {
            node,
            images: vec![image(1)],
            says: broadcast::channel(16).0,
            import: Ok(vec![]),
            grant: Ok(()),
            hang: false,
            identity: None,
            heard: Arc::default(),
            stop: CancellationToken::new(),
        }
    }

    pub fn heard(&self, what: String) {
        self.heard.lock().unwrap().push(what);
    }
}

pub fn digest(n: u8) -> String {
    tote_image::Digest::sha256(&[n]).to_string()
}

pub fn image(n: u8) -> v1::Image {
    v1::Image {
        target: Some(v1::Descriptor { digest: digest(n), ..v1::Descriptor::default() }),
        names: vec![format!("r.test/x:{n}")],
        manifests: vec![],
    }
}

#[allow(clippy::unnecessary_wraps)] // an item of a stream
fn message(message: Message) -> Result<v1::SessionResponse, Status> {
    Ok(v1::SessionResponse { message: Some(message) })
}

#[tonic::async_trait]
impl Agent for Played {
    type SessionStream = BoxStream<'static, Result<v1::SessionResponse, Status>>;
    type ImportStream = BoxStream<'static, Result<v1::ImportEvent, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let hello = request.into_inner().message().await?;
        self.heard(format!("{:?}", hello.and_then(|hello| hello.message)));
        let welcome = v1::Welcome {
            node_name: self.node.to_owned(),
            platform: Some(v1::Platform {
                os: "linux".into(),
                architecture: "amd64".into(),
                ..Default::default()
            }),
            ..v1::Welcome::default()
        };
        let mut parts: Vec<_> = self
            .images
            .iter()
            .map(|image| {
                message(Message::Snapshot(v1::InventorySnapshot { images: vec![image.clone()], last: false }))
            })
            .collect();
        parts.insert(0, message(Message::Welcome(welcome)));
        parts.push(message(Message::Snapshot(v1::InventorySnapshot { images: vec![], last: true })));
        let says = BroadcastStream::new(self.says.subscribe()).map(|said| message(said.unwrap()));
        Ok(Response::new(
            stream::iter(parts).chain(says).take_until(self.stop.clone().cancelled_owned()).boxed(),
        ))
    }

    async fn import(
        &self,
        request: Request<v1::ImportRequest>,
    ) -> Result<Response<Self::ImportStream>, Status> {
        let request = request.into_inner();
        let sources = request.sources.iter().map(|source| {
            let last = if source.last_resort { " (last resort)" } else { "" };
            let relay = if source.relay { " (relay)" } else { "" };
            format!(" {}{relay}{last}", source.node_name)
        });
        let from = if request.sources.is_empty() { "" } else { " from" };
        let most = match request.max_bytes {
            0 => String::new(),
            most => format!(", {most} bytes at most"),
        };
        self.heard(format!("import {}{from}{}{most}", request.transfer_id, sources.collect::<String>()));
        if self.hang {
            return Ok(Response::new(stream::pending().boxed()));
        }
        match &self.import {
            Ok(events) => {
                let events =
                    events.clone().into_iter().map(|event| Ok(v1::ImportEvent { event: Some(event) }));
                Ok(Response::new(stream::iter(events.collect::<Vec<_>>()).boxed()))
            }
            Err(code) => Err(Status::new(*code, "as told")),
        }
    }

    async fn cancel(
        &self,
        request: Request<v1::CancelRequest>,
    ) -> Result<Response<v1::CancelResponse>, Status> {
        self.heard(format!("cancel {}", request.into_inner().transfer_id));
        Ok(Response::new(v1::CancelResponse { found: true }))
    }

    async fn attest(&self, _: Request<v1::AttestRequest>) -> Result<Response<v1::AttestResponse>, Status> {
        self.heard("attest".to_owned());
        Ok(Response::new(v1::AttestResponse { token: "a-token".to_owned() }))
    }

    async fn certify(
        &self,
        request: Request<v1::CertifyRequest>,
    ) -> Result<Response<v1::CertifyResponse>, Status> {
        let request = request.into_inner();
        self.heard(format!("certify with {} authorities", request.authorities.len()));
        if let Some(identity) = &self.identity {
            let authorities = request.authorities.into_iter().map(Into::into).collect();
            identity.trust(&Authorities::from_certificates(authorities).unwrap());
            identity.install(request.certificate.into(), &Role::Node(self.node.into())).unwrap();
        }
        Ok(Response::new(v1::CertifyResponse {}))
    }

    async fn grant(&self, request: Request<v1::GrantRequest>) -> Result<Response<v1::GrantResponse>, Status> {
        let request = request.into_inner();
        let expected = if request.expected { ", expected" } else { "" };
        self.heard(format!("grant {} to {}{expected}", request.transfer_id, request.node_name));
        match self.grant {
            Ok(()) => Ok(Response::new(v1::GrantResponse { blobs: 1 })),
            Err(code) => Err(Status::new(code, "as told")),
        }
    }

    async fn revoke(
        &self,
        request: Request<v1::RevokeRequest>,
    ) -> Result<Response<v1::RevokeResponse>, Status> {
        self.heard(format!("revoke {}", request.into_inner().transfer_id));
        Ok(Response::new(v1::RevokeResponse { found: true }))
    }

    async fn remove(
        &self,
        request: Request<v1::RemoveRequest>,
    ) -> Result<Response<v1::RemoveResponse>, Status> {
        self.heard(format!("remove {}", request.into_inner().digest));
        Ok(Response::new(v1::RemoveResponse { names: vec!["r.test/x:1".to_owned()] }))
    }
}

/// Serves an agent that has its certificate until the token is cancelled; on `address`, or anywhere.
pub async fn serve(agent: Played, address: Option<SocketAddr>) -> (SocketAddr, CancellationToken) {
    let identity = PKI.node(agent.node, "127.0.0.1");
    serve_as(agent, identity, address).await
}

/// Serves an agent with any identity.
pub async fn serve_as(
    agent: Played,
    identity: Arc<Identity>,
    address: Option<SocketAddr>,
) -> (SocketAddr, CancellationToken) {
    let address = address.unwrap_or_else(|| "127.0.0.1:0".parse().unwrap());
    let listener = TcpListener::bind(address).await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = agent.stop.clone();
    let refusals = Arc::new(|_| {});
    tokio::spawn(tote_rpc::serve(listener, identity, agent, axum::Router::new(), refusals, stop.clone()));
    (address, stop)
}

/// Waits until a played agent has heard something.
pub async fn until_heard(played: &Played, what: &str) {
    let heard = async {
        while !played.heard.lock().unwrap().iter().any(|heard| heard.contains(what)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let late = || format!("{what} was not heard, but {:?}", played.heard.lock().unwrap());
    timeout(DEADLINE, heard).await.unwrap_or_else(|_| panic!("{}", late()));
}

/// Signs for all of these tests.
pub static PKI: LazyLock<Pki> = LazyLock::new(Pki::new);

/// With an API server that answers nothing: the agents here have their certificates.
pub fn silent() -> kube::Client {
    let silent = tower::service_fn(|_: http::Request<kube::client::Body>| {
        std::future::ready(Err::<http::Response<kube::client::Body>, _>(std::io::Error::other(
            "no API server",
        )))
    });
    kube::Client::new(silent, "default")
}

/// Another handle of a test's authority.
pub fn authority(pki: &Pki) -> Authority {
    Authority::from_pem(pki.authority.certificate_pem(), pki.authority.key_pem()).unwrap()
}

/// These tests' authority signs and is trusted.
pub fn standing(own: u64) -> Arc<Standing> {
    Arc::new(Standing { signer: Arc::new(Ca::new(authority(&PKI))), trusted: 1, own })
}

pub fn term() -> v1::Term {
    v1::Term { lease_uid: "lease".into(), lease_transitions: 7 }
}

pub async fn client_of(node: &str, address: SocketAddr) -> AgentClient {
    let connection = tote_rpc::connect(address, node, &PKI.controller()).await.unwrap();
    connection.into_client().unwrap()
}

pub struct Bench {
    pub fleet: Fleet,
    pub agents: Agents,
    pub events: mpsc::Receiver<FleetEvent>,
    pub standings: watch::Sender<Option<Arc<Standing>>>,
    _stop: tokio_util::sync::DropGuard,
}

pub fn bench() -> Bench {
    bench_with(silent(), PKI.controller(), Arc::default())
}

/// With an API server, an identity of the controller, and its metrics.
pub fn bench_with(client: kube::Client, identity: Arc<Identity>, health: Arc<Health>) -> Bench {
    let (sender, events) = mpsc::channel(64);
    let stop = CancellationToken::new();
    let agents = Agents::default();
    let standings = watch::Sender::new(Some(standing(1)));
    let account = ("tote-system", "tote-agent");
    let enrolment =
        Enrolment::new(client, account, term(), identity, standings.subscribe(), DEADLINE, health);
    let fleet = Fleet::new(term(), agents.clone(), sender, Arc::new(enrolment), stop.clone());
    Bench { fleet, agents, events, standings, _stop: stop.drop_guard() }
}

impl Bench {
    pub async fn next(&mut self) -> FleetEvent {
        timeout(DEADLINE, self.events.recv()).await.expect("an event of the fleet").unwrap()
    }

    pub async fn endpoints(&mut self, endpoints: &[(&str, SocketAddr)]) {
        let endpoints = endpoints.iter().map(|(node, address)| Endpoint {
            node: (*node).into(),
            address: *address,
            ready: true,
            pod_uid: Some("a-pod".to_owned()),
        });
        self.fleet.set_endpoints(endpoints.collect()).await;
    }
}
