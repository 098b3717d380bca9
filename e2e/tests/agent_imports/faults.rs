//! What is killed in the middle of a capped transfer, between a tenth and nine tenths of it: the retry ends in
//! success, and no lease or ingest is left.

use tote_e2e::containerd::Snapshotter::Overlayfs;
use tote_e2e::images::Image;
use tote_e2e::tools::Containerd;
use tote_rpc::testing::Pki;
use tote_rpc::v1::{self, Cause, import_event::Event};

use crate::node::{Node, PKI, Source, WAIT, block_on};
use crate::same;
use crate::stream::{come_in_vain, ended, until_moved};

/// 60 MB at 20 MiB/s: some 3 s.
const IMAGE: &str = "random-60";
const CAP: Option<&str> = Some("20Mi");
const ID: &str = "transfer-1";

struct Transfer {
    source: Source,
    holder: Node,
    image: Image,
    reference: String,
}

impl Transfer {
    fn prepare(seed: &str) -> Self {
        let source = Source::start();
        let (image, reference) = source.push(IMAGE, seed);
        let holder = Node::start(Containerd::V2, Overlayfs, None);
        source.pull(&holder, &reference);
        Self { source, holder, image, reference }
    }

    /// Starts it, does something when some of it has moved, attaches again, and tells how many bytes came in all, and how
    /// many with the run that came to its end.
    fn interrupted(&self, target: &mut Node, fault: impl FnOnce(&mut Node)) -> (u64, u64) {
        let (mut events, before) = block_on(async {
            let sources = &[&self.holder][..];
            let mut events = target.attach(ID, &self.reference, self.image.digest(), sources).await.unwrap();
            let before = until_moved(&mut events, 0.3).await;
            (events, before)
        });
        fault(target);
        let done = block_on(async {
            let sources = &[&self.holder][..];
            let mut events = target.attach(ID, &self.reference, self.image.digest(), sources).await.unwrap();
            ended(&mut events).await
        });
        let done = done.unwrap();
        target.check_whole(&self.reference, "after the fault");
        same(&self.holder.tree(&self.image), &target.tree(&self.image), "after the fault");
        let all = block_on(come_in_vain(&mut events, &before)) + done.transferred_bytes;
        (all.try_into().unwrap(), done.transferred_bytes.try_into().unwrap())
    }
}

#[test]
fn the_agent_killed() {
    let transfer = Transfer::prepare("agent");
    let size = transfer.image.needed_bytes().unwrap();
    for version in Containerd::ALL {
        let mut target = Node::start(version, Overlayfs, CAP);
        let (_, moved) = transfer.interrupted(&mut target, |target| {
            target.kill_agent();
            target.start_agent();
        });
        assert!(moved < size * 8 / 10, "{version}: what was there is not moved again, {moved} of {size}");
    }
}

/// Certificates of another authority on both sides in the middle, then the first authority believed no more: what is under
/// way goes on, what is begun then is begun with the new ones.
#[test]
fn certificates_and_authorities_replaced() {
    let transfer = Transfer::prepare("replaced");
    let (digest, first) = (transfer.image.digest(), &transfer.holder);
    let second = Node::start(Containerd::V1_7, Overlayfs, None);
    transfer.source.pull(&second, &transfer.reference);
    let target = Node::start(Containerd::V2, Overlayfs, CAP);
    let other = Pki::new();
    let done = block_on(async {
        let mut events = target.attach(ID, &transfer.reference, digest, &[first]).await.unwrap();
        let before = until_moved(&mut events, 0.2).await;
        let nodes = [first, &second, &target];
        let mut agents = Vec::new();
        for node in nodes {
            agents.push(node.agent().await);
        }
        for (node, agent) in nodes.into_iter().zip(&mut agents) {
            node.certify(agent, &other, &[&other, &*PKI]).await;
        }
        let after = until_moved(&mut events, 0.4).await;
        assert!(after.transferred_bytes > before.transferred_bytes, "it goes on");
        let (reference, sources) = (&transfer.reference, &[first, &second][..]);
        let mut events = target.attach_by(&other, ID, reference, digest, sources).await.unwrap();
        for (node, agent) in nodes.into_iter().zip(&mut agents) {
            node.certify(agent, &other, &[&other]).await;
        }
        let old = PKI.controller();
        old.trust(&other.bundle());
        let refused = target.agent_as(&old).await.cancel(v1::CancelRequest::default()).await;
        // Not because of the term, which it lacks as well.
        let code = refused.unwrap_err().code();
        assert_ne!(code, tonic::Code::InvalidArgument, "the first authority is believed no more");
        let ended = ended(&mut events).await.unwrap();
        for mut agent in agents {
            let gone = async {
                while agent.cancel(v1::CancelRequest::default()).await.unwrap_err().code()
                    == tonic::Code::InvalidArgument
                {}
            };
            tokio::time::timeout(WAIT, gone).await.expect("connections of the first authority's end");
        }
        ended
    });
    assert_eq!(done.transferred_bytes, done.total_bytes, "nothing was moved twice");
    target.check_whole(&transfer.reference, "after the change");
    same(&first.tree(&transfer.image), &target.tree(&transfer.image), "after the change");
}

#[test]
fn containerd_killed_and_restarted() {
    let transfer = Transfer::prepare("containerd");
    let size = transfer.image.needed_bytes().unwrap();
    for version in Containerd::ALL {
        let mut target = Node::start(version, Overlayfs, CAP);
        let (killed, _) = transfer.interrupted(&mut target, |target| {
            target.daemon.kill().unwrap();
            target.daemon.restart().unwrap();
        });
        let mut target = Node::start(version, Overlayfs, CAP);
        let (restarted, _) = transfer.interrupted(&mut target, |target| target.daemon.restart().unwrap());
        println!("{version}: {killed} and {restarted} bytes came of {size}");
        // What was on its way when containerd ended may be moved again.
        let most = size * 11 / 10;
        assert!(killed < most && restarted < most, "{version}: {killed} and {restarted} of {size}");
    }
}

#[test]
fn the_source_killed() {
    let transfer = Transfer::prepare("source");
    let size = transfer.image.needed_bytes().unwrap();
    let mut dying = Node::start(Containerd::V1_7, Overlayfs, None);
    transfer.source.pull(&dying, &transfer.reference);
    let target = Node::start(Containerd::V2, Overlayfs, CAP);
    let mut events = block_on(async {
        let sources = &[&dying, &transfer.holder][..];
        let attached = target.attach(ID, &transfer.reference, transfer.image.digest(), sources);
        let mut events = attached.await.unwrap();
        until_moved(&mut events, 0.3).await;
        events
    });
    dying.kill_agent();
    let done = block_on(ended(&mut events)).unwrap();
    assert_eq!(done.source_nodes.len(), 2);
    // A piece of each blob on its way is lost at most.
    let moved = u64::try_from(done.transferred_bytes).unwrap();
    assert!(moved < size * 11 / 10, "{moved} of {size}");
    target.check_whole(&transfer.reference, "after the source's death");
}

#[test]
fn cancelled_it_leaves_nothing() {
    let transfer = Transfer::prepare("cancelled");
    for version in Containerd::ALL {
        let mut target = Node::start(version, Overlayfs, CAP);
        for killed in [false, true] {
            let mut events = block_on(async {
                let sources = &[&transfer.holder][..];
                let attached = target.attach(ID, &transfer.reference, transfer.image.digest(), sources);
                let mut events = attached.await.unwrap();
                until_moved(&mut events, 0.3).await;
                events
            });
            if killed {
                // An agent that knows nothing of the transfer removes it as well.
                target.kill_agent();
                target.start_agent();
            }
            assert!(target.cancel(ID), "{version}");
            target.check_nothing();
            assert!(!target.cancel(ID), "{version}");
            if !killed {
                let failed = block_on(ended(&mut events)).unwrap_err();
                assert_eq!(failed.cause(), Cause::Cancelled, "{version}");
            }
        }
    }
}

/// Kubelet's own pull of the same image at the same time: both end well, whoever is first.
#[test]
fn a_pull_at_the_same_time_does_no_damage() {
    let transfer = Transfer::prepare("pull");
    for version in Containerd::ALL {
        for share in [0.1, 0.5] {
            let target = Node::start(version, Overlayfs, CAP);
            let done = block_on(async {
                let sources = &[&transfer.holder][..];
                let attached = target.attach(ID, &transfer.reference, transfer.image.digest(), sources);
                let mut events = attached.await.unwrap();
                until_moved(&mut events, share).await;
                tokio::task::block_in_place(|| transfer.source.pull(&target, &transfer.reference));
                ended(&mut events).await
            });
            assert!(done.is_ok(), "{version} at {share}: {done:?}");
            target.check_whole(&transfer.reference, version.version());
        }
    }
}

/// Two transfers of one image under two names move each blob once.
#[test]
fn two_names_at_once_move_one_image() {
    let transfer = Transfer::prepare("twice");
    let size = transfer.image.needed_bytes().unwrap();
    let target = Node::start(Containerd::V2, Overlayfs, None);
    let second = "registry.test/second/name:1";
    let (one, two) = block_on(async {
        let sources = &[&transfer.holder][..];
        let digest = transfer.image.digest();
        let mut one = target.attach("one", &transfer.reference, digest, sources).await.unwrap();
        let mut two = target.attach("two", second, digest, sources).await.unwrap();
        tokio::join!(ended(&mut one), ended(&mut two))
    });
    let moved = one.unwrap().transferred_bytes + two.unwrap().transferred_bytes;
    let total = u64::try_from(moved).unwrap();
    assert!(total >= size && total < size + 100_000, "{total} bytes of {size}");
    target.check_whole(second, "the second name");
}

#[test]
fn bad_requests_are_refused_by_field() {
    let node = Node::start(Containerd::V2, Overlayfs, None);
    block_on(async {
        let digest = format!("sha256:{}", "0".repeat(64));
        for (id, reference, digest, says) in [
            ("a/b", "docker.io/library/x:1", digest.as_str(), "transfer_id"),
            ("t", "x", digest.as_str(), "reference"),
            ("t", "docker.io/library/x:1", "sha256:0", "digest"),
        ] {
            let status = node.attach(id, reference, digest, &[]).await.unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            assert!(status.message().starts_with(says), "{status}");
        }
        let mut events = node.attach("t", "docker.io/library/x:1", &digest, &[]).await.unwrap();
        let first = events.message().await.unwrap().unwrap().event.unwrap();
        assert!(matches!(first, Event::Progress(_) | Event::Failed(_)), "{first:?}");
    });
}
