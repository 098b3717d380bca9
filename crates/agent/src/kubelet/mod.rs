//! What kubelet has written down about who may have an image (KEP-2535), and what is added to it for images that kubelet
//! did not pull. Must not know containerd.
//!
//! Kubelet keeps one file for each image ID under `image_manager/pulled`, and one for each pull under way under
//! `image_manager/pulling`; it writes files by renaming, so a directory's time tells of every change.

mod record;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use prost::Message as _;
use thiserror::Error;
use tote_image::{Digest, Reference};
use tote_rpc::v1::{PullRecords, PulledRecord};

pub use record::Restriction;
use record::{Record, file_name, parse_intent};

/// How often the directories are looked at.
const POLL: Duration = Duration::from_secs(1);

/// Within this time of a change there may be another that the directory's time does not show.
const COARSE: Duration = Duration::from_millis(100);

/// The largest file that is read, and the most files. Kubelet's are some hundred bytes, one an image.
const MAX_FILE: u64 = 1 << 20;
const MAX_FILES: usize = 20_000;

/// The most bytes of a record that are told, as encoded; one that is larger names nobody.
const MAX_TOLD: usize = 32 << 10;

/// How often a record is merged again because kubelet wrote it meanwhile.
const ATTEMPTS: u32 = 5;

/// Kubelet's records of a node.
#[derive(Debug)]
pub struct Records {
    pulled: PathBuf,
    pulling: PathBuf,
    seen: Mutex<Seen>,
    writing: Mutex<()>,
}

/// When the two directories were changed last; `None` of one that is not there.
type Stamp = [Option<SystemTime>; 2];

#[derive(Debug, Default)]
struct Seen {
    /// As of the last reading, and whether it may be relied on.
    stamp: Option<Stamp>,
    is_settled: bool,
    pulls: Arc<Pulls>,
    /// Files that were complained about.
    told: HashSet<String>,
}

/// Kubelet's records as they were at one moment.
#[derive(Debug, Default)]
pub struct Pulls {
    /// By file name.
    pulled: HashMap<String, PulledRecord>,
    /// Normalized.
    pulling: HashSet<String>,
    /// They are there and cannot be read.
    unreadable: bool,
}

/// Why who may have an image could not be written down.
#[derive(Debug, Error)]
pub enum WriteError {
    /// There is no directory of records.
    #[error("kubelet of this node keeps no records in {0}")]
    NotKept(PathBuf),
    /// What stands is no record.
    #[error(
        "{0} cannot be added to ({1}); kubelet writes a new one when it pulls the image, so it may be removed"
    )]
    Damaged(PathBuf, String),
    /// The file system refused.
    #[error("{0} cannot be written: {1}")]
    Io(PathBuf, std::io::Error),
    /// Kubelet was faster every time.
    #[error("{0} changes all the time")]
    Contended(PathBuf),
}

impl Pulls {
    /// What is written down about an image, by its config's digest. A record that cannot be read names nobody.
    pub fn of(&self, image_id: &Digest) -> Option<PulledRecord> {
        if self.unreadable {
            return Some(PulledRecord::default());
        }
        let record = self.pulled.get(&file_name(image_id.as_str()))?;
        // A tenant may pull one image under many names with many secrets.
        Some(if record.encoded_len() > MAX_TOLD { PulledRecord::default() } else { record.clone() })
    }

    /// Whether kubelet is at pulling one of these (normalized) references: then who may have it is about to be written.
    pub fn is_pulling(&self, names: &[String]) -> bool {
        names.iter().any(|name| self.pulling.contains(name))
    }
}

impl Records {
    /// The records of the kubelet whose directory (`--root-dir`) this is.
    pub fn new(kubelet: &Path) -> Self {
        let directory = kubelet.join("image_manager");
        Self {
            pulled: directory.join("pulled"),
            pulling: directory.join("pulling"),
            seen: Mutex::default(),
            writing: Mutex::default(),
        }
    }

    /// Whether kubelet keeps any: it makes the directory at its start.
    pub fn kept(&self) -> PullRecords {
        match fs::metadata(&self.pulled) {
            Err(error) if error.kind() == ErrorKind::NotFound => PullRecords::None,
            _ => PullRecords::Kept,
        }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stamp(&self) -> Stamp {
        [&self.pulled, &self.pulling].map(|path| fs::metadata(path).and_then(|meta| meta.modified()).ok())
    }

    /// All records as they are now. Blocks.
    pub fn read(&self) -> Arc<Pulls> {
        let stamp = self.stamp();
        let now = SystemTime::now();
        let mut seen = self.seen();
        if seen.is_settled && seen.stamp == Some(stamp) {
            return seen.pulls.clone();
        }
        // First what is being pulled: what is no longer has its record by now.
        let pulling = files(&self.pulling).map(|files| {
            let images = files.into_values().filter_map(|bytes| parse_intent(&bytes.ok()?).ok());
            images.filter_map(|image| Some(image.parse::<Reference>().ok()?.to_string())).collect()
        });
        let pulled = files(&self.pulled).map(|files| {
            seen.told.retain(|name| files.contains_key(name));
            let records = files.into_iter().map(|(name, bytes)| {
                let record = recognize(&name, bytes).unwrap_or_else(|problem| {
                    if seen.told.insert(name.clone()) {
                        tracing::warn!(
                            file = name,
                            problem,
                            "a record of kubelet's is not understood: it names nobody"
                        );
                    }
                    PulledRecord::default()
                });
                (name, record)
            });
            records.collect()
        });
        let pulls = match (pulled, pulling) {
            (Ok(pulled), Ok(pulling)) => Pulls { pulled, pulling, unreadable: false },
            (Err(error), _) | (_, Err(error)) => {
                if seen.told.insert(String::new()) {
                    tracing::warn!(%error, "kubelet's records cannot be read: nobody counts as allowed to have an image");
                }
                Pulls { unreadable: true, ..Pulls::default() }
            }
        };
        let changed = stamp.iter().flatten().max();
        seen.is_settled = !pulls.unreadable
            && changed.is_none_or(|at| now.duration_since(*at).is_ok_and(|passed| passed > COARSE));
        seen.stamp = Some(stamp);
        seen.pulls = Arc::new(pulls);
        seen.pulls.clone()
    }

    /// Returns when the records are no longer what was last read, or may not be.
    pub async fn changed(&self) {
        loop {
            tokio::time::sleep(POLL).await;
            let (stamp, seen) = (self.stamp(), self.seen());
            if seen.stamp != Some(stamp) || !(seen.is_settled || seen.pulls.unreadable) {
                return;
            }
        }
    }

    /// Has it in kubelet's record of an image who alone may have that. Nothing that kubelet wrote is taken away; what a
    /// running kubelet knows it goes on with until its next start. Blocks.
    pub fn restrict(&self, image_id: &Digest, restriction: &Restriction) -> Result<(), WriteError> {
        let _one_at_a_time = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.kept() != PullRecords::Kept {
            return Err(WriteError::NotKept(self.pulled.clone()));
        }
        let name = file_name(image_id.as_str());
        let path = self.pulled.join(&name);
        // Kubelet leaves such a name alone.
        let temporary = self.pulled.join(format!(".tote-{name}.tmp"));
        let failed = |error| WriteError::Io(path.clone(), error);
        let damaged = |problem: String| WriteError::Damaged(path.clone(), problem);
        for _ in 0..ATTEMPTS {
            let bytes = standing(&path).map_err(failed)?;
            let record = bytes.as_deref().map(Record::parse).transpose();
            let record = record.map_err(|error| damaged(error.to_string()))?;
            if let Some(other) = record.as_ref().filter(|record| record.image_id() != image_id.as_str()) {
                return Err(damaged(format!("it is about {}", other.image_id())));
            }
            let Some(new) = Record::with(record.as_ref(), image_id, restriction, Timestamp::now()) else {
                return Ok(());
            };
            let new = new.to_bytes().map_err(|error| damaged(error.to_string()))?;
            let put = write(&temporary, &new).and_then(|()| put(&temporary, &path, bytes.as_deref()));
            let _ = fs::remove_file(&temporary);
            match put {
                Ok(true) => return File::open(&self.pulled).and_then(|d| d.sync_all()).map_err(failed),
                Ok(false) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Err(WriteError::Contended(path))
    }
}

/// A file's record, or what is wrong with it.
fn recognize(name: &str, bytes: std::io::Result<Vec<u8>>) -> Result<PulledRecord, String> {
    let bytes = bytes.map_err(|error| error.to_string())?;
    let record = Record::parse(&bytes).map_err(|error| error.to_string())?;
    if file_name(record.image_id()) != name {
        return Err(format!("it is about {}, which is not what its name says", record.image_id()));
    }
    Ok(record.to_wire())
}

/// The files that kubelet would read, by name; none of a directory that is not there.
fn files(directory: &Path) -> std::io::Result<HashMap<String, std::io::Result<Vec<u8>>>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(HashMap::new()),
        Err(error) => return Err(error),
    };
    let mut files = HashMap::new();
    for entry in entries {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if !name.starts_with("sha256-") || Path::new(&name).extension().is_some_and(|e| e == "tmp") {
            continue;
        }
        if files.len() == MAX_FILES {
            return Err(std::io::Error::other(format!(
                "more than {MAX_FILES} files in {}",
                directory.display()
            )));
        }
        match standing(&entry.path()).transpose() {
            None => {} // Gone since it was listed.
            Some(bytes) => drop(files.insert(name, bytes)),
        }
    }
    Ok(files)
}

/// The bytes of a file, if it is there.
fn standing(path: &Path) -> std::io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(std::io::Error::other(format!("has more than {MAX_FILE} bytes")));
    }
    Ok(Some(bytes))
}

fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Puts a file in the place of what was there; `false` if something else is there by now.
fn put(temporary: &Path, path: &Path, was: Option<&[u8]>) -> std::io::Result<bool> {
    if was.is_none() {
        return match fs::hard_link(temporary, path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error),
        };
    }
    if standing(path)?.as_deref() != was {
        return Ok(false);
    }
    fs::rename(temporary, path).map(|()| true)
}
