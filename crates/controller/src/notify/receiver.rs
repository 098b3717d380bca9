//! Where notifications go, and one attempt to send one. Knows no queue and no second attempt.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use pem::Pem;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use reqwest::{Client, StatusCode, Url, redirect};
use rustls::crypto::ring;
use rustls::{ClientConfig, RootCertStore};
use thiserror::Error;
use tokio::io::AsyncReadExt as _;

use super::Notification;

/// The longest secret that is read.
const MAX_SECRET: u64 = 16 << 10;

/// Why there is nowhere to send to.
#[derive(Debug, Error)]
pub enum ReceiverError {
    /// Not a URL to POST to. The URL itself is not repeated: many a webhook's path is its secret.
    #[error("--notify-url: {0}")]
    Url(String),
    /// Not the name of a header.
    #[error("--notify-header-name {0}: not a name that a header can have, such as Authorization")]
    HeaderName(String),
    /// No secret in its file.
    #[error("--notify-header-file {path}: {error}", path = .0.display(), error = .1)]
    HeaderFile(PathBuf, SecretError),
    /// No certificates in the file.
    #[error("--notify-ca-file {path}: {error}", path = .0.display(), error = .1)]
    CaFile(PathBuf, String),
    /// No client can be made.
    #[error("notifications: {0}")]
    Client(String),
}

/// Why a file holds no secret.
#[derive(Debug, Error)]
pub enum SecretError {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Read(#[from] std::io::Error),
    /// Nothing is in it.
    #[error("is empty")]
    Empty,
    /// It is too long.
    #[error("is longer than {MAX_SECRET} bytes")]
    TooLong,
    /// It holds bytes that no header may.
    #[error("holds bytes that the value of a header cannot have")]
    Bytes,
}

/// A header whose value is a secret.
#[derive(Clone, Debug)]
pub struct Header {
    /// Its name, such as `Authorization`.
    pub name: String,
    /// A file with its value. Read anew for every request, so that a new secret needs no restart.
    pub file: PathBuf,
}

/// What came of an attempt that failed.
#[derive(Debug, Error)]
#[error("{message}")]
pub(super) struct Refused {
    /// For a person; holds neither secret nor URL.
    pub(super) message: String,
    /// Whether another attempt may succeed.
    pub(super) retryable: bool,
    /// What the receiver asked for.
    pub(super) retry_after: Option<Duration>,
}

impl Refused {
    pub(super) fn for_now(message: impl fmt::Display) -> Self {
        Self { message: message.to_string(), retryable: true, retry_after: None }
    }
}

/// A place that takes notifications.
pub struct Receiver {
    client: Client,
    url: Url,
    header: Option<(HeaderName, PathBuf)>,
}

impl fmt::Debug for Receiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Receiver").field(&self.origin()).finish()
    }
}

impl Receiver {
    /// A receiver that can be sent to: what it is reached by has been read and understood. Certificates are those of the
    /// public authorities and those in `ca_file`, which is read now and not again.
    pub async fn new(
        url: &str,
        header: Option<Header>,
        ca_file: Option<&Path>,
    ) -> Result<Self, ReceiverError> {
        let url = checked(url).map_err(ReceiverError::Url)?;
        let header = match header {
            None => None,
            Some(Header { name, file }) => {
                let parsed =
                    HeaderName::from_bytes(name.as_bytes()).map_err(|_| ReceiverError::HeaderName(name))?;
                if let Err(error) = secret(&file).await {
                    return Err(ReceiverError::HeaderFile(file, error));
                }
                Some((parsed, file))
            }
        };
        let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        if let Some(file) = ca_file {
            add(&mut roots, file).await.map_err(|error| ReceiverError::CaFile(file.to_owned(), error))?;
        }
        let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| ReceiverError::Client(error.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let client = Client::builder()
            .tls_backend_preconfigured(tls)
            .redirect(redirect::Policy::none()) // The secret would go along.
            .retry(reqwest::retry::never())
            .no_proxy()
            .user_agent(concat!("tote/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| ReceiverError::Client(error.to_string()))?;
        Ok(Self { client, url, header })
    }

    /// `https://host:port`, without what may be secret.
    pub fn origin(&self) -> String {
        self.url.origin().ascii_serialization()
    }

    /// One attempt. Has no deadline of its own.
    pub(super) async fn post(&self, notification: &Notification) -> Result<(), Refused> {
        let body = notification.json().map_err(|error| Refused {
            message: error.to_string(),
            retryable: false,
            retry_after: None,
        })?;
        let mut request =
            self.client.post(self.url.clone()).body(body).header(CONTENT_TYPE, "application/json");
        if let Some((name, file)) = &self.header {
            let value = secret(file).await;
            let value = value.map_err(|error| Refused::for_now(format!("{}: {error}", file.display())))?;
            request = request.header(name.clone(), value);
        }
        let answer = request.send().await.map_err(|error| Refused::for_now(causes(&error.without_url())))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(());
        }
        let retryable = status.is_server_error()
            || [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS].contains(&status);
        let hint = if status.is_redirection() { "; redirects are not followed" } else { "" };
        Err(Refused {
            message: format!("the receiver answers {status}{hint}"),
            retryable,
            retry_after: retry_after(answer.headers(), Timestamp::now()),
        })
    }
}

fn checked(text: &str) -> Result<Url, String> {
    let url =
        Url::parse(text).map_err(|error| format!("not a URL ({error}); one reads https://host/path"))?;
    if !matches!(url.scheme(), "https" | "http") {
        return Err(format!("begins with {}:, must begin with https: or http:", url.scheme()));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(
            "has a user or password in it, where all can read it: use --notify-header-file".to_owned()
        );
    }
    Ok(url)
}

/// The secret in a file, without the line's end that editors leave; never shown in a log.
async fn secret(file: &Path) -> Result<HeaderValue, SecretError> {
    let mut bytes = Vec::new();
    tokio::fs::File::open(file).await?.take(MAX_SECRET + 1).read_to_end(&mut bytes).await?;
    if bytes.len() as u64 > MAX_SECRET {
        return Err(SecretError::TooLong);
    }
    let trimmed = bytes.trim_ascii();
    if trimmed.is_empty() {
        return Err(SecretError::Empty);
    }
    let mut value = HeaderValue::from_bytes(trimmed).map_err(|_| SecretError::Bytes)?;
    value.set_sensitive(true);
    Ok(value)
}

async fn add(roots: &mut RootCertStore, file: &Path) -> Result<(), String> {
    let text = tokio::fs::read(file).await.map_err(|error| format!("cannot be read: {error}"))?;
    let found = pem::parse_many(text).map_err(|error| error.to_string())?;
    let certificates: Vec<Pem> = found.into_iter().filter(|pem| pem.tag() == "CERTIFICATE").collect();
    if certificates.is_empty() {
        return Err("holds no certificate (PEM)".to_owned());
    }
    for certificate in certificates {
        roots.add(certificate.into_contents().into()).map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// How long the receiver asks to be left alone (RFC 9110, 10.2.3): seconds, or until a date.
fn retry_after(headers: &HeaderMap, now: Timestamp) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let at = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
    Some(Duration::try_from(at.duration_since(now)).unwrap_or_default())
}

/// An error with what caused it, which reqwest does not say by itself.
fn causes(error: &reqwest::Error) -> String {
    let error: &dyn std::error::Error = error;
    let chain = std::iter::successors(Some(error), |error| error.source());
    chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_one_to_post_to_and_holds_no_password() {
        for (url, says) in [
            ("hooks.test/x", "not a URL"),
            ("/x", "not a URL"),
            ("ftp://hooks.test/", "begins with ftp:"),
            ("https://", "not a URL"),
            ("https://me:key@hooks.test/", "--notify-header-file"),
            ("https://me@hooks.test/", "--notify-header-file"),
        ] {
            let error = checked(url).unwrap_err();
            assert!(error.contains(says) && !error.contains("key"), "{url}: {error}");
        }
        for url in ["https://hooks.test/a/b?c=d", "http://10.0.0.1:8080", "http://[::1]:8080/"] {
            assert!(checked(url).is_ok(), "{url}");
        }
    }

    #[test]
    fn a_receiver_may_ask_for_time_in_seconds_or_by_a_date() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        for (text, seconds) in [
            ("7", Some(7)),
            ("Thu, 01 Jan 2026 00:00:09 GMT", Some(9)),
            ("Thu, 01 Jan 2015 00:00:09 GMT", Some(0)),
            ("soon", None),
            ("-1", None),
        ] {
            let headers = [(RETRY_AFTER, HeaderValue::from_static(text))].into_iter().collect();
            assert_eq!(retry_after(&headers, now), seconds.map(Duration::from_secs), "{text}");
        }
    }
}
