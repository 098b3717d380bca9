//! Authorities and certificates that are replaced: what stands goes on, what begins is verified anew, each time.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::HandshakeKind;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tote_rpc::identity::{Identity, Role};
use tote_rpc::testing::Pki;
use tote_rpc::{Refusal, blob_client, connect, v1};

use super::node;
use super::played::{LOOPBACK, NODE, Served, call, ended, get, goes_on, pieces, serve, whole};
use super::raw::{self, BOTH, Forged, dial, params, rest};

/// Goes over to an authority, as a controller would have it done; both are trusted before and after.
fn go_over(pki: &Pki, identity: &Arc<Identity>, role: &Role) {
    let address = Some(LOOPBACK.parse().unwrap());
    let hour = Duration::from_secs(3600);
    let certificate =
        pki.authority.sign(role, address, identity.public_key(), SystemTime::now(), hour).unwrap();
    identity.install(certificate, role).unwrap();
}

async fn is_of(served: &Served, caller: &Arc<Identity>, pki: &Pki) -> bool {
    let connection = connect(served.address, NODE, caller).await.unwrap();
    connection.peer().unwrap();
    connection.is_issued_by(&pki.authority)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_follows_another_and_nothing_is_cut() {
    let (old, new) = (Pki::new(), Pki::new());
    let both = old.bundle().and(&new.bundle());
    let (agent, controller, other) = (old.node(NODE, LOOPBACK), old.controller(), old.node("m", LOOPBACK));
    let (late, late_agent) = (old.controller(), old.node(NODE, LOOPBACK));
    for identity in [&agent, &controller, &other, &late, &late_agent] {
        identity.trust(&both);
    }
    let (mut served, behind) = (serve(&agent).await, serve(&late_agent).await);
    let mut client = connect(served.address, NODE, &controller).await.unwrap().into_client().unwrap();
    client.cancel(v1::CancelRequest::default()).await.unwrap();
    let blobs = blob_client(&other).unwrap();
    let mut body = get(&blobs, served.uri("pieces")).await.unwrap().into_body();
    pieces(&mut body, 1).await;

    // One at a time, and nobody waits for anybody.
    go_over(&new, &other, &node("m"));
    assert_eq!(
        whole(get(&blobs, served.uri("peer")).await.unwrap()).await.unwrap(),
        "spiffe://tote.dev/node/m"
    );
    assert!(is_of(&served, &controller, &old).await);
    go_over(&new, &agent, &node(NODE));
    assert!(is_of(&served, &controller, &new).await, "new connections show what there is now");
    call(&served, &controller).await.expect("the controller is of the old one, and believed");
    go_over(&new, &controller, &Role::Controller);
    client.cancel(v1::CancelRequest::default()).await.expect("the connection stands");
    // From now on who showed a certificate of the old one is told to come again; what is under way is not cut.
    for identity in [&agent, &controller, &other] {
        identity.trust(&new.bundle());
    }

    assert_eq!(served.refusals(), []);
    served.pieces.add_permits(2);
    pieces(&mut body, 2).await;
    served.pieces.close();
    ended(&mut body).await;
    assert!(is_of(&served, &controller, &new).await);
    let fresh = blob_client(&other).unwrap();
    get(&fresh, served.uri("peer")).await.expect("those of the new authority find each other");

    // What is of the old one is not believed any more, whether it calls or answers.
    assert!(call(&served, &late).await.is_err());
    assert_eq!(served.refused(1).await, [Refusal::UnknownAuthority]);
    let answers = connect(behind.address, NODE, &controller).await.unwrap();
    assert!(answers.is_issued_by(&old.authority) && answers.peer().is_err());
    assert!(get(&fresh, behind.uri("peer")).await.unwrap_err().is_connect());
    assert_eq!(behind.requests(), 0);
    goes_on(&served, &new).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_is_verified_each_time() {
    let pki = Pki::new();
    let agent = pki.node(NODE, LOOPBACK);
    let mut served = serve(&agent).await;
    let controller = pki.controller();
    let resuming =
        raw::client(&pki, Some(&Forged::by(&pki, params(&["spiffe://tote.dev/node/m"], BOTH))), b"http/1.1");
    for _ in 0..2 {
        call(&served, &controller).await.unwrap();
        let mut stream = dial(served.address, resuming.clone()).await.unwrap();
        stream.write_all(b"GET /peer HTTP/1.1\r\nhost: n\r\nconnection: close\r\n\r\n").await.unwrap();
        assert!(rest(&mut stream).await.0.ends_with(b"/m"));
        let (_, tls) = stream.get_ref();
        assert_eq!((tls.handshake_kind(), tls.tls13_tickets_received()), (Some(HandshakeKind::Full), 0));
    }
    agent.trust(&Pki::new().bundle());
    assert!(call(&served, &controller).await.is_err());
    let mut stream = dial(served.address, resuming).await.unwrap();
    let _ = stream.write_all(b"GET /peer HTTP/1.1\r\nhost: n\r\n\r\n").await;
    assert_eq!(rest(&mut stream).await.0, b"");
    assert_eq!(served.refused(2).await, [Refusal::UnknownAuthority; 2]);
    assert_eq!(served.requests(), 2);
}

/// Serves each connection one answer, and tells how its handshake was done.
async fn resumable(
    server: rustls::ServerConfig,
) -> (std::net::SocketAddr, mpsc::UnboundedReceiver<HandshakeKind>) {
    let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (told, kinds) = mpsc::unbounded_channel();
    let server = TlsAcceptor::from(Arc::new(server));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(mut stream) = server.accept(stream).await else { continue };
            told.send(stream.get_ref().1.handshake_kind().unwrap()).unwrap();
            let _ = stream.read(&mut [0; 4096]).await;
            let answer = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok";
            let _ = stream.write_all(answer).await;
            let _ = stream.shutdown().await;
        }
    });
    (address, kinds)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answerer_is_verified_each_time() {
    let pki = Pki::new();
    let forged = Forged::by(&pki, params(&[&format!("spiffe://tote.dev/node/{NODE}")], BOTH));
    let (address, mut kinds) = resumable(forged.server()).await;
    // It would resume, if one wanted to.
    let resuming = raw::client(&pki, None, b"http/1.1");
    for expected in [HandshakeKind::Full, HandshakeKind::Resumed] {
        let mut stream = dial(address, resuming.clone()).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        assert!(rest(&mut stream).await.0.ends_with(b"ok"));
        assert_eq!(kinds.recv().await, Some(expected));
    }
    let other = pki.node("m", LOOPBACK);
    let blobs = blob_client(&other).unwrap();
    let uri = || format!("https://{address}/").parse().unwrap();
    for _ in 0..2 {
        assert_eq!(whole(get(&blobs, uri()).await.unwrap()).await.unwrap(), "ok");
        assert_eq!(kinds.recv().await, Some(HandshakeKind::Full));
    }
    other.trust(&Pki::new().bundle());
    assert!(get(&blobs, uri()).await.unwrap_err().is_connect());
}
