//! `SalvageJob`s that a person or GitOps writes.

use std::time::Duration;

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use serde_json::{Value, json};
use tote_api::{Phase, SalvageJob, names};
use tote_e2e::images::Image;
use tote_e2e::registry::Control as _;
use tote_e2e::tenant::{PodShape, Tenant, imported_reason, phase};
use tote_e2e::{host, inspect};

use crate::play::Play;
use crate::stage::{SOON, Scenario};

/// For showing that nothing happens.
const A_WHILE: Duration = Duration::from_secs(5);

pub fn all() -> Vec<Scenario> {
    vec![
        Scenario::new("job_by_hand", "n1", "n3", by_hand),
        Scenario::new("job_for_no_node", "n1", "n2", no_node),
        Scenario::new("job_for_an_unknown_digest", "n1", "n2", unknown_digest),
        Scenario::new("job_plants_no_tag", "n1", "n2", plants_no_tag),
        Scenario::new("jobs_refused", "n1", "n2", refused),
        Scenario::new("job_outside_opted_in_namespaces", "n1", "n2", not_opted_in),
        Scenario::new("job_in_a_denied_namespace", "n1", "n2", denied),
        Scenario::new("job_suspended", "n1", "n2", suspended),
        Scenario::new("job_clocks", "n1", "n2", clocks),
    ]
}

/// Waits until the job is Pending for a reason, and returns the message.
async fn pending(tenant: &Tenant, name: &str, reason: &str) -> Result<String> {
    let is = |job: &SalvageJob| {
        job.name_any() == name && phase(job) == Some(Phase::Pending) && imported_reason(job).0 == reason
    };
    let job = tenant.until_job(&format!("{name} that is Pending for {reason}"), SOON, is).await?;
    Ok(imported_reason(&job).1)
}

/// No attempt was begun and no byte moved for the job.
async fn untouched(tenant: &Tenant, name: &str) -> Result<()> {
    let status = tenant.jobs().get(name).await?.status.unwrap_or_default();
    ensure!(status.attempts == 0 && status.transfer.is_none() && status.start_time.is_none(), "{status:?}");
    Ok(())
}

async fn on_source(play: &Play) -> Result<(Image, String, String)> {
    let image = play.image("tiny")?;
    let (tagged, pinned) = play.push(&image).await?;
    play.pull_on_source(&tagged).await?;
    play.registry.stop()?;
    Ok((image, tagged, pinned))
}

/// No pod waits; `kubectl wait` returns.
async fn by_hand(play: Play) -> Result<()> {
    let (image, tagged, pinned) = on_source(&play).await?;
    play.tenant.declare("ahead", json!({ "image": tagged, "nodeName": "n3" })).await?;
    let arguments = [
        "wait",
        "-n",
        play.tenant.namespace(),
        "--for=condition=Imported",
        "salvagejob/ahead",
        "--timeout=60s",
    ];
    let said = host::run(&mut play.cluster().kubectl(&arguments)?)?;
    ensure!(said.contains("condition met"), "{said}");
    let table = host::run(&mut play.cluster().kubectl(&[
        "get",
        "sj",
        "-n",
        play.tenant.namespace(),
        "-o",
        "wide",
    ])?)?;
    for column in ["IMAGE", "NODE", "PHASE", "SOURCE", "SIZE", "AGE", "DIGEST", "REASON", "Imported", "n1"] {
        ensure!(table.contains(column), "{column} is not in\n{table}");
    }
    inspect::assert_whole(play.target()?, &tagged)?;
    inspect::assert_whole(play.target()?, &pinned)?;
    // What it was brought for: a pod that starts there although the registry is gone.
    let shape = PodShape { opted_in: false, ..PodShape::new("n3", &tagged) };
    play.tenant.start("waiting", &shape).await?;
    play.tenant.running("waiting", SOON).await?;
    play.assert_intact(&image, &tagged).await
}

async fn no_node(play: Play) -> Result<()> {
    play.tenant.declare("lost", json!({ "image": "registry.test/x:v1", "nodeName": "n99" })).await?;
    let message = pending(&play.tenant, "lost", "NodeNotFound").await?;
    ensure!(message.contains("n99"), "{message}");
    untouched(&play.tenant, "lost").await
}

async fn unknown_digest(play: Play) -> Result<()> {
    let image = format!("registry.test/x@sha256:{}", "ab".repeat(32));
    play.tenant.declare("nowhere", json!({ "image": image, "nodeName": "n2" })).await?;
    let message = pending(&play.tenant, "nowhere", "NoSource").await?;
    ensure!(message.contains("abab"), "{message}");
    untouched(&play.tenant, "nowhere").await
}

/// A digest that a node holds under another repository's name gets no tag of this one, but is to be had by itself.
async fn plants_no_tag(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    let (_, pinned) = play.push(&image).await?;
    play.pull_on_source(&pinned).await?;
    let planted = json!({ "image": "registry.test/nginx:1.29", "digest": image.digest(), "nodeName": "n2" });
    play.tenant.declare("planted", planted).await?;
    let message = pending(&play.tenant, "planted", "DigestUnproven").await?;
    ensure!(message.contains(&format!("registry.test/nginx@{}", image.digest())), "{message}");
    untouched(&play.tenant, "planted").await?;
    inspect::assert_gone(play.target()?, &image)
}

/// The API server says what is wrong.
async fn refused(play: Play) -> Result<()> {
    let good = format!("sha256:{}", "cd".repeat(32));
    let bad: [(Value, &str); 6] = [
        (
            json!({ "image": "registry.test/x:v1", "nodeName": "n2", "digest": "sha256:123" }),
            "digest must be sha256:",
        ),
        (
            json!({ "image": "registry.test/x:v1", "nodeName": "n2", "digest": good.to_uppercase() }),
            "digest must be sha256:",
        ),
        (json!({ "image": "Not A Reference", "nodeName": "n2" }), "image must be an image reference"),
        (
            json!({ "image": "registry.test/x:v1", "nodeName": "No_Node" }),
            "nodeName must be the name of a Node",
        ),
        (json!({ "image": "registry.test/x:v1" }), "nodeName"),
        (json!({ "image": "registry.test/x:v1", "nodeName": "n2", "backoffLimit": -1 }), "backoffLimit"),
    ];
    for (spec, says) in bad {
        let Err(error) = play.tenant.declare("bad", spec.clone()).await else {
            anyhow::bail!("{spec} was taken")
        };
        ensure!(error.to_string().contains(says), "{spec}: {error}");
    }
    play.tenant
        .declare("good", json!({ "image": "registry.test/x:v1", "nodeName": "n2", "suspend": true }))
        .await?;
    for edit in [
        json!({ "image": "registry.test/x:v2", "nodeName": "n2", "suspend": true }),
        json!({ "image": "registry.test/x:v1", "nodeName": "n1", "suspend": true }),
        json!({ "image": "registry.test/x:v1", "nodeName": "n2", "suspend": true, "digest": good }),
    ] {
        let Err(error) = play.tenant.declare("good", edit.clone()).await else {
            anyhow::bail!("edit {edit} was taken")
        };
        ensure!(error.to_string().contains("immutable"), "{edit}: {error}");
    }
    let kept = serde_json::to_value(play.tenant.jobs().get("good").await?.spec)?;
    ensure!(
        kept == json!({ "image": "registry.test/x:v1", "nodeName": "n2", "suspend": true }),
        "became {kept}"
    );
    let edit = json!({ "image": "registry.test/x:v1", "nodeName": "n2", "suspend": true, "priority": 5, "ttlSecondsAfterFinished": 9 });
    play.tenant.declare("good", edit).await?;
    Ok(())
}

/// A job by hand obeys the namespace's part of the opt-in.
async fn not_opted_in(play: Play) -> Result<()> {
    let (_, tagged, _) = on_source(&play).await?;
    let other = Tenant::enter(play.tenant.client(), "jobs-left-alone", false).await?;
    let outcome = async {
        other.declare("ahead", json!({ "image": tagged, "nodeName": "n2" })).await?;
        let is = |job: &SalvageJob| {
            phase(job) == Some(Phase::Pending) && imported_reason(job).1.contains("tote.dev/allow")
        };
        other.until_job("that is Pending and names tote.dev/allow", SOON, is).await?;
        let jobs = other.jobs();
        let look =
            || async { Ok(Some(jobs.get("ahead").await?).filter(|job| phase(job) != Some(Phase::Pending))) };
        other.never("the job went on", A_WHILE, look).await
    };
    let outcome = outcome.await;
    other.leave().await?;
    outcome
}

/// Whatever a denied namespace says of itself.
async fn denied(play: Play) -> Result<()> {
    let (image, tagged, _) = on_source(&play).await?;
    let other = Tenant::of(play.tenant.client(), "kube-public");
    let namespaces: Api<Namespace> = Api::all(play.tenant.client());
    let allow = |says: Value| Patch::Merge(json!({ "metadata": { "annotations": { names::ALLOW: says } } }));
    namespaces.patch("kube-public", &PatchParams::default(), &allow(json!("true"))).await?;
    let outcome = async {
        other.declare("ahead", json!({ "image": tagged, "nodeName": "n2" })).await?;
        let message = pending(&other, "ahead", "NamespaceDenied").await?;
        ensure!(message.contains("kube-public"), "{message}");
        untouched(&other, "ahead").await?;
        inspect::assert_gone(play.target()?, &image)
    };
    let outcome = outcome.await;
    other.jobs().delete("ahead", &DeleteParams::default()).await?;
    namespaces.patch("kube-public", &PatchParams::default(), &allow(Value::Null)).await?;
    outcome
}

/// Suspended, nothing moves; released, it goes on.
async fn suspended(play: Play) -> Result<()> {
    let (_, tagged, _) = on_source(&play).await?;
    play.tenant.declare("held", json!({ "image": tagged, "nodeName": "n2", "suspend": true })).await?;
    pending(&play.tenant, "held", "Suspended").await?;
    ensure!(inspect::assert_whole(play.target()?, &tagged).is_err(), "it is on the target already");
    play.tenant.declare("held", json!({ "image": tagged, "nodeName": "n2", "suspend": false })).await?;
    play.tenant.imported(SOON).await?;
    inspect::assert_whole(play.target()?, &tagged)
}

/// `pendingDeadlineSeconds` fails a job that waits, `ttlSecondsAfterFinished` removes one that ended.
async fn clocks(play: Play) -> Result<()> {
    let spec = json!({
        "image": "registry.test/x:v1", "nodeName": "n99",
        "pendingDeadlineSeconds": 2, "ttlSecondsAfterFinished": 3,
    });
    play.tenant.declare("brief", spec).await?;
    play.tenant.until_job("that is Failed", SOON, |job| phase(job) == Some(Phase::Failed)).await?;
    let jobs = play.tenant.jobs();
    play.tenant
        .until("the job to be removed", SOON, || async {
            Ok(jobs.get_opt("brief").await?.is_none().then_some(()))
        })
        .await
}
