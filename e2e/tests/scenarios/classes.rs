//! Why the pull fails decides whether a copy is the answer; where it is not, the pod's event says why and what to do.

use std::time::Duration;

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::Api;
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::json;
use tote_controller::detect::class::{Class, Stance};
use tote_e2e::images::{Build, BuildIndex, Compression, Entry, Layer, Layout, Platform};
use tote_e2e::registry::{Control as _, Effect, Rule};

use crate::play::Play;
use crate::stage::{SOON, Scenario};

/// For showing that nothing happens: several times what detection takes.
const A_WHILE: Duration = Duration::from_secs(5);

pub fn all() -> Vec<Scenario> {
    let answered = |name, target, effect, class| {
        Scenario::new(name, "n1", target, move |play| answered(play, effect, class))
    };
    vec![
        answered("class_password", "n2", Effect::AskPassword, Class::NoCredentials),
        answered("class_401", "n3", Effect::Status(401), Class::BadCredentials),
        answered("class_403", "n2", Effect::Status(403), Class::Denied),
        answered("class_404", "n3", Effect::Status(404), Class::NotFound),
        answered("class_429", "n2", Effect::Status(429), Class::RateLimited),
        answered("class_500", "n3", Effect::Status(500), Class::RegistryUnavailable),
        Scenario::new("class_closed_port", "n1", "n2", closed_port),
        Scenario::new("class_wrong_platform", "n1", "n3", wrong_platform),
        Scenario::new("class_secret_missing", "n1", "n2", secret_missing),
    ]
}

/// The source has the image, and the registry then answers everything so.
async fn answered(play: Play, effect: Effect, class: Class) -> Result<()> {
    let image = play.image("tiny")?;
    let (_, pinned) = play.push(&image).await?;
    play.pull_on_source(&pinned).await?;
    play.registry.rules(&[Rule { path: String::new(), effect }])?;
    play.start_on_target("waiting", &pinned).await?;
    expect(&play, &[class]).await?;
    if class.stance() == Stance::Salvage { play.assert_intact(&image, &pinned).await } else { Ok(()) }
}

/// A job, or an event that names one of the classes and its remedy, and no job.
async fn expect(play: &Play, classes: &[Class]) -> Result<()> {
    if classes.iter().all(|class| class.stance() == Stance::Salvage) {
        play.tenant.imported(SOON).await?;
        play.tenant.running("waiting", SOON).await?;
        return Ok(());
    }
    let note = play.tenant.event("waiting", "ImageNotActionable", SOON).await?;
    let named = |class: &&Class| note.contains(class.name()) && note.contains(class.remedy());
    ensure!(classes.iter().any(|class| named(&class)), "none of {classes:?} is named and remedied: {note}");
    let jobs = play.tenant.jobs();
    let look = || async { Ok(jobs.list(&ListParams::default()).await?.items.into_iter().next()) };
    play.tenant.never("a job was made", A_WHILE, look).await
}

async fn closed_port(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    let (_, pinned) = play.push(&image).await?;
    play.pull_on_source(&pinned).await?;
    play.registry.stop()?;
    play.start_on_target("waiting", &pinned).await?;
    // The hosts.toml of every node names the registry's own address.
    expect(&play, &[Class::Refused]).await?;
    play.assert_intact(&image, &pinned).await
}

async fn wrong_platform(play: Play) -> Result<()> {
    let foreign = if Platform::host().architecture == "arm64" { "amd64" } else { "arm64" };
    let layer = Layer::new(Compression::Gzip).with(Entry::random("payload", 1 << 18, "foreign"));
    let build = Build::new().platform(Platform::linux(foreign)).layer(layer);
    let image = BuildIndex::new([build]).write(&Layout::temporary()?)?;
    let (_, pinned) = play.push(&image).await?;
    play.start_on_target("waiting", &pinned).await?;
    expect(&play, &[Class::WrongPlatform]).await
}

/// The pod names a secret that is not there, through its service account; kubelet says so in an event, and containerd
/// that there was nothing to show.
async fn secret_missing(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    let (_, pinned) = play.push(&image).await?;
    play.pull_on_source(&pinned).await?;
    let accounts: Api<ServiceAccount> = Api::namespaced(play.tenant.client(), play.tenant.namespace());
    let secrets = json!({"imagePullSecrets": [{"name": "absent"}]});
    accounts.patch("default", &PatchParams::default(), &Patch::Merge(secrets)).await?;
    play.registry.rules(&[Rule { path: String::new(), effect: Effect::AskPassword }])?;
    play.start_on_target("waiting", &pinned).await?;
    expect(&play, &[Class::SecretMissing, Class::NoCredentials]).await
}
