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
use crate::notify::NotificationType;

/// What may come of an agent's asking for a certificate.
pub const ENROLMENTS: [&str; 11] = [
    "signed",
    "no_token",
    "unknown",
    "token",
    "audience",
    "service_account",
    "other_pod",
    "other_node",
    "other_address",
    "signing",
    "not_taken",
];

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

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NotificationLabels {
    r#type: &'static str,
    result: &'static str,
}

/// All metrics of the controller.
pub struct Metrics {
    registry: Registry,
    detected: Counter,
    salvageable: Counter,
    not_actionable: Counter,
    corrupt: Counter,
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
    notifications: Family<NotificationLabels, Counter>,
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
        let corrupt = counter("corrupt_images", "Images that stand on a pod's node with blobs missing");
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
        for result in ENROLMENTS {
            // From the beginning, so that the first of its kind is an increase.
            drop(enrolments.get_or_create(&ResultLabel { result }));
        }
        let authority_changes: Family<StepLabel, Counter> = Family::default();
        let help = "Steps of replacing the certificate authority";
        registry.register("ca_changes", help, authority_changes.clone());
        let notifications: Family<NotificationLabels, Counter> = Family::default();
        let help = "Webhook notifications by type and by what came of them: sent, failed or dropped";
        registry.register("notifications", help, notifications.clone());
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
        let metrics = Self {
            registry,
            detected,
            salvageable,
            not_actionable,
            corrupt,
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
            notifications,
            resolves,
            resolve_duration,
        };
        metrics.gauges(&Figures::default());
        metrics
    }
}

impl Metrics {
    /// Counts one thing.
    pub fn count(&self, count: Count) {
        let counter = match count {
            Count::Detected => &self.detected,
            Count::Salvageable => &self.salvageable,
            Count::NotActionable => &self.not_actionable,
            Count::Corrupt => &self.corrupt,
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
        self.gauges(figures);
        self.decision.observe(took);
    }

    fn gauges(&self, figures: &Figures) {
        let gauge = |gauge: &Gauge, n: usize| {
            gauge.set(i64::try_from(n).unwrap_or(i64::MAX));
        };
        for (phase, n) in PHASES.iter().zip(figures.jobs) {
            gauge(&self.jobs.get_or_create(&PhaseLabel { phase }), n);
        }
        gauge(&self.nodes, figures.nodes_up);
        gauge(&self.images, figures.images);
        gauge(&self.waiting, figures.waiting);
    }

    /// An agent got a certificate (`signed`), or did not.
    pub fn enrolment(&self, result: &'static str) {
        debug_assert!(ENROLMENTS.contains(&result), "{result} is not in ENROLMENTS");
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

    /// What comes of notifications of these types is counted from 0 on, so that the first of each is an increase.
    pub fn notifications(&self, types: impl IntoIterator<Item = NotificationType>) {
        for type_ in types {
            for result in ["sent", "failed", "dropped"] {
                let _ =
                    self.notifications.get_or_create(&NotificationLabels { r#type: type_.name(), result });
            }
        }
    }

    /// A notification was `sent`, `failed` for good, or `dropped` because too many waited.
    pub fn notification(&self, type_: NotificationType, result: &'static str) {
        let labels = NotificationLabels { r#type: type_.name(), result };
        self.notifications.get_or_create(&labels).inc();
    }

    /// When the authority that signs ends, since 1970.
    pub fn authority_ends(&self, at: Duration) {
        self.authority_ends.set(i64::try_from(at.as_secs()).unwrap_or(i64::MAX));
    }

    /// Sets whether this replica leads. One that does not knows of no jobs and no pods.
    pub fn leading(&self, leading: bool) {
        self.leading.set(i64::from(leading));
        if !leading {
            self.authority_ends.set(0);
            self.gauges(&Figures::default());
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

    /// Alerts and dashboards are written against these: a change is a break.
    const FAMILIES: [&str; 22] = [
        "tote_agents_connected gauge",
        "tote_ca_changes_total{step} counter",
        "tote_ca_expiry_timestamp_seconds gauge",
        "tote_corrupt_images_total counter",
        "tote_decision_seconds histogram",
        "tote_detected_total counter",
        "tote_enrolments_total{result} counter",
        "tote_fleet_images gauge",
        "tote_leading gauge",
        "tote_not_actionable_total counter",
        "tote_notifications_total{type,result} counter",
        "tote_pod_wakes_total counter",
        "tote_pods_waiting gauge",
        "tote_registry_resolve_duration_seconds histogram",
        "tote_registry_resolve_total{result} counter",
        "tote_salvage_attempts_total counter",
        "tote_salvage_duration_seconds histogram",
        "tote_salvage_failure_total counter",
        "tote_salvage_jobs{phase} gauge",
        "tote_salvage_moved_bytes_total counter",
        "tote_salvage_success_total counter",
        "tote_salvageable_total counter",
    ];

    /// The families in the text, with the names of their labels.
    fn families(text: &str) -> Vec<String> {
        let mut families: Vec<String> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE "))
            .map(|line| {
                let (name, kind) = line.split_once(' ').unwrap();
                let sample = match kind {
                    "counter" => format!("{name}_total"),
                    "histogram" => format!("{name}_count"),
                    _ => name.to_owned(),
                };
                let labels = text.lines().find_map(|line| line.strip_prefix(&sample)?.strip_prefix('{'));
                let labels =
                    labels.and_then(|rest| rest.split_once('}')).map_or(String::new(), |(labels, _)| {
                        let names: Vec<&str> =
                            labels.split(',').map(|l| l.split_once('=').unwrap().0).collect();
                        format!("{{{}}}", names.join(","))
                    });
                format!("{}{labels} {kind}", sample.trim_end_matches("_count"))
            })
            .collect();
        families.sort();
        families
    }

    #[test]
    fn names_types_and_labels_are_as_documented() {
        let metrics = Metrics::default();
        metrics.looked_up("found", Duration::from_secs(1));
        metrics.authority_changed("staged");
        metrics.notifications(NotificationType::ALL);
        assert_eq!(families(&metrics.text().unwrap()), FAMILIES);
    }

    #[test]
    fn what_is_counted_and_set_is_shown_and_a_replica_that_does_not_lead_shows_no_jobs() {
        let metrics = Metrics::default();
        metrics.count(Count::Success(Duration::from_secs(1), 5));
        metrics.notification(NotificationType::SalvageFailed, "dropped");
        let figures = Figures { jobs: [1, 0, 2, 0], nodes_up: 3, images: 4, waiting: 5 };
        metrics.figures(&figures, 0.001);
        metrics.looked_up("found", Duration::from_secs(1));
        let has = |line: &str| {
            let text = metrics.text().unwrap();
            assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
        };
        for line in [
            "tote_detected_total 0",
            "tote_salvage_success_total 1",
            "tote_salvage_moved_bytes_total 5",
            "tote_salvage_jobs{phase=\"Imported\"} 2",
            "tote_notifications_total{type=\"salvage_failed\",result=\"dropped\"} 1",
            "tote_agents_connected 3",
            "tote_registry_resolve_total{result=\"found\"} 1",
            "tote_registry_resolve_duration_seconds_count 1",
        ] {
            has(line);
        }
        metrics.leading(false);
        for line in
            ["tote_salvage_jobs{phase=\"Imported\"} 0", "tote_pods_waiting 0", "tote_salvage_success_total 1"]
        {
            has(line);
        }
    }
}
