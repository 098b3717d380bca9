//! Pull secrets that kubelet does not find. It says so in an event alone; the pull then fails of something else.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;

use crate::detect::class::{Class, Stance};
use crate::detect::{Wait, WaitingPod};
use crate::salvage::after;

/// For how many seconds it counts: kubelet says so again at every attempt to pull, which may be five minutes apart.
const FRESH_SECONDS: i64 = 600;

/// Pods of a namespace that are remembered, at most. Whoever writes events there can fill that up, for itself.
const REMEMBERED: usize = 1000;

/// When kubelet last missed a secret of a pod, by namespace and the pod's UID: it may say so before the pod is seen to wait.
#[derive(Debug, Default)]
pub(super) struct Secrets(HashMap<Arc<str>, HashMap<Arc<str>, Timestamp>>);

impl Secrets {
    /// Kubelet says so. Tells whether that is news.
    pub(super) fn missing(
        &mut self,
        namespace: Arc<str>,
        uid: Arc<str>,
        at: Timestamp,
        now: Timestamp,
    ) -> bool {
        let pods = self.0.entry(namespace).or_default();
        if pods.len() >= REMEMBERED && !pods.contains_key(&uid) {
            return false;
        }
        let at = at.min(now);
        pods.insert(uid, at).is_none_or(|before| before < at)
    }

    /// Why a container of a pod waits.
    pub(super) fn class_of(&self, pod: &WaitingPod, wait: &Wait, now: Timestamp) -> Class {
        let said = self.0.get(&pod.namespace).and_then(|pods| pods.get(&pod.uid));
        let is_missing = said.is_some_and(|at| after(*at, FRESH_SECONDS) > now);
        let is_pull = !matches!(wait.class, Class::CorruptStore | Class::NeverPolicy | Class::Unpack);
        if is_missing && is_pull && wait.class.stance() != Stance::Never {
            Class::SecretMissing
        } else {
            wait.class
        }
    }

    pub(super) fn forget(&mut self, now: Timestamp) {
        self.0.retain(|_, pods| {
            pods.retain(|_, at| after(*at, FRESH_SECONDS) > now);
            !pods.is_empty()
        });
    }
}
