//! The ceiling: the same blobs from local files into the same containerd, through its content API; and what the disk takes by
//! itself.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Result, bail};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio_util::io::ReaderStream;
use tote_agent::containerd::{Client, Containerd as _, Ingest, Lease};
use tote_e2e::daemon::Daemon;
use tote_e2e::host;
use tote_e2e::images::Image;
use tote_image::Descriptor;

/// Bytes of one write.
const PIECE: usize = 1 << 20;

/// How many blobs at once, as an agent does.
const AT_ONCE: usize = 3;

/// Ingests the image's blobs; returns how long that took.
pub async fn ingest(daemon: &Daemon, image: &Image) -> Result<Duration> {
    let client = Client::new(&daemon.socket());
    client.facts().await?;
    let lease = Lease { id: "ceiling".to_owned(), transfer: "ceiling".to_owned() };
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

/// Writes the image's layers with `dd`, one after the other, each on the disk before the next; returns how long that took.
pub fn dd(daemon: &Daemon, image: &Image) -> Result<Duration> {
    let directory = daemon.root().join("dd");
    fs::create_dir(&directory)?;
    let begun = Instant::now();
    for layer in &image.host()?.layers {
        let from = image.layout.blob(&layer.digest);
        let to = directory.join(from.file_name().unwrap_or_default());
        let (from, to) = (format!("if={}", from.display()), format!("of={}", to.display()));
        host::run(Command::new("dd").args([&from, &to]).args(["bs=1M", "conv=fsync", "status=none"]))?;
    }
    let took = begun.elapsed();
    fs::remove_dir_all(&directory)?;
    Ok(took)
}
