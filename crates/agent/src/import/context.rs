//! What all transfers of an agent share. Must not know what one of them does.

use std::sync::Arc;
use std::time::Duration;

use tote_rpc::BlobClient;

use super::ahead::Ahead;
use super::fetch::Patience;
use super::flights::Flights;
use super::traffic::Traffic;
use super::underway::Underway;
use crate::bandwidth::Bandwidth;
use crate::containerd::Containerd;
use crate::kubelet::Records;
use crate::metrics::Metrics;

/// What all transfers of an agent share.
pub struct Context {
    /// The node's containerd.
    pub containerd: Arc<dyn Containerd>,
    /// The client to other agents.
    pub peers: BlobClient,
    /// The cap over all transfers.
    pub bandwidth: Bandwidth,
    /// How patient to be with peers.
    pub patience: Patience,
    /// How long CRI may take to see new records.
    pub visible_within: Duration,
    /// Where imports and received bytes are counted.
    pub metrics: Arc<Metrics>,
    /// Who moves which blob.
    pub flights: Flights,
    /// Which images are on their way here.
    pub underway: Underway,
    /// How busy the peers are, and how fast.
    pub traffic: Traffic,
    /// Room for what comes before it can be written.
    pub ahead: Ahead,
    /// Where kubelet writes down who may have an image.
    pub records: Option<Arc<Records>>,
}

impl Context {
    /// With the default patience.
    pub fn new(containerd: Arc<dyn Containerd>, peers: BlobClient, bandwidth: Bandwidth) -> Self {
        Self {
            containerd,
            peers,
            bandwidth,
            patience: Patience::default(),
            // A node that starts a hundred pods at once lets CRI wait.
            visible_within: Duration::from_secs(60),
            metrics: Arc::default(),
            flights: Flights::default(),
            underway: Underway::default(),
            traffic: Traffic::default(),
            ahead: Ahead::default(),
            records: None,
        }
    }
}
