//! The objects that control pods: of each only its controller and its word on salvage.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::core::v1::ReplicationController;
use kube::api::{ObjectMeta, PartialObjectMeta};
use kube::runtime::watcher;
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use super::{Meaning, follow};
use crate::decide::{Event, Kind};
use crate::detect::says;
use crate::owners::{Owner, OwnerKind};

/// For how long nothing is decided because a kind has not been listed. A cluster may forbid it; then pods and the
/// other kinds speak for themselves.
const PATIENCE: Duration = Duration::from_secs(10);

/// Watches the metadata of one kind of object that may control pods, in all namespaces.
pub async fn owners(client: Client, kind: OwnerKind, events: mpsc::Sender<Event>) {
    match kind {
        OwnerKind::ReplicaSet => follow_kind::<ReplicaSet>(client, kind, events).await,
        OwnerKind::Deployment => follow_kind::<Deployment>(client, kind, events).await,
        OwnerKind::StatefulSet => follow_kind::<StatefulSet>(client, kind, events).await,
        OwnerKind::DaemonSet => follow_kind::<DaemonSet>(client, kind, events).await,
        OwnerKind::Job => follow_kind::<Job>(client, kind, events).await,
        OwnerKind::CronJob => follow_kind::<CronJob>(client, kind, events).await,
        OwnerKind::ReplicationController => {
            follow_kind::<ReplicationController>(client, kind, events).await;
        }
    }
}

async fn follow_kind<K>(client: Client, kind: OwnerKind, events: mpsc::Sender<Event>)
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let api: Api<PartialObjectMeta<K>> = Api::all(client);
    let config = watcher::Config::default();
    follow(api, config, Some(PATIENCE), Kind::Owners(kind), events, |object, gone| {
        let uid: Arc<str> = object.metadata.uid.as_deref()?.into();
        let owner = (!gone).then(|| owner(kind, &object.metadata));
        Some(Meaning::new(uid.clone(), Event::Owner { uid, owner }))
    })
    .await;
}

fn owner(kind: OwnerKind, metadata: &ObjectMeta) -> Owner {
    Owner {
        kind,
        controller: controller(metadata).map(Into::into),
        says: says(metadata.annotations.as_ref()),
    }
}

/// UID of the one owner that is the controller.
pub(super) fn controller(metadata: &ObjectMeta) -> Option<&str> {
    let owners = metadata.owner_references.iter().flatten();
    owners.into_iter().find(|owner| owner.controller == Some(true)).map(|owner| owner.uid.as_str())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn of_an_object_its_controller_and_its_word_are_kept() {
        let of =
            |metadata: serde_json::Value| owner(OwnerKind::Job, &serde_json::from_value(metadata).unwrap());
        let reference = |uid: &str, controller: bool| json!({"apiVersion": "batch/v1", "kind": "CronJob", "name": "c", "uid": uid, "controller": controller});
        let found = of(json!({
            "ownerReferences": [reference("one", false), reference("two", true)],
            "annotations": {"tote.dev/auto-salvage": "true"}
        }));
        let expected = Owner { kind: OwnerKind::Job, controller: Some("two".into()), says: Some(true) };
        assert_eq!(found, expected);
        let found = of(json!({"ownerReferences": [reference("one", false)]}));
        assert_eq!(found, Owner { kind: OwnerKind::Job, controller: None, says: None });
    }
}
