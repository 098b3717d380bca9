//! Which agent gets a certificate: the one whose token is of the very pod that the endpoint is of. Judging is pure, the
//! facts come from the API server.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::core::v1::Pod;
use kube::api::PostParams;
use kube::{Api, Client};
use thiserror::Error;
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;
use tonic::Status;
use tote_rpc::identity::{AuthorityError, Identity, Role};
use tote_rpc::{Connection, v1};

use super::agents::Endpoint;
use crate::ca::Standing;
use crate::http::Health;

/// The audience of agents' tokens: they are good for nothing else.
pub const AUDIENCE: &str = "tote";

/// How many agents the API server is asked about at once.
const AT_ONCE: usize = 16;

/// The longest token that is handed on to the API server, in bytes: its own have about 1 KiB.
const LONGEST_TOKEN: usize = 16 << 10;

/// How long all of it may take, with the wait for a turn.
const DEADLINE: Duration = Duration::from_secs(40);

/// How long a call of the API server may take.
const CALL: Duration = Duration::from_secs(10);

const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// What the API server says of a token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claims {
    /// The user: `system:serviceaccount:<namespace>:<name>`.
    pub user: String,
    /// The pod it was made for.
    pub pod_name: String,
    /// That pod's UID.
    pub pod_uid: String,
    /// The node of that pod; API servers before 1.30 do not say.
    pub node_name: Option<String>,
}

/// What the API server says of that pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Its UID.
    pub uid: String,
    /// The node it is bound to.
    pub node: String,
    /// Its addresses.
    pub addresses: Vec<String>,
}

/// Why an agent gets no certificate although the API server has answered.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refused {
    /// The token is not one that the API server made, or no longer good.
    #[error("the API server does not take the token: {0}")]
    Token(String),
    /// It is for other uses.
    #[error("the token is not of the audience {AUDIENCE}")]
    Audience,
    /// It is somebody else's.
    #[error("the token is of {0}, not of {1}")]
    Account(String, String),
    /// The endpoint is of no pod.
    #[error("the endpoint names no pod")]
    NoPod,
    /// It is of another pod than the endpoint.
    #[error("the token is of pod {0}, the endpoint of one with the UID {1}")]
    OtherPod(String, String),
    /// The pod is on another node than the endpoint says.
    #[error("the pod of the token is on node {0:?}, the endpoint says {1:?}")]
    OtherNode(String, String),
    /// The pod has another address.
    #[error("pod {0} does not have the address {1}")]
    OtherAddress(String, SocketAddr),
}

/// Why an agent got no certificate.
#[derive(Debug, Error)]
pub enum EnrolError {
    /// It handed over no token.
    #[error("the agent hands over no token: {:?}", .0.message())]
    NoToken(Status),
    /// It could not be found out who it is.
    #[error("cannot find out who it is: {0}")]
    Unknown(String),
    /// It is not who it should be.
    #[error("refused: {0}")]
    Refused(#[from] Refused),
    /// The certificate could not be signed.
    #[error(transparent)]
    Sign(#[from] AuthorityError),
    /// It did not take the certificate.
    #[error("the agent does not take its certificate: {:?}", .0.message())]
    NotTaken(Status),
}

impl EnrolError {
    /// The value of the label `result`.
    fn label(&self) -> &'static str {
        match self {
            Self::NoToken(_) => "no_token",
            Self::Unknown(_) => "unknown",
            Self::Refused(Refused::Token(_)) => "token",
            Self::Refused(Refused::Audience) => "audience",
            Self::Refused(Refused::Account(..)) => "service_account",
            Self::Refused(Refused::NoPod | Refused::OtherPod(..)) => "other_pod",
            Self::Refused(Refused::OtherNode(..)) => "other_node",
            Self::Refused(Refused::OtherAddress(..)) => "other_address",
            Self::Sign(_) => "signing",
            Self::NotTaken(_) => "not_taken",
        }
    }
}

/// What a review of a token came to.
pub fn claims(review: &TokenReview) -> Result<Claims, Refused> {
    let status = review.status.clone().unwrap_or_default();
    if status.authenticated != Some(true) {
        let why = status.error.unwrap_or_else(|| "not authenticated".to_owned());
        return Err(Refused::Token(why.chars().take(300).collect()));
    }
    if !status.audiences.iter().flatten().any(|audience| audience == AUDIENCE) {
        return Err(Refused::Audience);
    }
    let user = status.user.unwrap_or_default();
    let extra: BTreeMap<String, Vec<String>> = user.extra.unwrap_or_default();
    let one = |key: &str| extra.get(key).and_then(|values| values.first()).cloned();
    Ok(Claims {
        user: user.username.unwrap_or_default(),
        pod_name: one(POD_NAME).unwrap_or_default(),
        pod_uid: one(POD_UID).unwrap_or_default(),
        node_name: one(NODE_NAME),
    })
}

/// Whether the bearer of a token with these claims, whose pod is where the API server says, is the agent at `endpoint`.
pub fn judge(claims: &Claims, place: &Place, endpoint: &Endpoint, account: &str) -> Result<(), Refused> {
    if claims.user != account {
        return Err(Refused::Account(claims.user.clone(), account.to_owned()));
    }
    let pod = endpoint.pod_uid.as_deref().ok_or(Refused::NoPod)?;
    if claims.pod_uid != pod || place.uid != pod {
        return Err(Refused::OtherPod(claims.pod_name.clone(), pod.to_owned()));
    }
    for node in claims.node_name.iter().chain([&place.node]) {
        if **node != *endpoint.node {
            return Err(Refused::OtherNode(node.clone(), endpoint.node.to_string()));
        }
    }
    let address = endpoint.address.ip();
    if !place.addresses.iter().any(|known| known.parse() == Ok(address)) {
        return Err(Refused::OtherAddress(claims.pod_name.clone(), endpoint.address));
    }
    Ok(())
}

/// Gives agents their certificates.
pub struct Enrolment {
    client: Client,
    namespace: String,
    account: String,
    term: v1::Term,
    /// The controller's own identity.
    pub identity: Arc<Identity>,
    standing: watch::Receiver<Option<Arc<Standing>>>,
    life: Duration,
    health: Arc<Health>,
    at_once: Semaphore,
}

impl Enrolment {
    /// For agents of the service account `account` in `namespace`; their certificates last for `life`.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        client: Client,
        (namespace, account): (&str, &str),
        term: v1::Term,
        identity: Arc<Identity>,
        standing: watch::Receiver<Option<Arc<Standing>>>,
        life: Duration,
        health: Arc<Health>,
    ) -> Self {
        let account = format!("system:serviceaccount:{namespace}:{account}");
        let at_once = Semaphore::new(AT_ONCE);
        Self {
            client,
            namespace: namespace.to_owned(),
            account,
            term,
            identity,
            standing,
            life,
            health,
            at_once,
        }
    }

    /// Who signs and who is trusted.
    pub fn standing(&self) -> watch::Receiver<Option<Arc<Standing>>> {
        self.standing.clone()
    }

    /// Finds out who answers on a connection, and gives it a certificate for the key of that connection.
    pub async fn enrol(
        &self,
        connection: &mut Connection,
        endpoint: &Endpoint,
        standing: &Standing,
    ) -> Result<(), EnrolError> {
        let late = |_| EnrolError::Unknown(format!("it took longer than {DEADLINE:?}"));
        let result =
            timeout(DEADLINE, self.attempt(connection, endpoint, standing)).await.map_err(late).flatten();
        self.health.metrics.enrolment(result.as_ref().map_or_else(EnrolError::label, |()| "signed"));
        result
    }

    async fn attempt(
        &self,
        connection: &mut Connection,
        endpoint: &Endpoint,
        standing: &Standing,
    ) -> Result<(), EnrolError> {
        let token = connection.attest(self.term.clone()).await.map_err(EnrolError::NoToken)?;
        if token.len() > LONGEST_TOKEN {
            return Err(Refused::Token(format!("it has {} bytes", token.len())).into());
        }
        let _turn = self.at_once.acquire().await;
        let claims = claims(&self.review(token).await?)?;
        let place = self.place(&claims).await?;
        judge(&claims, &place, endpoint, &self.account)?;
        let malformed = || EnrolError::Unknown("its certificate is malformed".to_owned());
        let public_key = connection.public_key().ok_or_else(malformed)?;
        let role = Role::Node(endpoint.node.clone());
        let address = Some(endpoint.address.ip());
        let certificate =
            standing.authority().sign(&role, address, &public_key, SystemTime::now(), self.life)?;
        let authorities = standing.bundle();
        let request = v1::CertifyRequest {
            term: Some(self.term.clone()),
            certificate: certificate.to_vec(),
            authorities: authorities.certificates().iter().map(|der| der.to_vec()).collect(),
        };
        connection.certify(request).await.map_err(EnrolError::NotTaken)
    }

    async fn review(&self, token: String) -> Result<TokenReview, EnrolError> {
        let reviews: Api<TokenReview> = Api::all(self.client.clone());
        let spec = TokenReviewSpec { audiences: Some(vec![AUDIENCE.to_owned()]), token };
        let review = TokenReview { spec, ..TokenReview::default() };
        answered(reviews.create(&PostParams::default(), &review)).await
    }

    async fn place(&self, claims: &Claims) -> Result<Place, EnrolError> {
        if claims.pod_name.is_empty() {
            return Ok(Place::default());
        }
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let Some(pod) = answered(pods.get_opt(&claims.pod_name)).await? else { return Ok(Place::default()) };
        let addresses = pod.status.and_then(|status| status.pod_ips).unwrap_or_default();
        Ok(Place {
            uid: pod.metadata.uid.unwrap_or_default(),
            node: pod.spec.and_then(|spec| spec.node_name).unwrap_or_default(),
            addresses: addresses.into_iter().map(|address| address.ip).collect(),
        })
    }
}

async fn answered<T>(call: impl Future<Output = kube::Result<T>>) -> Result<T, EnrolError> {
    let late = |_| EnrolError::Unknown(format!("the API server did not answer within {CALL:?}"));
    timeout(CALL, call).await.map_err(late)?.map_err(|error| EnrolError::Unknown(error.to_string()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const ACCOUNT: &str = "system:serviceaccount:tote-system:tote-agent";

    fn review(status: &serde_json::Value) -> TokenReview {
        serde_json::from_value(json!({"metadata": {}, "spec": {}, "status": status})).unwrap()
    }

    fn good() -> (Claims, Place, Endpoint) {
        let claims = Claims {
            user: ACCOUNT.into(),
            pod_name: "tote-agent-x".into(),
            pod_uid: "u-1".into(),
            node_name: Some("n1".into()),
        };
        let place = Place { uid: "u-1".into(), node: "n1".into(), addresses: vec!["10.0.0.7".into()] };
        let endpoint = Endpoint {
            node: "n1".into(),
            address: "10.0.0.7:9090".parse().unwrap(),
            ready: true,
            pod_uid: Some("u-1".into()),
        };
        (claims, place, endpoint)
    }

    #[test]
    fn a_review_says_who_it_is() {
        let user = json!({"username": ACCOUNT, "extra": {
            POD_NAME: ["tote-agent-x"], POD_UID: ["u-1"], NODE_NAME: ["n1"]}});
        let status = json!({"authenticated": true, "audiences": ["tote"], "user": user});
        assert_eq!(claims(&review(&status)), Ok(good().0));
        let status = json!({"authenticated": false, "error": "token expired"});
        assert_eq!(claims(&review(&status)), Err(Refused::Token("token expired".into())));
        for audiences in [json!([]), json!(["https://kubernetes.default.svc"])] {
            let status = json!({"authenticated": true, "audiences": audiences, "user": user});
            assert_eq!(claims(&review(&status)), Err(Refused::Audience));
        }
        assert!(claims(&review(&json!(null))).is_err());
    }

    #[test]
    fn only_the_agent_of_that_pod_on_that_node_at_that_address_gets_one() {
        let (claims, place, endpoint) = good();
        let judged =
            |claims: &Claims, place: &Place, endpoint: &Endpoint| judge(claims, place, endpoint, ACCOUNT);
        assert_eq!(judged(&claims, &place, &endpoint), Ok(()));
        let old = Claims { node_name: None, ..claims.clone() };
        assert_eq!(judged(&old, &place, &endpoint), Ok(()), "before Kubernetes 1.30");

        let other = Claims { user: "system:serviceaccount:shop:default".into(), ..claims.clone() };
        assert!(matches!(judged(&other, &place, &endpoint), Err(Refused::Account(..))));
        for uid in ["u-2", ""] {
            let other = Claims { pod_uid: uid.into(), ..claims.clone() };
            assert!(matches!(judged(&other, &place, &endpoint), Err(Refused::OtherPod(..))), "stolen");
        }
        let gone = Place::default();
        assert!(matches!(judged(&claims, &gone, &endpoint), Err(Refused::OtherPod(..))));
        let nameless = Endpoint { pod_uid: None, ..endpoint.clone() };
        assert_eq!(judged(&claims, &place, &nameless), Err(Refused::NoPod));
        let moved = Claims { node_name: Some("n2".into()), ..claims.clone() };
        assert!(matches!(judged(&moved, &place, &endpoint), Err(Refused::OtherNode(..))));
        let moved = Place { node: "n2".into(), ..place.clone() };
        assert!(matches!(judged(&old, &moved, &endpoint), Err(Refused::OtherNode(..))));
        let elsewhere = Place { addresses: vec!["10.0.0.8".into()], ..place.clone() };
        assert!(matches!(judged(&claims, &elsewhere, &endpoint), Err(Refused::OtherAddress(..))));
    }
}
