//! Image references, normalized as containerd normalizes them.

use std::fmt;
use std::str::FromStr;

use oci_spec::distribution::Reference as Spec;
use thiserror::Error;

use crate::Digest;

/// A normalized reference: registry, repository, and a tag, a digest, or both. `nginx` is
/// `docker.io/library/nginx:latest`.
///
/// Equality is by record name: a digest makes the tag beside it meaningless, as it does for CRI (measured on
/// containerd 2.4.2: `repo:tag@sha256:...` is looked up as `repo@sha256:...`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    repository: String,
    version: Version,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Version {
    Tag(String),
    Digest(Digest),
}

/// Why a string is no reference.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("image reference {reference:?} is not valid: {reason}")]
pub struct ReferenceError {
    reference: String,
    reason: String,
}

impl Reference {
    /// `registry/repository`, without tag or digest.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The host of the registry, with its port if there is one.
    pub fn registry(&self) -> &str {
        self.repository.split_once('/').map_or(&self.repository, |(host, _)| host)
    }

    /// The digest, if the reference is pinned by one.
    pub fn digest(&self) -> Option<&Digest> {
        match &self.version {
            Version::Digest(digest) => Some(digest),
            Version::Tag(_) => None,
        }
    }

    /// The tag, if that is what the reference goes by.
    pub fn tag(&self) -> Option<&str> {
        match &self.version {
            Version::Tag(tag) => Some(tag),
            Version::Digest(_) => None,
        }
    }

    /// The same repository, pinned to a digest.
    #[must_use]
    pub fn pinned(&self, digest: Digest) -> Self {
        Self { repository: self.repository.clone(), version: Version::Digest(digest) }
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(s: &str) -> Result<Self, ReferenceError> {
        let wrong = |reason: String| ReferenceError { reference: s.to_owned(), reason };
        let spec = Spec::try_from(s).map_err(|error| wrong(error.to_string()))?;
        if spec.repository().bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(wrong("the repository must be lower case".to_owned()));
        }
        let repository = format!("{}/{}", spec.registry(), spec.repository());
        let version = match (spec.digest(), spec.tag()) {
            (Some(digest), _) => Version::Digest(digest.parse().map_err(|error| wrong(format!("{error}")))?),
            (None, Some(tag)) => Version::Tag(tag.to_owned()),
            (None, None) => return Err(wrong("neither a tag nor a digest".to_owned())),
        };
        Ok(Self { repository, version })
    }
}

/// The name of containerd's image record: `repository:tag` or `repository@digest`.
impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.version {
            Version::Tag(tag) => write!(f, "{}:{tag}", self.repository),
            Version::Digest(digest) => write!(f, "{}@{digest}", self.repository),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn normalizes_as_containerd_does() {
        for (written, name) in [
            ("nginx", "docker.io/library/nginx:latest".to_owned()),
            ("nginx:1.25", "docker.io/library/nginx:1.25".to_owned()),
            ("index.docker.io/nginx", "docker.io/library/nginx:latest".to_owned()),
            ("a/b", "docker.io/a/b:latest".to_owned()),
            ("localhost/tote:0.1.0", "localhost/tote:0.1.0".to_owned()),
            ("registry.test:5000/a/b/c:v1", "registry.test:5000/a/b/c:v1".to_owned()),
            (&format!("nginx@{D}"), format!("docker.io/library/nginx@{D}")),
            (&format!("r.test/x:v1@{D}"), format!("r.test/x@{D}")),
        ] {
            let parsed: Reference = written.parse().unwrap();
            assert_eq!(parsed.to_string(), name);
            assert_eq!(name.parse::<Reference>().unwrap(), parsed, "its own name is stable");
        }
    }

    #[test]
    fn refuses_what_is_no_reference() {
        for written in ["", "UPPER/case:x", "a b", "x:", "x@sha256:123", "../x", "x/../../y"] {
            assert!(written.parse::<Reference>().is_err(), "{written:?}");
        }
    }
}
