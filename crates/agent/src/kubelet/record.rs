//! One record of kubelet's, `kubelet.config.k8s.io` `ImagePulledRecord` (KEP-2535): read as strictly as kubelet reads it,
//! and what may be added to it. Pure.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tote_image::{Digest, Reference};
use tote_rpc::v1;

const KIND: &str = "ImagePulledRecord";
const INTENT: &str = "ImagePullIntent";
const V1BETA1: &str = "kubelet.config.k8s.io/v1beta1";
const VERSIONS: [&str; 2] = [V1BETA1, "kubelet.config.k8s.io/v1alpha1"];

/// The most principals of a kind that are taken for one repository. Kubelet itself adds none beyond 100.
const MAX_PRINCIPALS: usize = 256;

/// The most repositories of a record that are told.
const MAX_REPOSITORIES: usize = 64;

/// The longest name, UID or hash.
const MAX_TEXT: usize = 512;

/// A record, as its file has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Record {
    kind: String,
    api_version: String,
    last_updated_time: Option<Timestamp>,
    image_ref: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    credential_mapping: BTreeMap<String, Credentials>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Credentials {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    kubernetes_secrets: Vec<Secret>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    kubernetes_service_accounts: Vec<ServiceAccount>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    node_pods_accessible: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Secret {
    uid: String,
    namespace: String,
    name: String,
    credential_hash: String,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ServiceAccount {
    uid: String,
    namespace: String,
    name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Intent {
    kind: String,
    api_version: String,
    image: String,
}

/// Why a file is no record.
#[derive(Debug, Error)]
pub(super) enum Malformed {
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error("{api_version} {kind} is not known")]
    Kind { api_version: String, kind: String },
}

/// Who alone may have an image that is imported: what is to stand in its record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restriction {
    /// As pods may write it.
    repositories: Vec<String>,
    secrets: Vec<Secret>,
    accounts: Vec<ServiceAccount>,
}

/// The name of the file about an image, or about a pull of one.
pub(super) fn file_name(about: &str) -> String {
    format!("sha256-{}", Digest::sha256(about.as_bytes()).hex())
}

fn known(kind: &str, api_version: &str, expected: &str) -> Result<(), Malformed> {
    if kind == expected && VERSIONS.contains(&api_version) {
        return Ok(());
    }
    Err(Malformed::Kind { api_version: api_version.to_owned(), kind: kind.to_owned() })
}

/// The image that an `ImagePullIntent` says is being pulled, as the pod writes it.
pub(super) fn parse_intent(bytes: &[u8]) -> Result<String, Malformed> {
    let intent: Intent = serde_json::from_slice(bytes)?;
    known(&intent.kind, &intent.api_version, INTENT)?;
    Ok(intent.image)
}

impl Record {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let record: Self = serde_json::from_slice(bytes)?;
        known(&record.kind, &record.api_version, KIND)?;
        Ok(record)
    }

    /// The record as kubelet writes one: compact, with a line feed.
    pub(super) fn to_bytes(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut bytes = serde_json::to_vec(self)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// What CRI gives as the image's ID; for containerd the config's digest.
    pub(super) fn image_id(&self) -> &str {
        &self.image_ref
    }

    fn of(image_id: &Digest) -> Self {
        Self {
            kind: KIND.to_owned(),
            api_version: V1BETA1.to_owned(),
            last_updated_time: None,
            image_ref: image_id.to_string(),
            credential_mapping: BTreeMap::new(),
        }
    }

    /// The record as it is told. What is too much is left out, of what lets every pod have it first: that can only
    /// narrow it.
    pub(super) fn to_wire(&self) -> v1::PulledRecord {
        let mut repositories: Vec<v1::PulledRepository> =
            self.credential_mapping.iter().map(|(repository, who)| who.to_wire(repository)).collect();
        repositories.sort_by_key(|repository| repository.every_pod);
        repositories.truncate(MAX_REPOSITORIES);
        v1::PulledRecord { repositories }
    }

    /// The record of an image once `restriction` is in it: `None` if it is already. Who stands in it stays, and where
    /// kubelet lets every pod have it that stays too.
    pub(super) fn with(
        standing: Option<&Self>,
        image_id: &Digest,
        restriction: &Restriction,
        now: Timestamp,
    ) -> Option<Self> {
        let mut record = standing.cloned().unwrap_or_else(|| Self::of(image_id));
        for repository in &restriction.repositories {
            let is_new = !record.credential_mapping.contains_key(repository);
            if is_new && restriction.names_nobody() {
                continue;
            }
            let who = record.credential_mapping.entry(repository.clone()).or_default();
            if !who.node_pods_accessible {
                who.add(restriction);
            }
        }
        if standing == Some(&record) {
            return None;
        }
        record.last_updated_time = Some(Timestamp::from_second(now.as_second()).unwrap_or(now));
        Some(record)
    }
}

impl Credentials {
    fn to_wire(&self, repository: &str) -> v1::PulledRepository {
        let secrets = self.kubernetes_secrets.iter().take(MAX_PRINCIPALS);
        let accounts = self.kubernetes_service_accounts.iter().take(MAX_PRINCIPALS);
        v1::PulledRepository {
            repository: repository.to_owned(),
            every_pod: self.node_pods_accessible,
            secrets: secrets
                .map(|s| v1::PullSecret {
                    uid: s.uid.clone(),
                    namespace: s.namespace.clone(),
                    name: s.name.clone(),
                    credential_hash: s.credential_hash.clone(),
                })
                .collect(),
            service_accounts: accounts
                .map(|a| v1::PullServiceAccount {
                    uid: a.uid.clone(),
                    namespace: a.namespace.clone(),
                    name: a.name.clone(),
                })
                .collect(),
        }
    }

    /// One that stands under the same coordinates keeps its hash: this node's kubelet knows better.
    fn add(&mut self, restriction: &Restriction) {
        let at = |s: &Secret| (s.namespace.clone(), s.name.clone(), s.uid.clone());
        for secret in &restriction.secrets {
            if !self.kubernetes_secrets.iter().any(|known| at(known) == at(secret)) {
                self.kubernetes_secrets.push(secret.clone());
            }
        }
        for account in &restriction.accounts {
            if !self.kubernetes_service_accounts.contains(account) {
                self.kubernetes_service_accounts.push(account.clone());
            }
        }
        // Kubelet's order.
        self.kubernetes_secrets.sort_by_key(at);
        let key = |a: &ServiceAccount| (a.namespace.clone(), a.name.clone(), a.uid.clone());
        self.kubernetes_service_accounts.sort_by_key(key);
    }
}

impl Restriction {
    /// Takes the controller's word for who may have `reference`; the error says which field is wrong and how.
    pub fn parse(
        wire: v1::PulledRepository,
        reference: &Reference,
    ) -> Result<Self, (&'static str, String, String)> {
        let repository = wire.repository;
        let means = repository.parse::<Reference>().ok();
        if means.is_none_or(|means| means.repository() != reference.repository())
            || repository.contains('@')
            || repository.rsplit('/').next().is_some_and(|last| last.contains(':'))
            || repository.len() > MAX_TEXT
        {
            let reason = format!("is not how a pod may write {}", reference.repository());
            return Err(("pulled.repository", repository, reason));
        }
        if wire.every_pod {
            let reason = "a record that every pod may have an image is not imported".to_owned();
            return Err(("pulled.every_pod", "true".to_owned(), reason));
        }
        let named = [wire.secrets.len(), wire.service_accounts.len()];
        if let Some(count) = named.into_iter().find(|count| *count > MAX_PRINCIPALS) {
            return Err(("pulled", count.to_string(), format!("at most {MAX_PRINCIPALS} are taken")));
        }
        let secrets = wire.secrets.into_iter().map(|s| Secret {
            uid: s.uid,
            namespace: s.namespace,
            name: s.name,
            credential_hash: s.credential_hash,
        });
        let accounts = wire.service_accounts.into_iter();
        let accounts = accounts.map(|a| ServiceAccount { uid: a.uid, namespace: a.namespace, name: a.name });
        let mut repositories = vec![repository, reference.repository().to_owned()];
        repositories.dedup();
        let restriction = Self { repositories, secrets: secrets.collect(), accounts: accounts.collect() };
        match restriction.unfit() {
            Some(text) => {
                let reason =
                    format!("UIDs, namespaces and names must have 1 to {MAX_TEXT} bytes, hashes no more");
                Err(("pulled", text.to_owned(), reason))
            }
            None => Ok(restriction),
        }
    }

    /// A text that no principal has.
    fn unfit(&self) -> Option<&str> {
        let names = self.secrets.iter().flat_map(|s| [&s.uid, &s.namespace, &s.name]);
        let mut names = names.chain(self.accounts.iter().flat_map(|a| [&a.uid, &a.namespace, &a.name]));
        let mut hashes = self.secrets.iter().map(|s| &s.credential_hash);
        let bad = names.find(|name| name.is_empty() || name.len() > MAX_TEXT);
        bad.or_else(|| hashes.find(|hash| hash.len() > MAX_TEXT)).map(String::as_str)
    }

    fn names_nobody(&self) -> bool {
        self.secrets.is_empty() && self.accounts.is_empty()
    }
}
