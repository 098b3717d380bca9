//! Making the image visible: its records, last of all, and CRI's word that it sees them.

use std::time::Duration;

use tokio::time::Instant;
use tote_image::Digest;

use super::failure::Failure;
use super::progress::Imported;
use super::resolve::Image;
use super::run::Run;
use crate::containerd::{Error, ImageRecord};

/// The longest pause between two looks at CRI.
const MAX_PAUSE: Duration = Duration::from_millis(250);

impl Run<'_> {
    /// The names that the request implies, the one asked for last: whoever sees it sees the others too.
    fn names(&self) -> Vec<String> {
        let reference = &self.wanted.reference;
        let mut names = vec![reference.pinned(self.wanted.digest.clone()).to_string(), reference.to_string()];
        names.dedup();
        names
    }

    /// Fails early if a name stands for something else.
    pub(super) async fn check_names(&self) -> Result<(), Failure> {
        for name in self.names() {
            if let Some(standing) = self.containerd().image(&name).await? {
                self.check(&standing)?;
            }
        }
        Ok(())
    }

    fn check(&self, standing: &ImageRecord) -> Result<(), Failure> {
        if standing.target.digest == self.wanted.digest {
            return Ok(());
        }
        Err(Failure::NameConflict {
            name: standing.name.clone(),
            stands: standing.target.digest.clone(),
            wanted: self.wanted.digest.clone(),
        })
    }

    /// Makes the records of an image that is complete, and waits until CRI answers for the name asked for.
    pub(super) async fn publish(&self, image: &Image) -> Result<Imported, Failure> {
        self.check_names().await?;
        let image_id = &image.manifest.config.digest;
        let record = |name: String| ImageRecord { name, target: image.target.clone() };
        let by_id = record(image_id.to_string());
        match self.containerd().create_image(&by_id).await {
            Ok(()) => {}
            // One config may belong to an index and its manifest, or to two compressions: CRI moves this
            // record too.
            Err(Error::AlreadyExists(_)) => {
                let standing = self.containerd().image(&by_id.name).await?;
                if standing.is_none_or(|standing| standing.target != by_id.target) {
                    self.containerd().retarget_image(&by_id).await?;
                }
            }
            Err(error) => return Err(error.into()),
        }
        for name in self.names() {
            match self.containerd().create_image(&record(name.clone())).await {
                Ok(()) => {}
                Err(Error::AlreadyExists(_)) => {
                    if let Some(standing) = self.containerd().image(&name).await? {
                        self.check(&standing)?;
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.await_visible(image_id).await?;
        let mut names = self.names();
        names.push(by_id.name);
        names.sort();
        Ok(Imported { image_id: image_id.clone(), names })
    }

    async fn await_visible(&self, image_id: &Digest) -> Result<(), Failure> {
        let name = self.wanted.reference.to_string();
        let deadline = Instant::now() + self.context.visible_within;
        let mut pause = Duration::from_millis(10);
        loop {
            let seen = match self.containerd().image_status(&name).await? {
                Some(id) if id == image_id.as_str() => return Ok(()),
                Some(id) => format!("it shows {id}"),
                None => format!("no answer for {} s", self.context.visible_within.as_secs()),
            };
            if Instant::now() >= deadline {
                return Err(Failure::NotVisible { name, seen });
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(MAX_PAUSE);
        }
    }
}
