//! Which images may be salvaged at all: the operator's patterns of allowed and denied repositories. Pure.
//!
//! Must not know where an image is.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;
use tote_image::Reference;
use wildmatch::WildMatch;

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
}

impl Images {
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
        Images { allowed: all(allowed), denied: all(denied) }
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
