//! One `Import` stream: from the target's agent to events.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::Code;
use tote_rpc::AgentClient;
use tote_rpc::v1::import_event::Event as Wire;
use tote_rpc::v1::{self, Cause, Stage};

use crate::decide::{Event, TransferEvent};
use crate::fleet::{Grants, NodeName};
use crate::salvage::Progress;

/// How long an agent may take to answer a call; a stream has no such limit, its connection is pinged.
const CALL: Duration = Duration::from_secs(10);

/// Follows a transfer to its end; tells everything as events of `stream`. Its sources are told before it begins that the
/// target may read, and after its end that it may no longer.
pub async fn follow(
    client: Option<AgentClient>,
    mut request: v1::ImportRequest,
    mut grants: Grants,
    uid: Arc<str>,
    stream: u64,
    events: mpsc::Sender<Event>,
) {
    let tell = |event| {
        let (events, uid) = (events.clone(), uid.clone());
        async move { events.send(Event::Transfer { uid, stream, event }).await.is_ok() }
    };
    let Some(mut client) = client else {
        tell(TransferEvent::Lost { message: "the agent has no session".to_owned() }).await;
        return;
    };
    let refused = grants.give().await;
    let named = request.sources.len();
    request.sources.retain(|source| !refused.iter().any(|(node, _)| **node == *source.node_name));
    if request.sources.is_empty() && named > 0 {
        let reasons = refused.iter().map(|(node, reason)| format!("{node}: {reason}")).collect::<Vec<_>>();
        tell(TransferEvent::Lost { message: format!("no source lets it read: {}", reasons.join("; ")) })
            .await;
        return;
    }
    let ended = tokio::select! {
        ended = attached(&mut client, request, &tell) => ended,
        () = grants.keep() => return,
    };
    // A transfer that goes on without this stream is attached to again.
    if ended {
        grants.revoke().await;
    }
}

/// Tells what a transfer does; returns whether it has ended.
async fn attached<T, R>(client: &mut AgentClient, request: v1::ImportRequest, tell: &T) -> bool
where
    T: Fn(TransferEvent) -> R,
    R: Future<Output = bool>,
{
    let mut incoming = match timeout(CALL, client.import(request)).await {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) => {
            let event = refused(&status);
            let ended = matches!(event, TransferEvent::Failed { .. });
            tell(event).await;
            return ended;
        }
        Err(_) => {
            tell(TransferEvent::Lost { message: format!("no answer within {CALL:?}") }).await;
            return false;
        }
    };
    loop {
        let event = match incoming.message().await {
            Ok(Some(message)) => match message.event {
                Some(event) => event_of(event),
                None => continue,
            },
            Ok(None) => TransferEvent::Lost { message: "the agent ended the stream".to_owned() },
            Err(status) => refused(&status),
        };
        let goes_on = matches!(event, TransferEvent::Progress(_));
        let ended = matches!(event, TransferEvent::Done(_) | TransferEvent::Failed { .. });
        if !tell(event).await || !goes_on {
            return ended;
        }
    }
}

/// Ends a transfer: asks again while the agent has no session or does not answer, for as long as the transfer can
/// live without anybody attached to it (two minutes).
pub async fn cancel(client: impl Fn() -> Option<AgentClient>, request: v1::CancelRequest) {
    for pause in [1, 1, 2, 4, 8, 16, 32, 64] {
        if let Some(mut client) = client() {
            match timeout(CALL, client.cancel(request.clone())).await {
                Ok(Ok(_)) => return,
                Ok(Err(status)) if status.code() == Code::FailedPrecondition => return,
                Ok(Err(status)) => {
                    tracing::warn!(transfer = request.transfer_id, error = status.message(), "cannot cancel");
                }
                Err(_) => tracing::warn!(transfer = request.transfer_id, "cannot cancel: no answer"),
            }
        }
        tokio::time::sleep(Duration::from_secs(pause)).await;
    }
    tracing::warn!(transfer = request.transfer_id, "not cancelled: the agent could not be asked");
}

/// Has an agent remove the records of an image that lacks blobs. What comes of it the node's inventory tells.
pub async fn remove(client: Option<AgentClient>, node: NodeName, request: v1::RemoveRequest) {
    let digest = request.digest.clone();
    let Some(mut client) = client else {
        tracing::warn!(%node, digest, "cannot remove an image: the agent has no session");
        return;
    };
    match timeout(CALL, client.remove(request)).await {
        Ok(Ok(answer)) => {
            tracing::info!(%node, digest, names = ?answer.into_inner().names, "records removed");
        }
        Ok(Err(status)) => {
            tracing::warn!(%node, digest, error = status.message(), "cannot remove an image");
        }
        Err(_) => tracing::warn!(%node, digest, "cannot remove an image: no answer"),
    }
}

fn refused(status: &tonic::Status) -> TransferEvent {
    let message = format!("{}: {}", status.code().description(), status.message());
    match status.code() {
        Code::InvalidArgument | Code::Unimplemented => TransferEvent::Failed {
            reason: "RefusedByAgent",
            message,
            retryable: false,
            lying_nodes: Vec::new(),
        },
        _ => TransferEvent::Lost { message },
    }
}

fn event_of(event: Wire) -> TransferEvent {
    match event {
        Wire::Progress(p) => TransferEvent::Progress(Progress {
            is_unpacking: p.stage() == Stage::Unpacking,
            total: p.total_bytes,
            transferred: p.transferred_bytes,
            reused: p.reused_bytes,
            source_nodes: p.source_nodes,
            lying_nodes: Vec::new(),
        }),
        Wire::Done(d) => TransferEvent::Done(Progress {
            total: d.total_bytes,
            transferred: d.transferred_bytes,
            reused: d.reused_bytes,
            source_nodes: d.source_nodes,
            lying_nodes: d.lying_nodes,
            is_unpacking: false,
        }),
        // Ended from outside, and wanted again since: that is no failed attempt.
        Wire::Failed(f) if f.cause() == Cause::Cancelled => TransferEvent::Lost { message: f.message },
        Wire::Failed(f) => TransferEvent::Failed {
            reason: reason_of(f.cause()),
            message: f.message,
            retryable: f.retryable,
            lying_nodes: f.lying_nodes,
        },
    }
}

fn reason_of(cause: Cause) -> &'static str {
    match cause {
        Cause::Unspecified => "ImportFailed",
        Cause::NoSource => "NoSource",
        Cause::DigestMismatch => "DigestMismatch",
        Cause::Platform => "OtherPlatformOnly",
        Cause::NameConflict => "NameConflict",
        Cause::DiskFull => "DiskFull",
        Cause::Unpack => "UnpackFailed",
        Cause::NotVisible => "NotVisible",
        Cause::Runtime => "RuntimeUnavailable",
        Cause::Snapshotter => "SnapshotterUnsupported",
        Cause::Unsupported => "UnsupportedImage",
        Cause::Cancelled => "Cancelled",
        Cause::PullRecord => "PullRecordFailed",
        Cause::TooLarge => "ImageTooLarge",
    }
}
