//! A directory tree, entry by entry, as root file systems are compared.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use tote_image::Digest;

/// Each entry: kind, mode, owner, links, attributes, digest of contents.
pub fn listed(root: &Path) -> BTreeMap<String, String> {
    let mut tree = BTreeMap::new();
    // By inode: the first path, in order, of each file with several names.
    let mut linked = BTreeMap::new();
    let mut left = vec![root.to_owned()];
    while let Some(directory) = left.pop() {
        let mut paths: Vec<_> = std::fs::read_dir(&directory).unwrap().map(|e| e.unwrap().path()).collect();
        paths.sort();
        for path in paths {
            let name = path.strip_prefix(root).unwrap().display().to_string();
            let found = path.symlink_metadata().unwrap();
            let owner = format!("{}:{}", found.uid(), found.gid());
            let mut told = vec![format!("{:o} {owner} device {:x}", found.mode(), found.rdev())];
            if found.is_symlink() {
                let to = path.read_link().unwrap();
                told.push(format!("-> {}", to.display()));
            } else if found.is_file() {
                told.push(Digest::sha256(&std::fs::read(&path).unwrap()).to_string());
                if found.nlink() > 1 {
                    let first = linked.entry(found.ino()).or_insert_with(|| name.clone());
                    told.push(format!("is {first}"));
                }
            } else if found.is_dir() {
                left.push(path.clone());
            }
            told.extend(attributes(&path));
            tree.insert(name, told.join(" "));
        }
    }
    tree
}

/// Extended attributes, by name.
fn attributes(path: &Path) -> Vec<String> {
    let mut names = vec![0; 64 << 10];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    let mut names: Vec<&[u8]> = names[..length].split(|b| *b == 0).filter(|name| !name.is_empty()).collect();
    names.sort_unstable();
    let value = |name: &&[u8]| {
        let mut value = vec![0; 64 << 10];
        let length = rustix::fs::lgetxattr(path, *name, &mut value[..]).unwrap();
        format!("{}={:02x?}", String::from_utf8_lossy(name), &value[..length])
    };
    names.iter().map(value).collect()
}
