//! Which image runs under which name, where, and for which workload. Pure.
//!
//! By what kubelet says of containers that run: what a tag means to a workload, and what a namespace has the use of.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use tote_image::Digest;

use crate::owners::Owners;

/// What a pod runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runs {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// UID of its controller.
    pub controller: Option<Arc<str>>,
    /// For each container that runs the image's name, normalized, and the digest of what runs.
    pub images: Vec<(Arc<str>, Digest)>,
}

/// What the pods of a workload mean by a name: digests, each with the number of containers that run it.
pub type Meant = BTreeMap<Digest, usize>;

/// Containers by their pods' controller and the digest they run.
type ByWorkload = HashMap<(Arc<str>, Digest), usize>;

/// What runs. Some 150 bytes a pod; names and digests are shared.
#[derive(Debug, Default)]
pub struct Running {
    pods: HashMap<Arc<str>, Runs>,
    /// By namespace and name of the image: by controller and digest how many containers.
    by_image: HashMap<(Arc<str>, Arc<str>), ByWorkload>,
    /// By namespace and digest: how many containers.
    by_digest: HashMap<(Arc<str>, Digest), usize>,
    shared: Shared,
}

/// Names, UIDs and digests of which one copy is kept.
#[derive(Debug, Default)]
struct Shared {
    texts: HashSet<Arc<str>>,
    digests: HashSet<Digest>,
    /// How many there were when those that nobody uses were last dropped.
    used: usize,
}

/// Below this number nothing is dropped.
const FEW: usize = 1024;

impl Running {
    /// Takes in what a pod runs now, `None` for nothing. Tells whether that is news.
    pub fn set(&mut self, uid: &Arc<str>, runs: Option<Runs>) -> bool {
        if self.pods.get(uid) == runs.as_ref() {
            return false;
        }
        if let Some(before) = self.pods.remove(uid) {
            self.count(&before, false);
        }
        if let Some(runs) = runs {
            let runs = self.shared.take(runs);
            self.count(&runs, true);
            self.pods.insert(uid.clone(), runs);
        }
        if self.shared.len() > FEW.max(2 * self.shared.used) {
            self.shared.drop_unused(&self.by_digest);
        }
        true
    }

    /// Forgets all pods but these.
    pub fn retain(&mut self, seen: &HashSet<Arc<str>>) {
        let gone: Vec<_> = self.pods.keys().filter(|uid| !seen.contains(*uid)).cloned().collect();
        for uid in &gone {
            self.set(uid, None);
        }
    }

    fn count(&mut self, runs: &Runs, more: bool) {
        for (name, digest) in &runs.images {
            let key = (runs.namespace.clone(), digest.clone());
            change(&mut self.by_digest, key, more);
            if let Some(controller) = &runs.controller {
                let key = (runs.namespace.clone(), name.clone());
                let by_workload = self.by_image.entry(key.clone()).or_default();
                change(by_workload, (controller.clone(), digest.clone()), more);
                if by_workload.is_empty() {
                    self.by_image.remove(&key);
                }
            }
        }
    }

    /// What the pods of a namespace that belong to the same workload as those of `controller` run under a name.
    pub fn of_workload(&self, owners: &Owners, namespace: &str, controller: &str, name: &str) -> Meant {
        let mut meant = Meant::new();
        let top = owners.top(controller);
        let found = self.by_image.get(&(namespace.into(), name.into()));
        for ((of, digest), count) in found.into_iter().flatten() {
            if owners.top(of) == top {
                *meant.entry(digest.clone()).or_default() += count;
            }
        }
        meant
    }

    /// Whether a pod of the namespace runs the digest, under whatever name.
    pub fn runs_in(&self, namespace: &str, digest: &Digest) -> bool {
        self.by_digest.contains_key(&(namespace.into(), digest.clone()))
    }
}

fn change<K: Eq + std::hash::Hash>(counts: &mut HashMap<K, usize>, key: K, more: bool) {
    match counts.get_mut(&key) {
        Some(count) if more => *count += 1,
        Some(count) if *count > 1 => *count -= 1,
        Some(_) => drop(counts.remove(&key)),
        None if more => drop(counts.insert(key, 1)),
        None => {}
    }
}

impl Shared {
    fn len(&self) -> usize {
        self.texts.len() + self.digests.len()
    }

    fn drop_unused(&mut self, running: &HashMap<(Arc<str>, Digest), usize>) {
        self.texts.retain(|text| Arc::strong_count(text) > 1);
        let running: HashSet<&Digest> = running.keys().map(|(_, digest)| digest).collect();
        self.digests.retain(|digest| running.contains(digest));
        self.used = self.len();
    }

    fn text(&mut self, text: Arc<str>) -> Arc<str> {
        if let Some(known) = self.texts.get(&text) {
            return known.clone();
        }
        self.texts.insert(text.clone());
        text
    }

    fn digest(&mut self, digest: Digest) -> Digest {
        if let Some(known) = self.digests.get(&digest) {
            return known.clone();
        }
        self.digests.insert(digest.clone());
        digest
    }

    fn take(&mut self, runs: Runs) -> Runs {
        let images = runs.images.into_iter().map(|(name, digest)| (self.text(name), self.digest(digest)));
        let mut images: Vec<_> = images.collect();
        images.shrink_to_fit();
        Runs {
            namespace: self.text(runs.namespace),
            controller: runs.controller.map(|uid| self.text(uid)),
            images,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::owners::{Owner, OwnerKind};

    fn digest(n: usize) -> Digest {
        Digest::sha256(&n.to_le_bytes())
    }

    fn runs(namespace: &str, controller: &str, images: &[(&str, usize)]) -> Runs {
        Runs {
            namespace: namespace.into(),
            controller: Some(controller.into()),
            images: images.iter().map(|(name, n)| ((*name).into(), digest(*n))).collect(),
        }
    }

    #[test]
    fn knows_what_a_workload_means_by_a_name() {
        let mut owners = Owners::default();
        for rs in ["rs-1", "rs-2"] {
            let owner = Owner { kind: OwnerKind::ReplicaSet, controller: Some("deploy".into()), says: None };
            owners.set(&rs.into(), Some(owner));
        }
        let mut running = Running::default();
        assert!(running.set(&"a".into(), Some(runs("shop", "rs-1", &[("r/x:1", 1), ("r/y:1", 5)]))));
        assert!(
            !running.set(&"a".into(), Some(runs("shop", "rs-1", &[("r/x:1", 1), ("r/y:1", 5)]))),
            "no news"
        );
        running.set(&"b".into(), Some(runs("shop", "rs-2", &[("r/x:1", 1)])));
        running.set(&"c".into(), Some(runs("shop", "other", &[("r/x:1", 2)])));
        running.set(&"d".into(), Some(runs("work", "rs-1", &[("r/x:1", 3)])));
        let of =
            |running: &Running, controller: &str| running.of_workload(&owners, "shop", controller, "r/x:1");
        assert_eq!(of(&running, "rs-2"), Meant::from([(digest(1), 2)]));
        assert_eq!(of(&running, "other"), Meant::from([(digest(2), 1)]));
        assert_eq!(of(&running, "nobody"), Meant::new());
        assert!(running.runs_in("shop", &digest(5)) && !running.runs_in("shop", &digest(3)));
        running.set(&"b".into(), Some(runs("shop", "rs-2", &[("r/x:1", 4)])));
        assert_eq!(of(&running, "rs-2"), Meant::from([(digest(1), 1), (digest(4), 1)]));
        running.set(&"a".into(), None);
        assert_eq!(of(&running, "rs-2"), Meant::from([(digest(4), 1)]));
        assert!(!running.runs_in("shop", &digest(5)));
        running.retain(&["c".into()].into());
        assert_eq!(of(&running, "rs-2"), Meant::new());
        assert!(running.runs_in("shop", &digest(2)));
        running.retain(&HashSet::new());
        assert!(running.pods.is_empty() && running.by_image.is_empty() && running.by_digest.is_empty());
    }

    #[test]
    fn what_came_and_went_is_not_kept() {
        let mut running = Running::default();
        for n in 0..20_000 {
            running.set(&"a".into(), Some(runs("shop", &format!("rs-{n}"), &[(&format!("r/x:{n}"), n)])));
        }
        assert!(running.shared.len() <= 2 * FEW, "{}", running.shared.len());
        assert_eq!((running.by_image.len(), running.by_digest.len()), (1, 1));
    }

    #[test]
    fn pods_of_one_image_share_what_is_kept_of_it() {
        let mut running = Running::default();
        for n in 0..1000 {
            running.set(&format!("pod-{n}").into(), Some(runs("shop", "rs", &[("r/x:1", 1)])));
        }
        assert_eq!((running.shared.len(), running.by_image.len()), (4, 1));
        let names: HashSet<*const u8> = running.pods.values().map(|runs| runs.images[0].0.as_ptr()).collect();
        assert_eq!(names.len(), 1);
    }
}
