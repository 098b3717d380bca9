//! Removing the records of an image that has lost blobs, so that kubelet pulls it anew.
//!
//! Must not know why: that a registry has the image is the controller's to make sure of.

use thiserror::Error;
use tote_image::Digest;

use crate::containerd;
use crate::import::Imports;
use crate::inventory::Scanner;

/// Why records were left as they are.
#[derive(Debug, Error)]
pub enum RemoveError {
    /// Nothing is the matter with it.
    #[error("digest {0}: no blob of it is missing on this node; only an image that lacks some is removed")]
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
    if image.manifests.iter().any(|manifest| manifest.complete) {
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
