//! What a pod waits for, and what it runs, by its containers' statuses.
//!
//! The reasons are those of kubelet 1.36: `pkg/kubelet/images/types.go`, `cri-api/pkg/errors` and, of a container that
//! could not be made, `pkg/kubelet/kuberuntime/kuberuntime_container.go`. A pod's phase does not matter: a container
//! that is started again may find its image gone while the pod is Running.

use std::collections::BTreeMap;
use std::sync::Arc;

use tote_api::names;
use tote_image::{Digest, Reference, ReferenceError};

use super::class::{Class, Evidence, classify};
use super::says;
use crate::running::Runs;
use crate::text;

/// The most bytes kept of what kubelet says of a container.
const MAX_MESSAGE: usize = 2048;

/// Of an image that could not be pulled.
const PULL_FAILED: [&str; 3] = ["ErrImagePull", "RegistryUnavailable", "SignatureValidationFailed"];

/// Of an image that is not there for another reason, or not tried at present.
const NOT_THERE: [&str; 4] =
    ["ImagePullBackOff", "ErrImageNeverPull", "ImageInspectError", "InvalidImageName"];

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
    /// UID of the owner reference that says `controller: true`.
    pub controller: Option<String>,
    /// Whether `metadata.deletionTimestamp` is set.
    pub terminating: bool,
    /// `spec.nodeName`, empty while the pod is not scheduled.
    pub node: String,
    /// Names of `spec.imagePullSecrets`.
    pub pull_secrets: Vec<String>,
    /// Those of `spec.volumes` that are images.
    pub volumes: Vec<VolumeView>,
    /// Init containers, sidecars among them, then containers, then ephemeral containers.
    pub containers: Vec<ContainerView>,
}

/// An image volume.
#[derive(Clone, Debug, Default)]
pub struct VolumeView {
    /// Its name.
    pub name: String,
    /// `image.reference`.
    pub image: String,
    /// `image.pullPolicy`; the API server has filled it in.
    pub pull_policy: String,
}

/// A container of spec with its status.
#[derive(Clone, Debug, Default)]
pub struct ContainerView {
    /// Its path as events give it: `spec.containers{web}`.
    pub field_path: String,
    /// The image as the pod writes it.
    pub image: String,
    /// `imagePullPolicy`; the API server has filled it in.
    pub pull_policy: String,
    /// Names of the volumes it mounts.
    pub mounts: Vec<String>,
    /// `state.waiting.reason`, empty if it does not wait.
    pub waiting_reason: String,
    /// `state.waiting.message`.
    pub waiting_message: String,
    /// `imageID` of the status while the container runs, else empty.
    pub running_id: String,
    /// `image` of the status: what it was started from, which is no longer what spec says once that was changed in place.
    pub running_image: String,
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
    /// Whether the pod itself says that it is opted in; `None` if it says nothing, and its controllers decide.
    pub says: Option<bool>,
    /// UID of its controller.
    pub controller: Option<Arc<str>>,
    /// Names of its pull secrets.
    pub pull_secrets: Vec<Arc<str>>,
    /// What the controller last wrote of an import for it ([`names::IMPORTED_AT`]).
    pub imported_at: Option<String>,
    /// One for each container that waits; never empty.
    pub waits: Vec<Wait>,
}

/// One container that waits for an image: its own, or that of a volume it mounts.
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
    /// kubelet's message, at most 2 KiB. It changes with a pull, not with a look: kubelet repeats while it backs off.
    pub message: Arc<str>,
    /// What the last pull of this image failed of, if that was seen: older kubelets do not say it while they back off.
    pub last_pull_error: Option<Arc<str>>,
    /// Why it waits.
    pub class: Class,
}

impl Wait {
    /// Sets the class by what is known.
    fn classed(mut self) -> Self {
        self.class = classify(&Evidence {
            reason: &self.reason,
            message: &self.message,
            last_pull_error: self.last_pull_error.as_deref(),
            registry_host: self.reference.as_ref().ok().map(Reference::registry),
        });
        self
    }

    /// Takes over from what was known of the pod what the last pull failed of.
    pub(crate) fn remembering(mut self, before: &WaitingPod) -> Self {
        if self.last_pull_error.is_some() {
            return self;
        }
        let was = |wait: &&Wait| wait.field_path == self.field_path && wait.image == self.image;
        match before.waits.iter().find(was).and_then(|wait| wait.last_pull_error.clone()) {
            None => self,
            known => {
                self.last_pull_error = known;
                self.classed()
            }
        }
    }
}

/// What the pod waits for; `None` if it waits for no image, is on no node, or is being deleted.
pub fn waiting(pod: &PodView) -> Option<WaitingPod> {
    if pod.node.is_empty() || pod.terminating {
        return None;
    }
    let waits: Vec<Wait> =
        pod.containers.iter().filter(|c| is_for_an_image(c)).map(|c| wait(c, &pod.volumes)).collect();
    (!waits.is_empty()).then(|| WaitingPod {
        namespace: pod.namespace.as_str().into(),
        name: pod.name.as_str().into(),
        uid: pod.uid.as_str().into(),
        node: pod.node.as_str().into(),
        says: says(Some(&pod.annotations)),
        controller: pod.controller.as_deref().map(Into::into),
        pull_secrets: pod.pull_secrets.iter().map(|name| name.as_str().into()).collect(),
        imported_at: pod.annotations.get(names::IMPORTED_AT).cloned(),
        waits,
    })
}

fn is_for_an_image(container: &ContainerView) -> bool {
    let reason = container.waiting_reason.as_str();
    // A container may not be made for many reasons; those that its image has are classes of their own.
    let of_its_image = || {
        let evidence = Evidence { reason, message: &container.waiting_message, ..Evidence::default() };
        matches!(classify(&evidence), Class::CorruptStore | Class::Unpack)
    };
    PULL_FAILED.contains(&reason)
        || NOT_THERE.contains(&reason)
        || (reason == "CreateContainerError" && of_its_image())
}

fn wait(container: &ContainerView, volumes: &[VolumeView]) -> Wait {
    let message: Arc<str> = text::bounded(&container.waiting_message, MAX_MESSAGE).into();
    let (image, policy) = waited_for(container, volumes);
    let failed = PULL_FAILED.contains(&container.waiting_reason.as_str()) && !message.is_empty();
    Wait {
        field_path: container.field_path.clone(),
        image: image.into(),
        reference: image.parse().map_err(|error: ReferenceError| error.to_string()),
        policy_always: policy == "Always",
        reason: container.waiting_reason.clone(),
        last_pull_error: failed.then(|| message.clone()),
        message,
        class: Class::Unknown,
    }
    .classed()
}

/// The image a container waits for, with its pull policy. Kubelet ensures the images of all volumes before that of any
/// container, with the volume's own policy, and has each container that mounts a volume fail with the volume's reason
/// and message (`getImageVolumes` and `toKubeContainerImageVolumes` in `kuberuntime_manager.go`). Only the message tells
/// which image it is, by its name: as the pod has it (`Back-off pulling image "x"`, `pull failed for x because`,
/// `image "x" is not present`), or as containerd has it. One that names none is taken to be about the container's own.
fn waited_for<'a>(container: &'a ContainerView, volumes: &'a [VolumeView]) -> (&'a str, &'a str) {
    let own = (container.image.as_str(), container.pull_policy.as_str());
    let mounted = volumes.iter().filter(|volume| container.mounts.contains(&volume.name));
    let mounted: Vec<_> = mounted.map(|v| (v.image.as_str(), v.pull_policy.as_str())).collect();
    if mounted.is_empty() {
        return own;
    }
    let named = |image: &str| {
        let full = image.parse::<Reference>().map(|reference| reference.to_string()).unwrap_or_default();
        let mut names = vec![format!("{image:?}"), format!(" for {image} because ")];
        if !full.is_empty() {
            names.push(format!("{full:?}"));
        }
        names.iter().filter_map(|name| container.waiting_message.find(name)).min()
    };
    let all = std::iter::once(own).chain(mounted);
    let first = all.filter_map(|image| named(image.0).map(|at| (at, image))).min_by_key(|(at, _)| *at);
    first.map_or(own, |(_, image)| image)
}

/// What the pod runs, by tag or digest as the pod writes it; `None` if that is nothing.
pub fn runs(pod: &PodView) -> Option<Runs> {
    let images: Vec<(Arc<str>, Digest)> = pod
        .containers
        .iter()
        .filter(|container| !container.running_id.is_empty())
        .filter_map(|container| {
            let reference: Reference = container.image.parse().ok()?;
            // The runtime gives an image of several names by one of them; then nothing is learnt here.
            let is_current =
                container.running_image.parse::<Reference>().is_ok_and(|image| image == reference);
            if !is_current && reference.digest().is_none() {
                return None;
            }
            Some((reference.to_string().into(), repository_digest(&container.running_id)?))
        })
        .collect();
    (!images.is_empty()).then(|| Runs {
        namespace: pod.namespace.as_str().into(),
        controller: pod.controller.as_deref().map(Into::into),
        images,
    })
}

/// The digest of `repository@sha256:...`, also behind a scheme. One without a repository is a config's.
fn repository_digest(image_id: &str) -> Option<Digest> {
    let (repository, digest) = image_id.rsplit_once('@')?;
    if repository.rsplit("://").next().is_none_or(str::is_empty) {
        return None;
    }
    digest.parse().ok()
}

#[cfg(test)]
mod tests;
