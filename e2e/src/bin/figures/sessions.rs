//! What a session with an idle agent costs the controller: a thousand simulated agents in a process of their own, the
//! controller's own sessions in this one.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail};
use futures::stream::BoxStream;
use futures::{StreamExt as _, stream};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpListener;
use tokio::process::Command;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tote_controller::ca::{Ca, Standing};
use tote_controller::fleet::{Agents, Endpoint, Enrolment, Fleet, FleetEvent};
use tote_e2e::host;
use tote_rpc::identity::{Authority, Identity, Role};
use tote_rpc::v1::{self, agent_server::Agent, session_response::Message};

use crate::identities::{certified, controller};

const LIFE: Duration = Duration::from_secs(3600);

/// Holds `count` sessions and prints the memory before and after, in all and for each.
pub async fn memory(count: usize) -> Result<()> {
    println!("\nmemory of {count} idle sessions in the controller");
    let directory = tempfile::tempdir()?;
    let authority = Authority::generate(SystemTime::now(), LIFE)?;
    std::fs::write(directory.path().join("ca.crt"), authority.certificate_pem())?;
    std::fs::write(directory.path().join("ca.key"), authority.key_pem())?;
    let mut agents = Command::new(std::env::current_exe()?)
        .arg("--simulate")
        .arg(count.to_string())
        .arg("--authority")
        .arg(directory.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut lines = BufReader::new(agents.stdout.take().context("no output")?).lines();
    let mut endpoints = Vec::new();
    while endpoints.len() < count {
        let line = timeout(LIFE, lines.next_line()).await??.context("the simulated agents have ended")?;
        let (node, address) = line.split_once(' ').context("a node and its address are due")?;
        let (node, address) = (node.into(), address.parse()?);
        endpoints.push(Endpoint { node, address, ready: true, pod_uid: None });
    }
    let identity = controller(&authority)?;
    let signer = Arc::new(Ca::new(authority));
    let standings = watch::Sender::new(Some(Arc::new(Standing { signer, trusted: 1, own: 1 })));
    let silent = tower::service_fn(|_: http::Request<kube::client::Body>| {
        let nothing = std::io::Error::other("no API server");
        std::future::ready(Err::<http::Response<kube::client::Body>, _>(nothing))
    });
    let client = kube::Client::new(silent, "default");
    let term = v1::Term { lease_uid: "lease".to_owned(), lease_transitions: 1 };
    let account = ("tote-system", "tote-agent");
    let enrolment =
        Enrolment::new(client, account, term.clone(), identity, standings.subscribe(), LIFE, Arc::default());
    let (events, mut told) = mpsc::channel(4096);
    let stop = CancellationToken::new();
    let mut fleet = Fleet::new(term, Agents::default(), events, Arc::new(enrolment), stop.clone());
    let resident = || host::resident(std::process::id()).map(|bytes| bytes >> 10);
    let (before, begin) = (resident()?, Instant::now());
    fleet.set_endpoints(endpoints).await;
    let mut up = 0;
    while up < count {
        match timeout(Duration::from_secs(60), told.recv()).await.context("a session")? {
            Some(FleetEvent::Up { .. }) => up += 1,
            Some(FleetEvent::Expected(_)) => {}
            other => bail!("a session is due, {other:?} came"),
        }
    }
    let took = begin.elapsed().as_secs_f64();
    let after = resident()?;
    #[allow(clippy::cast_precision_loss)]
    let each = after.saturating_sub(before) as f64 / count as f64;
    println!("  {before} KiB before, {after} KiB with all of them: {each:.1} KiB each (goal 20)");
    println!("  all handshakes and inventories in {took:.2} s");
    stop.cancel();
    agents.kill().await?;
    Ok(())
}

/// An agent that says who it is and what it has, and then nothing.
#[derive(Clone)]
struct Idle(String);

type Answer<T> = Result<Response<T>, Status>;

fn never<T>() -> Answer<T> {
    Err(Status::unimplemented("an idle agent is not asked for this"))
}

#[tonic::async_trait]
impl Agent for Idle {
    type SessionStream = BoxStream<'static, Result<v1::SessionResponse, Status>>;
    type ImportStream = BoxStream<'static, Result<v1::ImportEvent, Status>>;

    async fn session(&self, request: Request<Streaming<v1::SessionRequest>>) -> Answer<Self::SessionStream> {
        let mut requests = request.into_inner();
        let _ = requests.message().await?;
        let welcome = v1::Welcome { node_name: self.0.clone(), ..v1::Welcome::default() };
        let snapshot = v1::InventorySnapshot { images: Vec::new(), last: true };
        let said = [Message::Welcome(welcome), Message::Snapshot(snapshot)]
            .map(|message| Ok(v1::SessionResponse { message: Some(message) }));
        let open = stream::once(async move {
            while let Ok(Some(_)) = requests.message().await {}
            Err(Status::cancelled("the controller has gone"))
        });
        Ok(Response::new(stream::iter(said).chain(open).boxed()))
    }

    async fn import(&self, _: Request<v1::ImportRequest>) -> Answer<Self::ImportStream> {
        never()
    }

    async fn cancel(&self, _: Request<v1::CancelRequest>) -> Answer<v1::CancelResponse> {
        never()
    }

    async fn attest(&self, _: Request<v1::AttestRequest>) -> Answer<v1::AttestResponse> {
        never()
    }

    async fn certify(&self, _: Request<v1::CertifyRequest>) -> Answer<v1::CertifyResponse> {
        never()
    }

    async fn grant(&self, _: Request<v1::GrantRequest>) -> Answer<v1::GrantResponse> {
        never()
    }

    async fn revoke(&self, _: Request<v1::RevokeRequest>) -> Answer<v1::RevokeResponse> {
        never()
    }

    async fn remove(&self, _: Request<v1::RemoveRequest>) -> Answer<v1::RemoveResponse> {
        never()
    }
}

/// The other process: so many agents, each with a certificate and a listener of its own. Prints where they are; ends
/// when its standard input does, or is killed.
pub async fn simulate(count: usize, authority: &Path) -> Result<()> {
    let read = |name: &str| std::fs::read_to_string(PathBuf::from(authority).join(name));
    let authority = Authority::from_pem(&read("ca.crt")?, &read("ca.key")?)?;
    for n in 0..count {
        let name = format!("node-{n}");
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address: SocketAddr = listener.local_addr()?;
        let role = Role::Node(name.as_str().into());
        let identity: Arc<Identity> = certified(&authority, &role, Some(address.ip()))?;
        let refusals = Arc::new(|_| {});
        let serving = tote_rpc::serve(
            listener,
            identity,
            Idle(name.clone()),
            axum::Router::new(),
            refusals,
            CancellationToken::new(),
        );
        tokio::spawn(serving);
        println!("{name} {address}");
    }
    let mut end = BufReader::new(tokio::io::stdin()).lines();
    while end.next_line().await?.is_some() {}
    Ok(())
}
