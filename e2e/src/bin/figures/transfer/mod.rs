//! How fast an image goes from node to node, against what the same containerd does by itself in the same run: see `goals` of
//! each figure. Real containerds, real agents in processes of their own, mutual TLS.

pub mod agent;
mod bytes;
mod ceiling;
mod fanout;
mod large;
mod memory;
mod node;
mod settings;
mod table;
mod upstream;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use tokio::task::block_in_place;
use tote_e2e::cri;
use tote_e2e::daemon::Options;
use tote_e2e::images::{Build, Compression, Entry, Image, Layer, Layout, preset};
use tote_e2e::tools::Containerd;
use tote_rpc::identity::{Authority, Identity};

use self::large::LARGE;
use self::node::Node;
use self::table::Figure;
use self::upstream::Upstream;
use crate::identities::controller;

/// Pairs of a figure and its reference, one after the other.
const PAIRS: usize = 7;

const MIB: u64 = 1 << 20;

struct Bench {
    directory: tempfile::TempDir,
    controller: Arc<Identity>,
    upstream: Upstream,
    layout: Layout,
    /// One for each import.
    ids: AtomicU32,
    /// What the first node's containerd runs with; the others are like it.
    settings: OnceLock<String>,
}

/// Figures that are measured together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Group {
    /// 510 MiB in three layers, on disk and in memory.
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
    println!(
        "\ntransfers between nodes of this machine, mutual TLS; {PAIRS} pairs, a figure's median and its bounds"
    );
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
            Group::Large => Box::pin(bench.large()).await?,
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
        let (ids, settings) = (AtomicU32::new(0), OnceLock::new());
        Ok(Self { directory, controller, upstream, layout: Layout::temporary()?, ids, settings })
    }

    /// A node with a containerd 2 on disk.
    fn node(&self, name: &str, upload: Option<&str>) -> Result<Node> {
        self.node_with(name, Options::new(Containerd::V2), upload)
    }

    fn node_with(&self, name: &str, options: Options, upload: Option<&str>) -> Result<Node> {
        let start = || Node::start(name, options, self.directory.path(), &self.controller, upload);
        let node = block_in_place(start)?;
        self.upstream.trust(&node.daemon)?;
        if self.settings.get().is_none() {
            let settings = block_in_place(|| settings::of(&node.daemon))?;
            println!("{}", self.settings.get_or_init(|| settings));
        }
        Ok(node)
    }

    /// What a pull is called in the table.
    fn pulled(&self) -> String {
        let settings = self.settings.get().map_or("", String::as_str);
        format!("CRI PullImage, docker-registry on this machine; {settings}")
    }

    /// Pushes an image; returns its reference by digest.
    async fn push(&self, image: &Image, repository: &str) -> Result<String> {
        said(&format!("{repository}: {} MiB are pushed", image.needed_bytes()? / MIB));
        self.upstream.push(image, repository).await
    }

    fn id(&self) -> String {
        format!("t-{}", self.ids.fetch_add(1, Ordering::Relaxed))
    }

    /// Random bytes, so many MiB a layer.
    fn random(&self, seed: &str, layers: &[u64]) -> Result<Image> {
        self.image(layers, |at, bytes| {
            let random = Entry::random(&format!("payload/{at}"), bytes, &format!("{seed} {at}"));
            Layer::new(Compression::Gzip).with(random)
        })
    }

    /// The same to move, and next to nothing to unpack.
    fn padded(&self, seed: &str, layers: &[u64]) -> Result<Image> {
        self.image(layers, |at, bytes| {
            let seed = format!("padded {seed} {at}");
            let small = Entry::file(&format!("payload/{at}"), seed.clone());
            Layer::new(Compression::Zstd).with(small).padded(bytes, &seed)
        })
    }

    fn image(&self, layers: &[u64], layer: impl Fn(usize, u64) -> Layer) -> Result<Image> {
        let layers = layers.iter().enumerate().map(|(at, mebibytes)| layer(at, mebibytes * MIB));
        block_in_place(|| layers.fold(Build::new(), Build::layer).write(&self.layout))
    }

    async fn pull(&self, target: &Node, reference: &str) -> Result<Duration> {
        let begun = Instant::now();
        cri::pull(&target.daemon.socket(), reference).await?;
        Ok(begun.elapsed())
    }

    /// A Debian with nginx, gzip.
    async fn real(&self) -> Result<Vec<Figure>> {
        said("a Debian is made");
        let image = block_in_place(|| preset("debian-gzip", &self.layout, "bench"))?;
        let reference = self.push(&image, "real").await?;
        let (source, target) = (self.node("source", None)?, self.node("target", None)?);
        cri::pull(&source.daemon.socket(), &reference).await?;
        let mut pairs = Vec::new();
        for round in 1..=PAIRS {
            let ours = target.import(&self.id(), &[&source], &reference, image.digest()).await?;
            target.empty()?;
            let theirs = self.pull(&target, &reference).await?;
            target.empty()?;
            pairs.push(timed("salvaged, pulled", round, [ours.took, theirs]));
        }
        Ok(vec![Figure::of_pairs("salvage_vs_pull_real", "s", Some(0.9), &self.pulled(), &pairs)])
    }

    /// 5 MB, from the call to its end.
    async fn small(&self) -> Result<Vec<Figure>> {
        let image = block_in_place(|| preset("tiny", &self.layout, "bench"))?;
        let reference = self.push(&image, "small").await?;
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

    /// Each source gives 100 MB a second. What follows the last byte, its layer's commit and what is left to unpack, takes as long from two
    /// sources as from one; so once more with next to nothing to unpack.
    async fn two_sources(&self) -> Result<Vec<Figure>> {
        let (random, padded) = (self.random("sources", &LARGE)?, self.padded("sources", &LARGE)?);
        let sources = [self.node("source", Some("100M"))?, self.node("other", Some("100M"))?];
        let target = self.node("target", None)?;
        let nodes = (&target, [&sources[0], &sources[1]]);
        let with = self.two_sources_of(&random, nodes, "from both, from one").await?;
        let what = "nothing to unpack: from both, from one";
        let without = self.two_sources_of(&padded, nodes, what).await?;
        let moved = "one of them; both with next to nothing to unpack";
        Ok(vec![
            Figure::of_pairs("two_sources_vs_one", "1/s", Some(1.8), "one of them", &with).at_least(),
            Figure::of_pairs("two_sources_moved", "1/s", Some(1.8), moved, &without).at_least(),
        ])
    }

    async fn two_sources_of(
        &self,
        image: &Image,
        (target, sources): (&Node, [&Node; 2]),
        what: &str,
    ) -> Result<Vec<[f64; 2]>> {
        let (reference, digest) = (self.push(image, "sources").await?, image.digest());
        for source in sources {
            cri::pull(&source.daemon.socket(), &reference).await?;
        }
        let mut pairs = Vec::new();
        for round in 1..=PAIRS {
            let both = target.import(&self.id(), &sources, &reference, digest).await?;
            ensure!(both.done.source_nodes.len() == 2, "only {:?} gave", both.done.source_nodes);
            target.empty()?;
            let one = target.import(&self.id(), &sources[..1], &reference, digest).await?;
            target.empty()?;
            // How much faster: the inverse of the times.
            pairs.push(timed(what, round, [both.took, one.took]).map(f64::recip));
        }
        Ok(pairs)
    }
}

/// Says to whoever waits what is going on.
fn said(what: &str) {
    eprintln!("  {what}");
}

/// Says how long each of a round took; returns it in seconds.
fn timed<const N: usize>(what: &str, round: usize, took: [Duration; N]) -> [f64; N] {
    let seconds = took.map(|took| took.as_secs_f64());
    said(&format!("{what}, {round} of {PAIRS}: {}", seconds.map(|each| format!("{each:.2} s")).join(", ")));
    seconds
}

/// The layers, config and manifest that a node needs, as `(digest, size)`.
fn blobs(image: &Image) -> Result<Vec<(String, u64)>> {
    let needed = image.needed().context("the image is not for this machine")?;
    Ok(needed.into_iter().map(|blob| (blob.digest, blob.size)).collect())
}
