//! What a directory tree is, in every respect that an image's layers determine: for comparing the root file
//! systems of two containers. Knows no node and no image.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

/// Where a runtime mounts something of its own over the image.
const MOUNTED: [&str; 6] = ["proc", "sys", "dev", "etc/hosts", "etc/hostname", "etc/resolv.conf"];

/// A line for every path below `root`: type, mode, owners, link target or contents, extended attributes, and
/// the first path of its hard-linked group. Times are left out: a runtime touches directories it mounts on.
pub fn fingerprint(root: &Path) -> Result<BTreeMap<PathBuf, String>> {
    let mut lines = BTreeMap::new();
    let mut linked: BTreeMap<u64, PathBuf> = BTreeMap::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(directory) = waiting.pop() {
        let mut entries: Vec<_> = fs::read_dir(&directory)
            .with_context(|| format!("listing {}", directory.display()))?
            .collect::<Result<_, _>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = entry.path();
            let below = path.strip_prefix(root)?.to_owned();
            if MOUNTED.iter().any(|mounted| below == Path::new(mounted)) {
                continue;
            }
            let line = describe(&path).with_context(|| format!("reading {}", path.display()))?;
            let meta = entry.metadata()?;
            if meta.is_dir() {
                waiting.push(path);
            } else if meta.nlink() > 1 {
                // The lowest path of the group stands for it, so that the walk's order does not matter.
                let first = linked.entry(meta.ino()).or_insert_with(|| below.clone());
                if below < *first {
                    first.clone_from(&below);
                }
            }
            lines.insert(below, (line, meta.ino()));
        }
    }
    let named = lines.into_iter().map(|(path, (line, inode))| match linked.get(&inode) {
        Some(first) => (path, format!("{line} linked with {}", first.display())),
        None => (path, line),
    });
    Ok(named.collect())
}

fn describe(path: &Path) -> Result<String> {
    let meta = fs::symlink_metadata(path)?;
    let kind = meta.file_type();
    let what = if kind.is_symlink() {
        format!("link to {}", fs::read_link(path)?.display())
    } else if kind.is_file() {
        format!("file {} {}", meta.len(), hash(path)?)
    } else if kind.is_dir() {
        "directory".to_owned()
    } else if kind.is_char_device() || kind.is_block_device() {
        format!("device {}", meta.rdev())
    } else {
        "special".to_owned()
    };
    let attributes = attributes(path)?;
    Ok(format!("{what} mode {:o} owner {}:{}{attributes}", meta.mode(), meta.uid(), meta.gid()))
}

fn hash(path: &Path) -> Result<String> {
    let mut hasher = Sha256::new();
    std::io::copy(&mut fs::File::open(path)?, &mut hasher)?;
    Ok(format!("{:x}", hasher.finalize()))
}

fn attributes(path: &Path) -> Result<String> {
    let mut names = vec![0; 64 << 10];
    let length = match rustix::fs::llistxattr(path, &mut names) {
        Ok(length) => length,
        Err(rustix::io::Errno::NOTSUP) => 0,
        Err(error) => return Err(error.into()),
    };
    names.truncate(length);
    let mut text = String::new();
    let mut sorted: Vec<&[u8]> = names.split(|b| *b == 0).filter(|name| !name.is_empty()).collect();
    sorted.sort_unstable();
    for name in sorted {
        // The file system's own bookkeeping is no part of the image.
        if name.starts_with(b"trusted.overlay.") || name.starts_with(b"system.posix_acl") {
            continue;
        }
        let mut value = vec![0; 64 << 10];
        let length = rustix::fs::lgetxattr(path, std::ffi::OsStr::from_bytes(name), &mut value)?;
        value.truncate(length);
        let _ = write!(text, " {}={value:?}", String::from_utf8_lossy(name));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn sees_what_differs() {
        let make = |edit: &dyn Fn(&Path)| {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("a")).unwrap();
            fs::write(dir.path().join("a/x"), "one").unwrap();
            fs::hard_link(dir.path().join("a/x"), dir.path().join("b")).unwrap();
            std::os::unix::fs::symlink("a/x", dir.path().join("s")).unwrap();
            edit(dir.path());
            fingerprint(dir.path()).unwrap()
        };
        let plain = make(&|_| {});
        assert_eq!(plain.len(), 4);
        assert_eq!(make(&|_| {}), plain);
        let edits: [&dyn Fn(&Path); 5] = [
            &|d| fs::write(d.join("a/x"), "two").unwrap(),
            &|d| fs::set_permissions(d.join("a"), fs::Permissions::from_mode(0o700)).unwrap(),
            &|d| {
                fs::remove_file(d.join("b")).unwrap();
                fs::write(d.join("b"), "one").unwrap();
            },
            &|d| {
                fs::remove_file(d.join("s")).unwrap();
                std::os::unix::fs::symlink("b", d.join("s")).unwrap();
            },
            &|d| fs::write(d.join("new"), "").unwrap(),
        ];
        for edit in edits {
            assert_ne!(make(edit), plain);
        }
    }
}
