//! One session: who this agent is, the whole inventory, then what changes in it.

use std::sync::Arc;

use prost::Message;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tonic::{Status, Streaming};
use tote_rpc::v1::{self, session_response};

use super::{HELLO_DEADLINE, Known};
use crate::containerd::Facts;
use crate::inventory::{Inventory, difference, wire_platform};
use crate::kubelet::Records;

/// The most bytes of images in one message.
const CHUNK: usize = 1 << 20;

type Sender = mpsc::Sender<Result<v1::SessionResponse, Status>>;

/// What a session tells.
pub(super) struct Session {
    pub node_name: String,
    pub epoch: String,
    pub facts: Known<Facts>,
    pub runtime_down: watch::Receiver<bool>,
    pub inventory: Known<Arc<Inventory>>,
    pub records: Option<Arc<Records>>,
}

/// Reads what the controller says after its hello, which is nothing yet, until it goes.
pub(super) async fn drain(requests: &mut Streaming<v1::SessionRequest>) {
    while let Ok(Some(_)) = requests.message().await {}
}

impl Session {
    /// Reports until the controller goes, or until this node is no longer what `welcome` said.
    pub(super) async fn report(mut self, sender: &Sender) -> Result<(), Status> {
        let unknown = |_| Status::unavailable("containerd of this node does not answer yet");
        let stopping = |_| Status::unavailable("the agent is stopping");
        let facts = timeout(HELLO_DEADLINE, self.facts.wait_for(Option::is_some)).await.map_err(unknown)?;
        let facts = facts.map_err(stopping)?.clone();
        let first = timeout(HELLO_DEADLINE, self.inventory.wait_for(Option::is_some));
        let mut current = first.await.map_err(unknown)?.map_err(stopping)?.clone().unwrap_or_default();
        if let Some(facts) = &facts {
            let welcome = self.welcome(facts);
            send(sender, session_response::Message::Welcome(welcome)).await?;
        }
        let mut chunks = chunks(current.values().map(|image| v1::Image::clone(image)));
        let last = chunks.pop().unwrap_or_default();
        for images in chunks {
            snapshot(sender, images, false).await?;
        }
        snapshot(sender, last, true).await?;
        let mut runtime_down = self.runtime_down.clone();
        let mut down = false;
        loop {
            tokio::select! {
                changed = async { runtime_down.wait_for(|now| *now != down).await.map(drop) } => {
                    changed.map_err(stopping)?;
                }
                changed = self.inventory.changed() => changed.map_err(stopping)?,
                changed = self.facts.wait_for(|now| *now != facts) => {
                    changed.map_err(stopping)?;
                    return Err(Status::unavailable("the node's containerd changed; open a new session"));
                }
            }
            let is_down = *runtime_down.borrow();
            if is_down != down {
                down = is_down;
                send(sender, session_response::Message::Runtime(v1::Runtime { down })).await?;
            }
            let new = self.inventory.borrow_and_update().clone().unwrap_or_default();
            let delta = difference(&current, &new);
            let mut upserts = chunks_or_one(delta.upserted);
            let upserted = upserts.pop().unwrap_or_default();
            for upserted in upserts {
                let part = v1::InventoryDelta { upserted, removed: Vec::new() };
                send(sender, session_response::Message::Delta(part)).await?;
            }
            let rest = v1::InventoryDelta { upserted, removed: delta.removed };
            if rest != v1::InventoryDelta::default() {
                send(sender, session_response::Message::Delta(rest)).await?;
            }
            current = new;
        }
    }

    fn welcome(&self, facts: &Facts) -> v1::Welcome {
        let (snapshotter, problem) = match &facts.snapshotter {
            Ok(snapshotter) => (snapshotter.clone(), String::new()),
            Err(problem) => (String::new(), problem.clone()),
        };
        v1::Welcome {
            epoch: self.epoch.clone(),
            node_name: self.node_name.clone(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            containerd_version: facts.version.clone(),
            platform: Some(wire_platform(&facts.platform)),
            snapshotter,
            problem,
            pull_records: self
                .records
                .as_ref()
                .map_or_else(Default::default, |records| records.kept().into()),
        }
    }
}

async fn snapshot(sender: &Sender, images: Vec<v1::Image>, last: bool) -> Result<(), Status> {
    send(sender, session_response::Message::Snapshot(v1::InventorySnapshot { images, last })).await
}

async fn send(sender: &Sender, message: session_response::Message) -> Result<(), Status> {
    let response = v1::SessionResponse { message: Some(message) };
    sender.send(Ok(response)).await.map_err(|_| Status::cancelled("the controller has gone"))
}

fn chunks_or_one(images: Vec<v1::Image>) -> Vec<Vec<v1::Image>> {
    chunks(images.into_iter())
}

/// Images in messages of about [`CHUNK`] bytes.
fn chunks(images: impl Iterator<Item = v1::Image>) -> Vec<Vec<v1::Image>> {
    let mut chunks: Vec<Vec<v1::Image>> = Vec::new();
    let mut room = 0;
    for image in images {
        let size = image.encoded_len();
        match chunks.last_mut() {
            Some(chunk) if size <= room => {
                room -= size;
                chunk.push(image);
            }
            _ => {
                room = CHUNK.saturating_sub(size);
                chunks.push(vec![image]);
            }
        }
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_by_size() {
        let image = |n: usize| v1::Image { names: vec!["x".repeat(n)], ..v1::Image::default() };
        let of = |sizes: &[usize]| -> Vec<usize> {
            chunks(sizes.iter().map(|n| image(*n))).iter().map(Vec::len).collect()
        };
        assert_eq!(of(&[]), [0; 0]);
        assert_eq!(of(&[10, 10, 10]), [3]);
        assert_eq!(of(&[CHUNK / 2, CHUNK / 2, 10]), [1, 2]);
        assert_eq!(of(&[10, 2 * CHUNK, 10]), [1, 1, 1]);
    }
}
