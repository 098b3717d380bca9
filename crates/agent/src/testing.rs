//! Images made for tests, blob by blob.

use std::collections::BTreeMap;
use std::io::Write;

use serde_json::json;
use tote_image::{Descriptor, Digest, Document, chain_ids};

use crate::containerd::{Fake, Labels, Layer, gc_labels};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// A tar of some files.
pub fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, path, *bytes).expect("a tar in memory");
    }
    builder.into_inner().expect("a tar in memory")
}

/// Some bytes, as gzip.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("gzip in memory");
    encoder.finish().expect("gzip in memory")
}

/// Bytes that gzip cannot make fewer.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    std::iter::repeat_with(&mut next).take(length).collect()
}

/// All blobs of an image.
#[derive(Clone, Debug)]
pub struct Blobs {
    /// What a record of it names: the manifest, or the index above it.
    pub target: Descriptor,
    /// The manifest for linux/amd64.
    pub manifest: Descriptor,
    /// Its config.
    pub config: Descriptor,
    /// Its layers in order.
    pub layers: Vec<Descriptor>,
    /// Digests of the uncompressed layers.
    pub diff_ids: Vec<Digest>,
    /// Chain IDs.
    pub chain: Vec<Digest>,
    /// The bytes of every blob.
    pub bytes: BTreeMap<Digest, Vec<u8>>,
}

impl Blobs {
    /// A manifest for linux/amd64 with these layers, gzip-compressed.
    pub fn image(tars: &[Vec<u8>]) -> Self {
        Self::with_diff_ids(tars, tars.iter().map(|tar| Digest::sha256(tar)).collect())
    }

    /// The same, whose config claims these diff IDs.
    pub fn with_diff_ids(tars: &[Vec<u8>], diff_ids: Vec<Digest>) -> Self {
        let mut bytes = BTreeMap::new();
        let mut put = |media_type: &str, blob: Vec<u8>| {
            let (digest, size) = (Digest::sha256(&blob), blob.len() as u64);
            bytes.insert(digest.clone(), blob);
            Descriptor { media_type: media_type.to_owned(), digest, size }
        };
        let layers: Vec<Descriptor> = tars.iter().map(|tar| put(LAYER, gzip(tar))).collect();
        let ids: Vec<&str> = diff_ids.iter().map(Digest::as_str).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {}, "created": "2026-01-01T00:00:00Z",
            "rootfs": {"type": "layers", "diff_ids": ids},
        });
        let config = put(CONFIG, config.to_string().into_bytes());
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": entry(&config),
            "layers": layers.iter().map(entry).collect::<Vec<_>>(),
        });
        let manifest = put(MANIFEST, manifest.to_string().into_bytes());
        let chain = chain_ids(&diff_ids);
        Self { target: manifest.clone(), manifest, config, layers, diff_ids, chain, bytes }
    }

    /// The same below an index, beside an absent manifest for arm64 and an attestation.
    #[must_use]
    pub fn indexed(mut self) -> Self {
        let platform = |descriptor: &Descriptor, os: &str, architecture: &str| {
            let mut entry = entry(descriptor);
            entry["platform"] = json!({"os": os, "architecture": architecture});
            entry
        };
        let absent = |name: &[u8]| Descriptor { digest: Digest::sha256(name), ..self.manifest.clone() };
        let index = json!({
            "schemaVersion": 2, "mediaType": INDEX,
            "manifests": [
                platform(&absent(b"arm64"), "linux", "arm64"),
                platform(&self.manifest, "linux", "amd64"),
                platform(&absent(b"attestation"), "unknown", "unknown"),
            ],
        });
        let index = index.to_string().into_bytes();
        let (digest, size) = (Digest::sha256(&index), index.len() as u64);
        self.bytes.insert(digest.clone(), index);
        self.target = Descriptor { media_type: INDEX.to_owned(), digest, size };
        self
    }

    /// Puts another document in its target's place.
    pub fn retarget(&mut self, document: Vec<u8>) {
        self.bytes.remove(&self.target.digest);
        self.target.digest = Digest::sha256(&document);
        self.target.size = document.len() as u64;
        self.bytes.insert(self.target.digest.clone(), document);
    }

    /// One of its layers, to be unpacked.
    pub fn layer(&self, at: usize) -> Layer<'_> {
        let parent = at.checked_sub(1).map(|below| &self.chain[below]);
        Layer { blob: &self.layers[at], diff_id: &self.diff_ids[at], parent, chain: &self.chain[at] }
    }

    /// The digests of all blobs.
    pub fn digests(&self) -> Vec<Digest> {
        self.bytes.keys().cloned().collect()
    }

    /// Bytes of all blobs.
    pub fn size(&self) -> u64 {
        self.bytes.values().map(|bytes| bytes.len() as u64).sum()
    }

    /// Every blob with the labels that keep what it names.
    pub fn with_labels(&self) -> Vec<(Vec<u8>, Labels)> {
        let blobs = self.bytes.values();
        blobs
            .map(|bytes| {
                let labels = Document::parse(bytes).map(|document| gc_labels(&document)).unwrap_or_default();
                (bytes.clone(), labels)
            })
            .collect()
    }

    /// Puts it into an in-memory containerd under a name, as a pull would.
    pub fn pull_into(&self, fake: &Fake, name: &str) {
        for (bytes, labels) in self.with_labels() {
            fake.put(&bytes, labels);
        }
        fake.put_image(name, &self.target);
    }
}

fn entry(descriptor: &Descriptor) -> serde_json::Value {
    json!({"mediaType": descriptor.media_type, "digest": descriptor.digest.as_str(), "size": descriptor.size})
}
