//! The state of the in-memory containerd, and its garbage collection.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use bytes::Bytes;
use tote_image::{Descriptor, Digest, Document};

use crate::containerd::{Error, Labels, Layer, SNAPSHOT_LABEL};

/// What a lease can hold.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Resource {
    Blob(Digest),
    Ingest(Digest),
    Snapshot(String, String),
}

#[derive(Clone, Debug)]
pub(super) struct Holding {
    pub transfer: String,
    pub resources: BTreeSet<Resource>,
}

impl Holding {
    pub(super) fn new(transfer: &str) -> Self {
        Self { transfer: transfer.to_owned(), resources: BTreeSet::new() }
    }
}

#[derive(Debug, Default)]
pub(super) struct Ingesting {
    pub data: Vec<u8>,
    pub total: u64,
    pub locked: bool,
}

#[derive(Debug, Default)]
pub(super) struct Store {
    pub blobs: BTreeMap<Digest, (Bytes, Labels)>,
    pub ingests: BTreeMap<Digest, Ingesting>,
    /// The sizes of all writes.
    pub writes: BTreeMap<Digest, Vec<usize>>,
    pub leases: BTreeMap<String, Holding>,
    pub images: BTreeMap<String, Descriptor>,
    /// By snapshotter and name; the parent's name, or none.
    pub snapshots: BTreeMap<(String, String), Option<String>>,
    pub deleting: Vec<String>,
    pub calls_left: Option<u32>,
    pub cri_blind: bool,
    pub no_snapshotter: Option<String>,
    pub full: bool,
    pub free: Option<u64>,
    pub disk: u64,
}

impl Store {
    /// Counts a call.
    pub(super) fn tick(&mut self) -> Result<(), Error> {
        match &mut self.calls_left {
            None => Ok(()),
            Some(0) => Err(Error::Unavailable("connection refused".to_owned())),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }

    pub(super) fn hold(&mut self, lease: &str, resource: Resource) -> Result<(), Error> {
        let held = self.leases.get_mut(lease).ok_or_else(|| Error::NotFound(format!("lease {lease}")))?;
        held.resources.insert(resource);
        Ok(())
    }

    pub(super) fn unpack(&mut self, lease: &str, snapshotter: &str, layer: Layer<'_>) -> Result<(), Error> {
        let name = (snapshotter.to_owned(), layer.chain.to_string());
        if !self.snapshots.contains_key(&name) {
            let parent = layer.parent.map(ToString::to_string);
            if let Some(parent) = &parent
                && !self.snapshots.contains_key(&(snapshotter.to_owned(), parent.clone()))
            {
                return Err(Error::NotFound(format!("parent snapshot {parent}")));
            }
            let digest = &layer.blob.digest;
            let (bytes, _) = self.blobs.get(digest).ok_or_else(|| Error::NotFound(digest.to_string()))?;
            let mut tar = Vec::new();
            if bytes.starts_with(&[0x1f, 0x8b]) {
                let mut decoder = flate2::read::MultiGzDecoder::new(bytes.as_ref());
                decoder.read_to_end(&mut tar).map_err(|error| Error::Other(error.to_string()))?;
            } else {
                tar.extend_from_slice(bytes);
            }
            let applied = Digest::sha256(&tar);
            if applied != *layer.diff_id {
                return Err(Error::Mismatch(format!(
                    "layer {digest} unpacks to {applied}, the image's config says {}",
                    layer.diff_id
                )));
            }
            self.snapshots.insert(name.clone(), parent);
        }
        self.hold(lease, Resource::Snapshot(name.0, name.1))
    }

    /// What CRI gives as the image's ID: the config of the manifest for linux/amd64.
    pub(super) fn image_id(&self, name: &str) -> Option<String> {
        let mut digest = self.images.get(name)?.digest.clone();
        loop {
            let (bytes, _) = self.blobs.get(&digest)?;
            match Document::parse(bytes).ok()? {
                Document::Manifest(manifest) => {
                    self.blobs.get(&manifest.config.digest)?;
                    return Some(manifest.config.digest.to_string());
                }
                Document::Index(index) => {
                    let node = tote_image::Platform::new("linux", "amd64", "");
                    let candidates = index.candidates(&node).ok()?;
                    let here = candidates
                        .into_iter()
                        .find(|entry| self.blobs.contains_key(&entry.descriptor.digest))?;
                    digest = here.descriptor.digest.clone();
                }
            }
        }
    }

    /// Removes what neither a lease nor a record reaches: blobs by `gc.ref.content` labels, snapshots by
    /// `gc.ref.snapshot` labels and as parents, ingests by leases alone.
    pub(super) fn collect(&mut self) {
        let held = self.leases.values().flat_map(|lease| lease.resources.iter().cloned());
        let named = self.images.values().map(|target| Resource::Blob(target.digest.clone()));
        let mut queue: Vec<Resource> = held.chain(named).collect();
        let mut reached = BTreeSet::new();
        while let Some(resource) = queue.pop() {
            if !reached.insert(resource.clone()) {
                continue;
            }
            match resource {
                Resource::Blob(digest) => {
                    let labels = self.blobs.get(&digest).map(|(_, labels)| labels.clone());
                    for (key, value) in labels.unwrap_or_default() {
                        if key.starts_with("containerd.io/gc.ref.content")
                            && let Ok(child) = value.parse()
                        {
                            queue.push(Resource::Blob(child));
                        } else if let Some(snapshotter) = key.strip_prefix(SNAPSHOT_LABEL) {
                            queue.push(Resource::Snapshot(snapshotter.to_owned(), value));
                        }
                    }
                }
                Resource::Snapshot(snapshotter, name) => {
                    if let Some(Some(parent)) = self.snapshots.get(&(snapshotter.clone(), name)) {
                        queue.push(Resource::Snapshot(snapshotter, parent.clone()));
                    }
                }
                Resource::Ingest(_) => {}
            }
        }
        self.blobs.retain(|digest, _| reached.contains(&Resource::Blob(digest.clone())));
        self.ingests.retain(|digest, _| reached.contains(&Resource::Ingest(digest.clone())));
        self.snapshots.retain(|(snapshotter, name), _| {
            reached.contains(&Resource::Snapshot(snapshotter.clone(), name.clone()))
        });
    }
}
