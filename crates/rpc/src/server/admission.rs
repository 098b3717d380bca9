//! How many connections there may be, so that memory is bounded whoever knocks. Those that have yet to show a
//! certificate give way to those that come after them, the oldest of the address that has the most: whoever opens
//! thousands and says nothing keeps nobody out. Those that have shown one are bounded each for itself.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::AbortHandle;

use crate::identity::Role;

/// Connections that have yet to show a certificate.
pub(super) const UNKNOWN: usize = 128;

/// Connections of one node (it runs 8 transfers of 3 blobs at once), and of controllers.
pub(super) const PER_NODE: usize = 32;
pub(super) const CONTROLLERS: usize = 64;

/// Connections of all.
pub(super) const KNOWN: usize = 512;

struct Unknown {
    number: u64,
    from: IpAddr,
    task: AbortHandle,
}

#[derive(Default)]
struct Inside {
    next: u64,
    unknown: VecDeque<Unknown>,
    known: HashMap<Role, usize>,
    total: usize,
}

/// The connections of a listener.
#[derive(Clone, Default)]
pub(super) struct Admission(Arc<Mutex<Inside>>);

/// A place of a connection whose owner is known; given back when dropped.
pub(super) struct Place {
    admission: Admission,
    role: Role,
}

impl Inside {
    /// The oldest of those from the address that has the most.
    fn take_oldest_of_busiest(&mut self) -> Option<Unknown> {
        let mut from = HashMap::<IpAddr, usize>::new();
        for unknown in &self.unknown {
            *from.entry(unknown.from).or_default() += 1;
        }
        let (busiest, _) = from.into_iter().max_by_key(|(_, n)| *n)?;
        let at = self.unknown.iter().position(|unknown| unknown.from == busiest)?;
        self.unknown.remove(at)
    }
}

impl Admission {
    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in one that has yet to show a certificate, whose task is begun with a number: it cannot leave before it
    /// is in. The one that has to give way to it, if any, is ended. Tells whether one was.
    pub(super) fn enter(&self, from: IpAddr, begin: impl FnOnce(u64) -> AbortHandle) -> bool {
        let mut inside = self.lock();
        inside.next += 1;
        let number = inside.next;
        inside.unknown.retain(|unknown| !unknown.task.is_finished());
        inside.unknown.push_back(Unknown { number, from, task: begin(number) });
        let ended = if inside.unknown.len() > UNKNOWN { inside.take_oldest_of_busiest() } else { None };
        if let Some(unknown) = &ended {
            unknown.task.abort();
        }
        ended.is_some()
    }

    /// One has shown its certificate, or gone.
    pub(super) fn leave(&self, number: u64) {
        self.lock().unknown.retain(|other| other.number != number);
    }

    /// A place for one who is known, if there is one.
    pub(super) fn place(&self, role: &Role) -> Option<Place> {
        let mut inside = self.lock();
        let most = if *role == Role::Controller { CONTROLLERS } else { PER_NODE };
        // Controllers find a place even if nodes have taken all of theirs.
        let full = inside.total >= KNOWN && *role != Role::Controller;
        if full || inside.known.get(role).is_some_and(|n| *n >= most) {
            return None;
        }
        *inside.known.entry(role.clone()).or_default() += 1;
        inside.total += 1;
        Some(Place { admission: self.clone(), role: role.clone() })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inside = self.admission.lock();
        inside.total -= 1;
        if let Some(n) = inside.known.get_mut(&self.role) {
            *n -= 1;
            if *n == 0 {
                inside.known.remove(&self.role);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    #[tokio::test]
    async fn the_oldest_unknown_gives_way() {
        let admission = Admission::default();
        let tasks: Vec<_> = (0..=UNKNOWN).map(|_| tokio::spawn(std::future::pending::<()>())).collect();
        for (at, task) in tasks.iter().enumerate() {
            assert_eq!(admission.enter(HERE, |_| task.abort_handle()), at == UNKNOWN, "{at}");
        }
        let mut tasks = tasks.into_iter();
        assert!(tasks.next().unwrap().await.unwrap_err().is_cancelled());
        assert!(tasks.all(|task| !task.is_finished()));
    }

    /// However fast one address knocks, those of another are left alone.
    #[tokio::test]
    async fn the_address_that_has_the_most_gives_way() {
        let admission = Admission::default();
        let honest = tokio::spawn(std::future::pending::<()>());
        admission.enter([10, 0, 0, 1].into(), |_| honest.abort_handle());
        let flood: Vec<_> = (0..4 * UNKNOWN).map(|_| tokio::spawn(std::future::pending::<()>())).collect();
        for task in &flood {
            admission.enter(HERE, |_| task.abort_handle());
        }
        assert_eq!(admission.lock().unknown.len(), UNKNOWN);
        assert!(admission.lock().unknown.iter().any(|unknown| unknown.from != HERE));
        tokio::task::yield_now().await;
        assert!(!honest.is_finished());
    }

    #[tokio::test]
    async fn one_that_is_known_at_once_is_not_taken_for_unknown() {
        let admission = Admission::default();
        let mut leaving = None;
        admission.enter(HERE, |number| {
            let known = admission.clone();
            let (told, begun) = std::sync::mpsc::channel();
            leaving = Some(std::thread::spawn(move || {
                told.send(()).unwrap();
                known.leave(number);
            }));
            begun.recv().unwrap();
            tokio::spawn(std::future::pending::<()>()).abort_handle()
        });
        leaving.unwrap().join().unwrap();
        assert!(admission.lock().unknown.is_empty());
    }

    #[test]
    fn each_is_bounded_for_itself_and_places_come_back() {
        let admission = Admission::default();
        let node = |n: usize| Role::Node(format!("n{n}").into());
        let mut held: Vec<_> = (0..PER_NODE).map(|_| admission.place(&node(0)).unwrap()).collect();
        assert!(admission.place(&node(0)).is_none());
        held.pop();
        held.push(admission.place(&node(0)).unwrap());
        let others = (1..=KNOWN).filter_map(|n| admission.place(&node(n)));
        held.extend(others);
        assert_eq!(held.len(), KNOWN);
        assert!(admission.place(&Role::Controller).is_some(), "the controller finds a place all the same");
        held.clear();
        let inside = admission.lock();
        assert!(inside.known.is_empty() && inside.total == 0);
    }
}
