//! What images the node holds, and who may have them by kubelet's records; kept true by containerd's events, changes of
//! the records, and a look now and then.
//!
//! The scan asks the content store; putting the answer together and telling what changed are pure.

mod unpacked;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tote_image::{
    Descriptor, Digest, Document, MAX_DOCUMENT_BYTES, Manifest, Platform, chain_ids, created, diff_ids,
};
use tote_rpc::v1;

use crate::containerd::{Containerd, Error, ImageRecord};
use crate::kubelet::{Pulls, Records};

/// Events that come within this time of the first are one change.
const SETTLE: Duration = Duration::from_millis(20);

/// The least time between two scans.
const SPACING: Duration = Duration::from_millis(100);

/// When it is looked at again after the first time: the subscription to events has taken effect by then.
const SECOND_LOOK: Duration = Duration::from_secs(1);

/// How often the node is looked at though no event came.
const RECHECK: Duration = Duration::from_secs(30);

/// Kubelet writes down who may have an image a moment after containerd has it. For so long at most an image that kubelet
/// is pulling is not told of without its record: it would count as one that nobody has restricted.
const RECORD_PATIENCE: Duration = Duration::from_secs(10);

/// How often such an image is looked at.
const RECORD_PAUSE: Duration = Duration::from_millis(100);

/// All images of a node, by target digest.
pub type Inventory = BTreeMap<Digest, Arc<v1::Image>>;

/// What two inventories differ in: images that are new or other, and targets that are gone.
pub fn difference(old: &Inventory, new: &Inventory) -> v1::InventoryDelta {
    let changed = new.iter().filter(|(digest, image)| {
        old.get(*digest).is_none_or(|before| !Arc::ptr_eq(before, image) && before != *image)
    });
    let gone = old.keys().filter(|digest| !new.contains_key(*digest));
    v1::InventoryDelta {
        upserted: changed.map(|(_, image)| v1::Image::clone(image)).collect(),
        removed: gone.map(ToString::to_string).collect(),
    }
}

/// What a blob of the content store was found to be. Blobs do not change, so it holds as long as they stand.
#[derive(Clone, Debug)]
enum Known {
    Document(Arc<Document>),
    /// With when it was made, and the name of the snapshot of all its layers.
    Config(Platform, i64, Option<Digest>),
    Neither,
}

/// Looks at a node, remembering the documents it has read.
pub struct Scanner {
    containerd: Arc<dyn Containerd>,
    records: Option<Arc<Records>>,
    known: HashMap<Digest, Known>,
    snapshotter: unpacked::Snapshotter,
    /// Images that are not told of yet, and since when they are there.
    held: HashMap<Digest, Instant>,
    told: BTreeSet<Digest>,
    /// Images that were waited for in vain.
    unfinished: BTreeSet<Digest>,
}

impl Scanner {
    /// A scanner that has seen nothing.
    pub fn new(containerd: Arc<dyn Containerd>, records: Option<Arc<Records>>) -> Self {
        Self {
            containerd,
            records,
            known: HashMap::new(),
            snapshotter: unpacked::Snapshotter::default(),
            held: HashMap::new(),
            told: BTreeSet::new(),
            unfinished: BTreeSet::new(),
        }
    }

    /// Whether an image is there that waits for its record.
    fn holds_back(&self) -> bool {
        !self.held.is_empty()
    }

    async fn pulls(&self) -> Option<Arc<Pulls>> {
        let records = self.records.clone()?;
        // A task that reads files does not panic.
        tokio::task::spawn_blocking(move || records.read()).await.ok()
    }

    /// Whether a new image is not to be told of yet: kubelet pulls it, and has not said who may have it.
    fn waits(&mut self, digest: &Digest, image: &v1::Image, pulls: &Pulls) -> bool {
        let is_recorded = image.manifests.iter().any(|manifest| manifest.pulled.is_some());
        if self.told.contains(digest) || is_recorded || !pulls.is_pulling(&image.names) {
            return false;
        }
        let since = *self.held.entry(digest.clone()).or_insert_with(Instant::now);
        since.elapsed() < RECORD_PATIENCE
    }

    /// Whether a pull of an image that was waited for in vain has still not ended.
    fn is_unfinished(&mut self, digest: &Digest, image: &v1::Image, pulls: Option<&Pulls>) -> bool {
        let is_recorded = image.manifests.iter().any(|manifest| manifest.pulled.is_some());
        let is_pulling = pulls.is_some_and(|pulls| pulls.is_pulling(&image.names));
        if is_recorded || !is_pulling {
            self.unfinished.remove(digest);
        } else if self.held.contains_key(digest) {
            self.unfinished.insert(digest.clone());
        }
        self.unfinished.contains(digest)
    }

    /// The node's images as they are now.
    pub async fn scan(&mut self) -> Result<Inventory, Error> {
        self.snapshotter.ask_again();
        let records = self.containerd.images().await?;
        let sizes: HashMap<Digest, u64> = self.containerd.blobs().await?.into_iter().collect();
        // After the images: what is not being pulled by now has its record.
        let pulls = self.pulls().await;
        let before = std::mem::take(&mut self.held);
        self.known.retain(|digest, _| sizes.contains_key(digest));
        let mut names: BTreeMap<Digest, (Descriptor, BTreeSet<String>)> = BTreeMap::new();
        for ImageRecord { name, target } in records {
            names.entry(target.digest.clone()).or_insert_with(|| (target, BTreeSet::new())).1.insert(name);
        }
        let mut inventory = Inventory::new();
        for (digest, (target, names)) in names {
            let mut manifests = self.manifests(&target, &sizes).await?;
            for manifest in &mut manifests {
                let id = manifest.config_digest.parse().ok();
                manifest.pulled = pulls.as_ref().zip(id).and_then(|(pulls, id)| pulls.of(&id));
            }
            let mut image = v1::Image {
                target: Some(v1::Descriptor {
                    media_type: target.media_type,
                    digest: digest.to_string(),
                    size: i64::try_from(target.size).unwrap_or(i64::MAX),
                }),
                names: names.into_iter().collect(),
                manifests,
            };
            if let Some(since) = before.get(&digest) {
                self.held.insert(digest.clone(), *since);
            }
            if pulls.as_ref().is_some_and(|pulls| self.waits(&digest, &image, pulls)) {
                continue;
            }
            if self.is_unfinished(&digest, &image, pulls.as_deref()) {
                // Kubelet never came to write down who may have it: then nobody is known to.
                for manifest in &mut image.manifests {
                    manifest.pulled = Some(v1::PulledRecord::default());
                }
            }
            self.held.remove(&digest);
            inventory.insert(digest, Arc::new(image));
        }
        self.unfinished.retain(|digest| inventory.contains_key(digest));
        self.told = inventory.keys().cloned().collect();
        Ok(inventory)
    }

    async fn manifests(
        &mut self,
        target: &Descriptor,
        sizes: &HashMap<Digest, u64>,
    ) -> Result<Vec<v1::Manifest>, Error> {
        let mut found = Vec::new();
        match self.document(&target.digest, sizes).await? {
            None => {}
            Some(document) => match &*document {
                Document::Manifest(manifest) => {
                    found.push(self.manifest(&target.digest, None, manifest, sizes).await?);
                }
                Document::Index(index) => {
                    let mut seen = BTreeSet::new();
                    for entry in &index.manifests {
                        let digest = &entry.descriptor.digest;
                        if !seen.insert(digest) {
                            continue; // An index may name one a thousand times.
                        }
                        let child = self.document(digest, sizes).await?;
                        let Some(Document::Manifest(manifest)) = child.as_deref() else { continue };
                        found.push(self.manifest(digest, entry.platform.clone(), manifest, sizes).await?);
                    }
                }
            },
        }
        Ok(found)
    }

    async fn manifest(
        &mut self,
        digest: &Digest,
        named: Option<Platform>,
        manifest: &Manifest,
        sizes: &HashMap<Digest, u64>,
    ) -> Result<v1::Manifest, Error> {
        let (own, created, top) = match self.read(&manifest.config.digest, sizes).await? {
            Some(Known::Config(platform, created, top)) => (Some(platform), created, top),
            _ => (None, 0, None),
        };
        let mut summary = summary(digest, named.or(own).as_ref(), manifest, sizes);
        summary.created = created;
        if let Some(top) = top.filter(|_| !summary.complete) {
            summary.unpacked = self.snapshotter.has(self.containerd.as_ref(), &top).await?;
        }
        Ok(summary)
    }

    async fn document(
        &mut self,
        digest: &Digest,
        sizes: &HashMap<Digest, u64>,
    ) -> Result<Option<Arc<Document>>, Error> {
        Ok(match self.read(digest, sizes).await? {
            Some(Known::Document(document)) => Some(document),
            _ => None,
        })
    }

    async fn read(&mut self, digest: &Digest, sizes: &HashMap<Digest, u64>) -> Result<Option<Known>, Error> {
        if let Some(known) = self.known.get(digest) {
            return Ok(Some(known.clone()));
        }
        let Some(size) = sizes.get(digest).copied() else { return Ok(None) };
        let known = if size > MAX_DOCUMENT_BYTES {
            Known::Neither
        } else {
            let pieces = match self.containerd.read(digest, 0, size).await {
                Ok(pieces) => pieces.try_collect::<Vec<_>>().await,
                Err(error) => Err(error),
            };
            match pieces {
                Ok(pieces) => recognize(digest, &pieces.concat()),
                // Gone since it was listed; an event will follow.
                Err(Error::NotFound(_)) => return Ok(None),
                Err(error) => return Err(error),
            }
        };
        self.known.insert(digest.clone(), known.clone());
        Ok(Some(known))
    }
}

/// What a blob is. A damaged one is nothing: it must not be offered to others.
fn recognize(digest: &Digest, bytes: &[u8]) -> Known {
    if !digest.matches(bytes) {
        tracing::warn!(%digest, "a blob of the content store does not have its digest");
        return Known::Neither;
    }
    if let Ok(document) = Document::parse(bytes) {
        return Known::Document(Arc::new(document));
    }
    diff_ids(bytes).map_or(Known::Neither, |(platform, diff_ids)| {
        Known::Config(platform, created(bytes), chain_ids(&diff_ids).pop())
    })
}

fn summary(
    digest: &Digest,
    platform: Option<&Platform>,
    manifest: &Manifest,
    sizes: &HashMap<Digest, u64>,
) -> v1::Manifest {
    let here = |blob: &Descriptor| sizes.get(&blob.digest) == Some(&blob.size);
    let own = sizes.get(digest).copied().unwrap_or_default();
    let missing: BTreeSet<String> = std::iter::once(&manifest.config)
        .chain(&manifest.layers)
        .filter(|blob| !here(blob))
        .map(|blob| blob.digest.to_string())
        .collect();
    v1::Manifest {
        digest: digest.to_string(),
        platform: platform.map(wire_platform),
        config_digest: manifest.config.digest.to_string(),
        size: i64::try_from(own.saturating_add(manifest.content_size())).unwrap_or(i64::MAX),
        complete: missing.is_empty(),
        missing: missing.into_iter().collect(),
        created: 0,
        pulled: None,
        unpacked: false,
    }
}

/// A platform as the wire has it.
pub fn wire_platform(platform: &Platform) -> v1::Platform {
    v1::Platform {
        os: platform.os().to_owned(),
        architecture: platform.architecture().to_owned(),
        variant: platform.variant().to_owned(),
        os_version: String::new(),
    }
}

/// Keeps `inventory` true until `stop`; `None` until the first scan has succeeded.
pub async fn follow(
    containerd: Arc<dyn Containerd>,
    records: Option<Arc<Records>>,
    inventory: watch::Sender<Option<Arc<Inventory>>>,
    stop: CancellationToken,
) {
    let mut scanner = Scanner::new(containerd.clone(), records);
    let mut pause = Duration::from_millis(100);
    while !stop.is_cancelled() {
        let followed =
            stop.run_until_cancelled(follow_once(&containerd, &mut scanner, &inventory, &mut pause));
        if let Some(Err(error)) = followed.await {
            tracing::warn!(%error, "cannot look at this node's images; trying again");
        }
        stop.run_until_cancelled(tokio::time::sleep(pause)).await;
        pause = (pause * 2).min(Duration::from_secs(5));
    }
}

/// Follows until containerd goes away.
async fn follow_once(
    containerd: &Arc<dyn Containerd>,
    scanner: &mut Scanner,
    inventory: &watch::Sender<Option<Arc<Inventory>>>,
    pause: &mut Duration,
) -> Result<(), Error> {
    let mut wait = SECOND_LOOK;
    let mut changes = containerd.changes().await?.ready_chunks(64);
    // It may be another containerd than before.
    scanner.snapshotter = unpacked::Snapshotter::default();
    loop {
        let looked = Instant::now();
        let new = scanner.scan().await?;
        *pause = Duration::from_millis(100);
        inventory.send_if_modified(|current| {
            let differs = current.as_deref() != Some(&new);
            if differs {
                *current = Some(Arc::new(new));
            }
            differs
        });
        let mut within = std::mem::replace(&mut wait, RECHECK);
        if scanner.holds_back() {
            wait = within.min(wait);
            within = RECORD_PAUSE;
        }
        let records = scanner.records.clone();
        let rewritten = async {
            match &records {
                Some(records) => records.changed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            event = changes.next() => {
                event.ok_or_else(|| Error::Unavailable("its events ended".to_owned()))?;
                tokio::time::sleep_until((Instant::now() + SETTLE).max(looked + SPACING)).await;
            }
            () = rewritten => {}
            () = tokio::time::sleep(within) => {}
        }
    }
}

#[cfg(test)]
mod tests;
