//! Paths of the distribution API. Pure.

use tote_image::Digest;

use super::answer::Refusal;

/// What a path asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// `/v2/`: whether the API is there.
    Version,
    /// `/v2/<name>/manifests/<digest or tag>`.
    Manifest(Path),
    /// `/v2/<name>/blobs/<digest>`.
    Blob(Digest),
}

/// A name and what of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Path {
    pub name: String,
    pub version: Version,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Version {
    Digest(Digest),
    Tag(String),
}

pub(super) fn parse(path: &str) -> Result<Asked, Refusal> {
    let unknown = || Refusal::NotFound(path.chars().take(300).collect());
    if path == "/v2" || path == "/v2/" {
        return Ok(Asked::Version);
    }
    let rest = path.strip_prefix("/v2/").ok_or_else(unknown)?;
    // A name may contain slashes: what is asked stands at the end.
    let (rest, last) = rest.rsplit_once('/').ok_or_else(unknown)?;
    let (name, kind) = rest.rsplit_once('/').ok_or_else(unknown)?;
    if !is_name(name) {
        return Err(Refusal::NameInvalid(name.chars().take(300).collect()));
    }
    match kind {
        "blobs" => Ok(Asked::Blob(digest(last)?)),
        "manifests" => {
            let version = if last.contains(':') {
                Version::Digest(digest(last)?)
            } else if is_tag(last) {
                Version::Tag(last.to_owned())
            } else {
                return Err(Refusal::ManifestUnknown(last.chars().take(300).collect()));
            };
            Ok(Asked::Manifest(Path { name: name.to_owned(), version }))
        }
        _ => Err(unknown()),
    }
}

fn digest(text: &str) -> Result<Digest, Refusal> {
    text.parse().map_err(|error| Refusal::DigestInvalid(format!("{error}")))
}

/// Components of `[a-z0-9._-]` that begin and end with a letter or digit, as the specification has it.
fn is_name(name: &str) -> bool {
    let is_component = |component: &str| {
        let alphanumeric =
            |byte: Option<u8>| byte.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        alphanumeric(component.bytes().next())
            && alphanumeric(component.bytes().last())
            && component.bytes().all(|b| alphanumeric(Some(b)) || matches!(b, b'.' | b'_' | b'-'))
    };
    name.len() <= 255 && name.split('/').all(is_component)
}

fn is_tag(tag: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    tag.len() <= 128
        && tag.bytes().next().is_some_and(is_word)
        && tag.bytes().all(|b| is_word(b) || matches!(b, b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses() {
        let digest = Digest::sha256(b"");
        let manifest = |name: &str, version| Ok(Asked::Manifest(Path { name: name.to_owned(), version }));
        let tag = |tag: &str| Version::Tag(tag.to_owned());
        for (path, asked) in [
            ("/v2/".to_owned(), Ok(Asked::Version)),
            ("/v2".to_owned(), Ok(Asked::Version)),
            (format!("/v2/a/b/blobs/{digest}"), Ok(Asked::Blob(digest.clone()))),
            (format!("/v2/a/manifests/{digest}"), manifest("a", Version::Digest(digest.clone()))),
            ("/v2/a/b/c/manifests/v1.0".to_owned(), manifest("a/b/c", tag("v1.0"))),
            ("/v2/a/manifests/manifests/x".to_owned(), manifest("a/manifests", tag("x"))),
            ("/v2/a/blobs/latest".to_owned(), Err("DIGEST_INVALID")),
            ("/v2/a/blobs/sha256:../../x".to_owned(), Err("NAME_INVALID")),
            ("/v2/a/manifests/sha256:12".to_owned(), Err("DIGEST_INVALID")),
            ("/v2/A/manifests/x".to_owned(), Err("NAME_INVALID")),
            ("/v2/../manifests/x".to_owned(), Err("NAME_INVALID")),
            ("/v2/a//manifests/x".to_owned(), Err("NAME_INVALID")),
            ("/v2/manifests/x".to_owned(), Err("NOT_FOUND")),
            ("/v2/a/tags/list".to_owned(), Err("NOT_FOUND")),
            ("/".to_owned(), Err("NOT_FOUND")),
        ] {
            match (parse(&path), asked) {
                (Ok(parsed), Ok(wanted)) => assert_eq!(parsed, wanted, "{path}"),
                (Err(refusal), Err(code)) => assert_eq!(refusal.code(), code, "{path}"),
                (parsed, wanted) => panic!("{path}: {parsed:?}, not {wanted:?}"),
            }
        }
    }
}
