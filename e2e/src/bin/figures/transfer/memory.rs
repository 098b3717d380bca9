//! What an agent takes of its node: at most while it moves a large image, and while there is nothing to do.

use std::time::Duration;

use anyhow::{Context as _, Result};
use tote_e2e::{cri, host};

use super::table::Figure;
use super::{Bench, MIB, said};

/// MiB of the layers of a large image: 2 GiB in all, the most that is salvaged unless said otherwise.
const LARGEST: [u64; 4] = [511; 4];

/// How many images an idle node has.
const IMAGES: usize = 200;

/// For how long an idle agent is watched.
const WATCHED: Duration = Duration::from_secs(30);

#[allow(clippy::cast_precision_loss)]
fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / MIB as f64
}

impl Bench {
    /// 2 GiB from one node to another: what the agent of either has held at most.
    pub(super) async fn peak(&self) -> Result<Vec<Figure>> {
        said("2 GiB are made");
        let image = self.random("largest", &LARGEST)?;
        let reference = self.push(&image, "largest").await?;
        let (source, target) = (self.node("source", None)?, self.node("target", None)?);
        said("the source pulls it");
        cri::pull(&source.daemon.socket(), &reference).await?;
        said("2 GiB move");
        let moved = target.import(&self.id(), &[&source], &reference, image.digest()).await?;
        let peaks = [mebibytes(source.peak()?), mebibytes(target.peak()?)];
        println!(
            "  2 GiB in {:.1} s; the source's agent held {:.1} MiB, the target's {:.1}",
            moved.took.as_secs_f64(),
            peaks[0],
            peaks[1]
        );
        Ok(vec![Figure::alone("agent_peak_rss_mib", "MiB", 64.0, &[peaks[0].max(peaks[1])])])
    }

    /// Two hundred images, a controller that listens, and nothing to do.
    pub(super) async fn idle(&self) -> Result<Vec<Figure>> {
        let mut node = self.node("idle", None)?;
        for number in 0..IMAGES {
            let image = self.random(&format!("idle {number}"), &[1])?;
            let reference = self.upstream.push(&image, &format!("idle-{number}")).await?;
            cri::pull(&node.daemon.socket(), &reference).await?;
            if (number + 1) % 25 == 0 {
                said(&format!("{} of {IMAGES} images", number + 1));
            }
        }
        // As on a node where it starts with them.
        tokio::task::block_in_place(|| node.kill_agent());
        tokio::task::block_in_place(|| node.start_agent())?;
        let heard = node.listen(IMAGES).await?;
        let used = || host::processor_time(node.pid()?).context("the agent has ended");
        said(&format!("nothing to do for {} s", WATCHED.as_secs()));
        let before = used()?;
        tokio::time::sleep(WATCHED).await;
        let share = used()?.saturating_sub(before).as_secs_f64() / WATCHED.as_secs_f64() * 100.0;
        let resident = mebibytes(host::resident(node.pid()?)?);
        drop(heard);
        Ok(vec![
            Figure::alone("agent_idle_rss_mib", "MiB", 24.0, &[resident]),
            Figure::alone("agent_idle_cpu_percent", "%", 0.5, &[share]),
        ])
    }
}
