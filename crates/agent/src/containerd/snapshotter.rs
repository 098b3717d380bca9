//! Which snapshotter CRI uses, from what CRI and containerd's introspection tell. Pure.

/// Snapshotters that keep unpacked layers on the node itself, so that unpacking into them is all there is to do.
/// Others (stargz, nydus, soci, ...) fetch what they lack from a registry when a container reads it.
const LOCAL: [&str; 7] = ["overlayfs", "native", "btrfs", "zfs", "devmapper", "blockfile", "erofs"];

/// The directory below containerd's root that a built-in snapshotter keeps its state in: this and its name.
const DIRECTORY: &str = "io.containerd.snapshotter.v1.";

/// A snapshotter plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plugin {
    /// Its name.
    pub id: String,
    /// The directory it exports as its root, if it does.
    pub root: Option<String>,
    /// Why it did not load.
    pub failed: Option<String>,
}

/// The snapshotter whose root is `mountpoint`, which CRI's `ImageFsInfo` gave (since 1.6 that is the root of
/// the snapshotter configured for CRI). Older containerds export no root: then the directory's name tells.
pub(super) fn choose(mountpoint: &str, plugins: &[Plugin]) -> Result<String, String> {
    let trimmed = mountpoint.trim_end_matches('/');
    let by_root = plugins.iter().find(|plugin| {
        plugin.root.as_deref().is_some_and(|root| root.trim_end_matches('/') == trimmed && !root.is_empty())
    });
    let by_name = || {
        let name = trimmed.rsplit('/').next().unwrap_or_default().strip_prefix(DIRECTORY)?;
        plugins.iter().find(|plugin| plugin.id == name)
    };
    let Some(plugin) = by_root.or_else(by_name) else {
        let known: Vec<&str> = plugins.iter().map(|plugin| plugin.id.as_str()).collect();
        return Err(format!(
            "CRI keeps images at {mountpoint:?}, which is the root of none of containerd's snapshotters ({})",
            known.join(", ")
        ));
    };
    if let Some(reason) = &plugin.failed {
        return Err(format!("CRI's snapshotter {} did not load: {reason}", plugin.id));
    }
    if !LOCAL.contains(&plugin.id.as_str()) {
        return Err(format!(
            "CRI's snapshotter {} is not one that keeps whole layers on the node ({}); images for it cannot be unpacked",
            plugin.id,
            LOCAL.join(", ")
        ));
    }
    Ok(plugin.id.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plugin(id: &str, root: Option<&str>) -> Plugin {
        Plugin { id: id.to_owned(), root: root.map(str::to_owned), failed: None }
    }

    #[test]
    fn finds_cris_own() {
        let exporting = [
            plugin("native", Some("/c/io.containerd.snapshotter.v1.native")),
            plugin("overlayfs", Some("/fast/overlay")),
            plugin("stargz", Some("/run/stargz")),
        ];
        let silent = [plugin("overlayfs", None), plugin("native", None)];
        for (mountpoint, plugins, outcome) in [
            ("/fast/overlay", &exporting[..], Ok("overlayfs")),
            ("/fast/overlay/", &exporting, Ok("overlayfs")),
            ("/c/io.containerd.snapshotter.v1.native", &exporting, Ok("native")),
            ("/c/io.containerd.snapshotter.v1.native", &silent, Ok("native")),
            ("/run/stargz", &exporting, Err("stargz is not one that keeps whole layers")),
            ("/elsewhere", &exporting, Err("the root of none")),
            ("", &silent, Err("the root of none")),
        ] {
            match (choose(mountpoint, plugins), outcome) {
                (Ok(found), Ok(wanted)) => assert_eq!(found, wanted, "{mountpoint}"),
                (Err(said), Err(says)) => assert!(said.contains(says), "{mountpoint}: {said}"),
                (found, wanted) => panic!("{mountpoint}: {found:?}, not {wanted:?}"),
            }
        }
    }

    #[test]
    fn says_why_it_did_not_load() {
        let broken =
            Plugin { failed: Some("no overlay in the kernel".to_owned()), ..plugin("overlayfs", Some("/o")) };
        assert!(choose("/o", &[broken]).unwrap_err().contains("no overlay in the kernel"));
    }
}
