//! From the digest asked for to the blobs of this node's platform: index, manifest, config. The documents are
//! small; they are read whole, verified, parsed, and stored with the labels that keep what they name.

use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use tote_image::{
    Descriptor, Digest, Document, DocumentError, MAX_DOCUMENT_BYTES, Manifest, Platform, chain_ids, diff_ids,
};

use super::chunk::Tried;
use super::failure::Failure;
use super::fetch::{self, FetchError, Kind, Span};
use super::request::Source;
use super::run::Run;
use crate::containerd::{Error, Ingest, Labels, Layer, gc_labels};

/// How long a source that is getting the image itself may take to answer for a document.
const RELAY_HEAD: Duration = Duration::from_secs(2);

/// Types of a container image's config.
const CONFIGS: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];

/// Types of layers that containerd unpacks by itself (`core/images/mediatypes.go`).
const LAYERS: [&str; 6] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
];

/// How many manifests of an index are asked for, until one can be had: variants of one architecture are fewer.
const CANDIDATES: usize = 16;

/// An image of which the documents are on the node.
#[derive(Debug)]
pub(super) struct Image {
    /// What the records name.
    pub target: Descriptor,
    /// The bytes of index and manifest.
    documents: u64,
    /// The manifest for this platform.
    pub manifest: Manifest,
    diff_ids: Vec<Digest>,
    /// The chain ID of each layer.
    pub chain: Vec<Digest>,
}

impl Image {
    /// Bytes of all blobs that this platform needs.
    pub(super) fn total(&self) -> u64 {
        self.documents.saturating_add(self.manifest.content_size())
    }

    pub(super) fn layer(&self, at: usize) -> Layer<'_> {
        Layer {
            blob: &self.manifest.layers[at],
            diff_id: &self.diff_ids[at],
            parent: at.checked_sub(1).map(|below| &self.chain[below]),
            chain: &self.chain[at],
        }
    }
}

/// A document that is on the node.
struct Stored<T> {
    parsed: T,
    media_type: String,
    size: u64,
}

impl Run<'_> {
    pub(super) async fn resolve(&self, node: &Platform) -> Result<Image, Failure> {
        let digest = &self.wanted.digest;
        let target = self.stored(Kind::Manifest, digest, None, parse_document).await?;
        let descriptor =
            Descriptor { media_type: target.media_type, digest: digest.clone(), size: target.size };
        let (manifest, documents, named) = match target.parsed {
            Document::Manifest(manifest) => (manifest, target.size, false),
            Document::Index(index) => {
                let (manifest, size, named) = self.child(&index, node).await?;
                (manifest, target.size.saturating_add(size), named)
            }
        };
        check_media_types(&manifest)?;
        check_sizes(&manifest)?;
        let config = &manifest.config;
        self.brings
            .learn([&config.digest].into_iter().chain(manifest.layers.iter().map(|layer| &layer.digest)));
        self.brings.learnt_all();
        let parse = |bytes: &[u8]| Ok((diff_ids(bytes)?, Labels::new(), String::new()));
        let (platform, diff_ids) =
            self.stored(Kind::Blob, &config.digest, Some(config.size), parse).await?.parsed;
        if !named && node.rank(&platform).is_none() {
            return Err(Failure::Platform(format!("the image is for {platform}, this node runs {node}")));
        }
        if diff_ids.len() != manifest.layers.len() {
            let (layers, ids, config) = (manifest.layers.len(), diff_ids.len(), &config.digest);
            let message = format!("the manifest has {layers} layers, its config {config} {ids} diff IDs");
            return Err(Failure::Unsupported(message));
        }
        let chain = chain_ids(&diff_ids);
        Ok(Image { target: descriptor, documents, manifest, diff_ids, chain })
    }

    /// The best manifest of an index that can be had, its size, and whether the index named its platform.
    async fn child(
        &self,
        index: &tote_image::Index,
        node: &Platform,
    ) -> Result<(Manifest, u64, bool), Failure> {
        let mut missing = String::new();
        for entry in index.candidates(node)?.into_iter().take(CANDIDATES) {
            let (digest, size) = (&entry.descriptor.digest, entry.descriptor.size);
            match self.stored(Kind::Manifest, digest, Some(size), parse_document).await {
                Ok(stored) => match stored.parsed {
                    Document::Manifest(manifest) => {
                        self.brings.learn([digest]);
                        return Ok((manifest, stored.size, entry.platform.is_some()));
                    }
                    Document::Index(_) => {
                        let message = format!("{digest} is an index within an index");
                        return Err(Failure::Unsupported(message));
                    }
                },
                Err(Failure::NoSource { tried, .. }) => missing = format!("of {digest}: {tried}"),
                Err(failure) => return Err(failure),
            }
        }
        Err(Failure::PlatformNotHeld { platform: node.clone(), tried: missing })
    }

    /// Makes a document present, held and labelled; `parse` gives what is wanted of it, its labels and its
    /// media type.
    async fn stored<T>(
        &self,
        kind: Kind,
        digest: &Digest,
        size: Option<u64>,
        parse: impl Fn(&[u8]) -> Result<(T, Labels, String), DocumentError>,
    ) -> Result<Stored<T>, Failure> {
        if let Some(size) = size.filter(|size| *size > MAX_DOCUMENT_BYTES) {
            return Err(too_large(digest, size));
        }
        let wanting = self.context.flights.want(digest, self.sources.clone());
        let _turn = wanting.turn().await;
        let bytes = match self.containerd().blob(digest).await? {
            Some(found) => self.local(digest, found.size).await?,
            None => self.fetched(kind, digest).await?,
        };
        let has = bytes.len() as u64;
        if let Some(says) = size.filter(|size| *size != has) {
            return Err(Failure::Unsupported(format!(
                "blob {digest} has {has} bytes, the image says {says}"
            )));
        }
        let (parsed, labels, media_type) = parse(&bytes).map_err(|error| {
            Failure::Unsupported(format!("blob {digest} of the image cannot be handled: {error}"))
        })?;
        let size = has;
        let blob = Descriptor { media_type: String::new(), digest: digest.clone(), size };
        if !self.is_present(&blob, &labels).await? {
            self.store(&blob, bytes, labels).await?;
        }
        Ok(Stored { parsed, media_type, size })
    }

    /// Commits a document.
    async fn store(&self, blob: &Descriptor, bytes: Bytes, labels: Labels) -> Result<(), Failure> {
        for _ in 0..2 {
            let Ingest::Open(mut writer) = self.containerd().ingest(&self.lease.id, blob).await? else {
                break;
            };
            if writer.offset() == 0 {
                writer.write(bytes.clone()).await?;
            }
            let committed = if writer.offset() == blob.size {
                writer.commit(labels.clone()).await
            } else {
                Err(Error::Mismatch("what a run that was killed left".to_owned()))
            };
            match committed {
                Ok(()) => {
                    self.tracker.complete(&blob.digest, blob.size);
                    return Ok(());
                }
                // Kubelet's pull was quicker.
                Err(Error::AlreadyExists(_)) => break,
                Err(Error::Mismatch(_)) => self.containerd().abort(&blob.digest).await?,
                Err(error) => return Err(error.into()),
            }
        }
        self.present(blob, &labels).await
    }

    async fn local(&self, digest: &Digest, size: u64) -> Result<Bytes, Failure> {
        if size > MAX_DOCUMENT_BYTES {
            return Err(too_large(digest, size));
        }
        let pieces = self.containerd().read(digest, 0, size).await?;
        let bytes: Bytes = pieces.try_collect::<Vec<_>>().await?.concat().into();
        if digest.matches(&bytes) { Ok(bytes) } else { Err(Failure::Damaged(digest.clone())) }
    }

    async fn fetched(&self, kind: Kind, digest: &Digest) -> Result<Bytes, Failure> {
        let mut tried = Tried::default();
        let outcome = self.fetched_from(&mut tried, kind, digest).await;
        if outcome.is_ok() {
            tried.settle();
        }
        self.note_liars(&tried);
        outcome
    }

    async fn fetched_from(&self, tried: &mut Tried, kind: Kind, digest: &Digest) -> Result<Bytes, Failure> {
        loop {
            let sources = self.sources.borrow().clone();
            if let Some(begins) = tried.begins() {
                tokio::time::sleep_until(begins).await;
            }
            let chosen = self.first(tried.left(&sources)).and_then(|source| {
                let round = tried.round_of(&source)?;
                Some((source, round))
            });
            let Some((source, round)) = chosen else {
                if !tried.again(&sources, &self.context.patience) {
                    return Err(tried.failure(digest));
                }
                continue;
            };
            match self.whole(&source, kind, digest).await {
                Ok(bytes) if digest.matches(&bytes) => {
                    self.context.traffic.answered(&source.node);
                    self.tracker.moved(digest, bytes.len() as u64, &source.node);
                    self.context.metrics.received(bytes.len() as u64);
                    return Ok(bytes);
                }
                Ok(_) => {
                    tried.note(&source, FetchError::Wrong("gave bytes with another digest".to_owned()));
                }
                Err(error) => {
                    if matches!(error, FetchError::Broken(_)) {
                        self.context.traffic.failed(&source.node);
                    }
                    tried.failed(&source, error, round);
                }
            }
        }
    }

    /// Whom to ask first: of those that lie or fail, only if there is nobody else.
    fn first(&self, sources: Vec<Source>) -> Option<Source> {
        let liars = self.tracker.state().progress.liars;
        let bad =
            |source: &Source| (liars.contains(&source.node), self.context.traffic.is_failing(&source.node));
        // Of those that are alike, the first.
        sources.into_iter().min_by_key(bad)
    }

    async fn whole(&self, source: &Source, kind: Kind, digest: &Digest) -> Result<Bytes, FetchError> {
        let (context, reference) = (self.context, &self.wanted.reference);
        // Whatever length the image gives: the digest tells whether the image lies about it or the source.
        let span = Span::Unknown(MAX_DOCUMENT_BYTES);
        let mut patience = context.patience;
        if source.relay {
            // The others have it as well, and it is small.
            patience.head = patience.head.min(RELAY_HEAD);
        }
        let opened = fetch::open(&context.peers, source, reference, (kind, digest), span, patience);
        let mut body = opened.await?;
        let mut bytes = Vec::new();
        while let Some(piece) = body.next().await? {
            context.bandwidth.take(piece.len()).await;
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes.into())
    }
}

fn parse_document(bytes: &[u8]) -> Result<(Document, Labels, String), DocumentError> {
    let document = Document::parse(bytes)?;
    let media_type = document.media_type(bytes)?;
    let labels = gc_labels(&document);
    Ok((document, labels, media_type))
}

fn too_large(digest: &Digest, size: u64) -> Failure {
    let most = MAX_DOCUMENT_BYTES;
    Failure::Unsupported(format!("blob {digest} of the image has {size} bytes, {most} at most are handled"))
}

/// What no bytes could be, nobody is asked for.
fn check_sizes(manifest: &Manifest) -> Result<(), Failure> {
    match manifest.layers.iter().find(|layer| layer.size == 0 && !layer.digest.matches(b"")) {
        Some(Descriptor { digest, .. }) => {
            let message = format!("layer {digest} has 0 bytes, the image says, and that digest is of some");
            Err(Failure::Unsupported(message))
        }
        None => Ok(()),
    }
}

/// Only what containerd can unpack and run: no artifacts, no encrypted layers.
fn check_media_types(manifest: &Manifest) -> Result<(), Failure> {
    let (config, kind) = (&manifest.config.digest, manifest.config.media_type.as_str());
    if !CONFIGS.contains(&kind) {
        let message = format!("config {config} is of type {kind}: that is no container image's");
        return Err(Failure::Unsupported(message));
    }
    for layer in &manifest.layers {
        let (digest, kind) = (&layer.digest, layer.media_type.as_str());
        if kind.contains("nondistributable") || kind.contains("foreign") {
            let message = format!("layer {digest} is of type {kind}: it is not to be given on");
            return Err(Failure::Unsupported(message));
        }
        if !LAYERS.contains(&kind) {
            let message = format!("layer {digest} is of type {kind}, which cannot be unpacked");
            return Err(Failure::Unsupported(message));
        }
    }
    Ok(())
}
