//! Certificates: given to those who prove to be the agent at an address, and renewed while a session goes on.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::timeout;
use tote_controller::ca::{Ca, Standing};
use tote_controller::fleet::FleetEvent;
use tote_controller::http::Health;
use tote_rpc::identity::{Authorities, Identity, Role};
use tote_rpc::testing::Pki;

use crate::played::{
    DEADLINE, PKI, Played, authority, bench, bench_with, serve, serve_as, standing, until_heard,
};

/// An API server that reviews every token as of one pod, and says where that pod is.
fn api_server(pod_uid: &'static str, node: &'static str, address: &'static str) -> kube::Client {
    let answer = move |request: http::Request<kube::client::Body>| {
        let body = if request.uri().path().ends_with("/tokenreviews") {
            json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "metadata": {}, "spec": {},
                "status": {"authenticated": true, "audiences": ["tote"], "user": {
                    "username": "system:serviceaccount:tote-system:tote-agent",
                    "extra": {"authentication.kubernetes.io/pod-name": ["tote-agent-x"],
                        "authentication.kubernetes.io/pod-uid": [pod_uid]}}}})
        } else {
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "tote-agent-x", "uid": "a-pod"},
                "spec": {"nodeName": node, "containers": []}, "status": {"podIPs": [{"ip": address}]}})
        };
        let body = kube::client::Body::from(serde_json::to_vec::<Value>(&body).unwrap());
        std::future::ready(Ok::<_, std::convert::Infallible>(http::Response::new(body)))
    };
    kube::Client::new(tower::service_fn(answer), "default")
}

/// An agent that has a key and nothing else; it trusts the controller's authority.
fn stranger(node: &'static str) -> (Played, Arc<Identity>) {
    let identity = Identity::new().unwrap();
    identity.trust(&PKI.bundle());
    (Played { identity: Some(identity.clone()), ..Played::new(node) }, identity)
}

#[tokio::test]
async fn an_agent_that_proves_who_it_is_gets_a_certificate_and_a_session() {
    let (played, identity) = stranger("a");
    let (address, _stop) = serve_as(played.clone(), identity.clone(), None).await;
    let health = Arc::<Health>::default();
    let mut bench = bench_with(api_server("a-pod", "a", "127.0.0.1"), PKI.controller(), health.clone());
    bench.endpoints(&[("a", address)]).await;
    assert!(matches!(bench.next().await, FleetEvent::Expected(_)));
    assert!(matches!(bench.next().await, FleetEvent::Up { .. }));
    let heard = played.heard.lock().unwrap().clone();
    assert_eq!(heard[..2], ["attest", "certify with 1 authorities"]);
    let peer = identity.certified().borrow().clone().unwrap();
    assert_eq!(peer.role, Role::Node("a".into()));
    let metrics = health.metrics.text().unwrap();
    assert!(metrics.contains("tote_enrolments_total{result=\"signed\"} 1\n"), "{metrics}");
}

/// What it hands over is of another pod, or that pod is elsewhere: nothing is asked of it but who it is.
#[tokio::test]
async fn an_agent_that_does_not_gets_nothing() {
    for (uid, node, pod_address, result) in [
        ("another-pod", "a", "127.0.0.1", "other_pod"),
        ("a-pod", "b", "127.0.0.1", "other_node"),
        ("a-pod", "a", "127.0.0.2", "other_address"),
    ] {
        let (played, identity) = stranger("a");
        let (address, _stop) = serve_as(played.clone(), identity.clone(), None).await;
        let health = Arc::<Health>::default();
        let client = api_server(uid, node, pod_address);
        let mut bench = bench_with(client, PKI.controller(), health.clone());
        bench.endpoints(&[("a", address)]).await;
        assert!(matches!(bench.next().await, FleetEvent::Expected(_)));
        let counted = async {
            let line = format!("tote_enrolments_total{{result=\"{result}\"}} 2\n");
            while !health.metrics.text().unwrap().contains(&line) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(DEADLINE, counted).await.unwrap_or_else(|_| panic!("{}", health.metrics.text().unwrap()));
        assert!(bench.events.try_recv().is_err(), "{result}");
        assert!(played.heard.lock().unwrap().iter().all(|heard| heard == "attest"), "{result}");
        assert!(identity.certified().borrow().is_none());
    }
}

/// A certificate of the right authority for another node, or another address, is as good as none.
#[tokio::test]
async fn a_certificate_of_another_agent_is_none() {
    for identity in
        [PKI.node("b", "127.0.0.1"), PKI.node("a", "127.0.0.2"), Pki::new().node("a", "127.0.0.1")]
    {
        let played = Played::new("a");
        let (address, _stop) = serve_as(played.clone(), identity, None).await;
        let mut bench = bench();
        bench.endpoints(&[("a", address)]).await;
        assert!(matches!(bench.next().await, FleetEvent::Expected(_)));
        // One of another authority does not take the controller's call either.
        let asked = until_heard(&played, "attest");
        let _ = timeout(Duration::from_secs(2), asked).await;
        assert!(bench.events.try_recv().is_err());
        assert!(played.heard.lock().unwrap().iter().all(|heard| heard == "attest"));
    }
}

/// Another certificate of the controller, or other authorities: a new connection takes the place of the first, and the
/// node is never gone.
#[tokio::test]
async fn a_session_outlives_certificates() {
    let played = Played::new("a");
    let (address, _stop) = serve(played.clone(), None).await;
    let mut bench = bench();
    bench.endpoints(&[("a", address)]).await;
    assert!(matches!(bench.next().await, FleetEvent::Expected(_)));
    assert!(matches!(bench.next().await, FleetEvent::Up { .. }));
    let first = bench.agents.session("a").unwrap().0;
    bench.standings.send_replace(Some(standing(2)));
    let next = bench.next().await;
    assert!(matches!(next, FleetEvent::Up { .. }), "{next:?}");
    assert!(bench.agents.session("a").unwrap().0 > first);
    let hellos = played.heard.lock().unwrap().iter().filter(|heard| heard.contains("Hello")).count();
    assert_eq!(hellos, 2);
}

/// The authority that signs has changed: every agent gets a certificate of the new one, and the authorities to trust.
#[tokio::test]
async fn a_new_authority_reaches_those_with_a_session() {
    let (played, identity) = stranger("a");
    PKI.certify(&identity, &Role::Node("a".into()), Some("127.0.0.1".parse().unwrap()));
    let (address, _stop) = serve_as(played.clone(), identity.clone(), None).await;
    let own = PKI.controller();
    let client = api_server("a-pod", "a", "127.0.0.1");
    let mut bench = bench_with(client, own.clone(), Arc::default());
    bench.endpoints(&[("a", address)]).await;
    assert!(matches!(bench.next().await, FleetEvent::Expected(_)));
    assert!(matches!(bench.next().await, FleetEvent::Up { .. }));
    let other = Pki::new();
    let both = Authorities::from_certificates(vec![
        PKI.authority.certificate().clone(),
        other.authority.certificate().clone(),
    ]);
    own.trust(&both.unwrap());
    let now = jiff::Timestamp::now();
    let signer = Ca::new(authority(&PKI)).stage(authority(&other), now).promote(now);
    let changed = Standing { signer: Arc::new(signer), trusted: 2, own: 1 };
    bench.standings.send_replace(Some(Arc::new(changed)));
    assert!(matches!(bench.next().await, FleetEvent::Up { .. }), "the session goes on");
    until_heard(&played, "certify with 2 authorities").await;
    let connection = tote_rpc::connect(address, "a", &other.controller()).await.unwrap();
    assert!(connection.is_issued_by(&other.authority));
}
