//! Which object controls which, and what each says of salvage. Pure.
//!
//! A pod that says nothing itself is opted in or not by the nearest of its controllers that says something: its
//! `ReplicaSet`, then the Deployment of that; its Job, then the `CronJob`. An owner that is not known says nothing and
//! leads nowhere, so what is missing opts nobody in.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// The most steps up from a pod. Kubernetes' own chains have two.
const MAX_DEPTH: usize = 8;

/// The kinds that are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum OwnerKind {
    ReplicaSet,
    Deployment,
    StatefulSet,
    DaemonSet,
    Job,
    CronJob,
    ReplicationController,
}

impl OwnerKind {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::ReplicaSet,
        Self::Deployment,
        Self::StatefulSet,
        Self::DaemonSet,
        Self::Job,
        Self::CronJob,
        Self::ReplicationController,
    ];
}

/// What is kept of an object that may control pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its kind.
    pub kind: OwnerKind,
    /// UID of what controls it.
    pub controller: Option<Arc<str>>,
    /// What it says of salvage; see [`crate::detect::says`].
    pub says: Option<bool>,
}

/// Objects that may control pods, by UID. Some 200 bytes for each that has a controller or says something; the others
/// are not kept.
#[derive(Debug, Default)]
pub struct Owners {
    by_uid: HashMap<Arc<str>, Owner>,
}

impl Owners {
    /// Takes in what an object is now, or that it is gone. Tells whether that may make a difference to a pod.
    pub fn set(&mut self, uid: &Arc<str>, owner: Option<Owner>) -> bool {
        // One without either is as good as unknown.
        match owner.filter(|owner| owner.controller.is_some() || owner.says.is_some()) {
            Some(owner) if self.by_uid.get(uid) == Some(&owner) => false,
            Some(owner) => {
                self.by_uid.insert(uid.clone(), owner);
                true
            }
            None => self.by_uid.remove(uid).is_some(),
        }
    }

    /// Forgets the objects of a kind but for these.
    pub fn retain(&mut self, kind: OwnerKind, seen: &HashSet<Arc<str>>) {
        self.by_uid.retain(|uid, owner| owner.kind != kind || seen.contains(uid));
    }

    /// Whether a pod is opted in that says so itself or not, with this controller.
    pub fn opted_in(&self, pod_says: Option<bool>, controller: Option<&str>) -> bool {
        if let Some(says) = pod_says {
            return says;
        }
        let mut known = controller.and_then(|uid| self.by_uid.get(uid));
        for _ in 0..MAX_DEPTH {
            let Some(owner) = known else { return false };
            if let Some(says) = owner.says {
                return says;
            }
            known = owner.controller.as_ref().and_then(|uid| self.by_uid.get(uid));
        }
        false
    }

    /// UID of the controller that nothing known controls, up from this one: the workload.
    pub fn top<'a>(&'a self, uid: &'a str) -> &'a str {
        let mut top = uid;
        for _ in 0..MAX_DEPTH {
            match self.by_uid.get(top).and_then(|owner| owner.controller.as_deref()) {
                Some(above) => top = above,
                None => break,
            }
        }
        top
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(kind: OwnerKind, controller: Option<&str>, says: Option<bool>) -> Owner {
        Owner { kind, controller: controller.map(Into::into), says }
    }

    #[test]
    fn the_nearest_that_says_something_decides() {
        let mut owners = Owners::default();
        assert!(owners.set(&"rs".into(), Some(owner(OwnerKind::ReplicaSet, Some("deploy"), None))));
        assert!(!owners.opted_in(None, Some("rs")), "the Deployment is not known");
        assert!(owners.opted_in(Some(true), Some("rs")));
        assert!(owners.set(&"deploy".into(), Some(owner(OwnerKind::Deployment, None, Some(true)))));
        assert!(
            !owners.set(&"deploy".into(), Some(owner(OwnerKind::Deployment, None, Some(true)))),
            "no news"
        );
        assert!(owners.opted_in(None, Some("rs")));
        assert!(!owners.opted_in(Some(false), Some("rs")), "the pod's own word wins");
        assert!(owners.set(&"rs".into(), Some(owner(OwnerKind::ReplicaSet, Some("deploy"), Some(false)))));
        assert!(!owners.opted_in(None, Some("rs")), "the ReplicaSet is nearer");
        assert!(!owners.opted_in(None, None));
        assert!(!owners.opted_in(None, Some("elsewhere")));
        assert!(owners.set(&"deploy".into(), None), "gone");
        assert!(!owners.opted_in(None, Some("deploy")));
    }

    #[test]
    fn the_workload_is_the_top_and_a_circle_ends() {
        let mut owners = Owners::default();
        owners.set(&"rs".into(), Some(owner(OwnerKind::ReplicaSet, Some("deploy"), None)));
        assert_eq!((owners.top("rs"), owners.top("deploy"), owners.top("x")), ("deploy", "deploy", "x"));
        owners.set(&"deploy".into(), Some(owner(OwnerKind::Deployment, Some("rs"), None)));
        owners.top("rs");
        assert!(!owners.opted_in(None, Some("rs")));
    }

    #[test]
    fn keeps_what_tells_something_and_forgets_what_is_gone() {
        let mut owners = Owners::default();
        assert!(!owners.set(&"plain".into(), Some(owner(OwnerKind::Deployment, None, None))));
        owners.set(&"rs".into(), Some(owner(OwnerKind::ReplicaSet, Some("deploy"), None)));
        owners.set(&"job".into(), Some(owner(OwnerKind::Job, Some("cron"), None)));
        assert_eq!(owners.by_uid.len(), 2);
        owners.retain(OwnerKind::ReplicaSet, &HashSet::new());
        assert_eq!((owners.top("rs"), owners.top("job")), ("rs", "cron"));
    }
}
