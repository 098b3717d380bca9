//! What this agent shows and whom it believes: its identity, the token and the authorities mounted into its pod.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;
use tokio::time::Instant;
use tote_rpc::identity::{Authorities, BundleError, Identity, InstallError, Role};

/// How often the mounted bundle is looked at.
const LOOK: Duration = Duration::from_secs(2);

/// How long what the controller gave is trusted though it is not mounted.
const ALONE: Duration = Duration::from_secs(300);

/// The longest token taken, in bytes: those of Kubernetes have about 1 KiB.
const LONGEST_TOKEN: usize = 16 << 10;

/// Files that Kubernetes keeps current.
#[derive(Clone, Debug)]
pub struct Mounts {
    /// A service account token of the audience `tote` (`serviceAccountToken` of a projected volume).
    pub token: PathBuf,
    /// The authorities to trust, as PEM.
    pub authorities: PathBuf,
}

/// Why an agent cannot be identified.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// Nothing is mounted.
    #[error("no token is mounted")]
    NoToken,
    /// The token cannot be read.
    #[error("{path}: {reason}")]
    Token {
        /// Where it should be.
        path: String,
        /// Why not.
        reason: String,
    },
    /// The authorities cannot be used.
    #[error("authorities: {0}")]
    Authorities(#[from] BundleError),
    /// The certificate cannot be used.
    #[error("certificate: {0}")]
    Certificate(#[from] InstallError),
}

#[derive(Debug, Default)]
struct Known {
    mounted: Authorities,
    given: Authorities,
    /// Since when something was given that is not mounted.
    alone_since: Option<Instant>,
}

/// The agent's identity and what it comes from.
#[derive(Debug)]
pub struct Standing {
    /// The key, the certificate, and whom it trusts.
    pub identity: Arc<Identity>,
    role: Role,
    mounts: Option<Mounts>,
    alone: Duration,
    known: Mutex<Known>,
}

impl Standing {
    /// Of a node's agent. Without mounts the identity is left as it is until it is certified.
    pub fn new(identity: Arc<Identity>, node: &str, mounts: Option<Mounts>) -> Self {
        Self { identity, role: Role::Node(node.into()), mounts, alone: ALONE, known: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows the mounted authorities for good.
    pub async fn follow(&self) {
        let Some(mounts) = &self.mounts else { return };
        let mut before = None;
        loop {
            let text =
                tokio::fs::read_to_string(&mounts.authorities).await.map_err(|error| error.to_string());
            if before.as_ref() != Some(&text) {
                self.mounted(&text, &mounts.authorities.display().to_string());
                before = Some(text);
            }
            self.forget_retired(Instant::now());
            tokio::time::sleep(LOOK).await;
        }
    }

    /// What the controller gave and is not mounted was retired since, if that stays so; the mounted bundle lags behind
    /// by up to 90 s.
    fn forget_retired(&self, now: Instant) {
        let mut known = self.lock();
        let Some(kept) = known.given.only_of(&known.mounted) else {
            known.alone_since = None;
            return;
        };
        let since = *known.alone_since.get_or_insert(now);
        if now.duration_since(since) >= self.alone {
            tracing::info!("an authority that is no longer mounted is trusted no longer");
            *known = Known { given: kept, mounted: known.mounted.clone(), alone_since: None };
            self.identity.trust(&known.given.clone().and(&known.mounted));
        }
    }

    fn mounted(&self, text: &Result<String, String>, path: &str) {
        let read =
            text.clone().and_then(|text| Authorities::from_pem(&text).map_err(|error| error.to_string()));
        match read {
            Ok(mounted) => {
                tracing::info!(path, authorities = mounted.certificates().len(), "trusted authorities");
                let mut known = self.lock();
                known.mounted = mounted;
                self.identity.trust(&known.given.clone().and(&known.mounted));
            }
            // Those that were read before are trusted on.
            Err(error) => tracing::warn!(path, error, "cannot read the authorities to trust"),
        }
    }

    /// The token, as it is now.
    pub async fn token(&self) -> Result<String, IdentityError> {
        let path = &self.mounts.as_ref().ok_or(IdentityError::NoToken)?.token;
        let wrong = |reason: String| IdentityError::Token { path: path.display().to_string(), reason };
        let token = tokio::fs::read_to_string(path).await.map_err(|error| wrong(error.to_string()))?;
        let token = token.trim();
        if token.is_empty() || token.len() > LONGEST_TOKEN {
            return Err(wrong(format!("a token is due, {} bytes are there", token.len())));
        }
        Ok(token.to_owned())
    }

    /// Takes a certificate, and the authorities to trust beside the mounted ones. Nothing changes if they do not fit.
    pub fn certify(&self, certificate: Vec<u8>, authorities: Vec<Vec<u8>>) -> Result<(), IdentityError> {
        let given = Authorities::from_certificates(authorities.into_iter().map(Into::into).collect())?;
        let mut known = self.lock();
        self.identity.trust(&given.clone().and(&known.mounted));
        match self.identity.install(certificate.into(), &self.role) {
            Ok(()) => {
                known.given = given;
                known.alone_since = None;
            }
            Err(error) => {
                self.identity.trust(&known.given.clone().and(&known.mounted));
                return Err(error.into());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use tote_rpc::testing::Pki;

    use super::*;

    #[tokio::test]
    async fn says_what_is_wrong_with_its_token() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        let mounts = Mounts { token: path.clone(), authorities: directory.path().join("ca.crt") };
        let standing = Standing::new(Identity::new().unwrap(), "n", Some(mounts));
        let said = async || standing.token().await.unwrap_err().to_string();
        assert!(said().await.contains("No such file"), "{}", said().await);
        std::fs::write(&path, "\n").unwrap();
        assert!(said().await.contains("0 bytes"), "{}", said().await);
        std::fs::write(&path, "abc\n").unwrap();
        assert_eq!(standing.token().await.unwrap(), "abc");
    }

    /// The mounted bundle is followed as it changes; what the controller gave and is not mounted counts for a while.
    #[tokio::test]
    async fn the_mounted_authorities_are_followed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca.crt");
        let mounts = Mounts { token: directory.path().join("token"), authorities: path.clone() };
        let standing = Standing::new(Identity::new().unwrap(), "n", Some(mounts));
        let standing = Arc::new(Standing { alone: Duration::from_secs(1), ..standing });
        let (one, two) = (Pki::new(), Pki::new());
        let authorities = |pki: &Pki| vec![pki.authority.certificate().to_vec()];
        let sign = |pki: &Pki| {
            let (role, life) = (Role::Node("n".into()), Duration::from_secs(60));
            let key = standing.identity.public_key();
            pki.authority.sign(&role, None, key, SystemTime::now(), life).unwrap().to_vec()
        };
        // Whether a certificate of this authority would be taken if nothing were given with it but the other's.
        let trusts = |pki: &Pki| standing.identity.install(sign(pki).into(), &Role::Node("n".into())).is_ok();
        let follower = standing.clone();
        let following = tokio::spawn(async move { follower.follow().await });
        let until = async |what: &str, condition: &dyn Fn() -> bool| {
            let deadline = Instant::now() + Duration::from_secs(20);
            while !condition() {
                assert!(Instant::now() < deadline, "{what}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        std::fs::write(&path, one.authority.certificate_pem()).unwrap();
        until("the first bundle", &|| trusts(&one)).await;
        assert!(!trusts(&two));
        std::fs::write(&path, "nonsense").unwrap();
        standing.certify(sign(&two), authorities(&two)).unwrap();
        assert!(trusts(&one) && trusts(&two), "both, and nonsense changes nothing");
        let both = one.authority.certificate_pem().to_owned() + two.authority.certificate_pem();
        std::fs::write(&path, both).unwrap();
        until("the second bundle", &|| standing.lock().mounted.certificates().len() == 2).await;
        assert!(trusts(&one) && trusts(&two));
        std::fs::write(&path, two.authority.certificate_pem()).unwrap();
        until("the first authority to be believed no more", &|| !trusts(&one)).await;
        standing.certify(sign(&two), [authorities(&one), authorities(&two)].concat()).unwrap();
        assert!(trusts(&one));
        std::fs::write(&path, one.authority.certificate_pem()).unwrap();
        until("what was given before to count no more", &|| !trusts(&two)).await;
        following.abort();
    }

    #[test]
    fn a_certificate_that_does_not_fit_changes_nothing() {
        let (good, other) = (Pki::new(), Pki::new());
        let standing = Standing::new(Identity::new().unwrap(), "n", None);
        let sign = |pki: &Pki, node: &str| {
            let role = Role::Node(node.into());
            let life = Duration::from_secs(60);
            let key = standing.identity.public_key();
            pki.authority.sign(&role, None, key, SystemTime::now(), life).unwrap().to_vec()
        };
        let authority = |pki: &Pki| vec![pki.authority.certificate().to_vec()];
        standing.certify(sign(&good, "n"), authority(&good)).unwrap();
        let before = standing.identity.certified().borrow().clone();
        for (certificate, authorities, says) in [
            (sign(&other, "n"), authority(&good), "UnknownIssuer"),
            (sign(&other, "m"), authority(&other), "node/m"),
            (good.authority.certificate().to_vec(), authority(&good), "another key"),
            (sign(&other, "n"), vec![], "no certificate"),
            (sign(&other, "n"), vec![vec![1, 2, 3]], "authorities"),
        ] {
            let said = standing.certify(certificate, authorities).unwrap_err().to_string();
            assert!(said.contains(says), "{said}, which should say {says}");
            assert_eq!(*standing.identity.certified().borrow(), before);
        }
        // And the authority from before is still trusted.
        standing.certify(sign(&good, "n"), authority(&good)).unwrap();
    }
}
