//! What the controller knows of one `SalvageJob`.
//!
//! The controller alone writes status: once it has seen a job, its own copy is the truth, and what a watch
//! brings of status is an echo.

use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::Timestamp;
use tote_api::{Phase, SalvageJobSpec, SalvageJobStatus};
use tote_image::{Digest, Reference};
use tote_rpc::identity::is_node_name;

use crate::fleet::NodeName;

/// The most sources of a failed job that are remembered.
pub const MAX_HELD_BY: usize = 64;

/// The most nodes that lied of which a job remembers.
const MAX_LIARS: usize = 64;

/// A job and its transfer.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "facts that are independent of each other")]
pub struct Job {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// UID.
    pub uid: Arc<str>,
    /// `metadata.generation`.
    pub generation: i64,
    /// `metadata.creationTimestamp`.
    pub created: Timestamp,
    /// Whether detection made it.
    pub automatic: bool,
    /// Whether it is being deleted.
    pub terminating: bool,
    /// Its spec.
    pub spec: SalvageJobSpec,
    /// The spec's image and digest, or why they are none.
    pub wanted: Result<Wanted, String>,
    /// Its status, as it should be.
    pub status: SalvageJobStatus,
    /// Its transfer.
    pub run: Run,
    /// Whether the next start is a new attempt, and not the same one taken up again.
    pub fresh: bool,
    /// Whether the node's inventory has shown the imported image: from then on it knows better than the job.
    pub confirmed: bool,
    /// Broken streams in a row.
    pub lost: u32,
    /// The sources of its failed attempts: the next one asks others first.
    pub tried: BTreeSet<NodeName>,
    /// Nodes that gave one of its attempts under this controller bytes that are not what was asked for.
    pub liars: BTreeSet<String>,
    /// The nodes that held its image when it failed; not known of a job that failed under an earlier controller.
    pub held_by: Option<BTreeSet<NodeName>>,
    /// Bytes that attempts before this one moved.
    pub carried: i64,
}

/// What a job asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The name the image is to bear.
    pub reference: Reference,
    /// `spec.digest`.
    pub pin: Option<Digest>,
}

/// The transfer of a job, as this controller drives it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Run {
    /// None.
    #[default]
    Idle,
    /// Attached to the target's agent.
    Running {
        /// Tells this stream's events from those of one that it replaced.
        stream: u64,
        /// The digest that is moved.
        digest: Digest,
        /// The sources that the agent was given.
        sources: Vec<Source>,
    },
    /// The next attempt, or the next attachment, is at a time.
    BackOff {
        /// When.
        until: Timestamp,
        /// What went wrong.
        message: String,
    },
}

/// A node to take blobs from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Source {
    /// The node.
    pub node: NodeName,
    /// `ip:port` of its agent.
    pub address: String,
    /// Whether it is to be asked only where no other gives what is wanted.
    pub last_resort: bool,
    /// Whether it is getting the image itself, and gives each blob once it has it.
    pub relay: bool,
}

/// How far a transfer is, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Of the image for the target's platform; 0 until known.
    pub total: i64,
    /// That came from other nodes.
    pub transferred: i64,
    /// That were on the target before.
    pub reused: i64,
    /// The nodes they came from.
    pub source_nodes: Vec<String>,
    /// Nodes that gave bytes that are not what was asked for.
    pub lying_nodes: Vec<String>,
    /// Whether every blob is there, and layers are being unpacked.
    pub is_unpacking: bool,
}

impl Job {
    /// A job as first seen, with the status that it has then.
    pub fn new(
        namespace: &str,
        name: &str,
        uid: &str,
        created: Timestamp,
        spec: SalvageJobSpec,
        status: Option<SalvageJobStatus>,
    ) -> Self {
        let status = status.unwrap_or_default();
        Self {
            namespace: namespace.into(),
            name: name.into(),
            uid: uid.into(),
            generation: 0,
            created,
            automatic: false,
            terminating: false,
            wanted: wanted(&spec),
            spec,
            fresh: status.attempts == 0,
            status,
            run: Run::Idle,
            confirmed: false,
            lost: 0,
            tried: BTreeSet::new(),
            liars: BTreeSet::new(),
            held_by: None,
            carried: 0,
        }
    }

    /// Remembers who lied to an attempt.
    pub fn blame(&mut self, nodes: Vec<String>) {
        let nodes = nodes.into_iter().filter(|node| is_node_name(node));
        for node in nodes {
            if self.liars.len() < MAX_LIARS {
                self.liars.insert(node);
            }
        }
    }

    /// What an attempt says, with what those before it moved, and who lied to them: for a later one that is on the target
    /// already.
    pub fn in_all(&self, attempt: Progress) -> Progress {
        let known = self.status.transfer.map_or(0, |transfer| transfer.transferred_bytes);
        let transferred = known.max(attempt.transferred.saturating_add(self.carried));
        let earlier = transferred.saturating_sub(attempt.transferred);
        let mut source_nodes = attempt.source_nodes;
        if earlier > 0 {
            source_nodes.extend(self.status.source_nodes.iter().cloned());
            source_nodes.sort();
            source_nodes.dedup();
        }
        let reused = attempt.reused.saturating_sub(earlier).max(0);
        let lying_nodes: BTreeSet<String> = attempt.lying_nodes.iter().chain(&self.liars).cloned().collect();
        let lying_nodes = lying_nodes.into_iter().collect();
        Progress { transferred, reused, source_nodes, lying_nodes, ..attempt }
    }

    /// Its phase; Pending before the first status.
    pub fn phase(&self) -> Phase {
        self.status.phase.unwrap_or(Phase::Pending)
    }

    /// Whether it is neither final nor on its way out.
    pub fn is_open(&self) -> bool {
        !self.phase().is_final() && !self.terminating
    }

    /// Whether an attempt was begun that is not known to have ended.
    pub fn has_begun(&self) -> bool {
        self.is_open() && self.status.attempts > 0 && !self.fresh
    }

    /// The reason of condition Imported.
    pub fn reason(&self) -> &str {
        self.status
            .conditions
            .iter()
            .find(|c| c.type_ == tote_api::names::condition::IMPORTED)
            .map_or("", |c| &c.reason)
    }

    /// The digest it is resolved to, or pinned to.
    pub fn digest(&self) -> Option<Digest> {
        let resolved = self.status.digest.as_ref().and_then(|digest| digest.parse().ok());
        let wanted = self.wanted.as_ref().ok();
        resolved.or_else(|| wanted.and_then(|w| w.pin.clone().or_else(|| w.reference.digest().cloned())))
    }

    /// Whether it is for this image on this node.
    pub fn is_for(&self, reference: &Reference, node: &str) -> bool {
        self.spec.node_name == node && self.wanted.as_ref().is_ok_and(|wanted| wanted.reference == *reference)
    }

    /// Whether one of the nodes that hold its image now did not when it failed.
    pub fn has_new_source(&self, sources: &[NodeName]) -> bool {
        // With so many that are known one more makes no difference.
        sources.len() <= MAX_HELD_BY && sources.iter().any(|source| self.is_new(source))
    }

    fn is_new(&self, source: &NodeName) -> bool {
        if let Some(known) = &self.held_by {
            return !known.contains(source);
        }
        // One that moved nothing named nobody.
        let named = &self.status.source_nodes;
        !named.is_empty() && !named.iter().any(|known| **known == **source)
    }

    /// Opaque name of the transfer, for the agent: the same for every attempt, so that what a failed one got
    /// serves the next.
    pub fn transfer_id(&self) -> String {
        self.uid.to_string()
    }
}

fn wanted(spec: &SalvageJobSpec) -> Result<Wanted, String> {
    let reference: Reference = spec.image.parse().map_err(|error| format!("spec.image: {error}"))?;
    let pin = spec.digest.as_ref().map(|digest| digest.parse::<Digest>()).transpose();
    let pin = pin.map_err(|error| format!("spec.digest: {error}"))?;
    match (&pin, reference.digest()) {
        (Some(pin), Some(own)) if pin != own => {
            Err(format!("spec.digest {pin} differs from the one that spec.image is pinned to"))
        }
        _ => Ok(Wanted { reference, pin }),
    }
}

/// The name, without its counter, of the job for an image on a node: the same for the same four.
pub fn base_name(namespace: &str, reference: &Reference, digest: &Digest, node_uid: &str) -> String {
    let key = format!("{namespace}\n{reference}\n{digest}\n{node_uid}");
    let hash = Digest::sha256(key.as_bytes());
    let last = reference.repository().rsplit('/').next().unwrap_or_default();
    let slug: String =
        last.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(40).collect();
    format!("{}-{}", slug.trim_matches('-'), &hash.hex()[..10])
}

/// The counter of a job's name, if it is one of `base`.
pub fn counter(name: &str, base: &str) -> Option<u32> {
    name.strip_prefix(base)?.strip_prefix('-')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_image_node_and_namespace_apart() {
        let r = |s: &str| s.parse::<Reference>().unwrap();
        let (one, two) = (Digest::sha256(b"1"), Digest::sha256(b"2"));
        let base = base_name("shop", &r("r.test:5000/team/My.app_x:v1".to_lowercase().as_str()), &one, "u");
        assert!(base.starts_with("my-app-x-") && base.len() == "my-app-x-".len() + 10, "{base}");
        let names = [
            base_name("shop", &r("x"), &one, "u"),
            base_name("shop", &r("x"), &one, "v"),
            base_name("shop", &r("x"), &two, "u"),
            base_name("shop", &r("x:2"), &one, "u"),
            base_name("work", &r("x"), &one, "u"),
        ];
        let distinct: BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
        assert_eq!(names[0], base_name("shop", &r("docker.io/library/x:latest"), &one, "u"));
        assert_eq!(counter(&format!("{base}-12"), &base), Some(12));
        assert_eq!(counter(&base, &base), None);
        assert_eq!(counter("other-1", &base), None);
    }
}
