//! Who alone may have an image is in kubelet's records before the image is to be seen.

use std::fs;
use std::sync::Arc;

use tempfile::TempDir;
use tote_agent::bandwidth::Bandwidth;
use tote_agent::containerd::{Containerd as _, Fake};
use tote_agent::import::{Context, ImportRequest, Imports, Lifetimes};
use tote_agent::kubelet::{Records, Restriction};
use tote_agent::testing::Blobs;
use tote_rpc::v1;

use crate::peers::{Peer, agent, context, import, request};
use crate::{NAME, check_complete, image};

/// The directory of a kubelet that keeps records.
fn kubelet() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir_all(directory.path().join("image_manager/pulled")).unwrap();
    directory
}

fn agent_beside(kubelet: &TempDir, fake: &Fake) -> Arc<Imports> {
    let records = Some(Arc::new(Records::new(kubelet.path())));
    let context = Context { records, ..context(fake, Bandwidth::default()) };
    Arc::new(Imports::new(context, Lifetimes::default()))
}

/// For the Secret of one namespace.
fn restricted(image: &Blobs, peer: &Peer) -> ImportRequest {
    let secret = v1::PullSecret {
        uid: "u".to_owned(),
        namespace: "shop".to_owned(),
        name: "login".to_owned(),
        credential_hash: "h".to_owned(),
    };
    let repository = v1::PulledRepository {
        repository: "registry.test/team/app".to_owned(),
        secrets: vec![secret],
        ..v1::PulledRepository::default()
    };
    let mut request = request("t", NAME, image, &[peer]);
    request.restriction = Some(Restriction::parse(repository, &NAME.parse().unwrap()).unwrap());
    request
}

fn recorded(kubelet: &TempDir, image: &Blobs) -> Option<v1::PulledRecord> {
    Records::new(kubelet.path()).read().of(&image.config.digest)
}

#[tokio::test]
async fn a_restricted_image_comes_with_its_record() {
    let (image, kubelet, target) = (image().indexed(), kubelet(), Fake::default());
    let peer = Peer::holding(&image, NAME).await;
    import(&agent_beside(&kubelet, &target), restricted(&image, &peer)).await.unwrap();
    let record = recorded(&kubelet, &image).unwrap();
    assert_eq!(record.repositories[0].repository, "registry.test/team/app");
    assert_eq!(record.repositories[0].secrets[0].namespace, "shop");
    check_complete(&target, &image, NAME).await;
}

#[tokio::test]
async fn one_that_is_not_restricted_comes_without() {
    let (image, kubelet, target) = (image(), kubelet(), Fake::default());
    let peer = Peer::holding(&image, NAME).await;
    import(&agent_beside(&kubelet, &target), request("t", NAME, &image, &[&peer])).await.unwrap();
    assert_eq!(recorded(&kubelet, &image), None);
}

#[tokio::test]
async fn nothing_is_to_be_seen_where_the_record_cannot_be_written() {
    let (image, target) = (image(), Fake::default());
    let peer = Peer::holding(&image, NAME).await;
    let kubelet = kubelet();
    fs::remove_dir(kubelet.path().join("image_manager/pulled")).unwrap();
    for agent in [agent(&target), agent_beside(&kubelet, &target)] {
        let failed = import(&agent, restricted(&image, &peer)).await.unwrap_err();
        assert_eq!(failed.cause(), v1::Cause::PullRecord);
        assert!(failed.retryable, "{failed:?}");
        assert_eq!(target.images().await.unwrap(), []);
    }
    // What came is not moved again once it can be written.
    fs::create_dir(kubelet.path().join("image_manager/pulled")).unwrap();
    let done = import(&agent_beside(&kubelet, &target), restricted(&image, &peer)).await.unwrap();
    assert_eq!(done.transferred_bytes, 0);
    assert!(recorded(&kubelet, &image).is_some());
}

#[tokio::test]
async fn killed_at_any_step_the_image_is_never_to_be_seen_without_its_record() {
    let image = image();
    let mut seen_unfinished = 0;
    for calls in 0.. {
        let (kubelet, target) = (kubelet(), Fake::default());
        let peer = Peer::holding(&image, NAME).await;
        let first = agent_beside(&kubelet, &target);
        target.die_after(Some(calls));
        let mut attached = first.attach(restricted(&image, &peer)).unwrap();
        let ended = attached.states.wait_for(|state| state.outcome.is_some());
        let gone = async {
            while !target.is_dead() {
                tokio::task::yield_now().await;
            }
        };
        let over = tokio::select! { ended = ended => ended.is_ok(), () = gone => false };
        first.stop().await;
        target.die_after(None);
        if !target.images().await.unwrap().is_empty() {
            assert!(recorded(&kubelet, &image).is_some(), "after {calls} calls");
            seen_unfinished += usize::from(!over);
        }
        if over {
            break;
        }
    }
    assert!(seen_unfinished > 0, "it was killed between its records, too");
}
