//! A hundred pods begin to fail at once, on a cluster of their own; `make bench` has three hundred. Times are told, not judged: they
//! are the machine's.
//! Needs root, what `e2e/tools.sh` builds, and the operator's image.

use anyhow::Result;
use tote_e2e::cluster::Cluster;
use tote_e2e::load;

/// The cluster's name.
const CLUSTER: &str = "load";

/// Ten pods of each.
const IMAGES: usize = 10;

#[tokio::test(flavor = "multi_thread")]
async fn each_image_goes_to_each_node_once_and_all_pods_run() -> Result<()> {
    Cluster::down(CLUSTER)?;
    let outcome = load::run(CLUSTER, IMAGES, |what| println!("{what}")).await;
    Cluster::down(CLUSTER)?;
    let report = outcome?;
    println!("{report}");
    report.check()
}
