//! Makes the operator's image, an OCI archive, of its two static programs.

use anyhow::{Context, Result};
use clap::Parser;
use std::path::PathBuf;
use tote_e2e::images::{Layout, Operator, operator};
use tote_e2e::operator::checkout;

/// Packs tote-controller and tote-agent into an OCI archive. `make image` builds them first.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// The archive, below the checkout unless it begins with /.
    #[arg(long, default_value = "target/image/tote.tar")]
    output: PathBuf,
    /// Name of the image in the archive, without the tag.
    #[arg(long, default_value = "localhost/tote")]
    repository: String,
    /// Where the two programs are; by default beside this one.
    #[arg(long)]
    programs: Option<PathBuf>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let version = env!("CARGO_PKG_VERSION");
    let own = std::env::current_exe().context("finding this program")?;
    let beside = own.parent().context("this program is in no directory")?.to_owned();
    let programs = arguments.programs.unwrap_or(beside);
    let parts = Operator {
        controller: programs.join("tote-controller"),
        agent: programs.join("tote-agent"),
        version: version.to_owned(),
    };
    let image = operator(&Layout::temporary()?, &parts)?;
    let name = format!("{}:{version}", arguments.repository);
    let output = checkout().join(&arguments.output);
    image.write_archive(&output, &name)?;
    eprintln!(
        "image: {name} {} ({:.1} MB) in {}",
        image.digest(),
        megabytes(image.needed_bytes()?),
        output.display(),
    );
    Ok(())
}

#[allow(clippy::cast_precision_loss, reason = "for people to read")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
