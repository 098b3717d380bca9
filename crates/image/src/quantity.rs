//! Numbers of bytes as Kubernetes writes them (`resource.Quantity`): `50Mi`, `1.5G`, `500000`.

/// The bytes that `text` names: a number with one of the suffixes k, M, G, Ki, Mi, Gi, or without; `None` if it is none.
pub fn bytes(text: &str) -> Option<f64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: f64 = match &text[digits.len()..] {
        "" => 1.0,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "Ki" => 1024.0,
        "Mi" => 1024.0 * 1024.0,
        "Gi" => 1024.0 * 1024.0 * 1024.0,
        _ => return None,
    };
    let number: f64 = digits.parse().ok()?;
    Some(number * unit).filter(|bytes| bytes.is_finite())
}
