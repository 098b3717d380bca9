//! Images that stand on a pod's node while blobs of them are missing: kubelet takes them for present and does not pull.
//!
//! Peers repair them, by a job like any other. Where none holds the image its records may go, so that kubelet pulls anew;
//! but only if the registry has just answered for that very digest, for what is left may be the last of it.

use jiff::Timestamp;
use tote_api::names;
use tote_image::{Digest, Reference};

use super::entry::PodEntry;
use super::{Action, Count, LookupAnswer, Question, State, sooner};
use crate::detect::Wait;
use crate::salvage::after;

/// Between two removals of one image from one node, and for how long kubelet is left to pull after one, in seconds.
const REMOVED_SECONDS: i64 = 60;

impl State {
    /// Says so, once.
    pub(super) fn corrupt(&mut self, entry: &mut PodEntry, wait: &Wait) {
        let note = format!(
            "{} stands on node {}, but blobs of it are missing there, so that it neither starts nor is pulled. \
             It is repaired from other nodes if one holds it. See to the node's disk, and to what deletes from containerd's \
             store. The runtime says: {}",
            wait.image, entry.pod.node, wait.message
        );
        if let Some(tell) = entry.tell(wait, true, names::event::IMAGE_CORRUPT, "Corrupt", &note) {
            self.actions.push(tell);
            self.actions.push(Action::Count(Count::Corrupt));
        }
    }

    /// No node can repair it: has its records removed if the registry answers for their digest. Tells whether that is
    /// under way, or was done; if not, the pod is to be told what is missing.
    pub(super) fn stale_record(
        &mut self,
        entry: &mut PodEntry,
        wait: &Wait,
        reference: &Reference,
        now: Timestamp,
        again: &mut Option<Timestamp>,
    ) -> bool {
        let node = entry.pod.node.clone();
        let removed = self.removed.get(&(node.clone(), wait.image.clone()));
        if let Some(at) = removed.map(|at| after(*at, REMOVED_SECONDS)).filter(|at| *at > now) {
            sooner(again, at);
            return true; // Kubelet pulls; if that fails it says so.
        }
        let Some(digest) = self.record_of(&node, reference) else { return false };
        let (namespace, pull_secrets) = (entry.pod.namespace.clone(), entry.pod.pull_secrets.clone());
        let question = Question { namespace, reference: reference.pinned(digest.clone()), pull_secrets };
        let answer = self.lookups.ask(question.clone(), now, again, &mut self.actions);
        match answer {
            None => true,
            Some(LookupAnswer::Is(found)) if found == digest => {
                if self.lookups.is_stale(&question, now) {
                    self.lookups.ask(question, now, again, &mut self.actions);
                    return true;
                }
                self.removed.insert((node.clone(), wait.image.clone()), now);
                tracing::info!(%node, image = %wait.image, %digest, "the registry has it: removing what is left of it");
                self.actions.push(Action::RemoveImage { node, digest });
                sooner(again, after(now, REMOVED_SECONDS));
                true
            }
            Some(_) => false,
        }
    }

    /// What a node means by a name.
    fn record_of(&self, node: &str, reference: &Reference) -> Option<Digest> {
        let name = reference.to_string();
        let mut meanings = self.world.fleet.meanings(&name);
        meanings.find(|(holder, _)| ***holder == *node).map(|(_, digest)| digest.clone())
    }
}
