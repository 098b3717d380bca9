//! A real registry (docker-registry, as Debian packages it) behind a proxy that makes faults: refused connections, error
//! answers, black holes, slow and cut bodies, and a count of what was asked for.
//!
//! [`Registry`] lives in the process that started it; [`Remote`] is one in a process of its own that outlives its
//! starter. Both are driven through [`Control`]. Pushing and deleting go to the registry behind the proxy, so they
//! work during a fault and are not counted.
//!
//! Knows nothing of clusters and nodes.

mod proxy;
mod remote;
mod upstream;

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

pub use remote::{Remote, serve};
pub use upstream::Upstream;

/// How the registry behaves towards everybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// It answers.
    Serving,
    /// Stopped: connections are refused, those that were open are closed.
    Refusing,
    /// A black hole behind an open port: connections are accepted, nothing is ever answered, bodies stall.
    Hanging,
    /// A black hole: new connections get no answer to their SYN, open ones stall.
    Dropping,
}

/// What happens to requests whose path holds [`Rule::path`]. The first rule that matches is taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Part of a path (`/blobs/`, a digest, a repository); empty for every request.
    pub path: String,
    /// What happens.
    pub effect: Effect,
}

/// What a [`Rule`] does to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Effect {
    /// Answers with this HTTP status and an error document.
    Status(u16),
    /// Answers nothing for as long as the rule stands.
    Hang,
    /// Sends the body at so many bytes a second.
    Throttle(u64),
    /// Closes the connection after so many bytes of the body.
    Cut(u64),
    /// Sends a body of the right length whose every bit is wrong.
    Corrupt,
    /// Answers 401 and asks for a password (`WWW-Authenticate: Basic`).
    AskPassword,
    /// Answers 401 and asks for a token, to be had at this registry's `/token` (`WWW-Authenticate: Bearer`).
    AskToken,
    /// Asks for a login ([`LOGIN`], by basic authentication) and answers whoever has it.
    Login,
}

/// User and password that [`Effect::Login`] wants.
pub const LOGIN: (&str, &str) = ("puller", "sesame");

/// How a request says so.
const AUTHORIZATION: &str = "Basic cHVsbGVyOnNlc2FtZQ==";

/// A request that reached the proxy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// HTTP method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// Status answered; 0 while there is no answer.
    pub status: u16,
    /// Bytes of body sent so far.
    pub bytes: u64,
}

/// One order to a registry.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// Behave like this from now on.
    Mode(Mode),
    /// Replace all rules.
    Rules(Vec<Rule>),
    /// List the requests since the last `Forget`, oldest first (at most the last 100,000).
    Requests,
    /// Forget the requests so far.
    Forget,
    /// End (a [`Remote`] alone obeys it).
    Shutdown,
}

/// Ways to drive a registry, near or far.
pub trait Control {
    /// Carries out one command. Returns the requests for [`Command::Requests`], else nothing.
    ///
    /// # Errors
    /// If the registry is gone or cannot take its port again.
    fn command(&self, command: Command) -> Result<Vec<Request>>;

    /// The registry behind the proxy, to push to and delete from.
    fn upstream(&self) -> &Upstream;

    /// Refuses connections from now on, and closes open ones.
    ///
    /// # Errors
    /// As [`Control::command`].
    fn stop(&self) -> Result<()> {
        self.mode(Mode::Refusing)
    }

    /// Ends every fault: it serves, with no rules.
    ///
    /// # Errors
    /// As [`Control::command`].
    fn heal(&self) -> Result<()> {
        self.rules(&[])?;
        self.mode(Mode::Serving)
    }

    /// Behaves like this from the return of the call on.
    ///
    /// # Errors
    /// As [`Control::command`].
    fn mode(&self, mode: Mode) -> Result<()> {
        self.command(Command::Mode(mode)).map(drop)
    }

    /// Answers every request with this HTTP status.
    ///
    /// # Errors
    /// As [`Control::command`].
    fn error(&self, status: u16) -> Result<()> {
        self.rules(&[Rule { path: String::new(), effect: Effect::Status(status) }])
    }

    /// Asks everybody for a login.
    ///
    /// # Errors
    /// As [`Control::command`].
    fn demand_login(&self) -> Result<()> {
        self.rules(&[Rule { path: String::new(), effect: Effect::Login }])
    }

    /// Replaces all rules.
    ///
    /// # Errors
    /// As [`Control::command`].
    fn rules(&self, rules: &[Rule]) -> Result<()> {
        self.command(Command::Rules(rules.to_vec())).map(drop)
    }

    /// Requests since the last [`Control::forget`], oldest first.
    ///
    /// # Errors
    /// As [`Control::command`].
    fn requests(&self) -> Result<Vec<Request>> {
        self.command(Command::Requests)
    }

    /// Forgets the requests so far.
    ///
    /// # Errors
    /// As [`Control::command`].
    fn forget(&self) -> Result<()> {
        self.command(Command::Forget).map(drop)
    }
}

/// Where a registry listens and keeps its data.
#[derive(Clone, Debug)]
pub struct Options {
    /// Address of the proxy; port 0 for any that is free.
    pub listen: SocketAddr,
    /// `host:port` that references carry, if it is not `listen` itself.
    pub name: Option<String>,
    /// Directory of its data, made if absent; temporary, and removed at the end, if not given. Keep it short: it
    /// holds Unix sockets.
    pub storage: Option<PathBuf>,
}

/// A registry in this process. It ends when dropped.
#[derive(Debug)]
pub struct Registry {
    state: Arc<proxy::State>,
    upstream: Upstream,
    address: SocketAddr,
    storage: PathBuf,
    thread: Option<JoinHandle<()>>,
    temporary: Option<tempfile::TempDir>,
}

impl Registry {
    /// Starts docker-registry and the proxy, on a thread of their own, and returns once they serve.
    ///
    /// # Errors
    /// If docker-registry is not installed or does not start, or the address cannot be bound.
    pub fn start(options: &Options) -> Result<Self> {
        let temporary = match &options.storage {
            Some(_) => None,
            None => Some(tempfile::Builder::new().prefix("tote-registry-").tempdir()?),
        };
        let storage = match (&options.storage, &temporary) {
            (Some(path), _) => path.clone(),
            (None, Some(dir)) => dir.path().to_owned(),
            (None, None) => unreachable!("one of the two is there"),
        };
        let (report, started) = std::sync::mpsc::sync_channel(1);
        let (listen, state) = (options.listen, Arc::new(proxy::State::default()));
        let (thread_state, thread_storage) = (state.clone(), storage.clone());
        let thread = std::thread::Builder::new().name("registry".to_owned()).spawn(move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return drop(report.send(Err(error.into()))),
            };
            runtime.block_on(proxy::run(listen, &thread_storage, thread_state, report));
        })?;
        let address = started
            .recv_timeout(Duration::from_secs(40))
            .map_err(|_| anyhow!("the registry in {} did not start in 40 s", storage.display()))??;
        let name = options.name.clone().unwrap_or_else(|| address.to_string());
        let upstream = Upstream::new(&storage, name);
        Ok(Self { state, upstream, address, storage, thread: Some(thread), temporary })
    }

    /// Address that the proxy listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Directory of its data.
    pub fn storage(&self) -> &Path {
        &self.storage
    }
}

impl Control for Registry {
    fn command(&self, command: Command) -> Result<Vec<Request>> {
        match command {
            Command::Mode(mode) => self.state.switch(mode)?,
            Command::Rules(rules) => self.state.set_rules(rules),
            Command::Requests => return Ok(self.state.requests()),
            Command::Forget => self.state.forget(),
            Command::Shutdown => anyhow::bail!("a registry of this process ends when it is dropped"),
        }
        Ok(Vec::new())
    }

    fn upstream(&self) -> &Upstream {
        &self.upstream
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.state.close();
        if let Some(thread) = self.thread.take() {
            // A panic of that thread has been printed; there is nothing left to do about it here.
            let _ = thread.join();
        }
        drop(self.temporary.take());
    }
}

/// The hosts.toml that makes containerd pull from a plain-HTTP registry at `address`, for
/// `/etc/containerd/certs.d/<name as in references>/hosts.toml`.
pub fn hosts_toml(address: SocketAddr) -> String {
    format!(
        "server = \"http://{address}\"\n\n[host.\"http://{address}\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
    )
}

/// File in a registry's storage that says who and where it is.
fn identity_file(storage: &Path) -> PathBuf {
    storage.join("registry.json")
}

/// What [`identity_file`] holds.
#[derive(Debug, Serialize, Deserialize)]
struct Identity {
    name: String,
    address: SocketAddr,
    pid: u32,
}

impl Identity {
    fn read(storage: &Path) -> Result<Self> {
        let path = identity_file(storage);
        let bytes = std::fs::read(&path)
            .with_context(|| format!("no registry was started in {}", storage.display()))?;
        serde_json::from_slice(&bytes).with_context(|| format!("reading {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_control_protocol_is_readable() {
        let rule = Rule { path: "/blobs/".to_owned(), effect: Effect::Status(404) };
        let text = serde_json::to_string(&Command::Rules(vec![rule])).unwrap();
        assert_eq!(text, r#"{"rules":[{"path":"/blobs/","effect":{"status":404}}]}"#);
        assert_eq!(serde_json::to_string(&Command::Mode(Mode::Dropping)).unwrap(), r#"{"mode":"dropping"}"#);
    }
}
