//! Prints the `CustomResourceDefinition`, or with `--write` brings the committed files up to date.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let yaml = match tote_api::to_yaml(&tote_api::crd()) {
        Ok(yaml) => yaml,
        Err(error) => {
            eprintln!("crdgen: {error}");
            return ExitCode::FAILURE;
        }
    };
    match std::env::args().nth(1).as_deref() {
        None => print!("{yaml}"),
        Some("--write") => {
            let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
            for file in tote_api::CRD_FILES {
                if let Err(error) = write(&root.join(file), &yaml) {
                    eprintln!("crdgen: {file}: {error}");
                    return ExitCode::FAILURE;
                }
                println!("{file}");
            }
        }
        Some(other) => {
            eprintln!(
                "crdgen: unknown argument {other:?}; without one it prints, with --write it writes files"
            );
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn write(path: &Path, yaml: &str) -> std::io::Result<()> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    std::fs::write(path, yaml)
}
