//! A registry of whatever bytes it is given, for images that no real one would take; and one that speaks TLS with a bad
//! certificate.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use rcgen::{CertificateParams, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;
use tote_e2e::images::{OCI_CONFIG, OCI_MANIFEST, Platform};
use tote_image::Digest;

type Blobs = Arc<Mutex<BTreeMap<String, (String, Vec<u8>)>>>;

/// It ends when dropped.
pub struct Shelf {
    blobs: Blobs,
    address: SocketAddr,
    runtime: Runtime,
}

/// What an image of one layer says of it, true or not.
pub struct Claim<'a> {
    pub layer: &'a [u8],
    pub media_type: &'a str,
    pub size: usize,
    pub diff_id: String,
}

impl Shelf {
    pub fn start() -> Self {
        let runtime = Runtime::new().unwrap();
        let blobs = Blobs::default();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let app = axum::Router::new().fallback(axum::routing::any(|| async { StatusCode::NOT_FOUND }));
        let app =
            app.route("/v2/{repository}/{kind}/{name}", axum::routing::get(answer)).with_state(blobs.clone());
        runtime.spawn(async move { axum::serve(listener, app).await });
        Self { blobs, address, runtime }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    fn put(&self, name: &str, media_type: &str, bytes: &[u8]) {
        self.blobs.lock().unwrap().insert(name.to_owned(), (media_type.to_owned(), bytes.to_owned()));
    }

    fn put_json(&self, media_type: &str, document: &Value) -> Value {
        let bytes = serde_json::to_vec(document).unwrap();
        let digest = digest(&bytes);
        self.put(&digest, media_type, &bytes);
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    }

    /// Puts an image of one layer there under a tag; returns its reference.
    pub fn image(&self, tag: &str, claim: &Claim) -> String {
        let digest = digest(claim.layer);
        self.put(&digest, "application/octet-stream", claim.layer);
        let platform = Platform::host();
        let config = json!({
            "architecture": platform.architecture, "os": platform.os, "config": {},
            "rootfs": {"type": "layers", "diff_ids": [claim.diff_id]},
        });
        let manifest = json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": self.put_json(OCI_CONFIG, &config),
            "layers": [{"mediaType": claim.media_type, "digest": digest, "size": claim.size}],
        });
        self.document(tag, OCI_MANIFEST, &manifest)
    }

    /// Puts a manifest there under a tag; returns its reference.
    pub fn document(&self, tag: &str, media_type: &str, document: &Value) -> String {
        self.put_json(media_type, document);
        self.put(tag, media_type, &serde_json::to_vec(document).unwrap());
        format!("{}/shelf:{tag}", self.address)
    }

    /// Serves TLS with this certificate on a port of its own, and nothing behind it; returns where, and the
    /// certificate.
    pub fn tls(&self, params: &CertificateParams) -> (SocketAddr, String) {
        let key = KeyPair::generate().unwrap();
        let certificate = params.clone().self_signed(&key).unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = self.runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        self.runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // The client does not get further than this.
                drop(acceptor.accept(stream).await);
            }
        });
        (address, certificate.pem())
    }
}

async fn answer(State(blobs): State<Blobs>, Path((_, _, name)): Path<(String, String, String)>) -> Response {
    let found = blobs.lock().unwrap().get(&name).cloned();
    let Some((media_type, bytes)) = found else { return StatusCode::NOT_FOUND.into_response() };
    let headers = [(header::CONTENT_TYPE, media_type), (DIGEST, digest(&bytes))];
    (headers, bytes).into_response()
}

const DIGEST: header::HeaderName = header::HeaderName::from_static("docker-content-digest");

/// `sha256:<hex>` of the bytes.
pub fn digest(bytes: &[u8]) -> String {
    Digest::sha256(bytes).to_string()
}
