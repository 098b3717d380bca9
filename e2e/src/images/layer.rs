//! One layer: a list of file system entries, and the tar it becomes. Knows nothing of images.

use super::padding::Padding;
use super::random::Random;
use anyhow::{Context, Result};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};

/// Modification time of every entry: 2024-01-01T00:00:00Z.
pub(super) const MTIME: u64 = 1_704_067_200;

/// How a layer's tar is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip; layers with a random payload are stored, not deflated, to save the time.
    Gzip,
    /// Zstandard.
    Zstd,
}

/// What an [`Entry`] is.
#[derive(Clone, Debug)]
enum Kind {
    File(Bytes),
    /// So many bytes that do not compress, a function of the seed.
    Random {
        bytes: u64,
        seed: String,
    },
    Directory,
    Symlink(String),
    Hardlink(String),
    Fifo,
    Device {
        major: u32,
        minor: u32,
    },
}

/// One entry of a layer's tar.
#[derive(Clone, Debug)]
pub struct Entry {
    path: String,
    kind: Kind,
    mode: u32,
    uid: u64,
    gid: u64,
    xattrs: BTreeMap<String, Vec<u8>>,
}

impl Entry {
    fn new(path: &str, kind: Kind, mode: u32) -> Self {
        Self {
            path: path.trim_start_matches('/').to_owned(),
            kind,
            mode,
            uid: 0,
            gid: 0,
            xattrs: BTreeMap::new(),
        }
    }

    /// A regular file, mode 0644, owner 0:0.
    pub fn file(path: &str, contents: impl Into<Bytes>) -> Self {
        Self::new(path, Kind::File(contents.into()), 0o644)
    }

    /// A regular file of so many random bytes.
    pub fn random(path: &str, bytes: u64, seed: &str) -> Self {
        Self::new(path, Kind::Random { bytes, seed: format!("{seed}/{path}") }, 0o644)
    }

    /// A directory, mode 0755.
    pub fn directory(path: &str) -> Self {
        Self::new(path, Kind::Directory, 0o755)
    }

    /// A symbolic link with the text `target`.
    pub fn symlink(path: &str, target: &str) -> Self {
        Self::new(path, Kind::Symlink(target.to_owned()), 0o777)
    }

    /// A hard link to an earlier entry of the same layer, whose mode and owner it has: whoever unpacks it applies those
    /// of the link's header to the file.
    pub fn hardlink(path: &str, target: &str) -> Self {
        Self::new(path, Kind::Hardlink(target.trim_start_matches('/').to_owned()), 0o644)
    }

    /// A named pipe, mode 0644.
    pub fn fifo(path: &str) -> Self {
        Self::new(path, Kind::Fifo, 0o644)
    }

    /// A character device, mode 0644.
    pub fn device(path: &str, major: u32, minor: u32) -> Self {
        Self::new(path, Kind::Device { major, minor }, 0o644)
    }

    /// A whiteout: `path` of the layers below is gone.
    pub fn whiteout(path: &str) -> Self {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        Self::file(&format!("{parent}/.wh.{name}"), Bytes::new())
    }

    /// An opaque whiteout: what the layers below have in the directory `path` is gone.
    pub fn opaque(path: &str) -> Self {
        Self::file(&format!("{path}/.wh..wh..opq"), Bytes::new())
    }

    /// Sets the permission bits, set-user-ID and the like included.
    #[must_use]
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    /// Sets the owner and the group.
    #[must_use]
    pub fn owner(mut self, uid: u64, gid: u64) -> Self {
        self.uid = uid;
        self.gid = gid;
        self
    }

    /// Adds an extended attribute, under its full name (`user.x`, `security.capability`).
    #[must_use]
    pub fn xattr(mut self, name: &str, value: impl Into<Vec<u8>>) -> Self {
        self.xattrs.insert(name.to_owned(), value.into());
        self
    }

    fn write<W: Write>(&self, tar: &mut tar::Builder<W>) -> Result<()> {
        if !self.xattrs.is_empty() {
            let records: Vec<(String, &[u8])> =
                self.xattrs.iter().map(|(k, v)| (format!("SCHILY.xattr.{k}"), v.as_slice())).collect();
            tar.append_pax_extensions(records.iter().map(|(k, v)| (k.as_str(), *v)))?;
        }
        let mut header = tar::Header::new_gnu();
        header.set_mode(self.mode);
        header.set_uid(self.uid);
        header.set_gid(self.gid);
        header.set_mtime(MTIME);
        header.set_size(0);
        let mut empty = |mut header: tar::Header, kind| {
            header.set_entry_type(kind);
            tar.append_data(&mut header, &self.path, std::io::empty())
        };
        match &self.kind {
            Kind::Directory => empty(header, tar::EntryType::Directory)?,
            Kind::Fifo => empty(header, tar::EntryType::Fifo)?,
            Kind::Device { major, minor } => {
                header.set_device_major(*major)?;
                header.set_device_minor(*minor)?;
                empty(header, tar::EntryType::Char)?;
            }
            Kind::File(contents) => {
                header.set_size(contents.len() as u64);
                tar.append_data(&mut header, &self.path, contents.as_ref())?;
            }
            Kind::Random { bytes, seed } => {
                header.set_size(*bytes);
                let random = Random::of(seed);
                tar.append_data(&mut header, &self.path, random.take(*bytes))?;
            }
            Kind::Symlink(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                tar.append_link(&mut header, &self.path, target)?;
            }
            Kind::Hardlink(target) => {
                header.set_entry_type(tar::EntryType::Link);
                tar.append_link(&mut header, &self.path, target)?;
            }
        }
        Ok(())
    }
}

/// A layer to be written. Directories above an entry are added (mode 0755, owner 0:0) where no entry names them.
#[derive(Clone, Debug)]
pub struct Layer {
    pub(super) compression: Compression,
    entries: Vec<Entry>,
    pub(super) padding: Option<Padding>,
}

impl Layer {
    /// A layer of no entries.
    pub fn new(compression: Compression) -> Self {
        Self { compression, entries: Vec::new(), padding: None }
    }

    /// Makes the blob larger by a frame of so many random bytes, which whoever unpacks it skips. Takes a zstd layer.
    #[must_use]
    pub fn padded(mut self, bytes: u64, seed: &str) -> Self {
        self.padding = Some(Padding { bytes, seed: seed.to_owned() });
        self
    }

    /// Adds an entry; the tar keeps the order.
    #[must_use]
    pub fn with(mut self, entry: Entry) -> Self {
        self.entries.push(entry);
        self
    }

    /// Adds entries; the tar keeps the order.
    #[must_use]
    pub fn with_all(mut self, entries: impl IntoIterator<Item = Entry>) -> Self {
        self.entries.extend(entries);
        self
    }

    /// True if deflating would only cost time.
    pub(super) fn incompressible(&self) -> bool {
        self.entries.iter().any(|e| matches!(e.kind, Kind::Random { .. }))
    }

    /// The entry, with the mode and the owner of the file that it links to.
    fn resolved(&self, entry: &Entry) -> Result<Entry> {
        let Kind::Hardlink(target) = &entry.kind else { return Ok(entry.clone()) };
        let file =
            self.entries.iter().find(|e| e.path == *target).with_context(|| {
                format!("{} links to {target}, which this layer does not hold", entry.path)
            })?;
        Ok(entry.clone().mode(file.mode).owner(file.uid, file.gid))
    }

    /// Writes the uncompressed tar.
    pub(super) fn write_tar<W: Write>(&self, out: W) -> Result<W> {
        let mut tar = tar::Builder::new(out);
        let mut directories: BTreeSet<String> = BTreeSet::from([String::new()]);
        for entry in &self.entries {
            for (end, _) in entry.path.match_indices('/') {
                if directories.insert(entry.path[..end].to_owned()) {
                    Entry::directory(&entry.path[..end]).write(&mut tar)?;
                }
            }
            if matches!(entry.kind, Kind::Directory) {
                directories.insert(entry.path.clone());
            }
            self.resolved(entry)?
                .write(&mut tar)
                .with_context(|| format!("writing {} into a layer", entry.path))?;
        }
        Ok(tar.into_inner()?)
    }
}
