//! Images of every shape, salvaged whole: what `ctr` says, the root file system, a collection, a removal.

use anyhow::{Result, ensure};
use tote_e2e::inspect;

use crate::play::Play;
use crate::stage::{SOON, Scenario};
use tote_e2e::registry::Control as _;

pub fn all() -> Vec<Scenario> {
    vec![
        Scenario::new("two_platforms", "n1", "n2", two_platforms),
        Scenario::new("attested", "n2", "n3", |p| whole(p, "attested")),
        Scenario::new("docker_schema_2", "n3", "n1", |p| whole(p, "docker")),
        Scenario::new("many_layers", "n1", "n3", |p| whole(p, "many-layers")),
        Scenario::new("links_modes_owners", "n2", "n1", |p| whole(p, "awkward")),
        Scenario::new("debian_gzip", "n3", "n2", |p| debian(p, "debian-gzip")),
        Scenario::new("debian_zstd", "n2", "n3", |p| debian(p, "debian-zstd")),
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
    let host = image.host()?.manifest.digest.clone();
    let others = image.platforms.iter().filter(|one| one.manifest.digest != host);
    let others: Vec<String> =
        others.flat_map(|one| [&one.manifest, &one.config]).map(|blob| blob.digest.clone()).collect();
    ensure!(others.len() == 2, "{others:?}");
    // The manifests are all fetched by a pull; what is below another platform's is not.
    let held = inspect::present(play.source()?, &others[1..])?;
    ensure!(held.is_empty(), "the source holds the other platform, too: {held:?}");
    play.registry.stop()?;
    play.start_on_target("waiting", &pinned).await?;
    play.tenant.running("waiting", SOON).await?;
    let found = inspect::present(play.target()?, &others)?;
    ensure!(found.is_empty(), "another platform's blobs were moved: {found:?}");
    play.assert_intact(&image, &pinned).await
}
