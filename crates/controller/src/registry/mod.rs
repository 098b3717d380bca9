//! Asks registries what a tag means, or whether a digest is still there (OCI distribution API, bearer tokens and basic
//! authentication). Must not know pods or jobs.
//!
//! Tenants choose a reference's registry, so none is asked that the operator has not listed; and none that is listed can
//! send the controller to a node's own addresses or to a cloud's metadata. A credential goes to the registry that its pull
//! secret names and, as with containerd, to the token server that this registry names.
//!
//! On reqwest, with the rustls provider of the rest. `oci-client` follows redirects and realms wherever they lead, bounds no body,
//! and keeps tokens by repository, whoever they were given to.

mod ask;
mod cache;
mod challenge;
mod credentials;
mod hosts;
#[cfg(test)]
mod tests;

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use thiserror::Error;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tote_image::{Digest, Reference};

pub use credentials::{Credential, Format, Keyring, SecretError};
pub use hosts::{HostError, HostPattern};

use cache::Cache;

/// Look-ups at once, over all registries.
const AT_ONCE: usize = 8;

/// Answers kept.
const CACHED: usize = 1024;

/// The most credentials tried for one look-up.
const TRIES: usize = 4;

/// What the operator's flags set.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// The registries that may be asked.
    pub hosts: Vec<HostPattern>,
    /// Those of them that are spoken to by plain HTTP.
    pub insecure: Vec<HostPattern>,
    /// How long one look-up may take in all.
    pub timeout: Duration,
    /// Certificate authorities (PEM) to trust beside the public ones.
    pub ca_pem: Option<Vec<u8>>,
}

/// Why there is nothing to look up with.
#[derive(Debug, Error)]
pub enum SettingsError {
    /// The file of authorities.
    #[error("the certificate authorities: {0}")]
    Authorities(String),
    /// TLS or HTTP.
    #[error("cannot set up a client: {0}")]
    Client(String),
}

/// Why a registry gave no digest.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum LookupError {
    /// The operator has not listed it: it was not asked.
    #[error("registry {0} is not among those that may be asked")]
    NotListed(String),
    /// It does not have the repository, tag or digest.
    #[error("registry {0} has no such image")]
    NotFound(String),
    /// It, or its token server, wants another proof of who asks (401).
    #[error("{0} wants credentials that are not there, or refuses those that are")]
    Unauthorized(String),
    /// Who asks may not have it (403).
    #[error("{0} denies access")]
    Denied(String),
    /// Too many asked (429).
    #[error("{0} answers that it was asked too often")]
    RateLimited(String),
    /// It cannot be reached, or has a fault of its own.
    #[error("{host} cannot be asked: {what}")]
    Unavailable {
        /// Who.
        host: String,
        /// What happened.
        what: String,
    },
    /// It took too long.
    #[error("registry {0} did not answer within {1:?}")]
    Timeout(String, Duration),
    /// It answered, and not as a registry does.
    #[error("{host} gives an answer that is of no use: {what}")]
    Invalid {
        /// Who.
        host: String,
        /// What is wrong with it.
        what: String,
    },
}

impl LookupError {
    /// A word for a metric.
    pub fn label(&self) -> &'static str {
        match self {
            Self::NotListed(_) => "not_listed",
            Self::NotFound(_) => "not_found",
            Self::Unauthorized(_) => "unauthorized",
            Self::Denied(_) => "denied",
            Self::RateLimited(_) => "rate_limited",
            Self::Unavailable { .. } => "unavailable",
            Self::Timeout(..) => "timeout",
            Self::Invalid { .. } => "invalid",
        }
    }
}

/// Whose answer it is, too: what one may see another may not.
type Key = (Reference, Vec<Credential>);

/// Looks up digests.
pub struct Lookup {
    settings: Settings,
    client: reqwest::Client,
    at_once: Semaphore,
    cache: Mutex<Cache<Key, Digest, LookupError>>,
}

impl fmt::Debug for Lookup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lookup").field("hosts", &self.settings.hosts).finish_non_exhaustive()
    }
}

impl Lookup {
    /// With the public certificate authorities (those of webpki-roots, for a container has none) and the given ones.
    pub fn new(settings: Settings) -> Result<Self, SettingsError> {
        let mut roots = rustls::RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        if let Some(pem) = &settings.ca_pem {
            let wrong = |error: &dyn fmt::Display| SettingsError::Authorities(error.to_string());
            let mut any = false;
            for certificate in CertificateDer::pem_slice_iter(pem) {
                roots.add(certificate.map_err(|error| wrong(&error))?).map_err(|error| wrong(&error))?;
                any = true;
            }
            if !any {
                return Err(wrong(&"there is no certificate in it (PEM)"));
            }
        }
        let tls =
            rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .map_err(|error| SettingsError::Client(error.to_string()))?
                .with_root_certificates(roots)
                .with_no_client_auth();
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .dns_resolver(Resolver)
            .redirect(redirect::Policy::none())
            .no_proxy()
            .pool_max_idle_per_host(1)
            .pool_idle_timeout(Duration::from_secs(30))
            .user_agent(concat!("tote/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| SettingsError::Client(error.to_string()))?;
        let cache = Mutex::new(Cache::new(CACHED));
        Ok(Self { settings, client, at_once: Semaphore::new(AT_ONCE), cache })
    }

    /// Whether a reference's registry may be asked.
    pub fn is_listed(&self, reference: &Reference) -> bool {
        self.settings.hosts.iter().any(|pattern| pattern.matches(reference.registry()))
    }

    /// The digest that the registry has for a reference, or its own if it is one by digest that the registry still has.
    ///
    /// Credentials are tried in their order, as kubelet does; without any it is asked as anybody may.
    pub async fn digest(
        &self,
        reference: &Reference,
        credentials: &[Credential],
    ) -> Result<Digest, LookupError> {
        let host = reference.registry();
        if !self.is_listed(reference) {
            return Err(LookupError::NotListed(host.to_owned()));
        }
        let credentials = &credentials[..credentials.len().min(TRIES)];
        let key = (reference.clone(), credentials.to_vec());
        if let Some(answer) = self.cached().get(&key, Timestamp::now()) {
            return answer;
        }
        let answer = {
            // The deadline begins with the look-up itself: how many wait is bounded by who asks.
            let _permit = self.at_once.acquire().await;
            let life = self.settings.timeout;
            timeout(life, self.try_each(reference, credentials))
                .await
                .unwrap_or_else(|_| Err(LookupError::Timeout(host.to_owned(), life)))
        };
        self.cached().put(key, answer.clone(), Timestamp::now());
        answer
    }

    async fn try_each(
        &self,
        reference: &Reference,
        credentials: &[Credential],
    ) -> Result<Digest, LookupError> {
        let plain = self.settings.insecure.iter().any(|pattern| pattern.matches(reference.registry()));
        let asking = ask::Asking { client: &self.client, reference, plain };
        let mut tries = credentials.iter();
        let mut answer = asking.digest(tries.next()).await;
        for credential in tries {
            if !matches!(
                answer,
                Err(LookupError::Unauthorized(_) | LookupError::Denied(_) | LookupError::NotFound(_))
            ) {
                break;
            }
            answer = asking.digest(Some(credential)).await;
        }
        answer
    }

    fn cached(&self) -> std::sync::MutexGuard<'_, Cache<Key, Digest, LookupError>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The system's resolver, without addresses that no registry has.
struct Resolver;

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let good: Vec<SocketAddr> = found.filter(|address| !hosts::is_forbidden(address.ip())).collect();
            if good.is_empty() {
                return Err(format!("{} has no address that a registry may have", name.as_str()).into());
            }
            let good: Addrs = Box::new(good.into_iter());
            Ok(good)
        })
    }
}
