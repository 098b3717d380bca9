//! What to say of nodes, on the Node itself: it lacks the sandbox image, or its runtime is down. No pod's opt-in is asked, for
//! nothing is moved.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use tote_api::names;
use tote_image::Reference;

use super::{About, Action, State, sooner};
use crate::fleet::NodeName;
use crate::nodes::Kubelet;
use crate::resolve::{Question, Resolution};
use crate::running::Meant;
use crate::salvage::after;
use crate::text;
use crate::world::World;

/// By then an agent has told what its node lost, however busy it is.
const STALE_SECONDS: i64 = 10;

/// A failure counts for so many seconds; kubelet repeats it oftener than that for as long as it lasts.
const FRESH_SECONDS: i64 = 600;

/// Between two events of one node and image.
const REPEAT_SECONDS: i64 = 3600;

/// For how many seconds a runtime must be down: one that is restarted is back by then.
const DOWN_SECONDS: i64 = 10;

/// The most pairs of node and sandbox image that are remembered.
const MAX_SANDBOXES: usize = 1024;

/// What was seen of nodes, and said.
#[derive(Debug, Default)]
pub(super) struct Notes {
    sandboxes: BTreeMap<(NodeName, Arc<str>), Sandbox>,
    /// Nodes whose runtime is down: since when, and whether that was said.
    down: BTreeMap<NodeName, (Timestamp, bool)>,
}

#[derive(Debug)]
struct Sandbox {
    failed: Timestamp,
    told: Option<Timestamp>,
}

impl Notes {
    /// Takes in a sandbox that could not be made. Tells whether there may be something to say.
    pub(super) fn sandbox_failed(&mut self, node: NodeName, image: Arc<str>, at: Timestamp) -> bool {
        let full = self.sandboxes.len() >= MAX_SANDBOXES;
        match self.sandboxes.get_mut(&(node.clone(), image.clone())) {
            Some(known) => {
                known.failed = known.failed.max(at);
                known.told.is_none_or(|told| after(told, REPEAT_SECONDS) <= at)
            }
            // Those that are known go by and by; kubelet says it again.
            None if full => false,
            None => {
                self.sandboxes.insert((node, image), Sandbox { failed: at, told: None });
                true
            }
        }
    }
}

impl State {
    pub(super) fn decide_nodes(&mut self, now: Timestamp, again: &mut Option<Timestamp>) {
        let mut notes = std::mem::take(&mut self.notes);
        notes.sandboxes.retain(|(node, _), sandbox| {
            let is_told = sandbox.told.is_some_and(|told| after(told, REPEAT_SECONDS) > now);
            self.world.nodes.contains_key(node) && (is_told || after(sandbox.failed, FRESH_SECONDS) > now)
        });
        if self.policy.enabled {
            self.tell_sandboxes(&mut notes, now, again);
            self.tell_runtimes(&mut notes, now, again);
        }
        self.notes = notes;
    }

    fn tell_sandboxes(&mut self, notes: &mut Notes, now: Timestamp, again: &mut Option<Timestamp>) {
        for ((node, image), sandbox) in &mut notes.sandboxes {
            let is_told = sandbox.told.is_some_and(|told| after(told, REPEAT_SECONDS) > now);
            if is_told || after(sandbox.failed, FRESH_SECONDS) <= now {
                continue;
            }
            if let Some(at) = self.world.unsettled_until(now) {
                sooner(again, at); // Until then it is not known who holds it.
                continue;
            }
            let is_there = image
                .parse::<Reference>()
                .is_ok_and(|image| self.world.fleet.present(node, &image.to_string()).is_some());
            if is_there {
                // By now; or its agent is yet to tell that it is gone.
                let due = after(sandbox.failed, STALE_SECONDS);
                if due > now {
                    sooner(again, due);
                }
                continue;
            }
            sandbox.told = Some(now);
            let words = sandbox_note(&self.world, node, image);
            self.tell_node(node, names::event::SANDBOX_IMAGE_MISSING, "LookForSandboxImage", &words);
        }
    }

    fn tell_runtimes(&mut self, notes: &mut Notes, now: Timestamp, again: &mut Option<Timestamp>) {
        let down: BTreeSet<NodeName> =
            self.world.nodes.keys().filter(|node| self.world.is_runtime_down(node)).cloned().collect();
        notes.down.retain(|node, _| down.contains(node));
        for node in down {
            let (since, told) = notes.down.entry(node.clone()).or_insert((now, false));
            if *told {
                continue;
            }
            let due = after(*since, DOWN_SECONDS);
            if due > now {
                sooner(again, due);
                continue;
            }
            *told = true;
            let kubelet = self.world.nodes.get(&node).filter(|facts| facts.kubelet == Kubelet::RuntimeDown);
            let who = kubelet.map_or_else(
                || "tote's agent there gets no answer from containerd".to_owned(),
                |facts| format!("kubelet says: {}", facts.message),
            );
            let words = format!(
                "the container runtime of node {node} is down; {who}. No pod starts there and no image is brought to it \
                 or taken from it until it is back; salvages elsewhere go on. Look at containerd on the node: systemctl \
                 status containerd, journalctl -u containerd."
            );
            self.tell_node(&node, names::event::RUNTIME_DOWN, "LookAtRuntime", &words);
        }
    }

    fn tell_node(&mut self, node: &NodeName, reason: &str, action: &'static str, words: &str) {
        let Some(facts) = self.world.nodes.get(node) else { return };
        self.actions.push(Action::Tell {
            about: About {
                kind: "Node",
                namespace: "".into(),
                name: node.clone(),
                uid: facts.uid.clone(),
                field_path: String::new(),
            },
            warning: true,
            reason: reason.to_owned(),
            action,
            note: text::bounded(words, text::MAX_NOTE),
        });
    }
}

fn sandbox_note(world: &World, node: &NodeName, image: &str) -> String {
    let found = image.parse::<Reference>().map(|reference| {
        let workload = Meant::new();
        let question =
            Question { reference: &reference, pin: None, target: node, source: None, workload: &workload };
        question.resolve(&world.fleet, world.tags)
    });
    let by_job =
        format!("make a SalvageJob with image {image} and nodeName {node} in a namespace that is opted in");
    let remedy = match found {
        Ok(Resolution::Found { on_target: true, .. }) => {
            format!("The node holds it under another name: {by_job}")
        }
        Ok(Resolution::Found { sources, .. }) => format!("It is on {}: {by_job}", text::list(&sources)),
        Ok(Resolution::Missing(missing)) => format!("As to other nodes: {}", missing.message(image)),
        Err(error) => error.to_string(),
    };
    format!(
        "no pod can start on node {node}: it lacks the sandbox image {image} and cannot pull it. tote does not bring sandbox \
         images by itself, for no pod asks for them. {remedy}. Then keep it from being collected: ctr -n k8s.io images \
         label {image} io.cri-containerd.pinned=pinned"
    )
}
