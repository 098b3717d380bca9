//! Whom callers believe, and how a node that nobody knows yet gets its certificate.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::Uri;
use rustls::{CertificateError, Error};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_rustls::TlsAcceptor;
use tote_rpc::identity::{Identity, InstallError, Peer, Role, Unverified};
use tote_rpc::testing::Pki;
use tote_rpc::{blob_client, connect, v1};

use super::node;
use super::played::{LOOPBACK, NODE, TOKEN, call, get, serve, whole};
use super::raw::{BOTH, Forged, params};

const HOUR: Duration = Duration::from_secs(3600);

/// Whether that is why one is not believed.
type Check = fn(&Unverified) -> bool;

/// What a certificate is found fault with for.
fn fault(unverified: &Unverified) -> &CertificateError {
    match unverified {
        Unverified::Certificate(Error::InvalidCertificate(fault)) => fault,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_answers_is_asked_who_it_is_and_nothing_else() {
    use CertificateError as Fault;
    let pki = Pki::new();
    let address = || Some(LOOPBACK.parse().unwrap());
    let uncertified = Identity::new().unwrap();
    let other_authority = Pki::new().node(NODE, LOOPBACK);
    for identity in [&uncertified, &other_authority] {
        identity.trust(&pki.bundle());
    }
    let servers: [(&str, Arc<Identity>, Check); 7] = [
        ("nobody", uncertified, |why| *fault(why) == Fault::UnknownIssuer),
        (
            "another node",
            pki.node("other", LOOPBACK),
            |why| matches!(why, Unverified::OtherRole(role) if *role == node("other")),
        ),
        ("elsewhere", pki.node(NODE, "192.0.2.1"), |why| {
            matches!(fault(why), Fault::NotValidForName | Fault::NotValidForNameContext { .. })
        }),
        ("expired", pki.between(&node(NODE), address(), (-1000, -10)), |why| {
            matches!(fault(why), Fault::Expired | Fault::ExpiredContext { .. })
        }),
        ("not valid yet", pki.between(&node(NODE), address(), (100, 1000)), |why| {
            matches!(fault(why), Fault::NotValidYet | Fault::NotValidYetContext { .. })
        }),
        ("another authority", other_authority, |why| {
            matches!(fault(why), Fault::UnknownIssuer | Fault::BadSignature)
        }),
        ("a controller", pki.identity(&Role::Controller, address()), |why| {
            matches!(fault(why), Fault::InvalidPurpose | Fault::InvalidPurposeContext { .. })
        }),
    ];
    let blobs = blob_client(&pki.node("m", "192.0.2.1")).unwrap();
    for (who, identity, is_why) in servers {
        let served = serve(&identity).await;
        let mut connection = connect(served.address, NODE, &pki.controller()).await.unwrap();
        let why = connection.peer().unwrap_err();
        assert!(is_why(why), "{who}: {why:?}");
        assert_eq!(connection.public_key().as_deref(), Some(identity.public_key()), "{who}");
        assert_eq!(connection.attest(v1::Term::default()).await.unwrap(), TOKEN, "{who}");
        assert!(is_why(&connection.into_client().unwrap_err()), "{who}");

        let answer = get(&blobs, served.uri("peer")).await;
        if who == "another node" {
            // Which node is at an address only the caller knows: the answer says which it was.
            let answer = answer.unwrap();
            assert_eq!(answer.extensions().get::<Peer>().unwrap().role, node("other"));
            assert_eq!(whole(answer).await.unwrap(), "spiffe://tote.dev/node/m");
        } else {
            assert!(answer.unwrap_err().is_connect(), "{who}");
            assert_eq!(served.requests(), 0, "{who}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_asked_of_one_without_a_role() {
    let pki = Pki::new();
    let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
    let uri: Uri = format!("https://{}/", listener.local_addr().unwrap()).parse().unwrap();
    let server = Arc::new(Forged::by(&pki, params(&[], BOTH)).server());
    let (told, read) = oneshot::channel();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = TlsAcceptor::from(server).accept(stream).await.unwrap();
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all).await;
        told.send(all).unwrap();
    });
    let blobs = blob_client(&pki.node("m", "192.0.2.1")).unwrap();
    assert!(get(&blobs, uri).await.unwrap_err().is_connect());
    assert_eq!(read.await.unwrap(), b"", "what it was asked");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_gets_its_certificate() {
    let (pki, later) = (Pki::new(), Pki::new());
    let agent = Identity::new().unwrap();
    agent.trust(&pki.bundle());
    let mut certified = agent.certified();
    assert_eq!(*certified.borrow_and_update(), None);
    let served = serve(&agent).await;
    let controller = pki.controller();

    let mut connection = connect(served.address, NODE, &controller).await.unwrap();
    assert!(connection.peer().is_err());
    let key = connection.public_key().unwrap();
    assert_eq!(key, agent.public_key());
    let sign = |role, ip: &str| {
        let address = Some(ip.parse().unwrap());
        pki.authority.sign(&role, address, &key, SystemTime::now(), HOUR).unwrap().to_vec()
    };
    let request = |certificate| v1::CertifyRequest {
        term: None,
        certificate,
        authorities: vec![pki.authority.certificate().to_vec(), later.authority.certificate().to_vec()],
    };
    let wrong = connection.certify(request(sign(node("other"), LOOPBACK))).await;
    assert_eq!(wrong.unwrap_err().code(), tonic::Code::InvalidArgument);
    assert!(call(&served, &controller).await.is_err(), "still nobody");
    connection.certify(request(sign(node(NODE), LOOPBACK))).await.unwrap();
    assert!(connection.peer().is_err(), "what a connection began with it keeps");

    assert!(certified.has_changed().unwrap());
    let connection = connect(served.address, NODE, &controller).await.unwrap();
    assert_eq!(Some(connection.peer().unwrap()), certified.borrow().as_ref());
    assert_eq!(connection.peer().unwrap().role, node(NODE));
    call(&served, &controller).await.unwrap();
    let next = later.controller();
    next.trust(&pki.bundle());
    call(&served, &next).await.expect("the authority that was handed over beside is believed");
}

#[test]
fn an_identity_takes_its_own_certificates_alone() {
    let (pki, identity, now) = (Pki::new(), Identity::new().unwrap(), SystemTime::now());
    let (own, address) = (identity.public_key(), Some(LOOPBACK.parse().unwrap()));
    let key = Identity::new().unwrap();
    let sign =
        |by: &Pki, role: &Role, key: &[u8], now| by.authority.sign(role, address, key, now, HOUR).unwrap();
    let good = || sign(&pki, &node(NODE), own, now);
    let install = |certificate| identity.install(certificate, &node(NODE)).unwrap_err();
    let why = |error: InstallError| match error {
        InstallError::Invalid(Error::InvalidCertificate(why)) => why,
        other => panic!("{other:?}"),
    };

    assert_eq!(why(install(good())), CertificateError::UnknownIssuer, "nobody is trusted");
    identity.trust(&pki.bundle());
    assert!(matches!(install(sign(&pki, &node(NODE), key.public_key(), now)), InstallError::OtherKey));
    for role in [node("other"), Role::Controller] {
        let error = install(sign(&pki, &role, own, now));
        assert!(
            matches!(&error, InstallError::OtherRole(is, due) if *is == role && *due == node(NODE)),
            "{error}"
        );
    }
    let unknown = why(install(sign(&Pki::new(), &node(NODE), own, now)));
    assert!(
        matches!(unknown, CertificateError::UnknownIssuer | CertificateError::BadSignature),
        "{unknown:?}"
    );
    let expired = why(install(sign(&pki, &node(NODE), own, now - 2 * HOUR)));
    assert!(matches!(expired, CertificateError::ExpiredContext { .. }), "{expired:?}");
    let early = why(install(sign(&pki, &node(NODE), own, now + HOUR)));
    assert!(matches!(early, CertificateError::NotValidYetContext { .. }), "{early:?}");
    assert!(matches!(install(b"none".to_vec().into()), InstallError::OtherKey));
    assert_eq!(*identity.certified().borrow(), None, "none was taken");

    identity.install(good(), &node(NODE)).unwrap();
    let has = identity.certified().borrow().clone();
    assert_eq!(has, Some(Peer::of(&good()).unwrap()));
    install(sign(&pki, &node("other"), own, now));
    assert_eq!(*identity.certified().borrow(), has, "what was refused replaces nothing");
}
