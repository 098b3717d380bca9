//! The JSON documents of an image and the walk over them. OCI and Docker schema 2 share one shape.
//!
//! A document is hostile until its digest was checked, and may be malformed even then: sizes, counts and
//! digests are bounded and validated here.

use oci_spec::image as spec;
use thiserror::Error;

use crate::shape::{Few, Shape};
use crate::{Digest, DigestError, Platform};

/// The largest index, manifest or config that is read, in bytes: 4 MiB, which is what registries take of a manifest (OCI
/// distribution specification, "Pushing Manifests").
pub const MAX_DOCUMENT_BYTES: u64 = 4 << 20;

/// The most manifests of an index, or layers of a manifest, that are taken: overlayfs itself stops at some 500.
pub const MAX_CHILDREN: usize = 1024;

/// A content descriptor (OCI image specification, "Content Descriptors").
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Descriptor {
    /// The media type as the document gives it.
    pub media_type: String,
    /// The blob's digest.
    pub digest: Digest,
    /// The blob's length in bytes.
    pub size: u64,
}

/// An entry of an index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    /// The manifest, or a nested index.
    pub descriptor: Descriptor,
    /// The platform the entry names, if any.
    pub platform: Option<Platform>,
}

/// An image index, or Docker manifest list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    /// In the document's order: `containerd.io/gc.ref.content.m.<i>` counts by it.
    pub manifests: Vec<IndexEntry>,
}

/// An image manifest, OCI or Docker schema 2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The image's config.
    pub config: Descriptor,
    /// In the order they are applied; a layer may stand here twice.
    pub layers: Vec<Descriptor>,
}

/// A parsed index or manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Document {
    /// An index or manifest list.
    Index(Index),
    /// A manifest.
    Manifest(Manifest),
}

/// Why bytes are no index, manifest or config that can be handled.
#[derive(Debug, Error)]
pub enum DocumentError {
    /// Not JSON, or JSON of another shape.
    #[error("{0} is not valid: {1}")]
    Malformed(&'static str, String),
    /// A descriptor's digest is malformed.
    #[error(transparent)]
    Digest(#[from] DigestError),
    /// Neither `manifests` nor `layers`, or both (which the specification forbids: one digest, two meanings).
    #[error("the document must have either manifests or layers, it has {0}")]
    Ambiguous(&'static str),
    /// Docker schema 1, which containerd 2.x no longer pulls either.
    #[error("schema version {0} is not supported: rebuild the image in the OCI format")]
    SchemaVersion(u64),
    /// A media type that is none of an index's or manifest's, or contradicts the document's shape.
    #[error("media type {0:?} is not that of such a document")]
    MediaType(String),
    /// More children than [`MAX_CHILDREN`].
    #[error("{0} children, at most {MAX_CHILDREN} are handled")]
    TooMany(usize),
    /// No manifest of the index suits the platform.
    #[error("the index has no manifest for {wanted}, only for {offered}")]
    NoPlatform {
        /// The platform asked for.
        wanted: Platform,
        /// Those that the index has, comma-separated.
        offered: String,
    },
}

impl Document {
    /// Parses an index or manifest by its shape. The media type of the descriptor that led here is the
    /// caller's to keep: a record needs it exactly.
    pub fn parse(bytes: &[u8]) -> Result<Self, DocumentError> {
        let shape = shape(bytes)?;
        match shape.schema_version {
            Some(2) => {}
            Some(other) => return Err(DocumentError::SchemaVersion(other)),
            None => {
                return Err(DocumentError::Malformed("the document", "it has no schemaVersion".to_owned()));
            }
        }
        let (manifests, layers) = (shape.manifests, shape.layers);
        match (manifests.is_some(), layers.is_some() || shape.config.is_some()) {
            (true, true) => Err(DocumentError::Ambiguous("both")),
            (false, false) => Err(DocumentError::Ambiguous("neither")),
            (true, false) => {
                bounded(manifests.map_or(0, |manifests| manifests.0))?;
                let index: spec::ImageIndex =
                    serde_json::from_slice(bytes).map_err(malformed("the index"))?;
                let manifests =
                    index.manifests().iter().map(IndexEntry::from_spec).collect::<Result<_, _>>()?;
                Ok(Self::Index(Index { manifests }))
            }
            (false, true) => {
                bounded(layers.map_or(0, |layers| layers.0))?;
                let manifest: spec::ImageManifest =
                    serde_json::from_slice(bytes).map_err(malformed("the manifest"))?;
                let config = Descriptor::from_spec(manifest.config())?;
                let layers = manifest.layers().iter().map(Descriptor::from_spec).collect::<Result<_, _>>()?;
                Ok(Self::Manifest(Manifest { config, layers }))
            }
        }
    }
}

fn malformed(what: &'static str) -> impl Fn(serde_json::Error) -> DocumentError {
    move |error| DocumentError::Malformed(what, error.to_string())
}

/// What a document is, before memory is taken for what it says.
fn shape(bytes: &[u8]) -> Result<Shape<'_>, DocumentError> {
    // An array would do for the members in their order.
    if bytes.iter().find(|byte| !byte.is_ascii_whitespace()).is_some_and(|first| *first != b'{') {
        return Err(DocumentError::Malformed("the document", "it is no object".to_owned()));
    }
    serde_json::from_slice(bytes).map_err(malformed("the document"))
}

impl Document {
    /// The media type a descriptor of this document has: its own `mediaType`, or, where the document leaves it
    /// out, the OCI type of its shape. Refused if it contradicts the shape.
    pub fn media_type(&self, bytes: &[u8]) -> Result<String, DocumentError> {
        let stated = shape(bytes)?.media_type;
        let of_shape: [&str; 2] = match self {
            Self::Index(_) => [
                "application/vnd.oci.image.index.v1+json",
                "application/vnd.docker.distribution.manifest.list.v2+json",
            ],
            Self::Manifest(_) => [
                "application/vnd.oci.image.manifest.v1+json",
                "application/vnd.docker.distribution.manifest.v2+json",
            ],
        };
        match stated.as_deref() {
            None | Some("") => Ok(of_shape[0].to_owned()),
            Some(stated) if of_shape.contains(&stated) => Ok(stated.to_owned()),
            Some(other) => Err(DocumentError::MediaType(other.chars().take(200).collect())),
        }
    }
}

fn bounded(children: usize) -> Result<(), DocumentError> {
    if children > MAX_CHILDREN { Err(DocumentError::TooMany(children)) } else { Ok(()) }
}

impl Descriptor {
    fn from_spec(descriptor: &spec::Descriptor) -> Result<Self, DocumentError> {
        let digest = descriptor.digest().as_ref().parse()?;
        Ok(Self { media_type: descriptor.media_type().to_string(), digest, size: descriptor.size() })
    }
}

impl IndexEntry {
    fn from_spec(descriptor: &spec::Descriptor) -> Result<Self, DocumentError> {
        let platform = descriptor.platform().as_ref().map(|platform| {
            Platform::new(
                &platform.os().to_string(),
                &platform.architecture().to_string(),
                platform.variant().as_deref().unwrap_or(""),
            )
        });
        Ok(Self { descriptor: Descriptor::from_spec(descriptor)?, platform })
    }
}

impl Index {
    /// The entries a node of this platform could run, best first; entries without a platform last, as
    /// containerd orders them. Attestations (`unknown/unknown`) are never among them.
    pub fn candidates(&self, node: &Platform) -> Result<Vec<&IndexEntry>, DocumentError> {
        let mut ranked: Vec<(u32, &IndexEntry)> = self
            .manifests
            .iter()
            .filter_map(|entry| match &entry.platform {
                Some(platform) => node.rank(platform).map(|rank| (rank, entry)),
                None => Some((u32::MAX, entry)),
            })
            .collect();
        ranked.sort_by_key(|(rank, _)| *rank);
        if ranked.is_empty() {
            let mut offered: Vec<String> = self
                .manifests
                .iter()
                .filter_map(|entry| entry.platform.as_ref())
                .filter(|platform| platform.is_known())
                .map(ToString::to_string)
                .collect();
            offered.dedup();
            offered.truncate(8);
            return Err(DocumentError::NoPlatform { wanted: node.clone(), offered: offered.join(", ") });
        }
        Ok(ranked.into_iter().map(|(_, entry)| entry).collect())
    }
}

impl Manifest {
    /// Bytes of config and distinct layers; a layer that stands twice counts once.
    pub fn content_size(&self) -> u64 {
        let mut seen = std::collections::HashSet::new();
        let layers = self.layers.iter().filter(|layer| seen.insert(&layer.digest));
        layers.map(|layer| layer.size).fold(self.config.size, u64::saturating_add)
    }
}

/// What is wanted of a config, and nothing else of it.
#[derive(serde::Deserialize)]
struct Config {
    architecture: String,
    os: String,
    #[serde(default)]
    variant: Option<String>,
    rootfs: RootFs,
}

#[derive(serde::Deserialize)]
struct RootFs {
    diff_ids: Few<String>,
}

#[derive(serde::Deserialize)]
struct Made {
    #[serde(default)]
    created: Option<String>,
}

/// The platform and the diff IDs (`rootfs.diff_ids`, digests of the uncompressed layers) of a config.
pub fn diff_ids(config: &[u8]) -> Result<(Platform, Vec<Digest>), DocumentError> {
    let config: Config = serde_json::from_slice(config).map_err(malformed("the config"))?;
    let ids = config.rootfs.diff_ids.0.iter().map(|id| id.parse()).collect::<Result<_, _>>()?;
    let platform = Platform::new(&config.os, &config.architecture, config.variant.as_deref().unwrap_or(""));
    Ok((platform, ids))
}

/// When the config says that the image was made, in seconds since 1970; 0 if it does not say, or says a time before:
/// builds that are to be the same every time write that.
pub fn created(config: &[u8]) -> i64 {
    let made: Result<Made, _> = serde_json::from_slice(config);
    let created = made.ok().and_then(|made| made.created?.parse::<jiff::Timestamp>().ok());
    created.map_or(0, |at| at.as_second().max(0))
}

/// The chain IDs of some diff IDs, lowest layer first (OCI image specification, "Layer ChainID"): the first is
/// the diff ID itself, each further one the sha256 of the one below, a space, and the diff ID.
pub fn chain_ids(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut chain: Vec<Digest> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        let next = match chain.last() {
            None => diff_id.clone(),
            Some(below) => Digest::sha256(format!("{below} {diff_id}").as_bytes()),
        };
        chain.push(next);
    }
    chain
}

#[cfg(test)]
mod tests;
