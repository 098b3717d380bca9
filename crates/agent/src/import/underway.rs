//! What the transfers under way bring to this node, by image: for those who may read it here as it comes. Must not know who
//! reads.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tote_image::Digest;

use super::progress::State;

/// How long an image that is expected may be waited for before its transfer begins: the controller begins both at once.
const BEGINS_WITHIN: Duration = Duration::from_secs(10);

/// The images that transfers bring, or are expected to, by the digest of their index or manifest.
#[derive(Clone, Debug, Default)]
pub struct Underway(Arc<Mutex<HashMap<Digest, Weak<Bringing>>>>);

/// How far an image is on its way to a node: bytes of it that are there, of so many in all; 0 of 0 while nothing is known. Where
/// that node waits for another, with those of the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrived {
    /// Bytes that are there.
    pub bytes: u64,
    /// Bytes of the image for the node's platform.
    pub total: u64,
}

impl Arrived {
    /// The header of the distribution API by which an agent says this of a blob that it does not hold yet: `<bytes>/<total>`,
    /// with status 503.
    pub const HEADER: &str = "tote-in-flight";

    fn with(self, other: Self) -> Self {
        let (bytes, total) = (self.bytes.saturating_add(other.bytes), self.total.saturating_add(other.total));
        Self { bytes, total }
    }

    /// The header's value.
    pub fn parse(text: &str) -> Option<Self> {
        let (bytes, total) = text.split_once('/')?;
        Some(Self { bytes: bytes.parse().ok()?, total: total.parse().ok()? })
    }
}

impl std::fmt::Display for Arrived {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.bytes, self.total)
    }
}

/// One image. Kept while a transfer brings it or a grant names it.
#[derive(Debug)]
pub struct Bringing(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    /// What is known to belong to it, by documents that were verified.
    blobs: HashSet<Digest>,
    /// Whether that is all of it.
    is_known: bool,
    /// What of it this node does without.
    spared: HashSet<Digest>,
    transfers: Vec<(u64, watch::Receiver<State>)>,
    begun: u64,
    /// When it was first expected here.
    expected: Instant,
    /// How far it is on its way to the node that this one waits for.
    before: Option<Arrived>,
}

/// A transfer that brings an image. Dropping it is its end.
#[derive(Debug)]
pub struct Brings {
    image: Arc<Bringing>,
    number: u64,
}

impl Underway {
    /// The image of an index or manifest that a transfer brings, or is expected to from `now` on.
    pub fn expect(&self, root: &Digest, now: Instant) -> Arc<Bringing> {
        let mut images = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = images.get(root).and_then(Weak::upgrade) {
            return known;
        }
        images.retain(|_, image| image.strong_count() > 0);
        let inner = Inner {
            blobs: HashSet::from([root.clone()]),
            is_known: false,
            spared: HashSet::new(),
            transfers: Vec::new(),
            begun: 0,
            expected: now,
            before: None,
        };
        let image = Arc::new(Bringing(Mutex::new(inner)));
        images.insert(root.clone(), Arc::downgrade(&image));
        image
    }

    /// A transfer begins to bring it, and writes there how far it is.
    pub(crate) fn begin(&self, root: &Digest, states: watch::Receiver<State>) -> Brings {
        let image = self.expect(root, Instant::now());
        let mut inner = image.lock();
        inner.begun += 1;
        let number = inner.begun;
        inner.transfers.push((number, states));
        drop(inner);
        Brings { image, number }
    }
}

impl Bringing {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a blob is known to belong to it.
    pub fn has(&self, blob: &Digest) -> bool {
        self.lock().blobs.contains(blob)
    }

    /// Whether a blob may come that is not here: it belongs to the image, or what belongs to it is not known yet.
    pub fn may_bring(&self, blob: &Digest) -> bool {
        let inner = self.lock();
        !inner.is_known || (inner.blobs.contains(blob) && !inner.spared.contains(blob))
    }

    /// How far it is on its way here, if it is. What has come to the node that is waited for counts as well: so whoever waits for this
    /// one sees it grow where either does.
    pub fn arrived(&self, now: Instant) -> Option<Arrived> {
        let inner = self.lock();
        let of = |states: &watch::Receiver<State>| {
            let state = states.borrow();
            let progress = &state.progress;
            Arrived { bytes: progress.transferred.saturating_add(progress.reused), total: progress.total }
        };
        let own = inner.transfers.iter().map(|(_, states)| of(states)).max_by_key(|arrived| arrived.bytes);
        match own {
            Some(own) => Some(own.with(inner.before.unwrap_or_default())),
            None if inner.begun == 0 && now < inner.expected + BEGINS_WITHIN => Some(Arrived::default()),
            None => None,
        }
    }
}

impl Brings {
    /// These belong to it.
    pub(crate) fn learn<'a>(&self, blobs: impl IntoIterator<Item = &'a Digest>) {
        self.image.lock().blobs.extend(blobs.into_iter().cloned());
    }

    /// Nothing else does, on this node.
    pub fn learnt_all(&self) {
        self.image.lock().is_known = true;
    }

    /// These do not come, for this node does without them.
    pub(crate) fn spare(&self, blobs: impl IntoIterator<Item = Digest>) {
        self.image.lock().spared = blobs.into_iter().collect();
    }

    /// How far it is on its way to the node that this one waits for; nothing if it waits for none.
    pub fn waits_for(&self, before: Option<Arrived>) {
        self.image.lock().before = before;
    }
}

impl Drop for Brings {
    fn drop(&mut self) {
        let mut inner = self.image.lock();
        inner.transfers.retain(|(number, _)| *number != self.number);
        if inner.transfers.is_empty() {
            inner.before = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_on_its_way_from_when_it_is_expected_until_its_transfer_ends() {
        let (underway, root, now) = (Underway::default(), Digest::sha256(b"root"), Instant::now());
        let image = underway.expect(&root, now);
        assert_eq!(image.arrived(now + BEGINS_WITHIN / 2), Some(Arrived::default()));
        assert_eq!(image.arrived(now + BEGINS_WITHIN), None, "it never began");
        let states = watch::Sender::new(State::default());
        let brings = underway.begin(&root, states.subscribe());
        let (layer, other) = (Digest::sha256(b"layer"), Digest::sha256(b"other"));
        assert!(image.has(&root) && image.may_bring(&other), "the same image");
        states.send_modify(|state| {
            (state.progress.transferred, state.progress.reused, state.progress.total) = (3, 4, 10);
        });
        assert_eq!(image.arrived(now), Some(Arrived { bytes: 7, total: 10 }));
        let before = Arrived { bytes: 8, total: 11 };
        brings.waits_for(Some(before));
        assert_eq!(image.arrived(now), Some(Arrived { bytes: 15, total: 21 }), "it grows elsewhere");
        brings.waits_for(None);
        brings.learn([&layer]);
        brings.learnt_all();
        assert!(image.may_bring(&layer) && !image.may_bring(&other), "all of it is known");
        brings.spare([layer.clone()]);
        assert!(image.has(&layer) && !image.may_bring(&layer), "this node does without it");
        drop(brings);
        assert_eq!(image.arrived(now), None, "it ended, and nobody waits for another");
        assert!(image.has(&layer) && !image.may_bring(&other), "what it brought is known all the same");
    }

    #[test]
    fn what_nobody_brings_or_names_is_forgotten() {
        let (underway, now) = (Underway::default(), Instant::now());
        let (one, two) = (Digest::sha256(b"1"), Digest::sha256(b"2"));
        let states = watch::Sender::new(State::default());
        underway.begin(&one, states.subscribe()).learn([&two]);
        assert!(!underway.expect(&one, now).has(&two), "it is a new one");
        drop(underway.expect(&two, now));
        assert_eq!(underway.0.lock().unwrap().len(), 1);
    }
}
