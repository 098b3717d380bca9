//! Digests, checked when parsed: a malformed one handed to containerd has crashed some of its versions.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use sha2::{Digest as _, Sha256, Sha512};
use thiserror::Error;

/// A digest of the algorithms that the OCI image specification registers ("Digests"): `sha256` or `sha512`,
/// a colon, lower-case hexadecimal. Cloning is cheap.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(Arc<str>);

/// Why a string is no digest.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DigestError {
    /// No colon.
    #[error("digest {0:?} has no algorithm: write it as sha256:<64 hexadecimal digits>")]
    NoAlgorithm(String),
    /// An algorithm other than sha256 and sha512.
    #[error("digest {0:?}: algorithm {1:?} is not supported, sha256 and sha512 are")]
    Algorithm(String, String),
    /// The wrong length, or a character that is no lower-case hexadecimal digit.
    #[error("digest {0:?}: {1} lower-case hexadecimal digits must follow the algorithm")]
    Hex(String, usize),
}

impl Digest {
    /// The sha256 digest of some bytes.
    pub fn sha256(bytes: &[u8]) -> Self {
        let mut verifier = Verifier::new_sha256();
        verifier.update(bytes);
        verifier.finish()
    }

    /// `algorithm:hex`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The part behind the colon.
    pub fn hex(&self) -> &str {
        self.0.split_once(':').map_or("", |(_, hex)| hex)
    }

    /// A hasher of this digest's algorithm, whose result is to be compared with `self`.
    pub fn verifier(&self) -> Verifier {
        if self.0.starts_with("sha512:") {
            Verifier(Hasher::Sha512(Sha512::new()))
        } else {
            Verifier::new_sha256()
        }
    }

    /// Whether the bytes have this digest.
    pub fn matches(&self, bytes: &[u8]) -> bool {
        let mut verifier = self.verifier();
        verifier.update(bytes);
        verifier.finish() == *self
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(s: &str) -> Result<Self, DigestError> {
        let Some((algorithm, hex)) = s.split_once(':') else {
            return Err(DigestError::NoAlgorithm(s.to_owned()));
        };
        let length = match algorithm {
            "sha256" => 64,
            "sha512" => 128,
            other => return Err(DigestError::Algorithm(s.to_owned(), other.to_owned())),
        };
        if hex.len() != length || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(DigestError::Hex(s.to_owned(), length));
        }
        Ok(Self(s.into()))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for Digest {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

/// Hashes a blob as it streams by.
#[derive(Clone)]
pub struct Verifier(Hasher);

#[derive(Clone)]
enum Hasher {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Verifier {
    fn new_sha256() -> Self {
        Self(Hasher::Sha256(Sha256::new()))
    }

    /// Takes in the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            Hasher::Sha256(hasher) => hasher.update(bytes),
            Hasher::Sha512(hasher) => hasher.update(bytes),
        }
    }

    /// The digest of all that was taken in.
    pub fn finish(self) -> Digest {
        let (algorithm, sum) = match self.0 {
            Hasher::Sha256(hasher) => ("sha256", hasher.finalize().to_vec()),
            Hasher::Sha512(hasher) => ("sha512", hasher.finalize().to_vec()),
        };
        let mut text = format!("{algorithm}:");
        for byte in sum {
            text.push(char::from_digit(u32::from(byte >> 4), 16).unwrap_or('0'));
            text.push(char::from_digit(u32::from(byte & 0xf), 16).unwrap_or('0'));
        }
        Digest(text.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The digest of nothing, from FIPS 180-2.
    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn hashes() {
        assert_eq!(Digest::sha256(b"").as_str(), EMPTY);
        let d: Digest = EMPTY.parse().unwrap();
        assert!(d.matches(b""));
        assert!(!d.matches(b"x"));
        let long = format!("sha512:{}", "0".repeat(128)).parse::<Digest>().unwrap();
        assert!(long.verifier().finish().as_str().starts_with("sha512:cf83e1357eefb8bd"));
    }

    #[test]
    fn refuses_what_is_no_digest() {
        for (text, says) in [
            ("", "no algorithm"),
            ("sha256", "no algorithm"),
            ("md5:d41d8cd98f00b204e9800998ecf8427e", "not supported"),
            ("sha256:", "64 lower-case"),
            (&EMPTY[..70], "64 lower-case"),
            (&EMPTY.to_uppercase().replace("SHA", "sha"), "64 lower-case"),
            (&format!("{EMPTY}/../x"), "64 lower-case"),
        ] {
            let error = text.parse::<Digest>().unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
