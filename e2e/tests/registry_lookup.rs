//! Look-ups of the controller against the real registry, with and without a login, and its faults.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::time::{Duration, Instant};

use tote_controller::registry::{Credential, Format, Keyring, Lookup, LookupError, Settings};
use tote_e2e::images::{Layout, preset};
use tote_e2e::registry::{Control, Effect, Mode, Options, Registry, Rule};
use tote_image::{Digest, Reference};

/// `shop` with the password `let me in`, as htpasswd writes it (bcrypt).
const HTPASSWD: &str = "shop:$2a$05$abcdefghijklmnopqrstuu4h2R.N3/mVBA7Xh7aLzKSJDAsK61n52\n";

const TIMEOUT: Duration = Duration::from_secs(2);

fn registry(storage: Option<&Path>) -> Registry {
    let listen = "127.0.0.1:0".parse().unwrap();
    Registry::start(&Options { listen, name: None, storage: storage.map(Path::to_owned) }).unwrap()
}

/// Pushes an image; its digest.
async fn pushed(registry: &Registry, kind: &str) -> Digest {
    let image = preset(kind, &Layout::temporary().unwrap(), "x").unwrap();
    registry.upstream().push(&image, "test/it", Some("v1")).await.unwrap();
    image.digest().parse().unwrap()
}

fn lookup(registry: &Registry) -> Lookup {
    let hosts = vec![registry.upstream().name().parse().unwrap()];
    Lookup::new(Settings { insecure: hosts.clone(), hosts, timeout: TIMEOUT, ca_pem: None }).unwrap()
}

fn reference(registry: &Registry, rest: &str) -> Reference {
    format!("{}/{rest}", registry.upstream().name()).parse().unwrap()
}

#[tokio::test]
async fn a_tag_means_what_was_pushed() {
    let registry = registry(None);
    for kind in ["tiny", "docker", "attested"] {
        let digest = pushed(&registry, kind).await;
        let lookup = lookup(&registry);
        assert_eq!(
            lookup.digest(&reference(&registry, "test/it:v1"), &[]).await,
            Ok(digest.clone()),
            "{kind}"
        );
        let pinned = reference(&registry, &format!("test/it@{digest}"));
        assert_eq!(lookup.digest(&pinned, &[]).await, Ok(digest.clone()), "{kind}");
        let host = registry.upstream().name().to_owned();
        for unknown in ["test/it:v2", "test/other:v1"] {
            let answer = lookup.digest(&reference(&registry, unknown), &[]).await;
            assert_eq!(answer, Err(LookupError::NotFound(host.clone())), "{unknown}");
        }
        registry.upstream().delete("test/it", digest.as_str()).await.unwrap();
        let answer = self::lookup(&registry).digest(&pinned, &[]).await;
        assert_eq!(answer, Err(LookupError::NotFound(host)), "{kind} is deleted");
    }
    assert!(registry.requests().unwrap().iter().all(|request| request.method == "HEAD"), "HEAD alone tells");
}

#[tokio::test]
async fn a_login_is_found_in_a_pull_secret() {
    let storage = tempfile::tempdir().unwrap();
    let digest = pushed(&registry(Some(storage.path())), "tiny").await;
    std::fs::write(storage.path().join("htpasswd"), HTPASSWD).unwrap();
    let registry = registry(Some(storage.path()));
    let (lookup, image) = (lookup(&registry), reference(&registry, "test/it:v1"));
    let credentials = |place: &str, password: &str| {
        let auths = serde_json::json!({"auths": {place: {"username": "shop", "password": password}}});
        let mut keyring = Keyring::default();
        keyring.add(Format::ConfigJson, auths.to_string().as_bytes()).unwrap();
        keyring.find(&image)
    };
    let right = credentials(registry.upstream().name(), "let me in");
    assert_eq!(lookup.digest(&image, &right).await, Ok(digest));
    let elsewhere = credentials("other.test", "let me in");
    for wrong in [vec![], elsewhere, credentials(registry.upstream().name(), "wrong")] {
        let answer = lookup.digest(&image, &wrong).await;
        assert_eq!(
            answer,
            Err(LookupError::Unauthorized(registry.upstream().name().to_owned())),
            "{wrong:?}"
        );
    }
    let token = [Credential::IdentityToken("t".to_owned())];
    assert_eq!(lookup.digest(&image, &token).await.unwrap_err().label(), "unauthorized");
    let unknown = lookup.digest(&reference(&registry, "test/it:v2"), &right).await;
    assert_eq!(unknown.unwrap_err().label(), "not_found");
}

#[tokio::test]
async fn its_faults_are_told_apart_and_end_in_time() {
    let registry = registry(None);
    let digest = pushed(&registry, "tiny").await;
    let image = reference(&registry, "test/it:v1");
    let rule = |effect| registry.rules(&[Rule { path: String::new(), effect }]).unwrap();
    let began = Instant::now();
    for (effect, label) in [
        (Effect::Status(403), "denied"),
        (Effect::Status(429), "rate_limited"),
        (Effect::Status(500), "unavailable"),
        (Effect::Hang, "timeout"),
    ] {
        rule(effect);
        let error = lookup(&registry).digest(&image, &[]).await.unwrap_err();
        assert_eq!(error.label(), label, "{effect:?}: {error}");
    }
    registry.heal().unwrap();
    for (mode, label) in
        [(Mode::Refusing, "unavailable"), (Mode::Hanging, "timeout"), (Mode::Dropping, "timeout")]
    {
        registry.mode(mode).unwrap();
        let error = lookup(&registry).digest(&image, &[]).await.unwrap_err();
        assert_eq!(error.label(), label, "{mode:?}: {error}");
    }
    assert!(began.elapsed() < 4 * TIMEOUT + Duration::from_secs(2), "{:?}", began.elapsed());
    registry.heal().unwrap();
    assert_eq!(lookup(&registry).digest(&image, &[]).await, Ok(digest));
}
