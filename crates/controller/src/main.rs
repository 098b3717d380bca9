//! tote-controller: finds pods that cannot pull an image which other nodes hold, and has it brought to them.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{ArgAction, Parser, ValueEnum};
use kube::Client;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tote_controller::access;
use tote_controller::ca::Names;
use tote_controller::decide::Policy;
use tote_controller::http::{self, Health};
use tote_controller::leader::Leader;
use tote_controller::run::{Settings, lead};
use tote_controller::salvage::Limits;
use tote_rpc::identity::Identity;

/// Transfers to one node, and from one node, at once.
const PER_TARGET: usize = 2;
const PER_SOURCE: usize = 2;

/// How long the API server may take to answer at start.
const START: Duration = Duration::from_secs(60);

/// Brings images to pods that cannot pull them, from nodes that hold them.
#[derive(Parser)]
#[command(version)]
struct Flags {
    /// Where /metrics, /healthz and /readyz are served: host:port, or :port for all addresses.
    #[arg(long, default_value = ":8080", value_parser = address)]
    metrics_addr: SocketAddr,
    /// The kill switch: false, and nothing is made, moved or woken.
    #[arg(long, default_value_t = true, action = ArgAction::Set)]
    enabled: bool,
    /// What is asked for before an image moves, beside the opt-ins: that kubelets' records of who may have it let the
    /// namespace have it, or anything.
    #[arg(long, value_enum, default_value = "records")]
    access: access::Policy,
    /// Transfers of the whole fleet at once.
    #[arg(long, default_value_t = 2, value_parser = at_least_one)]
    max_concurrent_salvages: usize,
    /// Name of the agents' headless Service, in this pod's namespace.
    #[arg(long, default_value = "tote-agent")]
    agent_service: String,
    /// The port agents listen on.
    #[arg(long, default_value_t = 9090)]
    agent_port: u16,
    /// Name of the agents' service account, in this pod's namespace.
    #[arg(long, default_value = "tote-agent")]
    agent_service_account: String,
    /// Name of the Secret and the `ConfigMap` that the certificate authority is kept in, in this pod's namespace.
    #[arg(long, default_value = "tote-ca")]
    ca_name: String,
    /// Name of a Secret (kubernetes.io/tls) with a certificate authority to use instead of making one: yours, or one of
    /// cert-manager. It is followed as it changes.
    #[arg(long)]
    ca_secret: Option<String>,
    /// Name of this Deployment: it owns what is made at run time.
    #[arg(long, default_value = "tote")]
    deployment_name: String,
    /// How long certificates of agents and of the controller last, as 6h or 90m. They are renewed at half of it.
    #[arg(long, default_value = "6h", value_parser = certificate_lifetime)]
    certificate_lifetime: Duration,
    /// How long a node may go on reading for a transfer whose controller is gone, as 5m.
    #[arg(long, default_value = "5m", value_parser = session_ttl)]
    session_ttl: Duration,
    /// Name of the Lease that replicas share, in this pod's namespace.
    #[arg(long, default_value = "tote")]
    lease_name: String,
    /// Name of this pod.
    #[arg(long, env = "POD_NAME")]
    pod_name: String,
    /// Namespace of this pod.
    #[arg(long, env = "POD_NAMESPACE")]
    pod_namespace: String,
    /// How log lines read. What is logged is set by the environment variable `RUST_LOG`.
    #[arg(long, value_enum, default_value = "json")]
    log_format: LogFormat,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Json,
    Text,
}

fn address(text: &str) -> Result<SocketAddr, String> {
    let full = if text.starts_with(':') { format!("0.0.0.0{text}") } else { text.to_owned() };
    full.parse().map_err(|_| "must be ip:port or :port, as in :8080".to_owned())
}

/// A time as Kubernetes writes it, between two bounds.
fn time(text: &str, (least, most): (Duration, Duration)) -> Result<Duration, String> {
    let span: jiff::SignedDuration =
        text.parse().map_err(|_| "must be a time such as 5m or 6h".to_owned())?;
    match Duration::try_from(span) {
        Ok(time) if (least..=most).contains(&time) => Ok(time),
        _ => Err(format!("must be between {} and {} seconds", least.as_secs(), most.as_secs())),
    }
}

fn certificate_lifetime(text: &str) -> Result<Duration, String> {
    time(text, (Duration::from_secs(60), Duration::from_secs(7 * 24 * 3600)))
}

fn session_ttl(text: &str) -> Result<Duration, String> {
    time(text, (Duration::from_secs(15), Duration::from_secs(24 * 3600)))
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err("must be a number of at least 1".to_owned()),
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let flags = match Flags::try_parse() {
        Ok(flags) => flags,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    start_log(flags.log_format);
    match run(flags).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error, "cannot start");
            ExitCode::FAILURE
        }
    }
}

fn start_log(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_ansi(false).with_env_filter(filter);
    match format {
        LogFormat::Json => log.json().flatten_event(true).init(),
        LogFormat::Text => log.init(),
    }
}

async fn run(flags: Flags) -> Result<(), String> {
    if flags.ca_secret.as_ref() == Some(&flags.ca_name) {
        return Err(format!("--ca-secret {0}: must be another Secret than --ca-name {0}", flags.ca_name));
    }
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).map_err(|error| format!("signals: {error}"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| format!("signals: {error}"))?;
    let stopping = stop.clone();
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        tracing::info!("stopping");
        stopping.cancel();
    });

    let health = Arc::new(Health::default());
    let listener = TcpListener::bind(flags.metrics_addr)
        .await
        .map_err(|error| format!("--metrics-addr {}: {error}", flags.metrics_addr))?;
    let server = tokio::spawn(http::serve(listener, health.clone(), stop.clone()));

    let client = connect(&stop).await?;
    let settings = Settings {
        policy: Policy {
            enabled: flags.enabled,
            access: flags.access,
            limits: Limits { fleet: flags.max_concurrent_salvages, target: PER_TARGET, source: PER_SOURCE },
        },
        namespace: flags.pod_namespace.clone(),
        me: flags.pod_name.clone(),
        agent_service: flags.agent_service,
        agent_port: flags.agent_port,
        agent_account: flags.agent_service_account,
        ca: Names {
            namespace: flags.pod_namespace.clone(),
            kept: flags.ca_name,
            given: flags.ca_secret,
            deployment: flags.deployment_name,
        },
        identity: Identity::new().map_err(|error| format!("cannot make a key: {error}"))?,
        certificate_life: flags.certificate_lifetime,
        grant_life: flags.session_ttl,
    };
    let (terms, mut current) = watch::channel(None);
    let leader = Leader::new(client.clone(), &flags.pod_namespace, &flags.lease_name, &flags.pod_name);
    let candidate = tokio::spawn(leader.run(terms, stop.clone()));
    while !stop.is_cancelled() {
        let term = current.borrow_and_update().clone();
        health.set_leading(term.is_some());
        let leading = async {
            match term {
                Some(term) => lead(client.clone(), settings.clone(), term, health.clone()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // Whatever the leader was doing ends here, before anyone else may begin.
            changed = current.changed() => if changed.is_err() { break },
            () = stop.cancelled() => break,
            () = leading => tokio::time::sleep(Duration::from_secs(1)).await,
        }
    }
    stop.cancel();
    let _ = candidate.await;
    let _ = tokio::time::timeout(Duration::from_secs(2), server).await;
    Ok(())
}

/// A client of an API server that answers.
async fn connect(stop: &CancellationToken) -> Result<Client, String> {
    let client = Client::try_default().await.map_err(|error| format!("no cluster to work in: {error}"))?;
    let deadline = tokio::time::Instant::now() + START;
    loop {
        match tokio::time::timeout(Duration::from_secs(5), client.apiserver_version()).await {
            Ok(Ok(version)) => {
                let (controller, server) = (env!("CARGO_PKG_VERSION"), version.git_version);
                tracing::info!(version = controller, kubernetes = server, "the API server answers");
                return Ok(client);
            }
            Ok(Err(error)) => tracing::warn!(%error, "the API server does not answer"),
            Err(_) => tracing::warn!("the API server does not answer"),
        }
        if stop.is_cancelled() || tokio::time::Instant::now() > deadline {
            return Err(format!("the API server did not answer within {START:?}"));
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}
