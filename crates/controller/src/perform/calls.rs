//! Calls of the API server, each with its deadline.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Api;
use kube::api::{DeleteParams, ObjectMeta, Patch, PatchParams, PostParams, Preconditions};
use serde_json::{Value, json};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tote_api::{SalvageJob, SalvageJobSpec, SalvageJobStatus, names};

use crate::decide::{About, CreateAnswer, Event, NewJob, version};

/// How long one call of the API server may take.
const CALL: Duration = Duration::from_secs(10);

/// A job of detection is kept for a week after its end, and waits for an hour at most, in seconds.
const TTL: i64 = 168 * 3600;
const PENDING_DEADLINE: i64 = 3600;

/// Why a call had no effect.
#[derive(Debug, Error)]
pub(super) enum CallError {
    #[error(transparent)]
    Kube(#[from] kube::Error),
    #[error("the API server did not answer within {CALL:?}")]
    Deadline,
}

impl CallError {
    pub(super) fn is_gone(&self) -> bool {
        matches!(self, Self::Kube(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict())
    }
}

pub(super) async fn limited<T>(call: impl Future<Output = kube::Result<T>>) -> Result<T, CallError> {
    Ok(timeout(CALL, call).await.map_err(|_| CallError::Deadline)??)
}

pub(super) fn parameters() -> PatchParams {
    PatchParams { field_manager: Some(names::MANAGER.to_owned()), ..PatchParams::default() }
}

pub(super) async fn create(api: Api<SalvageJob>, new: NewJob, events: mpsc::Sender<Event>) {
    let spec = SalvageJobSpec {
        image: new.image.to_string(),
        digest: Some(new.digest.to_string()),
        node_name: new.node.to_string(),
        pending_deadline_seconds: Some(PENDING_DEADLINE),
        ttl_seconds_after_finished: Some(TTL),
        ..SalvageJobSpec::default()
    };
    let mut job = SalvageJob::new(&new.name, spec);
    let labels = [(names::MANAGED_BY.to_owned(), names::MANAGER.to_owned())];
    job.metadata =
        ObjectMeta { name: Some(new.name.clone()), labels: Some(labels.into()), ..ObjectMeta::default() };
    let parameters = PostParams { field_manager: Some(names::MANAGER.to_owned()), ..PostParams::default() };
    let answer = match limited(api.create(&parameters, &job)).await {
        Ok(made) => {
            tracing::info!(namespace = %new.namespace, job = new.name, image = %new.image, node = %new.node, "job made");
            let _ = events.send(Event::JobAnswered(Box::new(made))).await;
            CreateAnswer::Made
        }
        Err(CallError::Kube(kube::Error::Api(status))) if status.is_already_exists() => {
            match limited(api.get(&new.name)).await {
                Ok(known) => {
                    tracing::info!(namespace = %new.namespace, job = new.name, image = known.spec.image,
                        node = known.spec.node_name, "a job of this name exists");
                    let _ = events.send(Event::JobAnswered(Box::new(known))).await;
                    CreateAnswer::Taken(new.number)
                }
                Err(error) => CreateAnswer::Refused(error.to_string()),
            }
        }
        Err(error) => {
            tracing::warn!(namespace = %new.namespace, job = new.name, %error, "cannot make a job");
            CreateAnswer::Refused(error.to_string())
        }
    };
    let _ = events.send(Event::Created { base: new.base, answer }).await;
}

pub(super) async fn delete(api: Api<SalvageJob>, name: Arc<str>, uid: Arc<str>, events: mpsc::Sender<Event>) {
    let preconditions = Preconditions { uid: Some(uid.to_string()), resource_version: None };
    let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
    match limited(api.delete(&name, &parameters)).await {
        Ok(_) => tracing::info!(job = %name, "job deleted"),
        Err(error) if error.is_gone() => {}
        Err(error) => {
            tracing::warn!(job = %name, %error, "cannot delete a job");
            let _ = events.send(Event::DeleteFailed { uid }).await;
        }
    }
}

pub(super) async fn write_status(
    api: &Api<SalvageJob>,
    name: &str,
    uid: &str,
    before: &SalvageJobStatus,
    status: &SalvageJobStatus,
) -> Result<u64, CallError> {
    let patch = json!({"metadata": {"uid": uid}, "status": merge(before, status)});
    let written = limited(api.patch_status(name, &parameters(), &Patch::Merge(patch))).await?;
    Ok(version(&written.metadata))
}

/// The merge patch (RFC 7386) from one status to the other: what went is null.
fn merge(before: &SalvageJobStatus, status: &SalvageJobStatus) -> Value {
    let value = |status| serde_json::to_value(status).unwrap_or_default();
    let mut patch = value(status);
    if let (Value::Object(patch), Value::Object(before)) = (&mut patch, value(before)) {
        for field in before.keys() {
            patch.entry(field.clone()).or_insert(Value::Null);
        }
    }
    patch
}

pub(super) fn object(about: About) -> ObjectReference {
    ObjectReference {
        api_version: Some(if about.kind == "SalvageJob" { "tote.dev/v1alpha1" } else { "v1" }.to_owned()),
        kind: Some(about.kind.to_owned()),
        // Events about what is in no namespace are kept in `default`.
        namespace: (!about.namespace.is_empty()).then(|| about.namespace.to_string()),
        name: Some(about.name.to_string()),
        uid: Some(about.uid.to_string()),
        field_path: (!about.field_path.is_empty()).then_some(about.field_path),
        resource_version: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_patch_takes_away_what_went() {
        let before =
            SalvageJobStatus { digest: Some("d".into()), attempts: 2, ..SalvageJobStatus::default() };
        let after = SalvageJobStatus { attempts: 3, ..SalvageJobStatus::default() };
        assert_eq!(merge(&before, &after), json!({"digest": null, "attempts": 3}));
    }
}
