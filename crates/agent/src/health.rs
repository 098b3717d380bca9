//! Health and metrics, on a listener of their own, in the clear.

use std::sync::Arc;

use axum::Router;
use axum::routing::get;
use http::{StatusCode, header};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Serves `/healthz`, `/readyz` (503 with what `not_ready` says) and `/metrics` until `stop`.
pub async fn serve(
    listener: TcpListener,
    registry: Registry,
    not_ready: impl Fn() -> Option<&'static str> + Clone + Send + Sync + 'static,
    stop: CancellationToken,
) {
    let registry = Arc::new(registry);
    let metrics = move || {
        let registry = registry.clone();
        async move {
            let mut text = String::new();
            match prometheus_client::encoding::text::encode(&mut text, &registry) {
                Ok(()) => {
                    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                    Ok(([(header::CONTENT_TYPE, kind)], text))
                }
                Err(error) => Err((StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
            }
        }
    };
    let ready = move || {
        let state = not_ready();
        async move {
            match state {
                None => (StatusCode::OK, "ready\n".to_owned()),
                Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n")),
            }
        }
    };
    let app = Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics));
    tote_rpc::serve_plain(listener, app, stop).await;
}
