//! How much of the disk an import may take. Must not know what it is taken for.

use super::failure::Failure;
use crate::containerd::Space;

/// The most that is kept free.
const RESERVE: u64 = 1 << 30;

/// Bytes of a file system of this size that no import takes: a twentieth, 1 GiB at most. What runs on the node writes there,
/// too; kubelet makes room and evicts long before, by default when 15 % are left.
pub(super) fn reserve(size: u64) -> u64 {
    (size / 20).min(RESERVE)
}

/// That `bytes` more leave the reserve free.
pub(super) fn check(space: Space, bytes: u64, what: &str) -> Result<(), Failure> {
    let Space { size, free } = space;
    let kept = reserve(size);
    if free.checked_sub(kept).is_some_and(|room| bytes <= room) {
        return Ok(());
    }
    let message = format!("{what} takes {bytes} bytes more; {free} are free, of which {kept} are kept so");
    Err(Failure::DiskFull(message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_twentieth_is_kept_and_1_gib_at_most() {
        let space = |size, free| Space { size, free };
        for (size, free, fits) in [
            (100, 100, 95),
            (100, 5, 0),
            (0, 7, 7),
            (1 << 40, 1 << 31, 1 << 30),
            (u64::MAX, u64::MAX, u64::MAX - (1 << 30)),
        ] {
            check(space(size, free), fits, "it").unwrap();
            let failed = check(space(size, free), fits + 1, "it").unwrap_err();
            assert!(matches!(failed, Failure::DiskFull(_)), "{failed}");
        }
        let failed = check(space(100, 4), 0, "it").unwrap_err().to_string();
        assert!(failed.contains("it takes 0 bytes more; 4 are free, of which 5 are kept so"), "{failed}");
    }
}
