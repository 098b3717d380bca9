//! What the operator decides by other values of its chart. Where the values of every other scenario refuse, that is seen first.

use std::future::Future;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::authorization::v1::SubjectAccessReview;
use kube::Api;
use kube::api::{ListParams, PostParams};
use serde_json::json;
use tote_api::{SalvageJob, names};
use tote_e2e::images::{Build, Compression, Entry, Image, Layer, Layout, busybox};
use tote_e2e::inspect;
use tote_e2e::operator;
use tote_e2e::registry::{Control as _, Effect, LOGIN, Rule};
use tote_e2e::tenant::{PodShape, Tenant, imported_reason};

use crate::known::agents;
use crate::play::Play;
use crate::stage::{Alone, SOON, Scenario};

/// Name of the Secret to pull with.
const SECRET: &str = "registry-login";

/// Reasons of a pull that fails.
const PULL: [&str; 2] = ["ErrImagePull", "ImagePullBackOff"];

/// For showing that nothing happens: several times what detection takes.
const A_WHILE: Duration = Duration::from_secs(5);

/// The next look-up after one that failed may be five minutes away, but not for a controller that has just begun.
const RESTARTED: Duration = Duration::from_secs(90);

pub fn all() -> Vec<Scenario> {
    let all = [
        Scenario::new("values_newest_of_a_tag", "n1", "n2", newest_of_a_tag),
        Scenario::new("values_allowed_by_pattern", "n1", "n2", allowed_by_pattern),
        Scenario::new("values_image_too_large", "n1", "n2", image_too_large),
        Scenario::new("values_access_any", "n1", "n2", access_any),
        Scenario::new("values_asked_with_a_pull_secret", "n1", "n2", asked_with_a_pull_secret),
    ];
    all.into_iter().map(|one| one.alone(Alone::Operator)).collect()
}

/// Plays with these values; afterwards they are what they were.
async fn with<F: Future<Output = Result<()>>>(play: &Play, values: &[&str], body: F) -> Result<()> {
    let outcome = match play.upgrade_operator(values) {
        Ok(()) => body.await,
        Err(error) => Err(error),
    };
    play.install_operator()?;
    outcome
}

async fn no_job(tenant: &Tenant) -> Result<()> {
    let jobs = tenant.jobs();
    let look = || async { Ok(jobs.list(&ListParams::default()).await?.items.into_iter().next()) };
    tenant.never("a job was made", A_WHILE, look).await
}

/// An image that was made on a day of 2024, by its config.
fn made_on(layout: &Layout, play: &Play, day: &str) -> Result<Image> {
    let seed = format!("{} {day}", play.registry.upstream().name());
    let payload = Layer::new(Compression::Gzip).with(Entry::random("payload", 1 << 20, &seed));
    let build = Build::new().layer(busybox(&seed, Compression::Gzip)?).layer(payload);
    build.created(&format!("2024-{day}T00:00:00Z")).write(layout)
}

/// `ambiguousTags: newest`: by the time that the configs give, not by when or where it was pulled.
async fn newest_of_a_tag(play: Play) -> Result<()> {
    let layout = Layout::temporary()?;
    let (old, new) = (made_on(&layout, &play, "05-01")?, made_on(&layout, &play, "05-02")?);
    let (tagged, _) = play.push(&new).await?;
    play.pull_on("source", "n1", &tagged).await?;
    play.push(&old).await?;
    play.pull_on("pulled-last", "n3", &tagged).await?;
    play.registry.stop()?;
    play.start_on_target("waiting", &tagged).await?;
    let note = play.tenant.event("waiting", names::event::IMAGE_NOT_ACTIONABLE, SOON).await?;
    ensure!(note.contains(old.digest()) && note.contains(new.digest()), "{note}");
    no_job(&play.tenant).await?;
    let newest = Box::pin(async {
        let note = play.tenant.event("waiting", names::event::IMAGE_SALVAGEABLE, SOON).await?;
        ensure!(note.contains("the newest of 2 images") && note.contains(new.digest()), "{note}");
        let job = play.tenant.imported(SOON).await?;
        let digest = job.status.and_then(|status| status.digest);
        ensure!(digest.as_deref() == Some(new.digest()), "{digest:?} was salvaged");
        play.tenant.running("waiting", SOON).await?;
        play.assert_intact(&new, &tagged).await
    });
    with(&play, &["controller.ambiguousTags=newest"], newest).await
}

/// What matches no allowed pattern is not moved, under an allowed name neither; what matches one is.
async fn allowed_by_pattern(play: Play) -> Result<()> {
    let (good, other) = (play.image_seeded("tiny", "good")?, play.image_seeded("tiny", "other")?);
    let (_, allowed) = play.push_as(&good, "allowed").await?;
    let (_, unnamed) = play.push_as(&other, "unnamed").await?;
    play.pull_on_source(&allowed).await?;
    play.pull_on("unnamed", "n1", &unnamed).await?;
    play.registry.stop()?;
    let patterns = Box::pin(async {
        play.start_on_target("outside", &unnamed).await?;
        let note = play.tenant.event("outside", names::event::IMAGE_NOT_ACTIONABLE, SOON).await?;
        ensure!(note.contains("matches none of the allowed patterns"), "{note}");
        no_job(&play.tenant).await?;
        let renamed = unnamed.replace("/unnamed@", "/allowed@");
        for (name, image, says) in [
            ("by-hand", &unnamed, "matches none of the allowed patterns"),
            ("renamed", &renamed, "no node has it under a name that the allowed patterns"),
        ] {
            play.tenant.declare(name, json!({"image": image, "nodeName": "n2"})).await?;
            let refused =
                |job: &SalvageJob| job.spec.image == *image && imported_reason(job).0 == "ImageDenied";
            let job = play.tenant.until_job("that is refused", SOON, refused).await?;
            ensure!(imported_reason(&job).1.contains(says), "{:?}", job.status);
        }
        inspect::assert_gone(play.target()?, &other)?;
        play.start_on_target("waiting", &allowed).await?;
        play.tenant.running("waiting", SOON).await?;
        play.assert_intact(&good, &allowed).await
    });
    with(&play, &["config.images.allowed[0]=*/allowed"], patterns).await
}

/// An image over the bound is left alone: said on the pod and in a job by hand, and no byte moves. Under the bound as it was
/// it comes, and the job by hand goes on.
async fn image_too_large(play: Play) -> Result<()> {
    let image = play.image("tiny")?;
    let (_, pinned) = play.push(&image).await?;
    play.pull_on_source(&pinned).await?;
    play.registry.stop()?;
    let client = play.tenant.client();
    let bounded = Box::pin(async {
        let target =
            agents(&play).await?.into_iter().find(|agent| agent.node == "n2").context("no agent on n2")?;
        let received = target.metric(&client, "tote_agent_received_bytes_total").await?;
        play.start_on_target("waiting", &pinned).await?;
        let note = play.tenant.event("waiting", names::event::IMAGE_NOT_ACTIONABLE, SOON).await?;
        for part in ["config.images.maxSize", "1.0 MiB is the most", pinned.as_str()] {
            ensure!(note.contains(part), "{part} is not named: {note}");
        }
        no_job(&play.tenant).await?;
        play.tenant.declare("by-hand", json!({"image": pinned, "nodeName": "n2"})).await?;
        let refused = |job: &SalvageJob| imported_reason(job).0 == "ImageTooLarge";
        let job = play.tenant.until_job("that is refused", SOON, refused).await?;
        ensure!(imported_reason(&job).1.contains("config.images.maxSize"), "{:?}", job.status);
        let status = job.status.unwrap_or_default();
        ensure!(status.attempts == 0 && status.transfer.is_none(), "{status:?}");
        let moved = target.metric(&client, "tote_agent_received_bytes_total").await? - received;
        ensure!(moved == 0, "{moved} bytes were moved");
        inspect::assert_gone(play.target()?, &image)
    });
    with(&play, &["config.images.maxSize=1Mi"], bounded).await?;
    play.tenant.imported(SOON).await?;
    play.tenant.running("waiting", SOON).await?;
    play.assert_intact(&image, &pinned).await
}

/// A private image, and a pod of a namespace that never had it: `access: any` lets it move, and kubelet is told of no restriction.
async fn access_any(play: Play) -> Result<()> {
    let stranger = Tenant::enter(play.tenant.client(), "values-access-any-stranger", true).await?;
    let outcome = to_a_stranger(&play, &stranger).await;
    let left = stranger.leave().await;
    outcome?;
    left
}

async fn to_a_stranger(play: &Play, stranger: &Tenant) -> Result<()> {
    let (_, pinned) = play.push(&play.image("tiny")?).await?;
    play.tenant.pull_secret(SECRET, play.registry.upstream().name(), LOGIN).await?;
    play.registry.demand_login()?;
    pull_with_secret(play, "source", "n1", &pinned).await?;
    play.registry.stop()?;
    stranger.start("waiting", &PodShape::new("n2", &pinned)).await?;
    let note = stranger.event("waiting", names::event::IMAGE_NOT_ACTIONABLE, SOON).await?;
    ensure!(note.contains("controller.access=any"), "{note}");
    no_job(stranger).await?;
    let any = Box::pin(async {
        let job = stranger.imported(SOON).await?;
        let conditions = job.status.map(|status| status.conditions).unwrap_or_default();
        let access = conditions.iter().find(|c| c.type_ == names::condition::ACCESS_PROVEN);
        ensure!(access.is_some_and(|c| c.reason == "NotAsked"), "{access:?}");
        stranger.running("waiting", SOON).await.map(drop)
    });
    with(play, &["controller.access=any"], any).await
}

/// Lets kubelet on a node pull with the Secret.
async fn pull_with_secret(play: &Play, pod: &str, node: &str, reference: &str) -> Result<()> {
    let shape = PodShape { opted_in: false, pull_secret: Some(SECRET), ..PodShape::new(node, reference) };
    play.tenant.start(pod, &shape).await?;
    play.tenant.running(pod, SOON).await.map(drop)
}

/// Two nodes mean different images by a tag of a registry that demands a login: as nobody the controller hears nothing
/// there, and may read no Secret; with the pod's pull secret it hears what the tag means.
async fn asked_with_a_pull_secret(play: Play) -> Result<()> {
    let (old, new) = (play.image_seeded("tiny", "old")?, play.image_seeded("tiny", "new")?);
    play.tenant.pull_secret(SECRET, play.registry.upstream().name(), LOGIN).await?;
    play.registry.demand_login()?;
    let (tagged, _) = play.push(&old).await?;
    pull_with_secret(&play, "old", "n1", &tagged).await?;
    play.push(&new).await?;
    pull_with_secret(&play, "new", "n3", &tagged).await?;
    // Whoever has the login hears what tags mean, and gets no blobs.
    let rule = |path: &str, effect| Rule { path: path.to_owned(), effect };
    play.registry.rules(&[rule("/blobs/", Effect::Status(500)), rule("", Effect::Login)])?;
    let shape = PodShape { pull_secret: Some(SECRET), ..PodShape::new("n2", &tagged) };
    play.tenant.start("waiting", &shape).await?;
    play.tenant.failing("waiting", &PULL, SOON).await?;
    let note = play.tenant.event("waiting", names::event::IMAGE_NOT_ACTIONABLE, SOON).await?;
    ensure!(note.contains("wants credentials"), "{note}");
    no_job(&play.tenant).await?;
    ensure!(!may(&play, "get").await?, "it may read Secrets though nobody said so");
    let with_secrets = Box::pin(async {
        ensure!(
            may(&play, "get").await? && !may(&play, "list").await?,
            "it may get Secrets, and not list them"
        );
        let note = play.tenant.event("waiting", names::event::IMAGE_SALVAGEABLE, RESTARTED).await?;
        ensure!(note.contains("registry's own answer") && note.contains(new.digest()), "{note}");
        let job = play.tenant.imported(SOON).await?;
        ensure!(job.spec.digest.as_deref() == Some(new.digest()), "{:?}", job.spec);
        play.tenant.running("waiting", SOON).await.map(drop)
    });
    with(&play, &["registryResolve.usePullSecrets=true"], with_secrets).await
}

/// Whether the controller may do this with Secrets of the scenario's namespace, by the API server.
async fn may(play: &Play, verb: &str) -> Result<bool> {
    let reviews: Api<SubjectAccessReview> = Api::all(play.tenant.client());
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
        "spec": {
            "user": format!("system:serviceaccount:{}:tote", operator::NAMESPACE),
            "resourceAttributes": {
                "namespace": play.tenant.namespace(), "verb": verb, "resource": "secrets", "name": SECRET,
            },
        },
    });
    let answer = reviews.create(&PostParams::default(), &serde_json::from_value(review)?).await?;
    Ok(answer.status.context("the API server does not say what the controller may")?.allowed)
}
