//! `tote-agent`: the agent of one node.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tote_agent::agent::{Settings, run};
use tote_agent::bandwidth::Rate;
use tote_agent::containerd::Client;
use tote_agent::identity::Mounts;
use tote_agent::import::{Lifetimes, Patience};
use tote_agent::kubelet::Records;
use tote_rpc::identity::Identity;
use tracing_subscriber::EnvFilter;

/// Reports, imports and serves the images of one node's containerd.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Where the controller and other agents reach this one.
    #[arg(long, default_value = "0.0.0.0:9090")]
    listen: SocketAddr,
    /// Where /healthz, /readyz and /metrics are served.
    #[arg(long, default_value = "0.0.0.0:8081")]
    health_addr: SocketAddr,
    /// containerd's socket. Mount its directory: a mounted socket goes stale when containerd restarts.
    #[arg(long, default_value = "/run/containerd/containerd.sock")]
    containerd_socket: PathBuf,
    /// Kubelet's directory (its `--root-dir`), for who may have an image: read, and added to, below `image_manager` in it.
    /// Without it nothing is known of that, and an image that not everybody may have is not brought here.
    #[arg(long)]
    kubelet_dir: Option<PathBuf>,
    /// This node's name in Kubernetes.
    #[arg(long, env = "NODE_NAME")]
    node_name: String,
    /// A service account token of the audience `tote`, kept current by Kubernetes: says which pod this is.
    #[arg(long, default_value = "/var/run/tote/token")]
    token_file: PathBuf,
    /// The certificate authorities to trust, as PEM: they say who the controller is.
    #[arg(long, default_value = "/var/run/tote/ca.crt")]
    ca_file: PathBuf,
    /// The most bytes per second to receive from other nodes, as 50Mi. Without it there is no cap.
    #[arg(long)]
    max_bandwidth: Option<Rate>,
    /// The most bytes per second to give to other nodes, as 50Mi. Without it there is no cap.
    #[arg(long)]
    max_upload_bandwidth: Option<Rate>,
    /// How log lines are written; the variable `RUST_LOG` says which are.
    #[arg(long, value_enum, default_value_t = LogFormat::Json)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Json,
    Text,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version come this way too, on standard output.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_ansi(false).with_env_filter(filter).with_writer(std::io::stderr);
    match arguments.log_format {
        LogFormat::Json => log.json().init(),
        LogFormat::Text => log.init(),
    }
    match start(arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("cannot start: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn start(arguments: Arguments) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let (mut terminated, mut interrupted) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stopping = stop.clone();
    tokio::spawn(async move {
        tokio::select! { _ = terminated.recv() => {}, _ = interrupted.recv() => {} }
        tracing::info!("stopping");
        stopping.cancel();
    });
    let bind = async |address: SocketAddr| {
        TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
    };
    let control = bind(arguments.listen).await?;
    let health = bind(arguments.health_addr).await?;
    tracing::info!(node = arguments.node_name, listen = %control.local_addr()?, "agent starts");
    let settings = Settings {
        node_name: arguments.node_name,
        max_bandwidth: arguments.max_bandwidth,
        max_upload: arguments.max_upload_bandwidth,
        patience: Patience::default(),
        lifetimes: Lifetimes::default(),
        identity: Identity::new().context("cannot make a key")?,
        mounts: Some(Mounts { token: arguments.token_file, authorities: arguments.ca_file }),
        records: arguments.kubelet_dir.map(|directory| Arc::new(Records::new(&directory))),
    };
    let containerd = Arc::new(Client::new(&arguments.containerd_socket).with_files());
    run(containerd, settings, control, Some(health), stop).await.context("cannot serve")?;
    tracing::info!("stopped");
    Ok(())
}
