//! What a pod waits for, and whether tote may act on it. Pure.
//!
//! Must not know the fleet: whether anybody holds the image is `resolve`'s question.

use std::collections::BTreeMap;
use std::sync::Arc;

use tote_api::names;
use tote_image::Reference;

/// The fields of a Pod that detection reads.
#[derive(Clone, Debug, Default)]
pub struct PodView {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.annotations`.
    pub annotations: BTreeMap<String, String>,
    /// Whether `metadata.deletionTimestamp` is set.
    pub terminating: bool,
    /// `spec.nodeName`, empty while the pod is not scheduled.
    pub node: String,
    /// Names of `spec.imagePullSecrets`; those of its service account are among them.
    pub pull_secrets: Vec<Arc<str>>,
    /// Init containers first, then containers.
    pub containers: Vec<ContainerView>,
}

/// A container of spec with the waiting reason of its status.
#[derive(Clone, Debug, Default)]
pub struct ContainerView {
    /// Its path as events give it: `spec.containers{web}`.
    pub field_path: String,
    /// The image as the pod writes it.
    pub image: String,
    /// `imagePullPolicy`; the API server has filled it in.
    pub pull_policy: String,
    /// `state.waiting.reason`, empty if it does not wait.
    pub waiting_reason: String,
}

/// A pod of which at least one container waits for an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaitingPod {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// UID.
    pub uid: Arc<str>,
    /// The node it is bound to.
    pub node: Arc<str>,
    /// Whether the pod itself is opted in.
    pub opted_in: bool,
    /// What the controller last wrote of an import for it ([`names::IMPORTED_AT`]).
    pub imported_at: Option<String>,
    /// Names of its pull secrets.
    pub pull_secrets: Vec<Arc<str>>,
    /// One for each container that waits; never empty.
    pub waits: Vec<Wait>,
}

/// One container that waits for its image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wait {
    /// `spec.containers{web}`.
    pub field_path: String,
    /// The image as the pod writes it.
    pub image: Arc<str>,
    /// The same, normalized; or why it is no reference.
    pub reference: Result<Reference, String>,
    /// Whether kubelet asks the registry at every start, whatever the node holds.
    pub policy_always: bool,
    /// kubelet's reason.
    pub reason: String,
}

/// What the pod waits for; `None` if it waits for no image, is on no node, or is being deleted.
pub fn waiting(pod: &PodView) -> Option<WaitingPod> {
    if pod.node.is_empty() || pod.terminating {
        return None;
    }
    let waits: Vec<Wait> = pod
        .containers
        .iter()
        .filter(|c| {
            matches!(c.waiting_reason.as_str(), "ErrImagePull" | "ImagePullBackOff" | "ErrImageNeverPull")
        })
        .map(|c| Wait {
            field_path: c.field_path.clone(),
            image: c.image.as_str().into(),
            reference: c.image.parse().map_err(|error: tote_image::ReferenceError| error.to_string()),
            policy_always: c.pull_policy == "Always",
            reason: c.waiting_reason.clone(),
        })
        .collect();
    (!waits.is_empty()).then(|| WaitingPod {
        namespace: pod.namespace.as_str().into(),
        name: pod.name.as_str().into(),
        uid: pod.uid.as_str().into(),
        node: pod.node.as_str().into(),
        opted_in: is_true(&pod.annotations, names::AUTO_SALVAGE),
        imported_at: pod.annotations.get(names::IMPORTED_AT).cloned(),
        pull_secrets: pod.pull_secrets.clone(),
        waits,
    })
}

/// What a namespace says of salvage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consent {
    /// Opted in.
    Given,
    /// The annotation is absent or not `"true"`.
    NotGiven,
    /// One of [`names::DENIED_NAMESPACES`].
    Denied,
    /// It is being deleted, or gone.
    Terminating,
}

/// Whether salvage may act in a namespace.
pub fn consent(name: &str, annotations: &BTreeMap<String, String>, terminating: bool) -> Consent {
    if names::DENIED_NAMESPACES.contains(&name) {
        Consent::Denied
    } else if terminating {
        Consent::Terminating
    } else if is_true(annotations, names::ALLOW) {
        Consent::Given
    } else {
        Consent::NotGiven
    }
}

fn is_true(annotations: &BTreeMap<String, String>, key: &str) -> bool {
    annotations.get(key).is_some_and(|value| value == "true")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(reason: &str) -> PodView {
        PodView {
            namespace: "shop".into(),
            name: "web-0".into(),
            uid: "u".into(),
            annotations: [(names::AUTO_SALVAGE.to_owned(), "true".to_owned())].into(),
            terminating: false,
            node: "n1".into(),
            pull_secrets: vec!["corp".into()],
            containers: vec![
                ContainerView {
                    field_path: "spec.initContainers{init}".into(),
                    image: "busybox".into(),
                    pull_policy: "Always".into(),
                    waiting_reason: String::new(),
                },
                ContainerView {
                    field_path: "spec.containers{web}".into(),
                    image: "r.test/web:v1".into(),
                    pull_policy: "IfNotPresent".into(),
                    waiting_reason: reason.into(),
                },
            ],
        }
    }

    #[test]
    fn sees_the_reasons_of_a_missing_image_and_no_other() {
        for (reason, seen) in [
            ("ErrImagePull", true),
            ("ImagePullBackOff", true),
            ("ErrImageNeverPull", true),
            ("ContainerCreating", false),
            ("PodInitializing", false),
            ("CrashLoopBackOff", false),
            ("InvalidImageName", false),
            ("", false),
        ] {
            let found = waiting(&pod(reason));
            assert_eq!(found.is_some(), seen, "{reason}");
            if let Some(found) = found {
                assert_eq!(found.waits.len(), 1);
                assert_eq!(&*found.waits[0].image, "r.test/web:v1");
                assert!(!found.waits[0].policy_always);
                assert!(found.opted_in);
                assert_eq!(found.pull_secrets, ["corp".into()]);
            }
        }
    }

    #[test]
    fn sees_init_containers() {
        let mut pod = pod("PodInitializing");
        pod.containers[0].waiting_reason = "ErrImagePull".into();
        let found = waiting(&pod).unwrap();
        assert_eq!(found.waits[0].field_path, "spec.initContainers{init}");
        assert!(found.waits[0].policy_always);
    }

    #[test]
    fn leaves_alone_what_is_unscheduled_or_going() {
        let mut unscheduled = pod("ErrImagePull");
        unscheduled.node.clear();
        assert_eq!(waiting(&unscheduled), None);
        let mut going = pod("ErrImagePull");
        going.terminating = true;
        assert_eq!(waiting(&going), None);
    }

    #[test]
    fn only_the_word_true_opts_in() {
        for value in ["True", "1", "yes", "false", ""] {
            let mut pod = pod("ErrImagePull");
            pod.annotations.insert(names::AUTO_SALVAGE.into(), value.into());
            assert!(!waiting(&pod).unwrap().opted_in, "{value}");
            assert_eq!(
                consent("shop", &[(names::ALLOW.into(), value.into())].into(), false),
                Consent::NotGiven
            );
        }
        let allowed: BTreeMap<String, String> = [(names::ALLOW.into(), "true".into())].into();
        assert_eq!(consent("shop", &allowed, false), Consent::Given);
        assert_eq!(consent("shop", &allowed, true), Consent::Terminating);
        for denied in ["kube-system", "kube-public", "kube-node-lease"] {
            assert_eq!(consent(denied, &allowed, false), Consent::Denied);
        }
    }
}
