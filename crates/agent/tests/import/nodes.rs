//! Whole agents, each on an in-memory containerd, and the controller's connections to them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use tote_agent::agent::{Settings, run};
use tote_agent::bandwidth::Rate;
use tote_agent::containerd::Fake;
use tote_agent::import::{Lifetimes, Patience};
use tote_agent::testing::Blobs;
use tote_rpc::AgentClient;
use tote_rpc::v1::{self, import_event::Event};

use crate::NAME;
use crate::peers::PKI;

/// How long an image may stand still at a relay here.
pub const GROWTH: Duration = Duration::from_secs(3);

/// An agent, and the controller's connection to it.
pub struct Node {
    pub name: String,
    pub fake: Fake,
    pub stop: DropGuard,
    address: SocketAddr,
    client: AgentClient,
}

impl Node {
    pub async fn start() -> Self {
        Self::giving(None).await
    }

    /// One that gives no more bytes a second than this.
    pub async fn giving(max_upload: Option<Rate>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, fake, stop) =
            (listener.local_addr().unwrap(), Fake::default(), CancellationToken::new());
        let name = format!("node-{}", address.port());
        let settings = Settings {
            node_name: name.clone(),
            max_bandwidth: None,
            max_upload,
            patience: Patience { growth: GROWTH, ..Patience::default() },
            lifetimes: Lifetimes::default(),
            identity: PKI.node(&name, "127.0.0.1"),
            mounts: None,
            records: None,
        };
        let agent = run(Arc::new(fake.clone()), settings, listener, None, stop.clone());
        tokio::spawn(async move { agent.await.unwrap() });
        let client = tote_rpc::connect(address, &name, &PKI.controller()).await.unwrap();
        Self { name, fake, address, client: client.into_client().unwrap(), stop: stop.drop_guard() }
    }

    /// As a source.
    pub fn source(&self) -> v1::Source {
        let (node_name, address) = (self.name.clone(), self.address.to_string());
        v1::Source { node_name, address, ..v1::Source::default() }
    }

    /// As a source that is getting the image itself.
    pub fn relay(&self) -> v1::Source {
        v1::Source { relay: true, ..self.source() }
    }

    /// Lets another read the image here, whose transfer has the other's name.
    pub async fn grant(&self, reader: &Self, image: &Blobs, expected: bool) -> Result<i64, tonic::Status> {
        let request = v1::GrantRequest {
            term: Some(term()),
            transfer_id: format!("for-{}", reader.name),
            node_name: reader.name.clone(),
            digest: image.target.digest.to_string(),
            seconds: 600,
            expected,
        };
        Ok(self.client.clone().grant(request).await?.into_inner().blobs)
    }

    /// Begins an import; it ends by the time that the handle does.
    pub async fn import(&self, image: &Blobs, sources: Vec<v1::Source>) -> JoinHandle<v1::Done> {
        let request = v1::ImportRequest {
            term: Some(term()),
            transfer_id: "t".to_owned(),
            reference: NAME.to_owned(),
            digest: image.target.digest.to_string(),
            sources,
            ..v1::ImportRequest::default()
        };
        let mut events = self.client.clone().import(request).await.unwrap().into_inner();
        tokio::spawn(async move {
            loop {
                match events.message().await.unwrap().unwrap().event.unwrap() {
                    Event::Progress(_) => {}
                    Event::Done(done) => return done,
                    Event::Failed(failed) => panic!("{}", failed.message),
                }
            }
        })
    }
}

fn term() -> v1::Term {
    v1::Term { lease_uid: "lease".into(), lease_transitions: 1 }
}

/// Waits for the end, 30 s at most.
pub async fn ended(import: JoinHandle<v1::Done>) -> v1::Done {
    tokio::time::timeout(Duration::from_secs(30), import).await.expect("an end").unwrap()
}
