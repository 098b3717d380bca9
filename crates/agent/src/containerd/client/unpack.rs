//! Unpacking a layer: prepare a snapshot, apply the diff, commit.

use std::time::Duration;

use containerd_client::services::v1 as api;
use containerd_client::services::v1::snapshots as snap;
use tote_image::Digest;

use super::call::{request, unary, within};
use super::{Client, descriptor, leased};
use crate::containerd::Containerd;
use crate::containerd::{Error, Held, Layer};

/// How long one layer may take: 10 GiB of gzip at some 20 MiB/s.
const APPLY_DEADLINE: Duration = Duration::from_secs(600);

/// How often it is looked how much is free meanwhile.
const LOOK: Duration = Duration::from_millis(100);

/// The label by which containerd's snapshotters know what an active snapshot will become.
const SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";

pub(super) async fn is_committed(client: &Client, snapshotter: &str, chain: &Digest) -> Result<bool, Error> {
    let message = snap::StatSnapshotRequest { snapshotter: snapshotter.to_owned(), key: chain.to_string() };
    match unary(client.snapshots().stat(request(message))).await {
        Ok(found) => Ok(found.info.is_some_and(|info| info.kind == i32::from(snap::Kind::Committed))),
        Err(Error::NotFound(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

pub(super) async fn unpack(
    client: &Client,
    lease: &str,
    snapshotter: &str,
    layer: Layer<'_>,
    keep: u64,
) -> Result<(), Error> {
    let hold = || client.hold(lease, Held::Snapshot { snapshotter, chain: layer.chain });
    // Looked for again once it is held: what is seen then cannot be collected any more.
    let stays_held = || async {
        hold().await?;
        is_committed(client, snapshotter, layer.chain).await
    };
    let collected = || Error::Unavailable(format!("snapshot {} was collected meanwhile", layer.chain));
    if is_committed(client, snapshotter, layer.chain).await? && stays_held().await? {
        return Ok(());
    }
    if let Some(full) = below(client, keep).await {
        return Err(full);
    }
    let nanos = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos());
    let key = format!("extract-tote-{nanos} {}", layer.chain);
    let message = snap::PrepareSnapshotRequest {
        snapshotter: snapshotter.to_owned(),
        key: key.clone(),
        parent: layer.parent.map(ToString::to_string).unwrap_or_default(),
        labels: [(SNAPSHOT_REF.to_owned(), layer.chain.to_string())].into(),
    };
    let prepared = match unary(client.snapshots().prepare(leased(message, lease)?)).await {
        Ok(prepared) => prepared,
        // Another made it meanwhile.
        Err(Error::AlreadyExists(_)) if is_committed(client, snapshotter, layer.chain).await? => {
            return if stays_held().await? { Ok(()) } else { Err(collected()) };
        }
        Err(error) => return Err(error),
    };
    let applied = tokio::select! {
        biased;
        full = until_below(client, keep) => Err(full),
        applied = apply(client, lease, snapshotter, &layer, &key, prepared.mounts) => applied,
    };
    match applied {
        Ok(()) => Ok(()),
        Err(error) => {
            let message = snap::RemoveSnapshotRequest { snapshotter: snapshotter.to_owned(), key };
            if let Err(left) = unary(client.snapshots().remove(request(message))).await {
                tracing::debug!(%left, "an unfinished snapshot stays until its lease ends");
            }
            if !matches!(error, Error::AlreadyExists(_)) {
                return Err(error);
            }
            if stays_held().await? { Ok(()) } else { Err(collected()) }
        }
    }
}

/// Whether less than so many bytes are free; not where that is not to be seen.
async fn below(client: &Client, keep: u64) -> Option<Error> {
    let space = client.space().await.ok()??;
    let message = || format!("{} bytes are free, and {keep} are kept so", space.free);
    (space.free < keep).then(|| Error::Full(message()))
}

/// Comes back once it is so.
async fn until_below(client: &Client, keep: u64) -> Error {
    loop {
        tokio::time::sleep(LOOK).await;
        if let Some(full) = below(client, keep).await {
            return full;
        }
    }
}

async fn apply(
    client: &Client,
    lease: &str,
    snapshotter: &str,
    layer: &Layer<'_>,
    key: &str,
    mounts: Vec<containerd_client::types::Mount>,
) -> Result<(), Error> {
    let message = api::ApplyRequest {
        diff: Some(descriptor(layer.blob)),
        mounts,
        payloads: std::collections::HashMap::new(),
        sync_fs: false,
    };
    let late = || Error::Other(format!("it was not unpacked within {} s", APPLY_DEADLINE.as_secs()));
    let applied = within(APPLY_DEADLINE, late, client.diffs().apply(leased(message, lease)?)).await?;
    let applied = applied.applied.map(|applied| applied.digest).unwrap_or_default();
    if applied != layer.diff_id.as_str() {
        let (blob, diff_id) = (&layer.blob.digest, layer.diff_id);
        return Err(Error::Mismatch(format!(
            "layer {blob} unpacks to {applied}, the image's config says {diff_id}"
        )));
    }
    let message = snap::CommitSnapshotRequest {
        snapshotter: snapshotter.to_owned(),
        name: layer.chain.to_string(),
        key: key.to_owned(),
        labels: [(SNAPSHOT_REF.to_owned(), layer.chain.to_string())].into(),
    };
    unary(client.snapshots().commit(leased(message, lease)?)).await
}
