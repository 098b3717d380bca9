//! Who is refused, and what for; and that it harms nobody else.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rcgen::ExtendedKeyUsagePurpose::ServerAuth;
use rustls::{AlertDescription, Error};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tote_rpc::identity::{Identity, Role};
use tote_rpc::testing::Pki;
use tote_rpc::{Refusal, blob_client};

use super::node;
use super::played::{LOOPBACK, NODE, Served, call, get, goes_on, serve};
use super::raw::{BOTH, Forged, client, dial, params, rest};

async fn serving(pki: &Pki) -> Served {
    serve(&pki.node(NODE, LOOPBACK)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_that_an_identity_can_be() {
    let pki = Pki::new();
    let mut served = serving(&pki).await;
    let stranger = |identity: Arc<Identity>| {
        identity.trust(&pki.bundle());
        identity
    };
    let controller = &Role::Controller;
    let callers = [
        ("of another authority", stranger(Pki::new().controller()), Refusal::UnknownAuthority),
        ("not certified", stranger(Identity::new().unwrap()), Refusal::UnknownAuthority),
        ("expired", pki.between(controller, None, (-1000, -10)), Refusal::Expired),
        ("not valid yet", pki.between(controller, None, (100, 1000)), Refusal::NotYetValid),
        ("a node, expired", pki.between(&node("m"), None, (-1000, -10)), Refusal::Expired),
    ];
    let mut told = Vec::new();
    for (who, caller, refusal) in callers {
        assert!(call(&served, &caller).await.is_err(), "{who}");
        told.push(refusal);
        assert_eq!(served.refused(told.len()).await, told, "{who}");
        let blobs = blob_client(&caller).unwrap();
        assert!(get(&blobs, served.uri("peer")).await.is_err(), "{who}");
        // TLS is over for the caller before the answerer has seen its certificate: the answer is what fails.
        told.push(refusal);
        assert_eq!(served.refused(told.len()).await, told, "{who}");
        goes_on(&served, &pki).await;
    }
    assert_eq!(served.requests(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_with_other_certificates() {
    let pki = Pki::new();
    let mut served = serving(&pki).await;
    let (one, other) = ("spiffe://tote.dev/node/m", "spiffe://tote.dev/controller");
    let forged = |uris: &[&str]| Some(Forged::by(&pki, params(uris, BOTH)));
    let above = Forged::by(&pki, params(&[one], BOTH));
    let callers = [
        ("no certificate", None, Refusal::NoCertificate),
        ("no role", forged(&[]), Refusal::BadCertificate),
        ("two roles", forged(&[one, other]), Refusal::BadCertificate),
        ("one role twice", forged(&[other, other]), Refusal::BadCertificate),
        ("a role of others", forged(&["spiffe://other.dev/controller"]), Refusal::BadCertificate),
        ("no node", forged(&["spiffe://tote.dev/node/"]), Refusal::BadCertificate),
        ("not for calling", Some(Forged::by(&pki, params(&[other], &[ServerAuth]))), Refusal::BadCertificate),
        ("signed by a node", Some(Forged::below(&above, params(&[other], BOTH))), Refusal::BadCertificate),
    ];
    let mut told = Vec::new();
    for (who, shown, refusal) in callers {
        let mut stream = dial(served.address, client(&pki, shown.as_ref(), b"http/1.1")).await.unwrap();
        let _ = stream.write_all(b"GET /peer HTTP/1.1\r\nhost: n\r\n\r\n").await;
        let (answer, end) = rest(&mut stream).await;
        assert!(answer.is_empty(), "{who}: {answer:?}");
        if shown.is_none() {
            let error = end.unwrap_err().downcast::<Error>().unwrap();
            assert_eq!(error, Error::AlertReceived(AlertDescription::CertificateRequired));
        }
        told.push(refusal);
        assert_eq!(served.refused(told.len()).await, told, "{who}");
        goes_on(&served, &pki).await;
    }
    assert_eq!(served.requests(), 0);
    let mut good = dial(served.address, client(&pki, Some(&above), b"http/1.1")).await.unwrap();
    good.write_all(b"GET /peer HTTP/1.1\r\nhost: n\r\nconnection: close\r\n\r\n").await.unwrap();
    assert!(
        rest(&mut good).await.0.ends_with(one.as_bytes()),
        "what is forged is as good as it is meant to be"
    );
}

/// The beginning of a conversation in TLS 1.2 (RFC 5246, section 7.4.1.2), by a client that knows no later version.
fn hello_of_tls_1_2() -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([5; 32]);
    // No session; TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256; no compression.
    body.extend([0, 0, 2, 0xc0, 0x2b, 1, 0]);
    // supported_groups: secp256r1; signature_algorithms: ecdsa_secp256r1_sha256.
    body.extend([0, 16, 0, 10, 0, 4, 0, 2, 0, 23, 0, 13, 0, 4, 0, 2, 4, 3]);
    let length = |n: usize| u16::try_from(n).unwrap().to_be_bytes();
    let handshake = [&[1, 0][..], &length(body.len()), &body].concat();
    [&[22, 3, 1][..], &length(handshake.len()), &handshake].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_tls_1_3() {
    let pki = Pki::new();
    let mut served = serving(&pki).await;
    let said: [(&str, Vec<u8>, &[u8]); 4] = [
        ("HTTP/1", b"GET /peer HTTP/1.1\r\nhost: n\r\n\r\n".to_vec(), &[]),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), &[]),
        ("noise", vec![0xff; 4096], &[]),
        // A fatal alert: protocol_version.
        ("TLS 1.2", hello_of_tls_1_2(), &[21, 3, 3, 0, 2, 2, 70]),
    ];
    for (at, (what, bytes, answer)) in said.into_iter().enumerate() {
        let mut stream = TcpStream::connect(served.address).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        let (answered, _) = rest(&mut stream).await;
        assert!(answered.starts_with(answer), "{what}: {answered:?}");
        assert!(!answered.starts_with(b"HTTP"), "{what}: {answered:?}");
        assert_eq!(served.refused(at + 1).await, vec![Refusal::NotTls; at + 1], "{what}");
        goes_on(&served, &pki).await;
    }
    assert_eq!(served.requests(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn handshakes_without_an_end() {
    let pki = Pki::new();
    let mut served = serving(&pki).await;
    let gone = TcpStream::connect(served.address).await.unwrap();
    drop(gone);
    assert_eq!(served.refused(1).await, [Refusal::Unfinished], "one that goes away");
    let begun = Instant::now();
    let mut silent = TcpStream::connect(served.address).await.unwrap();
    let mut half = TcpStream::connect(served.address).await.unwrap();
    half.write_all(&hello_of_tls_1_2()[..20]).await.unwrap();
    goes_on(&served, &pki).await;
    assert_eq!(served.refused(3).await, [Refusal::Unfinished; 3]);
    let took = begun.elapsed();
    assert!((Duration::from_millis(4900)..Duration::from_secs(8)).contains(&took), "{took:?}");
    for stream in [&mut silent, &mut half] {
        assert!(!matches!(stream.read(&mut [0]).await, Ok(1..)), "the connection is closed");
    }
    goes_on(&served, &pki).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_told_that_it_was_refused() {
    let pki = Pki::new();
    for (who, identity) in [
        ("a controller", pki.identity(&Role::Controller, Some(LOOPBACK.parse().unwrap()))),
        ("of another address", pki.node(NODE, "192.0.2.1")),
    ] {
        let mut served = serve(&identity).await;
        let blobs = blob_client(&pki.node("m", "192.0.2.1")).unwrap();
        assert!(get(&blobs, served.uri("peer")).await.is_err(), "{who}");
        assert_eq!((served.refused(1).await, served.requests()), (vec![Refusal::RefusedUs], 0), "{who}");
    }
}
