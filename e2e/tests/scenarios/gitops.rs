//! `SalvageJob`s as GitOps tools see them: how they read (kstatus, Argo CD's health check), and that what is applied again
//! and again never differs from what is there.

use std::io::Write as _;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::discovery::ApiResource;
use kube::{Api, ResourceExt as _};
use serde_json::{Value, json};
use tote_api::{Phase, SalvageJob, names};
use tote_e2e::health::judge;
use tote_e2e::registry::Control as _;
use tote_e2e::tenant::{imported_reason, phase};
use tote_e2e::{host, operator};

use crate::play::Play;
use crate::stage::{SOON, Scenario};

/// For showing that nothing happens.
const A_WHILE: Duration = Duration::from_secs(5);

/// The field manager of the GitOps tool.
const TOOL: &str = "gitops";

pub fn all() -> Vec<Scenario> {
    vec![
        Scenario::new("gitops_health", "n1", "n2", health),
        Scenario::new("gitops_applied_without_drift", "n1", "n2", applied_without_drift),
    ]
}

/// The job as the API server gives it, with what this program's types do not know.
async fn raw(play: &Play, name: &str) -> Result<Value> {
    let kind = ApiResource::erase::<SalvageJob>(&());
    let jobs: Api<DynamicObject> = Api::namespaced_with(play.tenant.client(), play.tenant.namespace(), &kind);
    Ok(serde_json::to_value(jobs.get(name).await?)?)
}

fn manifest(play: &Play, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "tote.dev/v1alpha1", "kind": "SalvageJob",
        "metadata": { "name": name, "namespace": play.tenant.namespace() }, "spec": spec,
    })
}

/// What kstatus and the health check of the docs say, while the job is in a phase.
async fn reads(play: &Play, name: &str, at: Phase, kstatus: &str, argo: &str) -> Result<()> {
    let is = |job: &SalvageJob| {
        job.name_any() == name && phase(job) == Some(at) && !imported_reason(job).0.is_empty()
    };
    play.tenant.until_job(&format!("{name} that is {at:?}"), SOON, is).await?;
    let object = raw(play, name).await?;
    let check = operator::checkout().join("docs/argocd-health.lua");
    let (by_kstatus, by_check) = (judge(&object, None)?, judge(&object, Some(&check))?);
    ensure!(by_kstatus.status == kstatus, "{name}: {by_kstatus:?} of {object:#}");
    ensure!(by_check.status == argo, "{name}: {by_check:?} of {object:#}");
    println!("{name} that is {at:?}: {by_kstatus:?}");
    Ok(())
}

async fn health(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    let (tagged, _) = play.push(&image).await?;
    play.pull_on_source(&tagged).await?;
    play.registry.stop()?;
    let tenant = &play.tenant;
    let held = json!({ "image": tagged, "nodeName": "n2", "suspend": true });
    let made = serde_json::to_value(tenant.declare("good", held).await?)?;
    let fresh = judge(&made, None)?;
    ensure!(fresh.status == "InProgress", "as it was made: {fresh:?} of {made:#}");
    reads(&play, "good", Phase::Pending, "InProgress", "Suspended").await?;
    tenant.declare("good", json!({ "image": tagged, "nodeName": "n2", "suspend": false })).await?;
    reads(&play, "good", Phase::Imported, "Current", "Healthy").await?;

    let nowhere = json!({ "image": tagged, "nodeName": "n99", "pendingDeadlineSeconds": 5 });
    tenant.declare("bad", nowhere).await?;
    reads(&play, "bad", Phase::Pending, "InProgress", "Progressing").await?;
    // As the docs have it.
    let stalled =
        ["wait", "-n", tenant.namespace(), "--for=condition=Stalled", "salvagejob/bad", "--timeout=60s"];
    let mut wait = play.cluster().kubectl(&stalled)?;
    tokio::task::block_in_place(|| host::run(&mut wait))?;
    reads(&play, "bad", Phase::Failed, "Failed", "Degraded").await
}

/// What must not move: version and generation.
fn edition(job: &Value) -> (String, String) {
    let of = |field: &str| job["metadata"][field].to_string();
    (of("resourceVersion"), of("generation"))
}

async fn applied_without_drift(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    let (tagged, _) = play.push(&image).await?;
    play.pull_on_source(&tagged).await?;
    play.registry.stop()?;
    let bare = json!({ "image": tagged, "nodeName": "n2" });
    let full = json!({
        "image": tagged, "digest": image.digest(), "nodeName": "n2", "sourceNodeName": "n1", "suspend": false,
        "priority": 1, "backoffLimit": 3, "activeDeadlineSeconds": 600, "pendingDeadlineSeconds": 600,
        "ttlSecondsAfterFinished": 3600,
    });
    for (name, spec) in [("bare", &bare), ("full", &full)] {
        let manifest = manifest(&play, name, spec);
        server_side(&play, name, &manifest).await?;
        play.tenant
            .until_job(&format!("{name} that is Imported"), SOON, |job| {
                job.name_any() == name && phase(job) == Some(Phase::Imported)
            })
            .await?;
        let before = raw(&play, name).await?;
        ensure!(before["spec"] == *spec, "{name}: {spec} became {}", before["spec"]);
        server_side(&play, name, &manifest).await?;
        let manager = format!("--field-manager={TOOL}");
        kubectl(&play, &["apply", "--server-side", &manager, "-f", "-"], &manifest)?;
        kubectl(&play, &["diff", "--server-side", &manager, "-f", "-"], &manifest)
            .context("there is a difference")?;
        let after = raw(&play, name).await?;
        ensure!(edition(&before) == edition(&after), "{name}: {before:#} became {after:#}");
        owners(&after)?;
        // It would be one otherwise.
        let edited = self::manifest(&play, name, &with(spec, "priority", json!(7)));
        let differs = kubectl(&play, &["diff", "--server-side", &manager, "-f", "-"], &edited);
        let Err(differs) = differs else { anyhow::bail!("{name}: kubectl diff sees nothing") };
        ensure!(format!("{differs:#}").contains("+  priority: 7"), "{name}: {differs:#}");
        for (field, value) in [("nodeName", json!("n3")), ("backoffLimit", json!(9))] {
            let edited = self::manifest(&play, name, &with(spec, field, value));
            let Err(error) = server_side(&play, name, &edited).await else {
                anyhow::bail!("{name}: another {field} was taken")
            };
            ensure!(format!("{error:#}").contains("spec is immutable but for"), "{name}: {error:#}");
        }
    }
    client_side(&play, &bare).await?;
    let jobs = play.tenant.jobs();
    let gone = || async { Ok(jobs.get_opt("bare").await?.is_none().then_some(())) };
    play.tenant.never("a job without ttlSecondsAfterFinished went", A_WHILE, gone).await
}

/// The ordinary `kubectl apply`, which remembers in an annotation.
async fn client_side(play: &Play, spec: &Value) -> Result<()> {
    let manifest = manifest(play, "plain", spec);
    kubectl(play, &["apply", "-f", "-"], &manifest)?;
    play.tenant
        .until_job("plain that is Imported", SOON, |job| {
            job.name_any() == "plain" && phase(job) == Some(Phase::Imported)
        })
        .await?;
    let before = raw(play, "plain").await?;
    kubectl(play, &["diff", "-f", "-"], &manifest).context("there is a difference")?;
    let said = kubectl(play, &["apply", "-f", "-"], &manifest)?;
    ensure!(said.contains("unchanged"), "{said}");
    let after = raw(play, "plain").await?;
    ensure!(edition(&before) == edition(&after), "{before:#} became {after:#}");
    Ok(())
}

fn with(spec: &Value, field: &str, value: Value) -> Value {
    let mut edited = spec.clone();
    edited[field] = value;
    edited
}

/// As Flux and Argo CD apply, but never by force: a conflict is an error.
async fn server_side(play: &Play, name: &str, manifest: &Value) -> Result<()> {
    let jobs = play.tenant.jobs();
    jobs.patch(name, &PatchParams::apply(TOOL), &Patch::Apply(manifest)).await?;
    Ok(())
}

/// The tool owns the spec, the controller the status, and nobody anything else.
fn owners(job: &Value) -> Result<()> {
    let managed = job["metadata"]["managedFields"].as_array().context("no managedFields")?;
    let mut found: Vec<(&str, &str, Vec<&String>)> = managed
        .iter()
        .map(|entry| {
            let fields = entry["fieldsV1"].as_object().map(|fields| fields.keys().collect());
            let text = |field: &str| entry[field].as_str().unwrap_or_default();
            (text("manager"), text("subresource"), fields.unwrap_or_default())
        })
        .collect();
    found.sort();
    let (spec, status) = ("f:spec".to_owned(), "f:status".to_owned());
    let wanted = vec![(TOOL, "", vec![&spec]), (names::MANAGER, "status", vec![&status])];
    ensure!(found == wanted, "{found:?}");
    Ok(())
}

/// `kubectl` with a manifest on its standard input; what it writes, and an error if it does not end with 0.
fn kubectl(play: &Play, arguments: &[&str], manifest: &Value) -> Result<String> {
    tokio::task::block_in_place(|| {
        let mut command = play.cluster().kubectl(arguments)?;
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut input = child.stdin.take().context("kubectl has no standard input")?;
        input.write_all(manifest.to_string().as_bytes())?;
        drop(input);
        let output = child.wait_with_output()?;
        host::finished(&command, &output)?;
        Ok(String::from_utf8(output.stdout)?)
    })
}
