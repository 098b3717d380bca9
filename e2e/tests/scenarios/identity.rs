//! Identities: that those without one are refused, and that salvages go on whatever becomes of the certificate
//! authority, of the objects it is kept in, and of those who bear certificates. Attacks are in modules of their own.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, ObjectMeta, Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;
use tote_api::Phase;
use tote_e2e::inspect;
use tote_e2e::registry::Control as _;
use tote_e2e::tenant::{PodShape, Tenant, phase};
use tote_rpc::identity::{Authority, Identity};
use tote_rpc::testing::Pki;

use crate::attacker::{Attacker, Normal, Shown, knock};
use crate::faults::{ends_well, half_way, kill, share_moved};
use crate::known::{
    Agent, BUNDLE, CA, Kept, NEXT, SIGNER, SIGNER_KEY, agents, all_connected, leader, objects, of_leader,
    trusted,
};
use crate::play::Play;
use crate::stage::{Alone, SOON, Scenario, install};
use crate::{attacks, crowd, reader, renewal, rogue};

/// Annotations of the Secret.
const STAGED_AT: &str = "tote.dev/ca-staged-at";
const PROMOTED_AT: &str = "tote.dev/ca-promoted-at";
const ROTATE: &str = "tote.dev/rotate-ca";

/// How long a new authority is trusted before it signs; and for that, with the controller's looks and a restart.
const PUBLISHED: Duration = Duration::from_secs(120);
const PROMOTED: Duration = Duration::from_secs(200);

/// How long before it signs the salvage begins, which takes 20 s.
const AHEAD: Duration = Duration::from_secs(8);

/// Within what time every agent has a certificate of an authority that has begun to sign.
const RENEWED: Duration = Duration::from_secs(90);

/// Within what time what was deleted is back.
const BACK: Duration = Duration::from_secs(30);

/// A Secret of somebody's own.
const OWN: &str = "my-ca";

pub fn all() -> Vec<Scenario> {
    let own = [
        Scenario::new("ca_rotated_midway", "n1", "n2", rotated_midway),
        Scenario::new("ca_of_ones_own", "n1", "n2", of_ones_own),
        Scenario::new("objects_of_identity", "n1", "n3", objects_deleted),
        Scenario::new("restarts_heal", "n2", "n3", restarts_heal),
    ];
    let own = own.into_iter().map(|one| one.alone(Alone::Operator)).collect();
    [attacks::all(), reader::all(), rogue::all(), crowd::all(), own, renewal::all()]
        .into_iter()
        .flatten()
        .collect()
}

/// Waits until no authority is about to follow another.
async fn settled(play: &Play) -> Result<Kept> {
    let client = play.tenant.client();
    let look = || async { Ok(Some(Kept::read(&client).await?).filter(|kept| kept.text(NEXT).is_none())) };
    play.tenant.until("no certificate authority to be staged from before", PROMOTED, look).await
}

/// Waits until another authority than `old` is about to follow it, and agents are told to trust both.
async fn staged(play: &Play, old: &Kept) -> Result<Kept> {
    let client = play.tenant.client();
    let look = || async {
        let kept = Kept::read(&client).await?;
        ensure!(kept.text(SIGNER) == old.text(SIGNER), "another authority signs already");
        Ok(kept.text(NEXT).is_some().then_some(kept))
    };
    let kept = play.tenant.until("the next certificate authority to be staged", SOON, look).await?;
    let due = kept.bundle()?;
    let look = || async {
        let trusted = trusted(&client).await?;
        let missing = due.certificates().iter().filter(|one| !trusted.certificates().contains(one)).count();
        ensure!(missing == 0, "it lacks {missing} of {}", due.certificates().len());
        Ok(Some(()))
    };
    play.tenant.until("the ConfigMap tote-ca to hold both who signs and who will", SOON, look).await?;
    Ok(kept)
}

/// Waits until the authority that is staged signs.
async fn promoted(play: &Play, staged: &Kept) -> Result<Kept> {
    let client = play.tenant.client();
    let look = || async {
        let kept = Kept::read(&client).await?;
        Ok(Some(kept).filter(|kept| kept.text(SIGNER) == staged.text(NEXT)))
    };
    let what = format!("the authority staged at {:?} to sign", staged.time(STAGED_AT).ok());
    play.tenant.until(&what, PROMOTED, look).await
}

/// Waits until every agent shows a certificate of this authority.
async fn all_issued_by(play: &Play, attacker: &Attacker<'_>, pki: Pki, within: Duration) -> Result<()> {
    let (begun, pki) = (Instant::now(), Arc::new(pki));
    let controller = pki.controller();
    for agent in agents(play).await? {
        let look = || async {
            let (agent, pki, controller) = (agent.clone(), pki.clone(), controller.clone());
            attacker.inside(move || shows(agent, pki, controller)).await.map(Some)
        };
        let what = format!("{agent} to show a certificate of the new authority");
        play.tenant.until(&what, within.saturating_sub(begun.elapsed()), look).await?;
    }
    println!(
        "every agent has a certificate of the new authority {:.0} s later",
        begun.elapsed().as_secs_f64()
    );
    Ok(())
}

/// An error unless an agent shows a certificate of this authority that makes it that node's.
async fn shows(agent: Agent, pki: Arc<Pki>, controller: Arc<Identity>) -> Result<()> {
    let connection = tote_rpc::connect(agent.address, &agent.node, &controller).await?;
    ensure!(connection.is_issued_by(&pki.authority), "what it shows is signed by another");
    if let Err(reason) = connection.peer() {
        bail!("what it shows is signed by the new authority, but: {reason}");
    }
    Ok(())
}

/// A salvage of 500 MB is in its middle when another authority begins to sign. Another salvage begins at that moment.
async fn rotated_midway(play: Play) -> Result<()> {
    play.big().await?;
    let attacker = Attacker::enter(&play, "n2").await?;
    let (_, pinned) = play.push(&play.image("tiny")?).await?;
    play.pull_on_source(&pinned).await?;
    play.registry.stop()?;
    let beside = Tenant::enter(play.tenant.client(), "ca-rotated-beside", true).await?;
    let outcome = rotate(&play, &attacker, (&beside, &pinned)).await;
    beside.leave().await?;
    outcome
}

async fn rotate(play: &Play, attacker: &Attacker<'_>, (beside, pinned): (&Tenant, &str)) -> Result<()> {
    let (client, changes) = (play.tenant.client(), "tote_ca_changes_total{step=\"promoted\"}");
    let (old, before) = (settled(play).await?, of_leader(&client, changes).await?);
    let ask = Patch::Merge(json!({ "metadata": { "annotations": { ROTATE: "true" } } }));
    objects::<Secret>(&client).patch(CA, &PatchParams::default(), &ask).await?;
    let staged = staged(play, &old).await?;
    let (staged_at, begins) = (staged.time(STAGED_AT)?, PUBLISHED.saturating_sub(AHEAD));
    let begins = staged_at.checked_add(begins)?;
    let Ok(left) = Duration::try_from(begins.duration_since(Timestamp::now())) else {
        bail!(
            "it is {} already, too late to begin a salvage for an authority staged at {staged_at}",
            Timestamp::now()
        );
    };
    // What the salvage is to be in the middle of has its time.
    tokio::time::sleep(left).await;
    half_way(play).await?;
    let moving_at = Timestamp::now();
    let promoted = promoted(play, &staged).await?;
    let (seen, seen_at) = (Instant::now(), Timestamp::now());
    let job = play.tenant.jobs().get("big").await?;
    ensure!(
        phase(&job) == Some(Phase::Transferring),
        "the job was to be in its middle when the authority changed, not so: staged at {staged_at}, bytes moved at \
         {moving_at}, promoted at {:?} and seen at {seen_at}, the job's status: {}",
        promoted.time(PROMOTED_AT).ok(),
        serde_json::to_string_pretty(&job.status)?
    );
    println!("the authority changed when {} % were moved", share_moved(&job));

    beside.start("waiting", &PodShape::new("n3", pinned)).await?;
    beside.running("waiting", SOON).await.context("a salvage that began when the authority changed")?;
    beside.imported(SOON).await?;
    inspect::assert_whole(play.cluster().node("n3")?, pinned)?;
    all_issued_by(play, attacker, promoted.signer()?, RENEWED.saturating_sub(seen.elapsed())).await?;
    let job = ends_well(play).await?;
    let attempts = job.status.map_or(0, |status| status.attempts);
    ensure!(
        attempts == 1,
        "the salvage went on across the change, and was not begun anew: {attempts} attempts"
    );

    let stranger = attacker.stolen.believing(Pki::new().controller());
    stranger.trust(&trusted(&client).await?);
    for agent in &attacker.agents {
        let (to, shown, term) =
            (agent.clone(), Shown::Identity(stranger.clone()), attacker.stolen.term.clone());
        let attack = attacker.inside(move || knock(to, shown, term));
        attacker.refused(agent, ("unknown_authority", 1), "a third authority's certificate", attack).await?;
    }
    let after = of_leader(&client, changes).await?;
    ensure!(after == before + 1, "the leader counts {} promotions, not 1", after.saturating_sub(before));
    Ok(())
}

/// Somebody's own authority is followed; what it was before is put back at the end, but for the authority itself, which
/// the controller keeps.
async fn of_ones_own(play: Play) -> Result<()> {
    let attacker = Attacker::enter(&play, "n2").await?;
    let normal = Normal::prepare(&play, "tiny").await?;
    let own = Authority::generate(SystemTime::now(), Duration::from_secs(365 * 24 * 3600))?;
    let secret = Secret {
        metadata: ObjectMeta { name: Some(OWN.to_owned()), ..ObjectMeta::default() },
        type_: Some("kubernetes.io/tls".to_owned()),
        string_data: Some(
            [(SIGNER, own.certificate_pem()), (SIGNER_KEY, own.key_pem())]
                .map(|(key, text)| (key.to_owned(), text.to_owned()))
                .into(),
        ),
        ..Secret::default()
    };
    let secrets: Api<Secret> = objects(&play.tenant.client());
    secrets.create(&kube::api::PostParams::default(), &secret).await?;
    let outcome = follow_own(&play, &attacker, &own, &normal).await;
    let back = play.install_operator();
    let gone = secrets.delete(OWN, &DeleteParams::default()).await;
    outcome?;
    back.context("putting the operator back as it was")?;
    gone?;
    all_connected(&play).await?;
    let kept = settled(&play).await?;
    ensure!(
        kept.text(SIGNER) == Some(own.certificate_pem()),
        "what signs is not kept once nobody gives it any more"
    );
    Ok(())
}

async fn follow_own(
    play: &Play,
    attacker: &Attacker<'_>,
    own: &Authority,
    normal: &Normal<'_>,
) -> Result<()> {
    let old = settled(play).await?;
    tokio::task::block_in_place(|| install(play.cluster(), &[("tls.existingSecret", OWN)]))?;
    let staged = staged(play, &old).await?;
    ensure!(
        staged.text(NEXT) == Some(own.certificate_pem()),
        "what is staged is not what is in the Secret {OWN}"
    );
    let promoted = promoted(play, &staged).await?;
    let (from, to) = (staged.time(STAGED_AT)?, promoted.time(PROMOTED_AT)?);
    println!("staged at {from}, promoted at {to}");
    ensure!(to.duration_since(from) >= PUBLISHED.try_into()?, "it was trusted for {}, not 120 s", to - from);
    all_issued_by(play, attacker, promoted.signer()?, RENEWED).await?;
    given_is_gone(play).await?;
    normal.works().await
}

/// The Secret that is followed is deleted: said, and nothing stops, for longer than certificates last.
async fn given_is_gone(play: &Play) -> Result<()> {
    let secrets: Api<Secret> = objects(&play.tenant.client());
    let given = secrets.get(OWN).await?;
    secrets.delete(OWN, &DeleteParams::default()).await?;
    let until = Instant::now() + Duration::from_secs(150);
    while Instant::now() < until {
        tokio::time::sleep(Duration::from_secs(5)).await;
        all_connected(play).await.context("while the Secret that is followed is gone")?;
    }
    let metadata = ObjectMeta { name: Some(OWN.to_owned()), ..ObjectMeta::default() };
    secrets.create(&kube::api::PostParams::default(), &Secret { metadata, ..given }).await?;
    Ok(())
}

/// An error unless the `ConfigMap` has what is kept, and nothing else.
fn published(kept: &Kept, map: &ConfigMap) -> Result<()> {
    let due = [(BUNDLE.to_owned(), kept.bundle()?.pem())].into();
    ensure!(map.data.as_ref() == Some(&due), "the ConfigMap holds {:?}, not {due:?}", map.data);
    Ok(())
}

/// What the controller keeps is put back when somebody deletes it or writes into it, and is what it was.
async fn objects_deleted(play: Play) -> Result<()> {
    let normal = Normal::prepare(&play, "tiny").await?;
    let client = play.tenant.client();
    let (secrets, maps): (Api<Secret>, Api<ConfigMap>) = (objects(&client), objects(&client));
    let kept = settled(&play).await?;
    let deployment = objects::<Deployment>(&client).get("tote").await?.uid().unwrap_or_default();
    let is_owned = |metadata: &ObjectMeta| {
        let owners = metadata.owner_references.as_deref().unwrap_or_default();
        owners.len() == 1
            && owners[0].kind == "Deployment"
            && owners[0].name == "tote"
            && owners[0].uid == deployment
    };
    for (with_secret, with_map) in [(false, true), (true, false), (true, true)] {
        let (old_secret, old_map) = (secrets.get(CA).await?.uid(), maps.get(CA).await?.uid());
        let begun = Instant::now();
        if with_secret {
            secrets.delete(CA, &DeleteParams::default()).await?;
        }
        if with_map {
            maps.delete(CA, &DeleteParams::default()).await?;
        }
        let look = || async {
            let (now, map) = (Kept::read(&client).await?, maps.get(CA).await?);
            ensure!((now.secret.uid() != old_secret) == with_secret, "the Secret is the one from before");
            ensure!((map.uid() != old_map) == with_map, "the ConfigMap is the one from before");
            for key in [SIGNER, SIGNER_KEY] {
                ensure!(now.text(key) == kept.text(key), "{key} of the Secret is not what it was");
            }
            published(&now, &map)?;
            for metadata in [&now.secret.metadata, &map.metadata] {
                ensure!(
                    is_owned(metadata),
                    "it is not owned by the Deployment: {:?}",
                    metadata.owner_references
                );
            }
            Ok(Some(()))
        };
        let deleted = match (with_secret, with_map) {
            (true, true) => "Secret and ConfigMap tote-ca",
            (true, false) => "the Secret tote-ca",
            _ => "the ConfigMap tote-ca",
        };
        play.tenant.until(&format!("{deleted} to be back as before"), BACK, look).await?;
        println!("{deleted} deleted, and back {:.1} s later", begun.elapsed().as_secs_f64());
    }
    for nonsense in
        [json!({ BUNDLE: "nonsense" }), json!({ BUNDLE: Pki::new().bundle().pem(), "more": "of it" })]
    {
        let patch = Patch::Merge(json!({ "data": nonsense }));
        maps.patch(CA, &PatchParams::default(), &patch).await?;
        let look = || async { published(&Kept::read(&client).await?, &maps.get(CA).await?).map(Some) };
        play.tenant.until("the ConfigMap tote-ca to be mended", BACK, look).await?;
    }
    all_connected(&play).await?;
    normal.works().await
}

/// The controller's pod, an agent's pod and another agent's process go at the same moment: all have certificates and
/// sessions again within a minute, and the two agents salvage.
async fn restarts_heal(play: Play) -> Result<()> {
    let normal = Normal::prepare(&play, "tiny").await?;
    let client = play.tenant.client();
    let pods: Api<Pod> = objects(&client);
    let (former, _) = leader(&client).await?;
    let deleted =
        agents(&play).await?.into_iter().find(|agent| agent.node == "n2").context("no agent on n2")?;
    let begun = Instant::now();
    let gently = DeleteParams::default();
    tokio::try_join!(
        async { pods.delete(&former, &gently).await.context("deleting the controller's pod") },
        async { pods.delete(&deleted.pod, &gently).await.context("deleting n2's agent") },
        kill(&play, "agent", Some("n3")),
    )?;
    let look = || async {
        let (now, _) = leader(&client).await?;
        ensure!(now != former, "{former} still leads");
        let agents = agents(&play).await?;
        ensure!(agents.iter().all(|agent| agent.uid != deleted.uid), "{deleted} is there still");
        for agent in &agents {
            let certificates = agent.metric(&client, "tote_agent_certificates_total").await?;
            ensure!(certificates >= 1, "{agent} has no certificate");
            let sessions = agent.metric(&client, "tote_agent_sessions").await?;
            ensure!(sessions >= 1, "{agent} has no session");
        }
        let connected = of_leader(&client, "tote_agents_connected").await?;
        ensure!(connected == agents.len() as u64, "{now} has {connected} sessions");
        Ok(Some(()))
    };
    play.tenant.until("another leader with sessions with all agents", SOON, look).await?;
    println!("all have certificates and sessions again {:.1} s later", begun.elapsed().as_secs_f64());
    normal.works().await
}
