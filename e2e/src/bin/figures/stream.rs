//! How much of an agent's speed TLS costs: one stream of a blob from a real agent on a real containerd, against the same
//! distribution API over plain TCP, both ends on one core.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper_util::client::legacy::{Client as HyperClient, connect::HttpConnector};
use hyper_util::rt::TokioExecutor;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tote_agent::agent::{Settings, run};
use tote_agent::containerd::Client;
use tote_agent::import::{Lifetimes, Patience, TransferId};
use tote_agent::serve::{Served, router};
use tote_e2e::daemon::{Daemon, Options};
use tote_e2e::images::{Layout, preset};
use tote_e2e::tools::Containerd;
use tote_rpc::identity::{Authority, Peer, Role};
use tote_rpc::v1;

use crate::identities::{certified, controller};

/// Pairs that are measured, the two of a pair one after the other.
const PAIRS: usize = 7;

const READER: &str = "reader";

/// Prints the bytes a second of both, and their ratio.
pub fn tls_against_plain() -> Result<()> {
    println!("\none stream of a blob from an agent, both ends on one core");
    let daemon = Daemon::start(Options::new(Containerd::V2))?;
    let layout = Layout::temporary()?;
    let image = preset("random-500", &layout, "stream")?;
    let archive = daemon.dir().join("image.tar");
    image.write_archive(&archive, "registry.test/stream:1")?;
    daemon.ctr(&["images", "import", "--no-unpack", archive.to_str().context("a path")?])?;
    std::fs::remove_file(&archive)?;
    let layer = image.needed()?.into_iter().max_by_key(|blob| blob.size).context("no blob")?;
    let mut core = rustix::thread::CpuSet::new();
    core.set(0);
    // A runtime on this thread alone, pinned: whatever it does shares the core.
    let before = rustix::thread::sched_getaffinity(None)?;
    rustix::thread::sched_setaffinity(None, &core)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let measured = runtime.block_on(measure(&daemon, image.digest(), &layer.digest, layer.size));
    runtime.shutdown_background();
    rustix::thread::sched_setaffinity(None, &before)?;
    measured
}

async fn measure(daemon: &Daemon, image: &str, layer: &str, size: u64) -> Result<()> {
    let authority = Authority::generate(SystemTime::now(), Duration::from_secs(3600))?;
    let address = Some("127.0.0.1".parse()?);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let encrypted = listener.local_addr()?;
    let settings = Settings {
        node_name: "source".to_owned(),
        max_bandwidth: None,
        max_upload: None,
        patience: Patience::default(),
        lifetimes: Lifetimes::default(),
        identity: certified(&authority, &Role::Node("source".into()), address)?,
        mounts: None,
        records: None,
    };
    let containerd = Arc::new(Client::new(&daemon.socket()));
    tokio::spawn(run(containerd.clone(), settings, listener, None, CancellationToken::new()));
    let connection = tote_rpc::connect(encrypted, "source", &controller(&authority)?).await?;
    let grant = v1::GrantRequest {
        term: Some(v1::Term { lease_uid: "lease".to_owned(), lease_transitions: 1 }),
        transfer_id: "t".to_owned(),
        node_name: READER.to_owned(),
        digest: image.to_owned(),
        seconds: 3600,
        expected: false,
    };
    connection.into_client()?.grant(grant).await?;

    let served = Served::new(containerd, Arc::default());
    let (now, hour) = (tokio::time::Instant::now(), Duration::from_secs(3600));
    served.grants.give(
        TransferId::parse("t")?,
        READER.to_owned(),
        [layer.parse()?].into(),
        now + hour,
        now,
    )?;
    let (from, to) = (SystemTime::UNIX_EPOCH, SystemTime::now() + hour);
    let reader = Peer { role: Role::Node(READER.into()), not_before: from, not_after: to };
    let app = router(served);
    let app = app.layer(axum::Extension(reader));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let plain = listener.local_addr()?;
    tokio::spawn(async move { axum::serve(listener, app).await });

    let tls = tote_rpc::blob_client(&certified(&authority, &Role::Node(READER.into()), address)?)?;
    let tcp = HyperClient::builder(TokioExecutor::new()).build::<_, Empty<Bytes>>(HttpConnector::new());
    let path = format!("v2/stream/blobs/{layer}");
    let (tls_uri, tcp_uri) = (format!("https://{encrypted}/{path}"), format!("http://{plain}/{path}"));
    // Once each, so that the blob is in memory and the connections stand.
    drained(tls.get(tls_uri.parse()?), size).await?;
    drained(tcp.get(tcp_uri.parse()?), size).await?;
    let (mut speeds, mut ratios) = ((Vec::new(), Vec::new()), Vec::new());
    for _ in 0..PAIRS {
        let with = drained(tls.get(tls_uri.parse()?), size).await?;
        let without = drained(tcp.get(tcp_uri.parse()?), size).await?;
        speeds.0.push(with);
        speeds.1.push(without);
        ratios.push(with / without);
    }
    for (name, values, unit) in
        [("TLS", &mut speeds.0, "MB/s"), ("plain", &mut speeds.1, "MB/s"), ("TLS / plain", &mut ratios, "")]
    {
        values.sort_by(f64::total_cmp);
        println!(
            "  {name:<12} median {:8.2} {unit} ({:.2} to {:.2})",
            values[PAIRS / 2],
            values[0],
            values[PAIRS - 1]
        );
    }
    Ok(())
}

/// Reads a response to its end; returns megabytes a second.
#[allow(clippy::cast_precision_loss)]
async fn drained<E>(
    request: impl Future<Output = Result<http::Response<hyper::body::Incoming>, E>>,
    size: u64,
) -> Result<f64>
where
    E: std::error::Error + Send + Sync + 'static,
{
    let begin = Instant::now();
    let response = request.await?;
    ensure!(response.status().is_success(), "answered {}", response.status());
    let (mut body, mut length) = (response.into_body(), 0);
    while let Some(frame) = body.frame().await {
        length += frame?.data_ref().map_or(0, |data| data.len() as u64);
    }
    ensure!(length == size, "{length} of {size} bytes came");
    Ok(length as f64 / 1e6 / begin.elapsed().as_secs_f64())
}
