//! One run of a transfer, from the sources' blobs to the image that CRI shows. It can be dropped at any point
//! and run again: everything it did is found again in the content store.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::{StreamExt, TryStreamExt, stream};
use tokio::sync::{Semaphore, watch};
use tote_image::{Descriptor, Digest};
use tote_rpc::v1::Stage;

use super::context::Context;
use super::failure::Failure;
use super::progress::{Imported, Tracker};
use super::relay::Relays;
use super::request::{Source, Wanted};
use super::resolve::Image;
use super::room;
use super::underway::Brings;
use crate::containerd::{self, Containerd, Labels, Layer, Lease, SNAPSHOT_LABEL, UNCOMPRESSED_LABEL};
use crate::kubelet::Restriction;

/// How many layers of one image move at once.
const CONCURRENT_BLOBS: usize = 3;

/// How many may wait beside for a source that is getting the image itself: so that what it has already is not behind what it
/// will have.
const WAITING_BLOBS: usize = 5;

/// How long a lease lasts if nobody deletes it: well beyond any transfer's deadline.
const LEASE_LIFE: Duration = Duration::from_secs(24 * 3600);

/// One run.
pub(super) struct Run<'a> {
    pub context: &'a Arc<Context>,
    pub wanted: &'a Wanted,
    pub sources: watch::Receiver<Vec<Source>>,
    pub restriction: watch::Receiver<Option<Restriction>>,
    pub max_bytes: Option<u64>,
    pub tracker: &'a Tracker,
    pub lease: Lease,
    pub brings: &'a Brings,
    pub relays: Relays,
}

/// The layers in the order in which they begin to move, each digest once: of three in a row the lowest, which is unpacked first, and
/// the two largest, which take longest.
fn order(layers: &[Descriptor]) -> Vec<&Descriptor> {
    let mut seen = HashSet::new();
    let mut left: Vec<&Descriptor> = layers.iter().filter(|layer| seen.insert(&layer.digest)).collect();
    let mut ordered = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let lowest = ordered.len() % CONCURRENT_BLOBS == 0;
        // Of equal ones the lowest.
        let largest = (0..left.len()).rev().max_by_key(|at| left[*at].size).unwrap_or(0);
        ordered.push(left.remove(if lowest { 0 } else { largest }));
    }
    ordered
}

impl Run<'_> {
    pub(super) fn containerd(&self) -> &dyn Containerd {
        self.context.containerd.as_ref()
    }

    /// Imports the image. What it made stays held by the lease until that is deleted.
    pub(super) async fn import(&self) -> Result<Imported, Failure> {
        self.tracker.stage(Stage::Resolving);
        let facts = self.containerd().facts().await?;
        let snapshotter = facts.snapshotter.map_err(Failure::Snapshotter)?;
        self.check_names().await?;
        match self.containerd().create_lease(&self.lease, SystemTime::now() + LEASE_LIFE).await {
            Ok(()) | Err(containerd::Error::AlreadyExists(_)) => {}
            Err(error) => return Err(error.into()),
        }
        let image = self.resolve(&facts.platform).await?;
        let size = image.total();
        if let Some(most) = self.max_bytes.filter(|most| size > *most) {
            return Err(Failure::TooLarge { size, most });
        }
        self.tracker.total(size);
        let standing = self.standing(&image, &snapshotter).await?;
        self.spare(&image, standing).await?;
        self.check_space(&image, standing).await?;
        self.tracker.stage(Stage::Moving);
        self.move_and_unpack(&image, &snapshotter, standing).await?;
        self.tracker.stage(Stage::Publishing);
        // Before, so that the image is never to be seen without; after, for kubelet removes records of images that it
        // does not see.
        self.restrict(&image).await?;
        let imported = self.publish(&image).await?;
        self.restrict(&image).await?;
        Ok(imported)
    }

    /// That what is missing fits on the disk, before it moves; unpacked it takes more, which nothing tells beforehand. A layer
    /// of which a part is there already does not count: nothing tells how much of it.
    async fn check_space(&self, image: &Image, standing: usize) -> Result<(), Failure> {
        let Some(space) = self.containerd().space().await? else { return Ok(()) };
        let begun = self.containerd().ingests().await?;
        let mut missing = 0_u64;
        let mut seen = HashSet::new();
        for layer in image.manifest.layers[standing..].iter().filter(|layer| seen.insert(&layer.digest)) {
            if !begun.contains(&layer.digest) && self.containerd().blob(&layer.digest).await?.is_none() {
                missing = missing.saturating_add(layer.size);
            }
        }
        if missing == 0 { Ok(()) } else { room::check(space, missing, "what is missing of the image") }
    }

    /// That the disk has room for so many bytes more of something.
    pub(super) async fn check_room(&self, bytes: u64, what: &str) -> Result<(), Failure> {
        match self.containerd().space().await? {
            Some(space) => room::check(space, bytes, what),
            None => Ok(()),
        }
    }

    /// Writes down for kubelet who alone may have the image.
    async fn restrict(&self, image: &Image) -> Result<(), Failure> {
        let Some(restriction) = self.restriction.borrow().clone() else { return Ok(()) };
        let Some(records) = self.context.records.clone() else {
            let problem = "the agent was started without --kubelet-dir".to_owned();
            return Err(Failure::PullRecord(problem));
        };
        let id = image.manifest.config.digest.clone();
        let written = tokio::task::spawn_blocking(move || records.restrict(&id, &restriction)).await;
        match written {
            Ok(written) => written.map_err(|error| Failure::PullRecord(error.to_string())),
            Err(error) => Err(Failure::PullRecord(error.to_string())),
        }
    }

    /// Moves the layers above those that stand unpacked, several at once, and unpacks each as soon as it and those below have
    /// arrived.
    async fn move_and_unpack(
        &self,
        image: &Image,
        snapshotter: &str,
        standing: usize,
    ) -> Result<(), Failure> {
        let layers = &image.manifest.layers;
        let arrived = watch::Sender::new(HashSet::<Digest>::new());
        let places = Semaphore::new(CONCURRENT_BLOBS);
        let moves: Vec<_> = order(&layers[standing..])
            .into_iter()
            .map(|layer| self.bring(layer, &places, &arrived))
            .collect();
        let moving = async {
            let moves = stream::iter(moves).buffer_unordered(CONCURRENT_BLOBS + WAITING_BLOBS);
            moves.try_collect::<()>().await?;
            self.tracker.stage(Stage::Unpacking);
            Ok(())
        };
        let unpacking = async {
            let mut arrived = arrived.subscribe();
            for at in standing..layers.len() {
                let layer = image.layer(at);
                // The sender outlives the loop.
                let _ = arrived.wait_for(|arrived| arrived.contains(&layer.blob.digest)).await;
                self.unpack(snapshotter, layer).await?;
            }
            Ok::<_, Failure>(())
        };
        tokio::try_join!(moving, unpacking)?;
        if let Some(top) = image.chain.last() {
            let label = (format!("{SNAPSHOT_LABEL}{snapshotter}"), top.to_string());
            self.containerd().label(&image.manifest.config.digest, &[label].into()).await?;
        }
        Ok(())
    }

    async fn bring(
        &self,
        layer: &Descriptor,
        places: &Semaphore,
        arrived: &watch::Sender<HashSet<Digest>>,
    ) -> Result<(), Failure> {
        self.await_relays(layer).await;
        // In order, for they are unpacked in order. It is never closed.
        let _place = places.acquire().await;
        self.obtain(layer, Labels::new()).await?;
        arrived.send_modify(|arrived| {
            arrived.insert(layer.digest.clone());
        });
        Ok(())
    }

    async fn unpack(&self, snapshotter: &str, layer: Layer<'_>) -> Result<(), Failure> {
        let keep = self.containerd().space().await?.map_or(0, |space| room::reserve(space.size));
        let unpacked = self.containerd().unpack(&self.lease.id, snapshotter, layer, keep).await;
        let digest = &layer.blob.digest;
        unpacked.map_err(|error| match error {
            containerd::Error::Mismatch(message) => Failure::DiffId(message),
            containerd::Error::Full(message) => {
                Failure::DiskFull(format!("unpacking layer {digest}: {message}"))
            }
            error @ containerd::Error::Unavailable(_) => error.into(),
            other => Failure::Unpack { layer: digest.clone(), reason: other.to_string() },
        })?;
        Ok(self.containerd().label(digest, &uncompressed(layer)).await?)
    }
}

/// What an unpacked layer's blob is labelled with.
pub(super) fn uncompressed(layer: Layer<'_>) -> Labels {
    [(UNCOMPRESSED_LABEL.to_owned(), layer.diff_id.to_string())].into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_layer_and_the_largest_go_first_and_each_digest_once() {
        let sizes = [5, 1, 9, 9, 2];
        let layer = |(at, size): (usize, &u64)| Descriptor {
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
            digest: Digest::sha256(&[u8::try_from(at).unwrap()]),
            size: *size,
        };
        let mut layers: Vec<Descriptor> = sizes.iter().enumerate().map(layer).collect();
        layers.push(layers[2].clone());
        let ordered: Vec<u64> = order(&layers).into_iter().map(|layer| layer.size).collect();
        assert_eq!(ordered, [5, 9, 9, 1, 2]);
        assert_eq!(order(&layers)[1].digest, layers[2].digest, "of equal ones the lowest");
    }
}
