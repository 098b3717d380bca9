//! Generates the messages and services of `proto/`.

fn main() -> std::io::Result<()> {
    println!("cargo:rerun-if-changed=../../proto");
    tonic_prost_build::configure().compile_protos(&["../../proto/tote/v1/agent.proto"], &["../../proto"])
}
