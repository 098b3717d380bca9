//! A node for these tests: a private containerd and an agent on it, which can be killed.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::future::Future;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use rustix::mount::{MountFlags, mount, mount_remount};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tote_agent::agent::{Settings, run};
use tote_agent::containerd::Client;
use tote_agent::import::{Lifetimes, Patience};
use tote_e2e::containerd::Snapshotter;
use tote_e2e::daemon::{Daemon, Options};
use tote_e2e::images::{Image, Layout, preset};
use tote_e2e::registry::{self, Control, Registry, hosts_toml};
use tote_e2e::tools::Containerd;
use tote_image::Digest;
use tote_rpc::AgentClient;
use tote_rpc::identity::{Identity, Role};
use tote_rpc::testing::Pki;
use tote_rpc::v1;

use crate::stream::{Session, ended};

fn sized(mebibytes: u64) -> CString {
    CString::new(format!("size={mebibytes}m")).unwrap()
}

/// Signs for all of these tests.
pub static PKI: LazyLock<Pki> = LazyLock::new(Pki::new);

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().unwrap());

/// How long anything may take here.
pub const WAIT: Duration = Duration::from_secs(120);

/// Runs a client's calls, for [`WAIT`] at most.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    RUNTIME.block_on(async { tokio::time::timeout(WAIT, future).await.expect("in time") })
}

/// The registry that images come from in the first place.
pub struct Source(Registry);

impl Source {
    pub fn start() -> Self {
        let options = registry::Options { listen: "127.0.0.1:0".parse().unwrap(), name: None, storage: None };
        Self(Registry::start(&options).unwrap())
    }

    /// An image and its reference by digest.
    pub fn push(&self, name: &str, seed: &str) -> (Image, String) {
        let image = preset(name, &Layout::temporary().unwrap(), seed).unwrap();
        let reference = self.push_image(&image, name);
        (image, reference)
    }

    pub fn push_image(&self, image: &Image, repository: &str) -> String {
        block_on(self.0.upstream().push(image, repository, None)).unwrap()
    }

    /// Lets a node's containerd pull from the registry.
    pub fn trust(&self, node: &Node) {
        let host = node.daemon.certs_d().join(self.0.upstream().name());
        std::fs::create_dir_all(&host).unwrap();
        std::fs::write(host.join("hosts.toml"), hosts_toml(self.0.address())).unwrap();
    }

    /// Pulls as CRI would: the platform of the node alone.
    pub fn pull(&self, node: &Node, reference: &str) {
        self.trust(node);
        let (certs, snapshotter) = (node.daemon.certs_d(), node.daemon.snapshotter().to_string());
        let mut pull = vec!["images", "pull", "--hosts-dir", certs.to_str().unwrap()];
        if node.daemon.version() == Containerd::V2 {
            // Its transfer service unpacks with the default snapshotter alone.
            pull.push("--local");
        }
        pull.extend(["--snapshotter", &snapshotter, reference]);
        node.daemon.ctr(&pull).unwrap();
    }
}

/// A containerd and its agent.
pub struct Node {
    pub daemon: Daemon,
    name: String,
    bandwidth: Option<&'static str>,
    agent: Option<(Runtime, SocketAddr)>,
}

impl Node {
    pub fn start(version: Containerd, snapshotter: Snapshotter, bandwidth: Option<&'static str>) -> Self {
        Self::start_with(Options::new(version).snapshotter(snapshotter), bandwidth)
    }

    /// On such a containerd.
    pub fn start_with(options: Options, bandwidth: Option<&'static str>) -> Self {
        let daemon = Daemon::start(options).unwrap();
        let name = format!("node-{}", daemon.dir().file_name().unwrap().to_str().unwrap().to_lowercase());
        let mut node = Self { daemon, name, bandwidth, agent: None };
        node.start_agent();
        node
    }

    pub fn start_agent(&mut self) {
        let runtime = Runtime::new().unwrap();
        let listener = block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let listener = listener.into_std().unwrap();
        let settings = Settings {
            node_name: self.name.clone(),
            max_bandwidth: self.bandwidth.map(|rate| rate.parse().unwrap()),
            max_upload: None,
            patience: Patience::default(),
            lifetimes: Lifetimes::default(),
            identity: PKI.node(&self.name, "127.0.0.1"),
            mounts: None,
            records: None,
        };
        let socket = self.daemon.socket();
        runtime.spawn(async move {
            let containerd = Arc::new(Client::new(&socket).with_files());
            let listener = TcpListener::from_std(listener).unwrap();
            run(containerd, settings, listener, None, CancellationToken::new()).await.unwrap();
        });
        self.agent = Some((runtime, address));
    }

    /// Starts containerd and the agent again, on an empty file system of so many MiB.
    pub fn shrink(&mut self, mebibytes: u64) {
        self.kill_agent();
        self.daemon.stop().unwrap();
        mount("tmpfs", self.daemon.root(), "tmpfs", MountFlags::empty(), sized(mebibytes).as_c_str())
            .unwrap();
        self.daemon.restart().unwrap();
        self.start_agent();
    }

    /// Gives the file system another size.
    pub fn resize(&self, mebibytes: u64) {
        mount_remount(self.daemon.root(), MountFlags::empty(), sized(mebibytes).as_c_str()).unwrap();
    }

    /// Bytes that are free in containerd's file system.
    pub fn free(&self) -> u64 {
        let stat = rustix::fs::statvfs(self.daemon.root()).unwrap();
        stat.f_bfree * stat.f_frsize
    }

    /// As SIGKILL would: no task runs on, nothing is cleaned up.
    pub fn kill_agent(&mut self) {
        let (runtime, _) = self.agent.take().unwrap();
        runtime.shutdown_background();
    }

    pub fn address(&self) -> SocketAddr {
        self.agent.as_ref().unwrap().1
    }

    pub fn source(&self) -> v1::Source {
        v1::Source {
            node_name: self.name.clone(),
            address: self.address().to_string(),
            ..v1::Source::default()
        }
    }

    /// As the leader calls it.
    pub async fn agent(&self) -> AgentClient {
        self.agent_of(&PKI).await
    }

    /// As a leader calls it whom this authority has certified.
    pub async fn agent_of(&self, pki: &Pki) -> AgentClient {
        self.agent_as(&pki.controller()).await
    }

    /// As anybody calls it.
    pub async fn agent_as(&self, identity: &Arc<Identity>) -> AgentClient {
        let connection = tote_rpc::connect(self.address(), &self.name, identity).await.unwrap();
        connection.into_client().unwrap()
    }

    /// Hands it a certificate of an authority, and those to trust.
    pub async fn certify(&self, agent: &mut AgentClient, signer: &Pki, trusted: &[&Pki]) {
        let address = Some(self.address().ip());
        let connection = tote_rpc::connect(self.address(), &self.name, &PKI.controller()).await.unwrap();
        let (key, role) = (connection.public_key().unwrap(), Role::Node(self.name.as_str().into()));
        let (now, life) = (SystemTime::now(), WAIT);
        let certificate = signer.authority.sign(&role, address, &key, now, life).unwrap();
        let request = v1::CertifyRequest {
            term: Some(term()),
            certificate: certificate.to_vec(),
            authorities: trusted.iter().map(|pki| pki.authority.certificate().to_vec()).collect(),
        };
        agent.certify(request).await.unwrap();
    }

    /// Lets another node read an image from this one, as the leader would.
    pub async fn grant(&self, id: &str, reader: &str, digest: &str) {
        self.grant_by(&PKI, id, reader, digest).await;
    }

    async fn grant_by(&self, leader: &Pki, id: &str, reader: &str, digest: &str) {
        let request = v1::GrantRequest {
            term: Some(term()),
            transfer_id: id.to_owned(),
            node_name: reader.to_owned(),
            digest: digest.to_owned(),
            seconds: 300,
            expected: false,
        };
        self.agent_of(leader).await.grant(request).await.unwrap();
    }

    /// Starts an import or attaches to it, once the holders let this node read.
    pub async fn attach(
        &self,
        id: &str,
        reference: &str,
        digest: &str,
        holders: &[&Node],
    ) -> Result<Streaming<v1::ImportEvent>, tonic::Status> {
        self.attach_by(&PKI, id, reference, digest, holders).await
    }

    /// The same, for a leader whom another authority has certified.
    pub async fn attach_by(
        &self,
        leader: &Pki,
        id: &str,
        reference: &str,
        digest: &str,
        holders: &[&Node],
    ) -> Result<Streaming<v1::ImportEvent>, tonic::Status> {
        for holder in holders {
            holder.grant_by(leader, id, &self.name, digest).await;
        }
        let mut agent = self.agent_of(leader).await;
        let request = v1::ImportRequest {
            term: Some(term()),
            transfer_id: id.to_owned(),
            reference: reference.to_owned(),
            digest: digest.to_owned(),
            sources: holders.iter().map(|holder| holder.source()).collect(),
            pulled: None,
            max_bytes: 0,
        };
        agent.import(request).await.map(tonic::Response::into_inner)
    }

    /// Imports and waits for the end.
    pub fn import(
        &self,
        id: &str,
        reference: &str,
        digest: &str,
        holders: &[&Node],
    ) -> Result<v1::Done, v1::Failed> {
        let id = format!("{id}-{}", &digest[digest.len() - 8..]);
        block_on(async { ended(&mut self.attach(&id, reference, digest, holders).await.unwrap()).await })
    }

    pub fn cancel(&self, id: &str) -> bool {
        block_on(async {
            let mut agent = self.agent().await;
            let request = v1::CancelRequest { term: Some(term()), transfer_id: id.to_owned() };
            agent.cancel(request).await.unwrap().into_inner().found
        })
    }

    pub async fn session(&self) -> Session {
        let mut agent = self.agent().await;
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        let hello = v1::Hello { term: Some(term()), node_name: self.name.clone() };
        let hello = v1::SessionRequest { message: Some(v1::session_request::Message::Hello(hello)) };
        sender.send(hello).await.unwrap();
        let requests = futures::stream::unfold(receiver, |mut receiver| async {
            receiver.recv().await.map(|request| (request, receiver))
        });
        let responses = agent.session(requests).await.unwrap().into_inner();
        Session::new(responses, sender)
    }

    /// Complete and unpacked, by `ctr`, before and after a collection; no lease, no ingest.
    pub fn check_whole(&self, reference: &str, what: &str) {
        for _ in 0..2 {
            let snapshotter = self.daemon.snapshotter().to_string();
            let filter = format!("name=={reference}");
            let said = self.daemon.ctr(&["images", "check", "--snapshotter", &snapshotter, &filter]).unwrap();
            let line =
                said.lines().find(|line| line.starts_with(reference)).unwrap_or_else(|| panic!("{said}"));
            let complete = line.contains("complete") && !line.contains("incomplete");
            assert!(complete && line.trim_end().ends_with("true"), "{what}: {line}");
            self.check_tidy();
            self.collect();
        }
    }

    /// With its records gone, nothing of the image is left.
    pub fn check_kept(&self, image: &Image, reference: &str, what: &str) {
        let names = self.daemon.ctr(&["images", "ls", "-q"]).unwrap();
        let host = image.host().unwrap();
        let ours = |name: &&str| *name == reference || *name == host.config.digest;
        let names: Vec<&str> = names.lines().filter(ours).collect();
        assert_eq!(names.len(), 2, "{what}: {names:?}");
        self.daemon.ctr(&[&["images", "rm", "--sync"], &names[..]].concat()).unwrap();
        self.collect();
        self.check_nothing();
    }

    /// Removes all images.
    pub fn remove_all(&self) {
        let names = self.daemon.ctr(&["images", "ls", "-q"]).unwrap();
        let names: Vec<&str> = names.lines().collect();
        self.daemon.ctr(&[&["images", "rm", "--sync"], &names[..]].concat()).unwrap();
        self.collect();
    }

    /// No lease and no ingest.
    pub fn check_tidy(&self) {
        assert_eq!(self.daemon.ctr(&["leases", "ls", "-q"]).unwrap().trim(), "", "leases");
        let active = self.daemon.ctr(&["content", "active"]).unwrap();
        assert_eq!(active.lines().count(), 1, "ingests beside the heading: {active}");
    }

    /// As if there had never been an image.
    pub fn check_nothing(&self) {
        self.check_tidy();
        let snapshotter = self.daemon.snapshotter().to_string();
        assert_eq!(self.daemon.ctr(&["images", "ls", "-q"]).unwrap(), "");
        assert_eq!(self.daemon.ctr(&["content", "ls", "-q"]).unwrap(), "");
        let snapshots = self.daemon.ctr(&["snapshots", "--snapshotter", &snapshotter, "ls"]).unwrap();
        assert_eq!(snapshots.lines().count(), 1, "snapshots beside the heading: {snapshots}");
    }

    /// Forces a garbage collection.
    pub fn collect(&self) {
        self.daemon.ctr(&["leases", "create", "--id", "collect"]).unwrap();
        self.daemon.ctr(&["leases", "delete", "--sync", "collect"]).unwrap();
    }

    /// An image's root file system, entry by entry: kind, mode, owner, links, attributes, digest of contents.
    pub fn tree(&self, image: &Image) -> BTreeMap<String, String> {
        let ids: Vec<Digest> = image.host().unwrap().diff_ids.iter().map(|id| id.parse().unwrap()).collect();
        let top = tote_image::chain_ids(&ids).pop().unwrap().to_string();
        let at = tempfile::tempdir().unwrap();
        let path = at.path().to_str().unwrap();
        let snapshotter = self.daemon.snapshotter().to_string();
        let snapshots = |args: &[&str]| {
            self.daemon.ctr(&[&["snapshots", "--snapshotter", &snapshotter], args].concat()).unwrap()
        };
        // No lease holds the view: until it has the label a collection may take it.
        let labelled = (0..10).any(|_| {
            snapshots(&["view", "tree", &top]);
            let label =
                ["snapshots", "--snapshotter", &snapshotter, "label", "tree", "containerd.io/gc.root=here"];
            self.daemon.ctr(&label).is_ok()
        });
        assert!(labelled, "every view of {top} was collected");
        // It prints the command. containerd itself would mount in a mount namespace of its own.
        let mount = snapshots(&["mounts", path, "tree"]);
        let sh = |script: &str| {
            let output = Command::new("sh").args(["-c", script]).output().unwrap();
            assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        };
        sh(&mount);
        let tree = crate::tree::listed(at.path());
        sh(&format!("umount {path}"));
        snapshots(&["rm", "tree"]);
        assert!(tree.len() > 10, "a root file system: {tree:?}, by {mount}");
        tree
    }
}

fn term() -> v1::Term {
    v1::Term { lease_uid: "a-lease".to_owned(), lease_transitions: 1 }
}
