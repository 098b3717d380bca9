//! Images of every shape, salvaged whole: what `ctr` says, the root file system, a collection, a removal.

use anyhow::{Result, ensure};
use tote_e2e::inspect;

use crate::stage::{Alone, Play, SOON, Scenario};
use tote_e2e::registry::Control as _;

pub fn all() -> Vec<Scenario> {
    let shape = |name, source, target, play| Scenario {
        name,
        source,
        target,
        also: None,
        alone: Alone::Nothing,
        play,
    };
    vec![
        shape("two_platforms", "n1", "n2", |p| Box::pin(two_platforms(p))),
        shape("attested", "n2", "n3", |p| Box::pin(whole(p, "attested"))),
        shape("docker_schema_2", "n3", "n1", |p| Box::pin(whole(p, "docker"))),
        shape("many_layers", "n1", "n3", |p| Box::pin(whole(p, "many-layers"))),
        shape("links_modes_owners", "n2", "n1", |p| Box::pin(whole(p, "awkward"))),
        shape("debian_gzip", "n3", "n2", |p| Box::pin(debian(p, "debian-gzip"))),
        shape("debian_zstd", "n2", "n3", |p| Box::pin(debian(p, "debian-zstd"))),
    ]
}

async fn whole(play: Play, kind: &str) -> Result<()> {
    let image = play.image(kind)?;
    play.salvage(&image, false).await
}

async fn debian(play: Play, kind: &str) -> Result<()> {
    let image = play.image(kind)?;
    let bytes = image.needed_bytes()?;
    ensure!(bytes >= 100_000_000, "{bytes} bytes are no image of 100 MB");
    play.salvage(&image, true).await
}

/// The source holds one of the two; the other is neither wanted nor missed.
async fn two_platforms(play: Play) -> Result<()> {
    let image = play.image("two-platforms")?;
    let (_, pinned) = play.push(&image).await?;
    play.pull_on_source(&pinned).await?;
    play.registry.stop()?;
    play.start_on_target("waiting", &pinned).await?;
    play.tenant.running("waiting", SOON).await?;
    let host = image.host()?.manifest.digest.clone();
    let others =
        image.platforms.iter().map(|one| one.manifest.digest.clone()).filter(|digest| *digest != host);
    let found = inspect::present(play.target()?, &others.collect::<Vec<_>>())?;
    ensure!(found.is_empty(), "another platform's manifest was moved: {found:?}");
    play.assert_intact(&image, &pinned).await
}
