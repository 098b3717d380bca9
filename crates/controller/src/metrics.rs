//! Counters and gauges. Names are API (alerts are written against them); prometheus-client appends `_total`.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::decide::{Count, Figures};

/// Phases in the order of [`Figures::jobs`].
const PHASES: [&str; 4] = ["Pending", "Transferring", "Imported", "Failed"];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabel {
    phase: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StepLabel {
    step: &'static str,
}

/// All metrics of the controller.
pub struct Metrics {
    registry: Registry,
    detected: Counter,
    salvageable: Counter,
    not_actionable: Counter,
    attempts: Counter,
    success: Counter,
    failure: Counter,
    wakes: Counter,
    moved: Counter,
    duration: Histogram,
    jobs: Family<PhaseLabel, Gauge>,
    nodes: Gauge,
    images: Gauge,
    waiting: Gauge,
    leading: Gauge,
    decision: Histogram,
    enrolments: Family<ResultLabel, Counter>,
    authority_changes: Family<StepLabel, Counter>,
    authority_ends: Gauge,
    resolves: Family<ResultLabel, Counter>,
    resolve_duration: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("tote");
        let mut counter = |name: &str, help: &str| {
            let counter: Counter<u64, AtomicU64> = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let detected = counter("detected", "Pods that waited for an image, once for each image");
        let salvageable =
            counter("salvageable", "Images found on other nodes, for which a SalvageJob was made");
        let not_actionable = counter("not_actionable", "Images that salvage cannot help with");
        let attempts = counter("salvage_attempts", "Attempts of SalvageJobs begun");
        let success = counter("salvage_success", "SalvageJobs that ended Imported");
        let failure = counter("salvage_failure", "SalvageJobs that ended Failed");
        let wakes = counter("pod_wakes", "Annotations of pods that make kubelet look again");
        let moved = Counter::default();
        registry.register_with_unit(
            "salvage_moved",
            "Bytes that came from other nodes",
            Unit::Bytes,
            moved.clone(),
        );
        let duration = Histogram::new(exponential_buckets(0.1, 2.0, 15));
        let help = "From the first Transferring of a SalvageJob to Imported";
        registry.register_with_unit("salvage_duration", help, Unit::Seconds, duration.clone());
        let jobs: Family<PhaseLabel, Gauge> = Family::default();
        registry.register("salvage_jobs", "SalvageJobs by phase", jobs.clone());
        let mut gauge = |name: &str, help: &str| {
            let gauge: Gauge = Gauge::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        let nodes = gauge("agents_connected", "Nodes whose agent has a session");
        let images = gauge("fleet_images", "Distinct images on the nodes");
        let waiting = gauge("pods_waiting", "Pods that wait for an image, opted in or not");
        let leading = gauge("leading", "1 while this replica leads");
        let authority_ends = gauge(
            "ca_expiry_timestamp_seconds",
            "When the signing certificate authority ends, in seconds since 1970; 0 on a replica that does not lead",
        );
        let enrolments: Family<ResultLabel, Counter> = Family::default();
        let help = "Agents that asked for a certificate, by what came of it";
        registry.register("enrolments", help, enrolments.clone());
        let authority_changes: Family<StepLabel, Counter> = Family::default();
        let help = "Steps of replacing the certificate authority";
        registry.register("ca_changes", help, authority_changes.clone());
        let resolves: Family<ResultLabel, Counter> = Family::default();
        registry.register(
            "registry_resolve",
            "Registries asked what a tag means, by what came of it",
            resolves.clone(),
        );
        let resolve_duration = Histogram::new(exponential_buckets(0.01, 2.0, 12));
        let help = "Time a registry took to tell what a tag means";
        registry.register_with_unit(
            "registry_resolve_duration",
            help,
            Unit::Seconds,
            resolve_duration.clone(),
        );
        let decision = Histogram::new(exponential_buckets(0.00001, 4.0, 10));
        registry.register_with_unit("decision", "Time one decision took", Unit::Seconds, decision.clone());
        Self {
            registry,
            detected,
            salvageable,
            not_actionable,
            attempts,
            success,
            failure,
            wakes,
            moved,
            duration,
            jobs,
            nodes,
            images,
            waiting,
            leading,
            decision,
            enrolments,
            authority_changes,
            authority_ends,
            resolves,
            resolve_duration,
        }
    }
}

impl Metrics {
    /// Counts one thing.
    pub fn count(&self, count: Count) {
        let counter = match count {
            Count::Detected => &self.detected,
            Count::Salvageable => &self.salvageable,
            Count::NotActionable => &self.not_actionable,
            Count::Attempt => &self.attempts,
            Count::Failure => &self.failure,
            Count::Wake => &self.wakes,
            Count::Success(took, bytes) => {
                self.duration.observe(took.as_secs_f64());
                self.moved.inc_by(bytes);
                &self.success
            }
        };
        counter.inc();
    }

    /// Sets the gauges; `took` is how long the decision took, in seconds.
    pub fn figures(&self, figures: &Figures, took: f64) {
        let gauge = |gauge: &Gauge, n: usize| {
            gauge.set(i64::try_from(n).unwrap_or(i64::MAX));
        };
        for (phase, n) in PHASES.iter().zip(figures.jobs) {
            gauge(&self.jobs.get_or_create(&PhaseLabel { phase }), n);
        }
        gauge(&self.nodes, figures.nodes_up);
        gauge(&self.images, figures.images);
        gauge(&self.waiting, figures.waiting);
        self.decision.observe(took);
    }

    /// An agent got a certificate (`signed`), or did not.
    pub fn enrolment(&self, result: &'static str) {
        self.enrolments.get_or_create(&ResultLabel { result }).inc();
    }

    /// A registry was asked, and took so long.
    pub fn looked_up(&self, result: &'static str, took: Duration) {
        self.resolves.get_or_create(&ResultLabel { result }).inc();
        self.resolve_duration.observe(took.as_secs_f64());
    }

    /// The certificate authority was staged, promoted or retired.
    pub fn authority_changed(&self, step: &'static str) {
        self.authority_changes.get_or_create(&StepLabel { step }).inc();
    }

    /// When the authority that signs ends, since 1970.
    pub fn authority_ends(&self, at: Duration) {
        self.authority_ends.set(i64::try_from(at.as_secs()).unwrap_or(i64::MAX));
    }

    /// Sets whether this replica leads.
    pub fn leading(&self, leading: bool) {
        self.leading.set(i64::from(leading));
        if !leading {
            self.authority_ends.set(0);
        }
    }

    /// All of them in the `OpenMetrics` text format.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_documented_names_are_there() {
        let metrics = Metrics::default();
        metrics.count(Count::Success(Duration::from_secs(1), 5));
        let figures = Figures { jobs: [1, 0, 2, 0], nodes_up: 3, images: 4, waiting: 5 };
        metrics.figures(&figures, 0.001);
        metrics.looked_up("found", Duration::from_secs(1));
        let text = metrics.text().unwrap();
        for line in [
            "tote_detected_total 0",
            "tote_salvageable_total 0",
            "tote_not_actionable_total 0",
            "tote_salvage_success_total 1",
            "tote_salvage_failure_total 0",
            "tote_salvage_moved_bytes_total 5",
            "tote_salvage_jobs{phase=\"Imported\"} 2",
            "tote_agents_connected 3",
            "tote_registry_resolve_total{result=\"found\"} 1",
            "tote_registry_resolve_duration_seconds_count 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
        }
    }
}
