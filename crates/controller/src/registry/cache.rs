//! Answers of registries, for a short while. Pure: time is an argument.

use std::collections::HashMap;
use std::hash::Hash;

use jiff::{SignedDuration, Timestamp};

/// For how many seconds an answer is taken again: a digest, and anything else.
const FOUND: i64 = 30;
const NOT_FOUND: i64 = 10;

/// A map of answers that forgets them, and holds so many at most.
pub(super) struct Cache<K, V, E> {
    most: usize,
    known: HashMap<K, (Result<V, E>, Timestamp)>,
}

impl<K: Hash + Eq + Clone, V: Clone, E: Clone> Cache<K, V, E> {
    pub(super) fn new(most: usize) -> Self {
        Self { most, known: HashMap::new() }
    }

    pub(super) fn get(&self, key: &K, now: Timestamp) -> Option<Result<V, E>> {
        self.known.get(key).filter(|(_, until)| *until > now).map(|(answer, _)| answer.clone())
    }

    pub(super) fn put(&mut self, key: K, answer: Result<V, E>, now: Timestamp) {
        if self.known.len() >= self.most {
            self.known.retain(|_, (_, until)| *until > now);
        }
        if self.known.len() >= self.most
            && let Some(first) = self.known.iter().min_by_key(|(_, (_, until))| *until)
        {
            let first = first.0.clone();
            self.known.remove(&first);
        }
        let life = SignedDuration::from_secs(if answer.is_ok() { FOUND } else { NOT_FOUND });
        let until = now.checked_add(life).unwrap_or(Timestamp::MAX);
        self.known.insert(key, (answer, until));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(t: Timestamp, seconds: i64) -> Timestamp {
        t.checked_add(SignedDuration::from_secs(seconds)).unwrap()
    }

    #[test]
    fn answers_are_forgotten_in_time_and_by_number() {
        let start = Timestamp::UNIX_EPOCH;
        let mut cache: Cache<u32, u32, &str> = Cache::new(3);
        cache.put(1, Ok(10), start);
        cache.put(2, Err("no"), start);
        assert_eq!(
            (cache.get(&1, start), cache.get(&2, start), cache.get(&3, start)),
            (Some(Ok(10)), Some(Err("no")), None)
        );
        assert_eq!(cache.get(&2, after(start, 10)), None);
        assert_eq!(cache.get(&1, after(start, 29)), Some(Ok(10)));
        assert_eq!(cache.get(&1, after(start, 30)), None);
        for key in 3..100 {
            cache.put(key, Ok(key), after(start, i64::from(key)));
            assert!(cache.known.len() <= 3);
        }
        assert_eq!(cache.get(&99, after(start, 99)), Some(Ok(99)));
        assert_eq!(cache.get(&97, after(start, 99)), Some(Ok(97)), "the oldest goes first");
    }
}
