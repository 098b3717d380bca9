//! The blobs of images on disk, as an OCI image layout, and the archive made of one.

use super::layer::MTIME;
use super::padding::{Padding, skip};
use super::{Compression, Descriptor, Layer, OCI_INDEX, PlatformImage, digest, named};
use anyhow::{Context, Result, ensure};
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::{NamedTempFile, TempDir};

/// A directory of blobs, `blobs/sha256/<hex>`. Clones share it; a temporary one goes with its last clone.
#[derive(Clone, Debug)]
pub struct Layout {
    root: PathBuf,
    _temporary: Option<Arc<TempDir>>,
}

impl Layout {
    /// A layout in the directory given, made if it is not there.
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub fn at(root: impl Into<PathBuf>) -> Result<Self> {
        Self { root: root.into(), _temporary: None }.made()
    }

    /// A layout that is removed with its last clone.
    ///
    /// # Errors
    /// If no temporary directory can be made.
    pub fn temporary() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("tote-images-").tempdir()?;
        Self { root: dir.path().to_owned(), _temporary: Some(Arc::new(dir)) }.made()
    }

    fn made(self) -> Result<Self> {
        let blobs = self.directory();
        fs::create_dir_all(&blobs).with_context(|| format!("making {}", blobs.display()))?;
        Ok(self)
    }

    /// File that holds a blob's bytes, there or not.
    pub fn blob(&self, digest: &str) -> PathBuf {
        self.directory().join(digest.trim_start_matches("sha256:"))
    }

    fn directory(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    /// Writes a JSON document, keys sorted, as a blob.
    pub(super) fn put_json(&self, media_type: &str, document: &Value) -> Result<Descriptor> {
        let bytes = serde_json::to_vec(document)?;
        let digest = digest(&bytes);
        let mut file = self.draft()?;
        file.write_all(&bytes)?;
        self.keep(file, &digest)?;
        Ok(descriptor(media_type, digest, bytes.len() as u64))
    }

    /// Writes a layer as a blob. Returns its descriptor and its diffID.
    pub(super) fn put_layer(&self, media_type: &str, layer: &Layer) -> Result<(Descriptor, String)> {
        let mut blob = self.writer(media_type, layer.compression, layer.incompressible())?;
        layer.write_tar(&mut blob)?;
        ensure!(
            layer.padding.is_none() || layer.compression == Compression::Zstd,
            "only a zstd layer can be padded"
        );
        blob.finish_padded(layer.padding.as_ref())
    }

    /// Starts a layer blob that the caller writes an uncompressed tar into.
    pub(super) fn writer(
        &self,
        media_type: &str,
        compression: Compression,
        incompressible: bool,
    ) -> Result<LayerWriter> {
        let out = Hashing::new(BufWriter::new(self.draft()?));
        let packed = match compression {
            Compression::None => Packed::None(out),
            Compression::Gzip => {
                let level = if incompressible { 0 } else { 6 };
                Packed::Gzip(GzEncoder::new(out, flate2::Compression::new(level)))
            }
            Compression::Zstd => Packed::Zstd(zstd::Encoder::new(out, 3)?),
        };
        Ok(LayerWriter { layout: self.clone(), media_type: media_type.to_owned(), tar: Hashing::new(packed) })
    }

    /// Copies a layer blob of another layout, with a frame at its end that changes the digest and not the
    /// contents: an empty gzip member or a skippable zstd frame that holds the seed.
    pub(super) fn put_resealed(&self, from: &Path, layer: &Descriptor, seed: &str) -> Result<Descriptor> {
        let mut out = Hashing::new(BufWriter::new(self.draft()?));
        let mut file = File::open(from).with_context(|| format!("opening {}", from.display()))?;
        io::copy(&mut file, &mut out)?;
        if layer.media_type.ends_with("zstd") {
            skip(&mut out, u32::try_from(seed.len())?)?;
            out.write_all(seed.as_bytes())?;
        } else {
            let member =
                flate2::GzBuilder::new().comment(seed.replace('\0', "")).mtime(0).operating_system(255);
            out = member.write(out, flate2::Compression::none()).finish()?;
        }
        let (file, digest, size) = out.sealed()?;
        self.keep(file, &digest)?;
        Ok(descriptor(&layer.media_type, digest, size))
    }

    fn draft(&self) -> Result<NamedTempFile> {
        let dir = self.directory();
        NamedTempFile::new_in(&dir).with_context(|| format!("making a file in {}", dir.display()))
    }

    fn keep(&self, file: NamedTempFile, digest: &str) -> Result<()> {
        let path = self.blob(digest);
        file.persist(&path).with_context(|| format!("writing {}", path.display()))?;
        Ok(())
    }

    /// Writes the archive of one image: see [`super::Image::write_archive`].
    pub(super) fn write_archive(
        &self,
        path: &Path,
        name: &str,
        target: &Descriptor,
        host: &PlatformImage,
        blobs: &[Descriptor],
    ) -> Result<()> {
        let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        let mut tar = tar::Builder::new(BufWriter::new(NamedTempFile::new_in(dir)?));
        // containerd reads the first annotation, skopeo and podman the second; `docker load` reads manifest.json.
        let named = Descriptor {
            annotations: BTreeMap::from([
                ("io.containerd.image.name".to_owned(), name.to_owned()),
                ("org.opencontainers.image.ref.name".to_owned(), name.to_owned()),
            ]),
            ..target.clone()
        };
        let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [named]});
        let docker = json!([{
            "Config": archived(&host.config.digest),
            "RepoTags": [name],
            "Layers": host.layers.iter().map(|l| archived(&l.digest)).collect::<Vec<_>>(),
        }]);
        for (file, document) in [
            ("oci-layout", json!({"imageLayoutVersion": "1.0.0"})),
            ("index.json", index),
            ("manifest.json", docker),
        ] {
            let bytes = serde_json::to_vec(&document)?;
            tar.append_data(&mut header(bytes.len() as u64), file, bytes.as_slice())?;
        }
        for blob in blobs {
            let file = File::open(self.blob(&blob.digest))
                .with_context(|| format!("opening blob {}", blob.digest))?;
            tar.append_data(&mut header(blob.size), archived(&blob.digest), file)?;
        }
        let file = tar.into_inner()?.into_inner()?;
        file.as_file().sync_all()?;
        file.persist(path).with_context(|| format!("writing {}", path.display()))?;
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        Ok(())
    }
}

fn archived(digest: &str) -> String {
    format!("blobs/{}", digest.replace(':', "/"))
}

fn header(size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_mtime(MTIME);
    header.set_size(size);
    header
}

fn descriptor(media_type: &str, digest: String, size: u64) -> Descriptor {
    let media_type = media_type.to_owned();
    Descriptor { media_type, digest, size, platform: None, annotations: BTreeMap::new() }
}

/// A layer blob being written: takes the uncompressed tar.
pub(super) struct LayerWriter {
    layout: Layout,
    media_type: String,
    tar: Hashing<Packed>,
}

impl LayerWriter {
    /// Closes the blob. Returns its descriptor and its diffID.
    pub(super) fn finish(self) -> Result<(Descriptor, String)> {
        self.finish_padded(None)
    }

    /// The same, with padding behind the tar.
    fn finish_padded(self, padding: Option<&Padding>) -> Result<(Descriptor, String)> {
        let diff_id = named(&self.tar.hash.finalize());
        let mut out = match self.tar.inner {
            Packed::None(out) => out,
            Packed::Gzip(encoder) => encoder.finish()?,
            Packed::Zstd(encoder) => encoder.finish()?,
        };
        if let Some(padding) = padding {
            padding.write(&mut out)?;
        }
        let (file, digest, size) = out.sealed()?;
        self.layout.keep(file, &digest)?;
        Ok((descriptor(&self.media_type, digest, size), diff_id))
    }
}

impl Write for LayerWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tar.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.tar.flush()
    }
}

type Draft = Hashing<BufWriter<NamedTempFile>>;

enum Packed {
    None(Draft),
    Gzip(GzEncoder<Draft>),
    Zstd(zstd::Encoder<'static, Draft>),
}

impl Write for Packed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::None(out) => out.write(bytes),
            Self::Gzip(out) => out.write(bytes),
            Self::Zstd(out) => out.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::None(out) => out.flush(),
            Self::Gzip(out) => out.flush(),
            Self::Zstd(out) => out.flush(),
        }
    }
}

struct Hashing<W> {
    inner: W,
    hash: Sha256,
    size: u64,
}

impl<W> Hashing<W> {
    fn new(inner: W) -> Self {
        Self { inner, hash: Sha256::new(), size: 0 }
    }
}

impl Draft {
    /// Flushes; returns the file, its digest and its size in bytes.
    fn sealed(self) -> Result<(NamedTempFile, String, u64)> {
        Ok((self.inner.into_inner()?, named(&self.hash.finalize()), self.size))
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
