//! tote-controller: finds pods that cannot pull an image which other nodes hold, and has it brought to them.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
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
use tote_controller::detect::Classes;
use tote_controller::detect::class::Class;
use tote_controller::http::{self, Health};
use tote_controller::leader::Leader;
use tote_controller::lookup::Upstream;
use tote_controller::notify::{Delivery, Header, NotificationType, Notifier, Pace, Receiver};
use tote_controller::patterns::{Images, Pattern, Size};
use tote_controller::registry::{self, HostPattern, Lookup};
use tote_controller::resolve::TagPolicy;
use tote_controller::run::{Settings, lead};
use tote_controller::salvage::Limits;
use tote_controller::tenure::Tenure;
use tote_rpc::identity::Identity;

/// How long notifications may take to leave when it stops.
const DRAIN: Duration = Duration::from_secs(2);

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
    /// A repository whose images may be salvaged, with its registry, as registry.example.com/team/*. May be repeated; without
    /// it, all.
    #[arg(long = "allow-image", value_name = "PATTERN")]
    allowed_images: Vec<Pattern>,
    /// A repository whose images are never salvaged. May be repeated.
    #[arg(long = "deny-image", value_name = "PATTERN")]
    denied_images: Vec<Pattern>,
    /// The largest image that is salvaged, by the compressed size of what its platform needs, as 2Gi; without it, any.
    #[arg(long)]
    max_image_size: Option<Size>,
    /// A class of failures that is salvaged though a copy may go against somebody's will. May be repeated.
    #[arg(long = "salvage-class", value_name = "CLASS")]
    salvaged_classes: Vec<Class>,
    /// A class of failures that is left alone. May be repeated.
    #[arg(long = "ignore-class", value_name = "CLASS")]
    ignored_classes: Vec<Class>,
    /// What is asked for before an image moves, beside the opt-ins: that kubelets' records of who may have it let the
    /// namespace have it, or anything.
    #[arg(long, value_enum, default_value = "records")]
    access: access::Policy,
    /// Transfers to one node at once.
    #[arg(long, default_value_t = 2, value_parser = at_least_one)]
    max_concurrent_salvages: usize,
    /// Transfers that read from one node at once; those that have it as a last resort, beside others, do not count.
    #[arg(long, default_value_t = 4, value_parser = at_least_one)]
    max_uploads_per_node: usize,
    /// Transfers of the whole cluster at once. Each writes its progress every 5 seconds.
    #[arg(long, default_value_t = 64, value_parser = at_least_one)]
    max_concurrent_in_cluster: usize,
    /// What to do about a tag that means different images on different nodes: refuse it, or take the image that was made
    /// last.
    #[arg(long, value_enum, default_value = "refuse")]
    tag_policy: Tags,
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
    /// A URL that is told of salvages: each notification is a POST of one JSON document. Redirects are not followed.
    #[arg(long)]
    notify_url: Option<String>,
    /// Which notifications are sent, separated by commas. pushed and `push_failed` are accepted and never sent as long as
    /// nothing is pushed to a backup registry.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "detected,salvaged,salvage_failed,pushed,push_failed"
    )]
    notify_types: Vec<NotificationType>,
    /// The header that --notify-header-file is sent in.
    #[arg(long, default_value = "Authorization")]
    notify_header_name: String,
    /// A file with the value of a header, such as `Bearer ...`, that proves to the receiver who sends. Read anew each time.
    #[arg(long, requires = "notify_url")]
    notify_header_file: Option<PathBuf>,
    /// A file (PEM) with certificate authorities to trust beside the public ones, when sending notifications.
    #[arg(long, requires = "notify_url")]
    notify_ca_file: Option<PathBuf>,
    /// Ask an image's registry where the nodes do not tell what its tag means.
    #[arg(long, default_value_t = false, action = ArgAction::Set)]
    registry_resolve: bool,
    /// A registry that may be asked, as image references name it (registry.example.com:5000, docker.io, *.example.com); once for
    /// each. Any that is not named is left alone, for tenants choose where their images come from.
    #[arg(long)]
    registry_resolve_host: Vec<HostPattern>,
    /// Ask with the pull secrets of the pod that waits.
    #[arg(long, default_value_t = false, action = ArgAction::Set)]
    registry_use_pull_secrets: bool,
    /// How long a registry may take to answer in all, as 5s.
    #[arg(long, default_value = "5s", value_parser = registry_timeout)]
    registry_timeout: Duration,
    /// One of these registries that is asked by plain HTTP; once for each.
    #[arg(long)]
    registry_insecure: Vec<HostPattern>,
    /// A file of certificate authorities (PEM) that vouch for registries, beside the public ones.
    #[arg(long)]
    registry_ca_file: Option<PathBuf>,
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
enum Tags {
    Refuse,
    Newest,
}

impl From<Tags> for TagPolicy {
    fn from(tags: Tags) -> Self {
        match tags {
            Tags::Refuse => Self::Refuse,
            Tags::Newest => Self::Newest,
        }
    }
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

fn registry_timeout(text: &str) -> Result<Duration, String> {
    time(text, (Duration::from_secs(1), Duration::from_secs(60)))
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
    let upstream = upstream(&flags)?;
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

    let (notifier, delivery) = notifications(&flags, &health).await?.unzip();
    let client = connect(&stop).await?;
    let classes = Classes::new(&flags.salvaged_classes, &flags.ignored_classes);
    let classes = classes.map_err(|error| format!("--salvage-class, --ignore-class: {error}"))?;
    let settings = Settings {
        policy: Policy {
            enabled: flags.enabled,
            images: Images {
                allowed: flags.allowed_images,
                denied: flags.denied_images,
                max_size: flags.max_image_size,
            },
            classes,
            limits: Limits {
                cluster: flags.max_concurrent_in_cluster,
                target: flags.max_concurrent_salvages,
                source: flags.max_uploads_per_node,
            },
            tags: flags.tag_policy.into(),
            look_up: upstream.is_some(),
            access: flags.access,
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
        notifier,
        upstream,
    };
    let (terms, mut current) = watch::channel(None);
    let leader = Leader::new(client.clone(), &flags.pod_namespace, &flags.lease_name, &flags.pod_name);
    let tenure = Tenure::default();
    let candidate = tokio::spawn(leader.run(terms, tenure.clone(), stop.clone()));
    while !stop.is_cancelled() {
        let term = current.borrow_and_update().clone();
        health.set_leading(term.is_some());
        let leading = async {
            match term {
                Some(term) => {
                    lead(client.clone(), settings.clone(), (term, tenure.clone()), health.clone()).await;
                }
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
    let drained = async {
        if let Some(delivery) = delivery {
            delivery.drain(DRAIN).await;
        }
    };
    let _ = tokio::join!(candidate, drained);
    let _ = tokio::time::timeout(Duration::from_secs(2), server).await;
    Ok(())
}

/// The webhook, if there is to be one.
async fn notifications(flags: &Flags, health: &Arc<Health>) -> Result<Option<(Notifier, Delivery)>, String> {
    let Some(url) = &flags.notify_url else { return Ok(None) };
    let header = flags.notify_header_file.clone();
    let header = header.map(|file| Header { name: flags.notify_header_name.clone(), file });
    let receiver = Receiver::new(url, header, flags.notify_ca_file.as_deref()).await;
    let receiver = receiver.map_err(|error| error.to_string())?;
    let types: BTreeSet<_> = flags.notify_types.iter().copied().collect();
    tracing::info!(receiver = receiver.origin(), ?types, "notifications are sent");
    Ok(Some(Notifier::start(receiver, types, Pace::default(), health.clone())))
}

/// How registries are asked, if they are.
fn upstream(flags: &Flags) -> Result<Option<Upstream>, String> {
    if !flags.registry_resolve {
        return Ok(None);
    }
    if flags.registry_resolve_host.is_empty() {
        return Err("--registry-resolve: name the registries that may be asked with --registry-resolve-host"
            .to_owned());
    }
    let read = |path: &PathBuf| {
        std::fs::read(path).map_err(|error| format!("--registry-ca-file {}: {error}", path.display()))
    };
    let settings = registry::Settings {
        hosts: flags.registry_resolve_host.clone(),
        insecure: flags.registry_insecure.clone(),
        timeout: flags.registry_timeout,
        ca_pem: flags.registry_ca_file.as_ref().map(read).transpose()?,
    };
    let lookup = Lookup::new(settings).map_err(|error| format!("--registry-resolve: {error}"))?;
    Ok(Some(Upstream { lookup: Arc::new(lookup), pull_secrets: flags.registry_use_pull_secrets }))
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
