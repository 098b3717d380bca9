//! The registry and its faults, in this process and in one that outlives its starter.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use std::time::Instant;
use tote_e2e::images::{Image, Layout, OCI_INDEX, OCI_MANIFEST, PRESETS, preset};
use tote_e2e::registry::{Control, Effect, LOGIN, Mode, Options, Registry, Remote, Rule};

const SOON: Duration = Duration::from_secs(10);

fn registry() -> Registry {
    let listen = "127.0.0.1:0".parse().unwrap();
    Registry::start(&Options { listen, name: None, storage: None }).unwrap()
}

/// Status and number of body bytes of one GET; the error's kind if there is no whole answer within `wait`.
fn get(address: SocketAddr, path: &str, wait: Duration) -> Result<(u16, usize), ErrorKind> {
    let mut stream = TcpStream::connect_timeout(&address, wait).map_err(|e| e.kind())?;
    stream.set_read_timeout(Some(wait)).unwrap();
    // docker-registry answers 404 for an OCI manifest to whoever does not say that it takes one.
    let accept = [OCI_MANIFEST, OCI_INDEX].join(", ");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\nConnection: close\r\n\r\n")
        .map_err(|e| e.kind())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).map_err(|e| e.kind())?;
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").ok_or(ErrorKind::UnexpectedEof)?;
    let head = String::from_utf8(answer[..end].to_vec()).unwrap().to_lowercase();
    let body = answer.len() - end - 4;
    let length = head.lines().find_map(|l| l.strip_prefix("content-length: ")).map(|n| n.parse().unwrap());
    if length.is_some_and(|n: usize| n != body) {
        return Err(ErrorKind::UnexpectedEof);
    }
    Ok((head[9..12].parse().unwrap(), body))
}

async fn pushed(registry: &Registry, image: &str) -> Image {
    let image = preset(image, &Layout::temporary().unwrap(), "x").unwrap();
    registry.upstream().push(&image, "test/it", Some("v1")).await.unwrap();
    image
}

#[tokio::test]
async fn every_kind_of_image_is_taken_and_given_back_unchanged() {
    let registry = registry();
    for name in PRESETS.iter().filter(|n| !n.starts_with("debian")) {
        let image = pushed(&registry, name).await;
        let tag = registry.upstream().digest_of("test/it", "v1").await.unwrap();
        assert_eq!(tag.as_deref(), Some(image.digest()), "{name}");
        let layer = &image.host().unwrap().layers[0];
        let path = format!("/v2/test/it/blobs/{}", layer.digest);
        let size = usize::try_from(layer.size).unwrap();
        assert_eq!(get(registry.address(), &path, SOON), Ok((200, size)), "{name}");
    }
}

#[test]
fn skopeo_copies_what_was_pushed() {
    let registry = registry();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for name in ["docker", "attested", "many-layers"] {
        let image = runtime.block_on(pushed(&registry, name));
        let to = tempfile::tempdir().unwrap();
        let output = Command::new("skopeo")
            .args(["copy", "--all", "--src-tls-verify=false"])
            .arg(format!("docker://{}/test/it@{}", registry.upstream().name(), image.digest()))
            .arg(format!("dir:{}", to.path().display()))
            .output()
            .unwrap();
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[tokio::test]
async fn a_deleted_image_is_gone_with_its_tag() {
    let registry = registry();
    let image = pushed(&registry, "tiny").await;
    let path = format!("/v2/test/it/manifests/{}", image.digest());
    assert_eq!(get(registry.address(), &path, SOON).map(|(status, _)| status), Ok(200));
    registry.upstream().delete("test/it", image.digest()).await.unwrap();
    assert_eq!(registry.upstream().digest_of("test/it", "v1").await.unwrap(), None);
    assert_eq!(get(registry.address(), &path, SOON).map(|(status, _)| status), Ok(404));
    let error = registry.upstream().delete("test/it", image.digest()).await.unwrap_err();
    assert!(format!("{error:#}").contains("MANIFEST_UNKNOWN"), "{error:#}");
}

#[test]
fn stopped_it_refuses_and_comes_back_on_the_same_port() {
    let registry = registry();
    let mut idle = TcpStream::connect(registry.address()).unwrap();
    idle.set_read_timeout(Some(SOON)).unwrap();
    // The connection is accepted for certain once a later one has been answered.
    assert_eq!(get(registry.address(), "/v2/", SOON), Ok((200, 2)));
    registry.stop().unwrap();
    assert_eq!(idle.read(&mut [0]).map_err(|e| e.kind()).unwrap_or(0), 0, "an open connection is closed");
    assert_eq!(get(registry.address(), "/v2/", SOON), Err(ErrorKind::ConnectionRefused));
    registry.heal().unwrap();
    assert_eq!(get(registry.address(), "/v2/", SOON), Ok((200, 2)));
}

#[test]
fn a_black_hole_answers_nothing_and_is_counted_until_it_ends() {
    let registry = registry();
    for mode in [Mode::Hanging, Mode::Dropping, Mode::Hanging] {
        registry.mode(mode).unwrap();
        registry.forget().unwrap();
        let begun = Instant::now();
        let error = get(registry.address(), "/v2/", Duration::from_millis(300)).unwrap_err();
        assert!(matches!(error, ErrorKind::TimedOut | ErrorKind::WouldBlock), "{mode:?}: {error}");
        assert!(begun.elapsed() >= Duration::from_millis(300), "{mode:?}");
        let connected = TcpStream::connect_timeout(&registry.address(), Duration::from_millis(300)).is_ok();
        assert_eq!(connected, mode == Mode::Hanging, "{mode:?}");
        let unanswered = registry.requests().unwrap().iter().filter(|r| r.status == 0).count();
        assert_eq!(unanswered, usize::from(mode == Mode::Hanging), "{mode:?}");
        registry.heal().unwrap();
        assert_eq!(get(registry.address(), "/v2/", SOON), Ok((200, 2)), "{mode:?}");
    }
}

#[test]
fn a_request_that_hung_is_answered_when_the_black_hole_ends() {
    let registry = registry();
    registry.mode(Mode::Hanging).unwrap();
    let address = registry.address();
    let client = std::thread::spawn(move || get(address, "/v2/", SOON));
    while registry.requests().unwrap().is_empty() {
        assert!(!client.is_finished(), "answered by a black hole");
        std::thread::yield_now();
    }
    registry.heal().unwrap();
    assert_eq!(client.join().unwrap(), Ok((200, 2)));
}

#[tokio::test]
async fn a_login_can_be_demanded() {
    let registry = registry();
    let image = pushed(&registry, "tiny").await;
    let manifest = format!("/v2/test/it/manifests/{}", image.digest());
    registry.demand_login().unwrap();
    assert_eq!(get(registry.address(), &manifest, SOON).map(|a| a.0), Ok(401));
    let source = format!("docker://{}/test/it:v1", registry.address());
    let inspected = |login: &str| {
        let arguments = ["inspect", "--raw", "--tls-verify=false", login, &source];
        Command::new("skopeo").args(arguments).output().unwrap().status.success()
    };
    assert!(inspected(&format!("--creds={}:{}", LOGIN.0, LOGIN.1)));
    assert!(!inspected("--creds=puller:other"));
    registry.heal().unwrap();
    assert_eq!(get(registry.address(), &manifest, SOON).map(|a| a.0), Ok(200));
}

#[tokio::test]
async fn rules_hit_the_paths_they_name() {
    let registry = registry();
    let image = pushed(&registry, "tiny").await;
    let manifest = format!("/v2/test/it/manifests/{}", image.digest());
    let blob = format!("/v2/test/it/blobs/{}", image.host().unwrap().layers[0].digest);
    registry.error(429).unwrap();
    assert_eq!(get(registry.address(), &manifest, SOON).map(|a| a.0), Ok(429));
    let rule = |path: &str, effect| Rule { path: path.to_owned(), effect };
    let status = rule("/manifests/", Effect::Status(500));
    registry.rules(&[status, rule("/blobs/", Effect::Cut(1000))]).unwrap();
    assert_eq!(get(registry.address(), &manifest, SOON).map(|a| a.0), Ok(500));
    registry.forget().unwrap();
    get(registry.address(), &blob, SOON).unwrap_err();
    let seen = registry.requests().unwrap();
    assert_eq!((seen.len(), seen[0].status, seen[0].bytes), (1, 200, 1000), "{seen:?}");
    registry.rules(&[rule(&blob, Effect::Hang)]).unwrap();
    assert!(get(registry.address(), &blob, Duration::from_millis(200)).is_err());
    assert_eq!(get(registry.address(), &manifest, SOON).map(|a| a.0), Ok(200));
}

#[tokio::test]
async fn a_throttled_body_takes_its_time() {
    let registry = registry();
    let image = pushed(&registry, "tiny").await;
    let layer = &image.host().unwrap().layers[0];
    let path = format!("/v2/test/it/blobs/{}", layer.digest);
    let effect = Effect::Throttle(layer.size * 2);
    registry.rules(&[Rule { path: "/blobs/".to_owned(), effect }]).unwrap();
    let begun = Instant::now();
    assert_eq!(get(registry.address(), &path, SOON).map(|a| a.0), Ok(200));
    let took = begun.elapsed().as_secs_f32();
    assert!((0.4..3.0).contains(&took), "{took} s for what should take half a second");
}

#[test]
fn what_cannot_start_says_why() {
    let busy = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = busy.local_addr().unwrap();
    let error = Registry::start(&Options { listen, name: None, storage: None }).unwrap_err();
    assert!(format!("{error:#}").contains("cannot be had"), "{error:#}");
    let storage = std::env::temp_dir().join("x".repeat(120));
    let options =
        Options { listen: "127.0.0.1:0".parse().unwrap(), name: None, storage: Some(storage.clone()) };
    let error = Registry::start(&options).unwrap_err();
    std::fs::remove_dir(&storage).unwrap();
    assert!(format!("{error:#}").contains("too long for a Unix socket"), "{error:#}");
}

#[test]
fn a_dropped_registry_leaves_no_process_and_no_directory() {
    let registry = registry();
    let storage = registry.storage().to_owned();
    let config = storage.join("config.yml").display().to_string();
    let running = || {
        std::fs::read_dir("/proc").unwrap().flatten().any(|p| {
            std::fs::read(p.path().join("cmdline"))
                .is_ok_and(|c| String::from_utf8_lossy(&c).contains(&config))
        })
    };
    assert!(running(), "docker-registry runs with {config}");
    drop(registry);
    assert!(!running() && !storage.exists());
}

fn program(storage: &Path, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(env!("CARGO_BIN_EXE_registry"))
        .args(arguments)
        .arg("--storage")
        .arg(storage)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

#[test]
fn it_is_driven_from_any_process_and_ends_when_told() {
    let dir = tempfile::tempdir().unwrap();
    let storage = dir.path();
    let error = program(storage, &["stop"]).unwrap_err();
    assert!(error.contains("no registry was started"), "{error}");

    let listen = "127.0.0.1:0".parse().unwrap();
    let options =
        Options { listen, name: Some("registry.test:5000".to_owned()), storage: Some(storage.to_owned()) };
    let remote = Remote::spawn(Path::new(env!("CARGO_BIN_EXE_registry")), &options).unwrap();
    let address = remote.address();
    let reference = program(storage, &["push", "tiny", "demo/app", "--tag", "v1", "--seed", "s"]).unwrap();
    assert!(reference.starts_with("registry.test:5000/demo/app@sha256:"), "{reference}");

    program(storage, &["stop"]).unwrap();
    assert!(TcpStream::connect(address).is_err());
    program(storage, &["heal"]).unwrap();
    drop(TcpStream::connect(address).unwrap());
    assert!(program(storage, &["hosts-toml"]).unwrap().contains(&format!("http://{address}")));

    let again = Remote::spawn(Path::new(env!("CARGO_BIN_EXE_registry")), &options).unwrap_err();
    assert!(format!("{again:#}").contains("already"), "{again:#}");

    remote.shutdown().unwrap();
    assert!(!Path::new("/proc").join(remote.pid().to_string()).join("exe").exists());
    assert!(remote.stop().is_err());

    // What was pushed is there after a new start, and after one that was killed.
    let remote = Remote::spawn(Path::new(env!("CARGO_BIN_EXE_registry")), &options).unwrap();
    assert!(Command::new("kill").args(["-9", &remote.pid().to_string()]).status().unwrap().success());
    while Remote::attach(storage).is_ok() {
        std::thread::yield_now();
    }
    let remote = Remote::spawn(Path::new(env!("CARGO_BIN_EXE_registry")), &options).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let kept = runtime.block_on(remote.upstream().digest_of("demo/app", "v1")).unwrap();
    assert_eq!(kept.as_deref(), reference.trim().split_once('@').map(|(_, digest)| digest));
    remote.shutdown().unwrap();
}
