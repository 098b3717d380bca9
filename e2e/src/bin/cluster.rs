//! The command `cluster`: a real cluster on this machine, by hand.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use tote_e2e::cluster::{Cluster, Options};
use tote_e2e::host;

/// A real three-node Kubernetes cluster on this machine (root; programs by
/// e2e/tools.sh).
#[derive(Parser)]
#[command(name = "cluster")]
struct Args {
    /// Which cluster, for several can be up at once.
    #[arg(long, global = true, default_value = "dev")]
    name: String,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Bring it up; if it is up, say so.
    Up,
    /// Remove it and all that it made, whatever its condition.
    Down,
    /// Show its daemons and nodes.
    Status,
    /// Run a command inside a node (a shell, if none is given).
    Exec {
        /// n1, n2 or n3.
        node: String,
        /// Such as `ctr images ls`: ctr is the node's own, its namespace k8s.io.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Run kubectl as the cluster's administrator.
    Kubectl {
        /// kubectl's own arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Show the end of a daemon's log (such as n1-kubelet), or list the daemons.
    Logs {
        /// As `status` names it.
        daemon: Option<String>,
        /// How many lines.
        #[arg(long, default_value_t = 50)]
        lines: usize,
    },
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cluster: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<ExitCode> {
    let name = &args.name;
    match &args.action {
        Action::Up => up(name)?,
        Action::Down if Cluster::down(name)? => println!("the cluster {name} is removed"),
        Action::Down => println!("there was no cluster {name}; nothing to do"),
        Action::Status => return status(name),
        Action::Exec { node, command } => {
            let shell = ["bash".to_owned()];
            let words = if command.is_empty() { &shell[..] } else { command };
            return become_(Cluster::attach(name)?.node(node)?.command(words)?);
        }
        Action::Kubectl { args } => return become_(Cluster::attach(name)?.kubectl(args)?),
        Action::Logs { daemon, lines } => logs(name, daemon.as_deref(), *lines)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn up(name: &str) -> Result<()> {
    let begin = Instant::now();
    let cluster = Cluster::up(&Options::new(name), &|line| {
        println!("[{:5.1}s] {line}", begin.elapsed().as_secs_f64());
    })?;
    let own = if name == "dev" { String::new() } else { format!(" --name {name}") };
    println!("\nexport KUBECONFIG={}", cluster.kubeconfig().display());
    println!("registries listen on {} (registry.test on the nodes)", cluster.registry_address());
    println!("a node's shell: cargo run -p tote-e2e --bin cluster --{own} exec n1");
    println!("remove it all:  cargo run -p tote-e2e --bin cluster --{own} down");
    Ok(())
}

/// Exits with 0 if all is well.
fn status(name: &str) -> Result<ExitCode> {
    let cluster = Cluster::attach(name)?;
    let mut well = true;
    for node in cluster.nodes() {
        println!("{:<4} {:<14} {}", node.name(), node.address()?, node.version());
    }
    for line in cluster.status() {
        let state = line.pid.map_or("DOWN".to_owned(), |pid| format!("pid {pid}"));
        println!("{:<26} {state:<12} {}", line.daemon, line.log.display());
        well &= line.pid.is_some();
    }
    let unready = cluster.unready()?;
    println!("{}", unready.as_deref().unwrap_or("every node is Ready"));
    Ok(if well && unready.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn logs(name: &str, daemon: Option<&str>, lines: usize) -> Result<()> {
    let status = Cluster::attach(name)?.status();
    let names: Vec<&str> = status.iter().map(|line| line.daemon.as_str()).collect();
    let Some(daemon) = daemon else {
        println!("{}", names.join("\n"));
        return Ok(());
    };
    let Some(line) = status.iter().find(|line| line.daemon == daemon) else {
        bail!("no daemon {daemon:?}; there are: {}", names.join(", "))
    };
    println!("{}", host::tail(&line.log, lines));
    Ok(())
}

/// Replaces this process, so that signals, terminal and exit status are the
/// command's own.
fn become_(mut command: Command) -> Result<ExitCode> {
    let error = command.exec();
    Err(error).with_context(|| format!("starting {}", command.get_program().to_string_lossy()))
}
