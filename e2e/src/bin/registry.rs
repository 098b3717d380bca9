//! A registry that can be stopped, made to answer an error, or made a black hole, as a process of its own.

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use std::net::SocketAddr;
use std::path::PathBuf;
use tote_e2e::images::{Layout, preset};
use tote_e2e::registry::{Control, Mode, Options, Remote, Rule, hosts_toml, serve};

#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Order,
}

#[derive(Subcommand)]
enum Order {
    /// Run a registry in the foreground until it is told to shut down.
    Serve {
        /// Address to listen on.
        #[arg(long)]
        listen: SocketAddr,
        /// host:port that references carry, if not the address.
        #[arg(long)]
        name: Option<String>,
        /// Directory of its data and sockets.
        #[arg(long)]
        storage: PathBuf,
    },
    /// Stop answering: refuse connections.
    Stop(Which),
    /// Become a black hole: never answer.
    Hang(Which),
    /// Become a black hole that does not even answer a SYN.
    Drop(Which),
    /// Serve again and drop every rule.
    Heal(Which),
    /// Set the rules, as a JSON list of {"path": "part of a path", "effect": {"status": 404} | "hang" | ...}.
    Rules {
        #[command(flatten)]
        which: Which,
        /// The rules.
        rules: String,
    },
    /// Print the requests so far: method, status, bytes, path.
    Requests(Which),
    /// Build a test image by name (tiny, docker, random-500, ...) and push it; prints its reference.
    Push {
        #[command(flatten)]
        which: Which,
        /// Which image.
        image: String,
        /// Repository.
        repository: String,
        /// Tag, if it shall have one.
        #[arg(long)]
        tag: Option<String>,
        /// Makes its digests differ from those of other seeds.
        #[arg(long, default_value = "")]
        seed: String,
    },
    /// Print the hosts.toml with which containerd pulls from it.
    HostsToml(Which),
    /// End the process.
    Shutdown(Which),
}

#[derive(clap::Args)]
struct Which {
    /// Storage directory that it was started with.
    #[arg(long)]
    storage: PathBuf,
}

impl Which {
    fn attach(&self) -> Result<Remote> {
        Remote::attach(&self.storage)
    }
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Order::Serve { listen, name, storage } => serve(&Options { listen, name, storage: Some(storage) }),
        Order::Stop(which) => which.attach()?.stop(),
        Order::Hang(which) => which.attach()?.mode(Mode::Hanging),
        Order::Drop(which) => which.attach()?.mode(Mode::Dropping),
        Order::Heal(which) => which.attach()?.heal(),
        Order::Rules { which, rules } => {
            let rules: Vec<Rule> = serde_json::from_str(&rules).context("the rules are no such JSON list")?;
            which.attach()?.rules(&rules)
        }
        Order::Requests(which) => {
            for r in which.attach()?.requests()? {
                println!("{:5} {:3} {:10} {}", r.method, r.status, r.bytes, r.path);
            }
            Ok(())
        }
        Order::Push { which, image, repository, tag, seed } => {
            let remote = which.attach()?;
            let image = preset(&image, &Layout::temporary()?, &seed)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let reference = runtime.block_on(remote.upstream().push(&image, &repository, tag.as_deref()))?;
            println!("{reference}");
            Ok(())
        }
        Order::HostsToml(which) => {
            print!("{}", hosts_toml(which.attach()?.address()));
            Ok(())
        }
        Order::Shutdown(which) => which.attach()?.shutdown(),
    }
}
