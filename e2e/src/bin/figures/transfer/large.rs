//! 510 MiB from node to node, on disk and in memory.

use std::time::Duration;

use anyhow::Result;
use tokio::task::block_in_place;
use tote_e2e::cri;
use tote_e2e::daemon::Options;
use tote_e2e::images::Image;
use tote_e2e::tools::Containerd;

use super::node::Node;
use super::table::Figure;
use super::{Bench, PAIRS, ceiling, said, timed};

/// MiB of the layers of the large image.
pub const LARGE: [u64; 3] = [170; 3];

/// Bytes of a node in memory: twice the image for a pull, and the other image beside it on the source.
const TMPFS: u64 = 6 << 30;

/// Where the containerds have their data.
#[derive(Clone, Copy, Debug)]
enum Place {
    Disk,
    Tmpfs,
}

impl Place {
    fn options(self) -> Options {
        let options = Options::new(Containerd::V2);
        match self {
            Self::Disk => options,
            Self::Tmpfs => options.tmpfs(TMPFS),
        }
    }

    /// What goes by this name on disk, by the other on a tmpfs.
    fn named(self, disk: &'static str, tmpfs: &'static str) -> &'static str {
        match self {
            Self::Disk => disk,
            Self::Tmpfs => tmpfs,
        }
    }
}

/// An image, and its reference.
type Pushed = (Image, String);

impl Bench {
    /// 510 MiB in 3 layers: with next to nothing to unpack against the ceiling and `dd`, with as much to unpack against a
    /// pull.
    pub(super) async fn large(&self) -> Result<Vec<Figure>> {
        said("two images of 510 MiB are made");
        let (random, padded) = (self.random("large", &LARGE)?, self.padded("large", &LARGE)?);
        let random = (random.clone(), self.push(&random, "large").await?);
        let padded = (padded.clone(), self.push(&padded, "padded").await?);
        let mut figures = self.large_on(Place::Disk, &random, &padded).await?;
        figures.extend(self.large_on(Place::Tmpfs, &random, &padded).await?);
        Ok(figures)
    }

    async fn large_on(&self, place: Place, random: &Pushed, padded: &Pushed) -> Result<Vec<Figure>> {
        let node = |name| self.node_with(name, place.options(), None);
        let (source, target) = (node("source")?, node("target")?);
        for (_, reference) in [random, padded] {
            cri::pull(&source.daemon.socket(), reference).await?;
        }
        let (mut moved, mut salvaged) = (Vec::new(), Vec::new());
        for round in 1..=PAIRS {
            let ours = self.import(&source, &target, padded).await?;
            let ceiling = ceiling::ingest(&target.daemon, &padded.0).await?;
            target.empty()?;
            let dd = block_in_place(|| ceiling::dd(&target.daemon, &padded.0))?;
            let what = place.named("disk: moved, ingested, dd", "tmpfs: moved, ingested, dd");
            moved.push(timed(what, round, [ours, ceiling, dd]));
        }
        for round in 1..=PAIRS {
            let ours = self.import(&source, &target, random).await?;
            let theirs = self.pull(&target, &random.1).await?;
            target.empty()?;
            let what = place.named("disk: salvaged, pulled", "tmpfs: salvaged, pulled");
            salvaged.push(timed(what, round, [ours, theirs]));
        }
        let ceiling: Vec<_> = moved.iter().map(|&[ours, ceiling, _]| [ours, ceiling]).collect();
        let dd: Vec<_> = moved.iter().map(|&[ours, _, dd]| [ours, dd]).collect();
        Ok(vec![
            Figure::of_pairs(
                place.named("transfer_vs_ceiling", "transfer_vs_ceiling_tmpfs"),
                "s",
                Some(1.15),
                "the same files into the same content API",
                &ceiling,
            ),
            Figure::of_pairs(
                place.named("transfer_vs_dd", "transfer_vs_dd_tmpfs"),
                "s",
                None,
                "dd bs=1M conv=fsync of the same files, one after the other",
                &dd,
            ),
            Figure::of_pairs(
                place.named("salvage_vs_pull", "salvage_vs_pull_tmpfs"),
                "s",
                Some(0.8),
                &self.pulled(),
                &salvaged,
            ),
        ])
    }

    /// How long an import takes. The target is empty before and after.
    async fn import(&self, source: &Node, target: &Node, (image, reference): &Pushed) -> Result<Duration> {
        let imported = target.import(&self.id(), &[source], reference, image.digest()).await?;
        target.empty()?;
        Ok(imported.took)
    }
}
