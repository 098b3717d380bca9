//! The proxy in front of docker-registry: accepts, applies mode and rules, forwards, counts.

use super::{AUTHORIZATION, Effect, Mode, Request, Rule, Upstream, upstream};
use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use futures::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{Response, StatusCode};
use hyper_util::rt::TokioIo;
use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc::SyncSender};
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Requests remembered.
const REMEMBERED: usize = 100_000;
/// Time that a change of mode may take.
const SWITCH: Duration = Duration::from_secs(10);

type Body = UnsyncBoxBody<Bytes, io::Error>;
type Order = (Mode, SyncSender<Result<()>>);

/// What the proxy's thread shares with those that drive it.
#[derive(Debug)]
pub(super) struct State {
    mode: watch::Sender<Mode>,
    rules: watch::Sender<Vec<Rule>>,
    seen: Mutex<VecDeque<Arc<Seen>>>,
    orders: Mutex<Option<mpsc::Sender<Order>>>,
}

#[derive(Debug)]
struct Seen {
    method: String,
    path: String,
    status: AtomicU16,
    bytes: AtomicU64,
}

impl Default for State {
    fn default() -> Self {
        Self {
            mode: watch::Sender::new(Mode::Serving),
            rules: watch::Sender::new(Vec::new()),
            seen: Mutex::default(),
            orders: Mutex::default(),
        }
    }
}

/// The state behind a lock is whole after every statement, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    /// Changes the mode; the change is complete on return.
    pub(super) fn switch(&self, mode: Mode) -> Result<()> {
        let orders = lock(&self.orders).clone().context("the registry's thread has ended")?;
        let (done, answer) = std::sync::mpsc::sync_channel(1);
        orders.try_send((mode, done)).map_err(|e| anyhow!("the registry takes no orders: {e}"))?;
        answer
            .recv_timeout(SWITCH)
            .map_err(|_| anyhow!("the registry did not become {mode:?} in {SWITCH:?}"))?
    }

    pub(super) fn set_rules(&self, rules: Vec<Rule>) {
        self.rules.send_replace(rules);
    }

    pub(super) fn requests(&self) -> Vec<Request> {
        let seen = lock(&self.seen);
        seen.iter()
            .map(|s| Request {
                method: s.method.clone(),
                path: s.path.clone(),
                status: s.status.load(Ordering::Relaxed),
                bytes: s.bytes.load(Ordering::Relaxed),
            })
            .collect()
    }

    pub(super) fn forget(&self) {
        lock(&self.seen).clear();
    }

    /// Ends the thread.
    pub(super) fn close(&self) {
        lock(&self.orders).take();
    }

    fn remember(&self, method: &str, path: &str) -> Arc<Seen> {
        let entry = Arc::new(Seen {
            method: method.to_owned(),
            path: path.to_owned(),
            status: AtomicU16::new(0),
            bytes: AtomicU64::new(0),
        });
        let mut seen = lock(&self.seen);
        if seen.len() == REMEMBERED {
            seen.pop_front();
        }
        seen.push_back(entry.clone());
        entry
    }

    /// Returns once the registry serves and no rule makes this path hang; says what else is to be done to it.
    async fn admit(&self, path: &str) -> Option<Effect> {
        let (mut modes, mut rules) = (self.mode.subscribe(), self.rules.subscribe());
        loop {
            serving(&mut modes).await;
            let effect = rules.borrow_and_update().iter().find(|r| path.contains(&r.path)).map(|r| r.effect);
            if effect != Some(Effect::Hang) {
                return effect;
            }
            // The sender lives in `self`: this cannot fail.
            let _ = rules.changed().await;
        }
    }
}

async fn serving(modes: &mut watch::Receiver<Mode>) {
    // The sender outlives every request: it is in the state that the request holds.
    let _ = modes.wait_for(|m| *m == Mode::Serving).await;
}

/// Runs docker-registry and the proxy until [`State::close`]. Reports the address, or why there is none.
pub(super) async fn run(
    listen: SocketAddr,
    storage: &Path,
    state: Arc<State>,
    report: SyncSender<Result<SocketAddr>>,
) {
    let started = async {
        let child = upstream::start(storage).await?;
        let gate = Gate::open(listen)?;
        Ok((child, gate))
    };
    let (mut child, mut gate) = match started.await {
        Ok(started) => started,
        Err(error) => return drop(report.send(Err(error))),
    };
    let (orders, mut inbox) = mpsc::channel(16);
    *lock(&state.orders) = Some(orders);
    // The starter waits for this; if it has given up, `close` follows and the loop below ends.
    let _ = report.send(Ok(gate.address));
    let socket = Upstream::socket(storage);
    loop {
        tokio::select! {
            order = inbox.recv() => match order {
                None => break,
                Some((mode, done)) => {
                    let result = gate.switch(mode, &state).await;
                    let _ = done.send(result);
                }
            },
            stream = gate.accept() => {
                let (state, socket) = (state.clone(), socket.clone());
                gate.tasks.spawn(gate.open.clone().run_until_cancelled_owned(async move {
                    let service = hyper::service::service_fn(|request| answer(&state, &socket, request));
                    // The client hears of an error by the connection's end.
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                }));
            }
        }
    }
    gate.shut().await;
    let _ = child.kill().await;
}

/// The listening socket and the connections that came through it.
struct Gate {
    address: SocketAddr,
    listener: Option<TcpListener>,
    accepting: bool,
    /// Connections of our own that keep the accept queue full.
    fillers: Vec<TcpStream>,
    tasks: TaskTracker,
    open: CancellationToken,
}

impl Gate {
    fn open(listen: SocketAddr) -> Result<Self> {
        let listener = bind(listen, 1024)?;
        Ok(Self {
            address: listener.local_addr()?,
            listener: Some(listener),
            accepting: true,
            fillers: Vec::new(),
            tasks: TaskTracker::new(),
            open: CancellationToken::new(),
        })
    }

    async fn accept(&self) -> TcpStream {
        loop {
            match &self.listener {
                Some(listener) if self.accepting => match listener.accept().await {
                    Ok((stream, _)) => return stream,
                    // Out of file descriptors, for example: back off.
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                },
                _ => std::future::pending().await,
            }
        }
    }

    async fn switch(&mut self, mode: Mode, state: &State) -> Result<()> {
        state.mode.send_replace(mode);
        match mode {
            Mode::Refusing => self.shut().await,
            Mode::Serving | Mode::Hanging => {
                if !self.accepting || self.listener.is_none() {
                    self.fillers.clear();
                    self.listener = None;
                    self.listener = Some(bind(self.address, 1024)?);
                    self.accepting = true;
                }
            }
            Mode::Dropping => {
                self.listener = None;
                self.accepting = false;
                // Linux drops the SYN of whoever finds the accept queue full.
                self.listener = Some(bind(self.address, 1)?);
                self.fill().await;
            }
        }
        Ok(())
    }

    /// Connects to ourselves until the accept queue is full.
    async fn fill(&mut self) {
        let mut address = self.address;
        if address.ip().is_unspecified() {
            address.set_ip(IpAddr::V4(Ipv4Addr::LOCALHOST));
        }
        while self.fillers.len() < 16 {
            match tokio::time::timeout(Duration::from_millis(200), TcpStream::connect(address)).await {
                Ok(Ok(stream)) => self.fillers.push(stream),
                Ok(Err(_)) | Err(_) => break,
            }
        }
    }

    /// Closes the port and every connection.
    async fn shut(&mut self) {
        self.listener = None;
        self.fillers.clear();
        self.open.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.tasks.reopen();
        self.open = CancellationToken::new();
    }
}

fn bind(address: SocketAddr, backlog: u32) -> Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address).with_context(|| format!("the registry's address {address} cannot be had"))?;
    Ok(socket.listen(backlog)?)
}

async fn answer(state: &State, socket: &Path, request: hyper::Request<Incoming>) -> Result<Response<Body>> {
    let path = request.uri().to_string();
    let seen = state.remember(request.method().as_str(), &path);
    let effect = state.admit(&path).await;
    let host = request.headers().get("Host").and_then(|host| host.to_str().ok()).unwrap_or_default();
    let authorization = request.headers().get(hyper::header::AUTHORIZATION);
    let is_known = authorization.is_some_and(|value| value == AUTHORIZATION);
    let refused = match effect {
        Some(Effect::Status(status)) => Some((status, None)),
        Some(Effect::AskPassword) => Some((401, Some("Basic realm=\"test\"".to_owned()))),
        Some(Effect::Login) if !is_known => Some((401, Some("Basic realm=\"test\"".to_owned()))),
        Some(Effect::AskToken) => {
            Some((401, Some(format!("Bearer realm=\"http://{host}/token\",service=\"test\""))))
        }
        _ => None,
    };
    if let Some((status, challenge)) = refused {
        seen.status.store(status, Ordering::Relaxed);
        return refusal(status, challenge.as_deref());
    }
    let response = upstream::send(socket, request).await?;
    seen.status.store(response.status().as_u16(), Ordering::Relaxed);
    let (parts, incoming) = response.into_parts();
    let flow = Flow { incoming, rest: Bytes::new(), seen, modes: state.mode.subscribe(), effect };
    Ok(Response::from_parts(parts, StreamBody::new(stream::try_unfold(flow, Flow::next)).boxed_unsync()))
}

fn refusal(status: u16, challenge: Option<&str>) -> Result<Response<Body>> {
    let status = StatusCode::from_u16(status).with_context(|| format!("{status} is no HTTP status"))?;
    let reason = status.canonical_reason().unwrap_or("injected").to_uppercase().replace(' ', "_");
    let document = serde_json::json!({"errors": [{"code": reason, "message": "injected by the test"}]});
    let mut response = Response::builder().status(status).header("Content-Type", "application/json");
    if let Some(challenge) = challenge {
        response = response.header("WWW-Authenticate", challenge);
    }
    Ok(response.body(Full::new(Bytes::from(document.to_string())).map_err(|e| match e {}).boxed_unsync())?)
}

/// A body on its way to the client.
struct Flow {
    incoming: Incoming,
    rest: Bytes,
    seen: Arc<Seen>,
    modes: watch::Receiver<Mode>,
    effect: Option<Effect>,
}

impl Flow {
    async fn next(mut self) -> io::Result<Option<(Frame<Bytes>, Self)>> {
        while self.rest.is_empty() {
            match self.incoming.frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(io::Error::other(error)),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.rest = data,
                    Err(trailers) => return Ok(Some((trailers, self))),
                },
            }
        }
        serving(&mut self.modes).await;
        let mut length = self.rest.len();
        match self.effect {
            Some(Effect::Throttle(rate)) => {
                // A tenth of a second's worth at a time.
                let rate = rate.max(1);
                length = length.min(usize::try_from(rate.div_ceil(10)).unwrap_or(usize::MAX));
                let micros = (length as u64).saturating_mul(1_000_000) / rate;
                tokio::time::sleep(Duration::from_micros(micros)).await;
            }
            Some(Effect::Cut(after)) => {
                let left = after.saturating_sub(self.seen.bytes.load(Ordering::Relaxed));
                if left == 0 {
                    return Err(io::Error::other("cut by the test"));
                }
                length = length.min(usize::try_from(left).unwrap_or(usize::MAX));
            }
            _ => {}
        }
        let mut data = self.rest.split_to(length);
        if self.effect == Some(Effect::Corrupt) {
            data = data.iter().map(|byte| !byte).collect();
        }
        self.seen.bytes.fetch_add(length as u64, Ordering::Relaxed);
        Ok(Some((Frame::data(data), self)))
    }
}
