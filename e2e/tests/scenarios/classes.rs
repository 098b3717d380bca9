//! Why the pull fails decides whether a copy is the answer; where it is not, the pod's event says why and what to do.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::{Service, ServiceAccount};
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
    let every = |name, target, effect, class| {
        Scenario::new(name, "n1", target, move |play| answered(play, Of::Everything, effect, class))
    };
    let layer = |name, target, effect, class| {
        Scenario::new(name, "n1", target, move |play| answered(play, Of::Layer, effect, class))
    };
    vec![
        every("class_password", "n2", Effect::AskPassword, Class::NoCredentials),
        every("class_401", "n3", Effect::Status(401), Class::BadCredentials),
        every("class_403", "n2", Effect::Status(403), Class::Denied),
        every("class_404", "n3", Effect::Status(404), Class::NotFound),
        every("class_429", "n2", Effect::Status(429), Class::RateLimited),
        every("class_500", "n3", Effect::Status(500), Class::RegistryUnavailable),
        layer("class_blob_missing", "n2", Effect::Status(404), Class::BlobMissing),
        layer("class_cut_off", "n3", Effect::Cut(100), Class::CutOff),
        layer("class_wrong_digest", "n2", Effect::Corrupt, Class::CorruptTransfer),
        Scenario::new("class_dns", "n1", "n3", no_such_host),
        Scenario::new("class_tls", "n1", "n2", unknown_authority),
        Scenario::new("class_scheme", "n1", "n3", plain_http),
        Scenario::new("class_closed_port", "n1", "n2", closed_port),
        Scenario::new("class_wrong_platform", "n1", "n3", wrong_platform),
        Scenario::new("class_secret_missing", "n1", "n2", secret_missing),
    ]
}

/// What a registry answers so.
#[derive(Clone, Copy)]
enum Of {
    Everything,
    Layer,
}

/// The source has the image, and the registry then answers so.
async fn answered(play: Play, of: Of, effect: Effect, class: Class) -> Result<()> {
    let image = play.image("tiny")?;
    let (_, pinned) = play.push(&image).await?;
    play.pull_on_source(&pinned).await?;
    let path = match of {
        Of::Everything => String::new(),
        Of::Layer => image.host()?.layers[0].digest.clone(),
    };
    play.registry.rules(&[Rule { path, effect }])?;
    play.start_on_target("waiting", &pinned).await?;
    expect(&play, &[class]).await?;
    if class.stance() == Stance::Salvage { play.assert_intact(&image, &pinned).await } else { Ok(()) }
}

/// A job that says which class it is for, or an event that names one of the classes and its remedy, and no job.
async fn expect(play: &Play, classes: &[Class]) -> Result<()> {
    let salvaged = classes.iter().all(|class| class.stance() == Stance::Salvage);
    let reason = if salvaged { "ImageSalvageable" } else { "ImageNotActionable" };
    let note = play.tenant.event("waiting", reason, SOON).await?;
    let named = |class: &&Class| note.contains(class.name()) && note.contains(class.remedy());
    ensure!(classes.iter().any(|class| named(&class)), "none of {classes:?} is named and remedied: {note}");
    if salvaged {
        play.tenant.imported(SOON).await?;
        play.tenant.running("waiting", SOON).await?;
        return Ok(());
    }
    let jobs = play.tenant.jobs();
    let look = || async { Ok(jobs.list(&ListParams::default()).await?.items.into_iter().next()) };
    play.tenant.never("a job was made", A_WHILE, look).await
}

/// The source has the image as of another registry: one whose name no resolver knows.
async fn no_such_host(play: Play) -> Result<()> {
    let registry = format!("{}.invalid", play.tenant.namespace());
    of_registry(play, &registry, Class::Dns).await
}

/// The same, of one whose authority the target does not know: the API server.
async fn unknown_authority(play: Play) -> Result<()> {
    let services: Api<Service> = Api::namespaced(play.tenant.client(), "default");
    let api = services.get("kubernetes").await?;
    let registry = api.spec.and_then(|spec| spec.cluster_ip).context("the API server has no address")?;
    of_registry(play, &registry, Class::Tls).await
}

async fn of_registry(play: Play, registry: &str, class: Class) -> Result<()> {
    let image = play.image("tiny")?;
    let (_, pinned) = play.push(&image).await?;
    play.pull_on_source(&pinned).await?;
    let reference = format!("{registry}/{}:v1", play.tenant.namespace());
    tokio::task::block_in_place(|| play.source()?.ctr(&["images", "tag", &pinned, &reference]))?;
    play.start_on_target("waiting", &reference).await?;
    expect(&play, &[class]).await?;
    play.assert_intact(&image, &reference).await
}

/// The target is told to speak TLS to a registry that speaks none.
async fn plain_http(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    let (_, pinned) = play.push(&image).await?;
    play.pull_on_source(&pinned).await?;
    let name = play.registry.upstream().name();
    let hosts = play.target()?.path("/etc/containerd/certs.d").join(name).join("hosts.toml");
    std::fs::write(&hosts, format!("server = \"https://{name}\"\n"))
        .with_context(|| hosts.display().to_string())?;
    play.start_on_target("waiting", &pinned).await?;
    expect(&play, &[Class::Scheme]).await?;
    play.assert_intact(&image, &pinned).await
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
