//! An agent, or its containerd, killed at every step of an import.

use std::time::Duration;

use tote_agent::bandwidth::Bandwidth;
use tote_agent::containerd::{Containerd as _, Fake};

use crate::peers::{LIFETIMES, Peer, agent, agent_with, import, request};
use crate::{NAME, check_complete, check_nothing, eventually, image};

/// Runs an import whose containerd is gone from its `calls`-th call on, kills the agent, revives containerd.
/// Tells whether it had ended before.
async fn killed_after(calls: u32, target: &Fake, peer: &Peer) -> bool {
    let first = agent(target);
    target.die_after(Some(calls));
    let mut attached = first.attach(request("t", NAME, &image(), &[peer])).unwrap();
    let ended = async {
        let ended = attached.states.wait_for(|state| state.outcome.is_some());
        ended.await.is_ok_and(|state| state.outcome.as_ref().is_some_and(Result::is_ok))
    };
    // Its containerd is waited for: what ends it here is the agent's death.
    let gone = async {
        while !target.is_dead() {
            tokio::task::yield_now().await;
        }
    };
    let ended = tokio::select! { ended = ended => ended, () = gone => false };
    first.stop().await;
    target.die_after(None);
    ended
}

#[tokio::test]
async fn at_every_step_the_next_run_succeeds() {
    let image = image();
    let mut steps = 0;
    loop {
        let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
        let ended = killed_after(steps, &target, &peer).await;
        // Nothing is visible unless it is complete.
        for record in target.images().await.unwrap() {
            assert_eq!(record.target, image.target);
            for digest in image.digests() {
                assert!(
                    target.blob(&digest).await.unwrap().is_some(),
                    "step {steps}: {digest} of {record:?}"
                );
            }
        }
        // Nor does a collection at that point take anything that the next run would have to move again.
        let blobs = target.blobs().await.unwrap();
        target.collect();
        assert_eq!(target.blobs().await.unwrap(), blobs, "step {steps}");
        let done = import(&agent(&target), request("t", NAME, &image, &[&peer])).await;
        let done = done.unwrap_or_else(|failed| panic!("step {steps}: {failed:?}"));
        assert_eq!(done.transferred_bytes + done.reused_bytes, done.total_bytes, "step {steps}");
        for (digest, bytes) in &image.bytes {
            assert!(peer.offsets(digest).len() <= 2, "step {steps}: {digest} of {} bytes", bytes.len());
        }
        check_complete(&target, &image, NAME).await;
        if ended {
            break;
        }
        steps += 1;
    }
    println!("killed at each of {steps} calls to containerd");
    assert!(steps > 30, "an import is more than {steps} calls");
}

#[tokio::test]
async fn at_every_step_what_nobody_comes_back_for_is_removed() {
    let image = image();
    let peer = Peer::holding(&image, NAME).await;
    // Records that were made stay: the image is complete by then.
    for steps in 0.. {
        let target = Fake::default();
        let ended = killed_after(steps, &target, &peer).await;
        if ended || !target.images().await.unwrap().is_empty() {
            assert!(steps > 30, "an import is more than {steps} calls");
            break;
        }
        let next = agent_with(&target, Bandwidth::default(), LIFETIMES);
        next.sweep().await.unwrap();
        if steps > 5 {
            assert!(!target.leases().await.unwrap().is_empty(), "step {steps}: not before its time");
        }
        eventually("the sweep", async || {
            next.sweep().await.unwrap();
            target.leases().await.unwrap().is_empty()
        })
        .await;
        target.collect();
        check_nothing(&target).await;
    }
}

/// A restart of containerd alone is sat out.
#[tokio::test]
async fn containerd_comes_back() {
    let image = image();
    let (peer, target) = (Peer::holding(&image, NAME).await, Fake::default());
    target.die_after(Some(25));
    let agent = agent(&target);
    let importing = import(&agent, request("t", NAME, &image, &[&peer]));
    let reviving = async {
        eventually("containerd is gone", async || target.is_dead()).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        target.die_after(None);
    };
    let (done, ()) = tokio::join!(importing, reviving);
    assert_eq!(done.unwrap().reused_bytes, 0, "what the transfer itself had moved is not called reused");
    check_complete(&target, &image, NAME).await;
}
