//! Peers that give wrong bytes, too few, too many, or none.

use std::time::Duration;

use tote_agent::bandwidth::Bandwidth;
use tote_agent::containerd::Fake;
use tote_agent::import::{Context, Imports, Lifetimes, Patience};
use tote_rpc::v1::Cause;

use crate::peers::{PATIENCE, Peer, Trick, agent, context, import, request};
use crate::{NAME, PIECE, check_complete, check_nothing, image, large_image};

fn tricks(size: usize) -> Vec<Trick> {
    vec![
        Trick::Wrong,
        Trick::Cut(size / 8),
        Trick::Stall(size / 8),
        Trick::Endless,
        Trick::Short(size / 8),
        Trick::Hang,
        Trick::Status(500),
        Trick::Status(404),
        Trick::Status(302),
        Trick::Status(206),
    ]
}

/// With any blob, and whatever a peer does, the next one is asked and the image arrives.
#[tokio::test]
async fn the_next_source_is_asked() {
    let image = image().indexed();
    let mut digests = vec![&image.target.digest, &image.manifest.digest, &image.config.digest];
    digests.push(&image.layers[0].digest);
    let cases = digests.into_iter().flat_map(|digest| {
        tricks(image.bytes[digest].len()).into_iter().map(move |trick| (digest.clone(), trick))
    });
    let image = &image;
    // So long that the good one is never left.
    let patience = Patience { head: Duration::from_secs(4), piece: Duration::from_secs(2), ..PATIENCE };
    let runs = cases.map(|(digest, trick)| async move {
        let (bad, good) = (Peer::holding(image, NAME).await, Peer::holding(image, NAME).await);
        bad.trick(&digest, trick.clone());
        let target = Fake::default();
        let context = Context { patience, ..context(&target, Bandwidth::default()) };
        let agent = Imports::new(context, Lifetimes::default());
        let outcome = import(&agent, request("t", NAME, image, &[&bad, &good])).await;
        let done = outcome.unwrap_or_else(|failed| panic!("{trick:?} with {digest}: {failed:?}"));
        assert!(done.source_nodes.contains(&good.node), "{trick:?} with {digest}: {:?}", done.source_nodes);
        check_complete(&target, image, NAME).await;
        // Documents come whole from one; of a layer what has come is not asked for again.
        let came = match trick {
            Trick::Cut(came) | Trick::Stall(came) | Trick::Short(came)
                if digest == image.layers[0].digest =>
            {
                came
            }
            _ => 0,
        };
        assert_eq!(good.offsets(&digest)[0], came as u64, "{trick:?} with {digest}");
    });
    futures::future::join_all(runs).await;
}

/// If there is no other peer, the failure says what each did, and nothing is visible.
#[tokio::test]
async fn alone_it_is_named() {
    let image = image();
    let digest = &image.layers[0].digest;
    let image = &image;
    let runs = tricks(image.bytes[digest].len()).into_iter().map(|trick| async move {
        let (bad, target) = (Peer::holding(image, NAME).await, Fake::default());
        bad.trick(digest, trick.clone());
        let agent = agent(&target);
        let failed = import(&agent, request("t", NAME, image, &[&bad])).await.unwrap_err();
        let cause = match trick {
            Trick::Wrong | Trick::Endless | Trick::Short(_) => Cause::DigestMismatch,
            _ => Cause::NoSource,
        };
        assert_eq!((failed.cause(), failed.retryable), (cause, true), "{trick:?}: {}", failed.message);
        assert!(failed.message.contains(&bad.node), "{trick:?}: {}", failed.message);
        assert!(failed.message.contains(digest.as_str()), "{trick:?}: {}", failed.message);
        assert!(agent.cancel(&request("t", NAME, image, &[]).id).await.unwrap());
        check_nothing(&target).await;
    });
    futures::future::join_all(runs).await;
}

/// What came before a connection broke is not asked for again.
#[tokio::test]
async fn a_broken_transfer_is_resumed() {
    let image = image();
    let digest = &image.layers[0].digest;
    let half = image.bytes[digest].len() / 2;
    let (bad, good) = (Peer::holding(&image, NAME).await, Peer::holding(&image, NAME).await);
    bad.trick(digest, Trick::Cut(half));
    let target = Fake::default();
    let done = import(&agent(&target), request("t", NAME, &image, &[&bad, &good])).await.unwrap();
    assert_eq!(good.offsets(digest), [half as u64]);
    assert_eq!(done.transferred_bytes, done.total_bytes);
    check_complete(&target, &image, NAME).await;
}

/// Half from one that lies, half from one that does not: the honest one is not blamed.
#[tokio::test]
async fn the_honest_one_is_not_blamed() {
    let image = large_image();
    let digest = &image.layers[0].digest;
    let wrong = vec![0x55; PIECE];
    let (liar, honest) = (Peer::holding(&image, NAME).await, Peer::holding(&image, NAME).await);
    // The liar's bytes are what an earlier agent left behind.
    let target = Fake::default();
    let first = agent(&target);
    liar.trick(digest, Trick::Stall(PIECE + 1000));
    let attached = first.attach(request("t", NAME, &image, &[&liar])).unwrap();
    crate::eventually("half a layer", async || {
        target.partial(digest).is_some_and(|partial| partial.len() == wrong.len())
    })
    .await;
    first.stop().await;
    drop(attached);
    target.overwrite_partial(digest, &wrong);
    let done = import(&agent(&target), request("t", NAME, &image, &[&honest])).await.unwrap();
    assert_eq!(honest.offsets(digest)[0], wrong.len() as u64, "it goes on where that ends");
    assert!(honest.offsets(digest).contains(&0), "and then begins anew: {:?}", honest.offsets(digest));
    assert_eq!(done.source_nodes, [honest.node.clone()]);
    check_complete(&target, &image, NAME).await;
}

/// Nor is it when both were asked in turn: it is asked once more, for the whole.
#[tokio::test]
async fn the_one_that_completes_is_not_blamed() {
    let image = image();
    let digest = &image.layers[0].digest;
    let (liar, honest) = (Peer::holding(&image, NAME).await, Peer::holding(&image, NAME).await);
    liar.trick(digest, Trick::WrongCut(1000));
    let target = Fake::default();
    let done = import(&agent(&target), request("t", NAME, &image, &[&liar, &honest])).await.unwrap();
    assert_eq!(honest.offsets(digest), [1000, 0]);
    assert_eq!(liar.asked(digest), 1);
    assert!(done.transferred_bytes > done.total_bytes, "what was thrown away had been moved too");
    check_complete(&target, &image, NAME).await;
}

/// No peer can send an agent to an address that the controller did not name.
#[tokio::test]
async fn no_peer_sends_it_elsewhere() {
    let image = image();
    let (bad, elsewhere) = (Peer::holding(&image, NAME).await, Peer::holding(&image, NAME).await);
    for digest in [&image.target.digest, &image.layers[0].digest] {
        bad.behave();
        bad.trick(digest, Trick::Redirect(elsewhere.address));
        let target = Fake::default();
        let failed = import(&agent(&target), request("t", NAME, &image, &[&bad])).await.unwrap_err();
        assert_eq!(failed.cause(), Cause::NoSource, "{}", failed.message);
        assert!(failed.message.contains("307"), "{}", failed.message);
    }
    for digest in image.digests() {
        assert_eq!(elsewhere.asked(&digest), 0);
    }
}

/// Nor is another node's agent taken for the one that the controller named.
#[tokio::test]
async fn another_nodes_agent_is_not_believed() {
    let image = image();
    let mut named = Peer::holding(&image, NAME).await;
    named.node = "somebody-else".to_owned();
    let failed = import(&agent(&Fake::default()), request("t", NAME, &image, &[&named])).await.unwrap_err();
    assert_eq!(failed.cause(), Cause::NoSource, "{}", failed.message);
    assert!(failed.message.contains("not the agent of that node"), "{}", failed.message);
}
