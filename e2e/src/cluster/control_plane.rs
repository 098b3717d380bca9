//! etcd, the API server, the controller manager and the scheduler, in the
//! machine's own network namespace, on the bridge's address.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use super::api;
use super::network::Network;
use super::pki::{self, Authority, Subject};
use super::service::{Service, plain_path, words};
use crate::tools;

/// The control plane of one cluster.
#[derive(Clone, Debug)]
pub(super) struct ControlPlane {
    /// Certificates, kubeconfigs, etcd's data.
    pub(super) dir: PathBuf,
    pub(super) network: Network,
    /// The user whose requests are written down.
    pub(super) audited: Option<String>,
    pub(super) etcd: Service,
    pub(super) api_server: Service,
    pub(super) controller_manager: Service,
    pub(super) scheduler: Service,
}

/// How long each of the parts may take to answer; the machine may be busy.
const LIMIT: Duration = Duration::from_secs(60);

impl ControlPlane {
    /// Where the API is served.
    pub(super) fn server(&self) -> String {
        format!("https://{}:6443", self.network.gateway())
    }

    /// The kubeconfig of the cluster's administrator.
    pub(super) fn kubeconfig(&self) -> PathBuf {
        self.dir.join("admin.conf")
    }

    /// What the audited user asked for, one request a line.
    pub(super) fn audit_log(&self) -> PathBuf {
        self.dir.join("audit.log")
    }

    fn audit_policy(&self) -> PathBuf {
        self.dir.join("audit.json")
    }

    /// All four, in the order of their start.
    pub(super) fn services(&self) -> [&Service; 4] {
        [&self.etcd, &self.api_server, &self.controller_manager, &self.scheduler]
    }

    /// Writes certificates, kubeconfigs and the admission configuration.
    ///
    /// # Errors
    /// They cannot be made or written.
    pub(super) fn write_files(&self, authority: &Authority) -> Result<()> {
        let dir = &self.dir;
        authority.write(dir)?;
        let names = [
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
        ];
        let addresses = [self.network.api_service(), self.network.gateway(), Ipv4Addr::LOCALHOST];
        let server = Subject { name: "kube-apiserver", group: None, names: &names, addresses: &addresses };
        authority.issue(dir, "apiserver", &server)?;
        let masters = Some("system:masters");
        authority.issue(
            dir,
            "apiserver-kubelet-client",
            &Subject::client("kube-apiserver-kubelet-client", masters),
        )?;
        let clients = [
            ("admin", "admin", masters),
            ("controller-manager", "system:kube-controller-manager", None),
            ("scheduler", "system:kube-scheduler", None),
        ];
        for (file, name, group) in clients {
            authority.issue(dir, file, &Subject::client(name, group))?;
            pki::kubeconfig(&dir.join(format!("{file}.conf")), &self.server(), dir, file)?;
        }
        pki::service_account_key(dir)?;
        if let Some(user) = &self.audited {
            fs::write(self.audit_policy(), serde_json::to_vec_pretty(&audit(user))?)
                .context("writing the audit policy")?;
        }
        fs::write(dir.join("admission.json"), serde_json::to_vec_pretty(&admission())?)
            .context("writing admission.json")
    }

    /// Starts etcd and the API server and waits until it answers, then starts
    /// the others.
    ///
    /// # Errors
    /// One does not come up.
    pub(super) fn start(&self) -> Result<()> {
        let bin = tools::kubernetes()?;
        let path = plain_path();
        self.etcd.start(&path, &words(&tools::etcd()?, &self.etcd_flags()))?;
        self.api_server.start(&path, &words(&bin.join("kube-apiserver"), &self.api_server_flags()))?;
        self.api_server.wait(LIMIT, || Ok(api::get(&self.kubeconfig(), "/readyz").is_ok()))?;
        let flags = self.controller_manager_flags();
        self.controller_manager.start(&path, &words(&bin.join("kube-controller-manager"), &flags))?;
        self.scheduler.start(&path, &words(&bin.join("kube-scheduler"), &self.scheduler_flags()))
    }

    fn etcd_flags(&self) -> Vec<String> {
        let (gateway, data) = (self.network.gateway(), self.dir.join("etcd"));
        vec![
            format!("--data-dir={}", data.display()),
            format!("--listen-client-urls=http://{gateway}:2379"),
            format!("--advertise-client-urls=http://{gateway}:2379"),
            format!("--listen-peer-urls=http://{gateway}:2380"),
            format!("--initial-advertise-peer-urls=http://{gateway}:2380"),
            format!("--initial-cluster=default=http://{gateway}:2380"),
            // The cluster does not outlive the machine: nothing is gained by waiting for the disk.
            "--unsafe-no-fsync".to_owned(),
            "--log-level=warn".to_owned(),
        ]
    }

    fn api_server_flags(&self) -> Vec<String> {
        let gateway = self.network.gateway();
        let file = |name: &str| self.dir.join(name).display().to_string();
        let mut flags = vec![
            format!("--etcd-servers=http://{gateway}:2379"),
            format!("--bind-address={gateway}"),
            format!("--advertise-address={gateway}"),
            format!("--service-cluster-ip-range={}", self.network.services()),
            format!("--client-ca-file={}", file("ca.crt")),
            format!("--tls-cert-file={}", file("apiserver.crt")),
            format!("--tls-private-key-file={}", file("apiserver.key")),
            format!("--kubelet-certificate-authority={}", file("ca.crt")),
            format!("--kubelet-client-certificate={}", file("apiserver-kubelet-client.crt")),
            format!("--kubelet-client-key={}", file("apiserver-kubelet-client.key")),
            "--kubelet-preferred-address-types=InternalIP".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local".to_owned(),
            format!("--service-account-signing-key-file={}", file("sa.key")),
            format!("--service-account-key-file={}", file("sa.pub")),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            format!("--admission-control-config-file={}", file("admission.json")),
            "--allow-privileged=true".to_owned(),
        ];
        if self.audited.is_some() {
            flags.push(format!("--audit-policy-file={}", self.audit_policy().display()));
            flags.push(format!("--audit-log-path={}", self.audit_log().display()));
        }
        flags
    }

    fn controller_manager_flags(&self) -> Vec<String> {
        let mut flags = self.client_flags("controller-manager.conf");
        flags.extend([
            format!("--root-ca-file={}", self.dir.join("ca.crt").display()),
            format!("--service-account-private-key-file={}", self.dir.join("sa.key").display()),
            "--use-service-account-credentials=true".to_owned(),
        ]);
        flags
    }

    fn scheduler_flags(&self) -> Vec<String> {
        self.client_flags("scheduler.conf")
    }

    fn client_flags(&self, kubeconfig: &str) -> Vec<String> {
        let file = self.dir.join(kubeconfig);
        vec![
            format!("--kubeconfig={}", file.display()),
            format!("--authentication-kubeconfig={}", file.display()),
            format!("--authorization-kubeconfig={}", file.display()),
            format!("--bind-address={}", self.network.gateway()),
            "--leader-elect=false".to_owned(),
        ]
    }
}

/// Pod Security: `baseline` for every namespace that does not say otherwise.
fn admission() -> serde_json::Value {
    json!({
        "apiVersion": "apiserver.config.k8s.io/v1",
        "kind": "AdmissionConfiguration",
        "plugins": [{"name": "PodSecurity", "configuration": {
            "apiVersion": "pod-security.admission.config.k8s.io/v1",
            "kind": "PodSecurityConfiguration",
            "defaults": {"enforce": "baseline", "enforce-version": "latest"},
            "exemptions": {"namespaces": ["kube-system"]},
        }}],
    })
}

/// The requests of one user and no other, each when it is answered.
fn audit(user: &str) -> serde_json::Value {
    json!({
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [{"level": "Metadata", "users": [user]}, {"level": "None"}],
    })
}

/// Every directory that must exist before the services start.
pub(super) fn make_dirs(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir.join("etcd")).with_context(|| format!("making {}", dir.display()))?;
    rustix::fs::chmod(dir.join("etcd"), rustix::fs::Mode::RWXU).context("closing etcd's directory")
}
