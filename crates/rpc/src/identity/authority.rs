//! The certificate authority: made, read back, and signing.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData as _, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, UnixTime};
use thiserror::Error;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{BACKDATED, Role, validity};

/// Why something cannot be an authority, or cannot sign.
#[derive(Debug, Error)]
pub enum AuthorityError {
    /// The text of a certificate or key is none.
    #[error("{0}: {1}")]
    Malformed(&'static str, String),
    /// The certificate is of no certificate authority.
    #[error("the certificate may not sign others (basicConstraints CA, keyCertSign)")]
    NotAnAuthority,
    /// Key and certificate do not belong together.
    #[error("the key is not that of the certificate")]
    KeyDiffers,
    /// No key could be made, or nothing be signed with it.
    #[error("signing: {0}")]
    Signing(#[from] rcgen::Error),
}

/// A certificate authority with its key.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    certificate_pem: String,
    key_pem: String,
    not_before: SystemTime,
    not_after: SystemTime,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the key.
        f.debug_struct("Authority").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

impl Authority {
    /// Makes one that is valid for so long from `now` on (ECDSA on P-256).
    pub fn generate(now: SystemTime, life: Duration) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        // A name of its own: whoever verifies finds the right one among several.
        let number = number(now);
        params.distinguished_name.push(DnType::CommonName, format!("tote CA {number:032x}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = ((now - BACKDATED).into(), (now + life).into());
        params.serial_number = Some(SerialNumber::from_slice(&number.to_be_bytes()));
        let certificate = params.self_signed(&key)?;
        Self::from_pem(&certificate.pem(), &key.serialize_pem())
    }

    /// Reads one: the first certificate of `certificate`, and its key in PKCS #8.
    pub fn from_pem(certificate: &str, key: &str) -> Result<Self, AuthorityError> {
        let key_pem = key.to_owned();
        // Never what a parser says of it: it may quote lines of the key.
        let unreadable = || {
            AuthorityError::Malformed("the key", "it must be a PEM of PKCS #8 (\"PRIVATE KEY\")".to_owned())
        };
        let key = PrivatePkcs8KeyDer::from_pem_slice(key.as_bytes()).map_err(|_| unreadable())?;
        let key = KeyPair::try_from(&key).map_err(|_| unreadable())?;
        let malformed = |reason: String| AuthorityError::Malformed("the certificate", reason);
        let der = CertificateDer::from_pem_slice(certificate.as_bytes());
        let certificate = der.map_err(|error| malformed(format!("{error}, where a PEM is due")))?;
        let (_, parsed) =
            X509Certificate::from_der(&certificate).map_err(|error| malformed(error.to_string()))?;
        let may_sign =
            parsed.key_usage().is_ok_and(|usage| usage.is_none_or(|usage| usage.value.key_cert_sign()));
        if !parsed.is_ca() || !may_sign {
            return Err(AuthorityError::NotAnAuthority);
        }
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(AuthorityError::KeyDiffers);
        }
        let (not_before, not_after) = validity(&parsed);
        let issuer = Issuer::from_ca_cert_der(&certificate, key)?;
        let certificate = certificate.into_owned();
        let certificate_pem = super::trust::pem(&certificate);
        Ok(Self { issuer, certificate, certificate_pem, key_pem, not_before, not_after })
    }

    /// Proves that what it signs verifies: its name may be one that cannot be repeated in what it signs, or it may be
    /// constrained.
    pub fn try_out(&self) -> Result<(), AuthorityError> {
        let (key, born) = (KeyPair::generate()?, self.not_before + BACKDATED);
        let life = (born, born + Duration::from_secs(3600));
        let address = Some(IpAddr::from([10, 0, 0, 1]));
        let role = Role::Node("node".into());
        let leaf = self.sign_between(&role, address, &key.subject_public_key_info(), life, serial(born))?;
        let unusable = |reason: String| {
            let reason = format!(
                "what it signs does not verify ({reason}): its subject may have two attributes of one kind"
            );
            AuthorityError::Malformed("the certificate", reason)
        };
        let at = born.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default() + Duration::from_secs(1);
        super::trust::verify_alone(&self.certificate, &leaf, UnixTime::since_unix_epoch(at))
            .map_err(|error| unusable(error.to_string()))
    }

    /// Its certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Its certificate as PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Its key as PEM (PKCS #8).
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// From when on it is valid.
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// Until when it is valid.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Whether it signed a certificate.
    pub fn issued(&self, certificate: &CertificateDer<'_>) -> bool {
        let Ok((_, own)) = X509Certificate::from_der(&self.certificate) else { return false };
        X509Certificate::from_der(certificate)
            .is_ok_and(|(_, other)| other.verify_signature(Some(own.public_key())).is_ok())
    }

    /// Signs a certificate for a public key (DER of a `SubjectPublicKeyInfo`, RFC 5280 section 4.1), valid for so long
    /// from `now` on but no longer than the authority itself. A node's is good for serving on `address` and for
    /// calling, a controller's for calling only.
    pub fn sign(
        &self,
        role: &Role,
        address: Option<IpAddr>,
        public_key: &[u8],
        now: SystemTime,
        life: Duration,
    ) -> Result<CertificateDer<'static>, AuthorityError> {
        let not_after = (now + life).min(self.not_after);
        self.sign_between(role, address, public_key, (now - BACKDATED, not_after), serial(now))
    }

    /// Signs a certificate with a validity of the caller's choice.
    pub(crate) fn sign_between(
        &self,
        role: &Role,
        address: Option<IpAddr>,
        public_key: &[u8],
        (not_before, not_after): (SystemTime, SystemTime),
        serial: SerialNumber,
    ) -> Result<CertificateDer<'static>, AuthorityError> {
        let public_key = SubjectPublicKeyInfo::from_der(public_key)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let (name, usages) = match role {
            Role::Controller => ("tote controller".to_owned(), vec![ExtendedKeyUsagePurpose::ClientAuth]),
            Role::Node(name) => (
                // A common name has at most 64 characters (RFC 5280, appendix A.1).
                format!("tote agent {name}").chars().take(64).collect(),
                vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            ),
        };
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names = vec![SanType::URI(role.to_string().try_into()?)];
        params.subject_alt_names.extend(address.map(SanType::IpAddress));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = usages;
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = (not_before.into(), not_after.into());
        params.serial_number = Some(serial);
        Ok(params.signed_by(&public_key, &self.issuer)?.der().clone())
    }
}

/// A number that no other certificate of this authority has: nanoseconds since 1970, and a count, since a clock may be
/// coarse.
pub(crate) fn serial(now: SystemTime) -> SerialNumber {
    SerialNumber::from_slice(&number(now).to_be_bytes())
}

fn number(now: SystemTime) -> u128 {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let nanos = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    (nanos << 32) | u128::from(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Peer;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn signs_what_it_says() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let authority = Authority::generate(now, 10 * HOUR).unwrap();
        let key = KeyPair::generate().unwrap();
        let role = Role::Node("n".into());
        let address = Some("10.0.0.7".parse().unwrap());
        let signed = authority.sign(&role, address, &key.subject_public_key_info(), now, HOUR).unwrap();
        let peer = Peer::of(&signed).unwrap();
        assert_eq!(
            (peer.role.clone(), peer.not_before, peer.not_after),
            (role.clone(), now - BACKDATED, now + HOUR)
        );
        assert_eq!(peer.renew_at(), now + HOUR / 2);
        assert!(authority.issued(&signed));
        assert!(!Authority::generate(now, HOUR).unwrap().issued(&signed));
        let longest = authority.sign(&role, address, &key.subject_public_key_info(), now, 99 * HOUR).unwrap();
        assert_eq!(Peer::of(&longest).unwrap().not_after, authority.not_after(), "not beyond its own end");
        assert!(!format!("{authority:?}").contains("PRIVATE"), "{authority:?}");
    }

    #[test]
    fn one_whose_name_cannot_be_repeated_is_found_out() {
        let now = SystemTime::now();
        Authority::generate(now, HOUR).unwrap().try_out().unwrap();
        // DC=tote, DC=dev, as directories name their authorities; rcgen keeps one attribute of a kind.
        let der = |names: &[&str]| {
            let mut params = CertificateParams::default();
            params.distinguished_name = DistinguishedName::new();
            for (at, name) in names.iter().enumerate() {
                let kind = DnType::CustomDnType(vec![0, 9, 2342, 19_200_300, 100, 1, 25 + at as u64]);
                params.distinguished_name.push(kind, *name);
            }
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let key = KeyPair::generate().unwrap();
            (params.self_signed(&key).unwrap().der().to_vec(), key)
        };
        // Two kinds are written, and the second is made the first's: the signature breaks, but an anchor's is not read.
        let (mut bytes, key) = der(&["tote", "dev"]);
        let second = [0x9, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 0x1, 26];
        while let Some(at) = bytes.windows(second.len()).position(|window| window == second) {
            bytes[at + second.len() - 1] = 25;
        }
        let pem = crate::identity::trust::pem(&CertificateDer::from(bytes));
        let said =
            Authority::from_pem(&pem, &key.serialize_pem()).unwrap().try_out().unwrap_err().to_string();
        assert!(said.contains("does not verify"), "{said}");
    }

    #[test]
    fn is_read_back_and_what_is_wrong_is_named() {
        let now = SystemTime::now();
        let (one, other) = (Authority::generate(now, HOUR).unwrap(), Authority::generate(now, HOUR).unwrap());
        let back = Authority::from_pem(one.certificate_pem(), one.key_pem()).unwrap();
        assert_eq!(back.certificate(), one.certificate());
        let key = KeyPair::generate().unwrap();
        let leaf = one.sign(&Role::Controller, None, &key.subject_public_key_info(), now, HOUR).unwrap();
        let leaf = super::super::trust::pem(&leaf);
        let said =
            |certificate: &str, key: &str| Authority::from_pem(certificate, key).unwrap_err().to_string();
        assert!(said(one.certificate_pem(), other.key_pem()).contains("not that of the certificate"));
        assert!(said(&leaf, &key.serialize_pem()).contains("may not sign"));
        assert!(said("", one.key_pem()).starts_with("the certificate"));
        assert!(said(one.certificate_pem(), "x").starts_with("the key"));
        // No line of a key is ever repeated: an empty line in a PEM makes some parsers quote what is before it.
        let broken = one.key_pem().replace("\n-----END", "\n\n-----END");
        let line = one.key_pem().lines().nth(1).unwrap();
        if let Err(error) = Authority::from_pem(one.certificate_pem(), &broken) {
            assert!(!error.to_string().contains(line), "{error}");
        }
    }
}
