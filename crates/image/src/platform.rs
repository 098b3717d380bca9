//! Platforms, and which of an index's manifests a node would run.

use std::fmt;

/// An operating system and architecture, normalized as containerd's `platforms` package does
/// (`x86_64` is `amd64`, `aarch64` is `arm64`, `arm64/v8` is `arm64`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Platform {
    os: String,
    architecture: String,
    variant: String,
}

impl Platform {
    /// Normalizes the three parts; `variant` may be empty.
    pub fn new(os: &str, architecture: &str, variant: &str) -> Self {
        let architecture = architecture.to_lowercase();
        let variant = variant.to_lowercase();
        let (architecture, variant) = match (architecture.as_str(), variant.as_str()) {
            ("x86_64" | "x86-64" | "amd64", "" | "v1") => ("amd64", ""),
            ("x86_64" | "x86-64" | "amd64", other) => ("amd64", other),
            ("aarch64" | "arm64", "" | "8" | "v8") => ("arm64", ""),
            ("aarch64" | "arm64", other) => ("arm64", other),
            ("armhf", _) | ("arm", "" | "7") => ("arm", "v7"),
            ("armel", _) | ("arm", "6") => ("arm", "v6"),
            ("i386", _) => ("386", ""),
            (other, variant) => (other, variant),
        };
        Self { os: os.to_lowercase(), architecture: architecture.to_owned(), variant: variant.to_owned() }
    }

    /// `linux`, `windows`, ...
    pub fn os(&self) -> &str {
        &self.os
    }

    /// `amd64`, `arm64`, ...
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// `v7`, `v2`, ..., or empty.
    pub fn variant(&self) -> &str {
        &self.variant
    }

    /// Whether this is a node's own platform and not, say, an attestation's `unknown/unknown`.
    pub fn is_known(&self) -> bool {
        self.os != "unknown" && self.architecture != "unknown" && !self.os.is_empty()
    }

    /// How well a manifest of the platform `offered` suits a node of this one: 0 is best, `None` not at all.
    /// A node runs lower variants of its architecture too (containerd `platforms.Only`).
    pub fn rank(&self, offered: &Self) -> Option<u32> {
        if self.os != offered.os || self.architecture != offered.architecture {
            return None;
        }
        let level = |variant: &str, default: u32| match variant {
            "" => Some(default),
            v => v.strip_prefix('v').and_then(|n| n.split('.').next()).and_then(|n| n.parse::<u32>().ok()),
        };
        let default = if self.architecture == "arm64" { 8 } else { 1 };
        let (own, other) = (level(&self.variant, default)?, level(&offered.variant, default)?);
        own.checked_sub(other)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if !self.variant.is_empty() {
            write!(f, "/{}", self.variant)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks() {
        let p = |s: &str| {
            let parts: Vec<&str> = s.split('/').collect();
            Platform::new(parts[0], parts[1], parts.get(2).copied().unwrap_or(""))
        };
        for (node, image, rank) in [
            ("linux/x86_64", "linux/amd64", Some(0)),
            ("linux/amd64", "linux/amd64/v1", Some(0)),
            ("linux/amd64", "linux/amd64/v3", None),
            ("linux/amd64/v3", "linux/amd64", Some(2)),
            ("linux/aarch64", "linux/arm64/v8", Some(0)),
            ("linux/arm/v7", "linux/arm/v6", Some(1)),
            ("linux/arm/v6", "linux/arm/v7", None),
            ("linux/amd64", "linux/arm64", None),
            ("linux/amd64", "windows/amd64", None),
            ("linux/amd64", "unknown/unknown", None),
        ] {
            assert_eq!(p(node).rank(&p(image)), rank, "{node} {image}");
        }
        assert!(!p("unknown/unknown").is_known());
    }
}
