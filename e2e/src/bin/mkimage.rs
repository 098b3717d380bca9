//! Makes the operator's image, an OCI archive, of its two static programs.

use anyhow::{Context, Result};
use clap::Parser;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use tote_e2e::images::{Layout, Operator, operator};

/// Builds tote-controller and tote-agent as static programs and writes an OCI archive of both.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// The archive.
    #[arg(long, default_value = "target/image/tote.tar")]
    output: PathBuf,
    /// Name of the image in the archive, without the tag.
    #[arg(long, default_value = "localhost/tote")]
    repository: String,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let start = Instant::now();
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the package has no workspace")?;
    let version = env!("CARGO_PKG_VERSION");
    // The C library is linked in, so the target is named: build scripts and macros must not be linked like that.
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    eprintln!("image: building static release programs for {target} (minutes the first time)");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(&cargo)
        .current_dir(checkout)
        .args(["build", "--release", "-p", "tote-controller", "-p", "tote-agent", "--target", &target])
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .status()
        .context("running cargo")?;
    anyhow::ensure!(status.success(), "cargo build failed: {status}");
    let programs = target_directory(&cargo, checkout)?.join(&target).join("release");
    let parts = Operator {
        controller: programs.join("tote-controller"),
        agent: programs.join("tote-agent"),
        version: version.to_owned(),
    };
    let image = operator(&Layout::temporary()?, &parts)?;
    let name = format!("{}:{version}", arguments.repository);
    let output = checkout.join(&arguments.output);
    image.write_archive(&output, &name)?;
    eprintln!(
        "image: {name} {} ({:.1} MB) in {} [{:.0} s]",
        image.digest(),
        megabytes(image.needed_bytes()?),
        output.display(),
        start.elapsed().as_secs_f32()
    );
    Ok(())
}

#[allow(clippy::cast_precision_loss, reason = "for people to read")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// Where cargo puts what it builds.
fn target_directory(cargo: &std::ffi::OsStr, checkout: &Path) -> Result<PathBuf> {
    let output = Command::new(cargo)
        .current_dir(checkout)
        .args(["metadata", "--format-version=1", "--no-deps"])
        .output()
        .context("running cargo metadata")?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr)))?;
    let directory =
        metadata["target_directory"].as_str().context("cargo metadata names no target_directory")?;
    Ok(directory.into())
}
