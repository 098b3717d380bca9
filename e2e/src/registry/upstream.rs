//! docker-registry itself: starting it, and pushing to it and deleting from it past the proxy.

use crate::images::{Descriptor, Image};
use crate::tools;
use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes;
use futures::TryStreamExt;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::{Body, Frame, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::json;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::time::Instant;
use tokio_util::io::ReaderStream;

/// Time that docker-registry has to answer after its start.
const START: Duration = Duration::from_secs(30);

type Outgoing = UnsyncBoxBody<Bytes, io::Error>;

/// A registry without the proxy's faults.
#[derive(Clone, Debug)]
pub struct Upstream {
    socket: PathBuf,
    name: String,
}

impl Upstream {
    pub(super) fn new(storage: &Path, name: String) -> Self {
        Self { socket: Self::socket(storage), name }
    }

    pub(super) fn socket(storage: &Path) -> PathBuf {
        storage.join("upstream.sock")
    }

    /// `host:port` that references to this registry carry.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Pushes every blob of the image that the registry lacks, then its manifests. `tag` is optional: a reference by
    /// digest needs none. Returns `<name>/<repository>@<digest>`.
    ///
    /// # Errors
    /// If the registry is gone or refuses a blob or a manifest (its answer is in the message).
    pub async fn push(&self, image: &Image, repository: &str, tag: Option<&str>) -> Result<String> {
        for platform in &image.platforms {
            for blob in platform.layers.iter().chain([&platform.config]) {
                self.push_blob(image, repository, blob)
                    .await
                    .with_context(|| format!("pushing blob {} to {}/{repository}", blob.digest, self.name))?;
            }
        }
        for platform in &image.platforms {
            self.push_manifest(image, repository, &platform.manifest, &platform.manifest.digest).await?;
        }
        self.push_manifest(image, repository, &image.target, tag.unwrap_or(image.digest())).await?;
        Ok(format!("{}/{repository}@{}", self.name, image.digest()))
    }

    async fn push_blob(&self, image: &Image, repository: &str, blob: &Descriptor) -> Result<()> {
        let there = format!("/v2/{repository}/blobs/{}", blob.digest);
        if self.ask(Method::HEAD, &there, None, empty()).await?.status() == StatusCode::OK {
            return Ok(());
        }
        let start = format!("/v2/{repository}/blobs/uploads/");
        let response =
            expect(self.ask(Method::POST, &start, None, empty()).await?, StatusCode::ACCEPTED).await?;
        let location = response.headers().get("Location").context("no Location for the upload")?.to_str()?;
        // Relative, for the configuration says so; with a state in its query.
        let upload = format!("{location}&digest={}", blob.digest);
        let file = tokio::fs::File::open(image.layout.blob(&blob.digest)).await?;
        let body =
            StreamBody::new(ReaderStream::with_capacity(file, 1 << 18).map_ok(Frame::data)).boxed_unsync();
        let response =
            self.ask(Method::PUT, &upload, Some(("application/octet-stream", blob.size)), body).await?;
        expect(response, StatusCode::CREATED).await.map(drop)
    }

    async fn push_manifest(
        &self,
        image: &Image,
        repository: &str,
        what: &Descriptor,
        at: &str,
    ) -> Result<()> {
        let bytes = tokio::fs::read(image.layout.blob(&what.digest)).await?;
        let path = format!("/v2/{repository}/manifests/{at}");
        let body = Full::new(Bytes::from(bytes)).map_err(|e| match e {}).boxed_unsync();
        let response = self.ask(Method::PUT, &path, Some((&what.media_type, what.size)), body).await?;
        expect(response, StatusCode::CREATED)
            .await
            .map(drop)
            .with_context(|| format!("pushing {} to {}/{repository}:{at}", what.media_type, self.name))
    }

    /// Deletes a manifest or index upstream, with the tags that point to it: the registry then answers 404 for it.
    ///
    /// # Errors
    /// If the registry is gone or has no such manifest.
    pub async fn delete(&self, repository: &str, digest: &str) -> Result<()> {
        let path = format!("/v2/{repository}/manifests/{digest}");
        expect(self.ask(Method::DELETE, &path, None, empty()).await?, StatusCode::ACCEPTED)
            .await
            .map(drop)
            .with_context(|| format!("deleting {}/{repository}@{digest}", self.name))
    }

    /// Digest that a tag or digest stands for, if the registry has it.
    ///
    /// # Errors
    /// If the registry is gone or answers neither 200 nor 404.
    pub async fn digest_of(&self, repository: &str, tag_or_digest: &str) -> Result<Option<String>> {
        let path = format!("/v2/{repository}/manifests/{tag_or_digest}");
        let response = self.ask(Method::HEAD, &path, None, empty()).await?;
        match response.status() {
            StatusCode::NOT_FOUND => Ok(None),
            StatusCode::OK => {
                let digest =
                    response.headers().get("Docker-Content-Digest").context("no digest in the answer")?;
                Ok(Some(digest.to_str()?.to_owned()))
            }
            other => bail!("HEAD {path} was answered {other}"),
        }
    }

    async fn ask(
        &self,
        method: Method,
        path: &str,
        body_is: Option<(&str, u64)>,
        body: Outgoing,
    ) -> Result<Response<Incoming>> {
        let accept = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
            application/vnd.docker.distribution.manifest.list.v2+json, \
            application/vnd.docker.distribution.manifest.v2+json";
        let mut request =
            Request::builder().method(method).uri(path).header("Host", &self.name).header("Accept", accept);
        if let Some((media_type, length)) = body_is {
            request = request.header("Content-Type", media_type).header("Content-Length", length);
        }
        send(&self.socket, request.body(body)?).await
    }
}

fn empty() -> Outgoing {
    Empty::new().map_err(|e| match e {}).boxed_unsync()
}

async fn expect(response: Response<Incoming>, status: StatusCode) -> Result<Response<()>> {
    let (parts, body) = response.into_parts();
    let bytes = body.collect().await?.to_bytes();
    ensure!(parts.status == status, "answered {}: {}", parts.status, String::from_utf8_lossy(&bytes));
    Ok(Response::from_parts(parts, ()))
}

/// Sends one request over a connection of its own.
pub(super) async fn send<B>(socket: &Path, request: Request<B>) -> Result<Response<Incoming>>
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let stream = UnixStream::connect(socket)
        .await
        .with_context(|| format!("docker-registry is not behind {}", socket.display()))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // It ends with the response's body; its error reaches the reader of that body.
    tokio::spawn(connection);
    Ok(sender.send_request(request).await?)
}

/// Starts docker-registry on a Unix socket in `storage`, and returns once it answers. It dies with the calling thread.
/// If `storage` holds a file `htpasswd` (bcrypt), whoever asks must log in by it.
pub(super) async fn start(storage: &Path) -> Result<Child> {
    std::fs::create_dir_all(storage).with_context(|| format!("making {}", storage.display()))?;
    let socket = Upstream::socket(storage);
    let length = socket.as_os_str().len();
    ensure!(length < 108, "{} is too long for a Unix socket ({length} bytes, at most 107)", socket.display());
    if socket.exists() {
        std::fs::remove_file(&socket)?;
    }
    let config = storage.join("config.yml");
    // JSON is YAML.
    let mut contents = json!({
        "version": 0.1,
        "log": {"level": "warn", "accesslog": {"disabled": true}},
        "storage": {
            "filesystem": {"rootdirectory": storage.join("data"), "maxthreads": 100},
            "delete": {"enabled": true},
            "maintenance": {"uploadpurging": {"enabled": false}},
        },
        "http": {"net": "unix", "addr": socket, "relativeurls": true},
    });
    let passwords = storage.join("htpasswd");
    if passwords.exists() {
        contents["auth"] = json!({"htpasswd": {"realm": "registry", "path": passwords}});
    }
    std::fs::write(&config, serde_json::to_vec_pretty(&contents)?)?;
    let log = storage.join("registry.log");
    let output = File::create(&log)?;
    let mut child = Command::new("setpriv")
        .args(["--pdeathsig", "KILL"])
        .arg(tools::docker_registry()?)
        .arg("serve")
        .arg(&config)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .kill_on_drop(true)
        .spawn()
        .context("starting docker-registry through setpriv (package util-linux)")?;
    let deadline = Instant::now() + START;
    loop {
        let probe = Request::builder().uri("/v2/").header("Host", "localhost").body(empty())?;
        let answers = |r: Response<Incoming>| matches!(r.status(), StatusCode::OK | StatusCode::UNAUTHORIZED);
        if send(&socket, probe).await.is_ok_and(answers) {
            return Ok(child);
        }
        let said = || std::fs::read_to_string(&log).unwrap_or_default();
        if let Some(status) = child.try_wait()? {
            return Err(anyhow!("docker-registry ended with {status}: {}", said()));
        }
        ensure!(Instant::now() < deadline, "docker-registry does not answer after {START:?}: {}", said());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
