//! Writing a blob: the `Write` stream of containerd's content service.
//!
//! Facts it stands on (containerd's `contentserver`): an ingest resumes if it is opened with the same
//! reference and total; COMMIT must carry the offset, for 0 truncates; the answer to COMMIT may come twice;
//! `ALREADY_EXISTS` may answer any message that carries `expected`.

use std::time::Duration;

use bytes::Bytes;
use containerd_client::services::v1::{WriteAction, WriteContentRequest, WriteContentResponse};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::Streaming;
use tote_image::Descriptor;

use super::call::{error, unary};
use super::content::ingest_ref;
use super::{Client, leased};
use crate::containerd::{BlobWriter, Error, Ingest, Labels};

/// How many writes may be on their way without an answer.
const IN_FLIGHT: usize = 2;

/// How long containerd may take over one write, or over COMMIT, which syncs the file to disk.
const WRITE_DEADLINE: Duration = Duration::from_secs(120);

/// How long an ingest may stay locked by a writer whose connection is gone.
const LOCK_DEADLINE: Duration = Duration::from_secs(10);

pub(super) async fn open(client: &Client, lease: &str, blob: &Descriptor) -> Result<Ingest, Error> {
    let started = tokio::time::Instant::now();
    let mut pause = Duration::from_millis(20);
    loop {
        match open_once(client, lease, blob).await {
            Err(Error::Unavailable(message))
                if message.contains("locked") && started.elapsed() < LOCK_DEADLINE =>
            {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(500));
            }
            Err(Error::AlreadyExists(_)) => return Ok(Ingest::Present),
            Err(error) => return Err(error),
            Ok(writer) => return Ok(Ingest::Open(Box::new(writer))),
        }
    }
}

async fn open_once(client: &Client, lease: &str, blob: &Descriptor) -> Result<Writer, Error> {
    let total = i64::try_from(blob.size).map_err(|_| Error::Other("the blob is too large".to_owned()))?;
    let (requests, outgoing) = mpsc::channel(IN_FLIGHT);
    let stat = WriteContentRequest {
        action: WriteAction::Stat.into(),
        r#ref: ingest_ref(&blob.digest),
        total,
        expected: blob.digest.to_string(),
        ..WriteContentRequest::default()
    };
    requests.try_send(stat).map_err(|error| Error::Other(error.to_string()))?;
    let outgoing = tokio_stream::wrappers::ReceiverStream::new(outgoing);
    let responses = unary(client.content().write(leased(outgoing, lease)?)).await?;
    let mut writer = Writer { requests, responses, unanswered: 1, offset: 0, blob: blob.clone() };
    let stat = writer.answer().await?;
    writer.offset = u64::try_from(stat.offset).unwrap_or_default();
    Ok(writer)
}

struct Writer {
    requests: mpsc::Sender<WriteContentRequest>,
    responses: Streaming<WriteContentResponse>,
    unanswered: usize,
    offset: u64,
    blob: Descriptor,
}

impl Writer {
    async fn answer(&mut self) -> Result<WriteContentResponse, Error> {
        let answer = timeout(WRITE_DEADLINE, self.responses.message()).await;
        let answer = answer.map_err(|_| Error::Unavailable("a write was not answered".to_owned()))?;
        self.unanswered = self.unanswered.saturating_sub(1);
        answer
            .map_err(|status| error(&status))?
            .ok_or_else(|| Error::Unavailable("the write stream ended".to_owned()))
    }

    async fn send(&mut self, message: WriteContentRequest) -> Result<(), Error> {
        if self.requests.send(message).await.is_err() {
            // The call is over; its status tells why.
            self.answer().await?;
            return Err(Error::Unavailable("the write stream ended".to_owned()));
        }
        self.unanswered += 1;
        Ok(())
    }

    fn at(&self) -> i64 {
        i64::try_from(self.offset).unwrap_or(i64::MAX)
    }
}

#[tonic::async_trait]
impl BlobWriter for Writer {
    fn offset(&self) -> u64 {
        self.offset
    }

    async fn write(&mut self, bytes: Bytes) -> Result<(), Error> {
        while self.unanswered >= IN_FLIGHT {
            self.answer().await?;
        }
        let length = bytes.len() as u64;
        let message = WriteContentRequest {
            action: WriteAction::Write.into(),
            offset: self.at(),
            data: bytes.into(),
            ..WriteContentRequest::default()
        };
        self.send(message).await?;
        self.offset += length;
        Ok(())
    }

    async fn commit(mut self: Box<Self>, labels: Labels) -> Result<(), Error> {
        while self.unanswered > 0 {
            self.answer().await?;
        }
        let message = WriteContentRequest {
            action: WriteAction::Commit.into(),
            total: i64::try_from(self.blob.size).unwrap_or(i64::MAX),
            expected: self.blob.digest.to_string(),
            offset: self.at(),
            labels: labels.into_iter().collect(),
            ..WriteContentRequest::default()
        };
        self.send(message).await?;
        let committed = self.answer().await?;
        if committed.action != i32::from(WriteAction::Commit) {
            return Err(Error::Other("containerd answered COMMIT with something else".to_owned()));
        }
        // Drain: the answer may come twice, and an error may follow.
        while let Ok(Ok(Some(_))) = timeout(WRITE_DEADLINE, self.responses.message()).await {}
        Ok(())
    }
}
