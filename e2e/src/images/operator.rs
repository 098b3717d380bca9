//! The operator's own image: two static programs and nothing else.

use super::elf::needs_loader;
use super::{Build, Compression, Entry, Image, Layer, Layout};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::path::PathBuf;

/// What goes into the operator's image.
#[derive(Clone, Debug)]
pub struct Operator {
    /// The static `tote-controller`.
    pub controller: PathBuf,
    /// The static `tote-agent`.
    pub agent: PathBuf,
    /// Version that the image's labels state, for example `0.1.0`.
    pub version: String,
}

/// Writes the operator's image: /tote-controller and /tote-agent, each in a layer of its own, user 65532.
///
/// # Errors
/// If a program is missing or needs a loader that a scratch image does not have.
pub fn operator(layout: &Layout, parts: &Operator) -> Result<Image> {
    let mut build = Build::new()
        .without_config("Cmd")
        .without_config("StopSignal")
        .config("User", json!("65532:65532"))
        .config("Entrypoint", json!(["/tote-controller"]))
        .config(
            "Labels",
            json!({
                "org.opencontainers.image.title": "tote",
                "org.opencontainers.image.version": parts.version,
                "org.opencontainers.image.licenses": "Apache-2.0",
            }),
        );
    for (name, path) in [("tote-controller", &parts.controller), ("tote-agent", &parts.agent)] {
        let program = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        ensure!(
            !needs_loader(&program),
            "{} is not static: build it with RUSTFLAGS=\"-C target-feature=+crt-static\" and --target",
            path.display()
        );
        build = build.layer(Layer::new(Compression::Gzip).with(Entry::file(name, program).mode(0o755)));
    }
    build.write(layout)
}
