//! Pull secrets that kubelet does not find. It says so in an event alone; the pull then fails of something else.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;

use crate::detect::Wait;
use crate::detect::class::{Class, Stance};
use crate::salvage::after;

/// For how many seconds it counts: kubelet says so again at every attempt to pull, which may be five minutes apart.
const FRESH_SECONDS: i64 = 600;

/// Pods remembered, at most.
const REMEMBERED: usize = 10_000;

/// When kubelet last missed a secret of a pod, by the pod's UID: it may say so before the pod is seen to wait.
#[derive(Debug, Default)]
pub(super) struct Secrets(HashMap<Arc<str>, Timestamp>);

impl Secrets {
    /// Kubelet says so. Tells whether that is news.
    pub(super) fn missing(&mut self, uid: Arc<str>, at: Timestamp) -> bool {
        if self.0.len() >= REMEMBERED && !self.0.contains_key(&uid) {
            return false;
        }
        self.0.insert(uid, at).is_none_or(|before| before < at)
    }

    /// Why a container of a pod waits.
    pub(super) fn class_of(&self, uid: &str, wait: &Wait, now: Timestamp) -> Class {
        let is_missing = self.0.get(uid).is_some_and(|at| after(*at, FRESH_SECONDS) > now);
        let is_pull = !matches!(wait.class, Class::CorruptStore | Class::NeverPolicy | Class::Unpack);
        if is_missing && is_pull && wait.class.stance() != Stance::Never {
            Class::SecretMissing
        } else {
            wait.class
        }
    }

    pub(super) fn forget(&mut self, now: Timestamp) {
        self.0.retain(|_, at| after(*at, FRESH_SECONDS) > now);
    }
}
