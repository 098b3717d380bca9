//! The network of a cluster: a bridge in the machine's own network namespace,
//! a veth to each node's, routes between the pods' subnets. All addresses of a
//! cluster are in one 10.x.0.0/16.

use std::io::Write;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::host;

/// The addresses of a cluster, by the second byte of its 10.x.0.0/16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Network(u8);

impl Network {
    /// The networks that clusters may take.
    const RANGE: std::ops::RangeInclusive<u8> = 200..=249;

    /// One that is in use neither on the machine nor by `taken`.
    ///
    /// # Errors
    /// All are in use.
    pub(super) fn pick(taken: &[Self]) -> Result<Self> {
        let routes = host::run(Command::new("ip").args(["-4", "route", "show", "table", "all"]))?;
        let links = host::run(Command::new("ip").args(["-o", "link", "show"]))?;
        Self::RANGE
            .map(Self)
            .find(|network| {
                !taken.contains(network)
                    && !routes.contains(&format!("10.{}.", network.0))
                    && !links.contains(&format!(" {}", network.bridge()))
            })
            .context("no network from 10.200.0.0/16 to 10.249.0.0/16 is free on this machine")
    }

    fn address(self, third: u8, fourth: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, self.0, third, fourth)
    }

    /// The machine's own address on the bridge, which every node and pod
    /// reaches: the control plane's, and the registries'.
    pub(super) fn gateway(self) -> Ipv4Addr {
        self.address(0, 1)
    }

    /// The address of node number `index`, from 0.
    pub(super) fn node(self, index: usize) -> Result<Ipv4Addr> {
        Ok(self.address(0, 11 + u8::try_from(index).context("too many nodes")?))
    }

    /// The pods' subnet of node number `index`.
    pub(super) fn pods(self, index: usize) -> Result<String> {
        Ok(format!("{}/24", self.address(11 + u8::try_from(index).context("too many nodes")?, 0)))
    }

    /// Nodes, pods and services.
    pub(super) fn all(self) -> String {
        format!("{}/16", self.address(0, 0))
    }

    /// The services' subnet.
    pub(super) fn services(self) -> String {
        format!("{}/20", self.address(96, 0))
    }

    /// The address of the service `kubernetes`.
    pub(super) fn api_service(self) -> Ipv4Addr {
        self.address(96, 1)
    }

    /// The name of the bridge.
    pub(super) fn bridge(self) -> String {
        format!("tote{}", self.0)
    }

    /// The machine's end of a node's veth.
    fn veth(self, node: &str) -> String {
        format!("{}-{node}", self.bridge())
    }

    /// Makes the bridge.
    ///
    /// # Errors
    /// `ip` failed.
    pub(super) fn make_bridge(self) -> Result<()> {
        let bridge = self.bridge();
        batch(
            &mut Command::new("ip"),
            &[
                format!("link add {bridge} type bridge"),
                format!("addr add {}/24 dev {bridge}", self.gateway()),
                format!("link set {bridge} up"),
            ],
        )
    }

    /// Connects node number `index`, whose network namespace is that of `pid`,
    /// with the bridge and `nodes - 1` others.
    ///
    /// # Errors
    /// `ip` failed.
    pub(super) fn connect(self, node: &str, index: usize, nodes: usize, pid: u32) -> Result<()> {
        let (bridge, veth) = (self.bridge(), self.veth(node));
        let (address, gateway) = (self.node(index)?, self.gateway());
        batch(
            &mut Command::new("ip"),
            &[
                format!("link add {veth} type veth peer name eth0 netns {pid}"),
                format!("link set {veth} master {bridge} up"),
                format!("route replace {} via {address}", self.pods(index)?),
            ],
        )?;
        let mut lines = vec![
            "link set lo up".to_owned(),
            format!("addr add {address}/24 dev eth0"),
            "link set eth0 up".to_owned(),
            // Services are rewritten after routing: without a route, not at all.
            format!("route add {} via {gateway}", self.services()),
        ];
        for other in (0..nodes).filter(|other| *other != index) {
            lines.push(format!("route add {} via {}", self.pods(other)?, self.node(other)?));
        }
        batch(Command::new("nsenter").args([&format!("--net=/proc/{pid}/ns/net"), "ip"]), &lines)
    }

    /// Removes the links and, with them, the routes. It is no error if there
    /// are none.
    ///
    /// # Errors
    /// `ip` failed.
    pub(super) fn remove(self) -> Result<()> {
        let links = host::run(Command::new("ip").args(["-o", "link", "show"]))?;
        let (bridge, prefix) = (self.bridge(), format!("{}-", self.bridge()));
        for line in links.lines() {
            let name = line.split(' ').nth(1).unwrap_or_default();
            let name = name.trim_end_matches(':').split('@').next().unwrap_or_default();
            if name != bridge && !name.starts_with(&prefix) {
                continue;
            }
            // A veth goes with the namespace of its other end, perhaps just now.
            let output = Command::new("ip").args(["link", "delete", name]).output().context("starting ip")?;
            let error = String::from_utf8_lossy(&output.stderr);
            if !output.status.success() && !error.contains("Cannot find device") {
                bail!("ip link delete {name}: {error}");
            }
        }
        Ok(())
    }
}

/// Feeds lines to `ip -batch`, which stops at the first that fails.
fn batch(ip: &mut Command, lines: &[String]) -> Result<()> {
    let mut process = ip
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting ip")?;
    let mut input = process.stdin.take().context("ip without an input")?;
    input.write_all(lines.join("\n").as_bytes())?;
    input.write_all(b"\n")?;
    drop(input);
    let output = process.wait_with_output()?;
    if !output.status.success() {
        bail!("ip failed: {}\nIt was told:\n{}", String::from_utf8_lossy(&output.stderr), lines.join("\n"));
    }
    Ok(())
}
