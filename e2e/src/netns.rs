//! Doing things in the network namespace of another process, such as a pod's. A socket belongs to the namespace that it
//! was made in, whoever uses it later. Must not know what is done there.

use std::fs::File;
use std::future::Future;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;

use anyhow::{Context as _, Result};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// Runs a task in the namespace of process `pid`, on a thread and a runtime of its own: whatever it dials and whatever
/// it spawns is inside. It begins when the future is first polled; both end when the future is dropped.
pub async fn run_in<T, F, R>(pid: u32, task: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> R + Send + 'static,
    R: Future<Output = Result<T>>,
{
    let (mut sender, receiver) = oneshot::channel();
    std::thread::Builder::new().name(format!("inside-{pid}")).spawn(move || {
        if let Some(outcome) = inside(pid, task, &mut sender).transpose() {
            let _ = sender.send(outcome);
        }
    })?;
    receiver.await.context("what ran in another network namespace panicked")?
}

/// None if nobody waits any more.
fn inside<T, F, R>(pid: u32, task: F, sender: &mut oneshot::Sender<Result<T>>) -> Result<Option<T>>
where
    F: FnOnce() -> R,
    R: Future<Output = Result<T>>,
{
    let path = format!("/proc/{pid}/ns/net");
    let link = File::open(&path).with_context(|| format!("opening {path}: does the process run?"))?;
    move_into_link_name_space(link.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("entering {path}, which takes root's rights"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        tokio::select! {
            outcome = task() => outcome.map(Some),
            () = sender.closed() => Ok(None),
        }
    })
}

/// A listener in the namespace of process `pid`, for use from outside.
pub async fn listen_in(pid: u32, address: SocketAddr) -> Result<TcpListener> {
    let bound =
        run_in(pid, move || std::future::ready(std::net::TcpListener::bind(address).map_err(Into::into)));
    let listener = bound.await.with_context(|| format!("listening on {address} inside"))?;
    listener.set_nonblocking(true)?;
    Ok(TcpListener::from_std(listener)?)
}
