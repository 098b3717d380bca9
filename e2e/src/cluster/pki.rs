//! The certificates and kubeconfigs of a cluster: one CA, which everybody
//! trusts, and a client certificate for each role of Kubernetes
//! (<https://kubernetes.io/docs/setup/best-practices/certificates/>).

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use serde_json::json;

/// A certificate authority that lives as long as `up` runs: its key is never
/// written.
pub(super) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
}

/// Whom a certificate names.
pub(super) struct Subject<'a> {
    /// The user.
    pub(super) name: &'a str,
    /// The group, if any.
    pub(super) group: Option<&'a str>,
    /// The names it may serve under.
    pub(super) names: &'a [&'a str],
    /// The addresses it may serve on.
    pub(super) addresses: &'a [Ipv4Addr],
}

impl<'a> Subject<'a> {
    /// A client.
    pub(super) fn client(name: &'a str, group: Option<&'a str>) -> Self {
        Self { name, group, names: &[], addresses: &[] }
    }
}

impl Authority {
    /// # Errors
    /// No key can be made.
    pub(super) fn new(name: &str) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().context("making the CA's key")?;
        let certificate = params.self_signed(&key).context("signing the CA's certificate")?.pem();
        Ok(Self { issuer: Issuer::new(params, key), certificate })
    }

    /// Writes `ca.crt` in `dir`.
    ///
    /// # Errors
    /// It cannot be written.
    pub(super) fn write(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir)?;
        fs::write(dir.join("ca.crt"), &self.certificate)
            .with_context(|| format!("writing in {}", dir.display()))
    }

    /// Writes `<file>.crt` and `<file>.key` in `dir`.
    ///
    /// # Errors
    /// They cannot be made or written.
    pub(super) fn issue(&self, dir: &Path, file: &str, subject: &Subject<'_>) -> Result<()> {
        let names: Vec<String> = subject.names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).context("a name of a certificate")?;
        let addresses = subject.addresses.iter().map(|address| SanType::IpAddress(IpAddr::V4(*address)));
        params.subject_alt_names.extend(addresses);
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, subject.name);
        if let Some(group) = subject.group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().context("making a key")?;
        let certificate = params.signed_by(&key, &self.issuer).context("signing a certificate")?;
        fs::create_dir_all(dir)?;
        fs::write(dir.join(format!("{file}.crt")), certificate.pem())?;
        fs::write(dir.join(format!("{file}.key")), key.serialize_pem())?;
        Ok(())
    }
}

/// Writes the key pair that signs service account tokens: `sa.key`, `sa.pub`.
///
/// # Errors
/// It cannot be made or written.
pub(super) fn service_account_key(dir: &Path) -> Result<()> {
    let key = KeyPair::generate().context("making the service accounts' key")?;
    fs::write(dir.join("sa.key"), key.serialize_pem())?;
    fs::write(dir.join("sa.pub"), key.public_key_pem())?;
    Ok(())
}

/// Writes a kubeconfig for the client certificate `<file>.crt` of `dir`.
/// `seen_at` is where its reader sees `dir`. (JSON is YAML.)
///
/// # Errors
/// It cannot be written.
pub(super) fn kubeconfig(path: &Path, server: &str, seen_at: &Path, file: &str) -> Result<()> {
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "tote", "cluster": {"server": server, "certificate-authority": seen_at.join("ca.crt")}}],
        "users": [{"name": file, "user": {
            "client-certificate": seen_at.join(format!("{file}.crt")),
            "client-key": seen_at.join(format!("{file}.key")),
        }}],
        "contexts": [{"name": "tote", "context": {"cluster": "tote", "user": file}}],
        "current-context": "tote",
    });
    fs::write(path, serde_json::to_vec_pretty(&config)?)
        .with_context(|| format!("writing {}", path.display()))
}
