//! What a node's containerd holds, seen by `ctr`: for asserting that an image is whole, that it survives a
//! garbage collection, and that nothing is left behind.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tote_image::{Digest, chain_ids};

use crate::cluster::Node;
use crate::host;
use crate::images::Image;

/// Fails unless `ctr images check` says that the image is complete and unpacked.
pub fn assert_whole(node: &Node, name: &str) -> Result<()> {
    let table = node.ctr(&["images", "check", &format!("name=={name}")])?;
    let row = table.lines().find(|line| line.split_whitespace().next() == Some(name));
    let row = row.with_context(|| format!("{name} is not on {}:\n{table}", node.name()))?;
    ensure!(row.contains(" complete (") || row.contains("\tcomplete ("), "on {}: {row}", node.name());
    ensure!(row.trim_end().ends_with("true"), "not unpacked on {}: {row}", node.name());
    Ok(())
}

/// Makes containerd collect its garbage, and returns when it has.
pub fn collect_garbage(node: &Node) -> Result<()> {
    let made = node.ctr(&["leases", "create"])?;
    let id = made.lines().last().context("ctr names no lease")?;
    node.ctr(&["leases", "delete", "--sync", id])?;
    Ok(())
}

/// Leases and ingests of the operator that are on the node.
pub fn unfinished(node: &Node) -> Result<Vec<String>> {
    let leases = node.ctr(&["leases", "list", "-q"])?;
    let mut found: Vec<String> =
        leases.lines().filter(|id| id.starts_with("tote")).map(|id| format!("lease {id}")).collect();
    let ingests = node.ctr(&["content", "active"])?;
    found.extend(
        ingests.lines().skip(1).filter(|line| line.contains("tote")).map(|line| format!("ingest {line}")),
    );
    Ok(found)
}

/// Names of the image records that have this target.
pub fn records(node: &Node, digest: &str) -> Result<Vec<String>> {
    let table = node.ctr(&["images", "list"])?;
    let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    Ok(rows.filter(|row| row.get(2) == Some(&digest)).map(|row| row[0].to_owned()).collect())
}

/// Which of these digests are in the content store.
pub fn present(node: &Node, digests: &[String]) -> Result<Vec<String>> {
    let all = node.ctr(&["content", "list", "-q"])?;
    Ok(all.lines().filter(|line| digests.iter().any(|digest| digest == line)).map(str::to_owned).collect())
}

/// Removes every record of the image, then asserts that a collection takes its blobs and snapshots as well.
pub fn remove_whole(node: &Node, image: &Image) -> Result<()> {
    let digest = image.digest();
    let names = records(node, digest)?;
    ensure!(!names.is_empty(), "no record of {digest} on {}", node.name());
    let mut command = vec!["images", "remove", "--sync"];
    command.extend(names.iter().map(String::as_str));
    node.ctr(&command)?;
    assert_gone(node, image)
}

/// Asserts that nothing of the image is on the node once garbage is collected: no record, no blob, no snapshot. A
/// dead container holds its snapshot until kubelet removes it: at once, or when it next looks for such containers, once
/// a minute (`ContainerGCPeriod` in `kubernetes/pkg/kubelet/kubelet.go`).
pub fn assert_gone(node: &Node, image: &Image) -> Result<()> {
    let names = records(node, image.digest())?;
    ensure!(names.is_empty(), "on {} these records stand: {}", node.name(), names.join(", "));
    let blobs: Vec<String> = image.needed()?.into_iter().map(|blob| blob.digest).collect();
    let diff_ids: Vec<Digest> =
        image.host()?.diff_ids.iter().map(|id| id.parse()).collect::<Result<_, _>>()?;
    let chains = chain_ids(&diff_ids);
    let mut left = Vec::new();
    let gone = host::wait_until("blobs and snapshots to go", Duration::from_secs(150), || {
        collect_garbage(node)?;
        let snapshots = node.ctr(&["snapshots", "list"])?;
        left = present(node, &blobs)?;
        left.extend(
            chains.iter().filter(|chain| snapshots.contains(chain.as_str())).map(ToString::to_string),
        );
        Ok(left.is_empty())
    });
    gone.with_context(|| format!("on {} these stay without a record: {}", node.name(), left.join(", ")))
}
