//! Generates the messages and services of `proto/`, and of the version before for tests.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=../../proto");
    tonic_prost_build::configure()
        .codec_path("crate::SmallCodec")
        .compile_protos(&["../../proto/tote/v1/agent.proto"], &["../../proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?).join("previous");
    std::fs::create_dir_all(&out)?;
    let previous = "../../proto/previous";
    tonic_prost_build::configure()
        .out_dir(out)
        .compile_protos(&[format!("{previous}/tote/v1/agent.proto")], &[previous.to_owned()])?;
    Ok(())
}
