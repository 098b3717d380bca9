//! A registry that containerd reaches directly: docker-registry itself on a port of this machine, over what is pushed past it.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::json;
use tokio::task::block_in_place;
use tote_e2e::daemon::Daemon;
use tote_e2e::images::Image;
use tote_e2e::registry::{self, Control as _, Registry, hosts_toml};
use tote_e2e::{host, tools};

pub struct Upstream {
    pushed: Registry,
    process: Child,
    address: SocketAddr,
}

impl Upstream {
    pub fn start() -> Result<Self> {
        let options = registry::Options { listen: "127.0.0.1:0".parse()?, name: None, storage: None };
        let pushed = block_in_place(|| Registry::start(&options))?;
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let config = pushed.storage().join("direct.yml");
        // JSON is YAML.
        let contents = json!({
            "version": 0.1,
            "log": {"level": "warn", "accesslog": {"disabled": true}},
            "storage": {"filesystem": {"rootdirectory": pushed.storage().join("data"), "maxthreads": 100}},
            "http": {"addr": address.to_string()},
        });
        std::fs::write(&config, contents.to_string())?;
        let process = Command::new(tools::docker_registry()?)
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("starting docker-registry")?;
        let upstream = Self { pushed, process, address };
        let answers = || Ok(TcpStream::connect(address).is_ok());
        block_in_place(|| host::wait_until("the registry listens", Duration::from_secs(30), answers))?;
        Ok(upstream)
    }

    /// Pushes an image; returns its reference by digest.
    pub async fn push(&self, image: &Image, repository: &str) -> Result<String> {
        self.pushed.upstream().push(image, repository, None).await
    }

    /// Lets a containerd pull from it.
    pub fn trust(&self, daemon: &Daemon) -> Result<()> {
        let host = daemon.certs_d().join(self.pushed.upstream().name());
        std::fs::create_dir_all(&host)?;
        Ok(std::fs::write(host.join("hosts.toml"), hosts_toml(self.address))?)
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
