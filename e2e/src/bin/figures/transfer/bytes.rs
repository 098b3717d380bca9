//! What is moved of what is missing.

use anyhow::Result;
use tokio::task::block_in_place;
use tote_e2e::cri;
use tote_rpc::v1::import_event::Event;

use super::large::LARGE;
use super::node::ended;
use super::table::Figure;
use super::{Bench, said};

impl Bench {
    /// Of an image that shares layers, of one that is asked for twice at once, and of one whose target starts again half-way.
    #[allow(clippy::cast_precision_loss)]
    pub(super) async fn bytes(&self) -> Result<Vec<Figure>> {
        let (first, second) = (self.random("bytes", &[40, 40, 40])?, self.random("bytes", &[40, 40, 41])?);
        let references = [self.push(&first, "bytes").await?, self.push(&second, "bytes").await?];
        let (source, mut target) = (self.node("source", None)?, self.node("target", None)?);
        for reference in &references {
            cri::pull(&source.daemon.socket(), reference).await?;
        }
        let served = || source.counter("tote_agent_served_bytes_total ");
        target.import(&self.id(), &[&source], &references[0], first.digest()).await?;
        let before = served()?;
        target.import(&self.id(), &[&source], &references[1], second.digest()).await?;
        let there: Vec<String> = first.needed()?.into_iter().map(|blob| blob.digest).collect();
        let missing = second.needed()?.into_iter().filter(|blob| !there.contains(&blob.digest));
        let missing: u64 = missing.map(|blob| blob.size).sum();
        let again = (served()? - before) as f64 / missing as f64;

        target.empty()?;
        let before = served()?;
        said("the same image twice at once");
        let from = [&source];
        let (one, two) = tokio::join!(
            target.import("one", &from, &references[0], first.digest()),
            target.import("two", &from, &references[0], first.digest()),
        );
        one.and(two)?;
        let size = first.needed_bytes()?;
        let both = (served()? - before) as f64 / size as f64;

        target.empty()?;
        let image = self.random("large", &LARGE)?;
        let reference = self.push(&image, "large").await?;
        cri::pull(&source.daemon.socket(), &reference).await?;
        let (size, before) = (image.needed_bytes()?, served()?);
        let mut events = target.begin("resumed", &[&source], &reference, image.digest()).await?;
        loop {
            let event = events.message().await?.and_then(|event| event.event);
            let Some(Event::Progress(progress)) = event else {
                anyhow::bail!("it ended before it was half done: {event:?}")
            };
            if progress.transferred_bytes * 2 > i64::try_from(size)? {
                break;
            }
        }
        said("the target's agent is killed half-way");
        block_in_place(|| target.kill_agent());
        block_in_place(|| target.start_agent())?;
        let mut events = target.begin("resumed", &[&source], &reference, image.digest()).await?;
        ended(&mut events).await?;
        let resumed = (served()? - before) as f64 / size as f64;
        Ok(vec![
            Figure::alone("second_image_bytes", "x", 1.01, &[again]),
            Figure::alone("two_at_once_bytes", "x", 1.01, &[both]),
            Figure::alone("resume_bytes", "x", 1.10, &[resumed]),
        ])
    }
}
