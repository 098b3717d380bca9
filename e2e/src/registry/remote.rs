//! A registry in a process of its own: the server of its control socket, and the client.
//!
//! The protocol is one JSON document a line over a Unix socket: a [`Command`] up, a reply down.

use super::{Command, Control, Identity, Options, Registry, Request, Upstream, identity_file};
use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// Time that a command, and the end of the process, may take.
const DEADLINE: Duration = Duration::from_secs(15);
/// Time that a started process has to answer.
const START: Duration = Duration::from_secs(40);

#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    Done(Vec<Request>),
    Failed(String),
}

fn control_socket(storage: &Path) -> PathBuf {
    storage.join("control.sock")
}

/// Runs a registry in this process until it is told to shut down: the body of the `registry serve` program.
///
/// # Errors
/// If there is one in that storage already, or it cannot start.
pub fn serve(options: &Options) -> Result<()> {
    let storage =
        options.storage.clone().context("a registry of its own process needs a storage directory")?;
    let socket = control_socket(&storage);
    ensure!(UnixStream::connect(&socket).is_err(), "a registry runs in {} already", storage.display());
    let registry = Registry::start(options)?;
    if socket.exists() {
        std::fs::remove_file(&socket)?;
    }
    let identity = Identity {
        name: registry.upstream().name().to_owned(),
        address: registry.address(),
        pid: std::process::id(),
    };
    std::fs::write(identity_file(&storage), serde_json::to_vec(&identity)?)?;
    let listener = UnixListener::bind(&socket)?;
    loop {
        let Ok((stream, _)) = listener.accept() else { continue };
        // A client that hangs up in the middle is its own loss.
        if obey(&registry, &stream).unwrap_or(false) {
            break;
        }
    }
    drop(registry);
    std::fs::remove_file(identity_file(&storage))?;
    std::fs::remove_file(&socket)?;
    Ok(())
}

/// Carries out one command of a connection. True for a shutdown.
fn obey(registry: &Registry, stream: &UnixStream) -> Result<bool> {
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let command = serde_json::from_str::<Command>(&line);
    let (reply, end) = match command {
        Err(error) => (Reply::Failed(format!("not a command: {error}")), false),
        Ok(Command::Shutdown) => (Reply::Done(Vec::new()), true),
        Ok(command) => match registry.command(command) {
            Ok(requests) => (Reply::Done(requests), false),
            Err(error) => (Reply::Failed(format!("{error:#}")), false),
        },
    };
    let mut line = serde_json::to_vec(&reply)?;
    line.push(b'\n');
    (&mut &*stream).write_all(&line)?;
    Ok(end)
}

/// A registry in another process, known by its storage directory. Dropping this leaves it running.
#[derive(Clone, Debug)]
pub struct Remote {
    storage: PathBuf,
    upstream: Upstream,
    address: SocketAddr,
    pid: u32,
}

impl Remote {
    /// Starts `program serve` (the `registry` program of this package) in a session of its own, and returns once it
    /// serves. What it says goes to `serve.log` in the storage directory.
    ///
    /// # Errors
    /// If it does not start; the message has what it said.
    pub fn spawn(program: &Path, options: &Options) -> Result<Self> {
        let storage =
            options.storage.clone().context("a registry of its own process needs a storage directory")?;
        std::fs::create_dir_all(&storage).with_context(|| format!("making {}", storage.display()))?;
        let log = storage.join("serve.log");
        let output = std::fs::File::create(&log)?;
        let mut command = std::process::Command::new("setsid");
        command.arg(program).arg("serve").arg("--listen").arg(options.listen.to_string());
        if let Some(name) = &options.name {
            command.arg("--name").arg(name);
        }
        let mut child: Child = command
            .arg("--storage")
            .arg(&storage)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let deadline = Instant::now() + START;
        loop {
            let remote = Self::attach(&storage).ok().filter(|r| r.pid == child.id());
            if let Some(remote) = remote.filter(|r| r.requests().is_ok()) {
                // Reaps it when it ends, should this process still be there.
                std::thread::spawn(move || child.wait());
                return Ok(remote);
            }
            let said = || std::fs::read_to_string(&log).unwrap_or_default();
            if let Some(status) = child.try_wait()? {
                return Err(anyhow!("the registry in {} ended with {status}: {}", storage.display(), said()));
            }
            if Instant::now() > deadline {
                child.kill()?;
                return Err(anyhow!(
                    "the registry in {} is not up after {START:?}: {}",
                    storage.display(),
                    said()
                ));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The registry that runs in this storage directory.
    ///
    /// # Errors
    /// If none was started there, or it was killed.
    pub fn attach(storage: &Path) -> Result<Self> {
        let identity = Identity::read(storage)?;
        UnixStream::connect(control_socket(storage)).with_context(|| {
            format!("the registry in {} (process {}) is gone", storage.display(), identity.pid)
        })?;
        Ok(Self {
            storage: storage.to_owned(),
            upstream: Upstream::new(storage, identity.name),
            address: identity.address,
            pid: identity.pid,
        })
    }

    /// Address that the proxy listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Process ID. Killing it ends docker-registry too.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Ends the process and waits for it. Its storage stays.
    ///
    /// # Errors
    /// If it is gone already or does not end in 15 s.
    pub fn shutdown(&self) -> Result<()> {
        self.command(Command::Shutdown)?;
        let deadline = Instant::now() + DEADLINE;
        while control_socket(&self.storage).exists() {
            ensure!(
                Instant::now() < deadline,
                "the registry (process {}) has not ended in {DEADLINE:?}",
                self.pid
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Control for Remote {
    fn command(&self, command: Command) -> Result<Vec<Request>> {
        let gone = || format!("the registry in {} (process {}) is gone", self.storage.display(), self.pid);
        let mut stream = UnixStream::connect(control_socket(&self.storage)).with_context(gone)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        let mut line = serde_json::to_vec(&command)?;
        line.push(b'\n');
        stream.write_all(&line)?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).with_context(gone)?;
        match serde_json::from_str(&answer).with_context(gone)? {
            Reply::Done(requests) => Ok(requests),
            Reply::Failed(why) => Err(anyhow!("the registry refused {command:?}: {why}")),
        }
    }

    fn upstream(&self) -> &Upstream {
        &self.upstream
    }
}
