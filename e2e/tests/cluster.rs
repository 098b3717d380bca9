//! The cluster itself. Needs root and what `e2e/tools.sh cluster registry` builds.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tote_e2e::cluster::{Cluster, Options};
use tote_e2e::host;
use tote_e2e::images::{self, Layout};
use tote_e2e::registry::{Control, Registry};

/// Removes the cluster even if the test fails.
struct Guard(&'static str);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Err(error) = Cluster::down(self.0) {
            eprintln!("the cluster {} was not removed: {error:#}", self.0);
        }
    }
}

/// What is left on the machine of the cluster that had this directory and
/// network.
fn leftovers(cluster: &str, dir: &Path, bridge: &str) -> Vec<String> {
    let links = host::run(Command::new("ip").args(["-o", "link"])).unwrap();
    let namespaces = host::run(Command::new("ip").args(["netns", "list"])).unwrap();
    let mut left: Vec<String> =
        links.lines().filter(|line| line.contains(&format!(" {bridge}"))).map(str::to_owned).collect();
    left.extend(namespaces.lines().filter(|line| line.contains("cni-")).map(str::to_owned));
    left.extend(host::mounts_below(dir).unwrap().iter().map(|point| format!("mount {}", point.display())));
    left.extend(host::processes_naming(dir).unwrap().iter().map(|pid| format!("process {pid}")));
    let find = ["/sys/fs/cgroup", "-type", "d", "-name", &format!("tote-{cluster}")];
    left.extend(
        host::run(Command::new("find").args(find)).unwrap().lines().map(|line| format!("cgroup {line}")),
    );
    if dir.exists() {
        left.push(dir.display().to_string());
    }
    left
}

fn kubectl(cluster: &Cluster, args: &[&str]) -> Result<String> {
    host::run(&mut cluster.kubectl(args)?)
}

fn apply(cluster: &Cluster, object: &Value) -> Result<String> {
    let mut command = cluster.kubectl(&["apply", "-f", "-"])?;
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("no input")?.write_all(&serde_json::to_vec(object)?)?;
    let output = child.wait_with_output()?;
    host::finished(&command, &output)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn pod(name: &str, node: &str, image: &str, policy: &str) -> Value {
    let command = ["/bin/busybox", "httpd", "-f", "-p", "8000"];
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "web"}},
        "spec": {"nodeName": node, "terminationGracePeriodSeconds": 0, "containers": [
            {"name": "main", "image": image, "imagePullPolicy": policy, "command": command},
        ]},
    })
}

fn await_running(cluster: &Cluster, pods: &[&str]) -> Result<()> {
    let mut args = vec!["wait", "--for=condition=Ready", "--timeout=60s"];
    let names: Vec<String> = pods.iter().map(|pod| format!("pod/{pod}")).collect();
    args.extend(names.iter().map(String::as_str));
    let waited = kubectl(cluster, &args);
    let pods = || kubectl(cluster, &["describe", "pods"]).unwrap_or_default();
    waited.map(drop).with_context(pods)
}

#[test]
fn pods_run_on_every_node_and_nothing_is_left() -> Result<()> {
    let name = "selftest";
    Cluster::down(name)?;
    let _guard = Guard(name);
    let cluster = Cluster::up(&Options::new(name), &|line| println!("{line}"))?;
    let bridge = format!("tote{}", cluster.registry_address().octets()[1]);
    assert!(leftovers(name, cluster.dir(), &bridge).len() > 3, "a running cluster is not seen");

    // An image that is imported, on every node.
    let archive = tempfile::NamedTempFile::new()?;
    images::tiny(&Layout::temporary()?, name)?.write_archive(archive.path(), "localhost/web:1")?;
    cluster.load_image(archive.path())?;
    for node in ["n1", "n2", "n3"] {
        apply(&cluster, &pod(&format!("web-{node}"), node, "localhost/web:1", "Never"))?;
    }
    await_running(&cluster, &["web-n1", "web-n2", "web-n3"])?;

    // Pods reach each other across nodes, and a service from a pod behind it.
    let address = kubectl(&cluster, &["get", "pod", "web-n3", "-o", "jsonpath={.status.podIP}"])?;
    // Not wget: it asks for the port of "http" by name, which crashes Debian's static busybox.
    let ask = |host: &str| format!("printf 'GET /seed HTTP/1.0\\r\\n\\r\\n' | busybox nc -w 5 {host} 8000");
    let read = |from: &str, host: &str| kubectl(&cluster, &["exec", from, "--", "sh", "-c", &ask(host)]);
    let answer = read("web-n1", &address)?;
    assert!(answer.ends_with(name), "{answer}");
    kubectl(&cluster, &["expose", "pod", "web-n2", "--name=web", "--port=8000"])?;
    let service = kubectl(&cluster, &["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"])?;
    for from in ["web-n1", "web-n2", "web-n3"] {
        host::wait_until(
            "the service answers",
            Duration::from_secs(30),
            || Ok(read(from, &service).is_ok()),
        )?;
    }

    // Pod Security: baseline.
    let mut privileged = pod("privileged", "n1", "localhost/web:1", "Never");
    privileged["spec"]["hostPID"] = json!(true);
    let refused = apply(&cluster, &privileged).unwrap_err().to_string();
    assert!(refused.contains("violates PodSecurity \"baseline"), "{refused}");

    // A registry that the nodes trust, by its name.
    let listen = SocketAddr::new(cluster.registry_address().into(), 0);
    let registry = Registry::start(&tote_e2e::registry::Options { listen, name: None, storage: None })?;
    let image = images::tiny(&Layout::temporary()?, "pulled")?;
    tokio::runtime::Runtime::new()?.block_on(registry.upstream().push(&image, "test/web", Some("v1")))?;
    let host_port = format!("registry.test:{}", registry.address().port());
    cluster.trust_registry(&host_port)?;
    for node in ["n1", "n3"] {
        let image = format!("{host_port}/test/web:v1");
        apply(&cluster, &pod(&format!("pulled-{node}"), node, &image, "IfNotPresent"))?;
    }
    await_running(&cluster, &["pulled-n1", "pulled-n3"])?;

    // Daemons end and start again; pods do not notice.
    let started = ["get", "pods", "-o", "jsonpath={.items[*].status.containerStatuses[0].containerID}"];
    let before = kubectl(&cluster, &started)?;
    for node in ["n2", "n3"] {
        let node = cluster.node(node)?;
        assert_eq!(node.exec(&["uname", "-n"])?.trim(), node.name());
        let daemons =
            || -> Vec<_> { cluster.status().into_iter().map(|line| (line.daemon, line.pid)).collect() };
        let first = daemons();
        node.restart_kubelet()?;
        node.kill_containerd()?;
        assert!(node.ctr(&["version"]).is_err());
        node.start_containerd()?;
        let changed = daemons().into_iter().zip(first).filter(|(now, then)| now != then).count();
        assert_eq!(changed, 2, "kubelet and containerd are other processes than before");
        assert!(node.ctr(&["images", "ls", "-q"])?.contains("localhost/web:1"));
    }
    host::wait_until("all is well again", Duration::from_secs(60), || Ok(cluster.unready()?.is_none()))?;
    await_running(&cluster, &["web-n1", "web-n2", "web-n3"])?;
    assert_eq!(kubectl(&cluster, &started)?, before);

    // Up twice is the same cluster; with other nodes it is an error.
    assert_eq!(Cluster::up(&Options::new(name), &|_| ())?.kubeconfig(), cluster.kubeconfig());
    let mut other = Options::new(name);
    other.nodes.pop();
    assert!(Cluster::up(&other, &|_| ()).unwrap_err().to_string().contains("other nodes"));

    assert!(Cluster::down(name)?);
    assert_eq!(leftovers(name, cluster.dir(), &bridge), Vec::<String>::new());
    assert!(!Cluster::down(name)?);
    assert!(Cluster::attach(name).unwrap_err().to_string().contains("no cluster"));
    Ok(())
}

/// At several moments: kill whoever brings it up, and go on as if nothing was.
#[test]
fn a_killed_up_stops_neither_the_next_nor_down() -> Result<()> {
    let name = "killed";
    Cluster::down(name)?;
    let _guard = Guard(name);
    let program = env!("CARGO_BIN_EXE_cluster");
    let dir = tote_e2e::tools::cache()?.join("clusters").join(name);
    let mut bridge = String::new();
    for made in ["cluster.json", "nodes/n2/held", "logs/n3-kubelet.pid"] {
        let mut up = Command::new(program).args(["--name", name, "up"]).stdout(Stdio::null()).spawn()?;
        host::wait_until(&format!("{made} is there"), Duration::from_secs(60), || {
            Ok(dir.join(made).exists())
        })?;
        up.kill()?;
        up.wait()?;
        let state: Value = serde_json::from_slice(&fs::read(dir.join("cluster.json"))?)?;
        bridge = format!("tote{}", state["network"]);
        assert!(Cluster::attach(name).is_err(), "half of a cluster was taken for a whole");
    }
    host::run(Command::new(program).args(["--name", name, "up"]))?;
    host::run(Command::new(program).args(["--name", name, "status"]))?;
    let nodes = host::run(Command::new(program).args(["--name", name, "kubectl", "get", "nodes"]))?;
    assert_eq!(nodes.matches(" Ready ").count(), 3, "{nodes}");
    host::run(Command::new(program).args(["--name", name, "down"]))?;
    assert_eq!(leftovers(name, &dir, &bridge), Vec::<String>::new());
    Ok(())
}
