//! The index of what every node holds: by node, by digest, by name. Pure.
//!
//! Images are interned: five thousand nodes that hold the same image share one entry.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use tote_image::{Digest, Platform};
use tote_rpc::v1::PullRecords;

use super::image::{Holder, Image};
use crate::access::Pulled;

/// Name of a Node.
pub type NodeName = Arc<str>;

/// A node whose agent has a session.
#[derive(Clone, Debug)]
pub struct Node {
    /// `ip:port` of its agent.
    pub address: String,
    /// The node's platform.
    pub platform: Platform,
    /// Why it cannot be a target at present; empty when it can.
    pub problem: String,
    /// Whether its agent gets no answer from containerd: then nothing can be read there either.
    pub runtime_down: bool,
    /// Whether its kubelet writes down who may have an image.
    pub records: PullRecords,
    images: HashMap<Digest, Arc<Image>>,
}

/// The fleet's inventory.
#[derive(Debug, Default)]
pub struct Inventory {
    nodes: BTreeMap<NodeName, Node>,
    /// By digest of target and of manifest: the nodes, each with the target below which it is found.
    by_digest: HashMap<Digest, BTreeSet<(NodeName, Digest)>>,
    /// By record name: what each node means by it.
    by_name: HashMap<Arc<str>, BTreeMap<NodeName, Digest>>,
    interned: HashSet<Arc<Image>>,
    /// By image ID: each node's record of it, with the target below which it is told. That of a node without a session
    /// stays until it is back or gone.
    pulled: HashMap<Digest, BTreeMap<(NodeName, Digest), Arc<Pulled>>>,
    /// What nodes without a session last told.
    last: HashMap<NodeName, Last>,
    /// By digest of target and of manifest, the nodes without a session that last held it complete.
    away: HashMap<Digest, BTreeSet<NodeName>>,
}

/// What a node without a session last told.
#[derive(Debug, Default)]
struct Last {
    /// What it meant by these names stands in `by_name` too. A node that is away for a moment must not turn an ambiguous
    /// tag into a clear one.
    meant: Vec<Arc<str>>,
    /// These stand in `away`.
    digests: Vec<Digest>,
    /// Images of which its kubelet has a record; these stand in `pulled` too.
    recorded: Vec<Arc<Image>>,
}

impl Inventory {
    /// A node's session stands: replaces all that was known of it.
    pub fn up(
        &mut self,
        name: &NodeName,
        address: String,
        platform: Platform,
        problem: String,
        records: PullRecords,
    ) {
        self.down(name);
        self.forget(name);
        self.nodes.insert(
            name.clone(),
            Node { address, platform, problem, runtime_down: false, records, images: HashMap::new() },
        );
    }

    /// Whether containerd answers the node's agent. Ignored for a node without a session.
    pub fn set_runtime_down(&mut self, name: &NodeName, is_down: bool) {
        if let Some(node) = self.nodes.get_mut(name) {
            node.runtime_down = is_down;
        }
    }

    /// A node's session ended: what it holds is out of reach. What it means by names is remembered until it is back
    /// or forgotten.
    pub fn down(&mut self, name: &NodeName) {
        let Some(node) = self.nodes.remove(name) else { return };
        let mut meant = Vec::new();
        let (mut held, mut recorded) = (Vec::new(), Vec::new());
        for image in node.images.into_values() {
            held.extend(image.digests().filter(|d| image.held(d, None) == Holder::Complete).cloned());
            if image.pulled().next().is_some() {
                recorded.push(image.clone());
            }
            for record in image.references() {
                if self.by_name.get(record).and_then(|meanings| meanings.get(name)) == Some(&image.target) {
                    meant.push((record.clone(), image.target.clone()));
                }
            }
            self.unindex(name, &image);
        }
        for (record, target) in &meant {
            self.by_name.entry(record.clone()).or_default().insert(name.clone(), target.clone());
        }
        for digest in &held {
            self.away.entry(digest.clone()).or_default().insert(name.clone());
        }
        for image in &recorded {
            self.index_records(name, image);
        }
        let meant = meant.into_iter().map(|(record, _)| record).collect();
        self.last.insert(name.clone(), Last { meant, digests: held, recorded });
    }

    /// Forgets what nodes without a session meant, but for those that there still are.
    pub fn forget_all_but(&mut self, there: impl Fn(&NodeName) -> bool) {
        let gone: Vec<NodeName> = self.last.keys().filter(|name| !there(name)).cloned().collect();
        for name in gone {
            self.forget(&name);
        }
    }

    fn forget(&mut self, name: &NodeName) {
        let Last { meant, digests, recorded } = self.last.remove(name).unwrap_or_default();
        for digest in &digests {
            if let Some(nodes) = self.away.get_mut(digest) {
                nodes.remove(name);
                if nodes.is_empty() {
                    self.away.remove(digest);
                }
            }
        }
        for image in &recorded {
            self.unindex_records(name, image);
        }
        for record in meant {
            if let Some(meanings) = self.by_name.get_mut(&record) {
                meanings.remove(name);
                if meanings.is_empty() {
                    self.by_name.remove(&record);
                }
            }
        }
    }

    /// A node's records of one target changed. Ignored for a node without a session.
    pub fn upsert(&mut self, name: &NodeName, image: Image) {
        if !self.nodes.contains_key(name) {
            return;
        }
        self.remove(name, &image.target);
        let image = if let Some(known) = self.interned.get(&image) {
            known.clone()
        } else {
            let image = Arc::new(image);
            self.interned.insert(image.clone());
            image
        };
        for digest in image.digests() {
            let holders = self.by_digest.entry(digest.clone()).or_default();
            holders.insert((name.clone(), image.target.clone()));
        }
        for record in image.references() {
            let meanings = self.by_name.entry(record.clone()).or_default();
            meanings.insert(name.clone(), image.target.clone());
        }
        self.index_records(name, &image);
        if let Some(node) = self.nodes.get_mut(name) {
            node.images.insert(image.target.clone(), image);
        }
    }

    fn index_records(&mut self, name: &NodeName, image: &Image) {
        for (id, record) in image.pulled() {
            let known = self.pulled.entry(id.clone()).or_default();
            known.insert((name.clone(), image.target.clone()), record.clone());
        }
    }

    fn unindex_records(&mut self, name: &NodeName, image: &Image) {
        for (id, _) in image.pulled() {
            if let Some(known) = self.pulled.get_mut(id) {
                known.remove(&(name.clone(), image.target.clone()));
                if known.is_empty() {
                    self.pulled.remove(id);
                }
            }
        }
    }

    /// No record of the node points at this target any more.
    pub fn remove(&mut self, name: &NodeName, target: &Digest) {
        let image = self.nodes.get_mut(name).and_then(|node| node.images.remove(target));
        if let Some(image) = image {
            self.unindex(name, &image);
        }
    }

    fn unindex(&mut self, name: &NodeName, image: &Arc<Image>) {
        self.unindex_records(name, image);
        for digest in image.digests() {
            if let Some(holders) = self.by_digest.get_mut(digest) {
                holders.remove(&(name.clone(), image.target.clone()));
                if holders.is_empty() {
                    self.by_digest.remove(digest);
                }
            }
        }
        for record in image.references() {
            if let Some(meanings) = self.by_name.get_mut(record) {
                // The record may point at another target by now.
                if meanings.get(name) == Some(&image.target) {
                    meanings.remove(name);
                }
                if meanings.is_empty() {
                    self.by_name.remove(record);
                }
            }
        }
        if Arc::strong_count(image) <= 2 {
            self.interned.remove(image);
        }
    }

    /// The node, if its agent has a session.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// Whether the node's agent has a session.
    pub fn is_up(&self, name: &str) -> bool {
        self.nodes.contains_key(name)
    }

    /// Number of nodes with a session.
    pub fn nodes_up(&self) -> usize {
        self.nodes.len()
    }

    /// Number of distinct images of the fleet.
    pub fn images(&self) -> usize {
        self.interned.len()
    }

    /// What each node means by the record `name`.
    pub fn meanings(&self, name: &str) -> impl Iterator<Item = (&NodeName, &Digest)> {
        self.by_name.get(name).into_iter().flatten()
    }

    /// The nodes that held `digest` complete, for whatever platform, when last heard of: their agent or their containerd
    /// does not answer now.
    pub fn away(&self, digest: &Digest) -> BTreeSet<NodeName> {
        let mut away = self.away.get(digest).cloned().unwrap_or_default();
        for (name, target) in self.by_digest.get(digest).into_iter().flatten() {
            let node = self.nodes.get(name).filter(|node| node.runtime_down);
            let image = node.and_then(|node| node.images.get(target));
            if image.is_some_and(|image| image.held(digest, None) == Holder::Complete) {
                away.insert(name.clone());
            }
        }
        away
    }

    /// How the nodes hold `digest` (of an index or a manifest), for a node of `platform`; if that is not
    /// known, any platform will do. Nodes whose containerd does not answer hold nothing that could be had.
    pub fn holders(&self, digest: &Digest, platform: Option<&Platform>) -> BTreeMap<NodeName, Holder> {
        let mut holders = BTreeMap::new();
        for (name, target) in self.by_digest.get(digest).into_iter().flatten() {
            let node = self.nodes.get(name).filter(|node| !node.runtime_down);
            let Some(image) = node.and_then(|node| node.images.get(target)) else { continue };
            let held = image.held(digest, platform);
            holders.entry(name.clone()).and_modify(|known| *known = held.min(*known)).or_insert(held);
        }
        holders
    }

    /// Whether `nodes` hold every blob of `digest` (of an index or a manifest) for `platform` between them, though none of them
    /// holds all.
    pub fn is_whole_together(
        &self,
        digest: &Digest,
        platform: Option<&Platform>,
        nodes: &[NodeName],
    ) -> bool {
        let mut lacks: BTreeMap<&Digest, BTreeSet<&Digest>> = BTreeMap::new();
        let held = self.by_digest.get(digest).into_iter().flatten();
        for (name, target) in held.filter(|(name, _)| nodes.contains(name)) {
            let image = self.nodes.get(name).and_then(|node| node.images.get(target));
            for manifest in image.into_iter().flat_map(|image| image.suiting(digest, platform)) {
                let Some(missing) = &manifest.missing else { continue };
                let missing = missing.iter().collect::<BTreeSet<_>>();
                lacks
                    .entry(&manifest.digest)
                    .and_modify(|known| known.retain(|blob| missing.contains(blob)))
                    .or_insert(missing);
            }
        }
        lacks.values().any(BTreeSet::is_empty)
    }

    /// When the image of `digest` (of an index or a manifest) for `platform` was made, in seconds since 1970; `None`
    /// if no node that holds it knows.
    pub fn created(&self, digest: &Digest, platform: Option<&Platform>) -> Option<i64> {
        let held = self.by_digest.get(digest).into_iter().flatten();
        let images = held.filter_map(|(name, target)| self.nodes.get(name)?.images.get(target));
        let suit = images.flat_map(|image| image.suiting(digest, platform));
        suit.map(|m| m.created).max().filter(|created| *created > 0)
    }

    /// How large the image of `digest` (of an index or a manifest) for `platform` is, in bytes and compressed; `None` if no
    /// node that holds it knows. Where nodes differ, which they cannot, the largest.
    pub fn size(&self, digest: &Digest, platform: Option<&Platform>) -> Option<u64> {
        let held = self.by_digest.get(digest).into_iter().flatten();
        let images = held.filter_map(|(name, target)| self.nodes.get(name)?.images.get(target));
        images.flat_map(|image| image.suiting(digest, platform)).map(|m| m.size).max()
    }

    /// The images (by their IDs) that `digest` (of an index or a manifest) is on the nodes; for `platform` alone, if it is
    /// given.
    pub fn image_ids(&self, digest: &Digest, platform: Option<&Platform>) -> BTreeSet<&Digest> {
        let held = self.by_digest.get(digest).into_iter().flatten();
        let images = held.filter_map(|(name, target)| self.nodes.get(name)?.images.get(target));
        let suit = images.flat_map(|image| image.suiting(digest, platform));
        suit.filter_map(|manifest| manifest.image_id.as_ref()).collect()
    }

    /// All kubelets' records of who may have an image, under whatever digest and name each node has it, one for each node:
    /// an image is what its config makes it.
    pub fn records(&self, image_id: &Digest) -> Vec<&Pulled> {
        let known = self.pulled.get(image_id).into_iter().flatten();
        let by_node: BTreeMap<&NodeName, &Pulled> =
            known.map(|((node, _), record)| (node, &**record)).collect();
        by_node.into_values().collect()
    }

    /// How many nodes hold `digest` whose agent does not tell what its kubelet wrote down.
    pub fn silent_holders(&self, digest: &Digest) -> usize {
        let held = self.by_digest.get(digest).into_iter().flatten();
        let nodes: BTreeSet<&NodeName> = held.map(|(name, _)| name).collect();
        let silent = |name: &&NodeName| {
            self.nodes.get(*name).is_some_and(|node| node.records == PullRecords::Unspecified)
        };
        nodes.into_iter().filter(silent).count()
    }

    /// Names of the records, other than config IDs, under which a node has `digest`.
    pub fn names_on(&self, node: &str, digest: &Digest) -> Vec<Arc<str>> {
        let image = self.nodes.get(node).and_then(|node| node.images.get(digest));
        image.map(|image| image.references().cloned().collect()).unwrap_or_default()
    }

    /// Names of the records, other than config IDs, under which any node has `digest`: as target, or below it.
    pub fn names_of(&self, digest: &Digest) -> BTreeSet<&str> {
        let holders = self.by_digest.get(digest).into_iter().flatten();
        let images = holders.filter_map(|(node, target)| self.nodes.get(node)?.images.get(target));
        images.flat_map(|image| image.references()).map(AsRef::as_ref).collect()
    }

    /// Whether containers can be made of `digest` (of an index or a manifest) on a node, under whatever name.
    pub fn is_on(&self, node_name: &str, digest: &Digest) -> bool {
        let Some(node) = self.nodes.get(node_name).filter(|node| !node.runtime_down) else { return false };
        let held = self.by_digest.get(digest).into_iter().flatten();
        let mut images =
            held.filter(|(name, _)| **name == *node_name).filter_map(|(_, target)| node.images.get(target));
        images.any(|image| image.is_usable(digest, &node.platform))
    }

    /// The target of the record `name` on a node, if containers can be made there of the image behind it.
    pub fn present(&self, node_name: &str, name: &str) -> Option<&Digest> {
        let node = self.nodes.get(node_name)?;
        let target = self.by_name.get(name)?.get(node_name)?;
        let image = node.images.get(target)?;
        image.is_usable(target, &node.platform).then_some(target)
    }
}
