//! Credentials out of pull secrets, found for an image as kubelet finds them (`pkg/credentialprovider/keyring.go`). Pure.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use thiserror::Error;
use tote_image::Reference;
use wildmatch::WildMatch;

/// The key that stands for Docker Hub where nothing else does.
const DOCKER_KEY: &str = "index.docker.io";

/// What proves who asks. Never shown.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Credential {
    /// A name and a password.
    Password {
        /// Name.
        username: String,
        /// Password.
        password: String,
    },
    /// A refresh token for the registry's token server.
    IdentityToken(String),
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Password { username, .. } => write!(f, "password of {username:?}"),
            Self::IdentityToken(_) => f.write_str("identity token"),
        }
    }
}

/// The two types of pull secrets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `kubernetes.io/dockerconfigjson`: entries below `auths`.
    ConfigJson,
    /// `kubernetes.io/dockercfg`: the entries alone.
    Cfg,
}

impl Format {
    /// The format of a Secret's `type`, and the key of its data that holds it; `None` for one that is no pull secret.
    pub fn of_type(type_: &str) -> Option<(Self, &'static str)> {
        match type_ {
            "kubernetes.io/dockerconfigjson" => Some((Self::ConfigJson, ".dockerconfigjson")),
            "kubernetes.io/dockercfg" => Some((Self::Cfg, ".dockercfg")),
            _ => None,
        }
    }
}

/// Why a pull secret is of no use. Says nothing of what it holds.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SecretError {
    /// No JSON, or not of the form.
    #[error("it is not the JSON that a pull secret holds")]
    Form,
    /// `auth` is not base64 of `name:password`.
    #[error("auths[{0:?}].auth is not base64 of name:password")]
    Auth(String),
    /// Larger than any that is meant for registries: whoever makes Secrets is not trusted.
    #[error(
        "it is too large: {MAX_DATA} bytes in all, {MAX_KEY} for where a credential is for, {MAX_SECRET} for a password"
    )]
    TooLarge,
}

/// The most bytes of a pull secret, of one place it is for, and of one name or password.
const MAX_DATA: usize = 64 << 10;
const MAX_KEY: usize = 512;
const MAX_SECRET: usize = 8 << 10;

#[derive(Deserialize)]
struct ConfigJson {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    auth: String,
    #[serde(default)]
    identitytoken: String,
}

impl Entry {
    fn credential(self) -> Result<Option<Credential>, ()> {
        if !self.identitytoken.is_empty() {
            return Ok(Some(Credential::IdentityToken(self.identitytoken)));
        }
        let (username, password) = if self.auth.is_empty() {
            (self.username, self.password)
        } else {
            let text = STANDARD.decode(&self.auth).map_err(drop)?;
            let text = String::from_utf8(text).map_err(drop)?;
            let (username, password) = text.split_once(':').ok_or(())?;
            // Docker pads what it writes with NUL.
            (username.to_owned(), password.trim_matches('\0').to_owned())
        };
        Ok((!username.is_empty()).then_some(Credential::Password { username, password }))
    }
}

/// The credentials of some pull secrets, by where they are meant for.
#[derive(Default)]
pub struct Keyring(BTreeMap<String, Vec<Credential>>);

impl Keyring {
    /// Takes in what a Secret holds; nothing of it if there is something wrong with it.
    pub fn add(&mut self, format: Format, data: &[u8]) -> Result<(), SecretError> {
        if data.len() > MAX_DATA {
            return Err(SecretError::TooLarge);
        }
        let entries = match format {
            Format::ConfigJson => serde_json::from_slice(data).map(|config: ConfigJson| config.auths),
            Format::Cfg => serde_json::from_slice(data),
        };
        let mut found = Vec::new();
        for (key, entry) in entries.map_err(|_| SecretError::Form)? {
            let parts = [&entry.username, &entry.password, &entry.auth, &entry.identitytoken];
            if key.len() > MAX_KEY || parts.iter().any(|part| part.len() > MAX_SECRET) {
                return Err(SecretError::TooLarge);
            }
            let credential = entry.credential().map_err(|()| SecretError::Auth(key.clone()))?;
            found.extend(credential.map(|credential| (place(&key), credential)));
        }
        for (place, credential) in found {
            let known = self.0.entry(place).or_default();
            if !known.contains(&credential) {
                known.push(credential);
            }
        }
        Ok(())
    }

    /// Those for an image, the most specific first.
    pub fn find(&self, reference: &Reference) -> Vec<Credential> {
        let repository = reference.repository();
        // Reversed, the longer of two places where one begins with the other comes first.
        let meant = self.0.iter().rev().filter(|(place, _)| covers(place, repository));
        let found: Vec<_> = meant.flat_map(|(_, credentials)| credentials.clone()).collect();
        if found.is_empty() && reference.registry() == "docker.io" {
            return self.0.get(DOCKER_KEY).cloned().unwrap_or_default();
        }
        found
    }
}

/// A key of `auths` as host and path: without scheme, `/v1/` and `/v2/`.
fn place(key: &str) -> String {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let (host, path) = key.find('/').map_or((key, ""), |at| key.split_at(at));
    let versioned = path.strip_prefix("/v1").or_else(|| path.strip_prefix("/v2"));
    let path = versioned.filter(|rest| rest.starts_with('/')).unwrap_or(path);
    format!("{host}{}", if path == "/" { "" } else { path })
}

/// Whether a place is meant for a repository: the same port, as many labels, each as the place has it or by its wildcards,
/// and a path that begins with the place's.
fn covers(place: &str, repository: &str) -> bool {
    let split = |s: &str| -> (String, String) {
        let (host, path) = s.find('/').map_or((s, ""), |at| s.split_at(at));
        (host.to_ascii_lowercase(), path.to_owned())
    };
    let ((pattern, prefix), (host, path)) = (split(place), split(repository));
    if !path.starts_with(&prefix) {
        return false;
    }
    let (pattern, port) = port(&pattern);
    let (host, own_port) = self::port(&host);
    let (patterns, labels) = (pattern.split('.'), host.split('.'));
    port == own_port
        && patterns.clone().count() == labels.clone().count()
        && patterns.zip(labels).all(|(pattern, label)| WildMatch::new(pattern).matches(label))
}

fn port(host: &str) -> (&str, &str) {
    host.rsplit_once(':').filter(|(_, port)| !port.contains(']')).unwrap_or((host, ""))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// An entry whose password is `p` and whose name says where it is meant for.
    fn keyring(places: &[&str]) -> Keyring {
        let entry = |place: &str| (place.to_owned(), json!({"username": place, "password": "p"}));
        let auths: serde_json::Map<_, _> = places.iter().map(|place| entry(place)).collect();
        let mut keyring = Keyring::default();
        keyring.add(Format::ConfigJson, json!({"auths": auths}).to_string().as_bytes()).unwrap();
        keyring
    }

    fn names(keyring: &Keyring, image: &str) -> Vec<String> {
        let name = |credential| match credential {
            Credential::Password { username, .. } => username,
            Credential::IdentityToken(token) => token,
        };
        keyring.find(&image.parse().unwrap()).into_iter().map(name).collect()
    }

    #[test]
    fn a_place_is_matched_as_kubelet_matches_it() {
        for (place, image, meant) in [
            ("r.test", "r.test/a/b:1", true),
            ("https://r.test", "r.test/a/b:1", true),
            ("http://r.test/", "r.test/a/b:1", true),
            ("https://r.test/v1/", "r.test/a/b:1", true),
            ("https://r.test/v2/", "r.test/a/b:1", true),
            ("https://r.test/v2/a", "r.test/a/b:1", true),
            ("r.test/v1beta", "r.test/a/b:1", false),
            ("r.test/a", "r.test/a/b:1", true),
            ("r.test/c", "r.test/a/b:1", false),
            ("r.test:5000", "r.test/a/b:1", false),
            ("r.test", "r.test:5000/a/b:1", false),
            ("r.test:5000", "r.test:5000/a/b:1", true),
            ("*.r.test", "eu.r.test/a:1", true),
            ("*.r.test/a", "eu.r.test/a:1", true),
            ("*.r.test", "r.test/a:1", false),
            ("*.r.test", "x.eu.r.test/a:1", false),
            ("*.*.r.test", "x.eu.r.test/a:1", true),
            ("re*-east.r.test", "region-east.r.test/a:1", true),
            ("r?.r.test", "r1.r.test/a:1", true),
            ("r?.r.test", "r12.r.test/a:1", false),
            ("other.test", "r.test/a:1", false),
            ("https://index.docker.io/v1/", "nginx", true),
            ("index.docker.io", "a/b:1", true),
            ("docker.io", "nginx", true),
            ("docker.io/library", "nginx", true),
            ("docker.io/other", "nginx", false),
            ("https://index.docker.io/v1/", "r.test/nginx", false),
        ] {
            let found = names(&keyring(&[place]), image);
            assert_eq!(!found.is_empty(), meant, "{place} {image}: {found:?}");
        }
    }

    #[test]
    fn the_most_specific_comes_first() {
        let all = keyring(&["r.test", "r.test/a/b", "r.test/a", "*.test", "index.docker.io", "docker.io/a"]);
        assert_eq!(names(&all, "r.test/a/b:1"), ["r.test/a/b", "r.test/a", "r.test", "*.test"]);
        assert_eq!(names(&all, "a/x"), ["docker.io/a"], "the default is for what nothing else covers");
        assert_eq!(names(&all, "b/x"), ["index.docker.io"]);
    }

    #[test]
    fn every_form_of_an_entry_is_read() {
        let password = |username: &str, password: &str| Credential::Password {
            username: username.to_owned(),
            password: password.to_owned(),
        };
        for (entry, expected) in [
            (json!({"username": "u", "password": "p"}), vec![password("u", "p")]),
            (json!({"auth": STANDARD.encode("u:p:q")}), vec![password("u", "p:q")]),
            (json!({"auth": STANDARD.encode("u:p\0")}), vec![password("u", "p")]),
            (
                json!({"username": "x", "password": "y", "auth": STANDARD.encode("u:p"), "email": "e"}),
                vec![password("u", "p")],
            ),
            (
                json!({"auth": STANDARD.encode("u:"), "identitytoken": "t"}),
                vec![Credential::IdentityToken("t".to_owned())],
            ),
            (json!({}), vec![]),
        ] {
            let entries = json!({"r.test": entry});
            for (format, data) in
                [(Format::Cfg, entries.clone()), (Format::ConfigJson, json!({"auths": entries}))]
            {
                let mut keyring = Keyring::default();
                keyring.add(format, data.to_string().as_bytes()).unwrap();
                assert_eq!(keyring.find(&"r.test/x".parse().unwrap()), expected, "{data}");
            }
        }
    }

    #[test]
    fn what_is_wrong_is_said_without_what_it_holds() {
        for data in [
            r#"{"auths": {"r.test": {"auth": "c2VjcmV0"}}}"#,
            r#"{"auths": {"r.test": {"auth": "secret!"}}}"#,
            r#"{"auths": {"r.test": {"password": ["secret"]}}}"#,
            "secret",
        ] {
            let error = Keyring::default().add(Format::ConfigJson, data.as_bytes()).unwrap_err().to_string();
            assert!(!error.contains("ecret") || error.contains("pull secret"), "{error}");
        }
        let one = Credential::Password { username: "u".into(), password: "hidden".into() };
        let shown = format!("{one:?} {:?}", Credential::IdentityToken("hidden".into()));
        assert_eq!(shown, "password of \"u\" identity token");
        assert_eq!(Format::of_type("Opaque"), None);
    }

    #[test]
    fn a_key_or_a_secret_that_is_made_to_hurt_is_refused() {
        let with = |key: &str, password: &str| {
            let text = json!({"auths": {key: {"username": "u", "password": password}}}).to_string();
            let mut keyring = Keyring::default();
            keyring.add(Format::ConfigJson, text.as_bytes()).map(|()| keyring)
        };
        for (key, password) in [("*".repeat(513), "p".to_owned()), ("r.test".into(), "p".repeat(9000))] {
            assert_eq!(with(&key, &password).err(), Some(SecretError::TooLarge));
        }
        assert_eq!(with("r.test", &"p".repeat(1 << 17)).err(), Some(SecretError::TooLarge));
        let stars = with(&format!("{}b", "*a".repeat(200)), "p").unwrap();
        let image: Reference = format!("{}:5000/x", "a".repeat(200)).parse().unwrap();
        assert!(stars.find(&image).is_empty(), "and this ends");
    }
}
