//! A real Debian root file system out of Debian's own packages, unpacked without root and without running any
//! of their scripts; apt resolves, downloads and verifies them. Kept in the cache directory, for it takes long.

use super::layout::LayerWriter;
use super::{Build, Compression, Descriptor, Entry, Image, Layer, Layout, MediaTypes};
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Part of the cache's key: raise it when the layers below change.
const VERSION: u32 = 1;

/// Packages of each layer, lowest first; each layer also holds what its packages need and no lower layer has.
const LAYERS: [&[&str]; 3] = [&["?essential"], &["python3-minimal", "nginx-light", "git"], &["g++"]];

/// Directories that are symbolic links into /usr on Debian 12; packages still name some paths through them.
const MERGED: [&str; 4] = ["bin", "sbin", "lib", "lib64"];

/// The layers of a Debian root file system, in the cache.
#[derive(Clone, Debug)]
pub struct Debian {
    layout: Layout,
    layers: Vec<Cached>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Cached {
    diff_id: String,
    gzip: Descriptor,
    zstd: Descriptor,
}

impl Debian {
    /// Writes an image of these layers whose digests and chainIDs are its own: a lowest layer that holds the seed,
    /// and a frame at the end of each other layer that changes the blob's digest and not its contents.
    ///
    /// # Errors
    /// If a blob cannot be read or written, or the compression is neither gzip nor zstd.
    pub fn image(&self, layout: &Layout, compression: Compression, seed: &str) -> Result<Image> {
        let media_type = MediaTypes::Oci.layer(compression)?;
        let lowest = Layer::new(compression)
            .with(Entry::file("seed", seed.to_owned()))
            .with(Entry::file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"));
        let (descriptor, diff_id) = layout.put_layer(media_type, &lowest)?;
        let (mut layers, mut diff_ids) = (vec![descriptor], vec![diff_id]);
        for cached in &self.layers {
            let layer = match compression {
                Compression::Gzip => &cached.gzip,
                Compression::Zstd => &cached.zstd,
                Compression::None => bail!("the Debian layers are kept in gzip and zstd alone"),
            };
            layers.push(layout.put_resealed(&self.layout.blob(&layer.digest), layer, seed)?);
            diff_ids.push(cached.diff_id.clone());
        }
        let built =
            Build::new().config("Cmd", json!(["/bin/sleep", "infinity"])).finish(layout, layers, diff_ids)?;
        Ok(Image {
            layout: layout.clone(),
            target: Descriptor { platform: None, ..built.manifest.clone() },
            platforms: vec![built],
        })
    }
}

/// The layers from the cache directory; builds them if they are not there (a minute or two, with progress on
/// standard error). Safe to call from several processes at once, and after one that was killed.
///
/// # Errors
/// If apt cannot get the packages or the cache directory cannot be written.
pub fn debian(cache: &Path) -> Result<Debian> {
    fs::create_dir_all(cache).with_context(|| format!("making {}", cache.display()))?;
    let root = cache.join(format!("debian-image-{VERSION}"));
    let lock = File::create(root.with_extension("lock"))?;
    lock.lock().context("waiting for another process that builds the Debian layers")?;
    let list = root.join("layers.json");
    if !list.exists() {
        let draft = root.with_extension("draft");
        if draft.exists() {
            fs::remove_dir_all(&draft).with_context(|| format!("removing {}", draft.display()))?;
        }
        let layers = build(&draft)?;
        fs::write(draft.join("layers.json"), serde_json::to_vec_pretty(&layers)?)?;
        fs::rename(&draft, &root).with_context(|| format!("writing {}", root.display()))?;
    }
    let layers = serde_json::from_slice(&fs::read(&list)?)
        .with_context(|| format!("reading {}: remove its directory to build it again", list.display()))?;
    Ok(Debian { layout: Layout::at(root)?, layers })
}

fn build(root: &Path) -> Result<Vec<Cached>> {
    let start = Instant::now();
    let say = |what: &str| eprintln!("debian image: {what} [{:.0} s]", start.elapsed().as_secs_f32());
    say("updating the package lists"); // Those of weeks ago name files that are gone.
    let updated = Command::new("apt-get").args(["-qq", "update"]).stdin(Stdio::null()).output()?;
    if !updated.status.success() {
        say(&format!(
            "goes on with the lists there are: {}",
            String::from_utf8_lossy(&updated.stderr).trim()
        ));
    }
    let layout = Layout::at(root)?;
    let packages = root.join("packages");
    fs::create_dir_all(packages.join("partial"))?;
    fs::write(packages.join("status"), "")?;
    // Before the download: apt lists only what it has yet to fetch.
    let contents = LAYERS
        .iter()
        .scan(Vec::new(), |wanted, names| {
            wanted.extend_from_slice(names);
            Some(files(&packages, wanted))
        })
        .collect::<Result<Vec<_>>>()?;
    say("downloading about 170 packages (125 MB)");
    apt(&packages, &["--download-only"], &LAYERS.concat())?;
    let (mut below, mut layers) = (BTreeSet::new(), Vec::new());
    for contents in contents {
        let own: Vec<PathBuf> = contents.difference(&below).map(|f| packages.join(f)).collect();
        let (nth, of) = (layers.len() + 1, LAYERS.len());
        say(&format!("packing layer {nth} of {of} ({} packages, gzip and zstd)", own.len()));
        layers.push(pack(&layout, &own, below.is_empty())?);
        below = contents;
    }
    fs::remove_dir_all(&packages)?;
    say("done");
    Ok(layers)
}

/// File names of the packages asked for and of all that they need.
fn files(packages: &Path, names: &[&str]) -> Result<BTreeSet<String>> {
    // A line of --print-uris: 'URI' file size hash.
    let files: BTreeSet<String> = apt(packages, &["--print-uris"], names)?
        .lines()
        .filter_map(|line| line.split_whitespace().nth(1).map(str::to_owned))
        .collect();
    ensure!(!files.is_empty(), "apt names no package file for {names:?}: is `apt-get update` needed?");
    Ok(files)
}

/// Runs `apt-get install` over an empty list of installed packages, so that the answer holds every dependency.
/// It installs nothing: `arguments` says what it does in place of that. Returns its standard output.
fn apt(packages: &Path, arguments: &[&str], names: &[&str]) -> Result<String> {
    let output = Command::new("apt-get")
        .args(["-y", "-qq", "--no-install-recommends", "-o", "Debug::NoLocking=1"])
        .arg("-o")
        .arg(format!("Dir::State::status={}", packages.join("status").display()))
        .arg("-o")
        .arg(format!("Dir::Cache::archives={}/", packages.display()))
        .args(arguments)
        .arg("install")
        .args(names)
        .stdin(Stdio::null())
        .output()
        .context("running apt-get: the Debian image needs a Debian machine")?;
    ensure!(
        output.status.success(),
        "apt-get {arguments:?} failed ({}): {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}

fn pack(layout: &Layout, packages: &[PathBuf], lowest: bool) -> Result<Cached> {
    let writer = |c| layout.writer(MediaTypes::Oci.layer(c)?, c, false);
    let mut tar = tar::Builder::new(Both(writer(Compression::Gzip)?, writer(Compression::Zstd)?));
    if lowest {
        for name in MERGED {
            let mut header = header(tar::EntryType::Symlink);
            tar.append_link(&mut header, name, format!("usr/{name}"))?;
        }
    }
    let mut directories: BTreeSet<PathBuf> = MERGED.iter().map(PathBuf::from).collect();
    for package in packages {
        unpack(package, &mut tar, &mut directories)
            .with_context(|| format!("packing {}", package.display()))?;
    }
    let Both(gzip, zstd) = tar.into_inner()?;
    let ((gzip, diff_id), (zstd, _)) = (gzip.finish()?, zstd.finish()?);
    Ok(Cached { diff_id, gzip, zstd })
}

/// Appends the files of one package, each directory once.
fn unpack(package: &Path, tar: &mut tar::Builder<Both>, directories: &mut BTreeSet<PathBuf>) -> Result<()> {
    let mut child =
        Command::new("dpkg-deb").arg("--fsys-tarfile").arg(package).stdout(Stdio::piped()).spawn()?;
    let stdout = child.stdout.take().context("dpkg-deb has no standard output")?;
    for entry in tar::Archive::new(stdout).entries()? {
        let entry = entry?;
        let path = merged(&entry.path()?);
        let kind = entry.header().entry_type();
        if path.as_os_str().is_empty() || (kind.is_dir() && !directories.insert(path.clone())) {
            continue;
        }
        let mut header = entry.header().clone();
        match entry.link_name()? {
            Some(target) if kind.is_hard_link() => tar.append_link(&mut header, &path, merged(&target))?,
            Some(target) if kind.is_symlink() => tar.append_link(&mut header, &path, target)?,
            _ => tar.append_data(&mut header, &path, entry)?,
        }
    }
    let status = child.wait()?;
    ensure!(status.success(), "dpkg-deb failed: {status}");
    Ok(())
}

/// A package's path (`./bin/sh`) as it is on a file system with merged /usr (`usr/bin/sh`).
fn merged(path: &Path) -> PathBuf {
    let path = path.strip_prefix("./").unwrap_or(path);
    let mut parts = path.components();
    let first = parts.next().map(|c| c.as_os_str().to_owned()).unwrap_or_default();
    if MERGED.iter().any(|m| first == **m) && parts.clone().next().is_some() {
        Path::new("usr").join(path)
    } else {
        path.to_owned()
    }
}

fn header(kind: tar::EntryType) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(0o777);
    header.set_mtime(super::layer::MTIME);
    header.set_size(0);
    header
}

/// Writes the same tar into two blobs.
struct Both(LayerWriter, LayerWriter);

impl std::io::Write for Both {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write_all(bytes)?;
        self.1.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()?;
        self.1.flush()
    }
}
