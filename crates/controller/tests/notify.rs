//! Notifications, to a receiver that is played here, over real connections on loopback.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, StatusCode, Uri, header};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tote_controller::http::Health;
use tote_controller::notify::{
    Delivery, Header, Notification, NotificationType, Notifier, Pace, Receiver, ReceiverError,
};

const DEADLINE: Duration = Duration::from_secs(20);

/// What the receiver was sent.
struct Post {
    path: String,
    headers: HeaderMap,
    document: Value,
}

/// What it does about the next request; beyond the last one it says 204.
enum Answer {
    Status(u16),
    After(u16, &'static str),
    Redirect(String),
    Never,
}

struct Played {
    posts: mpsc::UnboundedSender<Post>,
    answers: Mutex<VecDeque<Answer>>,
}

async fn answer(State(played): State<Arc<Played>>, uri: Uri, headers: HeaderMap, body: Bytes) -> Response {
    let document = serde_json::from_slice(&body).unwrap();
    let _ = played.posts.send(Post { path: uri.path().to_owned(), headers, document });
    let answer = played.answers.lock().unwrap().pop_front().unwrap_or(Answer::Status(204));
    let status = |code| StatusCode::from_u16(code).unwrap();
    match answer {
        Answer::Status(code) => status(code).into_response(),
        Answer::After(code, after) => (status(code), [(header::RETRY_AFTER, after)]).into_response(),
        Answer::Redirect(to) => (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, to)]).into_response(),
        Answer::Never => std::future::pending().await,
    }
}

/// A receiver and a notifier that sends to it.
struct Bench {
    posts: mpsc::UnboundedReceiver<Post>,
    notifier: Notifier,
    delivery: Delivery,
    health: Arc<Health>,
}

fn quick() -> Pace {
    Pace { first_pause: Duration::from_millis(1), last_pause: Duration::from_millis(2), ..Pace::default() }
}

async fn played(answers: impl IntoIterator<Item = Answer>) -> (SocketAddr, mpsc::UnboundedReceiver<Post>) {
    let (sender, posts) = mpsc::unbounded_channel();
    let state = Arc::new(Played { posts: sender, answers: Mutex::new(answers.into_iter().collect()) });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let app = Router::new().fallback(answer).with_state(state);
    tokio::spawn(async move { axum::serve(listener, app).await });
    (address, posts)
}

async fn bench_with(
    answers: impl IntoIterator<Item = Answer>,
    types: &[NotificationType],
    pace: Pace,
    header: Option<Header>,
) -> Bench {
    let (address, posts) = played(answers).await;
    let receiver = Receiver::new(&format!("http://{address}/hook"), header, None).await.unwrap();
    let health = Arc::new(Health::default());
    let types = types.iter().copied().collect();
    let (notifier, delivery) = Notifier::start(receiver, types, pace, health.clone());
    Bench { posts, notifier, delivery, health }
}

async fn bench(answers: impl IntoIterator<Item = Answer>) -> Bench {
    bench_with(answers, &NotificationType::ALL, quick(), None).await
}

impl Bench {
    async fn next(&mut self) -> Post {
        timeout(DEADLINE, self.posts.recv()).await.expect("nothing is sent").unwrap()
    }

    fn count(&self, type_: &str, result: &str) -> u64 {
        let line = format!("tote_notifications_total{{type=\"{type_}\",result=\"{result}\"}} ");
        let text = self.health.metrics.text().unwrap();
        text.lines().find_map(|l| l.strip_prefix(&line)).map_or(0, |n| n.parse().unwrap())
    }

    async fn counts(&self, type_: &str, result: &str, n: u64) {
        let until = Instant::now() + DEADLINE;
        while self.count(type_, result) != n {
            assert!(Instant::now() < until, "{type_} {result} is {} not {n}", self.count(type_, result));
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

fn notification(type_: NotificationType, pod: &str) -> Notification {
    Notification {
        type_,
        pod_name: pod.into(),
        namespace: "shop".into(),
        image_ref: "r.test/x:1".into(),
        digest: "sha256:00".into(),
        source_node: "n1,n2".into(),
        target_node: "n3".into(),
        error: "what went wrong".into(),
        timestamp: "2026-01-02T03:04:05Z".parse::<Timestamp>().unwrap(),
    }
}

fn detected(pod: &str) -> Notification {
    notification(NotificationType::Detected, pod)
}

#[tokio::test]
async fn every_field_is_sent_in_the_order_of_what_happened() {
    let mut bench = bench([]).await;
    for type_ in NotificationType::ALL {
        bench.notifier.notify(notification(type_, "web-1"));
    }
    for type_ in ["detected", "salvaged", "salvage_failed", "pushed", "push_failed"] {
        let post = bench.next().await;
        assert_eq!(
            post.document,
            json!({"type": type_, "pod_name": "web-1", "namespace": "shop", "image_ref": "r.test/x:1",
                "digest": "sha256:00", "source_node": "n1,n2", "target_node": "n3", "error": "what went wrong",
                "timestamp": "2026-01-02T03:04:05Z"})
        );
        assert_eq!(
            (post.path.as_str(), &post.headers["content-type"]),
            ("/hook", &"application/json".parse().unwrap())
        );
        assert!(!post.headers.contains_key("authorization"));
        bench.counts(type_, "sent", 1).await;
    }
}

#[tokio::test]
async fn types_that_are_not_wanted_are_not_sent() {
    let mut bench = bench_with([], &[NotificationType::SalvageFailed], quick(), None).await;
    for type_ in NotificationType::ALL {
        bench.notifier.notify(notification(type_, "web-1"));
    }
    assert_eq!(bench.next().await.document["type"], "salvage_failed");
    bench.delivery.drain(DEADLINE).await;
    assert!(bench.posts.try_recv().is_err(), "and nothing else");
}

fn secret(file: &str) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(file);
    (directory, path)
}

#[tokio::test]
async fn the_secret_is_what_its_file_holds_at_that_moment() {
    let (_directory, file) = secret("token");
    std::fs::write(&file, "Bearer one\n").unwrap();
    let header = Header { name: "X-Tote-Secret".into(), file: file.clone() };
    let mut bench = bench_with([], &NotificationType::ALL, quick(), Some(header)).await;
    bench.notifier.notify(detected("web-1"));
    assert_eq!(bench.next().await.headers["x-tote-secret"], "Bearer one");
    std::fs::write(&file, "Bearer two").unwrap();
    bench.notifier.notify(detected("web-2"));
    assert_eq!(bench.next().await.headers["x-tote-secret"], "Bearer two");
    std::fs::remove_file(&file).unwrap();
    bench.notifier.notify(detected("web-3"));
    bench.counts("detected", "failed", 1).await;
    assert!(bench.posts.try_recv().is_err(), "never without the secret");
}

#[tokio::test]
async fn what_may_pass_is_tried_again() {
    for code in [500, 503, 429, 408] {
        let mut bench = bench([Answer::Status(code), Answer::Status(code)]).await;
        bench.notifier.notify(detected("web-1"));
        bench.notifier.notify(detected("web-2"));
        let mut pods = Vec::new();
        for _ in 0..4 {
            pods.push(bench.next().await.document["pod_name"].as_str().unwrap().to_owned());
        }
        assert_eq!(pods, ["web-1", "web-1", "web-1", "web-2"], "{code}");
        bench.counts("detected", "sent", 2).await;
        assert_eq!(bench.count("detected", "failed"), 0);
    }
}

#[tokio::test]
async fn what_goes_on_failing_is_given_up_after_so_many_attempts() {
    let mut bench = bench((0..6).map(|_| Answer::Status(500))).await;
    bench.notifier.notify(detected("web-1"));
    bench.notifier.notify(detected("web-2"));
    for _ in 0..6 {
        assert_eq!(bench.next().await.document["pod_name"], "web-1");
    }
    assert_eq!(bench.next().await.document["pod_name"], "web-2");
    bench.counts("detected", "sent", 1).await;
    assert_eq!(bench.count("detected", "failed"), 1);
}

#[tokio::test]
async fn a_refusal_is_not_tried_again() {
    for code in [400, 401, 404, 413] {
        let mut bench = bench([Answer::Status(code)]).await;
        bench.notifier.notify(detected("web-1"));
        bench.notifier.notify(detected("web-2"));
        assert_eq!(bench.next().await.document["pod_name"], "web-1", "{code}");
        assert_eq!(bench.next().await.document["pod_name"], "web-2", "{code}");
        bench.counts("detected", "sent", 1).await;
        assert_eq!(bench.count("detected", "failed"), 1);
    }
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let (elsewhere, mut there) = played([]).await;
    let mut bench = bench([Answer::Redirect(format!("http://{elsewhere}/"))]).await;
    bench.notifier.notify(detected("web-1"));
    bench.next().await;
    bench.counts("detected", "failed", 1).await;
    bench.delivery.drain(DEADLINE).await;
    assert!(there.try_recv().is_err() && bench.posts.try_recv().is_err());
}

#[tokio::test]
async fn a_receiver_may_ask_for_a_pause_within_a_bound() {
    let bound = Duration::from_millis(300);
    let pace = Pace { longest_request: bound, ..quick() };
    let answers = [Answer::After(429, "3600")];
    let mut bench = bench_with(answers, &NotificationType::ALL, pace, None).await;
    bench.notifier.notify(detected("web-1"));
    bench.next().await;
    let began = Instant::now();
    bench.next().await;
    // The other end of the pause is seen a moment later than it begins.
    assert!(began.elapsed() > bound / 2 && began.elapsed() < DEADLINE, "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_receiver_that_hangs_holds_nobody_up() {
    let pace = Pace { queue: 3, attempts: 1, deadline: Duration::from_secs(3600), ..quick() };
    let mut bench = bench_with([Answer::Never], &NotificationType::ALL, pace, None).await;
    bench.notifier.notify(detected("web-0"));
    bench.next().await;
    let began = Instant::now();
    for n in 1..=10 {
        bench.notifier.notify(detected(&format!("web-{n}")));
    }
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!(bench.count("detected", "dropped"), 7, "three wait");
    assert_eq!(bench.count("detected", "sent"), 0);
}

#[tokio::test]
async fn a_request_has_a_deadline() {
    let pace = Pace { deadline: Duration::from_millis(100), ..quick() };
    let mut bench = bench_with([Answer::Never], &NotificationType::ALL, pace, None).await;
    bench.notifier.notify(detected("web-1"));
    bench.next().await;
    bench.next().await;
    bench.counts("detected", "sent", 1).await;
}

#[tokio::test]
async fn what_is_queued_leaves_at_the_end_and_the_end_has_a_bound() {
    let mut bench = bench([Answer::Status(500)]).await;
    for n in 0..3 {
        bench.notifier.notify(detected(&format!("web-{n}")));
    }
    timeout(DEADLINE, bench.delivery.drain(DEADLINE)).await.unwrap();
    for n in 0..3 {
        assert_eq!(
            bench.posts.try_recv().unwrap().document["pod_name"],
            format!("web-{n}"),
            "one attempt each"
        );
    }
    bench.notifier.notify(detected("late"));
    assert_eq!(bench_count(&bench.health), 1, "and nothing more is taken");

    let hanging = bench_with([Answer::Never], &NotificationType::ALL, quick(), None).await;
    hanging.notifier.notify(detected("web-1"));
    timeout(DEADLINE, hanging.delivery.drain(Duration::from_millis(50))).await.expect("a bound");
}

fn bench_count(health: &Health) -> usize {
    let line = "tote_notifications_total{type=\"detected\",result=\"dropped\"} 1";
    health.metrics.text().unwrap().lines().filter(|l| *l == line).count()
}

#[tokio::test]
async fn a_receiver_behind_an_authority_of_ones_own_is_trusted_by_its_file() {
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate =
        rcgen::CertificateParams::new(vec!["localhost".into()]).unwrap().self_signed(&key).unwrap();
    let config =
        rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            if let Ok(mut stream) = acceptor.accept(stream).await {
                let mut request = vec![0; 4096];
                assert!(stream.read(&mut request).await.unwrap() > 0);
                let _ = stream.write_all(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n").await;
                let _ = stream.shutdown().await;
            }
        }
    });
    let (_directory, file) = secret("ca.crt");
    std::fs::write(&file, certificate.pem()).unwrap();
    let url = format!("https://localhost:{port}/");
    for (ca_file, result) in [(Some(file.as_path()), "sent"), (None, "failed")] {
        let receiver = Receiver::new(&url, None, ca_file).await.unwrap();
        let health = Arc::new(Health::default());
        let (notifier, delivery) =
            Notifier::start(receiver, NotificationType::ALL.into(), quick(), health.clone());
        notifier.notify(detected("web-1"));
        delivery.drain(DEADLINE).await;
        let line = format!("tote_notifications_total{{type=\"detected\",result=\"{result}\"}} 1\n");
        let text = health.metrics.text().unwrap();
        assert!(text.contains(&line), "{ca_file:?}: {text}");
    }
}

#[tokio::test]
async fn what_cannot_work_is_said_at_the_start() {
    let (_directory, file) = secret("token");
    let refused = async |url: &str, header: Option<&str>, ca: bool| -> String {
        let header = header.map(|name| Header { name: name.into(), file: file.clone() });
        let error: ReceiverError =
            Receiver::new(url, header, ca.then_some(file.as_path())).await.unwrap_err();
        error.to_string()
    };
    let url = "https://hooks.test/";
    assert!(refused("hooks.test", None, false).await.starts_with("--notify-url: not a URL"));
    assert!(refused(url, Some("X Y"), false).await.starts_with("--notify-header-name X Y"));
    assert!(refused(url, Some("X"), false).await.contains("token: cannot be read"));
    for (text, says) in [(" \n", "is empty"), ("a\nb", "bytes that"), (&*"x".repeat(20_000), "longer than")] {
        std::fs::write(&file, text).unwrap();
        let error = refused(url, Some("X"), false).await;
        assert!(error.starts_with("--notify-header-file") && error.contains(says), "{error}");
    }
    assert!(refused(url, None, true).await.contains("no certificate"));
}
