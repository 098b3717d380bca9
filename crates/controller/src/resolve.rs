//! From a reference to a digest and the nodes to take it from, by the fleet's inventory alone. Pure.
//!
//! A tag is resolved only where all nodes agree on it: what it meant upstream cannot be asked.

use std::collections::BTreeMap;

use tote_image::{Digest, Reference};

use crate::fleet::{Holder, Inventory, NodeName};
use crate::text;

/// What the fleet knows of an image that a node wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// It can be had.
    Found {
        /// Digest of the index or manifest.
        digest: Digest,
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
}

/// Finds `reference` for the node `target`. `pin` is a digest given beside it; `source` the only node to take
/// it from, if one is set.
pub fn resolve(
    reference: &Reference,
    pin: Option<&Digest>,
    target: &str,
    source: Option<&str>,
    fleet: &Inventory,
) -> Resolution {
    let digest = match pin.or(reference.digest()) {
        Some(digest) => digest.clone(),
        None => match meaning(reference, fleet) {
            Ok(digest) => digest,
            Err(missing) => return Resolution::Missing(missing),
        },
    };
    let platform = fleet.node(target).map(|node| &node.platform);
    let mut holders = fleet.holders(&digest, platform);
    let on_target = holders.remove(target) == Some(Holder::Complete);
    if let Some(source) = source {
        holders.retain(|node, _| &**node == source);
    }
    let with = |how: Holder| -> Vec<NodeName> {
        holders.iter().filter(|(_, held)| **held == how).map(|(node, _)| node.clone()).collect()
    };
    let sources = with(Holder::Complete);
    if on_target || !sources.is_empty() {
        return Resolution::Found { digest, sources, on_target };
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

fn meaning(reference: &Reference, fleet: &Inventory) -> Result<Digest, Missing> {
    let mut meanings: BTreeMap<Digest, Vec<NodeName>> = BTreeMap::new();
    for (node, digest) in fleet.meanings(&reference.to_string()) {
        meanings.entry(digest.clone()).or_default().push(node.clone());
    }
    match meanings.len() {
        0 => Err(Missing::Nowhere { digest: None }),
        1 => meanings.into_keys().next().ok_or(Missing::Nowhere { digest: None }),
        _ => Err(Missing::Ambiguous { meanings }),
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
                let each: Vec<String> = meanings
                    .iter()
                    .map(|(digest, nodes)| format!("{digest} on {}", text::list(nodes)))
                    .collect();
                format!(
                    "the tag of {image} means different images on different nodes: {}. Use the digest that is meant, \
                     {image}@sha256:..., or make a SalvageJob with it",
                    text::list(&each)
                )
            }
        }
    }

    /// The condition's reason.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Nowhere { .. } => "NoSource",
            Self::Incomplete { .. } => "IncompleteOnly",
            Self::OtherPlatform { .. } => "OtherPlatformOnly",
            Self::Ambiguous { .. } => "AmbiguousTag",
        }
    }
}

#[cfg(test)]
mod tests {
    use tote_image::Platform;

    use tote_rpc::v1::PullRecords;

    use super::*;
    use crate::fleet::{Image, Manifest};

    fn digest(n: u8) -> Digest {
        Digest::sha256(&[n])
    }

    /// Nodes `a` to `c`, amd64; each item is (node, target, names, platform's architecture, complete).
    fn fleet(items: &[(&str, u8, &str, &str, bool)]) -> Inventory {
        let mut fleet = Inventory::default();
        let platform = || Platform::new("linux", "amd64", "");
        for node in ["a", "b", "c"] {
            fleet.up(&node.into(), "127.0.0.1:1".into(), platform(), String::new(), PullRecords::Kept);
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
                        image_id: None,
                        pulled: None,
                    }],
                },
            );
        }
        fleet
    }

    fn ask(image: &str, fleet: &Inventory) -> Resolution {
        resolve(&image.parse().unwrap(), None, "c", None, fleet)
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
        let found = Resolution::Found { digest: digest(1), sources: nodes(&["a", "b"]), on_target: false };
        assert_eq!(ask("x:1", &f), found);
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
            let found = ask(&format!("r.test/x@{}", digest(n)), &f);
            assert_eq!(
                found,
                Resolution::Found { digest: digest(n), sources: nodes(&["a"]), on_target: false }
            );
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
        assert_eq!(found, Resolution::Found { digest: digest(1), sources: vec![], on_target: true });
    }

    #[test]
    fn a_set_source_excludes_the_others() {
        let f = fleet(&[("a", 1, "r.test/x:1", "amd64", true), ("b", 1, "r.test/x:1", "amd64", true)]);
        let of = |source| resolve(&"r.test/x:1".parse().unwrap(), None, "c", Some(source), &f);
        assert_eq!(
            of("b"),
            Resolution::Found { digest: digest(1), sources: nodes(&["b"]), on_target: false }
        );
        assert_eq!(of("z"), Resolution::Missing(Missing::Nowhere { digest: Some(digest(1)) }));
    }
}
