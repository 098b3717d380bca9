//! What an agent streams: an import's progress to its end, and what the node holds. Must not know how either began.

use tonic::Streaming;
use tote_rpc::v1::{self, import_event::Event, session_response::Message};

/// Follows an import to its end.
pub async fn ended(events: &mut Streaming<v1::ImportEvent>) -> Result<v1::Done, v1::Failed> {
    loop {
        match events.message().await.unwrap().and_then(|event| event.event) {
            Some(Event::Progress(_)) => {}
            Some(Event::Done(done)) => return Ok(done),
            Some(Event::Failed(failed)) => return Err(failed),
            None => panic!("the stream ended without an end"),
        }
    }
}

/// Follows an import until so many bytes have come.
pub async fn until_moved(events: &mut Streaming<v1::ImportEvent>, share: f64) -> v1::Progress {
    loop {
        match events.message().await.unwrap().and_then(|event| event.event) {
            #[allow(clippy::cast_precision_loss)]
            Some(Event::Progress(progress)) => {
                if progress.transferred_bytes as f64 > share * progress.total_bytes as f64
                    && progress.total_bytes > 0
                {
                    assert!(
                        progress.transferred_bytes * 10 < progress.total_bytes * 9,
                        "too late: {progress:?}"
                    );
                    return progress;
                }
            }
            other => panic!("ended too soon: {other:?}"),
        }
    }
}

/// Bytes that had come, `before` included, when an import failed or its stream broke; none if its end was a good one.
pub async fn come_in_vain(events: &mut Streaming<v1::ImportEvent>, before: &v1::Progress) -> i64 {
    let mut come = before.transferred_bytes;
    loop {
        match events.message().await.ok().flatten().and_then(|event| event.event) {
            Some(Event::Progress(progress)) => come = progress.transferred_bytes,
            Some(Event::Done(_)) => return 0,
            Some(Event::Failed(failed)) => {
                println!("{} bytes had come when it failed: {}", come, failed.message);
                return come;
            }
            None => return come,
        }
    }
}

/// A controller's session.
pub struct Session {
    responses: Streaming<v1::SessionResponse>,
    _requests: tokio::sync::mpsc::Sender<v1::SessionRequest>,
}

impl Session {
    /// Of these two halves of a stream, which stands as long as both do.
    pub fn new(
        responses: Streaming<v1::SessionResponse>,
        requests: tokio::sync::mpsc::Sender<v1::SessionRequest>,
    ) -> Self {
        Self { responses, _requests: requests }
    }

    async fn next(&mut self) -> Message {
        self.responses.message().await.unwrap().and_then(|response| response.message).unwrap()
    }

    pub async fn inventory(&mut self) -> (v1::Welcome, Vec<v1::Image>) {
        let Message::Welcome(welcome) = self.next().await else { panic!("welcome comes first") };
        let mut images = Vec::new();
        loop {
            let Message::Snapshot(snapshot) = self.next().await else { panic!("then the snapshot") };
            images.extend(snapshot.images);
            if snapshot.last {
                return (welcome, images);
            }
        }
    }

    /// Waits until the node has an image of this target, of which the agent tells what is wanted.
    pub async fn until_has(&mut self, digest: &str, is_wanted: impl Fn(&v1::Manifest) -> bool) {
        loop {
            let Message::Delta(delta) = self.next().await else { panic!("then deltas") };
            let is = |image: &v1::Image| {
                image.target.as_ref().is_some_and(|target| target.digest == digest)
                    && image.manifests.iter().any(&is_wanted)
            };
            if delta.upserted.iter().any(is) {
                return;
            }
        }
    }
}
