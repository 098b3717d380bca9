//! Who leads: an agent obeys no older leader than it has heard.

use std::sync::{Mutex, PoisonError};

use tonic::Status;
use tote_rpc::v1::Term;

/// How many Leases that were replaced are remembered.
const RETIRED: usize = 16;

/// The newest leadership heard of.
#[derive(Debug, Default)]
pub struct Terms(Mutex<Heard>);

#[derive(Debug, Default)]
struct Heard {
    newest: Term,
    /// UIDs of Leases that another has taken over from: their controllers no longer lead.
    retired: Vec<String>,
}

impl Terms {
    /// Takes note of a term, or refuses it as older: a lower count under the same Lease, or a Lease that was
    /// replaced. A new Lease takes over.
    pub(super) fn admit(&self, term: &Term) -> Result<(), Status> {
        if term.lease_uid.is_empty() {
            return Err(Status::invalid_argument("term.lease_uid: must be set"));
        }
        // An int32 in the Lease: whoever says more would keep every true leader out.
        if i32::try_from(term.lease_transitions).is_err() {
            let message = format!("term.lease_transitions {}: must fit 32 bits", term.lease_transitions);
            return Err(Status::invalid_argument(message));
        }
        let mut heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = heard.newest.clone();
        if heard.retired.contains(&term.lease_uid) {
            let message = format!("lease {} was replaced by {}", term.lease_uid, newest.lease_uid);
            return Err(Status::failed_precondition(message));
        }
        if term.lease_uid == newest.lease_uid {
            if term.lease_transitions < newest.lease_transitions {
                let message = format!(
                    "term {} is over, {} has begun",
                    term.lease_transitions, newest.lease_transitions
                );
                return Err(Status::failed_precondition(message));
            }
        } else if !newest.lease_uid.is_empty() {
            if heard.retired.len() >= RETIRED {
                heard.retired.remove(0);
            }
            heard.retired.push(newest.lease_uid);
        }
        heard.newest = term.clone();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn obeys_no_older_leader() {
        let terms = Terms::default();
        let code = |uid: &str, transitions| {
            let term = Term { lease_uid: uid.to_owned(), lease_transitions: transitions };
            terms.admit(&term).err().map(|status| status.code())
        };
        assert_eq!(code("", 1), Some(Code::InvalidArgument));
        assert_eq!(code("a", i64::MAX), Some(Code::InvalidArgument));
        assert_eq!(code("a", 3), None);
        assert_eq!(code("a", 3), None);
        assert_eq!(code("a", 2), Some(Code::FailedPrecondition));
        assert_eq!(code("a", 4), None);
        assert_eq!(code("b", 0), None, "a new Lease counts from 0");
        assert_eq!(code("a", 9), Some(Code::FailedPrecondition), "the Lease that it replaced");
        assert_eq!(code("b", 1), None);
    }
}
