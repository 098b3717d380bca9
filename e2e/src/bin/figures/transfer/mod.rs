//! How fast an image goes from node to node, against what the same containerd does by itself in the same run: see `goals` of
//! each figure. Real containerds, real agents in processes of their own, mutual TLS.

mod ceiling;
mod fanout;
mod memory;
pub mod node;
mod table;
mod upstream;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use tokio::task::block_in_place;
use tote_e2e::cri;
use tote_e2e::images::{Build, Compression, Entry, Image, Layer, Layout, preset};
use tote_rpc::identity::{Authority, Identity};
use tote_rpc::v1::import_event::Event;

use self::node::{Node, ended};
use self::table::Figure;
use self::upstream::Upstream;
use crate::identities::controller;

/// Pairs of a figure and its reference, one after the other.
const PAIRS: usize = 7;

/// The same for what takes long.
const FEW: usize = 3;

const MIB: u64 = 1 << 20;

/// MiB of the layers of the large image.
const LARGE: [u64; 3] = [170; 3];

struct Bench {
    directory: tempfile::TempDir,
    controller: Arc<Identity>,
    upstream: Upstream,
    layout: Layout,
    /// One for each import.
    ids: AtomicU32,
}

/// Figures that are measured together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Group {
    /// 510 MiB in three layers.
    Large,
    /// A Debian with nginx.
    Real,
    /// 5 MB.
    Small,
    /// What is moved of what is missing.
    Bytes,
    /// Two sources of one target.
    Sources,
    /// Five targets of one source.
    FanOut,
    /// What an agent holds at most.
    Peak,
    /// What it takes when there is nothing to do.
    Idle,
}

/// These figures, or all if none are named; prints each as it is known.
pub async fn measure(wanted: &[Group]) -> Result<()> {
    println!("\ntransfers between two nodes of this machine, containerd 2, overlayfs, mutual TLS");
    let bench = Bench::new()?;
    let mut figures = Vec::new();
    let mut told = |more: Vec<Figure>| {
        more.iter().for_each(table::print);
        figures.extend(more);
    };
    for group in Group::value_variants() {
        if !wanted.is_empty() && !wanted.contains(group) {
            continue;
        }
        told(match group {
            Group::Large => bench.large().await?,
            Group::Real => bench.real().await?,
            Group::Small => bench.small().await?,
            Group::Bytes => Box::pin(bench.bytes()).await?,
            Group::Sources => bench.two_sources().await?,
            Group::FanOut => Box::pin(bench.fan_out()).await?,
            Group::Peak => bench.peak().await?,
            Group::Idle => bench.idle().await?,
        });
    }
    table::write(&figures)
}

impl Bench {
    fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let authority = Authority::generate(SystemTime::now(), Duration::from_secs(24 * 3600))?;
        std::fs::write(directory.path().join("ca.crt"), authority.certificate_pem())?;
        std::fs::write(directory.path().join("ca.key"), authority.key_pem())?;
        let controller = controller(&authority)?;
        let upstream = Upstream::start()?;
        Ok(Self { directory, controller, upstream, layout: Layout::temporary()?, ids: AtomicU32::new(0) })
    }

    fn node(&self, name: &str, upload: Option<&str>) -> Result<Node> {
        let node = block_in_place(|| Node::start(name, self.directory.path(), &self.controller, upload))?;
        self.upstream.trust(&node.daemon)?;
        Ok(node)
    }

    fn id(&self) -> String {
        format!("t-{}", self.ids.fetch_add(1, Ordering::Relaxed))
    }

    /// Random bytes, so many MiB a layer.
    fn random(&self, seed: &str, layers: &[u64]) -> Result<Image> {
        let mut build = Build::new();
        for (at, mebibytes) in layers.iter().enumerate() {
            let random = Entry::random(&format!("payload/{at}"), mebibytes * MIB, &format!("{seed} {at}"));
            build = build.layer(Layer::new(Compression::Gzip).with(random));
        }
        build.write(&self.layout)
    }

    /// 510 MiB in 3 layers: without unpacking against the ceiling, with it against a pull.
    async fn large(&self) -> Result<Vec<Figure>> {
        let image = self.random("large", &LARGE)?;
        let reference = self.upstream.push(&image, "large").await?;
        let (source, target) = (self.node("source", None)?, self.node("target", None)?);
        cri::pull(&source.daemon.socket(), &reference).await?;
        let mut with = Vec::new();
        for _ in 0..PAIRS {
            let ours = target.import(&self.id(), &[&source], &reference, image.digest()).await?;
            target.empty()?;
            let theirs = self.pull(&target, &reference).await?;
            target.empty()?;
            with.push((ours.took.as_secs_f64(), theirs.as_secs_f64()));
        }
        // Snapshots that stand need no unpacking.
        target.import(&self.id(), &[&source], &reference, image.digest()).await?;
        ceiling::keep_snapshots(&target.daemon, &image).await?;
        target.empty()?;
        let mut without = Vec::new();
        for _ in 0..PAIRS {
            let ours = target.import(&self.id(), &[&source], &reference, image.digest()).await?;
            target.empty()?;
            let theirs = ceiling::ingest(&target.daemon, &image).await?;
            target.empty()?;
            without.push((ours.took.as_secs_f64(), theirs.as_secs_f64()));
        }
        let ceiling = "the same files into the same content API";
        Ok(vec![
            Figure::of_pairs("transfer_vs_ceiling", "s", 1.15, ceiling, &without),
            Figure::of_pairs(
                "salvage_vs_pull",
                "s",
                0.8,
                "CRI PullImage, docker-registry on this machine",
                &with,
            ),
        ])
    }

    async fn pull(&self, target: &Node, reference: &str) -> Result<Duration> {
        let begun = Instant::now();
        cri::pull(&target.daemon.socket(), reference).await?;
        Ok(begun.elapsed())
    }

    /// A Debian with nginx, gzip.
    async fn real(&self) -> Result<Vec<Figure>> {
        let image = block_in_place(|| preset("debian-gzip", &self.layout, "bench"))?;
        let reference = self.upstream.push(&image, "real").await?;
        let (source, target) = (self.node("source", None)?, self.node("target", None)?);
        cri::pull(&source.daemon.socket(), &reference).await?;
        let mut pairs = Vec::new();
        for _ in 0..PAIRS {
            let ours = target.import(&self.id(), &[&source], &reference, image.digest()).await?;
            target.empty()?;
            let theirs = self.pull(&target, &reference).await?;
            target.empty()?;
            pairs.push((ours.took.as_secs_f64(), theirs.as_secs_f64()));
        }
        let reference = "CRI PullImage, docker-registry on this machine";
        Ok(vec![Figure::of_pairs("salvage_vs_pull_real", "s", 0.9, reference, &pairs)])
    }

    /// 5 MB, from the call to its end.
    async fn small(&self) -> Result<Vec<Figure>> {
        let image = block_in_place(|| preset("tiny", &self.layout, "bench"))?;
        let reference = self.upstream.push(&image, "small").await?;
        let (source, target) = (self.node("source", None)?, self.node("target", None)?);
        cri::pull(&source.daemon.socket(), &reference).await?;
        let mut times = Vec::new();
        for _ in 0..PAIRS {
            let ours = target.import(&self.id(), &[&source], &reference, image.digest()).await?;
            target.empty()?;
            times.push(ours.took.as_secs_f64() * 1e3);
        }
        Ok(vec![Figure::alone("small_image_ms", "ms", 150.0, &times)])
    }

    /// What is moved of what is missing.
    #[allow(clippy::cast_precision_loss)]
    async fn bytes(&self) -> Result<Vec<Figure>> {
        let (first, second) = (self.random("bytes", &[40, 40, 40])?, self.random("bytes", &[40, 40, 41])?);
        let references =
            [self.upstream.push(&first, "bytes").await?, self.upstream.push(&second, "bytes").await?];
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
        let reference = self.upstream.push(&image, "large").await?;
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

    /// Each source gives 100 MB a second.
    async fn two_sources(&self) -> Result<Vec<Figure>> {
        let image = self.random("sources", &[100; 3])?;
        let reference = self.upstream.push(&image, "sources").await?;
        let sources = [self.node("source", Some("100M"))?, self.node("other", Some("100M"))?];
        let target = self.node("target", None)?;
        for source in &sources {
            cri::pull(&source.daemon.socket(), &reference).await?;
        }
        let mut pairs = Vec::new();
        for _ in 0..FEW {
            let both =
                target.import(&self.id(), &[&sources[0], &sources[1]], &reference, image.digest()).await?;
            ensure!(both.done.source_nodes.len() == 2, "only {:?} gave", both.done.source_nodes);
            target.empty()?;
            let one = target.import(&self.id(), &[&sources[0]], &reference, image.digest()).await?;
            target.empty()?;
            // How much faster: the inverse of the times.
            pairs.push((1.0 / both.took.as_secs_f64(), 1.0 / one.took.as_secs_f64()));
        }
        Ok(vec![Figure::of_pairs("two_sources_vs_one", "1/s", 1.8, "one of them", &pairs).at_least()])
    }
}

/// The layers, config and manifest that a node needs, as `(digest, size)`.
fn blobs(image: &Image) -> Result<Vec<(String, u64)>> {
    let needed = image.needed().context("the image is not for this machine")?;
    Ok(needed.into_iter().map(|blob| (blob.digest, blob.size)).collect())
}
