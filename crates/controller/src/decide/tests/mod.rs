//! Events in, actions out: the whole of what the controller decides, without a cluster.

mod access;
mod classes;
mod inform;
mod jobs;
mod known;
mod nodes;
mod notes;
mod owners;
mod pods;
mod relays;
mod told;
mod unpacked;
mod upstream;

use serde_json::json;
use tote_api::{SalvageJob, names};
use tote_image::{Digest, Platform};
use tote_rpc::v1::PullRecords;

use super::*;
use crate::access::Policy as AccessPolicy;
use crate::detect::class::Class;
use crate::detect::{Consent, Wait};
use crate::fleet::{FleetEvent, Image, Manifest};
use crate::nodes::NodeFacts;
use crate::salvage::{Progress, after};

struct Bench {
    state: State,
    now: Timestamp,
    jobs: i64,
    /// The API server's resource version.
    version: u64,
}

fn digest(n: u8) -> Digest {
    Digest::sha256(&[n])
}

fn image(n: u8, names: &[&str], complete: bool) -> Image {
    Image {
        target: digest(n),
        names: names.iter().map(|&name| name.into()).collect(),
        manifests: vec![Manifest {
            digest: digest(n + 100),
            platform: Platform::new("linux", "amd64", ""),
            complete,
            unpacked: false,
            size: 1 << 20,
            missing: None,
            created: 0,
            image_id: Some(digest(n + 200)),
            pulled: None,
        }],
    }
}

impl Bench {
    /// Nodes `a`, `b`, `c` with agents and nothing on them; namespace `shop` opted in.
    fn new() -> Self {
        Self::under(|_| {})
    }

    /// The same under another policy.
    fn under(edit: impl Fn(&mut Policy)) -> Self {
        let mut bench = Self::with_policy(edit);
        bench.list();
        bench.on(Event::Fleet(FleetEvent::Expected(["a".into(), "b".into(), "c".into()].into())));
        for node in ["a", "b", "c"] {
            bench.up(node, vec![]);
        }
        assert_eq!(bench.decide(), []);
        bench
    }

    /// Every watch has told all there is.
    fn list(&mut self) {
        for kind in Kind::ALL {
            let seen = match kind {
                Kind::Namespaces => ["shop", "work", "kube-system"].map(Arc::from).into(),
                Kind::Nodes => ["a", "b", "c"].map(Arc::from).into(),
                _ => HashSet::new(),
            };
            self.on(Event::Listed(kind, seen));
        }
    }

    fn cold(enabled: bool) -> Self {
        Self::with_policy(|policy| policy.enabled = enabled)
    }

    fn with_policy(edit: impl Fn(&mut Policy)) -> Self {
        let limits = Limits { cluster: 2, target: 2, source: 2 };
        let (images, tags, access) = (Images::default(), TagPolicy::Refuse, AccessPolicy::Records);
        let classes = Classes::default();
        let mut policy = Policy { enabled: true, images, classes, limits, tags, look_up: false, access };
        edit(&mut policy);
        let state = State::new(policy);
        let mut bench = Self { state, now: "2026-01-01T00:00:00Z".parse().unwrap(), jobs: 0, version: 0 };
        for (name, says) in
            [("shop", Consent::Given), ("work", Consent::NotGiven), ("kube-system", Consent::Denied)]
        {
            bench.on(Event::Namespace { name: name.into(), consent: Some(says) });
        }
        for node in ["a", "b", "c"] {
            bench.node(node, |_| {});
        }
        bench
    }

    fn node(&mut self, name: &str, edit: impl Fn(&mut NodeFacts)) {
        let mut facts = NodeFacts::ready(&format!("uid-{name}"));
        edit(&mut facts);
        self.on(Event::Node { name: name.into(), facts: Some(facts) });
    }

    fn on(&mut self, event: Event) {
        self.state.apply(event, self.now);
    }

    fn up(&mut self, node: &str, images: Vec<Image>) {
        self.up_as(node, (Platform::new("linux", "amd64", ""), PullRecords::Kept), images);
    }

    fn up_as(&mut self, node: &str, (platform, records): (Platform, PullRecords), images: Vec<Image>) {
        self.on(Event::Fleet(FleetEvent::Up {
            node: node.into(),
            address: format!("{node}:9090"),
            platform,
            problem: String::new(),
            records,
            images,
        }));
    }

    fn waits(&mut self, pod: &str, node: &str, image: &str) {
        self.waits_in("shop", pod, node, image, |_| {});
    }

    fn waits_in(
        &mut self,
        namespace: &str,
        pod: &str,
        node: &str,
        image: &str,
        edit: impl Fn(&mut WaitingPod),
    ) {
        let wait = Wait {
            field_path: "spec.containers{web}".into(),
            image: image.into(),
            reference: image.parse().map_err(|error: tote_image::ReferenceError| error.to_string()),
            policy_always: false,
            reason: "ErrImagePull".into(),
            message: "".into(),
            last_pull_error: None,
            class: Class::Refused,
        };
        let mut waiting = WaitingPod {
            namespace: namespace.into(),
            name: pod.into(),
            uid: format!("uid-{pod}").into(),
            node: node.into(),
            says: Some(true),
            controller: None,
            pull_secrets: vec![],
            imported_at: None,
            waits: vec![wait],
        };
        edit(&mut waiting);
        self.on(Event::Pod { uid: waiting.uid.clone(), waiting: Some(waiting) });
    }

    #[allow(clippy::needless_pass_by_value)] // reads better at the call
    fn job(&mut self, name: &str, spec: serde_json::Value, automatic: bool) -> String {
        self.jobs += 1;
        let uid = format!("job-{}", self.jobs);
        let labels = if automatic { json!({names::MANAGED_BY: names::MANAGER}) } else { json!({}) };
        let job: SalvageJob = serde_json::from_value(json!({
            "apiVersion": "tote.dev/v1alpha1", "kind": "SalvageJob",
            "metadata": {"namespace": "shop", "name": name, "uid": uid, "generation": 1, "labels": labels,
                "creationTimestamp": self.now.to_string()},
            "spec": spec, "status": {"observedGeneration": -1, "phase": "Pending"}
        }))
        .unwrap();
        self.on(Event::Job(Box::new(job)));
        uid
    }

    /// Decides, and plays the API server: makes jobs that are asked for, acknowledges statuses.
    fn decide(&mut self) -> Vec<Action> {
        let mut all = Vec::new();
        for _ in 0..10 {
            let actions = self.state.decide(self.now).actions;
            let mut changed = false;
            for action in &actions {
                match action {
                    Action::CreateJob(new) => {
                        let spec = json!({"image": &*new.image, "digest": new.digest.as_str(), "nodeName": &*new.node,
                            "pendingDeadlineSeconds": 3600, "ttlSecondsAfterFinished": 604_800});
                        self.job(&new.name, spec, true);
                        self.on(Event::Created { base: new.base.clone(), answer: CreateAnswer::Made });
                        changed = true;
                    }
                    Action::WriteStatus { uid, .. } => {
                        self.version += 1;
                        self.on(Event::StatusWritten { uid: uid.clone(), version: Some(self.version) });
                        changed = true;
                    }
                    _ => {}
                }
            }
            all.extend(actions);
            if !changed {
                break;
            }
        }
        all
    }

    fn pass(&mut self, seconds: i64) -> Vec<Action> {
        self.now = after(self.now, seconds);
        self.decide()
    }

    fn transfer(&mut self, uid: &str, event: TransferEvent) {
        let crate::salvage::Run::Running { stream, .. } = self.state.jobs[uid].0.run else {
            panic!("{uid} does not run: {:?}", self.state.jobs[uid].0.run)
        };
        self.on(Event::Transfer { uid: uid.into(), stream, event });
    }

    fn reason(&self, uid: &str) -> (Phase, String) {
        let (job, _) = &self.state.jobs[uid];
        (job.phase(), job.reason().to_owned())
    }

    fn message(&self, uid: &str) -> String {
        crate::salvage::status::message(&self.state.jobs[uid].0.status).to_owned()
    }
}

fn told(actions: &[Action], wanted: &str) -> Vec<String> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::Tell { reason, note, about, .. } if reason == wanted && about.kind == "Pod" => {
                Some(note.clone())
            }
            _ => None,
        })
        .collect()
}

fn imports(actions: &[Action]) -> Vec<(String, String, Vec<String>)> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::Import { node, reference, sources, .. } => Some((
                node.to_string(),
                reference.clone(),
                sources.iter().map(|source| source.node.to_string()).collect(),
            )),
            _ => None,
        })
        .collect()
}

fn woken(actions: &[Action]) -> Vec<(String, BTreeMap<String, String>)> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::WakePod { name, annotations, .. } => Some((name.to_string(), annotations.clone())),
            _ => None,
        })
        .collect()
}

fn created(actions: &[Action]) -> Vec<String> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::CreateJob(job) => Some(job.name.clone()),
            _ => None,
        })
        .collect()
}

fn deleted(actions: &[Action]) -> bool {
    actions.iter().any(|action| matches!(action, Action::DeleteJob { .. }))
}

fn done() -> TransferEvent {
    TransferEvent::Done(Progress {
        total: 5 << 20,
        transferred: 5 << 20,
        reused: 0,
        source_nodes: vec!["a".into()],
        ..Progress::default()
    })
}

fn failed(retryable: bool) -> TransferEvent {
    TransferEvent::Failed { reason: "NameConflict", message: "taken".into(), retryable, lying_nodes: vec![] }
}
