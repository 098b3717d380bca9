//! What a registry that wants a proof asks for (`WWW-Authenticate`). Pure.

use http_auth::{ChallengeRef, parse_challenges};
use reqwest::Url;

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// A token of this server, whose URL holds service and scope.
    Bearer(Url),
    /// Name and password.
    Basic,
}

/// What the headers ask for, a token rather than a password; `None` if nothing that is known. `scope` is asked for where
/// the registry names none.
pub(super) fn challenge<'a>(headers: impl Iterator<Item = &'a str>, scope: &str) -> Option<Challenge> {
    let mut basic = None;
    for header in headers {
        for challenge in parse_challenges(header).unwrap_or_default() {
            if challenge.scheme.eq_ignore_ascii_case("bearer") {
                if let Some(url) = token_url(&challenge, scope) {
                    return Some(Challenge::Bearer(url));
                }
            } else if challenge.scheme.eq_ignore_ascii_case("basic") {
                basic = Some(Challenge::Basic);
            }
        }
    }
    basic
}

fn token_url(challenge: &ChallengeRef<'_>, scope: &str) -> Option<Url> {
    let parameter = |name: &str| {
        let found = challenge.params.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.to_unescaped())
    };
    let mut url = Url::parse(&parameter("realm")?).ok()?;
    if let Some(service) = parameter("service") {
        url.query_pairs_mut().append_pair("service", &service);
    }
    let scopes = parameter("scope").filter(|scope| !scope.is_empty()).unwrap_or_else(|| scope.to_owned());
    for scope in scopes.split(' ') {
        url.query_pairs_mut().append_pair("scope", scope);
    }
    Some(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_rather_than_a_password() {
        const SCOPE: &str = "repository:a/b:pull";
        let bearer = |url: &str| Some(Challenge::Bearer(Url::parse(url).unwrap()));
        for (headers, expected) in [
            (
                &[r#"Bearer realm="https://auth.test/token",service="r.test",scope="repository:x/y:pull""#][..],
                bearer("https://auth.test/token?service=r.test&scope=repository%3Ax%2Fy%3Apull"),
            ),
            (
                &[r#"bearer realm="https://auth.test/t?a=b""#],
                bearer("https://auth.test/t?a=b&scope=repository%3Aa%2Fb%3Apull"),
            ),
            (
                &[r#"Bearer realm="https://auth.test/t",scope="aws other""#],
                bearer("https://auth.test/t?scope=aws&scope=other"),
            ),
            (
                &[r#"Basic realm="r""#, r#"Bearer realm="https://a.test/",scope="s""#],
                bearer("https://a.test/?scope=s"),
            ),
            (&[r#"BASIC realm="r""#], Some(Challenge::Basic)),
            (&[r#"Bearer realm="no url""#], None),
            (&[r#"Bearer service="r.test""#], None),
            (&["Negotiate", "\"", ""], None),
            (&[], None),
        ] {
            assert_eq!(challenge(headers.iter().copied(), SCOPE), expected, "{headers:?}");
        }
    }
}
