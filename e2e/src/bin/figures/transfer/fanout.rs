//! Many nodes that want one image at once: each is given the sources that the controller would give it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use tote_controller::salvage::{Agent, Demand, Limits, Source, Turn, schedule};
use tote_e2e::cri;
use tote_e2e::images::Image;
use tote_image::Platform;

use super::node::{From, Node, ended};
use super::table::Figure;
use super::{Bench, MIB, PAIRS, said, timed};

/// The chart's defaults.
const LIMITS: Limits = Limits { cluster: 64, target: 2, source: 4 };

/// So many layers of so many MiB.
const LAYERS: [u64; 10] = [30; 10];

/// The targets, by name: they are asked for in this order.
const TARGETS: [&str; 5] = ["a", "b", "c", "d", "e"];

impl Bench {
    /// One source that gives 100 MB a second, and five targets at once: until the last is done, against one alone. The six share
    /// this machine's cores, which unpacking five times may take up; so once more with next to nothing to unpack.
    pub(super) async fn fan_out(&self) -> Result<Vec<Figure>> {
        said("two images of 300 MiB are made");
        let (random, padded) = (self.random("fan out", &LAYERS)?, self.padded("fan out", &LAYERS)?);
        let source = self.node("source", Some("100M"))?;
        let targets = TARGETS.iter().map(|name| self.node(name, None)).collect::<Result<Vec<_>>>()?;
        let with = self.fan_out_of(&random, &source, &targets, "five, one").await?;
        let without = self.fan_out_of(&padded, &source, &targets, "nothing to unpack: five, one").await?;
        let alone = "one of the five alone";
        let moved = "the same; both with next to nothing to unpack";
        Ok(vec![
            Figure::of_pairs("fanout_5", "s", Some(2.0), alone, &with),
            Figure::of_pairs("fanout_5_moved", "s", Some(2.0), moved, &without),
        ])
    }

    async fn fan_out_of(
        &self,
        image: &Image,
        source: &Node,
        targets: &[Node],
        what: &str,
    ) -> Result<Vec<[f64; 2]>> {
        let (reference, digest) = (self.push(image, "fanout").await?, image.digest());
        cri::pull(&source.daemon.socket(), &reference).await?;
        let node = |name: &str| {
            let found = targets.iter().chain([source]).find(|node| node.name == name);
            found.with_context(|| format!("there is no node {name}"))
        };
        let lists = schedule(&demands(source, targets, digest)?, &[], LIMITS);
        let served = || source.counter("tote_agent_served_bytes_total ");
        let size = image.needed_bytes()?;
        let mut pairs = Vec::new();
        for round in 1..=PAIRS {
            let alone = targets[0].import(&self.id(), &[source], &reference, digest).await?;
            targets[0].empty()?;
            let (before, begun) = (served()?, Instant::now());
            let imports = targets.iter().zip(&lists).map(|(target, turn)| {
                let (id, reference) = (self.id(), &reference);
                async move {
                    let Turn::Start(given) = turn else {
                        anyhow::bail!("{} was to wait: {turn:?}", target.name)
                    };
                    let from = |given: &Source| {
                        let (last_resort, relay) = (given.last_resort, given.relay);
                        Ok(From { node: node(&given.node)?, last_resort, relay })
                    };
                    let from = given.iter().map(from).collect::<Result<Vec<_>>>()?;
                    let mut events = target.begin_from(&id, &from, reference, digest).await?;
                    ended(&mut events).await?;
                    anyhow::Ok(begun.elapsed())
                }
            });
            let times = try_join_all(imports).await?;
            let last = times.iter().max().copied().unwrap_or(Duration::MAX);
            let gave = served()? - before;
            ensure!(gave < size + size / 4, "the source gave {} MiB of {}", gave / MIB, size / MIB);
            targets.iter().try_for_each(Node::empty)?;
            pairs.push(timed(what, round, [last, alone.took]));
        }
        Ok(pairs)
    }
}

fn demands(source: &Node, targets: &[Node], digest: &str) -> Result<Vec<Demand>> {
    let of = |target: &Node| {
        let address = source.address()?.to_string();
        Ok(Demand {
            origin: target.name.as_str().into(),
            digest: digest.parse()?,
            node: target.name.as_str().into(),
            agent: Some(Agent {
                address: target.address()?.to_string(),
                platform: Platform::new("linux", std::env::consts::ARCH, ""),
            }),
            sources: vec![Source {
                node: source.name.as_str().into(),
                address,
                last_resort: false,
                relay: false,
            }],
            relays: true,
            reluctance: [].into(),
            begun: false,
            priority: 0,
            since: k8s_openapi::jiff::Timestamp::UNIX_EPOCH,
        })
    };
    targets.iter().map(of).collect()
}
