//! What namespaces and owners of pods say of salvage. Pure.

use std::collections::BTreeMap;

use tote_api::names;

/// What a namespace says of salvage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consent {
    /// Opted in.
    Given,
    /// The annotation is absent or not `"true"`.
    NotGiven,
    /// One of [`names::DENIED_NAMESPACES`].
    Denied,
    /// It is being deleted, or gone.
    Terminating,
}

/// Whether salvage may act in a namespace.
pub fn consent(name: &str, annotations: &BTreeMap<String, String>, terminating: bool) -> Consent {
    if names::DENIED_NAMESPACES.contains(&name) {
        Consent::Denied
    } else if terminating {
        Consent::Terminating
    } else if annotations.get(names::ALLOW).is_some_and(|value| value == "true") {
        Consent::Given
    } else {
        Consent::NotGiven
    }
}

/// What a pod, or an object that controls pods, says by [`names::AUTO_SALVAGE`]: nothing without the annotation; yes by
/// `"true"`, no by any other value.
pub fn says(annotations: Option<&BTreeMap<String, String>>) -> Option<bool> {
    Some(annotations?.get(names::AUTO_SALVAGE)? == "true")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_word_true_opts_in() {
        for value in ["True", "1", "yes", "false", ""] {
            assert_eq!(says(Some(&[(names::AUTO_SALVAGE.into(), value.into())].into())), Some(false));
            assert_eq!(
                consent("shop", &[(names::ALLOW.into(), value.into())].into(), false),
                Consent::NotGiven
            );
        }
        assert_eq!(says(Some(&[(names::AUTO_SALVAGE.into(), "true".into())].into())), Some(true));
        assert_eq!(says(Some(&[("other".into(), "true".into())].into())), None);
        assert_eq!(says(None), None);
        let allowed: BTreeMap<String, String> = [(names::ALLOW.into(), "true".into())].into();
        assert_eq!(consent("shop", &allowed, false), Consent::Given);
        assert_eq!(consent("shop", &allowed, true), Consent::Terminating);
        for denied in ["kube-system", "kube-public", "kube-node-lease"] {
            assert_eq!(consent(denied, &allowed, false), Consent::Denied);
        }
    }
}
