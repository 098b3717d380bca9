//! A pod that waits, with what was told of it and how often it was woken. Decides nothing.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;

use jiff::Timestamp;
use tote_api::names;
use tote_image::Reference;

use super::{About, Action, Count};
use crate::detect::{Wait, WaitingPod};
use crate::text;

/// The wakes of a pod for one image.
pub(super) struct Wake {
    /// The job that brought the image, if one did: another job starts the count again.
    pub(super) job: Option<Arc<str>>,
    pub(super) count: u32,
    pub(super) next: Timestamp,
}

/// A pod that waits, and what was done about it.
pub(super) struct PodEntry {
    pub(super) pod: WaitingPod,
    told: HashSet<(String, Arc<str>, &'static str)>,
    pub(super) counted: HashSet<Arc<str>>,
    pub(super) wakes: HashMap<Arc<str>, Wake>,
    /// Spreads what is done for many pods.
    pub(super) seed: u64,
}

impl PodEntry {
    pub(super) fn new(pod: WaitingPod) -> Self {
        let mut hasher = DefaultHasher::new();
        pod.uid.hash(&mut hasher);
        let seed = hasher.finish();
        Self { pod, told: HashSet::new(), counted: HashSet::new(), wakes: HashMap::new(), seed }
    }

    fn about(&self, field_path: &str) -> About {
        About {
            kind: "Pod",
            namespace: self.pod.namespace.clone(),
            name: self.pod.name.clone(),
            uid: self.pod.uid.clone(),
            field_path: field_path.to_owned(),
        }
    }

    /// An event about a container, once for each image and cause.
    pub(super) fn tell(
        &mut self,
        wait: &Wait,
        warning: bool,
        reason: &'static str,
        cause: &'static str,
        note: &str,
    ) -> Option<Action> {
        self.told.insert((wait.field_path.clone(), wait.image.clone(), cause)).then(|| Action::Tell {
            about: self.about(&wait.field_path),
            warning,
            reason: reason.to_owned(),
            action: cause,
            note: text::bounded(note, text::MAX_NOTE),
        })
    }

    pub(super) fn not_actionable(
        &mut self,
        wait: &Wait,
        cause: &'static str,
        note: &str,
        actions: &mut Vec<Action>,
    ) {
        if let Some(tell) = self.tell(wait, true, names::event::IMAGE_NOT_ACTIONABLE, cause, note) {
            actions.push(tell);
            actions.push(Action::Count(Count::NotActionable));
        }
    }

    /// Wakes at the next decision, if it waits for one of these images.
    pub(super) fn hasten(&mut self, images: &[Reference]) {
        for wait in &self.pod.waits {
            if wait.reference.as_ref().is_ok_and(|reference| images.contains(reference))
                && let Some(wake) = self.wakes.get_mut(&wait.image)
            {
                wake.next = Timestamp::UNIX_EPOCH;
            }
        }
    }
}
