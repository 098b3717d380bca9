//! Who may read what: each grant lets one node read one image for one transfer, for a while.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::TryStreamExt;
use thiserror::Error;
use tokio::time::Instant;
use tote_image::{Digest, Document, MAX_DOCUMENT_BYTES, Manifest};

use crate::containerd::{self, Containerd};
use crate::import::{Arrived, Bringing, TransferId};

/// The most grants at once, and the most blobs of one.
const MOST: usize = 1024;
const MOST_BLOBS: usize = 16_384;

#[derive(Debug)]
struct Grant {
    reader: String,
    blobs: HashSet<Digest>,
    /// The image, where it may be on its way here: what is known to belong to it is granted, too.
    coming: Option<Arc<Bringing>>,
    until: Instant,
}

impl Grant {
    fn is_for(&self, reader: &str, now: Instant) -> bool {
        self.until > now && self.reader == reader
    }

    fn covers(&self, blob: &Digest) -> bool {
        self.blobs.contains(blob) || self.coming.as_ref().is_some_and(|image| image.has(blob))
    }
}

/// Why nothing is granted.
#[derive(Debug, Error)]
pub enum GrantError {
    /// There is no such image here.
    #[error("no index or manifest {0} is on this node")]
    Unknown(Digest),
    /// There are too many grants.
    #[error("{MOST} transfers read from this node already")]
    Full,
    /// The image has too many blobs.
    #[error("{0} names more than {MOST_BLOBS} blobs")]
    TooLarge(Digest),
    /// containerd does not answer.
    #[error(transparent)]
    Containerd(#[from] containerd::Error),
}

/// All grants of this agent. A restarted agent has none: the controller gives them again.
#[derive(Clone, Debug, Default)]
pub struct Grants(Arc<Mutex<HashMap<TransferId, Grant>>>);

impl Grants {
    fn lock(&self) -> MutexGuard<'_, HashMap<TransferId, Grant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets `reader` read these blobs for a transfer until a time. What was granted for that transfer before is replaced.
    pub fn give(
        &self,
        transfer: TransferId,
        reader: String,
        blobs: HashSet<Digest>,
        until: Instant,
        now: Instant,
    ) -> Result<(), GrantError> {
        self.insert(transfer, Grant { reader, blobs, coming: None, until }, now)
    }

    /// The same for an image that may be on its way here: these blobs of it are here already.
    pub fn give_coming(
        &self,
        transfer: TransferId,
        reader: String,
        (blobs, image): (HashSet<Digest>, Arc<Bringing>),
        until: Instant,
        now: Instant,
    ) -> Result<(), GrantError> {
        self.insert(transfer, Grant { reader, blobs, coming: Some(image), until }, now)
    }

    fn insert(&self, transfer: TransferId, grant: Grant, now: Instant) -> Result<(), GrantError> {
        let mut grants = self.lock();
        grants.retain(|_, grant| grant.until > now);
        if grants.len() >= MOST && !grants.contains_key(&transfer) {
            return Err(GrantError::Full);
        }
        grants.insert(transfer, grant);
        Ok(())
    }

    /// Ends a transfer's grant. Tells whether there was one.
    pub fn revoke(&self, transfer: &TransferId, now: Instant) -> bool {
        self.lock().remove(transfer).is_some_and(|grant| grant.until > now)
    }

    /// Whether a node may read a blob now.
    pub fn allow(&self, reader: &str, blob: &Digest, now: Instant) -> bool {
        self.lock().values().any(|grant| grant.is_for(reader, now) && grant.covers(blob))
    }

    /// How far the image is on its way here to which a blob that a node may read belongs, or may belong: before the image's
    /// documents are here nothing tells.
    pub fn coming(&self, reader: &str, blob: &Digest, now: Instant) -> Option<Arrived> {
        let grants = self.lock();
        let images =
            grants.values().filter(|grant| grant.is_for(reader, now)).filter_map(|g| g.coming.as_ref());
        let fitting = images.filter(|image| image.may_bring(blob));
        fitting.filter_map(|image| image.arrived(now)).max_by_key(|arrived| arrived.bytes)
    }

    /// How many there are now.
    pub fn count(&self, now: Instant) -> usize {
        self.lock().values().filter(|grant| grant.until > now).count()
    }
}

/// An image's blobs as far as this node knows of them: the index or manifest itself, the manifests below that are here,
/// and what each of these names.
pub async fn blobs_below(containerd: &dyn Containerd, root: &Digest) -> Result<HashSet<Digest>, GrantError> {
    let document = document(containerd, root).await?.ok_or_else(|| GrantError::Unknown(root.clone()))?;
    let mut blobs = HashSet::from([root.clone()]);
    match document {
        Document::Manifest(manifest) => blobs.extend(named(manifest)),
        Document::Index(index) => {
            if index.manifests.len() > MOST_BLOBS {
                return Err(GrantError::TooLarge(root.clone()));
            }
            for entry in index.manifests {
                let digest = entry.descriptor.digest;
                if let Some(Document::Manifest(manifest)) = self::document(containerd, &digest).await? {
                    blobs.insert(digest);
                    blobs.extend(named(manifest));
                }
                if blobs.len() > MOST_BLOBS {
                    return Err(GrantError::TooLarge(root.clone()));
                }
            }
        }
    }
    Ok(blobs)
}

fn named(manifest: Manifest) -> impl Iterator<Item = Digest> {
    let layers = manifest.layers.into_iter().map(|layer| layer.digest);
    std::iter::once(manifest.config.digest).chain(layers)
}

async fn document(
    containerd: &dyn Containerd,
    digest: &Digest,
) -> Result<Option<Document>, containerd::Error> {
    let Some(found) = containerd.blob(digest).await? else { return Ok(None) };
    if found.size > MAX_DOCUMENT_BYTES {
        return Ok(None);
    }
    let pieces = match containerd.read(digest, 0, found.size).await {
        Err(containerd::Error::NotFound(_)) => return Ok(None),
        other => other?,
    };
    let bytes = pieces.try_collect::<Vec<_>>().await?.concat();
    Ok(Document::parse(&bytes).ok())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::containerd::Fake;
    use crate::testing::{Blobs, tar};

    fn id(id: &str) -> TransferId {
        TransferId::parse(id).unwrap()
    }

    #[test]
    fn a_grant_is_for_one_node_one_image_and_a_while() {
        let (grants, now) = (Grants::default(), Instant::now());
        let (a, b) = (Digest::sha256(b"a"), Digest::sha256(b"b"));
        let second = Duration::from_secs(1);
        let give = |transfer: &str, reader: &str, blob: &Digest| {
            let blobs = HashSet::from([blob.clone()]);
            grants.give(id(transfer), reader.to_owned(), blobs, now + 10 * second, now).unwrap();
        };
        assert!(!grants.allow("n", &a, now));
        give("t", "n", &a);
        assert!(grants.allow("n", &a, now) && !grants.allow("n", &b, now) && !grants.allow("m", &a, now));
        assert!(grants.allow("n", &a, now + 9 * second) && !grants.allow("n", &a, now + 10 * second));
        give("u", "n", &b);
        assert!(grants.allow("n", &a, now) && grants.allow("n", &b, now));
        assert!(grants.revoke(&id("t"), now) && !grants.revoke(&id("t"), now));
        assert!(!grants.allow("n", &a, now) && grants.allow("n", &b, now), "each for itself");
        give("u", "m", &b);
        assert!(!grants.allow("n", &b, now), "replaced");
        assert_eq!((grants.count(now), grants.count(now + 10 * second)), (1, 0));
    }

    #[test]
    fn there_is_an_end_to_them_and_old_ones_make_room() {
        let (grants, now) = (Grants::default(), Instant::now());
        let later = now + Duration::from_secs(10);
        let give = |n: usize, at: Instant| {
            grants.give(
                id(&format!("t-{n}")),
                "n".to_owned(),
                HashSet::new(),
                at + Duration::from_secs(5),
                at,
            )
        };
        for n in 0..MOST {
            give(n, now).unwrap();
        }
        assert!(matches!(give(MOST, now), Err(GrantError::Full)));
        give(3, now).unwrap();
        give(MOST, later).unwrap();
        assert_eq!(grants.count(later), 1);
    }

    #[tokio::test]
    async fn an_image_is_what_its_documents_name() {
        let image = Blobs::image(&[tar(&[("a", b"1")]), tar(&[("b", b"2")])]).indexed();
        let fake = Fake::default();
        image.pull_into(&fake, "registry.test/a:1");
        let all: HashSet<Digest> = image.digests().into_iter().collect();
        assert_eq!(blobs_below(&fake, &image.target.digest).await.unwrap(), all);
        let below = blobs_below(&fake, &image.manifest.digest).await.unwrap();
        assert!(!below.contains(&image.target.digest) && below.len() == all.len() - 1, "{below:?}");
        for unknown in [Digest::sha256(b"absent"), image.layers[0].digest.clone()] {
            assert!(matches!(blobs_below(&fake, &unknown).await, Err(GrantError::Unknown(_))));
        }
        fake.remove_blob(&image.manifest.digest);
        let root = blobs_below(&fake, &image.target.digest).await.unwrap();
        assert_eq!(root, HashSet::from([image.target.digest.clone()]));
    }
}
