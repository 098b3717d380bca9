//! The few questions that the cluster itself asks its API server.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use kube::config::{KubeConfigOptions, Kubeconfig};

/// A client for a kubeconfig.
///
/// # Errors
/// The file is not a kubeconfig.
pub(super) async fn client(kubeconfig: &Path) -> Result<kube::Client> {
    let file = Kubeconfig::read_from(kubeconfig)?;
    let mut config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
    config.connect_timeout = Some(Duration::from_secs(5));
    Ok(kube::Client::try_from(config)?)
}

/// The body of a GET. Blocks; may be called from within an asynchronous task,
/// for it runs on a thread of its own.
///
/// # Errors
/// No answer within 10 s, or not a success.
pub(super) fn get(kubeconfig: &Path, path: &str) -> Result<String> {
    let request = http::Request::get(path).body(Vec::new())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let asking = async {
        let answer = async { Ok::<_, anyhow::Error>(client(kubeconfig).await?.request_text(request).await?) };
        tokio::time::timeout(Duration::from_secs(10), answer).await.context("no answer within 10 s")?
    };
    std::thread::scope(|scope| scope.spawn(|| runtime.block_on(asking)).join())
        .map_err(|_| anyhow!("asking the API server panicked"))?
        .with_context(|| format!("GET {path}"))
}

/// What is not yet as it must be before the first pod: None if all is well.
///
/// # Errors
/// The API server does not answer.
pub(super) fn unready(kubeconfig: &Path, nodes: usize) -> Result<Option<String>> {
    let list: serde_json::Value = serde_json::from_str(&get(kubeconfig, "/api/v1/nodes")?)?;
    let items = list["items"].as_array().map(Vec::as_slice).unwrap_or_default();
    let ready = items.iter().filter(|node| node_is_ready(node) && node["spec"]["taints"].is_null()).count();
    if ready < nodes {
        return Ok(Some(format!("{ready} of {nodes} nodes are Ready")));
    }
    // Pods are refused before their namespace has its service account.
    if get(kubeconfig, "/api/v1/namespaces/default/serviceaccounts/default").is_err() {
        return Ok(Some("the service account default/default is not there".to_owned()));
    }
    Ok(None)
}

/// Whether a Node has the condition Ready.
pub(super) fn node_is_ready(node: &serde_json::Value) -> bool {
    let conditions = node["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    conditions.iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}
