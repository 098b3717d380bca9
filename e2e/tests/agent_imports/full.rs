//! A disk that is really full, or fills: refused before a layer moves, or ended in the middle; then nothing is left and the
//! space is back.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use rustix::fs::FallocateFlags;
use tote_e2e::containerd::Snapshotter::Overlayfs;
use tote_e2e::host::wait_until;
use tote_e2e::images::{Build, Compression, Entry, Image, Layer, Layout, busybox};
use tote_e2e::tools::Containerd;
use tote_rpc::v1::{self, Cause, import_event::Event};

use crate::node::{Node, Source, block_on};
use crate::stream::{ended, until_moved};

/// 60 MB that gzip does not make fewer, and as many once unpacked.
const IMAGE: &str = "random-60";

/// Little to move, and 120 MB once unpacked.
fn bomb() -> Image {
    let layout = Layout::temporary().unwrap();
    let zeros = Layer::new(Compression::Gzip).with(Entry::file("zeros", vec![0; 120 << 20]));
    Build::new().layer(busybox("bomb", Compression::Gzip).unwrap()).layer(zeros).write(&layout).unwrap()
}

const MIB: u64 = 1 << 20;

/// What is kept free of a disk of so many MiB.
fn reserve(mebibytes: u64) -> u64 {
    mebibytes * MIB / 20
}

fn disk_full(failed: &v1::Failed, says: &str) {
    assert_eq!((failed.cause(), failed.retryable), (Cause::DiskFull, true), "{}", failed.message);
    assert!(failed.message.contains(says), "{says} is not in {}", failed.message);
}

/// Nothing of the image is there, and no more space is taken than before, but for what containerd writes down.
fn check_freed(target: &Node, before: u64) {
    target.check_nothing();
    let free = target.free();
    assert!(free + 2 * MIB > before, "{free} bytes are free, {before} were");
}

/// Makes a file that leaves no more free than this.
fn fill(target: &Node, path: &Path, left: u64) {
    let file = File::create(path).unwrap();
    let takes = target.free().checked_sub(left).expect("more is free");
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, takes).unwrap();
}

/// The least that was free while something ran.
fn least_free<T>(target: &Node, run: impl FnOnce() -> T) -> (u64, T) {
    std::thread::scope(|scope| {
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let watching = scope.spawn(move || {
            let mut least = u64::MAX;
            // Until the sender is gone.
            while stopped.recv_timeout(Duration::from_millis(5))
                == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
            {
                least = least.min(target.free());
            }
            least
        });
        let outcome = run();
        drop(stop);
        (watching.join().unwrap(), outcome)
    })
}

#[test]
fn a_full_disk() {
    let source = Source::start();
    let (image, reference) = source.push(IMAGE, "full");
    let holder = Node::start(Containerd::V2, Overlayfs, None);
    source.pull(&holder, &reference);
    let bomb = bomb();
    let unpacked = source.push_image(&bomb, "bomb");
    source.pull(&holder, &unpacked);
    for version in Containerd::ALL {
        let mut target = Node::start(version, Overlayfs, Some("20Mi"));
        target.shrink(40);
        let before = target.free();

        // It does not fit: not one byte of a layer comes.
        let (moved, failed) = block_on(async {
            let attached = target.attach("small", &reference, image.digest(), &[&holder]).await;
            let (mut events, mut moved) = (attached.unwrap(), 0);
            loop {
                match events.message().await.unwrap().and_then(|event| event.event) {
                    Some(Event::Progress(progress)) => moved = moved.max(progress.transferred_bytes),
                    Some(Event::Failed(failed)) => break (moved, failed),
                    other => panic!("{version}: {other:?}"),
                }
            }
        });
        disk_full(&failed, "what is missing of the image takes");
        assert!(
            moved < 10_000,
            "{version}: {moved} bytes moved, which are more than index, manifest and config"
        );
        assert_eq!(target.daemon.ctr(&["content", "active"]).unwrap().lines().count(), 1, "no ingest");
        assert!(target.cancel("small"));
        check_freed(&target, before);

        // It fits, but what it is unpacked to does not: what a layer has taken by then is given back.
        let failed = block_on(async {
            let attached = target.attach("unpacked", &unpacked, bomb.digest(), &[&holder]).await;
            ended(&mut attached.unwrap()).await.unwrap_err()
        });
        disk_full(&failed, "unpacking layer sha256:");
        let snapshots = target.daemon.ctr(&["snapshots", "ls"]).unwrap();
        assert!(!snapshots.contains("Active"), "{version}: {snapshots}");
        // containerd notices between two pieces that nobody waits for it any more.
        let back = || Ok(target.free() > before - 20 * MIB);
        wait_until("the space to be back", Duration::from_secs(10), back).unwrap();
        assert!(target.cancel("unpacked"));
        check_freed(&target, before);

        // Something else fills the disk when a third has come.
        let [filler, more] = ["filler", "more"].map(|name| target.daemon.root().join(name));
        target.resize(400);
        let before = target.free();
        // Most of it before, so that little is left to do while the image comes.
        fill(&target, &filler, reserve(400) + 90 * MIB);
        let (least, failed) = least_free(&target, || {
            block_on(async {
                let attached = target.attach("filled", &reference, image.digest(), &[&holder]).await;
                let mut events = attached.unwrap();
                until_moved(&mut events, 0.3).await;
                tokio::task::block_in_place(|| fill(&target, &more, reserve(400) + 2 * MIB));
                ended(&mut events).await.unwrap_err()
            })
        });
        disk_full(&failed, "are kept so");
        // What there was room for when it was looked at may be written after: of each of three blobs two
        // pieces of 1 MiB that containerd has not answered and one that waits behind them, and one of the
        // filler's. The rest is for a layer that is being unpacked just then, and for what containerd writes
        // down.
        assert!(least + 16 * MIB > reserve(400), "{version}: {least} bytes were left free");
        assert!(target.cancel("filled"));
        for file in [&filler, &more] {
            std::fs::remove_file(file).unwrap();
        }
        check_freed(&target, before);

        // With room again it comes.
        target.import("again", &reference, image.digest(), &[&holder]).unwrap();
        target.check_whole(&reference, version.version());
    }
}
