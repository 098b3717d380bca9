//! Connections that outlive the certificate they were begun with.

use std::time::{Duration, Instant, SystemTime};

use http::Request;
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;
use tote_rpc::identity::Role;
use tote_rpc::testing::Pki;
use tote_rpc::{Refusal, connect, v1};

use super::played::{LOOPBACK, NODE, SOON, call, ended, goes_on, pieces, serve};
use super::raw::{Forged, client, dial};

/// Waits until a time has come, and a second more: TLS counts whole ones.
async fn past(time: SystemTime) {
    let left = (time + Duration::from_millis(1500)).duration_since(SystemTime::now()).unwrap_or_default();
    tokio::time::sleep(left).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controllers_streams_end() {
    let pki = Pki::new();
    let mut served = serve(&pki.node(NODE, LOOPBACK)).await;
    let (begun, life) = (Instant::now(), 3);
    let controller = pki.between(&Role::Controller, None, (-1000, life));
    let mut used = connect(served.address, NODE, &controller).await.unwrap().into_client().unwrap();
    let mut session = used.session(futures::stream::pending()).await.unwrap().into_inner();
    let mut idle = connect(served.address, NODE, &controller).await.unwrap().into_client().unwrap();
    idle.cancel(v1::CancelRequest::default()).await.unwrap();

    let end = timeout(Duration::from_secs(14), session.message()).await.expect("the session goes on");
    let took = begun.elapsed();
    assert!(matches!(end, Err(_) | Ok(None)), "{end:?}");
    // It runs out within the third second, is noticed a second later at most, and requests are waited for for 5 s.
    assert!((Duration::from_secs(7)..Duration::from_secs(12)).contains(&took), "{took:?}");
    for client in [&mut used, &mut idle] {
        client.cancel(v1::CancelRequest::default()).await.unwrap_err();
    }
    assert_eq!(served.refusals(), [], "neither has come again by itself");
    assert!(call(&served, &controller).await.is_err());
    assert_eq!(served.refused(1).await, [Refusal::Expired]);
    goes_on(&served, &pki).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_finishes_what_it_reads() {
    let pki = Pki::new();
    let served = serve(&pki.node(NODE, LOOPBACK)).await;
    let (forged, end) = Forged::of_node(&pki, "m", 3);
    let stream = dial(served.address, client(&pki, Some(&forged), b"http/1.1")).await.unwrap();
    let (mut asks, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    let connection = tokio::spawn(connection);
    let ask = |path: &str| Request::get(path).header("host", "n").body(Empty::<bytes::Bytes>::new()).unwrap();
    let first = asks.send_request(ask("/peer")).await.unwrap();
    first.into_body().collect().await.unwrap();
    asks.ready().await.unwrap();
    let mut body = asks.send_request(ask("/pieces")).await.unwrap().into_body();
    pieces(&mut body, 1).await;
    assert!(SystemTime::now() < end, "this machine is too slow");

    // Longer than a controller's streams would be waited for.
    past(end + Duration::from_secs(6)).await;
    served.pieces.add_permits(10);
    pieces(&mut body, 10).await;
    served.pieces.close();
    ended(&mut body).await;
    assert_eq!(served.requests(), 2);
    let next = async {
        asks.ready().await?;
        asks.send_request(ask("/peer")).await
    };
    timeout(SOON, next).await.unwrap().expect_err("the connection is over");
    let _ = timeout(SOON, connection).await.unwrap();
    assert_eq!(served.requests(), 2, "not served");
}

/// A frame (RFC 9113, section 4.1).
fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).unwrap();
    [&[0, 0, length, kind, flags, 0, 0, 0, stream], payload].concat()
}

/// Asks for `/peer` on a stream: a GET by https, in literals of HPACK (RFC 7541, appendix A).
fn ask(stream: u8) -> Vec<u8> {
    frame(1, 5, stream, &[&[0x82, 0x87, 0x04, 5][..], b"/peer", &[0x01, 1], b"n"].concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_does_not_go_is_not_served() {
    let pki = Pki::new();
    let mut served = serve(&pki.node(NODE, LOOPBACK)).await;
    let (forged, end) = Forged::of_node(&pki, "m", 3);
    let mut stream = dial(served.address, client(&pki, Some(&forged), b"h2")).await.unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    // It asks, and never answers the PING by which the server learns that it knows that it is to go.
    stream.write_all(&[frame(4, 0, 0, &[]), ask(1)].concat()).await.unwrap();
    while served.requests() < 1 {
        timeout(SOON, stream.read(&mut [0; 4096])).await.unwrap().unwrap();
    }
    assert!(SystemTime::now() < end, "this machine is too slow");

    past(end + Duration::from_secs(5)).await;
    stream.write_all(&ask(3)).await.unwrap();
    assert_eq!((served.refused(1).await, served.requests()), (vec![Refusal::Expired], 1));
    goes_on(&served, &pki).await;
}
