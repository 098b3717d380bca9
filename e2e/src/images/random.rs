//! Bytes that no compression makes fewer, the same for the same seed.

use super::digest;
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use std::io::Read;

/// 32 bytes that differ between seeds.
fn key(seed: &str) -> [u8; 32] {
    let mut key = [0; 32];
    for (to, from) in key.iter_mut().zip(digest(seed.as_bytes()).trim_start_matches("sha256:").bytes()) {
        *to = from;
    }
    key
}

/// Bytes that do not compress, without end.
pub(super) struct Random(Xoshiro256PlusPlus);

impl Random {
    /// A function of the seed.
    pub(super) fn of(seed: &str) -> Self {
        Self(Xoshiro256PlusPlus::from_seed(key(seed)))
    }
}

impl Read for Random {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.fill_bytes(buffer);
        Ok(buffer.len())
    }
}
