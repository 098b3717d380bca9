//! Clocks that are off: by as much as certificates are backdated for, nobody notices.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::{CertificateError, Error};
use tote_rpc::identity::{Identity, InstallError, Role, Unverified};
use tote_rpc::testing::{Pki, Skewed};
use tote_rpc::{Refusal, blob_client, connect, v1};

use super::node;
use super::played::{LOOPBACK, NODE, call, get, goes_on, serve, whole};

fn skewed(seconds: i64) -> Arc<Identity> {
    Identity::with_time(Arc::new(Skewed(seconds))).unwrap()
}

/// What clocks may differ by, in seconds.
const APART: i64 = 300;

#[tokio::test(flavor = "multi_thread")]
async fn off_by_five_minutes_whoever_it_is() {
    let pki = Pki::new();
    let offs = [-APART, 0, APART];
    for server in offs {
        let agent = skewed(server);
        // Signed by a clock that is right, this very moment.
        pki.certify(&agent, &node(NODE), Some(LOOPBACK.parse().unwrap()));
        let served = serve(&agent).await;
        for client in offs {
            let (controller, other) = (skewed(client), skewed(client));
            pki.certify(&controller, &Role::Controller, None);
            pki.certify(&other, &node("m"), None);
            assert_eq!(call(&served, &controller).await, Ok(()), "server {server}, client {client}");
            let answer = get(&blob_client(&other).unwrap(), served.uri("peer")).await;
            let said = whole(answer.unwrap()).await.unwrap();
            assert_eq!(said, "spiffe://tote.dev/node/m", "server {server}, client {client}");
        }
        assert_eq!(served.refusals(), []);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn off_by_more_is_refused() {
    let pki = Pki::new();
    let behind = -660;
    let beyond = 25 * 3600;
    for (off, refusal) in [(behind, Refusal::NotYetValid), (beyond, Refusal::Expired)] {
        let is_why = |error: &Error| match refusal {
            Refusal::Expired => {
                matches!(error, Error::InvalidCertificate(CertificateError::ExpiredContext { .. }))
            }
            _ => matches!(error, Error::InvalidCertificate(CertificateError::NotValidYetContext { .. })),
        };
        // The agent's clock.
        let agent = skewed(off);
        agent.trust(&pki.bundle());
        let mut served = serve(&agent).await;
        assert!(call(&served, &pki.controller()).await.is_err());
        let mut connection = connect(served.address, NODE, &pki.controller()).await.unwrap();
        assert!(connection.attest(v1::Term::default()).await.is_err());
        assert_eq!(served.refused(2).await, [refusal; 2], "server {off}");
        let (now, day) = (SystemTime::now(), Duration::from_secs(24 * 3600));
        let own = pki.authority.sign(&node(NODE), None, agent.public_key(), now, day);
        let refused = agent.install(own.unwrap(), &node(NODE)).unwrap_err();
        assert!(
            matches!(&refused, InstallError::Invalid(error) if is_why(error)),
            "server {off}: {refused:?}"
        );

        // The caller's.
        let served = serve(&pki.node(NODE, LOOPBACK)).await;
        let caller = skewed(off);
        caller.trust(&pki.bundle());
        let connection = connect(served.address, NODE, &caller).await.unwrap();
        let why = connection.peer().unwrap_err();
        assert!(matches!(why, Unverified::Certificate(error) if is_why(error)), "client {off}: {why:?}");
        assert!(get(&blob_client(&caller).unwrap(), served.uri("peer")).await.unwrap_err().is_connect());
        assert_eq!(served.requests(), 0);
        goes_on(&served, &pki).await;
    }
}
