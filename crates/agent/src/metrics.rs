//! The agent's own figures, for Prometheus.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use tote_rpc::Refusal;

/// How an import ended: `imported`, or the cause of its failure.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    result: &'static str,
}

/// Why somebody was refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// Who gave something, or did not.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Giver {
    node: String,
}

/// Counters and gauges. They are shared with the registry that encodes them.
#[derive(Debug, Default)]
pub struct Metrics {
    served_bytes: Counter,
    received_bytes: Counter,
    imports: Family<Outcome, Counter>,
    running: Gauge,
    images: Gauge,
    sessions: Gauge,
    refused: Family<Reason, Counter>,
    lies: Family<Giver, Counter>,
    left: Family<Giver, Counter>,
    certificates: Counter,
    expires: Gauge,
    first_certificate: Gauge<f64, AtomicU64>,
}

impl Metrics {
    /// Names them all, below `tote_agent_`.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("tote_agent");
        let (served, received) = (self.served_bytes.clone(), self.received_bytes.clone());
        registry.register_with_unit("served", "Bytes of blobs given to other nodes", Unit::Bytes, served);
        registry.register_with_unit("received", "Bytes of blobs got from other nodes", Unit::Bytes, received);
        registry.register("imports", "Imports that have ended", self.imports.clone());
        registry.register("imports_running", "Imports under way", self.running.clone());
        registry.register("images", "Distinct targets of image records", self.images.clone());
        registry.register("sessions", "Sessions with controllers", self.sessions.clone());
        for refusal in Refusal::ALL {
            // So that the first of each is an increase.
            let _ = self.refused.get_or_create(&Reason { reason: refusal.label() });
        }
        registry.register("refused", "Connections and calls that were refused", self.refused.clone());
        let help = "Blobs that a node gave otherwise than they are";
        registry.register("lies", help, self.lies.clone());
        let help =
            "Requests for parts of blobs that got no answer, broke off, or were left for much faster nodes";
        registry.register("requests_left", help, self.left.clone());
        let help = "Certificates that the controller gave";
        registry.register("certificates", help, self.certificates.clone());
        let help = "When the present certificate ends, in seconds since 1970; 0 without one";
        registry.register("certificate_expiry_timestamp_seconds", help, self.expires.clone());
        let help = "From the agent's start to its first certificate";
        registry.register("first_certificate_seconds", help, self.first_certificate.clone());
    }

    /// Bytes went to another node.
    pub fn served(&self, bytes: u64) {
        self.served_bytes.inc_by(bytes);
    }

    /// Bytes came from another node.
    pub fn received(&self, bytes: u64) {
        self.received_bytes.inc_by(bytes);
    }

    /// A node gave a blob otherwise than it is.
    pub fn lied(&self, node: &str) {
        self.lies.get_or_create(&Giver { node: node.to_owned() }).inc();
    }

    /// A node that was asked for part of a blob did not give all of it: what was on its way is lost, and asked for again.
    pub fn left(&self, node: &str) {
        self.left.get_or_create(&Giver { node: node.to_owned() }).inc();
    }

    /// An import began.
    pub fn import_started(&self) {
        self.running.inc();
    }

    /// An import ended, with this result.
    pub fn import_ended(&self, result: &'static str) {
        self.running.dec();
        self.imports.get_or_create(&Outcome { result }).inc();
    }

    /// Somebody was refused.
    pub fn refused(&self, refusal: Refusal) {
        self.refused.get_or_create(&Reason { reason: refusal.label() }).inc();
    }

    /// A certificate was given, valid until so many seconds since 1970; `took` is how long the first was waited for.
    pub fn certified(&self, expires: u64, took: Option<Duration>) {
        self.certificates.inc();
        self.expires.set(i64::try_from(expires).unwrap_or(i64::MAX));
        if let Some(took) = took {
            self.first_certificate.set(took.as_secs_f64());
        }
    }

    /// How many images the node holds.
    pub fn images(&self, images: usize) {
        self.images.set(i64::try_from(images).unwrap_or(i64::MAX));
    }

    /// A session began (1) or ended (-1).
    pub fn session(&self, change: i64) {
        self.sessions.inc_by(change);
    }
}
