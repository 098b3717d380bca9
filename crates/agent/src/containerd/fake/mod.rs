//! A containerd in memory, for tests: content, ingests, leases, records, snapshots, garbage collection, and
//! CRI's view. `conformance` shows that it behaves as the real ones do.
//!
//! It can be told to die at its n-th call, as an agent or a containerd that is killed would; what was done
//! before stays.

mod store;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, stream};
use tokio::sync::{broadcast, watch};
use tote_image::{Descriptor, Digest, Platform, Verifier};

use self::store::{Ingesting, Resource, Store};
use super::{
    Blob, BlobWriter, ByteStream, Change, Containerd, Error, Facts, Held, ImageRecord, Ingest, Labels, Layer,
    Lease, Space,
};

/// The snapshotter that CRI of a [`Fake`] uses.
pub const SNAPSHOTTER: &str = "overlayfs";

/// An in-memory containerd. Clones share it.
#[derive(Clone, Debug)]
pub struct Fake {
    store: Arc<Mutex<Store>>,
    changes: broadcast::Sender<Change>,
    unpacks: watch::Sender<bool>,
    deletes: watch::Sender<bool>,
}

impl Default for Fake {
    fn default() -> Self {
        let (unpacks, deletes) = (watch::Sender::new(true), watch::Sender::new(true));
        Self { store: Arc::default(), changes: broadcast::channel(64).0, unpacks, deletes }
    }
}

impl Fake {
    /// From its `calls`-th call on, every call fails as if containerd were gone; `None` revives it.
    pub fn die_after(&self, calls: Option<u32>) {
        self.lock().calls_left = calls;
    }

    /// Its file system has this size from now on.
    pub fn disk_of(&self, size: u64) {
        self.lock().disk = size;
    }

    /// So many bytes are free from now on.
    pub fn free_bytes(&self, free: u64) {
        self.lock().free = Some(free);
    }

    /// Whether it has come to that.
    pub fn is_dead(&self) -> bool {
        self.lock().calls_left == Some(0)
    }

    /// What was written of a blob that is not committed.
    pub fn partial(&self, digest: &Digest) -> Option<Vec<u8>> {
        self.lock().ingests.get(digest).map(|ingest| ingest.data.clone())
    }

    /// The sizes of all writes of a blob, in their order.
    pub fn writes(&self, digest: &Digest) -> Vec<usize> {
        self.lock().writes.get(digest).cloned().unwrap_or_default()
    }

    /// Replaces what was written of a blob that is not committed.
    pub fn overwrite_partial(&self, digest: &Digest, bytes: &[u8]) {
        if let Some(ingest) = self.lock().ingests.get_mut(digest) {
            ingest.data = bytes.to_vec();
        }
    }

    /// Leases that were to be deleted, or still are.
    pub fn deleted(&self) -> Vec<String> {
        self.lock().deleting.clone()
    }

    /// Whether it deletes leases; where it does not, that waits.
    pub fn set_deletes(&self, deletes: bool) {
        self.deletes.send_replace(deletes);
    }

    /// Whether it unpacks; where it does not, that waits.
    pub fn set_unpacks(&self, unpacks: bool) {
        self.unpacks.send_replace(unpacks);
    }

    /// Whether CRI sees images.
    pub fn set_cri_blind(&self, blind: bool) {
        self.lock().cri_blind = blind;
    }

    /// Makes [`Containerd::facts`] say that no snapshotter can be used.
    pub fn set_no_snapshotter(&self, reason: &str) {
        self.lock().no_snapshotter = Some(reason.to_owned());
    }

    /// Makes every write fail for want of space.
    pub fn set_full(&self, full: bool) {
        self.lock().full = full;
    }

    /// Puts a blob there, with no lease: the next collection takes it unless something refers to it.
    pub fn put(&self, bytes: &[u8], labels: Labels) -> Digest {
        let digest = Digest::sha256(bytes);
        self.lock().blobs.insert(digest.clone(), (Bytes::copy_from_slice(bytes), labels));
        digest
    }

    /// Removes a blob, as a collection or a person would.
    pub fn remove_blob(&self, digest: &Digest) {
        self.lock().blobs.remove(digest);
        let _ = self.changes.send(Change::Content);
    }

    /// Makes a record as a pull would.
    pub fn put_image(&self, name: &str, target: &Descriptor) {
        self.lock().images.insert(name.to_owned(), target.clone());
        let _ = self.changes.send(Change::Images);
    }

    /// Removes a record.
    pub fn remove_image(&self, name: &str) {
        self.lock().images.remove(name);
        let _ = self.changes.send(Change::Images);
    }

    /// Collects what nothing holds.
    pub fn collect(&self) {
        self.lock().collect();
    }

    /// Removes all snapshots, behind its back.
    pub fn remove_snapshots(&self) {
        self.lock().snapshots.clear();
    }

    /// Names of all snapshots, unfinished ones too.
    pub fn snapshots(&self) -> Vec<String> {
        self.lock().snapshots.keys().map(|(_, name)| name.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(&self) -> Result<MutexGuard<'_, Store>, Error> {
        let mut store = self.lock();
        store.tick()?;
        Ok(store)
    }
}

/// A writer of [`Fake`]; what it holds is there from the moment it is written.
struct Writer {
    fake: Fake,
    blob: Descriptor,
    offset: u64,
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(ingest) = self.fake.lock().ingests.get_mut(&self.blob.digest) {
            ingest.locked = false;
        }
    }
}

#[tonic::async_trait]
impl BlobWriter for Writer {
    fn offset(&self) -> u64 {
        self.offset
    }

    async fn write(&mut self, bytes: Bytes) -> Result<(), Error> {
        let mut store = self.fake.call()?;
        if store.full {
            return Err(Error::Full("no space left on device".to_owned()));
        }
        let gone = || Error::NotFound("the ingest".to_owned());
        let ingest = store.ingests.get_mut(&self.blob.digest).ok_or_else(gone)?;
        ingest.data.extend_from_slice(&bytes);
        store.writes.entry(self.blob.digest.clone()).or_default().push(bytes.len());
        self.offset += bytes.len() as u64;
        Ok(())
    }

    async fn commit(self: Box<Self>, labels: Labels) -> Result<(), Error> {
        let mut store = self.fake.call()?;
        let gone = || Error::NotFound("the ingest".to_owned());
        let ingest = store.ingests.get(&self.blob.digest).ok_or_else(gone)?;
        if ingest.data.len() as u64 != self.blob.size {
            return Err(Error::Mismatch(format!("{} bytes, not {}", ingest.data.len(), self.blob.size)));
        }
        let mut verifier: Verifier = self.blob.digest.verifier();
        verifier.update(&ingest.data);
        let found = verifier.finish();
        if found != self.blob.digest {
            return Err(Error::Mismatch(format!("{found}, not {}", self.blob.digest)));
        }
        if let Some(ingest) = store.ingests.remove(&self.blob.digest) {
            store.blobs.insert(self.blob.digest.clone(), (ingest.data.into(), labels));
            for held in store.leases.values_mut() {
                if held.resources.remove(&Resource::Ingest(self.blob.digest.clone())) {
                    held.resources.insert(Resource::Blob(self.blob.digest.clone()));
                }
            }
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl Containerd for Fake {
    async fn facts(&self) -> Result<Facts, Error> {
        let store = self.call()?;
        let snapshotter = store.no_snapshotter.clone().map_or(Ok(SNAPSHOTTER.to_owned()), Err);
        Ok(Facts { version: "0.0.0".to_owned(), platform: Platform::new("linux", "amd64", ""), snapshotter })
    }

    async fn blob(&self, digest: &Digest) -> Result<Option<Blob>, Error> {
        let store = self.call()?;
        let found = store.blobs.get(digest);
        Ok(found.map(|(bytes, labels)| Blob { size: bytes.len() as u64, labels: labels.clone() }))
    }

    async fn blobs(&self) -> Result<Vec<(Digest, u64)>, Error> {
        let store = self.call()?;
        Ok(store.blobs.iter().map(|(digest, (bytes, _))| (digest.clone(), bytes.len() as u64)).collect())
    }

    async fn read(&self, digest: &Digest, offset: u64, length: u64) -> Result<ByteStream, Error> {
        let store = self.call()?;
        let (bytes, _) = store.blobs.get(digest).ok_or_else(|| Error::NotFound(digest.to_string()))?;
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(usize::try_from(length).unwrap_or(usize::MAX)).min(bytes.len());
        if start > end {
            return Err(Error::Other("out of range".to_owned()));
        }
        let pieces: Vec<_> =
            bytes.slice(start..end).chunks(1000).map(Bytes::copy_from_slice).map(Ok).collect();
        Ok(stream::iter(pieces).boxed())
    }

    async fn ingest(&self, lease: &str, blob: &Descriptor) -> Result<Ingest, Error> {
        let mut store = self.call()?;
        if store.blobs.contains_key(&blob.digest) {
            store.hold(lease, Resource::Blob(blob.digest.clone()))?;
            return Ok(Ingest::Present);
        }
        store.hold(lease, Resource::Ingest(blob.digest.clone()))?;
        let ingest = store.ingests.entry(blob.digest.clone()).or_default();
        if ingest.locked {
            return Err(Error::Unavailable(format!("ref {} locked", blob.digest)));
        }
        if ingest.total != blob.size {
            *ingest = Ingesting { total: blob.size, ..Ingesting::default() };
        }
        ingest.locked = true;
        let offset = ingest.data.len() as u64;
        Ok(Ingest::Open(Box::new(Writer { fake: self.clone(), blob: blob.clone(), offset })))
    }

    async fn ingests(&self) -> Result<Vec<Digest>, Error> {
        Ok(self.call()?.ingests.keys().cloned().collect())
    }

    async fn abort(&self, digest: &Digest) -> Result<(), Error> {
        self.call()?.ingests.remove(digest);
        Ok(())
    }

    async fn label(&self, digest: &Digest, labels: &Labels) -> Result<(), Error> {
        let mut store = self.call()?;
        let found = store.blobs.get_mut(digest).ok_or_else(|| Error::NotFound(digest.to_string()))?;
        found.1.extend(labels.clone());
        Ok(())
    }

    async fn space(&self) -> Result<Option<Space>, Error> {
        let store = self.call()?;
        Ok(store.free.map(|free| Space { size: store.disk, free }))
    }

    async fn create_lease(&self, lease: &Lease, _expires: SystemTime) -> Result<(), Error> {
        let mut store = self.call()?;
        if store.leases.contains_key(&lease.id) {
            return Err(Error::AlreadyExists(lease.id.clone()));
        }
        store.leases.insert(lease.id.clone(), store::Holding::new(&lease.transfer));
        Ok(())
    }

    async fn leases(&self) -> Result<Vec<Lease>, Error> {
        let store = self.call()?;
        let leases = store.leases.iter();
        Ok(leases.map(|(id, held)| Lease { id: id.clone(), transfer: held.transfer.clone() }).collect())
    }

    async fn hold(&self, lease: &str, held: Held<'_>) -> Result<(), Error> {
        let resource = match held {
            Held::Blob(digest) => Resource::Blob(digest.clone()),
            Held::Ingest(digest) => Resource::Ingest(digest.clone()),
            Held::Snapshot { snapshotter, chain } => {
                Resource::Snapshot(snapshotter.to_owned(), chain.to_string())
            }
        };
        self.call()?.hold(lease, resource)
    }

    async fn delete_lease(&self, id: &str) -> Result<(), Error> {
        self.lock().deleting.push(id.to_owned());
        // The sender is here.
        let _ = self.deletes.subscribe().wait_for(|deletes| *deletes).await;
        let mut store = self.call()?;
        store.leases.remove(id);
        store.collect();
        Ok(())
    }

    async fn images(&self) -> Result<Vec<ImageRecord>, Error> {
        let store = self.call()?;
        let images = store.images.iter();
        Ok(images.map(|(name, target)| ImageRecord { name: name.clone(), target: target.clone() }).collect())
    }

    async fn image(&self, name: &str) -> Result<Option<ImageRecord>, Error> {
        let store = self.call()?;
        let found = store.images.get(name);
        Ok(found.map(|target| ImageRecord { name: name.to_owned(), target: target.clone() }))
    }

    async fn create_image(&self, image: &ImageRecord) -> Result<(), Error> {
        let mut store = self.call()?;
        if store.images.contains_key(&image.name) {
            return Err(Error::AlreadyExists(image.name.clone()));
        }
        store.images.insert(image.name.clone(), image.target.clone());
        let _ = self.changes.send(Change::Images);
        Ok(())
    }

    async fn retarget_image(&self, image: &ImageRecord) -> Result<(), Error> {
        let mut store = self.call()?;
        let found = store.images.get_mut(&image.name);
        *found.ok_or_else(|| Error::NotFound(image.name.clone()))? = image.target.clone();
        let _ = self.changes.send(Change::Images);
        Ok(())
    }

    async fn delete_image(&self, image: &ImageRecord) -> Result<(), Error> {
        let mut store = self.call()?;
        if store.images.get(&image.name).is_some_and(|target| target.digest == image.target.digest) {
            store.images.remove(&image.name);
            let _ = self.changes.send(Change::Images);
        }
        Ok(())
    }

    async fn has_snapshot(&self, snapshotter: &str, chain: &Digest) -> Result<bool, Error> {
        Ok(self.call()?.snapshots.contains_key(&(snapshotter.to_owned(), chain.to_string())))
    }

    async fn unpack(&self, lease: &str, snapshotter: &str, layer: Layer<'_>, keep: u64) -> Result<(), Error> {
        // The sender is this one's own.
        let _ = self.unpacks.subscribe().wait_for(|unpacks| *unpacks).await;
        let mut store = self.call()?;
        let name = (snapshotter.to_owned(), layer.chain.to_string());
        if store.free.is_some_and(|free| free < keep) && !store.snapshots.contains_key(&name) {
            return Err(Error::Full("no space left on device".to_owned()));
        }
        store.unpack(lease, snapshotter, layer)
    }

    async fn image_status(&self, name: &str) -> Result<Option<String>, Error> {
        let store = self.call()?;
        Ok(if store.cri_blind { None } else { store.image_id(name) })
    }

    async fn changes(&self) -> Result<BoxStream<'static, Change>, Error> {
        drop(self.call()?);
        let changes = tokio_stream::wrappers::BroadcastStream::new(self.changes.subscribe());
        Ok(changes.filter_map(|change| std::future::ready(change.ok())).boxed())
    }
}
