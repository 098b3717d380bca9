//! Alerts and monitors: over metrics that there are, selecting what is there.

use serde_json::{Value, json};
use tote_controller::metrics::Metrics;
use tote_controller::notify::NotificationType;

use crate::template;

/// The expressions of the chart's alerts, as Prometheus is given them.
fn alerts() -> Vec<(String, String)> {
    let values = ["prometheusRule.enabled=true", "notifications.url=https://hooks.test/"];
    let output = template(&values).unwrap();
    let rule = output.split("\n---\n").find(|d| d.contains("\nkind: PrometheusRule\n")).unwrap();
    let rule: Value = serde_saphyr::from_str(rule).unwrap();
    let rules = rule["spec"]["groups"][0]["rules"].as_array().unwrap();
    let text = |rule: &Value, field: &str| rule[field].as_str().unwrap().to_owned();
    for rule in rules {
        assert!(
            ["info", "warning", "critical"].contains(&rule["labels"]["severity"].as_str().unwrap()),
            "{rule}"
        );
        assert!(rule["annotations"]["summary"].is_string() && rule["annotations"]["description"].is_string());
    }
    rules.iter().map(|rule| (text(rule, "alert"), text(rule, "expr"))).collect()
}

/// A selector `name{label="value"}` of an expression: its name and the names of its labels.
fn selectors(expression: &str) -> Vec<(String, Vec<String>)> {
    let mut found = Vec::new();
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut rest = expression;
    while let Some(at) = rest.find("tote_") {
        rest = &rest[at..];
        let (name, after) = rest.split_at(rest.find(|c| !is_of_name(c)).unwrap_or(rest.len()));
        let labels =
            after.strip_prefix('{').and_then(|labels| labels.split_once('}')).map(|(labels, _)| labels);
        let names = labels.into_iter().flat_map(|labels| labels.split(','));
        let names = names.map(|label| label.split(['=', '!']).next().unwrap().trim().to_owned());
        found.push((name.to_owned(), names.collect()));
        rest = after;
    }
    found
}

#[test]
fn alerts_are_over_metrics_that_exist() {
    let metrics = Metrics::default();
    metrics.notifications(NotificationType::ALL);
    let exported = metrics.text().unwrap();
    let alerts = alerts();
    assert_eq!(alerts.len(), 9, "{alerts:?}");
    for (alert, expression) in alerts {
        let selectors = selectors(&expression);
        assert!(!selectors.is_empty(), "{alert}: {expression}");
        for (name, labels) in selectors {
            let sample = exported.lines().find(|line| line.split(['{', ' ']).next() == Some(&name));
            let sample = sample.unwrap_or_else(|| panic!("{alert}: no {name} in\n{exported}"));
            for label in labels {
                assert!(sample.contains(&format!("{label}=\"")), "{alert}: no label {label} in {sample}");
            }
        }
    }
    let without = template(&["prometheusRule.enabled=true"]).unwrap();
    assert!(!without.contains("ToteNotificationsLost"), "there is nothing to lose");
}

/// What the Prometheus operator picks: by its labels, and only where that is wanted.
#[test]
fn monitors_select_what_has_the_port() {
    let default = template(&[]).unwrap();
    assert!(!default.contains("monitoring.coreos.com"), "{default}");
    let labelled = template(&[
        "serviceMonitor.enabled=true",
        "serviceMonitor.interval=17s",
        "serviceMonitor.labels.release=mine",
        "prometheusRule.enabled=true",
        "prometheusRule.labels.role=alerts",
    ])
    .unwrap();
    let of = |kind: &str| {
        let document = labelled.split("\n---\n").find(|d| d.contains(&format!("\nkind: {kind}\n")));
        serde_saphyr::from_str::<Value>(document.unwrap()).unwrap()
    };
    let (monitor, pods, rule) = (of("ServiceMonitor"), of("PodMonitor"), of("PrometheusRule"));
    assert_eq!(monitor["metadata"]["labels"]["release"], "mine");
    assert_eq!(pods["metadata"]["labels"]["release"], "mine");
    assert_eq!(rule["metadata"]["labels"]["role"], "alerts");
    assert_eq!(monitor["spec"]["endpoints"], json!([{"port": "metrics", "interval": "17s"}]));
    assert_eq!(pods["spec"]["podMetricsEndpoints"], json!([{"port": "health", "interval": "17s"}]));
    let service = labelled.split("\n---\n").find(|d| d.contains("\n  name: tote-metrics\n")).unwrap();
    let service: Value = serde_saphyr::from_str(service).unwrap();
    let wanted = monitor["spec"]["selector"]["matchLabels"].as_object().unwrap();
    for (label, value) in wanted {
        assert_eq!(&service["metadata"]["labels"][label], value, "the monitor finds the service by {label}");
        assert_eq!(&of("Deployment")["spec"]["template"]["metadata"]["labels"][label], value);
    }
    assert_eq!(service["spec"]["selector"], monitor["spec"]["selector"]["matchLabels"]);
    assert_eq!(service["spec"]["ports"][0]["name"], "metrics");
}
