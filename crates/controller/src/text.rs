//! Words for people, of bounded length.

use std::fmt::Display;

/// The most bytes of an event's note (events.k8s.io/v1).
pub const MAX_NOTE: usize = 1024;

/// How many items of a list are written out.
const MAX_ITEMS: usize = 5;

/// `a, b, c`, or `a, b, c, d, e and 4 more`.
pub fn list<T: Display>(items: &[T]) -> String {
    let shown: Vec<String> = items.iter().take(MAX_ITEMS).map(ToString::to_string).collect();
    let shown = shown.join(", ");
    match items.len().saturating_sub(MAX_ITEMS) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// Cuts at `limit` bytes, at a character's boundary, and shows that it did.
pub fn bounded(text: &str, limit: usize) -> String {
    const CUT: &str = "...";
    if text.len() <= limit {
        return text.to_owned();
    }
    let mut end = limit.saturating_sub(CUT.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{CUT}", &text[..end])
}

/// `image (digest)`, or the image alone if it is pinned to that digest.
pub fn image(image: &str, digest: &str) -> String {
    if image.ends_with(digest) { image.to_owned() } else { format!("{image} ({digest})") }
}

/// `5.2 MiB`.
#[allow(clippy::cast_precision_loss)] // one decimal is shown
pub fn bytes(n: i64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let mut value = n as f64 / 1024.0;
    let mut unit = UNITS[0];
    for next in &UNITS[1..] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds() {
        let nodes: Vec<String> = (0..5000).map(|n| format!("node-{n}")).collect();
        assert_eq!(list(&nodes), "node-0, node-1, node-2, node-3, node-4 and 4995 more");
        assert_eq!(list(&nodes[..2]), "node-0, node-1");
        assert_eq!(
            (image("x:1", "sha256:a"), image("x@sha256:a", "sha256:a")),
            ("x:1 (sha256:a)".into(), "x@sha256:a".into())
        );
        let cut = bounded(&"é".repeat(1000), MAX_NOTE);
        assert!(cut.len() <= MAX_NOTE && cut.ends_with("..."), "{}", cut.len());
        assert_eq!(bounded("short", MAX_NOTE), "short");
        assert_eq!(
            (bytes(1000), bytes(5 << 20), bytes(1536)),
            ("1000 B".into(), "5.0 MiB".into(), "1.5 KiB".into())
        );
    }
}
