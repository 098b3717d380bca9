//! Which classes of failure the cluster's policy salvages. Pure.

use std::collections::BTreeSet;

use thiserror::Error;

use super::class::{Class, Stance};

/// The classes as the operator wants them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Classes {
    also: BTreeSet<Class>,
    not: BTreeSet<Class>,
}

/// Why lists of classes make no policy.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ClassesError {
    /// No copy can answer it.
    #[error("class {0} cannot be salvaged: a copy does not help, or there is nobody to consent to it")]
    Never(Class),
    /// It is in both lists.
    #[error("class {0} is both to be salvaged and to be left alone: name it once")]
    Both(Class),
}

impl Classes {
    /// Salvages what a copy is a legitimate answer to by itself, and the classes of `also`, but none of `not`.
    pub fn new(also: &[Class], not: &[Class]) -> Result<Self, ClassesError> {
        if let Some(never) = also.iter().find(|class| class.stance() == Stance::Never) {
            return Err(ClassesError::Never(*never));
        }
        if let Some(both) = also.iter().find(|class| not.contains(class)) {
            return Err(ClassesError::Both(*both));
        }
        Ok(Self { also: also.iter().copied().collect(), not: not.iter().copied().collect() })
    }

    /// Why a failure of this class is not answered with a copy, for a person; `None` if it is.
    pub fn refusal(&self, class: Class) -> Option<&'static str> {
        match class.stance() {
            _ if self.not.contains(&class) => Some("config.classes.ignore names the class"),
            Stance::Salvage => None,
            Stance::Policy if self.also.contains(&class) => None,
            Stance::Policy => Some(
                "a copy could go against somebody's will or do harm, and config.classes.salvage does not name the class",
            ),
            Stance::Never => Some("a copy does not help"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deliberate_failures_are_left_alone_unless_named() {
        let default = Classes::default();
        for class in [
            Class::SecretMissing,
            Class::NoCredentials,
            Class::BadCredentials,
            Class::Denied,
            Class::Signature,
            Class::Disk,
            Class::WrongPlatform,
        ] {
            assert!(
                default.refusal(class).is_some_and(|why| why.contains("config.classes.salvage")),
                "{class}"
            );
            assert_eq!(Classes::new(&[class], &[]).unwrap().refusal(class), None, "{class} named");
        }
        for class in
            [Class::NotFound, Class::Refused, Class::RateLimited, Class::Unknown, Class::CorruptStore]
        {
            assert_eq!(default.refusal(class), None, "{class}");
            assert!(Classes::new(&[], &[class]).unwrap().refusal(class).is_some(), "{class} ignored");
        }
    }

    #[test]
    fn what_no_copy_answers_cannot_be_asked_for() {
        for class in [Class::InvalidReference, Class::NotAPull, Class::RuntimeDown, Class::SandboxImage] {
            assert_eq!(Classes::new(&[class], &[]), Err(ClassesError::Never(class)));
            assert_eq!(Classes::default().refusal(class), Some("a copy does not help"));
        }
        assert_eq!(Classes::new(&[Class::Denied], &[Class::Denied]), Err(ClassesError::Both(Class::Denied)));
    }
}
