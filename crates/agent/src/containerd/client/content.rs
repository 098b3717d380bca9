//! The content store: what is there, reading it, labels, unfinished ingests.

use containerd_client::services::v1 as api;
use futures::StreamExt;
use futures::stream;
use tote_image::Digest;

use super::Client;
use super::call::{error, request, unary};
use crate::containerd::{Blob, ByteStream, Error, Labels};

/// The prefix of the references of the agent's own ingests: kubelet's pulls of the same blobs have others.
const INGEST_PREFIX: &str = "tote-";

pub(super) fn ingest_ref(digest: &Digest) -> String {
    format!("{INGEST_PREFIX}{digest}")
}

pub(super) async fn info(client: &Client, digest: &Digest) -> Result<Option<Blob>, Error> {
    let message = api::InfoRequest { digest: digest.to_string() };
    let info = match unary(client.content().info(request(message))).await {
        Ok(found) => found.info,
        Err(Error::NotFound(_)) => None,
        Err(error) => return Err(error),
    };
    Ok(info.map(|info| Blob {
        size: u64::try_from(info.size).unwrap_or_default(),
        labels: info.labels.into_iter().collect(),
    }))
}

pub(super) async fn list(client: &Client) -> Result<Vec<(Digest, u64)>, Error> {
    let message = api::ListContentRequest { filters: Vec::new() };
    let mut batches = unary(client.content().list(request(message))).await?;
    let mut blobs = Vec::new();
    while let Some(batch) = batches.message().await.map_err(|status| error(&status))? {
        let infos = batch.info.into_iter();
        blobs.extend(
            infos.filter_map(|info| Some((info.digest.parse().ok()?, u64::try_from(info.size).ok()?))),
        );
    }
    Ok(blobs)
}

pub(super) async fn read(
    client: &Client,
    digest: &Digest,
    offset: u64,
    length: u64,
) -> Result<ByteStream, Error> {
    if length == 0 {
        // A size of 0 would mean to the end.
        return Ok(stream::empty().boxed());
    }
    let message = api::ReadContentRequest {
        digest: digest.to_string(),
        offset: i64::try_from(offset).unwrap_or(i64::MAX),
        size: i64::try_from(length).unwrap_or(i64::MAX),
    };
    let messages = unary(client.content().read(request(message))).await?;
    Ok(messages
        .map(|message| message.map(|message| message.data.into()).map_err(|status| error(&status)))
        .boxed())
}

pub(super) async fn ingests(client: &Client) -> Result<Vec<Digest>, Error> {
    let message = api::ListStatusesRequest { filters: vec![format!("ref~=\"^{INGEST_PREFIX}\"")] };
    let listed = unary(client.content().list_statuses(request(message))).await?;
    let ours = listed.statuses.into_iter();
    Ok(ours.filter_map(|status| status.r#ref.strip_prefix(INGEST_PREFIX)?.parse().ok()).collect())
}

pub(super) async fn abort(client: &Client, digest: &Digest) -> Result<(), Error> {
    let message = api::AbortRequest { r#ref: ingest_ref(digest) };
    match unary(client.content().abort(request(message))).await {
        Ok(()) | Err(Error::NotFound(_)) => Ok(()),
        Err(error) => Err(error),
    }
}

pub(super) async fn label(client: &Client, digest: &Digest, labels: &Labels) -> Result<(), Error> {
    if labels.is_empty() {
        return Ok(());
    }
    let info = api::Info {
        digest: digest.to_string(),
        labels: labels.clone().into_iter().collect(),
        ..api::Info::default()
    };
    let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
    let update_mask = Some(prost_types::FieldMask { paths });
    let message = api::UpdateRequest { info: Some(info), update_mask };
    unary(client.content().update(request(message))).await.map(drop)
}
