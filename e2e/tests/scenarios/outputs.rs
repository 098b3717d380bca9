//! What leaves the cluster: webhook notifications; and what is asked outside it: registries, where nodes do not tell.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use bytes::Bytes;
use serde_json::{Value, json};
use tote_api::names;
use tote_e2e::registry::{Control as _, Effect, Rule};
use tote_e2e::tenant::Tenant;

use crate::play::Play;
use crate::stage::{SOON, Scenario, receiver};

/// The header that proves who sends, and its value.
pub const SECRET: (&str, &str) = ("X-Tote-Secret", "only between us");

pub fn all() -> Vec<Scenario> {
    vec![
        Scenario::new("webhook_is_told", "n1", "n2", webhook_is_told),
        Scenario::new("registry_says_what_a_tag_means", "n1", "n2", registry_says).with("n3"),
        Scenario::new("registry_knows_what_no_node_has", "n1", "n3", registry_knows),
    ]
}

/// Takes notifications; keeps those that bear the secret.
#[derive(Clone)]
pub struct Receiver {
    /// Where it listens.
    pub address: SocketAddr,
    told: Arc<Mutex<Vec<Value>>>,
}

impl Receiver {
    /// Listens until the process ends. To be called within a runtime.
    pub fn start(listener: tokio::net::TcpListener) -> Result<Self> {
        let receiver = Self { address: listener.local_addr()?, told: Arc::default() };
        let app = Router::new().route("/hook", post(take)).with_state(receiver.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        Ok(receiver)
    }

    fn of(&self, namespace: &str) -> Vec<Value> {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.iter().filter(|one| one["namespace"] == namespace).cloned().collect()
    }
}

async fn take(State(receiver): State<Receiver>, headers: HeaderMap, body: Bytes) -> StatusCode {
    if headers.get(SECRET.0).is_none_or(|value| value != SECRET.1) {
        return StatusCode::UNAUTHORIZED;
    }
    let Ok(one) = serde_json::from_slice(&body) else { return StatusCode::BAD_REQUEST };
    receiver.told.lock().unwrap_or_else(PoisonError::into_inner).push(one);
    StatusCode::NO_CONTENT
}

async fn told(tenant: &Tenant, type_: &str) -> Result<Value> {
    let receiver = receiver();
    tenant
        .until(&format!("a notification {type_}"), SOON, || async {
            Ok(receiver.of(tenant.namespace()).into_iter().find(|one| one["type"] == type_))
        })
        .await
}

async fn webhook_is_told(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    play.salvage(&image, false).await?;
    let detected = told(&play.tenant, "detected").await?;
    ensure!(detected["pod_name"] == "waiting" && detected["target_node"] == "n2", "{detected}");
    ensure!(detected["error"].as_str().is_some_and(|error| error.starts_with("Refused: ")), "{detected}");
    let salvaged = told(&play.tenant, "salvaged").await?;
    for (field, value) in
        [("pod_name", "waiting"), ("source_node", "n1"), ("target_node", "n2"), ("error", "")]
    {
        ensure!(salvaged[field] == value, "{field} is not {value:?} in {salvaged}");
    }
    ensure!(salvaged["digest"] == image.digest(), "{salvaged}");
    let at = salvaged["timestamp"].as_str().context("no timestamp")?;
    at.parse::<k8s_openapi::jiff::Timestamp>().with_context(|| format!("{at:?} is no time"))?;
    let hopeless = json!({"image": "registry.test/nowhere:1", "nodeName": "n2", "pendingDeadlineSeconds": 1});
    play.tenant.declare("hopeless", hopeless).await?;
    let failed = told(&play.tenant, "salvage_failed").await?;
    ensure!(failed["pod_name"] == "" && failed["image_ref"] == "registry.test/nowhere:1", "{failed}");
    ensure!(
        failed["error"].as_str().is_some_and(|error| error.contains("pendingDeadlineSeconds")),
        "{failed}"
    );
    let all = receiver().of(play.tenant.namespace());
    ensure!(all.len() == 3, "more than was to be told: {all:?}");
    Ok(())
}

/// Manifests are served, blobs are not: pulls fail, while the registry says what its tags mean.
fn half_down(play: &Play) -> Result<()> {
    let rule = Rule { path: "/blobs/".to_owned(), effect: Effect::Status(500) };
    play.registry.rules(&[rule])
}

/// Two nodes mean different images by a tag; the registry says which of them it is.
async fn registry_says(play: Play) -> Result<()> {
    let (old, new) = (play.image_seeded("tiny", "old")?, play.image_seeded("tiny", "new")?);
    let (tagged, _) = play.push(&old).await?;
    play.pull_on("old", "n1", &tagged).await?;
    play.push(&new).await?;
    play.pull_on("new", "n3", &tagged).await?;
    half_down(&play)?;
    play.start_on_target("waiting", &tagged).await?;
    let note = play.tenant.event("waiting", names::event::IMAGE_SALVAGEABLE, SOON).await?;
    ensure!(note.contains("registry's own answer") && note.contains(new.digest()), "{note}");
    let job = play.tenant.imported(SOON).await?;
    ensure!(job.spec.digest.as_deref() == Some(new.digest()), "{:?}", job.spec);
    play.tenant.running("waiting", SOON).await.map(drop)
}

async fn registry_knows(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    let (tagged, _) = play.push(&image).await?;
    half_down(&play)?;
    play.start_on_target("waiting", &tagged).await?;
    let note = play.tenant.event("waiting", names::event::IMAGE_RESOLVED_UNCACHED, SOON).await?;
    ensure!(note.contains(image.digest()), "{note}");
    Ok(())
}
