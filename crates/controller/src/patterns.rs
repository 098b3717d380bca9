//! Which images may be salvaged at all: the operator's patterns of allowed and denied repositories, and how large they may be. Pure.
//!
//! Must not know where an image is.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;
use tote_image::{Reference, quantity};
use wildmatch::WildMatch;

use crate::text;

/// A repository with its registry, as `registry.example.com/team/*`: `*` stands for any characters, also for none and
/// for `/`.
#[derive(Clone, Debug, PartialEq)]
pub struct Pattern(WildMatch);

/// Why a string is no pattern.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{pattern:?}: {reason}")]
pub struct PatternError {
    pattern: String,
    reason: &'static str,
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(s: &str) -> Result<Self, PatternError> {
        let wrong = |reason| PatternError { pattern: s.to_owned(), reason };
        if s.is_empty() {
            return Err(wrong("must not be empty; `*` stands for every image"));
        }
        let last = s.rsplit('/').next().unwrap_or_default();
        if s.contains('@') || (s.contains('/') && last.contains(':')) {
            return Err(wrong("must be of a repository, without tag or digest"));
        }
        if s.bytes()
            .any(|b| b.is_ascii_uppercase() || !(b.is_ascii_alphanumeric() || b"*._-/:[]".contains(&b)))
        {
            return Err(wrong("must consist of lower-case letters, digits, `*` and `._-/:`"));
        }
        if !s.contains('*') && !s.contains('/') {
            return Err(wrong("must begin with a registry, as in docker.io/library/nginx or */nginx"));
        }
        Ok(Self(WildMatch::new(s)))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The patterns of the operator.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Images {
    /// If there are any, an image must match one.
    pub allowed: Vec<Pattern>,
    /// An image that matches one is never salvaged, whatever else allows it.
    pub denied: Vec<Pattern>,
    /// A larger one is not salvaged; without it, any may be.
    pub max_size: Option<Size>,
}

/// A number of bytes above 0, as `2Gi`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(u64);

/// Why a string is no size.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{0:?} is not a number of bytes above 0: write it as 2Gi, 500M or 1000000")]
pub struct SizeError(String);

impl Size {
    /// In bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(s: &str) -> Result<Self, SizeError> {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        match quantity::bytes(s) {
            Some(bytes) if (1.0..1e18).contains(&bytes) => Ok(Self(bytes as u64)),
            _ => Err(SizeError(s.to_owned())),
        }
    }
}

impl Images {
    /// Why an image of so many bytes may not be salvaged; `None` if it may, or if nobody knows how large it is.
    pub fn too_large(&self, size: Option<u64>) -> Option<String> {
        let (size, max) = (size?, self.max_size?.bytes());
        (size > max).then(|| {
            let of = |bytes: u64| text::bytes(i64::try_from(bytes).unwrap_or(i64::MAX));
            format!("it has {}, and {} is the most (config.images.maxSize)", of(size), of(max))
        })
    }

    /// Why an image may not be salvaged, for a person; `None` if it may. `names` are the names that nodes know its digest
    /// by: content that is denied under one name does not come in under another, and an allowed name must be one that it
    /// was pulled by.
    pub fn refusal<'a>(&self, reference: &Reference, names: impl Iterator<Item = &'a str>) -> Option<String> {
        if self.allowed.is_empty() && self.denied.is_empty() {
            return None;
        }
        let own = reference.repository();
        let known: Vec<Reference> = names.filter_map(|name| name.parse().ok()).collect();
        let repositories = || std::iter::once(own).chain(known.iter().map(Reference::repository));
        for repository in repositories() {
            if let Some(pattern) = self.denied.iter().find(|pattern| pattern.0.matches(repository)) {
                return Some(format!("{repository} is denied by pattern {pattern} (config.images.denied)"));
            }
        }
        if self.allowed.is_empty() {
            return None;
        }
        if !self.is_allowed(own) {
            return Some(format!("{own} matches none of the allowed patterns (config.images.allowed)"));
        }
        let pulled_as_allowed =
            known.is_empty() || known.iter().any(|name| self.is_allowed(name.repository()));
        (!pulled_as_allowed).then(|| {
            format!(
                "no node has it under a name that the allowed patterns (config.images.allowed) match, though {own} does"
            )
        })
    }

    fn is_allowed(&self, repository: &str) -> bool {
        self.allowed.iter().any(|pattern| pattern.0.matches(repository))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn images(allowed: &[&str], denied: &[&str]) -> Images {
        let all = |patterns: &[&str]| patterns.iter().map(|p| p.parse().unwrap()).collect();
        Images { allowed: all(allowed), denied: all(denied), max_size: None }
    }

    #[test]
    fn what_is_larger_than_it_may_be_says_so() {
        let bound = Images { max_size: Some("2Gi".parse().unwrap()), ..Images::default() };
        assert_eq!((bound.too_large(None), bound.too_large(Some(2 << 30))), (None, None));
        let said = bound.too_large(Some(3 << 30)).unwrap();
        assert!(said.contains("3.0 GiB") && said.contains("2.0 GiB"), "{said}");
        assert_eq!(Images::default().too_large(Some(u64::MAX)), None);
        for wrong in ["", "0", "-1", "2GB", "much", "1e300"] {
            assert!(wrong.parse::<Size>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn denied_wins_and_names_are_normalized() {
        let both = images(&["docker.io/library/*", "r.test:5000/team/*"], &["*/secret*"]);
        for (image, names, refused) in [
            ("nginx", vec![], None),
            ("r.test:5000/team/a/b:v1", vec![], None),
            ("r.test:5000/teamwork", vec![], Some("none of the allowed")),
            ("quay.io/x", vec![], Some("none of the allowed")),
            ("r.test:5000/team/secret-x:1", vec![], Some("denied by pattern */secret*")),
            ("nginx", vec!["quay.io/mirror/nginx:1", "docker.io/library/nginx:1"], None),
            ("nginx", vec!["quay.io/evil:1"], Some("no node has it under a name")),
            ("nginx", vec!["docker.io/library/nginx:1", "r.test:5000/team/secret:1"], Some("denied")),
        ] {
            let refusal = both.refusal(&image.parse().unwrap(), names.into_iter());
            match refused {
                None => assert_eq!(refusal, None, "{image}"),
                Some(says) => assert!(refusal.as_ref().unwrap().contains(says), "{image}: {refusal:?}"),
            }
        }
        let any: Reference = "quay.io/x".parse().unwrap();
        assert_eq!(Images::default().refusal(&any, std::iter::empty()), None);
        assert_eq!(images(&[], &["docker.io/*"]).refusal(&any, std::iter::empty()), None);
    }

    #[test]
    fn what_is_no_pattern_says_why() {
        for (pattern, says) in [
            ("", "empty"),
            ("nginx", "begin with a registry"),
            ("docker.io/library/nginx:1", "without tag"),
            ("docker.io/x@sha256:12", "without tag"),
            ("Docker.io/*", "lower-case"),
            ("docker.io/?", "consist of"),
        ] {
            let error = pattern.parse::<Pattern>().unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        for good in ["*", "docker.io/*", "r.test:5000/team/*", "*/nginx", "[fd00::1]:5000/x"] {
            assert!(good.parse::<Pattern>().is_ok(), "{good}");
        }
    }
}
