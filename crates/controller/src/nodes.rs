//! What there is to know of a node, apart from its images. Pure; must not know how it is learned.

use std::sync::Arc;

/// What there is to know of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeFacts {
    /// `metadata.uid`.
    pub uid: Arc<str>,
    /// `spec.unschedulable`: it is being taken out of service.
    pub cordoned: bool,
    /// Condition `DiskPressure`: kubelet evicts pods and deletes images.
    pub disk_pressure: bool,
    /// Condition Ready.
    pub kubelet: Kubelet,
    /// The message of condition Ready, where it is not True.
    pub message: Arc<str>,
}

/// How kubelet fares, by condition Ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kubelet {
    /// True.
    Ready,
    /// False: the container runtime does not answer it.
    RuntimeDown,
    /// False for another reason, or Unknown, or never told.
    NotReady,
}

impl NodeFacts {
    /// A node with nothing the matter.
    pub fn ready(uid: &str) -> Self {
        Self {
            uid: uid.into(),
            cordoned: false,
            disk_pressure: false,
            kubelet: Kubelet::Ready,
            message: "".into(),
        }
    }

    /// Whether there is anything to decide anew: a message may count seconds.
    pub fn is_news_after(&self, before: &Self) -> bool {
        let gist = |facts: &Self| (facts.uid.clone(), facts.cordoned, facts.disk_pressure, facts.kubelet);
        gist(self) != gist(before)
    }
}
