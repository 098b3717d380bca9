//! Images for tests, built from nothing: any mix of layers, compressions and media types, as OCI layouts.
//!
//! Every image holds a static busybox, so that each of them can run as a pod, and takes a seed, so that no two
//! tests share a digest. The documents are written as JSON values and not with a typed model on purpose: a test
//! needs the exact bytes (deterministic, keys sorted) and shapes that a typed model refuses to write.
//!
//! Knows nothing of clusters, registries or containerd.

mod build;
mod debian;
mod elf;
mod layer;
mod layout;
mod operator;
mod padding;
mod presets;
mod random;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::path::Path;

pub use build::{Build, BuildIndex};
pub use debian::{Debian, debian};
pub use layer::{Compression, Entry, Layer};
pub use layout::Layout;
pub use operator::{Operator, operator};
pub use presets::{
    PRESETS, attested, awkward, busybox, debian_gzip, debian_zstd, docker, many_layers, pause, preset, sized,
    tiny, two_platforms,
};

/// Media type of an OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Media type of an OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an OCI image config.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Media type of a Docker manifest list (schema 2).
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Media type of a Docker manifest (schema 2).
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Media type of a Docker image config.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// Which family of media types an image is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MediaTypes {
    /// OCI image format 1.x.
    Oci,
    /// Docker image manifest version 2, schema 2. It has no zstd layers.
    Docker,
}

impl MediaTypes {
    const fn index(self) -> &'static str {
        match self {
            Self::Oci => OCI_INDEX,
            Self::Docker => DOCKER_INDEX,
        }
    }

    const fn manifest(self) -> &'static str {
        match self {
            Self::Oci => OCI_MANIFEST,
            Self::Docker => DOCKER_MANIFEST,
        }
    }

    const fn config(self) -> &'static str {
        match self {
            Self::Oci => OCI_CONFIG,
            Self::Docker => DOCKER_CONFIG,
        }
    }

    fn layer(self, compression: Compression) -> Result<&'static str> {
        Ok(match (self, compression) {
            (Self::Oci, Compression::None) => "application/vnd.oci.image.layer.v1.tar",
            (Self::Oci, Compression::Gzip) => "application/vnd.oci.image.layer.v1.tar+gzip",
            (Self::Oci, Compression::Zstd) => "application/vnd.oci.image.layer.v1.tar+zstd",
            (Self::Docker, Compression::None) => "application/vnd.docker.image.rootfs.diff.tar",
            (Self::Docker, Compression::Gzip) => "application/vnd.docker.image.rootfs.diff.tar.gzip",
            (Self::Docker, Compression::Zstd) => {
                anyhow::bail!(
                    "Docker schema 2 has no media type for a zstd layer: use OCI media types or gzip"
                )
            }
        })
    }
}

/// A content descriptor: what a blob is, its digest (`sha256:<64 hex>`) and its size in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Media type of the blob.
    pub media_type: String,
    /// `sha256:<64 hex>` of the blob's bytes.
    pub digest: String,
    /// Size of the blob in bytes.
    pub size: u64,
    /// Platform, on the manifests of an index.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub platform: Option<Platform>,
    /// Annotations, sorted by key.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub annotations: BTreeMap<String, String>,
}

/// An operating system and architecture, as an index names them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// GOARCH's name, for example `amd64`.
    pub architecture: String,
    /// GOOS's name, for example `linux`.
    pub os: String,
}

impl Platform {
    /// Linux on the architecture given in GOARCH's spelling.
    pub fn linux(architecture: &str) -> Self {
        Self { architecture: architecture.to_owned(), os: "linux".to_owned() }
    }

    /// Linux on this machine's architecture.
    pub fn host() -> Self {
        Self::linux(match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        })
    }
}

/// What one platform of an image consists of.
#[derive(Clone, Debug)]
pub struct PlatformImage {
    /// The platform; `unknown/unknown` for an attestation manifest.
    pub platform: Platform,
    /// The manifest.
    pub manifest: Descriptor,
    /// The config. Its digest is the image's ID for CRI.
    pub config: Descriptor,
    /// The layers, lowest first; one that occurs twice is listed twice.
    pub layers: Vec<Descriptor>,
    /// Digests of the uncompressed layers, in the same order.
    pub diff_ids: Vec<String>,
}

/// A built image: its blobs in a layout, and the descriptor that names it.
#[derive(Clone, Debug)]
pub struct Image {
    /// Where the blobs are.
    pub layout: Layout,
    /// The index, or the manifest if the image has no index. A reference by digest names this.
    pub target: Descriptor,
    /// The image's platforms, attestations included, in the index's order.
    pub platforms: Vec<PlatformImage>,
}

impl Image {
    /// Digest that a reference `repo@sha256:...` carries.
    pub fn digest(&self) -> &str {
        &self.target.digest
    }

    /// The part of the image that this machine's nodes pull.
    ///
    /// # Errors
    /// If the image has no manifest for this machine's platform.
    pub fn host(&self) -> Result<&PlatformImage> {
        let host = Platform::host();
        self.platforms
            .iter()
            .find(|p| p.platform == host)
            .ok_or_else(|| anyhow::anyhow!("image {} has no manifest for {host:?}", self.digest()))
    }

    /// Every blob that a node of this machine's platform needs, each once: index, manifest, config, layers.
    ///
    /// # Errors
    /// As [`Image::host`].
    pub fn needed(&self) -> Result<Vec<Descriptor>> {
        let host = self.host()?;
        let mut blobs = vec![self.target.clone(), host.manifest.clone(), host.config.clone()];
        blobs.extend(host.layers.iter().cloned());
        Ok(unique(blobs))
    }

    /// Size in bytes of [`Image::needed`].
    ///
    /// # Errors
    /// As [`Image::host`].
    pub fn needed_bytes(&self) -> Result<u64> {
        Ok(self.needed()?.iter().map(|d| d.size).sum())
    }

    /// Every blob of every platform, each once, children before what names them (the order to push in).
    pub fn blobs(&self) -> Vec<Descriptor> {
        let mut blobs = Vec::new();
        for p in &self.platforms {
            blobs.extend(p.layers.iter().cloned());
            blobs.push(p.config.clone());
        }
        blobs.extend(self.platforms.iter().map(|p| p.manifest.clone()));
        blobs.push(self.target.clone());
        unique(blobs)
    }

    /// Writes an OCI archive (tar of a layout) that `ctr images import`, `skopeo copy oci-archive:` and
    /// `podman load` take under `name`, for example `localhost/tote:0.1.0`. The bytes depend on the image and
    /// the name alone.
    ///
    /// # Errors
    /// If the file cannot be written; an existing archive is replaced only once the new one is complete.
    pub fn write_archive(&self, path: &Path, name: &str) -> Result<()> {
        self.layout.write_archive(path, name, &self.target, self.host()?, &self.blobs())
    }
}

fn unique(blobs: Vec<Descriptor>) -> Vec<Descriptor> {
    let mut seen = std::collections::BTreeSet::new();
    blobs.into_iter().filter(|d| seen.insert(d.digest.clone())).collect()
}

/// `sha256:<hex>` of the bytes.
fn digest(bytes: &[u8]) -> String {
    named(&Sha256::digest(bytes))
}

/// `sha256:<hex>` of a finished hash.
fn named(hash: &[u8]) -> String {
    use std::fmt::Write as _;
    hash.iter().fold("sha256:".to_owned(), |mut out, byte| {
        // Writing to a String cannot fail.
        let _ = write!(out, "{byte:02x}");
        out
    })
}
