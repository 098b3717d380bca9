//! From a reference to a digest and the nodes to take it from, by the fleet's inventory alone. Pure.
//!
//! What a tag meant upstream cannot be asked. It is what the workload's other pods run by it; else what all nodes mean
//! by it; else, if that is the policy, the image that was made last.

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
                "what {} of this workload run by the tag",
                several(containers, "other container")
            )),
            Self::Agreed { nodes } => Some(format!("what the tag means on {}", several(nodes, "node"))),
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
        /// The nodes that hold it complete, the target not among them.
        sources: Vec<NodeName>,
        /// Whether the target itself holds every blob: then nothing needs to be moved.
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
        let on_target = holders.remove(self.target) == Some(Holder::Complete);
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
        let (incomplete, other) = (with(Holder::Incomplete), with(Holder::OtherPlatform));
        Resolution::Missing(if !incomplete.is_empty() {
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
mod tests {
    use super::*;
    use crate::fleet::{Image, Manifest};

    fn digest(n: u8) -> Digest {
        Digest::sha256(&[n])
    }

    /// Nodes `a` to `c`, amd64; each item is (node, target, names, platform's architecture, complete).
    fn fleet(items: &[(&str, u8, &str, &str, bool)]) -> Inventory {
        let mut fleet = Inventory::default();
        for node in ["a", "b", "c"] {
            fleet.up(&node.into(), "127.0.0.1:1".into(), Platform::new("linux", "amd64", ""), String::new());
        }
        for (node, target, name, architecture, complete) in items {
            fleet.upsert(
                &(*node).into(),
                Image {
                    target: digest(*target),
                    names: vec![(*name).into()],
                    manifests: vec![Manifest {
                        digest: digest(*target + 100),
                        platform: Platform::new("linux", architecture, ""),
                        complete: *complete,
                        created: 0,
                    }],
                },
            );
        }
        fleet
    }

    fn ask(image: &str, fleet: &Inventory) -> Resolution {
        ask_with(image, fleet, &Meant::new(), TagPolicy::Refuse)
    }

    fn ask_with(image: &str, fleet: &Inventory, workload: &Meant, tags: TagPolicy) -> Resolution {
        let reference = image.parse().unwrap();
        Question { reference: &reference, pin: None, target: "c", source: None, workload }
            .resolve(fleet, tags)
    }

    fn found(n: u8, why: Why, sources: &[&str]) -> Resolution {
        Resolution::Found { digest: digest(n), why, sources: nodes(sources), on_target: false }
    }

    fn nodes(names: &[&str]) -> Vec<NodeName> {
        names.iter().map(|&n| n.into()).collect()
    }

    #[test]
    fn a_tag_is_what_all_nodes_mean_by_it() {
        let f = fleet(&[
            ("a", 1, "docker.io/library/x:1", "amd64", true),
            ("b", 1, "docker.io/library/x:1", "amd64", true),
        ]);
        assert_eq!(ask("x:1", &f), found(1, Why::Agreed { nodes: 2 }, &["a", "b"]));
    }

    #[test]
    fn nodes_that_disagree_are_named() {
        let f = fleet(&[("a", 1, "r.test/x:1", "amd64", true), ("b", 2, "r.test/x:1", "amd64", true)]);
        let Resolution::Missing(missing) = ask("r.test/x:1", &f) else { panic!("resolved") };
        assert_eq!(missing.reason(), "AmbiguousTag");
        let message = missing.message("r.test/x:1");
        for part in [&format!("{} on a", digest(1)), &format!("{} on b", digest(2)), "different images"] {
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn a_digest_is_found_under_any_name_and_as_an_indexs_manifest() {
        let f = fleet(&[("a", 1, "elsewhere.test/y:9", "amd64", true)]);
        for n in [1, 101] {
            assert_eq!(ask(&format!("r.test/x@{}", digest(n)), &f), found(n, Why::Pinned, &["a"]));
        }
    }

    #[test]
    fn says_why_copies_do_not_help() {
        for (f, reason, says) in [
            (fleet(&[]), "NoSource", "no node"),
            (fleet(&[("a", 1, "r.test/x:1", "amd64", false)]), "IncompleteOnly", "blobs of it are missing"),
            (fleet(&[("a", 1, "r.test/x:1", "arm64", true)]), "OtherPlatformOnly", "another platform"),
        ] {
            let Resolution::Missing(missing) = ask("r.test/x:1", &f) else { panic!("resolved") };
            assert_eq!(missing.reason(), reason);
            assert!(missing.message("r.test/x:1").contains(says), "{}", missing.message("r.test/x:1"));
        }
    }

    #[test]
    fn what_the_target_has_needs_no_source() {
        let f = fleet(&[("c", 1, "r.test/other:1", "amd64", true)]);
        let found = ask(&format!("r.test/x@{}", digest(1)), &f);
        let expected =
            Resolution::Found { digest: digest(1), why: Why::Pinned, sources: vec![], on_target: true };
        assert_eq!(found, expected);
    }

    #[test]
    fn a_set_source_excludes_the_others() {
        let f = fleet(&[("a", 1, "r.test/x:1", "amd64", true), ("b", 1, "r.test/x:1", "amd64", true)]);
        let reference = "r.test/x:1".parse().unwrap();
        let workload = Meant::new();
        let of = |source| {
            Question {
                reference: &reference,
                pin: None,
                target: "c",
                source: Some(source),
                workload: &workload,
            }
            .resolve(&f, TagPolicy::Refuse)
        };
        assert_eq!(of("b"), found(1, Why::Agreed { nodes: 2 }, &["b"]));
        assert_eq!(of("z"), Resolution::Missing(Missing::Nowhere { digest: Some(digest(1)) }));
    }

    #[test]
    fn a_tag_is_what_the_workloads_other_pods_run_though_nodes_disagree() {
        let f = fleet(&[("a", 1, "r.test/x:1", "amd64", true), ("b", 2, "r.test/x:1", "amd64", true)]);
        let ask = |workload: &[(u8, usize)]| {
            let workload = workload.iter().map(|(n, count)| (digest(*n), *count)).collect();
            ask_with("r.test/x:1", &f, &workload, TagPolicy::Refuse)
        };
        assert_eq!(ask(&[(2, 3)]), found(2, Why::Workload { containers: 3 }, &["b"]));
        assert_eq!(ask(&[(9, 1)]), Resolution::Missing(Missing::Nowhere { digest: Some(digest(9)) }));
        let Resolution::Missing(missing) = ask(&[(1, 4), (2, 3)]) else { panic!("resolved") };
        let message = missing.message("r.test/x:1");
        assert_eq!(missing.reason(), "AmbiguousTag");
        for part in [&format!("{} in 4", digest(1)), &format!("{} in 3", digest(2)), "of this workload"] {
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn the_newest_is_taken_by_policy_and_only_if_it_is_known_which() {
        let ask = |created: &[i64], tags, workload: &[u8]| {
            let mut f = fleet(&[]);
            for ((node, n), created) in [("a", 1), ("b", 2), ("c", 3)].into_iter().zip(created) {
                let platform = Platform::new("linux", "amd64", "");
                let manifest =
                    Manifest { digest: digest(n + 100), platform, complete: node != "c", created: *created };
                let image =
                    Image { target: digest(n), names: vec!["r.test/x:1".into()], manifests: vec![manifest] };
                f.upsert(&node.into(), image);
            }
            let workload = workload.iter().map(|n| (digest(*n), 1)).collect();
            ask_with("r.test/x:1", &f, &workload, tags)
        };
        let taken = found(2, Why::Newest { of: 3 }, &["b"]);
        assert_eq!(ask(&[100, 300, 200], TagPolicy::Newest, &[]), taken);
        let pair = found(1, Why::Newest { of: 2 }, &["a"]);
        assert_eq!(
            ask(&[300, 200, 400], TagPolicy::Newest, &[1, 2]),
            pair,
            "of those that the workload runs"
        );
        for (created, tags) in [
            ([100, 300, 200], TagPolicy::Refuse),
            ([100, 300, 300], TagPolicy::Newest),
            ([0, 300, 200], TagPolicy::Newest),
            ([0, 0, 0], TagPolicy::Newest),
        ] {
            let Resolution::Missing(missing) = ask(&created, tags, &[]) else { panic!("{created:?}") };
            assert_eq!(missing.reason(), "AmbiguousTag", "{created:?}");
        }
    }

    #[test]
    fn what_is_ambiguous_fits_into_an_event_however_much_there_is_of_it() {
        let long = format!("r.test/{}:1", "x".repeat(240));
        let meanings: BTreeMap<Digest, Vec<NodeName>> = (0..200u8)
            .map(|n| (digest(n), (0..25).map(|m| format!("{}-{n}-{m}", "node".repeat(50)).into()).collect()))
            .collect();
        let containers = meanings.keys().map(|digest| (digest.clone(), usize::MAX)).collect();
        for missing in [Missing::Ambiguous { meanings }, Missing::WorkloadDisagrees { meanings: containers }]
        {
            for image in [&*long, "x", &"y".repeat(5000)] {
                let message = missing.message(image);
                assert!(message.len() <= text::MAX_NOTE, "{}", message.len());
                assert!(message.ends_with("or make a SalvageJob with it"), "{message}");
                assert!(message.contains("sha256:"), "{message}");
            }
        }
    }

    #[test]
    fn says_why() {
        let words = |why: Why| why.words().unwrap_or_default();
        assert_eq!(words(Why::Pinned), "");
        assert_eq!(
            words(Why::Workload { containers: 3 }),
            "what 3 other containers of this workload run by the tag"
        );
        assert_eq!(words(Why::Agreed { nodes: 1 }), "what the tag means on 1 node");
        assert_eq!(words(Why::Newest { of: 2 }), "the newest of 2 images that the tag means");
    }
}
