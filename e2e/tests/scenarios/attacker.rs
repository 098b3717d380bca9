//! Those who attack: a tenant's pod that they stand in, and what they have stolen. Whoever is refused is counted. What
//! they do is the scenarios'.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::core::v1::Pod;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tote_e2e::images::Image;
use tote_e2e::netns;
use tote_e2e::registry::Control as _;
use tote_e2e::tenant::container_id;
use tote_rpc::identity::{Authorities, Identity, Role};
use tote_rpc::testing::Pki;
use tote_rpc::{AgentClient, ConnectError, v1};

use crate::known::{Agent, Kept, agents, leader, trusted};
use crate::play::Play;
use crate::stage::SOON;

/// A node that does not exist.
pub const NOBODY: &str = "n9";

/// What has been stolen: the authority's key, and what the leader tells agents.
#[derive(Clone)]
pub struct Stolen {
    /// The authority that signs, with its key.
    pub pki: Arc<Pki>,
    /// All that agents trust.
    pub trusted: Authorities,
    /// The leadership that agents obey.
    pub term: v1::Term,
    /// The address of the attackers' pod.
    pub address: IpAddr,
}

impl Stolen {
    /// A certificate of the authority; believes the agents.
    pub fn certified(&self, role: &Role) -> Arc<Identity> {
        self.believing(self.pki.identity(role, Some(self.address)))
    }

    /// The same identity, but it believes the agents.
    pub fn believing(&self, identity: Arc<Identity>) -> Arc<Identity> {
        identity.trust(&self.trusted);
        identity
    }

    /// Speaks to an agent as the leader does.
    pub async fn lead(&self, agent: &Agent) -> Result<AgentClient> {
        call(agent, &self.certified(&Role::Controller)).await
    }
}

/// A connection to an agent that is believed to be that node's.
pub async fn call(agent: &Agent, who: &Arc<Identity>) -> Result<AgentClient> {
    let connection = tote_rpc::connect(agent.address, &agent.node, who).await?;
    connection.into_client().with_context(|| format!("{agent} is not believed to be who it is"))
}

/// A tenant's pod that attacks are made from.
pub struct Attacker<'a> {
    play: &'a Play,
    process: u32,
    /// The pod.
    pub pod: Pod,
    /// What it has stolen.
    pub stolen: Stolen,
    /// The agents of all nodes.
    pub agents: Vec<Agent>,
}

impl<'a> Attacker<'a> {
    /// In a pod on a node, with an image of its own; the registry must be up.
    pub async fn enter(play: &'a Play, node: &str) -> Result<Self> {
        let image = play.image_seeded("tiny", "attacker")?;
        let (_, pinned) = play.push_as(&image, "attacker").await?;
        play.pull_on("attacker", node, &pinned).await?;
        let pod = play.tenant.pods().get("attacker").await?;
        let container = container_id(&pod).context("the attackers' pod has no container")?.to_owned();
        let process = tokio::task::block_in_place(|| play.cluster().node(node)?.process(&container))?;
        let address = pod.status.as_ref().and_then(|status| status.pod_ip.clone()).unwrap_or_default();
        let address = address.parse().with_context(|| format!("the attackers' pod has {address:?}"))?;
        let client = play.tenant.client();
        let pki = Arc::new(Kept::read(&client).await?.signer()?);
        let (_, term) = leader(&client).await?;
        let stolen = Stolen { pki, trusted: trusted(&client).await?, term, address };
        Ok(Self { play, process, pod, stolen, agents: agents(play).await? })
    }

    /// The agent of a node.
    pub fn agent(&self, node: &str) -> Result<&Agent> {
        self.agents.iter().find(|agent| agent.node == node).with_context(|| format!("no agent on {node}"))
    }

    /// Does something inside the pod, as [`netns::run_in`] has it.
    pub async fn inside<T, F, R>(&self, task: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> R + Send + 'static,
        R: Future<Output = Result<T>>,
    {
        netns::run_in(self.process, task).await
    }

    /// Listens inside the pod.
    pub async fn listen(&self, port: u16) -> Result<tokio::net::TcpListener> {
        netns::listen_in(self.process, SocketAddr::new(IpAddr::from([0, 0, 0, 0]), port)).await
    }

    /// Makes an attack, and waits until the agent has counted so many more refusals for this reason.
    pub async fn refused(
        &self,
        agent: &Agent,
        (reason, times): (&str, u64),
        what: &str,
        attack: impl Future<Output = Result<()>>,
    ) -> Result<()> {
        let client = self.play.tenant.client();
        let name = format!("tote_agent_refused_total{{reason=\"{reason}\"}}");
        let before = agent.metric(&client, &name).await?;
        attack.await.with_context(|| format!("{what}, at {agent}"))?;
        let look = || async {
            let now = agent.metric(&client, &name).await?;
            ensure!(now >= before + times, "{now} are counted");
            Ok(Some(now))
        };
        let what = format!("{agent} to count {times} refusals more than {before} as {reason}: {what}");
        let now = self.play.tenant.until(&what, SOON, look).await?;
        println!("{}: {reason} went from {before} to {now}", agent.node);
        Ok(())
    }
}

/// What somebody comes with to whom no door is to be opened.
#[derive(Clone)]
pub enum Shown {
    /// No TLS, but these bytes.
    Plain(&'static [u8]),
    /// A certificate or none, by a client of any make.
    Tls(Arc<ClientConfig>),
    /// A certificate, by the client that controllers have.
    Identity(Arc<Identity>),
}

/// Knocks at an agent's door; an error if it is opened, or if nobody answers.
pub async fn knock(agent: Agent, shown: Shown, term: v1::Term) -> Result<()> {
    let address = agent.address;
    match shown {
        Shown::Plain(bytes) => {
            let mut stream = TcpStream::connect(address).await?;
            let answer = said(&mut stream, bytes).await?;
            // Nothing, or an alert of TLS (RFC 8446, section 5.1).
            ensure!(answer.first().is_none_or(|first| *first == 21), "the answer is {}", text(&answer));
        }
        Shown::Tls(config) => {
            let stream = TcpStream::connect(address).await?;
            let name = ServerName::IpAddress(address.ip().into());
            let Ok(mut stream) = timeout(SOON, TlsConnector::from(config).connect(name, stream)).await?
            else {
                return Ok(());
            };
            let answer = said(&mut stream, b"GET /v2/ HTTP/1.1\r\nhost: agent\r\n\r\n").await?;
            ensure!(answer.is_empty(), "the answer is {}", text(&answer));
        }
        Shown::Identity(identity) => {
            let connection = match tote_rpc::connect(address, &agent.node, &identity).await {
                Ok(connection) => connection,
                Err(error @ ConnectError::Tcp(..)) => return Err(error.into()),
                Err(_) => return Ok(()),
            };
            let mut client = connection.into_client().context("the agent is not believed to be who it is")?;
            let request = v1::CancelRequest { term: Some(term), transfer_id: "attack".to_owned() };
            let answer =
                timeout(SOON, client.cancel(request)).await.context("neither answered nor refused")?;
            if let Ok(answer) = answer {
                bail!("it is let in: {answer:?}");
            }
        }
    }
    Ok(())
}

/// Says something, and returns all that comes until the other end is done.
async fn said(
    stream: &mut (impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin),
    bytes: &[u8],
) -> Result<Vec<u8>> {
    // The other end may have hung up already, which is as good as an end.
    let _ = stream.write_all(bytes).await;
    let _ = stream.flush().await;
    let mut answer = Vec::new();
    let end = timeout(SOON, stream.read_to_end(&mut answer)).await;
    let _ = end.with_context(|| format!("the connection is held open after {}", text(&answer)))?;
    Ok(answer)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(300)]).escape_debug().to_string()
}

/// A client of another make, that shows this certificate or none.
pub fn other_client(
    trusted: &Authorities,
    shown: Option<(CertificateDer<'static>, PrivateKeyDer<'static>)>,
) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    for authority in trusted.certificates() {
        roots.add(authority.clone())?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider);
    let builder = builder.with_protocol_versions(&[&rustls::version::TLS13])?.with_root_certificates(roots);
    let mut config = match shown {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => builder.with_client_auth_cert(vec![certificate], key)?,
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// A salvage that is to work whatever else happens.
pub struct Normal<'a> {
    play: &'a Play,
    /// What is salvaged.
    pub image: Image,
    pinned: String,
}

impl<'a> Normal<'a> {
    /// Of an image of this kind that the source has pulled. The registry is stopped then.
    pub async fn prepare(play: &'a Play, kind: &str) -> Result<Self> {
        let image = play.image(kind)?;
        let (_, pinned) = play.push(&image).await?;
        play.pull_on_source(&pinned).await?;
        play.registry.stop()?;
        Ok(Self { play, image, pinned })
    }

    /// A pod on the target runs it.
    pub async fn runs(&self) -> Result<()> {
        self.play.start_on_target("waiting", &self.pinned).await?;
        self.play.tenant.running("waiting", SOON).await.context("a normal salvage beside or after it")?;
        self.play.tenant.imported(SOON).await.map(drop)
    }

    /// A pod on the target runs it, and it is whole.
    pub async fn works(&self) -> Result<()> {
        self.runs().await?;
        self.is_whole().await
    }

    /// What runs is whole.
    pub async fn is_whole(&self) -> Result<()> {
        self.play.assert_intact(&self.image, &self.pinned).await
    }
}
