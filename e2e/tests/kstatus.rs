//! How a `SalvageJob` reads to GitOps tools, by their own code: kstatus (sigs.k8s.io/cli-utils), and Argo CD's
//! interpreter with the health check of the docs. The jobs are those that the controller's own code writes.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use tote_api::{Phase, SalvageJobSpec};
use tote_controller::salvage::{Job, status};
use tote_e2e::health::judge;
use tote_e2e::operator;

/// Reasons of each phase that the controller knows, and what kstatus and Argo CD are to make of them.
const READINGS: [(Phase, &[&str], &str, &str); 5] = [
    (Phase::Pending, &["Suspended", "Disabled"], "InProgress", "Suspended"),
    (
        Phase::Pending,
        &[
            "Queued",
            "Resolving",
            "NodeNotFound",
            "TargetUnavailable",
            "TargetNotUsable",
            "NoSource",
            "SourceUnavailable",
            "AmbiguousTag",
            "IncompleteOnly",
            "OtherPlatformOnly",
            "NamespaceDenied",
            "NamespaceNotAllowed",
            "NamespaceTerminating",
            "TargetCordoned",
            "TargetDiskPressure",
            "RuntimeUnavailable",
            "SourceNotFound",
            "AccessUnproven",
            "DigestUnproven",
            "ImageDenied",
        ],
        "InProgress",
        "Progressing",
    ),
    (Phase::Transferring, &["Transferring", "Unpacking", "Retrying"], "InProgress", "Progressing"),
    (Phase::Imported, &["Imported"], "Current", "Healthy"),
    (
        Phase::Failed,
        &[
            "InvalidImage",
            "NodeReplaced",
            "DeadlineExceeded",
            "PendingDeadlineExceeded",
            "BackoffLimitExceeded",
            "RefusedByAgent",
            "NameConflict",
            "SnapshotterUnsupported",
            "UnsupportedImage",
            "ImageTooLarge",
        ],
        "Failed",
        "Degraded",
    ),
];

fn lua() -> PathBuf {
    operator::checkout().join("docs/argocd-health.lua")
}

/// `part` is in the message; kstatus has one of its own for what is Current.
fn reads(what: &str, object: &Value, kstatus: &str, argo: Option<&str>, part: &str) -> Result<()> {
    let said = judge(object, None)?;
    ensure!(said.status == kstatus, "{what}, kstatus: {said:?}");
    ensure!(kstatus == "Current" || said.message.contains(part), "{what}, kstatus: {said:?}");
    if let Some(argo) = argo {
        let said = judge(object, Some(&lua()))?;
        ensure!(said.status == argo, "{what}, Argo CD: {said:?}");
        ensure!(!part.starts_with("it is") || said.message == part, "{what}, Argo CD: {said:?}");
    }
    Ok(())
}

fn job() -> Job {
    let spec = SalvageJobSpec {
        image: "registry.test/x:v1".to_owned(),
        node_name: "n2".to_owned(),
        ..SalvageJobSpec::default()
    };
    let mut job = Job::new("shop", "x", "u", Timestamp::UNIX_EPOCH, spec, None);
    job.generation = 3;
    job
}

fn object(job: &Job) -> Value {
    json!({
        "apiVersion": "tote.dev/v1alpha1", "kind": "SalvageJob",
        "metadata": { "name": "x", "namespace": "shop", "generation": job.generation },
        "spec": job.spec, "status": job.status,
    })
}

#[test]
fn every_phase_and_reason_reads_as_what_it_is() -> Result<()> {
    let later = Timestamp::from_second(9)?;
    for (phase, reasons, kstatus, argo) in READINGS {
        for reason in reasons {
            let mut fresh = job();
            status::enter(&mut fresh, phase, reason, "it is so", later);
            reads(&format!("{phase:?} {reason}"), &object(&fresh), kstatus, Some(argo), "it is so")?;
            // Not only from nothing: what was true before must not linger.
            let mut moved = job();
            status::enter(&mut moved, Phase::Pending, "Suspended", "before", Timestamp::UNIX_EPOCH);
            status::enter(&mut moved, Phase::Transferring, "Transferring", "before", Timestamp::UNIX_EPOCH);
            status::enter(&mut moved, phase, reason, "it is so", later);
            reads(&format!("then {phase:?} {reason}"), &object(&moved), kstatus, Some(argo), "it is so")?;
        }
    }
    Ok(())
}

#[test]
fn one_that_no_controller_has_seen_is_in_progress() -> Result<()> {
    let crd = serde_json::to_value(tote_api::crd())?;
    let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    let mut fresh = object(&job());
    fresh["metadata"]["generation"] = json!(1);
    fresh["status"] = schema["properties"]["status"]["default"].clone();
    ensure!(fresh["status"].is_object(), "the CRD has no default status");
    reads("fresh", &fresh, "InProgress", Some("Progressing"), "generation")?;
    // As it was once it was seen: one that was edited since is not what its status says.
    for phase in [Phase::Imported, Phase::Failed] {
        let mut edited = job();
        status::enter(&mut edited, phase, "Whatever", "", Timestamp::UNIX_EPOCH);
        edited.generation = 4;
        reads("edited", &object(&edited), "InProgress", Some("Progressing"), "generation is 4")?;
        status::observe(&mut edited);
        ensure!(judge(&object(&edited), None)?.status != "InProgress", "{phase:?}, seen again");
    }
    Ok(())
}

#[test]
fn one_that_is_being_deleted_is_terminating() -> Result<()> {
    for phase in [Phase::Pending, Phase::Transferring, Phase::Imported, Phase::Failed] {
        let mut going = job();
        status::enter(&mut going, phase, "Whatever", "", Timestamp::UNIX_EPOCH);
        let mut going = object(&going);
        going["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        // Argo CD says so itself and asks no check.
        reads(&format!("{phase:?}"), &going, "Terminating", None, "")?;
    }
    Ok(())
}

#[test]
fn the_docs_have_the_check_as_it_is_tested() -> Result<()> {
    let docs = std::fs::read_to_string(operator::checkout().join("docs/gitops.md"))?;
    let key = "  resource.customizations.health.tote.dev_SalvageJob: |\n";
    let (_, block) = docs.split_once(key).context("docs/gitops.md has no health check")?;
    let (block, _) = block.split_once("```").context("the block has no end")?;
    let lines: Vec<&str> = block.lines().map(|line| line.strip_prefix("    ").unwrap_or(line)).collect();
    let check = std::fs::read_to_string(lua())?;
    ensure!(
        lines.join("\n") == check.trim_end(),
        "docs/gitops.md differs from docs/argocd-health.lua:\n{block}"
    );
    Ok(())
}
