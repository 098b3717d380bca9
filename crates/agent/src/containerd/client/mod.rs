//! The real containerd, by its gRPC socket. The only file tree that imports its client and CRI's.
//!
//! The socket is dialled anew whenever the connection is lost, so its DIRECTORY must be what is mounted: a
//! bind mount of the socket file would go stale when containerd restarts.

mod call;
mod content;
mod facts;
mod files;
mod unpack;
mod writer;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use containerd_client::services::v1 as api;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::diff_client::DiffClient;
use containerd_client::services::v1::events_client::EventsClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::introspection_client::IntrospectionClient;
use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::version_client::VersionClient;
use containerd_client::types;
use futures::StreamExt;
use futures::stream::BoxStream;
use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tote_image::{Descriptor, Digest};

use self::call::{request, unary, with_lease};
use self::files::Files;
use super::{
    Blob, ByteStream, Change, Containerd, Error, Facts, Held, ImageRecord, Ingest, Labels, Layer, Lease,
    MANAGED_LABEL, Space, TRANSFER_LABEL,
};

/// The client of CRI's image service.
#[allow(missing_docs, clippy::pedantic, clippy::all, unused_qualifications)]
mod cri {
    tonic::include_proto!("runtime.v1");
}

/// The containerd namespace that CRI uses.
const NAMESPACE: &str = "k8s.io";

/// containerd's server and its own clients take messages of 16 MiB; a list of all images may be larger than
/// tonic's default of 4 MiB.
const MAX_MESSAGE: usize = 64 << 20;

/// The label by which the lease's life is bounded (containerd's garbage collection documentation).
const EXPIRE_LABEL: &str = "containerd.io/gc.expire";

/// The containerd behind a socket.
#[derive(Clone, Debug)]
pub struct Client {
    channel: Channel,
    files: Option<Files>,
}

impl Client {
    /// A client of the containerd that listens, or will, at `socket`. Nothing is dialled yet.
    pub fn new(socket: &Path) -> Self {
        let socket: PathBuf = socket.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://containerd")
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(16 << 20)
            .connect_timeout(Duration::from_secs(5))
            .connect_with_connector_lazy(connector);
        Self { channel, files: None }
    }

    /// Reads blobs from their files, where this process sees containerd's content root under the name by which containerd
    /// knows it; from containerd where it does not.
    #[must_use]
    pub fn with_files(self) -> Self {
        Self { files: Some(Files::default()), ..self }
    }

    fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    fn images_client(&self) -> ImagesClient<Channel> {
        ImagesClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    fn leases_client(&self) -> LeasesClient<Channel> {
        LeasesClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    fn diffs(&self) -> DiffClient<Channel> {
        DiffClient::new(self.channel.clone())
    }

    fn introspection(&self) -> IntrospectionClient<Channel> {
        IntrospectionClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    fn version(&self) -> VersionClient<Channel> {
        VersionClient::new(self.channel.clone())
    }

    fn cri(&self) -> cri::image_service_client::ImageServiceClient<Channel> {
        cri::image_service_client::ImageServiceClient::new(self.channel.clone())
    }
}

fn descriptor(blob: &Descriptor) -> types::Descriptor {
    types::Descriptor {
        media_type: blob.media_type.clone(),
        digest: blob.digest.to_string(),
        size: i64::try_from(blob.size).unwrap_or(i64::MAX),
        annotations: std::collections::HashMap::new(),
    }
}

fn record(image: &ImageRecord) -> api::Image {
    api::Image {
        name: image.name.clone(),
        labels: [(MANAGED_LABEL.0.to_owned(), MANAGED_LABEL.1.to_owned())].into(),
        target: Some(descriptor(&image.target)),
        created_at: None,
        updated_at: None,
    }
}

/// A record as it stands, or nothing if its target is malformed: such a record cannot be used for anything.
fn parsed(image: api::Image) -> Option<ImageRecord> {
    let target = image.target?;
    let target = Descriptor {
        media_type: target.media_type,
        digest: target.digest.parse().ok()?,
        size: u64::try_from(target.size).ok()?,
    };
    Some(ImageRecord { name: image.name, target })
}

#[tonic::async_trait]
impl Containerd for Client {
    async fn facts(&self) -> Result<Facts, Error> {
        facts::facts(self).await
    }

    async fn blob(&self, digest: &Digest) -> Result<Option<Blob>, Error> {
        content::info(self, digest).await
    }

    async fn blobs(&self) -> Result<Vec<(Digest, u64)>, Error> {
        content::list(self).await
    }

    async fn read(&self, digest: &Digest, offset: u64, length: u64) -> Result<ByteStream, Error> {
        if length > 0
            && let Some(files) = &self.files
            && let Some(pieces) = files.read(self, digest, offset, length).await?
        {
            return Ok(pieces);
        }
        content::read(self, digest, offset, length).await
    }

    async fn ingest(&self, lease: &str, blob: &Descriptor) -> Result<Ingest, Error> {
        writer::open(self, lease, blob).await
    }

    async fn ingests(&self) -> Result<Vec<Digest>, Error> {
        content::ingests(self).await
    }

    async fn abort(&self, digest: &Digest) -> Result<(), Error> {
        content::abort(self, digest).await
    }

    async fn label(&self, digest: &Digest, labels: &Labels) -> Result<(), Error> {
        content::label(self, digest, labels).await
    }

    async fn space(&self) -> Result<Option<Space>, Error> {
        match &self.files {
            Some(files) => files.space(self).await,
            None => Ok(None),
        }
    }

    async fn create_lease(&self, lease: &Lease, expires: SystemTime) -> Result<(), Error> {
        let expires = jiff::Timestamp::try_from(expires).map_err(|error| Error::Other(error.to_string()))?;
        // RFC 3339 with whole seconds is what every version parses.
        let expires = expires.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let labels =
            [(EXPIRE_LABEL.to_owned(), expires), (TRANSFER_LABEL.to_owned(), lease.transfer.clone())];
        let request = request(api::CreateRequest { id: lease.id.clone(), labels: labels.into() });
        unary(self.leases_client().create(request)).await.map(drop)
    }

    async fn leases(&self) -> Result<Vec<Lease>, Error> {
        let filters = vec![format!("labels.\"{TRANSFER_LABEL}\"")];
        let listed = unary(self.leases_client().list(request(api::ListRequest { filters }))).await?;
        let ours = listed.leases.into_iter().filter_map(|mut lease| {
            let transfer = lease.labels.remove(TRANSFER_LABEL)?;
            Some(Lease { id: lease.id, transfer })
        });
        Ok(ours.collect())
    }

    async fn hold(&self, lease: &str, held: Held<'_>) -> Result<(), Error> {
        let resource = match held {
            Held::Blob(digest) => api::Resource { id: digest.to_string(), r#type: "content".to_owned() },
            Held::Ingest(digest) => {
                api::Resource { id: content::ingest_ref(digest), r#type: "ingests".to_owned() }
            }
            Held::Snapshot { snapshotter, chain } => {
                api::Resource { id: chain.to_string(), r#type: format!("snapshots/{snapshotter}") }
            }
        };
        let request = request(api::AddResourceRequest { id: lease.to_owned(), resource: Some(resource) });
        unary(self.leases_client().add_resource(request)).await
    }

    async fn delete_lease(&self, id: &str) -> Result<(), Error> {
        let request = request(api::DeleteRequest { id: id.to_owned(), sync: true });
        match unary(self.leases_client().delete(request)).await {
            Ok(()) | Err(Error::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn images(&self) -> Result<Vec<ImageRecord>, Error> {
        let request = request(api::ListImagesRequest { filters: Vec::new() });
        let listed = unary(self.images_client().list(request)).await?;
        Ok(listed.images.into_iter().filter_map(parsed).collect())
    }

    async fn image(&self, name: &str) -> Result<Option<ImageRecord>, Error> {
        let request = request(api::GetImageRequest { name: name.to_owned() });
        match unary(self.images_client().get(request)).await {
            Ok(found) => Ok(found.image.and_then(parsed)),
            Err(Error::NotFound(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn create_image(&self, image: &ImageRecord) -> Result<(), Error> {
        let image = Some(record(image));
        let request = request(api::CreateImageRequest { image, source_date_epoch: None });
        unary(self.images_client().create(request)).await.map(drop)
    }

    async fn retarget_image(&self, image: &ImageRecord) -> Result<(), Error> {
        let mask = prost_types::FieldMask { paths: vec!["target".to_owned()] };
        let image = Some(record(image));
        let request =
            request(api::UpdateImageRequest { image, update_mask: Some(mask), source_date_epoch: None });
        unary(self.images_client().update(request)).await.map(drop)
    }

    async fn delete_image(&self, image: &ImageRecord) -> Result<(), Error> {
        let target = Some(descriptor(&image.target));
        let request = request(api::DeleteImageRequest { name: image.name.clone(), sync: false, target });
        match unary(self.images_client().delete(request)).await {
            Ok(()) | Err(Error::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn has_snapshot(&self, snapshotter: &str, chain: &Digest) -> Result<bool, Error> {
        unpack::is_committed(self, snapshotter, chain).await
    }

    async fn unpack(&self, lease: &str, snapshotter: &str, layer: Layer<'_>, keep: u64) -> Result<(), Error> {
        unpack::unpack(self, lease, snapshotter, layer, keep).await
    }

    async fn image_status(&self, name: &str) -> Result<Option<String>, Error> {
        let image = Some(cri::ImageSpec { image: name.to_owned() });
        let request = tonic::Request::new(cri::ImageStatusRequest { image, verbose: false });
        Ok(unary(self.cri().image_status(request)).await?.image.map(|image| image.id))
    }

    async fn changes(&self) -> Result<BoxStream<'static, Change>, Error> {
        let filters = vec![
            format!("namespace=={NAMESPACE},topic~=\"^/images/\""),
            format!("namespace=={NAMESPACE},topic==\"/content/delete\""),
        ];
        let mut events = EventsClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE);
        let (sender, receiver) = mpsc::channel(64);
        // containerd answers, even with headers, only when there is a first event.
        tokio::spawn(async move {
            let forward = async {
                let mut stream =
                    events.subscribe(request(api::SubscribeRequest { filters })).await?.into_inner();
                while let Some(event) = stream.message().await? {
                    let change =
                        if event.topic == "/content/delete" { Change::Content } else { Change::Images };
                    if sender.send(change).await.is_err() {
                        break;
                    }
                }
                Ok::<_, tonic::Status>(())
            };
            tokio::select! {
                () = sender.closed() => {}
                ended = forward => if let Err(status) = ended {
                    tracing::debug!(%status, "containerd's events ended");
                }
            }
        });
        Ok(ReceiverStream::new(receiver).boxed())
    }
}

/// Used where a lease covers a call.
fn leased<T>(message: T, lease: &str) -> Result<tonic::Request<T>, Error> {
    with_lease(request(message), lease)
}
