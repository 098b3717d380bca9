//! How many there may be, and how much of what they say is taken in.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;
use tonic::Request;
use tote_rpc::testing::Pki;
use tote_rpc::{Refusal, connect, v1};

use super::played::{LOOPBACK, NODE, SOON, Served, call, goes_on, serve};
use super::raw::{Forged, client, dial, rest_within};

/// Those that have yet to show a certificate, at most; and connections of one node.
const UNKNOWN: usize = 128;
const PER_NODE: usize = 32;

/// How many connections a test may open, by how many files a process may.
fn crowd() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
    let files = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let files: usize = files.split_whitespace().next().unwrap().parse().unwrap_or(usize::MAX);
    if files >= 4000 { 2000 } else { 600 }
}

#[tokio::test(flavor = "multi_thread")]
async fn those_who_say_nothing_keep_nobody_out() {
    let pki = Pki::new();
    let mut served = serve(&pki.node(NODE, LOOPBACK)).await;
    let (address, count) = (served.address, crowd());
    let controller = pki.controller();
    let opening = tokio::spawn(async move {
        let mut all = Vec::new();
        for _ in 0..count {
            all.push(TcpStream::connect(address).await.unwrap());
        }
        all
    });
    // While they come one may have to give way to them, and gets in when it comes again.
    let gets_in = async { while call(&served, &controller).await.is_err() {} };
    timeout(Duration::from_secs(3), gets_in).await.expect("the controller is kept out");
    let all = timeout(SOON, opening).await.unwrap().unwrap();
    let gets_in = timeout(Duration::from_secs(3), call(&served, &controller)).await;
    assert_eq!(gets_in, Ok(Ok(())), "while {} are open", all.len());
    let told = served.refused(count - UNKNOWN).await;
    assert!(told.len() >= count - UNKNOWN && told.iter().all(|told| *told == Refusal::Crowded), "{told:?}");
}

async fn of_node(pki: &Pki, served: &Served, name: &str) -> TlsStream<TcpStream> {
    let (forged, _) = Forged::of_node(pki, name, 1000);
    dial(served.address, client(pki, Some(&forged), b"http/1.1")).await.unwrap()
}

/// Whether it gets an answer, which may be long.
async fn answered(stream: &mut TlsStream<TcpStream>, path: &str) -> bool {
    let _ = stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: n\r\n\r\n").as_bytes()).await;
    matches!(timeout(SOON, stream.read(&mut [0; 64])).await.expect("no answer"), Ok(1..))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_has_so_many_connections() {
    let pki = Pki::new();
    let mut served = serve(&pki.node(NODE, LOOPBACK)).await;
    let mut held = Vec::new();
    for at in 0..PER_NODE {
        let mut stream = of_node(&pki, &served, "m").await;
        assert!(answered(&mut stream, "/pieces").await, "{at}");
        held.push(stream);
    }
    assert_eq!(served.refusals(), []);
    assert!(!answered(&mut of_node(&pki, &served, "m").await, "/peer").await);
    assert_eq!(served.refused(1).await, [Refusal::TooMany]);
    assert!(
        answered(&mut of_node(&pki, &served, "other").await, "/peer").await,
        "another node is not kept out"
    );
    goes_on(&served, &pki).await;
    assert_eq!(served.refusals().len(), 1);
    drop(held.pop());
    let again = async { while !answered(&mut of_node(&pki, &served, "m").await, "/peer").await {} };
    timeout(SOON, again).await.expect("its place comes back");
}

/// Lines of a head without an end, each so long.
fn lines(length: usize) -> impl Iterator<Item = Vec<u8>> {
    let line = [b"x: ", "x".repeat(length - 5).as_bytes(), b"\r\n"].concat();
    std::iter::once(b"GET /peer HTTP/1.1\r\n".to_vec()).chain(std::iter::repeat(line))
}

/// What comes back to one who sends these, and when the connection is closed.
async fn sent(
    stream: TlsStream<TcpStream>,
    parts: impl Iterator<Item = Vec<u8>>,
    pace: Duration,
) -> (Vec<u8>, Duration) {
    let begun = Instant::now();
    let (mut from, mut to) = tokio::io::split(stream);
    let sending = async {
        let mut pace = tokio::time::interval(pace);
        for part in parts {
            pace.tick().await;
            if to.write_all(&part).await.is_err() {
                break;
            }
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        (answer, _) = rest_within(&mut from, Duration::from_secs(20)) => (answer, begun.elapsed()),
        () = sending => unreachable!("it waits for the answer"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_is_no_longer_than_16_kib() {
    const TIGHT: Duration = Duration::from_micros(1);
    let pki = Pki::new();
    let served = serve(&pki.node(NODE, LOOPBACK)).await;
    let fits = lines(1000).take(15).chain([b"host: n\r\nconnection: close\r\n\r\n".to_vec()]);
    let (answer, _) = sent(of_node(&pki, &served, "m").await, fits, TIGHT).await;
    assert!(answer.starts_with(b"HTTP/1.1 200 "), "{answer:?}");
    for (length, count) in [(1000, 18), (1000, usize::MAX), (20, usize::MAX), (17_000, 2)] {
        let (answer, took) = sent(of_node(&pki, &served, "m").await, lines(length).take(count), TIGHT).await;
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 431 "), "{length}: {answer:?}");
        assert!(took < Duration::from_secs(5), "{length}: {took:?}");
    }
    assert_eq!(served.requests(), 1);

    // HTTP/2 has no lines, but fields.
    let mut client = connect(served.address, NODE, &pki.controller()).await.unwrap().into_client().unwrap();
    for (length, fits) in [(15_000, true), (17_000, false)] {
        let mut request = Request::new(v1::CancelRequest::default());
        request.metadata_mut().insert("x", "x".repeat(length).parse().unwrap());
        assert_eq!(client.cancel(request).await.is_ok(), fits, "{length}");
    }
    goes_on(&served, &pki).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_takes_no_longer_than_10_s() {
    let pki = Pki::new();
    let served = serve(&pki.node(NODE, LOOPBACK)).await;
    let second = Duration::from_secs(1);
    let once = |said: &'static str| std::iter::once(said.as_bytes().to_vec());
    let bytes = |said: &'static str| said.bytes().chain(std::iter::repeat(b'x')).map(|byte| vec![byte]);
    let of_node = || of_node(&pki, &served, "m");
    let all = futures::join!(
        sent(of_node().await, bytes("GET /"), second),
        sent(of_node().await, once("GET /peer HTTP/1.1\r\nhost: n\r\n\r\n").chain(bytes("GET /")), second),
        sent(of_node().await, bytes("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), second),
        sent(of_node().await, std::iter::empty(), second),
        sent(of_node().await, once("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), second),
    );
    let all = [all.0, all.1, all.2, all.3, all.4];
    for (at, (answer, took)) in all.into_iter().enumerate() {
        // The second asks once as it should.
        assert_eq!(answer.starts_with(b"HTTP/1.1 200 "), at == 1, "{at}: {answer:?}");
        assert!((Duration::from_secs(9)..Duration::from_secs(14)).contains(&took), "{at}: {took:?}");
    }
    assert_eq!(served.requests(), 1);
    goes_on(&served, &pki).await;
}
