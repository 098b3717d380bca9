//! The certificate authority: what is kept of it, and when one follows another. Pure; `keep` has the effects.
//!
//! A new authority is trusted before it signs, and the old one is trusted for a while after it has signed its last, so
//! that no connection fails in between: staged, promoted, retired.

mod keep;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use thiserror::Error;
use tote_rpc::identity::{Authorities, Authority, AuthorityError};

pub use keep::{Keeper, Names, Standing};

/// How long an authority of tote's own is valid. It is followed by another at two thirds of that.
const LIFE: Duration = Duration::from_secs(365 * 24 * 3600);

/// How long a new authority is trusted before it signs: kubelet brings a changed `ConfigMap` to mounts within about 90 s
/// (its sync period of a minute and the time its cache may lag).
pub const PUBLISHED: Duration = Duration::from_secs(120);

/// How long the former one is trusted after it has signed its last.
const RETIRED: Duration = Duration::from_secs(600);

/// Keys of the Secret's data.
const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";
const NEXT_CERTIFICATE: &str = "next.crt";
const NEXT_KEY: &str = "next.key";
const FORMER: &str = "former.crt";

/// Annotations of the Secret.
const STAGED_AT: &str = "tote.dev/ca-staged-at";
const PROMOTED_AT: &str = "tote.dev/ca-promoted-at";
/// Set by people to have the authority replaced.
pub const ROTATE: &str = "tote.dev/rotate-ca";

/// The authority that signs, the one that will, and the one that did.
#[derive(Debug)]
pub struct Ca {
    /// Signs.
    pub signer: Authority,
    next: Option<(Authority, Timestamp)>,
    former: Option<(Authorities, Timestamp)>,
}

/// What is stored of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stored {
    /// PEM texts by the key of the Secret's data.
    pub data: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
}

/// Why what is stored cannot be used: what of it, and what is wrong with it.
#[derive(Debug, Error)]
pub enum StoredError {
    /// A part is missing.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A part is malformed.
    #[error("{0}: {1}")]
    Authority(&'static str, AuthorityError),
    /// A part is malformed.
    #[error("{0}: {1}")]
    Malformed(&'static str, String),
}

/// Where the next authority comes from.
#[derive(Debug)]
pub enum Origin<'a> {
    /// Made here when the signer is old enough, or when somebody asks for it.
    Own {
        /// Somebody asks for it.
        asked: bool,
    },
    /// Somebody else's Secret: followed whenever it changes.
    Given(&'a Stored),
}

/// What is due.
#[derive(Debug)]
pub enum Step {
    /// Nothing.
    Rest,
    /// The next authority is to be made, by whoever may make random numbers.
    Make,
    /// The given one is the next.
    Take(Box<Authority>),
    /// The next one signs from now on.
    Promote,
    /// The former one is trusted no longer.
    Retire,
}

impl Stored {
    fn authority(&self, certificate: &'static str, key: &'static str) -> Result<Authority, StoredError> {
        let text = |of: &'static str| self.data.get(of).ok_or(StoredError::Missing(of));
        Authority::from_pem(text(certificate)?, text(key)?)
            .map_err(|error| StoredError::Authority(certificate, error))
    }

    fn time(&self, annotation: &'static str) -> Result<Timestamp, StoredError> {
        let text = self.annotations.get(annotation).ok_or(StoredError::Missing(annotation))?;
        text.parse().map_err(|error: jiff::Error| StoredError::Malformed(annotation, error.to_string()))
    }

    /// Reads the one authority of a Secret that somebody else keeps (`kubernetes.io/tls`).
    pub fn given(&self) -> Result<Authority, StoredError> {
        self.authority(CERTIFICATE, KEY)
    }
}

impl Ca {
    /// One that signs from now on, with nothing before it.
    pub fn new(signer: Authority) -> Self {
        Self { signer, next: None, former: None }
    }

    /// Makes an authority of tote's own.
    pub fn make(now: SystemTime) -> Result<Authority, AuthorityError> {
        Authority::generate(now, LIFE)
    }

    /// Reads what was stored.
    pub fn read(stored: &Stored) -> Result<Self, StoredError> {
        let signer = stored.given()?;
        let next = match stored.data.get(NEXT_CERTIFICATE) {
            None => None,
            Some(_) => Some((stored.authority(NEXT_CERTIFICATE, NEXT_KEY)?, stored.time(STAGED_AT)?)),
        };
        let former = match stored.data.get(FORMER) {
            None => None,
            Some(pem) => {
                let bundle = Authorities::from_pem(pem);
                let bundle = bundle.map_err(|error| StoredError::Malformed(FORMER, error.to_string()))?;
                Some((bundle, stored.time(PROMOTED_AT)?))
            }
        };
        Ok(Self { signer, next, former })
    }

    /// What is to be stored.
    pub fn stored(&self) -> Stored {
        let mut stored = Stored::default();
        let mut put = |key: &str, text: &str| stored.data.insert(key.to_owned(), text.to_owned());
        put(CERTIFICATE, self.signer.certificate_pem());
        put(KEY, self.signer.key_pem());
        if let Some((next, staged)) = &self.next {
            put(NEXT_CERTIFICATE, next.certificate_pem());
            put(NEXT_KEY, next.key_pem());
            stored.annotations.insert(STAGED_AT.to_owned(), staged.to_string());
        }
        if let Some((former, promoted)) = &self.former {
            stored.data.insert(FORMER.to_owned(), former.pem());
            stored.annotations.insert(PROMOTED_AT.to_owned(), promoted.to_string());
        }
        stored
    }

    /// All that are to be believed.
    pub fn bundle(&self) -> Authorities {
        let next = self.next.iter().map(|(next, _)| next.certificate());
        let own = std::iter::once(self.signer.certificate()).chain(next).cloned().collect();
        let own = Authorities::from_certificates(own).unwrap_or_default();
        match &self.former {
            Some((former, _)) => own.and(former),
            None => own,
        }
    }

    /// Whether one follows another at present.
    pub fn is_changing(&self) -> bool {
        self.next.is_some() || self.former.is_some()
    }

    /// What is due now.
    pub fn due(&self, origin: &Origin<'_>, now: Timestamp) -> Result<Step, StoredError> {
        if let Some((_, staged)) = &self.next {
            let at = after(*staged, PUBLISHED);
            // A signer that has ended is waited for by nobody.
            let ended = self.signer.not_after() <= SystemTime::from(now);
            // A time that is yet to come was written by a clock that was wrong.
            let waits = *staged <= now && at > now;
            return Ok(if waits && !ended { Step::Rest } else { Step::Promote });
        }
        if self
            .former
            .as_ref()
            .is_some_and(|(_, promoted)| *promoted > now || after(*promoted, RETIRED) <= now)
        {
            return Ok(Step::Retire);
        }
        match origin {
            Origin::Given(stored) => {
                let given = stored.given()?;
                if given.certificate() != self.signer.certificate() {
                    given.try_out().map_err(|error| StoredError::Authority(CERTIFICATE, error))?;
                    if given.not_after() <= SystemTime::from(now) {
                        return Err(StoredError::Malformed(CERTIFICATE, "it is no longer valid".to_owned()));
                    }
                    return Ok(Step::Take(Box::new(given)));
                }
            }
            Origin::Own { asked } => {
                let (from, to) = (self.signer.not_before(), self.signer.not_after());
                let old = from + to.duration_since(from).unwrap_or_default() * 2 / 3;
                let old = Timestamp::try_from(old).unwrap_or(Timestamp::MAX);
                if *asked || old <= now {
                    return Ok(Step::Make);
                }
            }
        }
        Ok(Step::Rest)
    }

    /// Another is trusted from now on, and will sign.
    #[must_use]
    pub fn stage(self, next: Authority, now: Timestamp) -> Self {
        Self { next: Some((next, now)), ..self }
    }

    /// The next one has been published only now: it waits from now on.
    #[must_use]
    pub fn stage_again(self, now: Timestamp) -> Self {
        Self { next: self.next.map(|(next, _)| (next, now)), ..self }
    }

    /// The next one signs; the signer is trusted for a while.
    #[must_use]
    pub fn promote(self, now: Timestamp) -> Self {
        let Some((next, _)) = self.next else { return self };
        let former = Authorities::from_certificates(vec![self.signer.certificate().clone()]);
        Self { signer: next, next: None, former: former.ok().map(|former| (former, now)) }
    }

    /// The former one is trusted no longer.
    #[must_use]
    pub fn retire(self) -> Self {
        Self { former: None, ..self }
    }
}

fn after(time: Timestamp, by: Duration) -> Timestamp {
    time.checked_add(by).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_second(1_800_000_000).unwrap() + Duration::from_secs(seconds)
    }

    fn made(seconds: u64) -> Authority {
        Ca::make(at(seconds).into()).unwrap()
    }

    type Change = Box<dyn Fn(&mut Stored)>;

    const OWN: Origin<'_> = Origin::Own { asked: false };

    #[test]
    fn is_stored_and_read_back_at_every_stage() {
        let fresh = Ca::new(made(0));
        assert_eq!(fresh.bundle().certificates().len(), 1);
        let staged = Ca::new(made(0)).stage(made(1), at(1));
        let promoted = Ca::new(made(0)).stage(made(1), at(1)).promote(at(200));
        for ca in [fresh, staged, promoted] {
            let back = Ca::read(&ca.stored()).unwrap();
            assert_eq!(back.stored(), ca.stored());
            assert_eq!(back.bundle(), ca.bundle());
        }
    }

    #[test]
    fn one_follows_another_without_a_gap() {
        let first = made(0);
        let first_certificate = first.certificate().clone();
        let ca = Ca::new(first);
        assert!(matches!(ca.due(&OWN, at(10)), Ok(Step::Rest)));
        assert!(matches!(ca.due(&Origin::Own { asked: true }, at(10)), Ok(Step::Make)));
        let ca = ca.stage(made(10), at(10));
        assert_eq!(ca.bundle().certificates().len(), 2);
        assert_eq!(*ca.signer.certificate(), first_certificate, "it does not sign yet");
        assert!(matches!(ca.due(&Origin::Own { asked: true }, at(129)), Ok(Step::Rest)));
        assert!(matches!(ca.due(&OWN, at(130)), Ok(Step::Promote)));
        let ca = ca.promote(at(130));
        assert_ne!(*ca.signer.certificate(), first_certificate);
        assert!(ca.bundle().certificates().contains(&first_certificate), "still trusted");
        assert!(matches!(ca.due(&OWN, at(729)), Ok(Step::Rest)));
        assert!(matches!(ca.due(&OWN, at(730)), Ok(Step::Retire)));
        let ca = ca.retire();
        assert_eq!(ca.bundle().certificates().len(), 1);
        assert!(!ca.is_changing());
    }

    #[test]
    fn what_was_published_late_waits_anew_and_what_is_yet_to_come_does_not() {
        let ca = Ca::new(made(0)).stage(made(1), at(10)).stage_again(at(200));
        assert!(matches!(ca.due(&OWN, at(300)), Ok(Step::Rest)));
        assert!(matches!(ca.due(&OWN, at(320)), Ok(Step::Promote)));
        // Written by a clock that was ahead, and has been put right.
        let ca = Ca::new(made(0)).stage(made(1), at(9_000));
        assert!(matches!(ca.due(&OWN, at(10)), Ok(Step::Promote)));
        assert!(matches!(ca.promote(at(9_000)).due(&OWN, at(10)), Ok(Step::Retire)));
    }

    #[test]
    fn it_is_replaced_in_time() {
        let ca = Ca::new(made(0));
        let day = 24 * 3600;
        assert!(matches!(ca.due(&OWN, at(200 * day)), Ok(Step::Rest)));
        assert!(matches!(ca.due(&OWN, at(244 * day)), Ok(Step::Make)));
        // A controller that was away for a year does not wait for anybody.
        let late = at(400 * day);
        let next = Ca::make(late.into()).unwrap();
        assert!(matches!(Ca::new(made(0)).stage(next, late).due(&OWN, late), Ok(Step::Promote)));
    }

    #[test]
    fn somebody_elses_is_followed() {
        let (one, two) = (made(0), made(5));
        let stored = |ca: &Ca| ca.stored();
        let ca = Ca::new(one);
        let same = stored(&ca);
        assert!(matches!(ca.due(&Origin::Given(&same), at(9_999_999_999)), Ok(Step::Rest)), "never by age");
        let other = stored(&Ca::new(two));
        let Ok(Step::Take(next)) = ca.due(&Origin::Given(&other), at(9)) else { panic!() };
        let ca = ca.stage(*next, at(9)).promote(at(200));
        assert_eq!(ca.stored().data[CERTIFICATE], other.data[CERTIFICATE]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let good = Ca::new(made(0)).stage(made(1), at(1)).stored();
        let with = |change: &dyn Fn(&mut Stored)| {
            let mut stored = good.clone();
            change(&mut stored);
            Ca::read(&stored).unwrap_err().to_string()
        };
        let cases: Vec<(Change, &str)> = vec![
            (Box::new(|s| drop(s.data.remove(CERTIFICATE))), "tls.crt is missing"),
            (Box::new(|s| drop(s.data.remove(KEY))), "tls.key is missing"),
            (Box::new(|s| drop(s.data.remove(NEXT_KEY))), "next.key is missing"),
            (Box::new(|s| drop(s.annotations.remove(STAGED_AT))), "ca-staged-at is missing"),
            (Box::new(|s| drop(s.annotations.insert(STAGED_AT.into(), "x".into()))), "ca-staged-at: "),
            (Box::new(|s| drop(s.data.insert(KEY.into(), "x".into()))), "the key: "),
            (Box::new(|s| drop(s.data.insert(FORMER.into(), "x".into()))), "former.crt: "),
        ];
        for (change, says) in cases {
            let said = with(&*change);
            assert!(said.contains(says), "{said}, which should say {says}");
        }
    }
}
