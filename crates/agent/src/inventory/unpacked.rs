//! What stands unpacked although blobs of it are missing: as where CRI discards layers once they are unpacked. No event tells
//! when a snapshot goes, so it is looked for at each scan.

use tote_image::Digest;

use crate::containerd::{Containerd, Error};

/// The snapshotter that CRI uses, as far as it was asked for.
#[derive(Debug, Default)]
pub(super) enum Snapshotter {
    #[default]
    NotAsked,
    /// None can be settled on.
    Unsettled,
    Is(String),
}

impl Snapshotter {
    /// One that could not be settled on may be by now.
    pub(super) fn ask_again(&mut self) {
        if matches!(self, Self::Unsettled) {
            *self = Self::NotAsked;
        }
    }

    /// Whether the snapshot of this chain ID stands there.
    pub(super) async fn has(&mut self, containerd: &dyn Containerd, chain: &Digest) -> Result<bool, Error> {
        if matches!(self, Self::NotAsked) {
            *self = containerd.facts().await?.snapshotter.map_or(Self::Unsettled, Self::Is);
        }
        let Self::Is(name) = self else { return Ok(false) };
        match containerd.has_snapshot(name, chain).await {
            Err(error @ Error::Unavailable(_)) => Err(error),
            Err(error) => {
                tracing::debug!(%error, %chain, "cannot look for a snapshot");
                Ok(false)
            }
            found => found,
        }
    }
}
