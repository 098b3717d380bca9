//! Shows the main job on real parts: a registry stops, a pod on another node cannot pull, and runs all the same.
//! `demo down` removes what `KEEP=1` left up.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{JoinHandle, block_in_place};
use tote_e2e::cluster::{Cluster, Options};
use tote_e2e::images::{Layout, debian_gzip};
use tote_e2e::registry::{self, Control as _, Remote};
use tote_e2e::rescue::follow;
use tote_e2e::tenant::{Tenant, is_ready};
use tote_e2e::timeline::{Timeline, mebibytes};
use tote_e2e::{host, operator, tools};

/// The cluster's name.
const CLUSTER: &str = "demo";
/// The workload's namespace.
const NAMESPACE: &str = "shop";
/// How long a pod may take to start while the registry is well.
const START: Duration = Duration::from_secs(90);
/// How long the second pod may take.
const RESCUE: Duration = Duration::from_secs(60);

/// Says a line with the time since the start.
struct Clock(Instant);

impl Clock {
    fn say(&self, line: &str) {
        println!("[{:3} s] {line}", self.0.elapsed().as_secs());
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let down = match std::env::args().nth(1).as_deref() {
        None => false,
        Some("down") => true,
        Some(other) => {
            eprintln!("demo: unknown argument {other:?}: it takes none, or `down`");
            return ExitCode::from(2);
        }
    };
    let keep = std::env::var("KEEP").is_ok_and(|value| !matches!(value.as_str(), "" | "0"));
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        eprintln!("demo: signals cannot be caught");
        return ExitCode::FAILURE;
    };
    let mut body = tokio::spawn(async move { if down { Ok(()) } else { demo(keep).await } });
    let code = tokio::select! {
        outcome = &mut body => match outcome.map_err(anyhow::Error::from).and_then(|outcome| outcome) {
            Ok(()) if keep && !down => {
                how_to_go_on();
                return ExitCode::SUCCESS;
            }
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("\ndemo: {error:#}");
                ExitCode::FAILURE
            }
        },
        _ = interrupt.recv() => ended(&mut body, 130).await,
        _ = terminate.recv() => ended(&mut body, 143).await,
    };
    println!("taking the cluster down");
    if let Err(error) = block_in_place(take_down) {
        eprintln!("demo: taking the cluster down: {error:#}\n      try it again: demo down");
        return ExitCode::FAILURE;
    }
    code
}

/// Ends the demo where it is; what it is about to start stands by then, and can be found and removed.
async fn ended(body: &mut JoinHandle<Result<()>>, code: u8) -> ExitCode {
    body.abort();
    // An error of the demo, or that it was ended.
    let _ = body.await;
    ExitCode::from(code)
}

/// Removes the cluster and its registry, whatever their condition.
fn take_down() -> Result<bool> {
    if let Ok(registry) = Remote::attach(&storage()?) {
        registry.shutdown()?;
    }
    let there = Cluster::down(CLUSTER)?;
    // Every demo pushes an image that no other did.
    host::remove_tree(&storage()?)?;
    Ok(there)
}

async fn demo(keep: bool) -> Result<()> {
    let clock = Clock(Instant::now());
    if block_in_place(take_down)? {
        clock.say("removed what an earlier demo left");
    }
    let cluster = block_in_place(|| Cluster::up(&Options::new(CLUSTER), &|line| clock.say(line)))?;
    let client = cluster.client().await?;
    let registry = block_in_place(|| start_registry(&cluster))?;
    clock.say(&format!("a registry serves at {}", registry.address()));

    let layout = Layout::temporary()?;
    let image = block_in_place(|| debian_gzip(&layout, &format!("demo {}", std::process::id())))?;
    registry.upstream().push(&image, "shop/web", Some("v1")).await?;
    let reference = format!("{}/shop/web:v1", registry.upstream().name());
    let size = i64::try_from(image.needed_bytes()?).ok();
    clock.say(&format!("pushed {reference}: a Debian with nginx, {}", mebibytes(size)));

    block_in_place(|| cluster.load_image(&operator::archive()?))?;
    clock.say("helm install tote charts/tote");
    block_in_place(|| operator::install(&cluster, &[]))?;

    let tenant = Tenant::enter(client, NAMESPACE, true).await?;
    block_in_place(|| operator::apply(&cluster, &deployment(&reference).to_string()))?;
    let first = ready_pod(&tenant).await?;
    clock.say(&format!("pod {} runs on {}", first.name_any(), node_of(&first)));

    registry.stop()?;
    let begin = Instant::now();
    println!(
        "\n    0.00 s  registry {} is stopped; kubectl scale deployment web --replicas=2",
        registry.address()
    );
    block_in_place(|| kubectl(&cluster, &["scale", "deployment", "web", "--replicas=2", "-n", NAMESPACE]))?;
    let first = first.name_any();
    let rescue = follow(&tenant, |pod| pod.name_any() != first, begin, |line| println!("{line}"));
    let timeline = match tokio::time::timeout(RESCUE, rescue).await {
        Ok(timeline) => timeline?,
        Err(_) => {
            bail!("the second pod does not run after {} s\n{}", RESCUE.as_secs(), tenant.report().await)
        }
    };

    println!("\n$ kubectl get salvagejobs -A -o wide");
    print!("{}", block_in_place(|| kubectl(&cluster, &["get", "salvagejobs", "-A", "-o", "wide"]))?);
    summary(&timeline, keep);
    Ok(())
}

/// Where the registry keeps its data, and by which a later run finds it.
fn storage() -> Result<PathBuf> {
    Ok(tools::cache()?.join("demo-registry"))
}

fn start_registry(cluster: &Cluster) -> Result<Remote> {
    let program = std::env::current_exe()?.with_file_name("registry");
    let listen = (cluster.registry_address(), 5000).into();
    let options = registry::Options { listen, name: None, storage: Some(storage()?) };
    let registry = Remote::spawn(&program, &options)?;
    cluster.trust_registry(registry.upstream().name())?;
    Ok(registry)
}

/// nginx, at most one pod a node, so that scaling up takes it to a node that lacks the image.
fn deployment(image: &str) -> serde_json::Value {
    let labels = json!({ "app": "web" });
    let conf = "user root; error_log stderr; pid /tmp/nginx.pid; events {} \
        http { access_log off; server { listen 8080; location / { return 200 'in stock'; } } }";
    // The packages are unpacked and not configured: nginx still wants its group and its directories.
    let run = format!(
        "echo root:x:0: > /etc/group; mkdir -p /tmp /var/lib/nginx /var/log/nginx; \
         echo \"{conf}\" > /tmp/nginx.conf; exec nginx -c /tmp/nginx.conf -g 'daemon off;'"
    );
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": { "name": "web", "namespace": NAMESPACE },
        "spec": {
            "replicas": 1,
            "selector": { "matchLabels": labels },
            "template": {
                "metadata": { "labels": labels, "annotations": { tote_api::names::AUTO_SALVAGE: "true" } },
                "spec": {
                    "terminationGracePeriodSeconds": 1,
                    "dnsPolicy": "Default",
                    "affinity": { "podAntiAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": [
                        { "topologyKey": "kubernetes.io/hostname", "labelSelector": { "matchLabels": labels } },
                    ] } },
                    "containers": [{
                        "name": "nginx", "image": image, "imagePullPolicy": "IfNotPresent",
                        "command": ["/bin/sh", "-c", run],
                        "ports": [{ "containerPort": 8080 }],
                        "readinessProbe": { "httpGet": { "path": "/", "port": 8080 }, "periodSeconds": 1 },
                    }],
                },
            },
        },
    })
}

async fn ready_pod(tenant: &Tenant) -> Result<Pod> {
    let pods = tenant.pods();
    tenant
        .until("the first pod to be ready", START, || async {
            Ok(pods.list(&kube::api::ListParams::default()).await?.into_iter().find(is_ready))
        })
        .await
}

fn summary(timeline: &Timeline, keep: bool) {
    println!("\nFrom the pod's first failure status to");
    let since = |at: Option<Duration>| match (timeline.failed, at) {
        (Some(failed), Some(at)) => format!("{:6.2} s", at.saturating_sub(failed).as_secs_f64()),
        _ => "     -".to_owned(),
    };
    for (what, at) in
        [("detection", timeline.detected), ("Imported", timeline.imported), ("Running", timeline.running)]
    {
        println!("  {what:<10}{}", since(at));
    }
    if keep {
        return;
    }
    println!(
        "\nNext: KEEP=1 make demo leaves the cluster up; README.md, \"Install it on a cluster of your own\"; make test."
    );
}

fn how_to_go_on() {
    let own = std::env::current_exe().unwrap_or_else(|_| "demo".into());
    let cluster = own.with_file_name("cluster");
    let kubeconfig = Cluster::attach(CLUSTER).map(|cluster| cluster.kubeconfig()).unwrap_or_default();
    let helm = tools::helm().ok().and_then(|program| program.parent().map(PathBuf::from));
    let programs: Vec<String> =
        tools::kubernetes().ok().into_iter().chain(helm).map(|path| path.display().to_string()).collect();
    println!(
        "\nThe cluster is still up. Use it:\n  \
         export KUBECONFIG={} PATH={}:$PATH\n  \
         kubectl get nodes; kubectl get sj -A -o wide; kubectl get events -n {NAMESPACE}\n  \
         {} --name {CLUSTER} exec n1 ctr -n k8s.io images ls\n\
         Stop it:\n  {} down",
        kubeconfig.display(),
        programs.join(":"),
        cluster.display(),
        own.display()
    );
}

fn node_of(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or("no node")
}

fn kubectl(cluster: &Cluster, arguments: &[&str]) -> Result<String> {
    host::run(&mut cluster.kubectl(arguments)?).context("kubectl")
}
