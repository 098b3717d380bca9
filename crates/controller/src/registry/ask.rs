//! One look-up on the wire: HEAD, a proof if one is asked for, GET where HEAD does not tell. Its deadline is the caller's.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_LENGTH, HeaderValue, LOCATION, WWW_AUTHENTICATE};
use reqwest::{Client, Method, Response, StatusCode, Url};
use serde::Deserialize;
use tote_image::{Digest, Reference};

use super::challenge::{Challenge, challenge};
use super::hosts::{endpoint, origin, sent_on};
use super::{Credential, LookupError};

/// The most bytes of a manifest or index (what the distribution specification has registries take at least).
const MANIFEST: usize = 4 << 20;

/// The most bytes of a token server's answer.
const TOKEN: usize = 64 << 10;

/// Redirects followed.
const REDIRECTS: usize = 3;

/// What a tag may stand for.
const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// Header of the digest (OCI distribution specification, "Checking if content exists in the registry").
const DIGEST: &str = "Docker-Content-Digest";

/// A reference, and how to ask for it.
pub(super) struct Asking<'a> {
    pub(super) client: &'a Client,
    pub(super) reference: &'a Reference,
    /// By plain HTTP.
    pub(super) plain: bool,
}

/// An answer, and whose it is.
struct Answer {
    response: Response,
    host: String,
}

impl Asking<'_> {
    /// Asks with one credential, or as anybody may.
    pub(super) async fn digest(&self, credential: Option<&Credential>) -> Result<Digest, LookupError> {
        let url = self.url()?;
        let mut proof = None;
        let mut head = self.send(Method::HEAD, &url, None).await?;
        if head.response.status() == StatusCode::UNAUTHORIZED {
            proof = Some(self.proof(&url, &head, credential).await?);
            head = self.send(Method::HEAD, &url, proof.as_ref()).await?;
        }
        let does_not_tell = matches!(
            head.response.status(),
            StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED | StatusCode::BAD_REQUEST
        );
        if !does_not_tell {
            refusal(&head)?;
            if let Some(digest) = head.response.headers().get(DIGEST) {
                let digest = digest.to_str().ok().and_then(|digest| digest.parse().ok());
                return self.check(digest, &head.host, "its header is no digest");
            }
        }
        let get = self.send(Method::GET, &url, proof.as_ref()).await?;
        refusal(&get)?;
        let host = get.host.clone();
        let body = body(get, MANIFEST).await?;
        let digest = match self.reference.digest() {
            Some(digest) => digest.matches(&body).then(|| digest.clone()),
            None => Some(Digest::sha256(&body)),
        };
        self.check(digest, &host, "its manifest has another digest")
    }

    fn check(&self, digest: Option<Digest>, host: &str, what: &str) -> Result<Digest, LookupError> {
        let asked = self.reference.digest();
        let invalid = |what: &str| LookupError::Invalid { host: host.to_owned(), what: what.to_owned() };
        let digest = digest.ok_or_else(|| invalid(what))?;
        if asked.is_some_and(|asked| *asked != digest) {
            return Err(invalid(&format!("it has {digest} in the place of the digest asked for")));
        }
        Ok(digest)
    }

    fn url(&self) -> Result<Url, LookupError> {
        let registry = self.reference.registry();
        let path = self.reference.repository().split_once('/').map_or("", |(_, path)| path);
        let version = self.reference.tag().or(self.reference.digest().map(AsRef::as_ref)).unwrap_or_default();
        let scheme = if self.plain { "http" } else { "https" };
        Url::parse(&format!("{scheme}://{}/v2/{path}/manifests/{version}", endpoint(registry)))
            .map_err(|error| unavailable(registry, &error))
    }

    /// Sends one request, and follows redirects; a proof stays with the registry.
    async fn send(
        &self,
        method: Method,
        url: &Url,
        proof: Option<&HeaderValue>,
    ) -> Result<Answer, LookupError> {
        let mut at = url.clone();
        for _ in 0..=REDIRECTS {
            let mut request = self.client.request(method.clone(), at.clone()).header(ACCEPT, MANIFEST_TYPES);
            if let Some(proof) = proof.filter(|_| at.origin() == url.origin()) {
                request = request.header(AUTHORIZATION, proof);
            }
            let host = host(&at);
            let response = request.send().await.map_err(|error| unavailable(&host, &error.without_url()))?;
            let location = response.headers().get(LOCATION).filter(|_| response.status().is_redirection());
            let Some(location) = location else { return Ok(Answer { response, host }) };
            let next = location.to_str().ok().and_then(|location| at.join(location).ok());
            let next = next.ok_or_else(|| invalid(&host, "its redirect leads nowhere"))?;
            sent_on(&at, &next).map_err(|what| invalid(&host, &what))?;
            at = next;
        }
        Err(invalid(&host(url), &format!("it redirects more than {REDIRECTS} times")))
    }

    /// What the registry asks for, got with the credential.
    async fn proof(
        &self,
        url: &Url,
        answer: &Answer,
        credential: Option<&Credential>,
    ) -> Result<HeaderValue, LookupError> {
        let unauthorized = || LookupError::Unauthorized(answer.host.clone());
        if answer.response.url().origin() != url.origin() {
            return Err(unauthorized()); // A proof does not go where a redirect leads.
        }
        let path = self.reference.repository().split_once('/').map_or("", |(_, path)| path);
        let scope = format!("repository:{path}:pull");
        let headers = answer.response.headers().get_all(WWW_AUTHENTICATE);
        match challenge(headers.iter().filter_map(|header| header.to_str().ok()), &scope) {
            Some(Challenge::Bearer(realm)) => {
                sent_on(url, &realm).map_err(|what| invalid(&answer.host, &what))?;
                let token = self.token(realm, credential).await?;
                secret(&format!("Bearer {token}")).ok_or_else(unauthorized)
            }
            Some(Challenge::Basic) => {
                let basic = credential.and_then(|credential| match credential {
                    Credential::Password { username, password } => basic(username, password),
                    Credential::IdentityToken(_) => None,
                });
                basic.ok_or_else(unauthorized)
            }
            None => Err(unauthorized()),
        }
    }

    /// A token of a token server: by GET with name and password or as anybody may, by POST for an identity token
    /// (distribution, "Token Authentication Specification" and "Oauth2 Token Authentication").
    async fn token(&self, realm: Url, credential: Option<&Credential>) -> Result<String, LookupError> {
        #[derive(Deserialize)]
        struct Given {
            #[serde(default)]
            token: String,
            #[serde(default)]
            access_token: String,
        }
        let host = host(&realm);
        let request = match credential {
            Some(Credential::IdentityToken(token)) => {
                let mut form: Vec<(String, String)> = realm.query_pairs().into_owned().collect();
                form.extend(
                    [("grant_type", "refresh_token"), ("client_id", "tote"), ("refresh_token", token)]
                        .map(|(name, value)| (name.to_owned(), value.to_owned())),
                );
                let mut bare = realm;
                bare.set_query(None);
                self.client.post(bare).form(&form)
            }
            Some(Credential::Password { username, password }) => {
                let unauthorized = || LookupError::Unauthorized(host.clone());
                let basic = basic(username, password).ok_or_else(unauthorized)?;
                self.client.get(realm).header(AUTHORIZATION, basic)
            }
            None => self.client.get(realm),
        };
        let response = request.send().await.map_err(|error| unavailable(&host, &error.without_url()))?;
        let answer = Answer { response, host: host.clone() };
        match refusal(&answer) {
            Err(LookupError::NotFound(_)) => return Err(invalid(&host, "there is no token server")),
            refused => refused?,
        }
        let body = body(answer, TOKEN).await?;
        let given: Given = serde_json::from_slice(&body).map_err(|_| invalid(&host, "it gives no token"))?;
        let token = if given.token.is_empty() { given.access_token } else { given.token };
        if token.is_empty() { Err(invalid(&host, "it gives no token")) } else { Ok(token) }
    }
}

/// What a status that is no success means.
fn refusal(answer: &Answer) -> Result<(), LookupError> {
    let host = answer.host.clone();
    match answer.response.status() {
        status if status.is_success() => Ok(()),
        StatusCode::NOT_FOUND => Err(LookupError::NotFound(host)),
        StatusCode::UNAUTHORIZED => Err(LookupError::Unauthorized(host)),
        StatusCode::FORBIDDEN => Err(LookupError::Denied(host)),
        StatusCode::TOO_MANY_REQUESTS => Err(LookupError::RateLimited(host)),
        status => Err(LookupError::Unavailable { host, what: format!("it answers {status}") }),
    }
}

/// A body of at most `most` bytes.
async fn body(mut answer: Answer, most: usize) -> Result<Vec<u8>, LookupError> {
    let too_long = || invalid(&answer.host, &format!("it is longer than {most} bytes"));
    let length = answer.response.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok());
    if length.and_then(|length| length.parse().ok()).is_some_and(|length: usize| length > most) {
        return Err(too_long());
    }
    let mut body = Vec::new();
    loop {
        match answer.response.chunk().await {
            Ok(None) => return Ok(body),
            Ok(Some(chunk)) if body.len() + chunk.len() > most => return Err(too_long()),
            Ok(Some(chunk)) => body.extend_from_slice(&chunk),
            Err(error) => return Err(unavailable(&answer.host, &error.without_url())),
        }
    }
}

fn basic(username: &str, password: &str) -> Option<HeaderValue> {
    secret(&format!("Basic {}", STANDARD.encode(format!("{username}:{password}"))))
}

/// A header's value that is not shown.
fn secret(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn host(url: &Url) -> String {
    origin(url).split_once("://").map_or_else(String::new, |(_, host)| host.to_owned())
}

fn invalid(host: &str, what: &str) -> LookupError {
    LookupError::Invalid { host: host.to_owned(), what: what.to_owned() }
}

/// With the causes, which say more than the error itself.
fn unavailable(host: &str, error: &dyn std::error::Error) -> LookupError {
    let mut what = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        what = error.to_string();
        cause = error.source();
    }
    LookupError::Unavailable { host: host.to_owned(), what }
}
