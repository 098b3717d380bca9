//! The files inside a node: configuration of containerd, kubelet, kube-proxy
//! and CNI, and those of /etc that say who is who.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::network::Network;
use super::node::Node;
use super::pki::{self, Authority, Subject};
use crate::containerd::Config;
use crate::host;

/// Inside a node: the directory of certificates and configuration files.
const KUBERNETES: &str = "/etc/kubernetes";
pub(super) const KUBELET_CONFIG: &str = "/etc/kubernetes/kubelet.json";
pub(super) const KUBELET_KUBECONFIG: &str = "/etc/kubernetes/kubelet.conf";
pub(super) const KUBE_PROXY_CONFIG: &str = "/etc/kubernetes/kube-proxy.json";

/// The host names that, on every node, mean the machine's address on the
/// bridge, where registries listen.
pub const REGISTRY_HOSTS: [&str; 1] = ["registry.test"];

/// What kubelet wants of the kernel, in `/proc/sys`; see
/// `setupKernelTunables` in `kubernetes/pkg/kubelet/cm/container_manager_linux.go`.
const SYSCTLS: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// Writes all but the certificates.
pub(super) fn write(node: &Node) -> Result<()> {
    host::run(Command::new("cp").args(["-a", "/etc/."]).arg(node.path("/etc")))?;
    for dir in ["containerd/certs.d", "cni/net.d", "kubernetes"] {
        fs::create_dir_all(node.path("/etc").join(dir))?;
    }
    for dir in ["containerd", "netns"] {
        fs::create_dir_all(node.path("/run").join(dir))?;
    }
    for dir in ["containerd", "kubelet", "cni"] {
        fs::create_dir_all(node.path("/var/lib").join(dir))?;
    }
    for (name, value) in SYSCTLS {
        let file = node.dir.join("sysctl").join(name);
        fs::create_dir_all(file.parent().context("a sysctl without a directory")?)?;
        fs::write(file, format!("{value}\n"))?;
    }

    let own = |path: &str, text: &str| -> Result<()> {
        let path = node.path(path);
        // The machine's may be a link to somewhere else.
        let _ = fs::remove_file(&path);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    };
    own("/etc/hostname", &format!("{}\n", node.name()))?;
    let registries = REGISTRY_HOSTS.join(" ");
    let hosts = format!(
        "127.0.0.1 localhost\n{} {}\n{} {registries}\n",
        node.address()?,
        node.name(),
        node.network.gateway()
    );
    own("/etc/hosts", &hosts)?;
    // Nobody answers there, and that at once: names are in the hosts file.
    own("/etc/resolv.conf", "nameserver 127.0.0.1\noptions attempts:1 timeout:1\n")?;

    let config = Config {
        version: node.spec.containerd,
        root: Path::new("/var/lib/containerd"),
        state: Path::new("/run/containerd"),
        socket: Path::new("/run/containerd/containerd.sock"),
        certs_d: Path::new("/etc/containerd/certs.d"),
        snapshotter: node.spec.snapshotter,
        discard_unpacked_layers: false,
    };
    own("/etc/containerd/config.toml", &config.to_toml())?;
    let cni = serde_json::to_string_pretty(&cni(&node.network.pods(node.index)?))?;
    own("/etc/cni/net.d/10-tote.conflist", &cni)?;
    own(KUBELET_CONFIG, &serde_json::to_string_pretty(&kubelet(&node.cgroup_root, node.spec.crowded))?)?;
    own(KUBE_PROXY_CONFIG, &serde_json::to_string_pretty(&kube_proxy(node.name(), node.network))?)
}

/// Writes certificates and kubeconfigs of kubelet and kube-proxy.
pub(super) fn write_certificates(node: &Node, authority: &Authority, server: &str) -> Result<()> {
    let dir = node.path(KUBERNETES);
    authority.write(&dir)?;
    let (name, addresses) = (format!("system:node:{}", node.name()), [node.address()?]);
    let kubelet =
        Subject { name: &name, group: Some("system:nodes"), names: &[node.name()], addresses: &addresses };
    authority.issue(&dir, "kubelet", &kubelet)?;
    authority.issue(&dir, "kube-proxy", &Subject::client("system:kube-proxy", None))?;
    for file in ["kubelet", "kube-proxy"] {
        pki::kubeconfig(&dir.join(format!("{file}.conf")), server, Path::new(KUBERNETES), file)?;
    }
    Ok(())
}

/// Pods' links: routed, one by one. With a bridge, the answers of a service's
/// pod to a client on the same node would bypass kube-proxy's rewriting, unless
/// the kernel has `br_netfilter`.
fn cni(subnet: &str) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": "tote",
        "plugins": [
            {
                "type": "ptp",
                "ipMasq": false,
                "ipam": {"type": "host-local", "ranges": [[{"subnet": subnet}]], "routes": [{"dst": "0.0.0.0/0"}]},
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
}

fn kubelet(cgroup_root: &str, crowded: bool) -> Value {
    let mut config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": format!("{KUBERNETES}/ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": format!("{KUBERNETES}/kubelet.crt"),
        "tlsPrivateKeyFile": format!("{KUBERNETES}/kubelet.key"),
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{cgroup_root}"),
        "failCgroupV1": false,
        "failSwapOn": false,
        // The disk is the machine's: how full it is does not concern the tests.
        "evictionHard": {
            "memory.available": "50Mi",
            "nodefs.available": "1%",
            "nodefs.inodesFree": "1%",
            "imagefs.available": "1%",
        },
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "oomScoreAdj": 0,
    });
    if crowded {
        config["maxPods"] = json!(200);
        config["serializeImagePulls"] = json!(false);
        // Zero: no limit. As many side by side as there are, unless maxParallelImagePulls says otherwise.
        config["registryPullQPS"] = json!(0);
    }
    config
}

fn kube_proxy(node: &str, network: Network) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "hostnameOverride": node,
        "clusterCIDR": network.all(),
        "clientConnection": {"kubeconfig": format!("{KUBERNETES}/kube-proxy.conf")},
        // Zero leaves the machine's own settings alone.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "oomScoreAdj": 0,
    })
}
