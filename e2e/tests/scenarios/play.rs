//! A scenario's own corner: a namespace and a registry, the common path, and what must hold after a salvage.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use kube::ResourceExt as _;
use kube::api::ListParams;
use tote_api::names;
use tote_e2e::cluster::{Cluster, Node};
use tote_e2e::images::{Image, Layout, preset};
use tote_e2e::registry::{Control as _, Registry};
use tote_e2e::tenant::{PodShape, Tenant};
use tote_e2e::{host, inspect, operator, rootfs};

use crate::stage::{self, Alone, Big, SOON, Scenario, Stage};

/// A scenario's own corner of the stage.
pub struct Play {
    stage: Arc<Stage>,
    scenario: Scenario,
    layout: Layout,
    /// Its registry, at an address of its own that every node trusts.
    pub registry: Registry,
    /// Its namespace, opted in.
    pub tenant: Tenant,
}

impl Play {
    /// Its namespace and registry.
    pub async fn enter(stage: Arc<Stage>, scenario: Scenario) -> Result<Self> {
        let registry = stage.registry()?;
        let namespace = scenario.name.replace('_', "-");
        let tenant = Tenant::enter(stage.client.clone(), &namespace, true).await?;
        Ok(Self { layout: Layout::temporary()?, stage, scenario, registry, tenant })
    }

    /// The cluster, for what a scenario does to it.
    pub fn cluster(&self) -> &Cluster {
        &self.stage.cluster
    }

    /// The operator, as it was when the scenario began.
    pub fn install_operator(&self) -> Result<()> {
        tokio::task::block_in_place(|| stage::install(&self.stage.cluster, &[]))
    }

    /// Changes values of the operator's chart; [`Play::install_operator`] takes that back.
    pub fn upgrade_operator(&self, values: &[&str]) -> Result<()> {
        let chart = operator::checkout().join("charts/tote").display().to_string();
        let mut helm = self.cluster().helm(&["upgrade", "tote", &chart, "-n", operator::NAMESPACE])?;
        helm.args(["--reuse-values", "--wait", "--timeout", "90s"]);
        for value in values {
            helm.args(["--set", value]);
        }
        tokio::task::block_in_place(|| host::run(&mut helm)).map(drop)
    }

    /// The image of 500 MB that n1 holds.
    pub async fn big(&self) -> Result<&Big> {
        self.stage.big().await
    }

    /// The node that pulls while the registry is well.
    pub fn source(&self) -> Result<&Node> {
        self.stage.cluster.node(self.scenario.source)
    }

    /// The node that cannot pull.
    pub fn target(&self) -> Result<&Node> {
        self.stage.cluster.node(self.scenario.target)
    }

    /// Builds an image of this kind, unlike any other scenario's and any other run's.
    pub fn image(&self, kind: &str) -> Result<Image> {
        self.image_seeded(kind, "")
    }

    /// As [`Play::image`], for a scenario that needs several of one kind.
    pub fn image_seeded(&self, kind: &str, seed: &str) -> Result<Image> {
        preset(kind, &self.layout, &format!("{} {} {seed}", self.stage.run, self.scenario.name))
    }

    /// Pushes it under a tag of the repository `app`; returns the reference by tag and the one by digest.
    pub async fn push(&self, image: &Image) -> Result<(String, String)> {
        self.push_as(image, "app").await
    }

    /// As [`Play::push`], to another repository.
    pub async fn push_as(&self, image: &Image, repository: &str) -> Result<(String, String)> {
        let pinned = self.registry.upstream().push(image, repository, Some("v1")).await?;
        Ok((format!("{}/{repository}:v1", self.registry.upstream().name()), pinned))
    }

    /// Lets kubelet on the source pull the reference, by a pod that runs; its name is `source`.
    pub async fn pull_on_source(&self, reference: &str) -> Result<()> {
        self.pull_on("source", self.scenario.source, reference).await
    }

    /// Lets kubelet on a node pull the reference, by a pod that runs.
    pub async fn pull_on(&self, pod: &str, node: &str, reference: &str) -> Result<()> {
        let shape = PodShape { opted_in: false, ..PodShape::new(node, reference) };
        self.tenant.start(pod, &shape).await?;
        self.tenant.running(pod, SOON).await?;
        Ok(())
    }

    /// A pod on the target, opted in.
    pub async fn start_on_target(&self, pod: &str, reference: &str) -> Result<()> {
        self.tenant.start(pod, &PodShape::new(self.scenario.target, reference)).await
    }

    /// The common path: pulled on the source, the registry stopped, a pod on the target that runs all the same,
    /// and the salvaged image whole in every respect.
    pub async fn salvage(&self, image: &Image, by_tag: bool) -> Result<()> {
        let (tagged, pinned) = self.push(image).await?;
        let reference = if by_tag { tagged } else { pinned };
        self.pull_on_source(&reference).await?;
        self.registry.stop()?;
        self.start_on_target("waiting", &reference).await?;
        self.tenant.imported(SOON).await?;
        self.tenant.running("waiting", SOON).await?;
        self.assert_told(image).await?;
        self.assert_intact(image, &reference).await
    }

    /// The pod's and the job's events, and the pod's annotations.
    async fn assert_told(&self, image: &Image) -> Result<()> {
        self.tenant.event("waiting", names::event::IMAGE_SALVAGEABLE, SOON).await?;
        self.tenant.event("waiting", names::event::IMAGE_SALVAGED, SOON).await?;
        let job = self.tenant.imported(SOON).await?;
        let kept = (job.spec.ttl_seconds_after_finished, job.spec.pending_deadline_seconds);
        ensure!(kept == (Some(168 * 3600), Some(3600)), "TTL and deadline of a job of detection: {kept:?}");
        let job = job.name_any();
        for reason in ["Transferring", "Imported"] {
            self.tenant.event(&job, reason, SOON).await?;
        }
        let pod = self.tenant.pods().get("waiting").await?;
        ensure!(pod.annotations().get(names::SALVAGED_DIGEST).map(String::as_str) == Some(image.digest()));
        let at = pod.annotations().get(names::IMPORTED_AT).context("no annotation of the time of import")?;
        at.parse::<k8s_openapi::jiff::Timestamp>().with_context(|| format!("{at:?} is no time"))?;
        Ok(())
    }

    /// As [`Play::assert_intact_in`], of what pod `source` runs in pod `waiting`.
    pub async fn assert_intact(&self, image: &Image, reference: &str) -> Result<()> {
        self.assert_intact_in(image, reference, "source", "waiting", self.target()?).await
    }

    /// After a salvage of what one pod runs on the source into another on `target`: complete and unpacked by `ctr`,
    /// the same root file system, whole after a forced collection, nothing left unfinished, and nothing left at all
    /// once the pod and the records are removed.
    pub async fn assert_intact_in(
        &self,
        image: &Image,
        reference: &str,
        source: &str,
        waiting: &str,
        target: &Node,
    ) -> Result<()> {
        self.assert_same_root((&self.tenant, source), waiting, target).await?;
        let name = reference.parse::<tote_image::Reference>()?.to_string();
        tokio::task::block_in_place(|| {
            inspect::assert_whole(target, &name)?;
            inspect::collect_garbage(target)?;
            inspect::assert_whole(target, &name)
        })?;
        self.assert_nothing_unfinished(image).await?;
        self.stop_pod(waiting).await?;
        tokio::task::block_in_place(|| inspect::remove_whole(target, image))
    }

    /// The root file system of a pod on `target` is that of the source's pod, which may be another tenant's.
    pub async fn assert_same_root(
        &self,
        (tenant, source): (&Tenant, &str),
        waiting: &str,
        target: &Node,
    ) -> Result<()> {
        let theirs = root_of(tenant, source, self.source()?).await?;
        let ours = root_of(&self.tenant, waiting, target).await?;
        ensure!(!theirs.is_empty(), "the source's root file system is empty");
        for (path, line) in &theirs {
            ensure!(ours.get(path) == Some(line), "{}: {line} became {:?}", path.display(), ours.get(path));
        }
        ensure!(theirs.len() == ours.len(), "{} paths became {}", theirs.len(), ours.len());
        Ok(())
    }

    /// No lease and no ingest of this scenario's transfers is left on any node; they may take a moment to go. Those
    /// of other scenarios that are under way do not count, unless this one has the operator for itself.
    pub async fn assert_nothing_unfinished(&self, image: &Image) -> Result<()> {
        self.nothing_unfinished_within(image, SOON).await
    }

    /// As [`Play::assert_nothing_unfinished`], with a deadline of its own.
    pub async fn nothing_unfinished_within(&self, image: &Image, deadline: Duration) -> Result<()> {
        let mut own: Vec<String> = image.blobs().into_iter().map(|blob| blob.digest).collect();
        let jobs = self.tenant.jobs().list(&ListParams::default()).await?;
        own.extend(jobs.into_iter().filter_map(|job| job.metadata.uid));
        let everything = self.scenario.alone == Alone::Operator;
        let begin = Instant::now();
        loop {
            let mut left = Vec::new();
            for node in self.stage.cluster.nodes() {
                let found = inspect::unfinished(node)?.into_iter();
                let counts = |one: &String| everything || own.iter().any(|id| one.contains(id.as_str()));
                left.extend(found.filter(counts).map(|one| format!("{}: {one}", node.name())));
            }
            if left.is_empty() {
                return Ok(());
            }
            ensure!(
                begin.elapsed() < deadline,
                "left behind:\n{}\n{}",
                left.join("\n"),
                self.tenant.report().await
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Deletes a pod and waits until it is gone.
    pub async fn stop_pod(&self, pod: &str) -> Result<()> {
        let pods = self.tenant.pods();
        pods.delete(pod, &kube::api::DeleteParams::default().grace_period(0)).await?;
        self.tenant
            .until(&format!("pod {pod} to go"), SOON, || async {
                Ok(pods.get_opt(pod).await?.is_none().then_some(()))
            })
            .await
    }
}

/// The root file system of a pod's container, as its node mounts it.
async fn root_of(tenant: &Tenant, pod: &str, node: &Node) -> Result<BTreeMap<PathBuf, String>> {
    let object = tenant.pods().get(pod).await?;
    let status = object.status.and_then(|status| status.container_statuses).unwrap_or_default();
    let id = status.first().and_then(|container| container.container_id.as_deref());
    let Some(id) = id.and_then(|id| id.strip_prefix("containerd://")) else {
        bail!("pod {pod} has no container")
    };
    let task = format!("run/containerd/io.containerd.runtime.v2.task/k8s.io/{id}/rootfs");
    // A process of the node's mount namespace shows what is mounted there.
    let mut inside = node.command(&["sleep", "600"])?.spawn().context("entering the node")?;
    let root = Path::new("/proc").join(inside.id().to_string()).join("root").join(task);
    let entered =
        tenant.until("the node's mount namespace", SOON, || async { Ok(root.exists().then_some(())) });
    let found = match entered.await {
        Ok(()) => tokio::task::block_in_place(|| rootfs::fingerprint(&root)),
        Err(error) => Err(error),
    };
    inside.kill()?;
    inside.wait()?;
    found
}
