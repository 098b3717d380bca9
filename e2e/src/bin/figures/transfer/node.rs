//! A containerd and a real agent in a process of its own, and a controller's calls to it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures::{StreamExt as _, stream};
use tokio::task::block_in_place;
use tokio_util::task::AbortOnDropHandle;
use tonic::Streaming;
use tote_e2e::daemon::{Daemon, Options};
use tote_e2e::host;
use tote_rpc::AgentClient;
use tote_rpc::identity::Identity;
use tote_rpc::v1::{self, import_event::Event, session_request::Message, session_response::Message as Said};

/// A node of a benchmark.
pub struct Node {
    pub daemon: Daemon,
    pub name: String,
    upload: Option<String>,
    authority: PathBuf,
    controller: Arc<Identity>,
    agent: Option<Agent>,
}

/// The agent's process. It ends when its standard input does.
struct Agent {
    process: Child,
    _input: ChildStdin,
    address: SocketAddr,
    health: SocketAddr,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A source, as the controller would name it.
pub struct From<'a> {
    pub node: &'a Node,
    pub last_resort: bool,
    pub relay: bool,
}

/// What an import came to.
pub struct Imported {
    /// From the call to its end.
    pub took: Duration,
    pub done: v1::Done,
}

impl Node {
    /// A containerd, and an agent that gives `upload` bytes a second at most.
    pub fn start(
        name: &str,
        options: Options,
        authority: &Path,
        controller: &Arc<Identity>,
        upload: Option<&str>,
    ) -> Result<Self> {
        let daemon = Daemon::start(options)?;
        let mut node = Self {
            daemon,
            name: name.to_owned(),
            upload: upload.map(ToOwned::to_owned),
            authority: authority.to_owned(),
            controller: controller.clone(),
            agent: None,
        };
        node.start_agent()?;
        Ok(node)
    }

    /// Starts the agent, again after [`Self::kill_agent`].
    pub fn start_agent(&mut self) -> Result<()> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--agent", &self.name, "--authority"]).arg(&self.authority);
        command.arg("--socket").arg(self.daemon.socket());
        if let Some(upload) = &self.upload {
            command.args(["--upload", upload]);
        }
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let input = process.stdin.take().context("no input")?;
        let mut line = String::new();
        BufReader::new(process.stdout.take().context("no output")?).read_line(&mut line)?;
        let (address, health) = line.trim().split_once(' ').context("the agent does not say where it is")?;
        let (address, health) = (address.parse()?, health.parse()?);
        self.agent = Some(Agent { process, _input: input, address, health });
        Ok(())
    }

    /// Kills it with SIGKILL.
    pub fn kill_agent(&mut self) {
        self.agent = None;
    }

    /// Where its agent serves.
    pub fn address(&self) -> Result<SocketAddr> {
        Ok(self.agent()?.address)
    }

    fn agent(&self) -> Result<&Agent> {
        self.agent.as_ref().context("the agent was killed")
    }

    /// The agent's process.
    pub fn pid(&self) -> Result<u32> {
        Ok(self.agent()?.process.id())
    }

    /// The most memory that the agent has held, in bytes.
    pub fn peak(&self) -> Result<u64> {
        host::resident_at_most(self.pid()?)
    }

    /// A session of a controller, which has heard of so many images. It ends when it is dropped.
    pub async fn listen(&self, images: usize) -> Result<impl Sized + use<>> {
        let hello = v1::Hello { term: Some(term()), node_name: self.name.clone() };
        let hello = v1::SessionRequest { message: Some(Message::Hello(hello)) };
        let requests = stream::iter([hello]).chain(stream::pending());
        let mut session = self.client().await?.session(requests).await?.into_inner();
        let mut heard = 0;
        while heard < images {
            let response = session.message().await?.context("the session ended")?;
            heard += match response.message {
                Some(Said::Snapshot(snapshot)) => snapshot.images.len(),
                Some(Said::Delta(delta)) => delta.upserted.len(),
                _ => 0,
            };
        }
        // Whatever comes is taken in, as a controller does.
        let listening = tokio::spawn(async move { while let Ok(Some(_)) = session.message().await {} });
        Ok(AbortOnDropHandle::new(listening))
    }

    /// A counter of the agent's.
    pub fn counter(&self, name: &str) -> Result<u64> {
        let mut stream = TcpStream::connect(self.agent()?.health)?;
        write!(stream, "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let value = answer.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        value.with_context(|| format!("no {name} in {answer}"))
    }

    async fn client(&self) -> Result<AgentClient> {
        Ok(tote_rpc::connect(self.agent()?.address, &self.name, &self.controller).await?.into_client()?)
    }

    /// Begins an import from these nodes, which let it read.
    pub async fn begin(
        &self,
        id: &str,
        sources: &[&Self],
        reference: &str,
        digest: &str,
    ) -> Result<Streaming<v1::ImportEvent>> {
        let from = sources.iter().map(|&node| From { node, last_resort: false, relay: false });
        self.begin_from(id, &from.collect::<Vec<_>>(), reference, digest).await
    }

    /// The same, with what is said of each.
    pub async fn begin_from(
        &self,
        id: &str,
        sources: &[From<'_>],
        reference: &str,
        digest: &str,
    ) -> Result<Streaming<v1::ImportEvent>> {
        for source in sources {
            let grant = v1::GrantRequest {
                term: Some(term()),
                transfer_id: id.to_owned(),
                node_name: self.name.clone(),
                digest: digest.to_owned(),
                seconds: 3600,
                expected: source.relay,
            };
            source.node.client().await?.grant(grant).await?;
        }
        let of = |source: &From<'_>| {
            let (node_name, address) = (source.node.name.clone(), source.node.address()?.to_string());
            let (last_resort, relay) = (source.last_resort, source.relay);
            anyhow::Ok(v1::Source { node_name, address, last_resort, relay })
        };
        let request = v1::ImportRequest {
            term: Some(term()),
            transfer_id: id.to_owned(),
            reference: reference.to_owned(),
            digest: digest.to_owned(),
            sources: sources.iter().map(of).collect::<Result<_>>()?,
            pulled: None,
            max_bytes: 0,
        };
        Ok(self.client().await?.import(request).await?.into_inner())
    }

    /// Imports an image from these nodes.
    pub async fn import(
        &self,
        id: &str,
        sources: &[&Self],
        reference: &str,
        digest: &str,
    ) -> Result<Imported> {
        let mut client = self.client().await?;
        // Connected before the time is taken, as a controller is.
        client.cancel(v1::CancelRequest { term: Some(term()), transfer_id: id.to_owned() }).await?;
        let begun = Instant::now();
        let mut events = self.begin(id, sources, reference, digest).await?;
        let done = ended(&mut events).await?;
        Ok(Imported { took: begun.elapsed(), done })
    }

    /// As if there had never been an image.
    pub fn empty(&self) -> Result<()> {
        block_in_place(|| {
            let names = self.daemon.ctr(&["images", "ls", "-q"])?;
            let names: Vec<&str> = names.lines().collect();
            if !names.is_empty() {
                self.daemon.ctr(&[&["images", "rm", "--sync"], &names[..]].concat())?;
            }
            self.daemon.ctr(&["leases", "create", "--id", "collect"])?;
            self.daemon.ctr(&["leases", "delete", "--sync", "collect"])?;
            let left = self.daemon.ctr(&["content", "ls", "-q"])?;
            ensure!(left.trim().is_empty(), "blobs are left: {left}");
            let snapshotter = self.daemon.snapshotter().to_string();
            let left = self.daemon.ctr(&["snapshots", "--snapshotter", &snapshotter, "ls"])?;
            ensure!(left.lines().count() <= 1, "snapshots are left: {left}");
            Ok(())
        })
    }
}

fn term() -> v1::Term {
    v1::Term { lease_uid: "lease".to_owned(), lease_transitions: 1 }
}

/// Follows an import to its end.
pub async fn ended(events: &mut Streaming<v1::ImportEvent>) -> Result<v1::Done> {
    loop {
        match events.message().await?.and_then(|event| event.event) {
            Some(Event::Progress(_)) => {}
            Some(Event::Done(done)) => return Ok(done),
            Some(Event::Failed(failed)) => bail!("the import failed: {}", failed.message),
            None => return Err(anyhow!("the import has no end")),
        }
    }
}
