//! Layers that need not move, for this node has them unpacked: as where CRI discards layers once they are unpacked, or where a
//! container outlives its image. containerd's own pull leaves them out as well (`core/unpack/unpacker.go`).

use std::collections::HashSet;

use tote_image::Digest;

use super::failure::Failure;
use super::resolve::Image;
use super::run::{Run, uncompressed};
use crate::containerd::Held;

impl Run<'_> {
    /// How many layers, counted from the lowest, stand unpacked here. They are held from now on. A snapshot never stands without its
    /// parents, so the first that is missing is the last to be looked for.
    pub(super) async fn standing(&self, image: &Image, snapshotter: &str) -> Result<usize, Failure> {
        let mut standing = 0_usize;
        for chain in &image.chain {
            if !self.containerd().has_snapshot(snapshotter, chain).await? {
                break;
            }
            standing += 1;
        }
        let Some(top) = standing.checked_sub(1).map(|top| &image.chain[top]) else { return Ok(0) };
        self.containerd().hold(&self.lease.id, Held::Snapshot { snapshotter, chain: top }).await?;
        // Looked for again once it is held: what is seen then cannot be collected any more.
        Ok(if self.containerd().has_snapshot(snapshotter, top).await? { standing } else { 0 })
    }

    /// Counts those layers as being there. Who would have one of this node that is not is told not to wait for it.
    pub(super) async fn spare(&self, image: &Image, standing: usize) -> Result<(), Failure> {
        let layers = &image.manifest.layers;
        let needed: HashSet<&Digest> = layers[standing..].iter().map(|layer| &layer.digest).collect();
        let mut spared = Vec::new();
        for layer in (0..standing).map(|at| image.layer(at)) {
            let digest = &layer.blob.digest;
            if !needed.contains(digest) && !self.is_present(layer.blob, &uncompressed(layer)).await? {
                self.tracker.complete(digest, layer.blob.size);
                spared.push(digest.clone());
            }
        }
        self.brings.spare(spared);
        Ok(())
    }
}
