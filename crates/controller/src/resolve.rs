//! From a reference to a digest and the nodes to take it from, by the fleet's inventory alone. Pure.
//!
//! What a tag meant upstream is its registry's to say. Here it is what the workload's other pods run by it; else what all nodes
//! mean by it; else, if that is the policy, the image that was made last.

use std::collections::BTreeMap;

use tote_image::{Digest, Platform, Reference};

use crate::fleet::{Holder, Inventory, NodeName};
use crate::running::Meant;
use crate::text;

/// What to do about a tag of several meanings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TagPolicy {
    /// Say so.
    #[default]
    Refuse,
    /// Take the image whose config says that it was made last; refuse if that is not known of all, or the same of two.
    Newest,
}

/// Why a digest is the one that is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It was said.
    Pinned,
    /// By what other containers of the workload run.
    Workload {
        /// How many.
        containers: usize,
    },
    /// All nodes that know the tag agree.
    Agreed {
        /// How many nodes.
        nodes: usize,
    },
    /// Its registry has just said so.
    Upstream,
    /// The meanings differ, and it was made last.
    Newest {
        /// How many meanings there are.
        of: usize,
    },
}

impl Why {
    /// For a person; nothing where nothing had to be found out.
    pub fn words(self) -> Option<String> {
        let several =
            |n: usize, what: &str| if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") };
        match self {
            Self::Pinned => None,
            Self::Workload { containers } => Some(format!(
                "what {} of this workload {} by the tag",
                several(containers, "other container"),
                if containers == 1 { "runs" } else { "run" }
            )),
            Self::Agreed { nodes } => Some(format!("what the tag means on {}", several(nodes, "node"))),
            Self::Upstream => Some("this digest by its registry's own answer".to_owned()),
            Self::Newest { of } => Some(format!("the newest of {of} images that the tag means")),
        }
    }
}

/// What the fleet knows of an image that a node wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// It can be had.
    Found {
        /// Digest of the index or manifest.
        digest: Digest,
        /// Why this one.
        why: Why,
        /// The nodes that hold it complete, the target not among them; or, where there is none, those that hold it between them.
        sources: Vec<NodeName>,
        /// Whether the target itself holds every blob, or has it unpacked: then nothing needs to be moved.
        on_target: bool,
    },
    /// It cannot; why.
    Missing(Missing),
}

/// Why an image cannot be had from the fleet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missing {
    /// No node whose agent answers has it.
    Nowhere {
        /// The digest, if one is known.
        digest: Option<Digest>,
    },
    /// Only nodes had it that do not answer now.
    Away {
        /// Its digest.
        digest: Digest,
        /// Those nodes.
        nodes: Vec<NodeName>,
    },
    /// Blobs are missing on every node that has it.
    Incomplete {
        /// Its digest.
        digest: Digest,
        /// Those nodes.
        nodes: Vec<NodeName>,
    },
    /// Only copies for other platforms exist.
    OtherPlatform {
        /// Its digest.
        digest: Digest,
        /// The nodes that have them.
        nodes: Vec<NodeName>,
    },
    /// The nodes disagree on the tag.
    Ambiguous {
        /// By digest, the nodes that mean it.
        meanings: BTreeMap<Digest, Vec<NodeName>>,
    },
    /// Pods of the workload run different images by the tag.
    WorkloadDisagrees {
        /// By digest, how many containers.
        meanings: Meant,
    },
}

/// What is asked of the fleet.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// The image.
    pub reference: &'a Reference,
    /// A digest given beside it.
    pub pin: Option<&'a Digest>,
    /// The node that wants it.
    pub target: &'a str,
    /// The only node to take it from, if one is set.
    pub source: Option<&'a str>,
    /// What other pods of the same workload run by that name; empty for none.
    pub workload: &'a Meant,
}

impl Question<'_> {
    /// The answer by what the nodes hold.
    pub fn resolve(&self, fleet: &Inventory, tags: TagPolicy) -> Resolution {
        let platform = fleet.node(self.target).map(|node| &node.platform);
        let (digest, why) = match self.pin.or(self.reference.digest()) {
            Some(digest) => (digest.clone(), Why::Pinned),
            None => match self.meaning(fleet, platform, tags) {
                Ok(meaning) => meaning,
                Err(missing) => return Resolution::Missing(missing),
            },
        };
        let mut holders = fleet.holders(&digest, platform);
        holders.remove(self.target);
        let on_target = fleet.is_on(self.target, &digest);
        if let Some(source) = self.source {
            holders.retain(|node, _| &**node == source);
        }
        let with = |how: Holder| -> Vec<NodeName> {
            holders.iter().filter(|(_, held)| **held == how).map(|(node, _)| node.clone()).collect()
        };
        let sources = with(Holder::Complete);
        if on_target || !sources.is_empty() {
            return Resolution::Found { digest, why, sources, on_target };
        }
        let incomplete = with(Holder::Incomplete);
        // The target's own part counts, too.
        let all: Vec<NodeName> = incomplete.iter().cloned().chain([self.target.into()]).collect();
        if !incomplete.is_empty() && fleet.is_whole_together(&digest, platform, &all) {
            return Resolution::Found { digest, why, sources: incomplete, on_target: false };
        }
        let away = fleet.away(&digest).into_iter().filter(|node| **node != *self.target);
        let away: Vec<NodeName> =
            away.filter(|node| self.source.is_none_or(|source| **node == *source)).collect();
        let other = with(Holder::OtherPlatform);
        Resolution::Missing(if !away.is_empty() {
            Missing::Away { digest, nodes: away }
        } else if !incomplete.is_empty() {
            Missing::Incomplete { digest, nodes: incomplete }
        } else if !other.is_empty() {
            Missing::OtherPlatform { digest, nodes: other }
        } else {
            Missing::Nowhere { digest: Some(digest) }
        })
    }

    /// What the tag means, and why.
    fn meaning(
        &self,
        fleet: &Inventory,
        platform: Option<&Platform>,
        tags: TagPolicy,
    ) -> Result<(Digest, Why), Missing> {
        let newest = |digests: Vec<&Digest>| {
            let last = if tags == TagPolicy::Newest { newest(&digests, fleet, platform) } else { None };
            last.map(|digest| (digest, Why::Newest { of: digests.len() }))
        };
        let mut by_pods = self.workload.iter();
        if let Some((digest, containers)) = by_pods.next() {
            return if by_pods.next().is_none() {
                Ok((digest.clone(), Why::Workload { containers: *containers }))
            } else {
                newest(self.workload.keys().collect())
                    .ok_or_else(|| Missing::WorkloadDisagrees { meanings: self.workload.clone() })
            };
        }
        let mut meanings: BTreeMap<Digest, Vec<NodeName>> = BTreeMap::new();
        for (node, digest) in fleet.meanings(&self.reference.to_string()) {
            meanings.entry(digest.clone()).or_default().push(node.clone());
        }
        let mut by_nodes = meanings.iter();
        match (by_nodes.next(), by_nodes.next()) {
            (None, _) => Err(Missing::Nowhere { digest: None }),
            (Some((digest, nodes)), None) => Ok((digest.clone(), Why::Agreed { nodes: nodes.len() })),
            (Some(_), Some(_)) => newest(meanings.keys().collect()).ok_or(Missing::Ambiguous { meanings }),
        }
    }
}

/// The image that was made last, if that is known of all and one alone is it.
fn newest(digests: &[&Digest], fleet: &Inventory, platform: Option<&Platform>) -> Option<Digest> {
    let dated = digests.iter().map(|digest| Some((fleet.created(digest, platform)?, *digest)));
    let mut dated = dated.collect::<Option<Vec<_>>>()?;
    dated.sort_unstable();
    match dated[..] {
        [.., (before, _), (last, digest)] if before < last => Some(digest.clone()),
        _ => None,
    }
}

impl Missing {
    /// For a person, about `image`: what is the matter and what to do.
    pub fn message(&self, image: &str) -> String {
        match self {
            Self::Nowhere { digest } => {
                let what = digest
                    .as_ref()
                    .map_or_else(|| image.to_owned(), |digest| text::image(image, digest.as_str()));
                format!(
                    "no node whose agent answers holds {what}: start it once where it can still be pulled, load it on a \
                     node, or push it to the registry again"
                )
            }
            Self::Away { digest, nodes } => format!(
                "no node that answers holds {}, but {} did when last heard of: see that the node is up, that tote's agent \
                 runs there and that containerd answers it",
                text::image(image, digest.as_str()),
                text::list(nodes)
            ),
            Self::Incomplete { digest, nodes } => format!(
                "{} is on {}, but blobs of it are missing there, as containerd's discard_unpacked_layers or an \
                 interrupted pull leaves it: push it to the registry again",
                text::image(image, digest.as_str()),
                text::list(nodes)
            ),
            Self::OtherPlatform { digest, nodes } => format!(
                "{} is on {}, but only for another platform than the one this node has: build it for this platform, or \
                 choose nodes by kubernetes.io/arch",
                text::image(image, digest.as_str()),
                text::list(nodes)
            ),
            Self::Ambiguous { meanings } => {
                let each =
                    meanings.iter().map(|(digest, nodes)| format!("{digest} on {}", text::list(nodes)));
                ambiguous(image, "on different nodes", each)
            }
            Self::WorkloadDisagrees { meanings } => {
                let each = meanings.iter().map(|(digest, containers)| format!("{digest} in {containers}"));
                ambiguous(image, "to different containers of this workload", each)
            }
        }
    }

    /// The condition's reason.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Nowhere { .. } => "NoSource",
            Self::Away { .. } => "SourceUnavailable",
            Self::Incomplete { .. } => "IncompleteOnly",
            Self::OtherPlatform { .. } => "OtherPlatformOnly",
            Self::Ambiguous { .. } | Self::WorkloadDisagrees { .. } => "AmbiguousTag",
        }
    }
}

/// With as many of the meanings as leave room for what to do, within [`text::MAX_NOTE`].
fn ambiguous(image: &str, place: &str, meanings: impl Iterator<Item = String>) -> String {
    let image = text::bounded(image, 300);
    let (what, end) = (
        format!("the tag of {image} means different images {place}: "),
        ". Use the digest that is meant (repository@sha256:...), or make a SalvageJob with it",
    );
    let meanings: Vec<String> = meanings.collect();
    let room = text::MAX_NOTE.saturating_sub(what.len() + end.len());
    format!("{what}{}{end}", text::bounded(&text::list(&meanings), room))
}

#[cfg(test)]
mod tests;
