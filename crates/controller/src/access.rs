//! Who may have an image: what the kubelets wrote down when they pulled it (KEP-2535), weighed for one namespace. Pure.
//!
//! Must not know pods: whether one of the namespace runs the image is an argument.

use std::collections::BTreeSet;
use std::sync::Arc;

use tote_image::Reference;
use tote_rpc::v1;

/// The most principals of a kind that travel along. Kubelet itself adds none beyond 100.
const MAX_PRINCIPALS: usize = 256;

/// What is asked for before an image moves, beside the opt-ins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Policy {
    /// That the kubelets' records let the namespace have it, where there are any.
    #[default]
    Records,
    /// Nothing.
    Any,
}

/// A kubelet's record of an image. One without repositories names nobody.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Pulled {
    repositories: Vec<Pull>,
}

/// Who may have an image under a repository.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Pull {
    /// As pods write it, without tag and digest.
    repository: Arc<str>,
    every_pod: bool,
    principals: Vec<Principal>,
}

/// What a pod must have to be let use an image.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Principal {
    namespace: Arc<str>,
    name: Arc<str>,
    uid: Arc<str>,
    /// Kubelet's hash of a Secret; `None` of a service account.
    hash: Option<Arc<str>>,
}

/// Whether a namespace may have an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The policy is not to ask.
    NotAsked,
    /// No kubelet has a record of it: the opt-ins decide.
    Unrecorded,
    /// Every record lets every pod of its node have it.
    EveryPod,
    /// A record names a Secret or service account of the namespace.
    Named,
    /// A pod of the namespace runs it.
    Runs,
    /// Records restrict it, and nothing shows that the namespace may have it.
    Unproven {
        /// Nodes whose records restrict it.
        nodes: usize,
        /// Other namespaces that those name.
        namespaces: usize,
    },
    /// Nothing restricts it, but not every agent that could know has told.
    Untold {
        /// Nodes that hold it and whose agent does not tell.
        nodes: usize,
    },
}

impl Pulled {
    /// Takes an agent's word for a record.
    pub fn from_wire(record: &v1::PulledRecord) -> Self {
        let pull = |wire: &v1::PulledRepository| {
            let secrets =
                wire.secrets.iter().map(|s| (&s.namespace, &s.name, &s.uid, Some(&s.credential_hash)));
            let accounts = wire.service_accounts.iter().map(|a| (&a.namespace, &a.name, &a.uid, None));
            let principal =
                |(namespace, name, uid, hash): (&String, &String, &String, Option<&String>)| Principal {
                    namespace: namespace.as_str().into(),
                    name: name.as_str().into(),
                    uid: uid.as_str().into(),
                    hash: hash.map(|hash| hash.as_str().into()),
                };
            Pull {
                repository: wire.repository.as_str().into(),
                every_pod: wire.every_pod,
                principals: secrets.chain(accounts).map(principal).collect(),
            }
        };
        Self { repositories: record.repositories.iter().map(pull).collect() }
    }

    /// Whether it keeps any pod of its node from having the image.
    fn restricts(&self) -> bool {
        self.repositories.is_empty() || self.repositories.iter().any(|pull| !pull.every_pod)
    }

    fn namespaces(&self) -> impl Iterator<Item = &str> {
        self.repositories.iter().flat_map(|pull| &pull.principals).map(|principal| &*principal.namespace)
    }
}

impl Access {
    /// Whether the image may move.
    pub fn is_given(self) -> bool {
        !matches!(self, Self::Unproven { .. } | Self::Untold { .. })
    }

    /// Whether records restrict the image, so that the target's kubelet has to know of it.
    pub fn travels(self) -> bool {
        matches!(self, Self::Named | Self::Runs)
    }

    /// CamelCase, for the condition.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NotAsked => "NotAsked",
            Self::Unrecorded => "Unrecorded",
            Self::EveryPod => "EveryPod",
            Self::Named => "Named",
            Self::Runs => "Runs",
            Self::Unproven { .. } | Self::Untold { .. } => "AccessUnproven",
        }
    }

    /// For a person. Of other namespaces it tells no name.
    pub fn message(self, namespace: &str) -> String {
        match self {
            Self::NotAsked => {
                "kubelet's records of who may have the image are not asked (--access=any)".to_owned()
            }
            Self::Unrecorded => {
                "no kubelet has a record of who may have the image: that the namespace is opted in decides"
                    .to_owned()
            }
            Self::EveryPod => "by every kubelet's record any pod of its node may have the image".to_owned(),
            Self::Named => {
                format!(
                    "a kubelet's record of the image names a Secret or service account of namespace {namespace}"
                )
            }
            Self::Runs => format!("a pod of namespace {namespace} runs the image"),
            Self::Untold { nodes } => format!(
                "the agent on {nodes} node(s) that hold this image does not tell what kubelet wrote down of who may have it: \
                 it is older than the controller, or runs without --kubelet-dir (agent.kubeletDir). When it tells, namespace \
                 {namespace} may have it, or not; an operator may also set controller.access=any."
            ),
            Self::Unproven { nodes, namespaces } => {
                let named = match namespaces {
                    0 => "name nobody".to_owned(),
                    1 => "name only another namespace".to_owned(),
                    n => format!("name only {n} other namespaces"),
                };
                format!(
                    "nothing shows that namespace {namespace} may have this image: kubelet's records of it on \
                     {nodes} node(s) restrict it and {named}. Once a pod of the namespace has pulled it with a Secret \
                     or service account of its own, it may; an operator may also set controller.access=any."
                )
            }
        }
    }
}

/// Whether `namespace` may have an image of which these are all nodes' records: the strictest counts.
pub fn verdict<'a>(
    records: impl IntoIterator<Item = &'a Pulled>,
    namespace: &str,
    runs_already: bool,
    policy: Policy,
) -> Access {
    if policy == Policy::Any {
        return Access::NotAsked;
    }
    let (mut nodes, mut any, mut named) = (0, false, BTreeSet::new());
    for record in records {
        any = true;
        nodes += usize::from(record.restricts());
        named.extend(record.namespaces());
    }
    match (any, nodes) {
        (false, _) => Access::Unrecorded,
        (true, 0) => Access::EveryPod,
        _ if named.contains(namespace) => Access::Named,
        _ if runs_already => Access::Runs,
        _ => Access::Unproven { nodes, namespaces: named.len() },
    }
}

/// The verdict over several images that one digest may be: each must be given, and the strictest is told.
pub fn strictest(verdicts: impl IntoIterator<Item = Access>) -> Access {
    let rank = |access: &Access| match access {
        Access::Unproven { .. } => 5,
        Access::Untold { .. } => 4,
        Access::Runs => 3,
        Access::Named => 2,
        Access::EveryPod => 1,
        Access::NotAsked | Access::Unrecorded => 0,
    };
    verdicts.into_iter().max_by_key(rank).unwrap_or(Access::Unrecorded)
}

/// What the target's kubelet is to be told of an image that `namespace` may have under the name `image` (as its pods write
/// it): `None` if nothing restricts it. It lets in who is named for that repository anywhere, and of other repositories'
/// records those of the namespace alone: nobody else has shown that he may have it under this one.
pub fn travelling<'a>(
    records: impl IntoIterator<Item = &'a Pulled>,
    namespace: &str,
    image: &str,
    policy: Policy,
) -> Option<v1::PulledRepository> {
    let records: Vec<&Pulled> = records.into_iter().collect();
    if policy == Policy::Any || !records.iter().any(|record| record.restricts()) {
        return None;
    }
    let wanted = repository_of(image);
    let mut principals = BTreeSet::new();
    for pull in records.iter().flat_map(|record| &record.repositories) {
        let same = repository_of(&pull.repository).is_some_and(|known| Some(known) == wanted);
        principals.extend(pull.principals.iter().filter(|p| same || *p.namespace == *namespace));
    }
    // Those of the namespace first, should there be too many.
    let (own, others): (Vec<&Principal>, Vec<&Principal>) =
        principals.into_iter().partition(|principal| *principal.namespace == *namespace);
    let mut repository =
        v1::PulledRepository { repository: written(image).to_owned(), ..v1::PulledRepository::default() };
    for principal in own.into_iter().chain(others) {
        let (uid, namespace, name) =
            (principal.uid.to_string(), principal.namespace.to_string(), principal.name.to_string());
        match &principal.hash {
            Some(hash) if repository.secrets.len() < MAX_PRINCIPALS => {
                let credential_hash = hash.to_string();
                repository.secrets.push(v1::PullSecret { uid, namespace, name, credential_hash });
            }
            None if repository.service_accounts.len() < MAX_PRINCIPALS => {
                repository.service_accounts.push(v1::PullServiceAccount { uid, namespace, name });
            }
            _ => {}
        }
    }
    Some(repository)
}

/// An image as a pod writes it, without tag and digest: what kubelet's records go by.
fn written(image: &str) -> &str {
    let name = image.split('@').next().unwrap_or(image);
    match name.rfind(':') {
        Some(at) if !name[at..].contains('/') => &name[..at],
        _ => name,
    }
}

/// The normalized repository.
fn repository_of(image: &str) -> Option<String> {
    image.parse::<Reference>().ok().map(|reference| reference.repository().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record of the repository `r.test/a`: `*` for every pod, otherwise a Secret of each of these namespaces.
    fn record(repository: &str, who: &[&str]) -> v1::PulledRecord {
        let secret = |namespace: &&str| v1::PullSecret {
            uid: format!("uid-{namespace}"),
            namespace: (*namespace).to_owned(),
            name: "pull".to_owned(),
            credential_hash: "h".to_owned(),
        };
        let every_pod = who == ["*"];
        let secrets = if every_pod { vec![] } else { who.iter().map(secret).collect() };
        let repository = v1::PulledRepository {
            repository: repository.to_owned(),
            every_pod,
            secrets,
            service_accounts: vec![],
        };
        v1::PulledRecord { repositories: vec![repository] }
    }

    fn a(who: &[&str]) -> Pulled {
        Pulled::from_wire(&record("r.test/a", who))
    }

    fn both(one: &[&str], other: &[&str]) -> Pulled {
        let mut records = record("r.test/a", one);
        records.repositories.extend(record("r.test/b", other).repositories);
        Pulled::from_wire(&records)
    }

    #[test]
    fn the_strictest_record_counts() {
        let nobody = Pulled::default;
        let unproven = |nodes, namespaces| Access::Unproven { nodes, namespaces };
        let cases: Vec<(Vec<Pulled>, bool, Access)> = vec![
            (vec![], false, Access::Unrecorded),
            (vec![], true, Access::Unrecorded),
            (vec![a(&["*"])], false, Access::EveryPod),
            (vec![a(&["*"]), a(&["*"])], false, Access::EveryPod),
            (vec![a(&["shop"])], false, Access::Named),
            (vec![a(&["work", "shop"])], false, Access::Named),
            (vec![a(&["work"]), a(&["shop"])], false, Access::Named),
            (vec![a(&["work"])], false, unproven(1, 1)),
            (vec![a(&["work"])], true, Access::Runs),
            (vec![a(&["*"]), a(&["work"])], false, unproven(1, 1)),
            (vec![a(&["*"]), a(&["work"]), a(&["play", "work"])], false, unproven(2, 2)),
            (vec![nobody()], false, unproven(1, 0)),
            (vec![a(&[])], false, unproven(1, 0)),
            (vec![nobody(), a(&["*"])], false, unproven(1, 0)),
            (vec![nobody(), a(&["shop"])], false, Access::Named),
            (vec![both(&["*"], &["work"])], false, unproven(1, 1)),
            (vec![both(&["*"], &["shop"])], false, Access::Named),
        ];
        for (records, runs, expected) in cases {
            assert_eq!(verdict(&records, "shop", runs, Policy::Records), expected, "{records:?}");
            assert_eq!(verdict(&records, "shop", runs, Policy::Any), Access::NotAsked);
        }
    }

    #[test]
    fn a_service_account_is_as_good() {
        let account = v1::PullServiceAccount {
            uid: "u".to_owned(),
            namespace: "shop".to_owned(),
            name: "puller".to_owned(),
        };
        let mut record = record("r.test/a", &[]);
        record.repositories[0].service_accounts.push(account.clone());
        let record = [Pulled::from_wire(&record)];
        assert_eq!(verdict(&record, "shop", false, Policy::Records), Access::Named);
        let travels = travelling(&record, "shop", "r.test/a:1", Policy::Records).unwrap();
        assert_eq!((travels.service_accounts, travels.secrets), (vec![account], vec![]));
    }

    #[test]
    fn says_nothing_of_others() {
        let access = verdict(&[a(&["work"])], "shop", false, Policy::Records);
        assert!(!access.is_given());
        let says = access.message("shop");
        assert!(says.contains("namespace shop") && says.contains("only another namespace"), "{says}");
        assert!(!says.contains("work") && !says.contains("pull\""), "{says}");
        assert!(Access::Unproven { nodes: 1, namespaces: 0 }.message("shop").contains("name nobody"));
    }

    #[test]
    fn who_is_named_for_the_repository_travels_along() {
        let to = |records: &[Pulled], image: &str| {
            travelling(records, "shop", image, Policy::Records).map(|r| {
                assert!(!r.every_pod);
                let namespaces: Vec<String> = r.secrets.into_iter().map(|secret| secret.namespace).collect();
                (r.repository, namespaces.join(","))
            })
        };
        let is = |repository: &str, who: &str| Some((repository.to_owned(), who.to_owned()));
        assert_eq!(to(&[], "r.test/a:1"), None);
        assert_eq!(to(&[a(&["*"])], "r.test/a:1"), None);
        assert_eq!(to(&[a(&["shop"])], "r.test/a:1"), is("r.test/a", "shop"));
        assert_eq!(to(&[a(&["shop"]), a(&["work", "shop"])], "r.test/a:1"), is("r.test/a", "shop,work"));
        assert_eq!(
            to(&[a(&["shop"]), a(&["*"])], "r.test/a:1"),
            is("r.test/a", "shop"),
            "the strictest counts"
        );
        assert_eq!(to(&[both(&["work"], &["shop"])], "r.test/a:1"), is("r.test/a", "shop,work"));
        assert_eq!(
            to(&[both(&["shop"], &["work"])], "r.test/a:1"),
            is("r.test/a", "shop"),
            "of b's, nobody else"
        );
        assert_eq!(to(&[a(&["shop", "work"])], "r.test/c:1"), is("r.test/c", "shop"), "re-keyed");
        assert_eq!(to(&[Pulled::default()], "r.test/a:1"), is("r.test/a", ""), "names nobody");
        assert_eq!(travelling(&[a(&["shop"])], "shop", "r.test/a:1", Policy::Any), None);
    }

    #[test]
    fn a_repository_is_told_as_the_pod_writes_it() {
        let library = Pulled::from_wire(&record("nginx", &["work"]));
        let digest = tote_image::Digest::sha256(b"x");
        for (image, expected) in [
            ("nginx:1.29", "nginx"),
            ("nginx", "nginx"),
            (&*format!("nginx:1@{digest}"), "nginx"),
            (&*format!("docker.io/library/nginx@{digest}"), "docker.io/library/nginx"),
        ] {
            let travels = travelling(std::slice::from_ref(&library), "shop", image, Policy::Records).unwrap();
            assert_eq!((&*travels.repository, travels.secrets.len()), (expected, 1), "{image}");
        }
        assert_eq!(written("10.0.0.1:5000/shop/web"), "10.0.0.1:5000/shop/web");
        assert_eq!(written("10.0.0.1:5000/shop/web:v1"), "10.0.0.1:5000/shop/web");
    }
}
