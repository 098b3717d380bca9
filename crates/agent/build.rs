//! Generates the client of the CRI image service.

fn main() -> std::io::Result<()> {
    println!("cargo:rerun-if-changed=../../proto/cri");
    tonic_prost_build::configure()
        .build_server(false)
        .compile_protos(&["../../proto/cri/api.proto"], &["../../proto/cri"])
}
