//! The operator on a cluster: its image on every node, its chart by helm. Knows nothing of scenarios.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};

use crate::cluster::Cluster;
use crate::host;

/// The namespace the operator lives in.
pub const NAMESPACE: &str = "tote-system";

/// The checkout that this crate was built from.
pub fn checkout() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(|| PathBuf::from("."), Path::to_owned)
}

/// The operator's image as `make image` leaves it: an OCI archive.
///
/// # Errors
/// It has not been built.
pub fn archive() -> Result<PathBuf> {
    let path = checkout().join("target/image/tote.tar");
    ensure!(path.is_file(), "{} is not there: run `make image` first", path.display());
    Ok(path)
}

/// Makes the namespace that agents need, then installs or upgrades the chart, and waits until all is ready. The
/// image must be on the nodes, see [`Cluster::load_image`].
///
/// # Errors
/// kubectl or helm failed; the message has what they wrote.
pub fn install(cluster: &Cluster, values: &[(&str, &str)]) -> Result<()> {
    make_namespace(cluster)?;
    let chart = checkout().join("charts/tote");
    let mut helm = cluster.helm(&["upgrade", "--install", "tote"])?;
    helm.arg(chart).args(["-n", NAMESPACE, "--wait", "--timeout", "90s"]);
    for (name, value) in values {
        helm.args(["--set", &format!("{name}={value}")]);
    }
    host::run(&mut helm).context("installing the chart")?;
    // helm is content when as many as maxUnavailable are missing.
    let status = ["-n", NAMESPACE, "rollout", "status", "daemonset/tote-agent", "--timeout=90s"];
    host::run(&mut cluster.kubectl(&status)?).context("waiting for every agent")?;
    Ok(())
}

/// Makes the operator's namespace, if it is not there.
///
/// # Errors
/// kubectl failed.
pub fn make_namespace(cluster: &Cluster) -> Result<()> {
    let namespace = serde_json::json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": { "name": NAMESPACE, "labels": { "pod-security.kubernetes.io/enforce": "privileged" } },
    });
    apply(cluster, &namespace.to_string()).context("making the operator's namespace")
}

/// Uninstalls the chart; returns when all of it is gone.
///
/// # Errors
/// helm failed, or something did not go within 90 s.
pub fn uninstall(cluster: &Cluster) -> Result<()> {
    host::run(&mut cluster.helm(&["uninstall", "tote", "-n", NAMESPACE, "--wait", "--timeout", "90s"])?)?;
    Ok(())
}

/// `kubectl apply` of a document.
///
/// # Errors
/// kubectl failed; the message has what it wrote.
pub fn apply(cluster: &Cluster, document: &str) -> Result<()> {
    let mut command = cluster.kubectl(&["apply", "-f", "-"])?;
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("kubectl has no standard input")?.write_all(document.as_bytes())?;
    let output = child.wait_with_output()?;
    host::finished(&command, &output)
}
