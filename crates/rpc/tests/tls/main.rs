//! What the listener of an agent and its callers make of each other: who is let in, who is believed, and how many.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod changes;
mod clocks;
mod expiry;
mod limits;
mod played;
mod raw;
mod refusals;
mod whoever;

use tote_rpc::identity::{Peer, Role};
use tote_rpc::testing::Pki;
use tote_rpc::{Refusal, blob_client, connect, v1};

use played::{LARGE, NODE, get, goes_on, serve, serve_on, whole};

fn node(name: &str) -> Role {
    Role::Node(name.into())
}

#[tokio::test(flavor = "multi_thread")]
async fn those_of_one_authority_find_each_other() {
    let pki = Pki::new();
    for ip in [played::LOOPBACK, "::1"] {
        let identity = pki.node(NODE, ip);
        let Ok(served) = serve_on(ip, &identity).await else {
            assert_eq!(ip, "::1", "this machine has no loopback");
            continue;
        };
        let connection = connect(served.address, NODE, &pki.controller()).await.unwrap();
        let peer = connection.peer().unwrap().clone();
        assert_eq!((&peer.role, Some(&peer)), (&node(NODE), identity.certified().borrow().as_ref()));
        assert!(connection.is_issued_by(&pki.authority) && !connection.is_issued_by(&Pki::new().authority));
        assert_eq!(connection.public_key().as_deref(), Some(identity.public_key()));
        let mut client = connection.into_client().unwrap();
        client.cancel(v1::CancelRequest::default()).await.unwrap();

        let blobs = blob_client(&pki.node("m", "192.0.2.1")).unwrap();
        let response = get(&blobs, served.uri("peer")).await.unwrap();
        assert_eq!(response.extensions().get::<Peer>(), Some(&peer), "who answered");
        assert_eq!(whole(response).await.unwrap(), "spiffe://tote.dev/node/m", "who asked");
        let large = get(&blobs, served.uri("large")).await.unwrap();
        assert_eq!(whole(large).await.unwrap().len(), LARGE);
        assert_eq!((served.refusals(), served.requests()), (vec![], 2));
        served.stopped().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_are_asked_by_https_and_by_address_alone() {
    let pki = Pki::new();
    let served = serve(&pki.node(NODE, played::LOOPBACK)).await;
    let blobs = blob_client(&pki.node("m", "192.0.2.1")).unwrap();
    let (port, address) = (served.address.port(), served.address);
    for uri in [format!("http://{address}/peer"), format!("https://localhost:{port}/peer")] {
        assert!(get(&blobs, uri.parse().unwrap()).await.is_err(), "{uri}");
    }
    assert_eq!((served.refusals(), served.requests()), (vec![], 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_control_plane_is_the_controllers_alone() {
    let pki = Pki::new();
    let mut served = serve(&pki.node(NODE, played::LOOPBACK)).await;
    let proto = include_str!("../../../../proto/tote/v1/agent.proto");
    let rpcs = proto.lines().filter(|line| line.trim_start().starts_with("rpc ")).count();
    let other = pki.node("m", "192.0.2.1");
    for rpc in 0.. {
        let mut to = connect(served.address, NODE, &other).await.unwrap().into_client().unwrap();
        let answer = match rpc {
            0 => to.session(futures::stream::empty()).await.map(drop),
            1 => to.import(v1::ImportRequest::default()).await.map(drop),
            2 => to.cancel(v1::CancelRequest::default()).await.map(drop),
            3 => to.attest(v1::AttestRequest::default()).await.map(drop),
            4 => to.certify(v1::CertifyRequest::default()).await.map(drop),
            5 => to.grant(v1::GrantRequest::default()).await.map(drop),
            6 => to.revoke(v1::RevokeRequest::default()).await.map(drop),
            7 => to.remove(v1::RemoveRequest::default()).await.map(drop),
            _ => {
                assert_eq!(rpc, rpcs, "every call that there is");
                break;
            }
        };
        assert_eq!(answer.unwrap_err().code(), tonic::Code::PermissionDenied, "call {rpc}");
        assert_eq!(served.refused(rpc + 1).await, vec![Refusal::Role; rpc + 1]);
    }
    goes_on(&served, &pki).await;
}
