//! /metrics, /healthz and /readyz.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;

/// A replica that does not lead after this long stands by.
const STANDBY_AFTER: Duration = Duration::from_secs(5);

/// What the probes ask.
pub struct Health {
    started: Instant,
    leading: AtomicBool,
    synced: AtomicBool,
    /// Why there is no certificate authority, if there is none.
    authority: Mutex<Option<String>>,
    /// What /metrics answers.
    pub metrics: Metrics,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            leading: AtomicBool::new(false),
            synced: AtomicBool::new(false),
            authority: Mutex::new(None),
            metrics: Metrics::default(),
        }
    }
}

impl Health {
    /// Whether this replica leads; not synced yet if it has just begun.
    pub fn set_leading(&self, leading: bool) {
        self.synced.store(false, Ordering::Relaxed);
        self.leading.store(leading, Ordering::Relaxed);
        self.metrics.leading(leading);
    }

    /// Every watch has told its first list.
    pub fn set_synced(&self) {
        self.synced.store(true, Ordering::Relaxed);
    }

    /// Whether the certificate authority is in order; why not.
    pub fn set_authority(&self, problem: Option<String>) {
        *self.authority.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }

    /// Ready is: leading with all lists known and the authority in order, or standing by.
    fn problem(&self) -> Option<String> {
        if !self.leading.load(Ordering::Relaxed) {
            return (self.started.elapsed() <= STANDBY_AFTER).then(|| "looking for a leader".to_owned());
        }
        if let Some(problem) = &*self.authority.lock().unwrap_or_else(PoisonError::into_inner) {
            return Some(format!("certificate authority: {}", problem.split(':').next().unwrap_or_default()));
        }
        let synced = self.synced.load(Ordering::Relaxed);
        (!synced).then(|| "waiting for the first lists of the API server".to_owned())
    }
}

/// Serves until `stop`.
pub async fn serve(listener: TcpListener, health: Arc<Health>, stop: CancellationToken) {
    let app = Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(health);
    tote_rpc::serve_plain(listener, app, stop).await;
}

async fn ready(State(health): State<Arc<Health>>) -> Response {
    match health.problem() {
        None => "ok".into_response(),
        Some(problem) => (StatusCode::SERVICE_UNAVAILABLE, problem).into_response(),
    }
}

async fn metrics(State(health): State<Arc<Health>>) -> Response {
    match health.metrics.text() {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_hinders_is_said_and_no_more_of_it_than_anybody_may_know() {
        let health = Health::default();
        assert!(health.problem().is_some_and(|problem| problem.contains("leader")));
        health.set_leading(true);
        assert!(health.problem().is_some_and(|problem| problem.contains("lists")));
        health.set_synced();
        assert_eq!(health.problem(), None);
        health.set_authority(Some("Secret my-ca: tls.key: what it holds".to_owned()));
        assert_eq!(health.problem().as_deref(), Some("certificate authority: Secret my-ca"));
        health.set_authority(None);
        assert_eq!(health.problem(), None);
    }
}
