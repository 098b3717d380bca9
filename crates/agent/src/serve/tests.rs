//! The distribution API over the fake containerd, as an HTTP client sees it.

use http::{Request, StatusCode};
use http_body_util::BodyExt;
use tower::ServiceExt;

use super::*;
use crate::containerd::Fake;
use crate::testing::{Blobs, tar};

struct Registry {
    router: Router,
    image: Blobs,
}

impl Registry {
    fn new() -> Self {
        let fake = Fake::default();
        let image = Blobs::image(&[tar(&[("a", b"some bytes")])]).indexed();
        image.pull_into(&fake, "registry.test/a/b:1");
        let served = Served { containerd: Arc::new(fake), metrics: Arc::default() };
        Self { router: router(served), image }
    }

    async fn ask(&self, method: &str, path: &str, range: &str) -> (StatusCode, HeaderMap, Vec<u8>) {
        let mut request = Request::builder().method(method).uri(path);
        if !range.is_empty() {
            request = request.header("range", range);
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
    for (method, path, status, code) in [
        ("GET", format!("/v2/a/blobs/{absent}"), 404, "BLOB_UNKNOWN"),
        ("GET", format!("/v2/a/manifests/{absent}"), 404, "MANIFEST_UNKNOWN"),
        ("GET", format!("/v2/a/manifests/{layer}"), 404, "MANIFEST_UNKNOWN"),
        ("GET", "/v2/a/b/manifests/1".to_owned(), 404, "MANIFEST_UNKNOWN"),
        ("GET", "/v2/a/b/manifests/2?ns=registry.test".to_owned(), 404, "MANIFEST_UNKNOWN"),
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
