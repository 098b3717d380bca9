//! Blobs as the files they are below containerd's content root: read from there, they go through no other process.
//!
//! Facts it stands on (containerd's `plugins/content/local`): a blob is `blobs/<algorithm>/<hex>` below the root that the
//! Introspection service gives for plugin `io.containerd.content.v1`; commit renames it there, whole and read-only, so a
//! file is its blob for ever, and one that is open is not lost to a collection. The files are those of all namespaces: who
//! reads has asked the content service what is there.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use containerd_client::services::v1 as api;
use futures::{StreamExt, stream};
use rustix::buffer::spare_capacity;
use rustix::fs::OFlags;
use tokio::fs::{File, OpenOptions};
use tokio::sync::OnceCell;
use tote_image::Digest;

use super::Client;
use super::call::{request, unary};
use crate::containerd::{ByteStream, Error, Space};

/// The type of the content store's plugin.
const CONTENT: &str = "io.containerd.content.v1";

/// Bytes of one piece, and of one read.
const PIECE: usize = 1 << 20;

/// Where blobs are files, as far as it is known.
#[derive(Clone, Debug, Default)]
pub(super) struct Files(Arc<OnceCell<Option<PathBuf>>>);

impl Files {
    /// A blob's bytes, from its file; nothing if there is none to be read here.
    pub(super) async fn read(
        &self,
        client: &Client,
        digest: &Digest,
        offset: u64,
        length: u64,
    ) -> Result<Option<ByteStream>, Error> {
        let Some(blobs) = self.0.get_or_try_init(|| find(client)).await? else { return Ok(None) };
        // Whatever hinders it (containerd has another root by now, or the file is not to be read), containerd itself may give it.
        let path = blobs.join("sha256").join(digest.hex());
        let end = offset.saturating_add(length);
        let Some(file) = whole(&path, end).await else { return Ok(None) };
        let file = Arc::new(file.into_std().await);
        let digest = digest.clone();
        let pieces = stream::try_unfold(offset, move |at| {
            let (file, digest) = (file.clone(), digest.clone());
            async move {
                let length = usize::try_from(end.saturating_sub(at)).unwrap_or(PIECE).min(PIECE);
                if length == 0 {
                    return Ok(None);
                }
                let read = tokio::task::spawn_blocking(move || piece(&file, at, length)).await;
                match read.map_err(std::io::Error::other).flatten() {
                    Ok(piece) => Ok(Some((piece, at + length as u64))),
                    Err(error) => Err(Error::Other(format!("reading the file of {digest}: {error}"))),
                }
            }
        });
        Ok(Some(pieces.boxed()))
    }

    /// The file system of the blobs; nothing if that is not to be seen.
    pub(super) async fn space(&self, client: &Client) -> Result<Option<Space>, Error> {
        let Some(blobs) = self.0.get_or_try_init(|| find(client)).await? else { return Ok(None) };
        // The root: what is below is made with the first blob.
        let root = blobs.parent().unwrap_or(blobs);
        Ok(rustix::fs::statvfs(root).ok().map(|stat| Space {
            size: stat.f_blocks.saturating_mul(stat.f_frsize),
            free: stat.f_bfree.saturating_mul(stat.f_frsize),
        }))
    }
}

/// `length` bytes of a file, all of them, by as few reads as may be.
fn piece(file: &std::fs::File, mut at: u64, length: usize) -> std::io::Result<Bytes> {
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        let count = rustix::io::pread(file, spare_capacity(&mut bytes), at)?;
        if count == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        at += count as u64;
    }
    bytes.truncate(length); // Its capacity may be more.
    Ok(bytes.into())
}

/// A file that is one, of so many bytes at least: what is a link, or shorter than the blob is to be, is not the blob.
async fn whole(path: &Path, length: u64) -> Option<File> {
    // A pipe would be waited for.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).await.ok()?;
    let found = file.metadata().await.ok()?;
    (found.is_file() && found.len() >= length).then_some(file)
}

/// The directory of all blobs, if this process may read it.
async fn find(client: &Client) -> Result<Option<PathBuf>, Error> {
    let message = api::PluginsRequest { filters: vec![format!("type=={CONTENT}")] };
    let plugins = unary(client.introspection().plugins(request(message))).await?.plugins;
    let root = plugins.into_iter().find_map(|mut plugin| plugin.exports.remove("root"));
    let Some(root) = root else {
        tracing::warn!("containerd does not tell where its blobs are; they are read through it");
        return Ok(None);
    };
    // Not what is below: it is made with the first blob.
    match tokio::fs::read_dir(&root).await {
        Ok(_) => {
            tracing::info!(root, "blobs are read from their files");
            Ok(Some(Path::new(&root).join("blobs")))
        }
        Err(error) => {
            tracing::warn!(root, %error, "blobs are read through containerd, for their files are not to be seen here");
            Ok(None)
        }
    }
}
