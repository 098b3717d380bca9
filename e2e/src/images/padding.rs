//! What makes a zstd layer large and its contents not: a frame that decompressors skip.

use super::random::Random;
use anyhow::Result;
use std::io::{self, Read as _, Write};

/// So many random bytes.
#[derive(Clone, Debug)]
pub(super) struct Padding {
    pub(super) bytes: u64,
    pub(super) seed: String,
}

impl Padding {
    /// Appends them to a zstd stream.
    pub(super) fn write(&self, out: &mut impl Write) -> Result<()> {
        skip(out, u32::try_from(self.bytes)?)?;
        io::copy(&mut Random::of(&self.seed).take(self.bytes), out)?;
        Ok(())
    }
}

/// Begins a skippable frame of so many bytes (RFC 8878, 3.1.2).
pub(super) fn skip(out: &mut impl Write, bytes: u32) -> Result<()> {
    out.write_all(&0x184D_2A50_u32.to_le_bytes())?;
    Ok(out.write_all(&bytes.to_le_bytes())?)
}
