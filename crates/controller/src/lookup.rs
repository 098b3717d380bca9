//! One look-up for a pod: its pull secrets, if they may be read, and the registry. An effect; decides nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};
use thiserror::Error;
use tokio::time::timeout;

use crate::decide::{LookupAnswer, Question};
use crate::metrics::Metrics;
use crate::registry::{Format, Keyring, Lookup, LookupError, SecretError};

/// How long the API server may take for a Secret.
const SECRET: Duration = Duration::from_secs(5);

/// The most pull secrets of a pod that are read.
const SECRETS: usize = 8;

/// What look-ups are done with.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// Registries, and how they are asked.
    pub lookup: Arc<Lookup>,
    /// Whether pods' pull secrets may be read and used.
    pub pull_secrets: bool,
}

/// Why a pull secret cannot be used.
#[derive(Debug, Error)]
enum PullSecretError {
    #[error(transparent)]
    Kube(#[from] kube::Error),
    #[error("the API server did not answer within {SECRET:?}")]
    Deadline,
    #[error("its type {0:?} is not that of a pull secret")]
    Type(String),
    #[error(transparent)]
    Secret(#[from] SecretError),
}

impl Upstream {
    /// Asks; what comes of it is counted.
    pub async fn ask(&self, client: Client, question: &Question, metrics: &Metrics) -> LookupAnswer {
        let mut keyring = Keyring::default();
        let mut unusable = Vec::new();
        if self.pull_secrets && self.lookup.is_listed(&question.reference) {
            let api: Api<Secret> = Api::namespaced(client, &question.namespace);
            for name in question.pull_secrets.iter().take(SECRETS) {
                if let Err(error) = add(&mut keyring, &api, name).await {
                    tracing::warn!(namespace = %question.namespace, secret = %name, %error, "cannot use a pull secret");
                    unusable.push(format!("pull secret {name}: {error}"));
                }
            }
        }
        let began = Instant::now();
        let answer = self.lookup.digest(&question.reference, &keyring.find(&question.reference)).await;
        let result = answer.as_ref().map_or_else(LookupError::label, |_| "found");
        metrics.looked_up(result, began.elapsed());
        tracing::info!(namespace = %question.namespace, image = %question.reference, result, ?answer, "registry asked");
        match answer {
            Ok(digest) => LookupAnswer::Is(digest),
            Err(error @ LookupError::NotFound(_)) => LookupAnswer::Absent(error.to_string()),
            Err(error) => {
                unusable.insert(0, error.to_string());
                LookupAnswer::Failed(unusable.join("; "))
            }
        }
    }
}

/// Takes in a Secret. One that is not there is passed over, as kubelet does.
async fn add(keyring: &mut Keyring, api: &Api<Secret>, name: &str) -> Result<(), PullSecretError> {
    let secret = timeout(SECRET, api.get_opt(name)).await.map_err(|_| PullSecretError::Deadline)??;
    let Some(secret) = secret else { return Ok(()) };
    let type_ = secret.type_.unwrap_or_default();
    let (format, key) = Format::of_type(&type_).ok_or(PullSecretError::Type(type_))?;
    let data = secret.data.unwrap_or_default().remove(key).unwrap_or_default();
    Ok(keyring.add(format, &data.0)?)
}
