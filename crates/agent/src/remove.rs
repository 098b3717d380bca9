//! Removing the records of an image that has lost blobs, so that kubelet pulls it anew.
//!
//! Must not know why: that a registry has the image is the controller's to make sure of.

use thiserror::Error;
use tote_image::Digest;
use tote_rpc::v1;

use crate::containerd::{self, Containerd};
use crate::import::Imports;
use crate::inventory::Scanner;

/// Why records were left as they are.
#[derive(Debug, Error)]
pub enum RemoveError {
    /// Nothing is the matter with it, or nothing that can be seen.
    #[error(
        "digest {0}: neither its manifest nor its config is missing on this node; only such an image is removed"
    )]
    Complete(Digest),
    /// It is being repaired.
    #[error("digest {0}: a transfer is bringing it to this node")]
    Moving(Digest),
    /// containerd failed.
    #[error(transparent)]
    Containerd(#[from] containerd::Error),
}

/// Removes every record that has this target, and gives their names. The node is looked at anew: what was missing may have
/// come meanwhile.
pub async fn remove(imports: &Imports, digest: &Digest) -> Result<Vec<String>, RemoveError> {
    let image = Scanner::new(imports.shared_containerd(), None).scan().await?.remove(digest);
    let Some(image) = image else { return Ok(Vec::new()) };
    if !is_unusable(imports.containerd(), digest, &image).await? {
        return Err(RemoveError::Complete(digest.clone()));
    }
    if imports.is_moving(digest) {
        return Err(RemoveError::Moving(digest.clone()));
    }
    let containerd = imports.containerd();
    let mut names = Vec::new();
    for record in containerd.images().await? {
        if record.target.digest == *digest {
            containerd.delete_image(&record).await?;
            tracing::info!(name = record.name, %digest, "record removed: blobs of it were missing");
            names.push(record.name);
        }
    }
    Ok(names)
}

/// Whether no container can be made of it: without a manifest or its config CRI can do nothing. Layers may be missing from an
/// image that is well, for its snapshots stand (`discard_unpacked_layers`).
async fn is_unusable(
    containerd: &dyn Containerd,
    digest: &Digest,
    image: &v1::Image,
) -> Result<bool, containerd::Error> {
    if image.manifests.is_empty() {
        // One that is there but cannot be read by us may be read by others.
        return Ok(containerd.blob(digest).await?.is_none());
    }
    for manifest in &image.manifests {
        if let Ok(config) = manifest.config_digest.parse()
            && containerd.blob(&config).await?.is_some()
        {
            return Ok(false);
        }
    }
    Ok(true)
}
