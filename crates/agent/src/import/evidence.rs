//! Who gave which bytes of a blob, so that once it is had it shows who gave others. Must not know how either came.

use std::hash::BuildHasher as _;

use foldhash::quality::RandomState;

use super::request::Source;

/// What one source gave at once.
#[derive(Clone, Debug)]
pub(super) struct Given {
    pub from: u64,
    pub length: u64,
    pub source: Source,
    hash: u64,
}

/// All that was given of a blob. It is told by hashes whose key nobody knows, so none can be made to fit; by a fast one, for every
/// byte that comes is hashed.
#[derive(Debug, Default)]
pub(super) struct Evidence {
    key: RandomState,
    /// Of what is being written.
    present: Vec<Given>,
    /// Of what made no blob, of several sources together.
    suspect: Vec<Given>,
}

impl Evidence {
    pub(super) fn given(&mut self, from: u64, bytes: &[u8], source: &Source) {
        let (length, hash) = (bytes.len() as u64, self.key.hash_one(bytes));
        self.present.push(Given { from, length, source: source.clone(), hash });
    }

    /// What was written is thrown away, and why is known.
    pub(super) fn forget(&mut self) {
        self.present.clear();
    }

    /// It made no blob, and whose fault that is is not known.
    pub(super) fn suspect(&mut self) {
        self.suspect.append(&mut self.present);
    }

    /// What is to be held against the blob.
    pub(super) fn suspects(&self) -> &[Given] {
        &self.suspect
    }

    /// Whether these are the bytes that were given.
    pub(super) fn is(&self, given: &Given, bytes: &[u8]) -> bool {
        self.key.hash_one(bytes) == given.hash
    }
}
