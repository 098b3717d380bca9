//! Keeps the authority in the cluster: a Secret with its key, a `ConfigMap` with what agents are to trust, both owned by
//! the Deployment so that they go with it. And keeps the controller's own certificate fresh.
//!
//! It looks every few seconds instead of watching: three small objects, one leader, and no right to list Secrets.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::timeout;
use tote_api::names;
use tote_rpc::identity::{Authorities, Authority, AuthorityError, Identity, InstallError, Role};

use super::{Ca, Origin, PROMOTED_AT, ROTATE, STAGED_AT, Step, Stored, StoredError};
use crate::http::Health;

/// How often it looks.
const LOOK: Duration = Duration::from_secs(3);

/// How long one look may take.
const DEADLINE: Duration = Duration::from_secs(20);

/// The first step of replacing an authority, as metrics name it.
const STAGED: &str = "staged";

/// Key of the `ConfigMap`'s data.
const BUNDLE: &str = "ca.crt";

/// Names of the objects, all in the controller's namespace.
#[derive(Clone, Debug)]
pub struct Names {
    /// The controller's namespace.
    pub namespace: String,
    /// The Secret and the `ConfigMap` that are kept.
    pub kept: String,
    /// A Secret with somebody else's authority (`kubernetes.io/tls`), to be followed instead of making one.
    pub given: Option<String>,
    /// The controller's Deployment.
    pub deployment: String,
}

/// Who signs and who is trusted, from some moment on.
#[derive(Debug)]
pub struct Standing {
    /// Signs.
    pub signer: Arc<Ca>,
    /// Counts the changes of those who are trusted.
    pub trusted: u64,
    /// Counts the certificates of the controller itself: connections made with an earlier one will end.
    pub own: u64,
}

impl Standing {
    /// The authority that signs.
    pub fn authority(&self) -> &Authority {
        &self.signer.signer
    }

    /// Those to be trusted.
    pub fn bundle(&self) -> Authorities {
        self.signer.bundle()
    }
}

#[derive(Debug, Error)]
enum KeepError {
    #[error("Secret {name}: {source}; mend it, or delete it to have another authority made")]
    Stored { name: String, source: StoredError },
    #[error("{0}: {1}")]
    Api(String, kube::Error),
    #[error("there is no Secret {0}, which is to hold the certificate authority")]
    NotGiven(String),
    #[error("making an authority: {0}")]
    Make(#[from] AuthorityError),
    #[error("the controller's own certificate: {0}")]
    Own(#[from] InstallError),
    #[error("there is no Deployment {0} that would own the certificate authority (--deployment-name)")]
    NoDeployment(String),
    #[error("the API server does not answer")]
    Late,
}

/// Keeps the authority for as long as this controller leads.
pub struct Keeper {
    client: Client,
    names: Names,
    identity: Arc<Identity>,
    life: Duration,
    health: Arc<Health>,
    standing: watch::Sender<Option<Arc<Standing>>>,
}

impl Keeper {
    /// Certificates that it signs for the controller last for `life`.
    pub fn new(
        client: Client,
        names: Names,
        identity: Arc<Identity>,
        life: Duration,
        health: Arc<Health>,
    ) -> Self {
        Self { client, names, identity, life, health, standing: watch::Sender::new(None) }
    }

    /// What stands now, and later; nothing until it has been written.
    pub fn standing(&self) -> watch::Receiver<Option<Arc<Standing>>> {
        self.standing.subscribe()
    }

    /// A fresh certificate for the controller, by the authority that stands, if it is time.
    fn renew_own(&self) -> Result<(), KeepError> {
        let Some(before) = self.standing.borrow().clone() else { return Ok(()) };
        let now = SystemTime::now();
        if self.identity.certified().borrow().as_ref().is_some_and(|own| now < own.renew_at()) {
            return Ok(());
        }
        self.certify(before.authority(), now)?;
        let Standing { signer, trusted, own } = &*before;
        let standing = Standing { signer: signer.clone(), trusted: *trusted, own: own + 1 };
        self.standing.send_replace(Some(Arc::new(standing)));
        Ok(())
    }

    fn certify(&self, authority: &Authority, now: SystemTime) -> Result<(), KeepError> {
        let certificate =
            authority.sign(&Role::Controller, None, self.identity.public_key(), now, self.life)?;
        Ok(self.identity.install(certificate, &Role::Controller)?)
    }

    /// Runs until dropped.
    pub async fn run(self) {
        loop {
            let looked = timeout(DEADLINE, self.look()).await;
            match looked.map_err(|_| KeepError::Late).flatten() {
                Ok(()) => self.health.set_authority(None),
                Err(error) => {
                    tracing::warn!(%error, "certificate authority");
                    self.health.set_authority(Some(error.to_string()));
                    // What stands goes on standing, and the controller's own certificate with it.
                    if let Err(error) = self.renew_own() {
                        tracing::warn!(%error, "certificate authority");
                    }
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn look(&self) -> Result<(), KeepError> {
        let owned = self.metadata().await?;
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.names.namespace);
        let what = || format!("Secret {}", self.names.kept);
        let found = secrets.get_opt(&self.names.kept).await;
        let Some(secret) = found.map_err(|error| KeepError::Api(what(), error))? else {
            let ca = self.first().await?;
            let metadata = ObjectMeta { name: Some(self.names.kept.clone()), ..owned.clone() };
            let secret = filled(Secret { metadata, ..Secret::default() }, ca);
            tracing::info!(secret = self.names.kept, "keeping the certificate authority");
            let made = secrets.create(&parameters(), &secret).await;
            made.map_err(|error| KeepError::Api(what(), error))?;
            return self.settle(&secret, &owned).await.map(drop);
        };
        // What stands is kept in order first: nothing that is wrong with what comes next may stop that.
        let is_news = self.settle(&secret, &owned).await?;
        let next = self.next(&secret, is_news).await?;
        if next.is_none() && secret.metadata.owner_references == owned.owner_references {
            return Ok(());
        }
        let contents = next.as_ref().map_or_else(|| stored(&secret), |(_, ca)| ca.stored());
        let mut changed = filled(secret, contents);
        changed.metadata.owner_references.clone_from(&owned.owner_references);
        if matches!(next, Some((STAGED, _))) {
            // What was asked for is begun.
            changed.metadata.annotations.get_or_insert_default().remove(ROTATE);
        }
        // The resourceVersion goes along: what somebody else wrote meanwhile is not lost.
        let written = secrets.replace(&self.names.kept, &parameters(), &changed).await;
        let written = written.map_err(|error| KeepError::Api(what(), error))?;
        if let Some((step, ca)) = &next {
            let ends = Timestamp::try_from(ca.signer.not_after()).unwrap_or(Timestamp::MAX);
            tracing::info!(step, signer_ends = %ends, "certificate authority changes");
            self.health.metrics.authority_changed(step);
        }
        self.settle(&written, &owned).await.map(drop)
    }

    /// The first that is stored: the one that stands, if its Secret was deleted by hand; somebody else's; or a new one.
    async fn first(&self) -> Result<Stored, KeepError> {
        if let Some(standing) = &*self.standing.borrow() {
            return Ok(standing.signer.stored());
        }
        Ok(match self.given().await? {
            Some(given) => Ca::new(given.given().map_err(|source| self.of_given(source))?).stored(),
            None => Ca::new(Ca::make(SystemTime::now())?).stored(),
        })
    }

    /// The step that is due, if one is. What has been published only now is news: nobody signs by it yet.
    async fn next(&self, secret: &Secret, is_news: bool) -> Result<Option<(&'static str, Ca)>, KeepError> {
        let (ca, now) = (self.read(secret)?, Timestamp::now());
        let asked = secret.metadata.annotations.as_ref().is_some_and(|all| all.contains_key(ROTATE));
        let given = self.given().await?;
        let origin = given.as_ref().map_or(Origin::Own { asked }, Origin::Given);
        Ok(match ca.due(&origin, now).map_err(|source| self.of_given(source))? {
            Step::Rest => None,
            Step::Make => Some((STAGED, ca.stage(Ca::make(now.into())?, now))),
            Step::Take(authority) => Some((STAGED, ca.stage(*authority, now))),
            Step::Promote if is_news => Some((STAGED, ca.stage_again(now))),
            Step::Promote => Some(("promoted", ca.promote(now))),
            Step::Retire => Some(("retired", ca.retire())),
        })
    }

    /// What is stored holds from now on: it is published, and the controller has a certificate by it. Tells whether it had
    /// to be published.
    async fn settle(&self, secret: &Secret, owned: &ObjectMeta) -> Result<bool, KeepError> {
        let ca = self.read(secret)?;
        let bundle = ca.bundle();
        let is_news = self.publish(&bundle, owned).await?;
        let before = self.standing.borrow().clone();
        let is_changed = before.as_ref().is_none_or(|before| before.bundle() != bundle);
        if is_changed {
            self.identity.trust(&bundle);
        }
        let now = SystemTime::now();
        let certified = self.identity.certified().borrow().clone();
        let is_fresh = certified.is_some_and(|own| now < own.renew_at())
            && before
                .as_ref()
                .is_some_and(|before| before.authority().certificate() == ca.signer.certificate());
        if !is_fresh {
            self.certify(&ca.signer, now)?;
        }
        let ends = ca.signer.not_after().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.health.metrics.authority_ends(ends);
        if is_changed || !is_fresh {
            let count = |of: fn(&Standing) -> u64, more: bool| {
                before.as_ref().map_or(0, |before| of(before)) + u64::from(more)
            };
            let (trusted, own) = (count(|s| s.trusted, is_changed), count(|s| s.own, !is_fresh));
            self.standing.send_replace(Some(Arc::new(Standing { signer: Arc::new(ca), trusted, own })));
        }
        Ok(is_news)
    }

    fn read(&self, secret: &Secret) -> Result<Ca, KeepError> {
        Ca::read(&stored(secret))
            .map_err(|source| KeepError::Stored { name: self.names.kept.clone(), source })
    }

    fn of_given(&self, source: StoredError) -> KeepError {
        KeepError::Stored { name: self.names.given.clone().unwrap_or_default(), source }
    }

    async fn given(&self) -> Result<Option<Stored>, KeepError> {
        let Some(name) = &self.names.given else { return Ok(None) };
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.names.namespace);
        let found = secrets.get_opt(name).await;
        let found = found.map_err(|error| KeepError::Api(format!("Secret {name}"), error))?;
        Ok(Some(stored(&found.ok_or_else(|| KeepError::NotGiven(name.clone()))?)))
    }

    /// Writes the bundle that agents mount. Tells whether there was another, or none.
    async fn publish(&self, bundle: &Authorities, owned: &ObjectMeta) -> Result<bool, KeepError> {
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.names.namespace);
        let failed = |error| KeepError::Api(format!("ConfigMap {}", self.names.kept), error);
        let name = &self.names.kept;
        let data = Some(BTreeMap::from([(BUNDLE.to_owned(), bundle.pem())]));
        match maps.get_opt(name).await.map_err(failed)? {
            None => {
                let metadata = ObjectMeta { name: Some(name.clone()), ..owned.clone() };
                let map = ConfigMap { metadata, data, ..ConfigMap::default() };
                maps.create(&parameters(), &map).await.map_err(failed)?;
            }
            Some(map) if map.data == data && map.metadata.owner_references == owned.owner_references => {
                return Ok(false);
            }
            Some(mut map) => {
                map.data = data;
                map.metadata.owner_references.clone_from(&owned.owner_references);
                maps.replace(name, &parameters(), &map).await.map_err(failed)?;
            }
        }
        Ok(true)
    }

    /// What all that is kept has: labels, and the Deployment as its owner.
    async fn metadata(&self) -> Result<ObjectMeta, KeepError> {
        let deployments: Api<Deployment> = Api::namespaced(self.client.clone(), &self.names.namespace);
        let name = &self.names.deployment;
        let found = deployments.get_metadata_opt(name).await;
        let found = found.map_err(|error| KeepError::Api(format!("Deployment {name}"), error))?;
        // What is made while the release is being uninstalled would have no owner, and stay for good.
        let found = found.filter(|deployment| deployment.metadata.deletion_timestamp.is_none());
        let gone = || KeepError::NoDeployment(name.clone());
        let owner = OwnerReference {
            api_version: "apps/v1".to_owned(),
            kind: "Deployment".to_owned(),
            name: name.clone(),
            uid: found.and_then(|deployment| deployment.metadata.uid).ok_or_else(gone)?,
            ..OwnerReference::default()
        };
        let labels = [(names::MANAGED_BY.to_owned(), names::MANAGER.to_owned())];
        Ok(ObjectMeta {
            labels: Some(labels.into()),
            owner_references: Some(vec![owner]),
            ..ObjectMeta::default()
        })
    }
}

fn parameters() -> PostParams {
    PostParams { field_manager: Some(names::MANAGER.to_owned()), ..PostParams::default() }
}

fn stored(secret: &Secret) -> Stored {
    let text = |bytes: &ByteString| String::from_utf8_lossy(&bytes.0).into_owned();
    let data = secret.data.iter().flatten().map(|(key, bytes)| (key.clone(), text(bytes))).collect();
    let annotations = secret.metadata.annotations.clone().unwrap_or_default();
    Stored { data, annotations }
}

/// The Secret with its contents replaced; what it bears beside stays.
fn filled(secret: Secret, stored: Stored) -> Secret {
    let mut annotations = secret.metadata.annotations.unwrap_or_default();
    for ours in [STAGED_AT, PROMOTED_AT] {
        annotations.remove(ours);
    }
    annotations.extend(stored.annotations);
    let data = stored.data.into_iter().map(|(key, text)| (key, ByteString(text.into_bytes())));
    Secret {
        metadata: ObjectMeta { annotations: Some(annotations), ..secret.metadata },
        data: Some(data.collect()),
        ..secret
    }
}
