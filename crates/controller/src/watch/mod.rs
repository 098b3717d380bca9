//! Watches: what the API server has, as events. Own slim types hold only the fields that are used; nothing is
//! stored here.

mod agents;
pub mod kubelet;
mod nodes;
mod owners;
mod pods;

use std::collections::{BTreeMap, HashSet};
use std::fmt::Debug;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Namespace;
use kube::api::PartialObjectMeta;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tote_api::SalvageJob;

use crate::decide::{Event, Kind};
use crate::detect::consent;

pub use agents::agents;
pub use nodes::nodes;
pub use owners::owners;
pub use pods::pods;
pub(crate) use pods::slim_metadata;

/// What an object means: the key it is listed under, the events, and whether there is anything to keep.
pub(crate) struct Meaning {
    key: Arc<str>,
    events: Vec<Event>,
    keep: bool,
}

impl Meaning {
    /// An object that is kept, and means one event.
    pub(crate) fn new(key: Arc<str>, event: Event) -> Self {
        Self { key, events: vec![event], keep: true }
    }
}

/// Watches what namespaces say.
pub async fn namespaces(client: Client, events: mpsc::Sender<Event>) {
    let api: Api<PartialObjectMeta<Namespace>> = Api::all(client);
    follow(api, watcher::Config::default(), None, Kind::Namespaces, events, |namespace, gone| {
        let metadata = &namespace.metadata;
        let key: Arc<str> = metadata.name.as_deref()?.into();
        let none = BTreeMap::new();
        let annotations = metadata.annotations.as_ref().unwrap_or(&none);
        let says = (!gone).then(|| consent(&key, annotations, metadata.deletion_timestamp.is_some()));
        let event = Event::Namespace { name: key.clone(), consent: says };
        Some(Meaning::new(key, event))
    })
    .await;
}

/// Watches jobs.
pub async fn jobs(client: Client, events: mpsc::Sender<Event>) {
    let api: Api<SalvageJob> = Api::all(client);
    follow(api, watcher::Config::default(), None, Kind::Jobs, events, |job, gone| {
        let key: Arc<str> = job.metadata.uid.as_deref()?.into();
        let event =
            if gone { Event::JobGone { uid: key.clone() } } else { Event::Job(Box::new(job.clone())) };
        Some(Meaning::new(key, event))
    })
    .await;
}

/// Follows a kind. If its first list does not come within `patience`, the state is told to do without, and has what
/// comes later.
pub(crate) async fn follow<K, F>(
    api: Api<K>,
    config: watcher::Config,
    patience: Option<Duration>,
    kind: Kind,
    events: mpsc::Sender<Event>,
    meaning: F,
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    F: Fn(&K, bool) -> Option<Meaning>,
{
    let mut stream = pin!(watcher(api, config).default_backoff());
    let mut seen = HashSet::new();
    let mut until = patience.map(|patience| tokio::time::Instant::now() + patience);
    let mut told = false;
    loop {
        let out_of_patience = async {
            match until {
                Some(until) => tokio::time::sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        let item = tokio::select! {
            item = stream.next() => item,
            () = out_of_patience => {
                until = None;
                tracing::warn!(?kind, "cannot be listed yet; going on without");
                if events.send(Event::Unlisted(kind)).await.is_err() {
                    return;
                }
                continue;
            }
        };
        let Some(item) = item else { return };
        let (object, gone, listing) = match item {
            Ok(watcher::Event::Init) => {
                seen.clear();
                continue;
            }
            Ok(watcher::Event::InitDone) => {
                (until, told) = (None, false);
                let listed = Event::Listed(kind, std::mem::take(&mut seen));
                if events.send(listed).await.is_err() {
                    return;
                }
                continue;
            }
            Ok(watcher::Event::InitApply(object)) => (object, false, true),
            Ok(watcher::Event::Apply(object)) => (object, false, false),
            Ok(watcher::Event::Delete(object)) => (object, true, false),
            Err(error) if patience.is_some() && told => {
                tracing::debug!(?kind, %error, "watch interrupted");
                continue;
            }
            Err(error) => {
                told = true;
                tracing::warn!(?kind, %error, "watch interrupted; it is taken up again");
                continue;
            }
        };
        let Some(Meaning { key, events: meant, keep }) = meaning(&object, gone) else { continue };
        if listing {
            if !keep {
                continue;
            }
            seen.insert(key);
        }
        for event in meant {
            if events.send(event).await.is_err() {
                return;
            }
        }
    }
}
