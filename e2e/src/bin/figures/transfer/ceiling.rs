//! The ceiling: the same blobs from local files into the same containerd, through its content API.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio_util::io::ReaderStream;
use tote_agent::containerd::{Client, Containerd as _, Held, Ingest, Lease};
use tote_e2e::daemon::Daemon;
use tote_e2e::images::Image;
use tote_image::{Descriptor, chain_ids, diff_ids};

/// Bytes of one write.
const PIECE: usize = 1 << 20;

/// How many blobs at once, as an agent does.
const AT_ONCE: usize = 3;

fn lease(id: &str) -> Lease {
    Lease { id: id.to_owned(), transfer: id.to_owned() }
}

/// Ingests the image's blobs; returns how long that took.
pub async fn ingest(daemon: &Daemon, image: &Image) -> Result<Duration> {
    let client = Client::new(&daemon.socket());
    client.facts().await?;
    let lease = lease("ceiling");
    let begun = Instant::now();
    client.create_lease(&lease, SystemTime::now() + Duration::from_secs(3600)).await?;
    let writes = super::blobs(image)?.into_iter().map(|(digest, size)| {
        let (client, lease) = (client.clone(), lease.id.clone());
        let path = image.layout.blob(&digest);
        // A task for each, so that nothing here makes it slower than it could be.
        let task = tokio::spawn(async move {
            let media_type = "application/octet-stream".to_owned();
            let blob = Descriptor { media_type, digest: digest.parse()?, size };
            let Ingest::Open(mut writer) = client.ingest(&lease, &blob).await? else {
                bail!("{digest} is there already")
            };
            let mut pieces = ReaderStream::with_capacity(tokio::fs::File::open(path).await?, PIECE);
            while let Some(piece) = pieces.next().await {
                writer.write(piece?).await?;
            }
            Ok(writer.commit([].into()).await?)
        });
        async move { task.await? }
    });
    stream::iter(writes).buffer_unordered(AT_ONCE).try_collect::<()>().await?;
    let took = begun.elapsed();
    client.delete_lease(&lease.id).await?;
    Ok(took)
}

/// Keeps the image's snapshots from now on, whatever becomes of it.
pub async fn keep_snapshots(daemon: &Daemon, image: &Image) -> Result<()> {
    let client = Client::new(&daemon.socket());
    let snapshotter = daemon.snapshotter().to_string();
    let config = std::fs::read(image.layout.blob(&image.host()?.config.digest))?;
    let (_, ids) = diff_ids(&config)?;
    let chain = chain_ids(&ids).pop().context("no layers")?;
    let lease = lease("kept");
    client.create_lease(&lease, SystemTime::now() + Duration::from_secs(24 * 3600)).await?;
    Ok(client.hold(&lease.id, Held::Snapshot { snapshotter: &snapshotter, chain: &chain }).await?)
}
