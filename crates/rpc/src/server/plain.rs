//! The listeners without TLS: health and metrics, for kubelet and Prometheus, who have no certificates. Bounded like the
//! others: whoever opens thousands of connections and says nothing keeps the probes out no more than a moment.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1::Builder;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::admission::Admission;
use super::{HEAD, accepted};

/// How long a request head may take, and a request with its answer. Each connection is good for one.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
const REQUEST: Duration = Duration::from_secs(15);

/// Serves `app` by HTTP/1.1 until `stop`.
pub async fn serve_plain(listener: TcpListener, app: Router, stop: CancellationToken) {
    let mut builder = Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(HEAD).keep_alive(false);
    let (builder, admission) = (Arc::new(builder), Admission::default());
    while let Some((stream, from)) = accepted(&listener, &stop).await {
        let (builder, service) = (builder.clone(), TowerToHyperService::new(app.clone()));
        let admitted = admission.clone();
        admission.enter(from, |number| {
            let answer = async move {
                let _ = timeout(REQUEST, builder.serve_connection(TokioIo::new(stream), service)).await;
                admitted.leave(number);
            };
            tokio::spawn(answer).abort_handle()
        });
    }
}
