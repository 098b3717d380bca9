//! The distribution API over the fake containerd, as an HTTP client sees it.

use std::time::Duration;

use http::{Request, StatusCode};
use http_body_util::BodyExt;
use tower::ServiceExt;

use super::*;
use crate::containerd::Fake;
use crate::import::{State, TransferId, Underway};
use crate::testing::{Blobs, noise, tar};

/// Bytes of a layer: more than the pieces that wait for a reader.
const LAYER: usize = 200_000;

struct Registry {
    fake: Fake,
    router: Router,
    image: Blobs,
    grants: Grants,
    metrics: Arc<Metrics>,
}

impl Registry {
    fn new() -> Self {
        Self::with_stall(Duration::from_secs(60))
    }

    fn with_stall(stall: Duration) -> Self {
        Self::with(|served| served.stall = stall)
    }

    fn with(change: impl FnOnce(&mut Served)) -> Self {
        let fake = Fake::default();
        let image = Blobs::image(&[tar(&[("a", &noise(LAYER))])]).indexed();
        image.pull_into(&fake, "registry.test/a/b:1");
        let metrics = Arc::<Metrics>::default();
        let mut served = Served::new(Arc::new(fake.clone()), metrics.clone());
        change(&mut served);
        let grants = served.grants.clone();
        let registry = Self { fake, router: router(served), image, grants, metrics };
        registry.grant("reader", &registry.image.digests());
        registry
    }

    /// Asks as the reader and reads no body.
    async fn open(&self, path: &str) -> Response {
        let role = Role::Node("reader".into());
        let peer = Peer { role, not_before: std::time::UNIX_EPOCH, not_after: std::time::UNIX_EPOCH };
        let request = Request::get(path).extension(peer).body(Body::empty()).unwrap();
        self.router.clone().oneshot(request).await.unwrap()
    }

    fn refused(&self, reason: &str) -> u64 {
        let mut registry = prometheus_client::registry::Registry::default();
        self.metrics.register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let name = format!("tote_agent_refused_total{{reason=\"{reason}\"}} ");
        text.lines().find_map(|line| line.strip_prefix(&name)).unwrap().parse().unwrap()
    }

    fn grant(&self, reader: &str, blobs: &[Digest]) {
        let (id, now) = (TransferId::parse(&format!("for-{reader}")).unwrap(), Instant::now());
        let blobs = blobs.iter().cloned().collect();
        self.grants.give(id, reader.to_owned(), blobs, now + Duration::from_secs(60), now).unwrap();
    }

    async fn ask(&self, method: &str, path: &str, range: &str) -> (StatusCode, HeaderMap, Vec<u8>) {
        self.ask_as(Some(Role::Node("reader".into())), method, path, range).await
    }

    async fn ask_as(
        &self,
        role: Option<Role>,
        method: &str,
        path: &str,
        range: &str,
    ) -> (StatusCode, HeaderMap, Vec<u8>) {
        let mut request = Request::builder().method(method).uri(path);
        if !range.is_empty() {
            request = request.header("range", range);
        }
        let (not_before, not_after) = (std::time::UNIX_EPOCH, std::time::UNIX_EPOCH);
        if let Some(role) = role {
            request = request.extension(Peer { role, not_before, not_after });
        }
        let answer = self.router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
        let (parts, body) = answer.into_parts();
        (parts.status, parts.headers, body.collect().await.unwrap().to_bytes().to_vec())
    }
}

#[tokio::test]
async fn serves_documents_with_their_own_type() {
    let registry = Registry::new();
    let target = &registry.image.target;
    for path in [
        format!("/v2/any/name/manifests/{}", target.digest),
        "/v2/a/b/manifests/1?ns=registry.test".to_owned(),
    ] {
        let (status, headers, body) = registry.ask("GET", &path, "").await;
        assert_eq!(status, StatusCode::OK, "{path}");
        assert_eq!(headers["content-type"], target.media_type);
        assert_eq!(headers["docker-content-digest"], target.digest.as_str());
        assert_eq!(headers["content-length"], target.size.to_string());
        assert_eq!(body, registry.image.bytes[&target.digest]);
        let (status, headers, body) = registry.ask("HEAD", &path, "").await;
        assert_eq!((status, body.len()), (StatusCode::OK, 0));
        assert_eq!(headers["content-length"], target.size.to_string());
    }
}

#[tokio::test]
async fn serves_blobs_and_parts_of_them() {
    let registry = Registry::new();
    let layer = &registry.image.layers[0];
    let bytes = &registry.image.bytes[&layer.digest];
    let path = format!("/v2/a/b/blobs/{}", layer.digest);
    let last = bytes.len() - 1;
    for (range, from, to) in [
        ("", 0, last),
        ("bytes=0-", 0, last),
        ("bytes=7-", 7, last),
        ("bytes=3-9", 3, 9),
        ("bytes=-4", last - 3, last),
        ("bytes=5-999999", 5, last),
        ("lines=1-2", 0, last),
        ("bytes=1-2,5-6", 0, last),
    ] {
        let (status, headers, body) = registry.ask("GET", &path, range).await;
        assert_eq!(body, bytes[from..=to], "{range}");
        assert_eq!(headers["content-length"], body.len().to_string(), "{range}");
        if status == StatusCode::PARTIAL_CONTENT {
            assert_eq!(headers["content-range"], format!("bytes {from}-{to}/{}", bytes.len()));
        } else {
            assert_eq!((status, from, to), (StatusCode::OK, 0, last), "{range}");
        }
    }
    let (status, headers, _) = registry.ask("GET", &path, &format!("bytes={}-", bytes.len())).await;
    assert_eq!(status, StatusCode::RANGE_NOT_SATISFIABLE);
    assert_eq!(headers["content-range"], format!("bytes */{}", bytes.len()));
}

#[tokio::test]
async fn refuses_in_the_specifications_words() {
    let registry = Registry::new();
    let (absent, layer) = (Digest::sha256(b"absent"), &registry.image.layers[0].digest);
    registry.grant("reader", &[absent.clone(), layer.clone()]);
    for (method, path, status, code) in [
        ("GET", format!("/v2/a/blobs/{absent}"), 404, "BLOB_UNKNOWN"),
        ("GET", format!("/v2/a/manifests/{absent}"), 404, "MANIFEST_UNKNOWN"),
        ("GET", format!("/v2/a/manifests/{layer}"), 404, "MANIFEST_UNKNOWN"),
        ("GET", "/v2/a/b/manifests/1".to_owned(), 404, "MANIFEST_UNKNOWN"),
        ("GET", "/v2/a/b/manifests/2?ns=registry.test".to_owned(), 403, "DENIED"),
        ("GET", "/v2/a/blobs/sha256:12".to_owned(), 400, "DIGEST_INVALID"),
        ("PUT", "/v2/a/manifests/x".to_owned(), 405, "UNSUPPORTED"),
        ("POST", "/v2/a/blobs/uploads/".to_owned(), 405, "UNSUPPORTED"),
        ("GET", "/metrics".to_owned(), 404, "NOT_FOUND"),
    ] {
        let (found, headers, body) = registry.ask(method, &path, "").await;
        assert_eq!(found.as_u16(), status, "{path}");
        assert_eq!(headers["content-type"], "application/json");
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["errors"][0]["code"], code, "{path}");
    }
    assert_eq!(registry.ask("GET", "/v2/", "").await.0, StatusCode::OK);
}

/// What is there and what is not look the same to whoever was granted nothing, or something else.
#[tokio::test]
async fn only_what_was_granted_is_told_of() {
    let registry = Registry::new();
    registry.grant("other", &[Digest::sha256(b"something else")]);
    let (target, layer) = (&registry.image.target.digest, &registry.image.layers[0].digest);
    let refused = || registry.refused("grant");
    let node = |name: &str| Some(Role::Node(name.into()));
    for role in [node("other"), node("nobody"), Some(Role::Controller), None] {
        for (path, status) in [
            (format!("/v2/a/b/manifests/{target}"), 403),
            ("/v2/a/b/manifests/1?ns=registry.test".to_owned(), 403),
            ("/v2/a/b/manifests/nothing?ns=registry.test".to_owned(), 403),
            (format!("/v2/a/b/blobs/{layer}"), 403),
            (format!("/v2/a/b/blobs/{}", Digest::sha256(b"absent")), 403),
        ] {
            for method in ["GET", "HEAD"] {
                let before = (refused(), registry.refused("role"));
                let (found, headers, _) = registry.ask_as(role.clone(), method, &path, "").await;
                assert_eq!(found.as_u16(), status, "{role:?} {path}");
                assert!(!headers.contains_key("docker-content-digest"), "{role:?} {path}: {headers:?}");
                let after = (refused(), registry.refused("role"));
                let by_role = !matches!(role, Some(Role::Node(_)));
                let wanted = (before.0 + u64::from(!by_role), before.1 + u64::from(by_role));
                assert_eq!(after, wanted, "{role:?} {path} is counted");
            }
        }
    }
    assert_eq!(registry.ask("GET", &format!("/v2/a/b/manifests/{target}"), "").await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_grant_that_ends_cuts_off_what_is_under_way() {
    let registry = Registry::new();
    let path = format!("/v2/a/b/blobs/{}", registry.image.layers[0].digest);
    let peer = Peer {
        role: Role::Node("reader".into()),
        not_before: std::time::UNIX_EPOCH,
        not_after: std::time::UNIX_EPOCH,
    };
    let request = Request::get(&path).extension(peer).body(Body::empty()).unwrap();
    let answer = registry.router.clone().oneshot(request).await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    assert!(registry.grants.revoke(&TransferId::parse("for-reader").unwrap(), Instant::now()));
    let error = answer.into_body().collect().await.unwrap_err();
    assert!(error.to_string().contains("the grant has ended"), "{error}");
}

/// The time is the runtime's, which goes on only where all wait for it.
#[tokio::test(start_paused = true)]
async fn what_is_given_is_capped_over_all_readers() {
    let rate = 4 * LAYER;
    let registry =
        Registry::with(|served| served.upload = Bandwidth::new(Some(rate.to_string().parse().unwrap())));
    registry.grant("other", &registry.image.digests());
    let path = format!("/v2/a/b/blobs/{}", registry.image.layers[0].digest);
    let began = Instant::now();
    let read = async |node: &str| registry.ask_as(Some(Role::Node(node.into())), "GET", &path, "").await;
    let (one, two) = tokio::join!(read("reader"), read("other"));
    assert!(one.2.len() > LAYER && one.2 == two.2);
    // Half a second, of which a tenth of one may pass at once.
    let took = began.elapsed() + Duration::from_millis(100);
    let given = u32::try_from(one.2.len() + two.2.len()).unwrap();
    let due = Duration::from_secs(1) * given / u32::try_from(rate).unwrap();
    assert!(took >= due && took < due + Duration::from_millis(20), "{took:?} for {due:?}");
}

/// A node that does not read holds its share for a while, and never that of others.
#[tokio::test]
async fn those_who_do_not_read_hold_nothing_for_long() {
    let registry = Registry::with_stall(Duration::from_secs(8));
    registry.grant("other", &registry.image.digests());
    let path = format!("/v2/a/b/blobs/{}", registry.image.layers[0].digest);
    let document = format!("/v2/a/b/manifests/{}", registry.image.target.digest);
    let ask = async |node: &str, path: &str| {
        let role = Role::Node(node.into());
        let peer = Peer { role, not_before: std::time::UNIX_EPOCH, not_after: std::time::UNIX_EPOCH };
        let request = Request::get(path).extension(peer).body(Body::empty()).unwrap();
        registry.router.clone().oneshot(request).await.unwrap()
    };
    // A small body waits whole in the queue; the second piece of a larger one would wait for the reader.
    let held = futures::future::join_all((0..feed::SHARE).map(|_| ask("reader", &path))).await;
    assert!(held.iter().all(|answer| answer.status() == StatusCode::OK));
    let all = futures::future::join_all((0..feed::UPLOADS - feed::SHARE).map(|_| ask("other", &path))).await;
    assert!(all.iter().all(|answer| answer.status() == StatusCode::OK), "the share of another");
    let (more, documents) = (ask("reader", &path).await, ask("other", &document).await);
    assert_eq!(more.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(documents.status(), StatusCode::SERVICE_UNAVAILABLE, "manifests take turns as well");
    drop(all);
    assert_eq!(ask("other", &document).await.status(), StatusCode::OK);
    // Nobody has read, nobody has gone: what they held comes back all the same.
    let free = async { while ask("reader", &path).await.status() != StatusCode::OK {} };
    tokio::time::timeout(Duration::from_secs(20), free).await.expect("those who stall lose their turn");
    drop(held);
}

/// Revoked, it is over at once for those who do not read as well.
#[tokio::test]
async fn a_grant_that_ends_frees_what_nobody_reads() {
    let registry = Registry::with_stall(Duration::from_secs(600));
    let path = format!("/v2/a/b/blobs/{}", registry.image.layers[0].digest);
    let mut held = Vec::new();
    for _ in 0..feed::SHARE {
        held.push(registry.open(&path).await);
    }
    assert_eq!(registry.open(&path).await.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(registry.grants.revoke(&TransferId::parse("for-reader").unwrap(), Instant::now()));
    registry.grant("reader", &[Digest::sha256(b"something else"), registry.image.target.digest.clone()]);
    let document = format!("/v2/a/b/manifests/{}", registry.image.target.digest);
    let free = async { while registry.open(&document).await.status() != StatusCode::OK {} };
    tokio::time::timeout(Duration::from_secs(20), free).await.expect("what ended holds no turn");
}

/// A blob that is on its way is told from one that is not here, to whoever may read it and nobody else.
#[tokio::test]
async fn what_is_on_its_way_is_told_to_those_who_may_read_it() {
    let registry = Registry::new();
    let image = Blobs::image(&[tar(&[("b", b"2")])]).indexed();
    let (underway, id) = (Underway::default(), TransferId::parse("early").unwrap());
    let (root, layer) = (&image.target.digest, &image.layers[0].digest);
    let (blob, index) = (format!("/v2/a/b/blobs/{layer}"), format!("/v2/a/b/manifests/{root}"));
    let now = Instant::now();
    let coming = underway.expect(root, now);
    let until = now + Duration::from_secs(60);
    assert_eq!(registry.ask("GET", &blob, "").await.0, StatusCode::FORBIDDEN);
    registry
        .grants
        .give_coming(id.clone(), "reader".to_owned(), ([root.clone()].into(), coming), until, now)
        .unwrap();
    // Nothing says yet what belongs to it.
    for (method, path) in [("GET", &blob), ("HEAD", &blob), ("GET", &index)] {
        let (status, headers, _) = registry.ask(method, path, "").await;
        assert_eq!(
            (status, &headers["tote-in-flight"]),
            (StatusCode::SERVICE_UNAVAILABLE, &"0/0".parse().unwrap())
        );
    }
    let (status, headers, _) = registry.ask_as(Some(Role::Node("other".into())), "GET", &blob, "").await;
    assert_eq!((status, headers.get("tote-in-flight")), (StatusCode::FORBIDDEN, None));
    // Once it is there it is given, by the same grant, and what does not belong to it is not.
    let progress = tokio::sync::watch::Sender::new(State::default());
    let brings = underway.begin(root, progress.subscribe());
    progress.send_modify(|state| (state.progress.transferred, state.progress.total) = (3, 10));
    brings.learn([layer]);
    brings.learnt_all();
    let (_, headers, _) = registry.ask("GET", &blob, "").await;
    assert_eq!(headers["tote-in-flight"], "3/10");
    // Nobody waits for what this node does without.
    brings.spare([layer.clone()]);
    let (status, headers, _) = registry.ask("GET", &blob, "").await;
    assert_eq!((status, headers.get("tote-in-flight")), (StatusCode::NOT_FOUND, None));
    brings.spare([]);
    let stranger = format!("/v2/a/b/blobs/{}", Digest::sha256(b"stranger"));
    assert_eq!(registry.ask("GET", &stranger, "").await.0, StatusCode::FORBIDDEN);
    let (status, headers, body) = {
        registry.fake.put(&image.bytes[layer], [].into());
        registry.ask("GET", &blob, "").await
    };
    assert_eq!((status, headers.get("tote-in-flight"), &body), (StatusCode::OK, None, &image.bytes[layer]));
    // The transfer ends: what has not come does not.
    drop(brings);
    assert_eq!(registry.ask("GET", &index, "").await.0, StatusCode::NOT_FOUND);
    assert_eq!(registry.ask("GET", &blob, "").await.0, StatusCode::OK);
    assert!(registry.grants.revoke(&id, Instant::now()));
    assert_eq!(registry.ask("GET", &blob, "").await.0, StatusCode::FORBIDDEN);
}
