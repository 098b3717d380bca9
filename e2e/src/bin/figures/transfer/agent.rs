//! The other process: an agent.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tote_agent::agent::{Settings, run};
use tote_agent::containerd::Client;
use tote_agent::import::{Lifetimes, Patience};
use tote_rpc::identity::{Authority, Role};

use crate::identities::certified;

/// Prints where it is; ends with its standard input.
pub async fn be(name: &str, socket: &Path, authority: &Path, upload: Option<&str>) -> Result<()> {
    let read = |name: &str| std::fs::read_to_string(PathBuf::from(authority).join(name));
    let authority = Authority::from_pem(&read("ca.crt")?, &read("ca.key")?)?;
    let (control, health) =
        (TcpListener::bind("127.0.0.1:0").await?, TcpListener::bind("127.0.0.1:0").await?);
    let address = control.local_addr()?;
    let settings = Settings {
        node_name: name.to_owned(),
        max_bandwidth: None,
        max_upload: upload.map(str::parse).transpose()?,
        patience: Patience::default(),
        lifetimes: Lifetimes::default(),
        identity: certified(&authority, &Role::Node(name.into()), Some(address.ip()))?,
        mounts: None,
        records: None,
    };
    println!("{address} {}", health.local_addr()?);
    let containerd = Arc::new(Client::new(socket).with_files());
    let stop = CancellationToken::new();
    let ending = stop.clone();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        ending.cancel();
    });
    Ok(run(containerd, settings, control, Some(health), stop).await?)
}
