//! Which registries may be asked, and which addresses never. Pure.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use reqwest::Url;
use thiserror::Error;

/// The registry that Docker's name stands for.
const DOCKER: (&str, &str) = ("docker.io", "registry-1.docker.io");

/// A registry's host as references carry it (`registry.example.com`, `docker.io`, `10.0.0.1:5000`), or all that lie one label
/// below a domain (`*.example.com`). A port is part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPattern {
    wildcard: bool,
    host: String,
    any_port: bool,
}

/// Why a string is no [`HostPattern`].
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "{0:?} is no registry's host: write it as in image references, without scheme and path, such as \
     registry.example.com, registry.example.com:5000, registry.example.com:*, docker.io or *.example.com"
)]
pub struct HostError(String);

impl FromStr for HostPattern {
    type Err = HostError;

    fn from_str(text: &str) -> Result<Self, HostError> {
        let host = text.strip_suffix(":*");
        let (any_port, text_of_host) = (host.is_some(), host.unwrap_or(text));
        let host = text_of_host.strip_prefix("*.");
        let (wildcard, host) = (host.is_some(), host.unwrap_or(text_of_host).to_ascii_lowercase());
        let is_host = Url::parse(&format!("https://{host}/"))
            .is_ok_and(|url| url.path() == "/" && url.username().is_empty() && url.password().is_none());
        let is_plain = host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-:[]".contains(&b));
        let is_domain = !wildcard || (host.contains('.') && !host.starts_with('.'));
        if is_host && is_plain && is_domain {
            Ok(Self { wildcard, host, any_port })
        } else {
            Err(HostError(text.to_owned()))
        }
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (before, after) = (if self.wildcard { "*." } else { "" }, if self.any_port { ":*" } else { "" });
        write!(f, "{before}{}{after}", self.host)
    }
}

impl HostPattern {
    /// Whether a reference's registry is meant.
    pub fn matches(&self, registry: &str) -> bool {
        let mut registry = registry.to_ascii_lowercase();
        if self.any_port
            && let Some((host, port)) = registry.rsplit_once(':')
            && port.bytes().all(|b| b.is_ascii_digit())
        {
            registry = host.to_owned();
        }
        if !self.wildcard {
            return registry == self.host;
        }
        registry.split_once('.').is_some_and(|(label, rest)| !label.is_empty() && rest == self.host)
    }
}

/// The host to connect to for a reference's registry.
pub(super) fn endpoint(registry: &str) -> &str {
    if registry == DOCKER.0 { DOCKER.1 } else { registry }
}

/// Whether an address is one that a registry never has, but a node's own services and a cloud's metadata do: loopback,
/// link-local, unspecified, multicast, and the IPv6 address of EC2's metadata.
pub(super) fn is_forbidden(address: IpAddr) -> bool {
    const EC2: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            v4.is_loopback()
                || v4.is_link_local()
                || v4.octets()[0] == 0
                || v4.is_multicast()
                || v4.is_broadcast()
        }
        IpAddr::V6(v6) => {
            v6.is_loopback()
                || v6.is_unicast_link_local()
                || v6.is_unspecified()
                || v6.is_multicast()
                || v6 == EC2
        }
    }
}

/// Checks where a registry sends its caller on to, by a redirect or for a token: by TLS unless it is spoken to by plain HTTP
/// itself, without a password in the URL, and to no forbidden address but its own. Names are judged when they are
/// resolved.
pub(super) fn sent_on(from: &Url, to: &Url) -> Result<(), String> {
    if !matches!(to.scheme(), "https" | "http") || (to.scheme() == "http" && from.scheme() != "http") {
        return Err(format!("it leads from {} to {}", origin(from), origin(to)));
    }
    if !to.username().is_empty() || to.password().is_some() {
        return Err(format!("it leads to {} with a password in the URL", origin(to)));
    }
    let literal = to.host_str().map(|host| host.trim_matches(['[', ']'])).and_then(|host| host.parse().ok());
    if literal.is_some_and(is_forbidden) && to.host_str() != from.host_str() {
        return Err(format!("it leads to {}, an address that no registry has", origin(to)));
    }
    Ok(())
}

/// `https://host:port`, without what may be secret.
pub(super) fn origin(url: &Url) -> String {
    url.origin().ascii_serialization()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_meant_exactly_and_a_wildcard_stands_for_one_label() {
        for (pattern, registry, meant) in [
            ("docker.io", "docker.io", true),
            ("R.test", "r.test", true),
            ("r.test", "r.test:5000", false),
            ("r.test:5000", "r.test:5000", true),
            ("10.0.0.1:5000", "10.0.0.1:5000", true),
            ("r.test", "evil-r.test", false),
            ("*.example.com", "eu.example.com", true),
            ("*.example.com", "example.com", false),
            ("*.example.com", "a.b.example.com", false),
            ("*.example.com", "eu.example.com.evil.test", false),
            ("*.example.com", "eu.example.com:5000", false),
            ("*.example.com:5000", "eu.example.com:5000", true),
            ("10.0.0.1:*", "10.0.0.1:5000", true),
            ("10.0.0.1:*", "10.0.0.1", true),
            ("10.0.0.1:*", "10.0.0.11:5000", false),
            ("*.example.com:*", "eu.example.com:5000", true),
            ("*.example.com:*", "example.com:5000", false),
        ] {
            let pattern: HostPattern = pattern.parse().unwrap();
            assert_eq!(pattern.matches(registry), meant, "{pattern} {registry}");
        }
        for text in [
            "",
            "*",
            "*.",
            "*.com",
            "a.*.com",
            "https://r.test",
            "r.test/x",
            "u:p@r.test",
            "r.test:x",
            "r?.test",
        ] {
            assert_eq!(text.parse::<HostPattern>(), Err(HostError(text.to_owned())), "{text:?}");
        }
    }

    #[test]
    fn docker_hub_has_another_name() {
        assert_eq!((endpoint("docker.io"), endpoint("r.test:1")), ("registry-1.docker.io", "r.test:1"));
    }

    #[test]
    fn nobody_is_sent_to_where_no_registry_is() {
        for (from, to, allowed) in [
            ("https://r.test/v2/", "https://auth.r.test/token", true),
            ("https://r.test/v2/", "http://auth.r.test/token", false),
            ("http://r.test/v2/", "http://auth.r.test/token", true),
            ("https://r.test/v2/", "file:///etc/passwd", false),
            ("https://r.test/v2/", "https://u:p@auth.r.test/", false),
            ("https://r.test/v2/", "https://169.254.169.254/latest", false),
            ("https://r.test/v2/", "https://[fd00:ec2::254]/latest", false),
            ("https://r.test/v2/", "https://[::ffff:127.0.0.1]/", false),
            ("https://r.test/v2/", "https://0x7f000001/", false),
            ("https://r.test/v2/", "https://10.0.0.7/", true),
            ("http://127.0.0.1:5000/v2/", "http://127.0.0.1:5001/token", true),
            ("http://127.0.0.1:5000/v2/", "http://127.0.0.2:5001/token", false),
        ] {
            let said = sent_on(&Url::parse(from).unwrap(), &Url::parse(to).unwrap());
            assert_eq!(said.is_ok(), allowed, "{from} {to}: {said:?}");
        }
        for (address, forbidden) in [
            ("0.0.0.0", true),
            ("224.0.0.1", true),
            ("fe80::1", true),
            ("::", true),
            ("::1", true),
            ("10.96.0.1", false),
            ("2001:db8::1", false),
        ] {
            assert_eq!(is_forbidden(address.parse().unwrap()), forbidden, "{address}");
        }
    }
}
