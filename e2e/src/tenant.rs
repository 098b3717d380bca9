//! One scenario's namespace: its pods, jobs and events, and waiting on them with a deadline.
//!
//! A wait that runs out fails with what a person needs: the pods' states, the jobs, the events, and the
//! operator's last log lines. Knows nothing of nodes or registries.

use std::fmt::Write as _;
use std::future::Future;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use k8s_openapi::api::core::v1::{ContainerStatus, Event, Namespace, Pod, Secret};
use kube::api::{DeleteParams, ListParams, LogParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use tote_api::{Phase, SalvageJob};

/// How often a condition is looked at while it is waited for.
const POLL: Duration = Duration::from_millis(50);

/// What a scenario's pod is like. [`PodShape::new`] gives one that waits to be salvaged.
#[derive(Clone, Debug)]
pub struct PodShape {
    /// The image of its one container.
    pub image: String,
    /// The image of an init container that ends at once.
    pub init_image: Option<String>,
    /// `Always`, `IfNotPresent`, `Never`, or what the API server's default is.
    pub pull_policy: Option<&'static str>,
    /// Name of a Secret to pull with.
    pub pull_secret: Option<&'static str>,
    /// Whether the pod is annotated `tote.dev/auto-salvage`.
    pub opted_in: bool,
    /// The node it is bound to.
    pub node: String,
}

impl PodShape {
    /// A pod on a node, opted in.
    pub fn new(node: &str, image: &str) -> Self {
        Self {
            image: image.to_owned(),
            init_image: None,
            pull_policy: None,
            pull_secret: None,
            opted_in: true,
            node: node.to_owned(),
        }
    }

    fn to_pod(&self, name: &str) -> Result<Pod> {
        let container = |name: &str, image: &str| {
            let mut container = json!({ "name": name, "image": image });
            if let Some(policy) = self.pull_policy {
                container["imagePullPolicy"] = json!(policy);
            }
            container
        };
        let mut spec = json!({
            "nodeName": self.node,
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": false,
            "dnsPolicy": "Default",
            "tolerations": [{ "operator": "Exists" }],
            "containers": [container("main", &self.image)],
        });
        if let Some(image) = &self.init_image {
            let mut init = container("init", image);
            init["command"] = json!(["/bin/busybox", "true"]);
            spec["initContainers"] = json!([init]);
        }
        if let Some(secret) = self.pull_secret {
            spec["imagePullSecrets"] = json!([{ "name": secret }]);
        }
        let mut metadata = json!({ "name": name });
        if self.opted_in {
            metadata["annotations"] = json!({ tote_api::names::AUTO_SALVAGE: "true" });
        }
        Ok(serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec,
        }))?)
    }
}

/// A namespace made for one scenario; deleted by [`Tenant::leave`].
#[derive(Clone)]
pub struct Tenant {
    client: Client,
    namespace: String,
}

impl Tenant {
    /// Makes the namespace, annotated `tote.dev/allow` if it is `opted_in`, and waits for its service account.
    pub async fn enter(client: Client, namespace: &str, opted_in: bool) -> Result<Self> {
        let namespaces: Api<Namespace> = Api::all(client.clone());
        let mut object =
            json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": namespace } });
        if opted_in {
            object["metadata"]["annotations"] = json!({ tote_api::names::ALLOW: "true" });
        }
        namespaces.create(&PostParams::default(), &serde_json::from_value(object)?).await?;
        let tenant = Self { client: client.clone(), namespace: namespace.to_owned() };
        let accounts: Api<k8s_openapi::api::core::v1::ServiceAccount> = Api::namespaced(client, namespace);
        tenant
            .until("the default service account", Duration::from_secs(30), || {
                let accounts = accounts.clone();
                async move { Ok(accounts.get_opt("default").await?.map(|_| ())) }
            })
            .await?;
        Ok(tenant)
    }

    /// A namespace that exists, whose end is not the scenario's business: never [`Tenant::leave`] it.
    pub fn of(client: Client, namespace: &str) -> Self {
        Self { client, namespace: namespace.to_owned() }
    }

    /// The namespace's name.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The client it was made with.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Pods of the namespace.
    pub fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Jobs of the namespace.
    pub fn jobs(&self) -> Api<SalvageJob> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Creates a pod.
    pub async fn start(&self, name: &str, shape: &PodShape) -> Result<()> {
        self.pods().create(&PostParams::default(), &shape.to_pod(name)?).await.context("creating the pod")?;
        Ok(())
    }

    /// Creates a Secret to pull from a registry with.
    pub async fn pull_secret(&self, name: &str, registry: &str, login: (&str, &str)) -> Result<()> {
        let auths = json!({"auths": {registry: {"username": login.0, "password": login.1}}});
        let object = json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": { "name": name },
            "type": "kubernetes.io/dockerconfigjson", "stringData": { ".dockerconfigjson": auths.to_string() },
        });
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        secrets.create(&PostParams::default(), &serde_json::from_value(object)?).await?;
        Ok(())
    }

    /// Creates a job by hand, as GitOps would: only name and spec. The API server's refusal comes back as it is.
    pub async fn declare(&self, name: &str, spec: Value) -> kube::Result<SalvageJob> {
        let object = json!({
            "apiVersion": "tote.dev/v1alpha1", "kind": "SalvageJob", "metadata": { "name": name }, "spec": spec,
        });
        let jobs = self.jobs();
        jobs.patch(name, &PatchParams::apply("scenario"), &Patch::Apply(object)).await
    }

    /// Waits until the pod runs, and returns how long that took.
    pub async fn running(&self, pod: &str, deadline: Duration) -> Result<Duration> {
        let begin = Instant::now();
        self.until_pod(pod, "to be ready", deadline, is_ready).await?;
        Ok(begin.elapsed())
    }

    /// Waits until a pod satisfies a predicate.
    pub async fn until_pod(
        &self,
        pod: &str,
        what: &str,
        deadline: Duration,
        is: impl Fn(&Pod) -> bool,
    ) -> Result<Pod> {
        let pods = self.pods();
        let is = &is;
        self.until(&format!("pod {pod} {what}"), deadline, || {
            let pods = pods.clone();
            async move { Ok(pods.get_opt(pod).await?.filter(is)) }
        })
        .await
    }

    /// Waits until a container of the pod waits for one of these reasons, and returns kubelet's message.
    pub async fn failing(&self, pod: &str, reasons: &[&str], deadline: Duration) -> Result<String> {
        let what = format!("to wait with {}", reasons.join(" or "));
        let is = |pod: &Pod| waiting(pod).iter().any(|(reason, _)| reasons.contains(&reason.as_str()));
        let pod = self.until_pod(pod, &what, deadline, is).await?;
        let found = waiting(&pod).into_iter().find(|(reason, _)| reasons.contains(&reason.as_str()));
        Ok(found.map(|(_, message)| message).unwrap_or_default())
    }

    /// Waits until some job of the namespace satisfies a predicate.
    pub async fn until_job(
        &self,
        what: &str,
        deadline: Duration,
        is: impl Fn(&SalvageJob) -> bool,
    ) -> Result<SalvageJob> {
        let jobs = self.jobs();
        let is = &is;
        self.until(&format!("a salvagejob {what}"), deadline, || {
            let jobs = jobs.clone();
            async move { Ok(jobs.list(&ListParams::default()).await?.into_iter().find(is)) }
        })
        .await
    }

    /// Waits until a job is Imported; one that is Failed ends the wait with its message.
    pub async fn imported(&self, deadline: Duration) -> Result<SalvageJob> {
        let job = self.until_job("that is Imported", deadline, |job| phase(job).is_some_and(Phase::is_final));
        let job = job.await?;
        if phase(&job) == Some(Phase::Failed) {
            bail!(
                "job {} Failed: {}\n{}",
                job.name_any(),
                serde_json::to_string_pretty(&job.status)?,
                self.report().await
            );
        }
        Ok(job)
    }

    /// Waits for an event of this reason on an object, and returns its note.
    pub async fn event(&self, object: &str, reason: &str, deadline: Duration) -> Result<String> {
        self.until(&format!("event {reason} on {object}"), deadline, || async move {
            let events = self.events(object).await?;
            Ok(events.into_iter().find(|(r, _)| r == reason).map(|(_, note)| note))
        })
        .await
    }

    /// Reason and note of every event on an object so far.
    pub async fn events(&self, object: &str) -> Result<Vec<(String, String)>> {
        let events: Api<Event> = Api::namespaced(self.client.clone(), &self.namespace);
        let fields = ListParams::default().fields(&format!("involvedObject.name={object}"));
        let listed = events.list(&fields).await?;
        Ok(listed
            .into_iter()
            .map(|e| (e.reason.unwrap_or_default(), e.message.unwrap_or_default()))
            .collect())
    }

    /// Looks again and again until there is an answer; on running out of time, fails with a report.
    pub async fn until<T, F, R>(&self, what: &str, deadline: Duration, mut look: F) -> Result<T>
    where
        F: FnMut() -> R,
        R: Future<Output = Result<Option<T>>>,
    {
        let begin = Instant::now();
        let mut last = None;
        while begin.elapsed() < deadline {
            match look().await {
                Ok(Some(answer)) => return Ok(answer),
                Ok(None) => {}
                Err(error) => last = Some(error),
            }
            tokio::time::sleep(POLL).await;
        }
        let last = last.map(|error| format!(" (last error: {error:#})")).unwrap_or_default();
        Err(anyhow!("waited {} s for {what}{last}\n{}", deadline.as_secs(), self.report().await))
    }

    /// Holds while a condition must not come true: fails as soon as `look` answers.
    pub async fn never<T, F, R>(&self, what: &str, span: Duration, mut look: F) -> Result<()>
    where
        F: FnMut() -> R,
        R: Future<Output = Result<Option<T>>>,
    {
        let begin = Instant::now();
        while begin.elapsed() < span {
            if look().await?.is_some() {
                bail!("{what} after {:.1} s\n{}", begin.elapsed().as_secs_f64(), self.report().await);
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// Deletes the namespace and waits until it is gone; one that is gone already is no error.
    pub async fn leave(self) -> Result<()> {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        match namespaces.delete(&self.namespace, &DeleteParams::default()).await {
            Err(kube::Error::Api(status)) if status.is_not_found() => return Ok(()),
            other => drop(other?),
        }
        self.until("the namespace to go", Duration::from_secs(60), || {
            let namespaces = namespaces.clone();
            let name = self.namespace.clone();
            async move { Ok(namespaces.get_opt(&name).await?.is_none().then_some(())) }
        })
        .await
    }

    /// The state of everything in the namespace and the operator's last words, for a person.
    pub async fn report(&self) -> String {
        let mut text = format!("---- namespace {} ----\n", self.namespace);
        match self.pods().list(&ListParams::default()).await {
            Ok(pods) => {
                for pod in pods {
                    let phase = pod.status.as_ref().and_then(|s| s.phase.clone()).unwrap_or_default();
                    let _ = writeln!(text, "pod {} {phase} {:?}", pod.name_any(), waiting(&pod));
                }
            }
            Err(error) => drop(writeln!(text, "pods: {error}")),
        }
        match self.jobs().list(&ListParams::default()).await {
            Ok(jobs) => {
                for job in jobs {
                    let _ = writeln!(
                        text,
                        "job {} {} {}",
                        job.name_any(),
                        serde_json::to_string(&job.spec).unwrap_or_default(),
                        serde_json::to_string(&job.status).unwrap_or_default()
                    );
                }
            }
            Err(error) => drop(writeln!(text, "salvagejobs: {error}")),
        }
        let events: Api<Event> = Api::namespaced(self.client.clone(), &self.namespace);
        if let Ok(events) = events.list(&ListParams::default()).await {
            for e in events {
                let _ = writeln!(
                    text,
                    "event {} {}: {}",
                    e.involved_object.name.unwrap_or_default(),
                    e.reason.unwrap_or_default(),
                    e.message.unwrap_or_default()
                );
            }
        }
        text.push_str(&operator_logs(&self.client, 25).await);
        text
    }
}

/// The last lines of every pod of the operator.
pub async fn operator_logs(client: &Client, lines: i64) -> String {
    let pods: Api<Pod> = Api::namespaced(client.clone(), "tote-system");
    let mut text = String::new();
    let Ok(listed) = pods.list(&ListParams::default()).await else { return text };
    for pod in listed {
        let name = pod.name_any();
        let node = pod.spec.as_ref().and_then(|s| s.node_name.clone()).unwrap_or_default();
        let _ = writeln!(text, "---- {name} on {node} {:?} ----", waiting(&pod));
        let wanted = LogParams { tail_lines: Some(lines), ..LogParams::default() };
        match pods.logs(&name, &wanted).await {
            Ok(log) => text.push_str(&log),
            Err(error) => drop(writeln!(text, "logs: {error}")),
        }
    }
    text
}

/// Whether the pod's Ready condition is true.
pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

/// The ID of the pod's first container, as its node's containerd knows it.
pub fn container_id(pod: &Pod) -> Option<&str> {
    let first = pod.status.as_ref()?.container_statuses.as_ref()?.first()?;
    first.container_id.as_deref()?.strip_prefix("containerd://")
}

/// Reason and message of every container of the pod that waits, init containers first.
pub fn waiting(pod: &Pod) -> Vec<(String, String)> {
    let Some(status) = &pod.status else { return Vec::new() };
    let of = |statuses: &Option<Vec<ContainerStatus>>| -> Vec<(String, String)> {
        let all = statuses.iter().flatten();
        let waiting = all.filter_map(|c| c.state.as_ref().and_then(|s| s.waiting.as_ref()));
        waiting
            .map(|w| (w.reason.clone().unwrap_or_default(), w.message.clone().unwrap_or_default()))
            .collect()
    };
    let mut all = of(&status.init_container_statuses);
    all.extend(of(&status.container_statuses));
    all
}

/// The job's phase; none before the controller has seen it.
pub fn phase(job: &SalvageJob) -> Option<Phase> {
    job.status.as_ref().and_then(|status| status.phase)
}

/// Reason and message of a job's condition Imported; empty before its first status.
pub fn imported_reason(job: &SalvageJob) -> (String, String) {
    let conditions = job.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    let imported = conditions.iter().find(|condition| condition.type_ == "Imported");
    imported.map(|c| (c.reason.clone(), c.message.clone())).unwrap_or_default()
}
