//! A pod that has the controller take it for an agent: it is asked which pod it is, and nothing else, whatever token it
//! has got hold of. Alone, since a node whose agent has no session makes the controller hesitate over other images.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, bail, ensure};
use axum::Router;
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config, ResourceExt as _};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status, Streaming};
use tote_e2e::cluster::Cluster;
use tote_e2e::operator;
use tote_rpc::Refusal;
use tote_rpc::identity::Identity;
use tote_rpc::v1::{self, agent_server};

use crate::attacker::{Attacker, NOBODY, Normal};
use crate::known::{Agent, all_connected, objects, of_leader};
use crate::play::Play;
use crate::stage::{Alone, SOON, Scenario};

/// The agents' service and service account.
const AGENTS: &str = "tote-agent";

/// What agents' tokens are for.
const AUDIENCE: &str = "tote";

/// How often it is asked in each case, at least: to be refused once does not help at the second try.
const TRIES: u64 = 2;

pub fn all() -> Vec<Scenario> {
    vec![Scenario::new("attack_with_a_stolen_token", "n1", "n2", stolen_token).alone(Alone::Operator)]
}

/// What is played, and what it hears.
#[derive(Clone, Default)]
struct Rogue {
    /// What it answers when it is asked who it is; nothing, and it refuses to say.
    token: Arc<Mutex<Option<String>>>,
    asked: Arc<Mutex<Vec<&'static str>>>,
}

impl Rogue {
    fn hear(&self, what: &'static str) {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).push(what);
    }

    fn has(&self, token: Option<String>) {
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) = token;
    }

    /// What it has heard since this was asked last.
    fn heard(&self) -> Vec<&'static str> {
        std::mem::take(&mut *self.asked.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn never<T>(&self, what: &'static str) -> Result<Response<T>, Status> {
        self.hear(what);
        Err(Status::unimplemented("played"))
    }
}

#[tonic::async_trait]
impl agent_server::Agent for Rogue {
    type SessionStream = BoxStream<v1::SessionResponse>;
    type ImportStream = BoxStream<v1::ImportEvent>;

    async fn session(
        &self,
        _: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        self.never("Session")
    }

    async fn import(&self, _: Request<v1::ImportRequest>) -> Result<Response<Self::ImportStream>, Status> {
        self.never("Import")
    }

    async fn cancel(&self, _: Request<v1::CancelRequest>) -> Result<Response<v1::CancelResponse>, Status> {
        self.never("Cancel")
    }

    async fn attest(&self, _: Request<v1::AttestRequest>) -> Result<Response<v1::AttestResponse>, Status> {
        self.hear("Attest");
        let token = self.token.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let token = token.ok_or_else(|| Status::unavailable("no token"))?;
        Ok(Response::new(v1::AttestResponse { token }))
    }

    async fn certify(&self, _: Request<v1::CertifyRequest>) -> Result<Response<v1::CertifyResponse>, Status> {
        self.never("Certify")
    }

    async fn grant(&self, _: Request<v1::GrantRequest>) -> Result<Response<v1::GrantResponse>, Status> {
        self.never("Grant")
    }

    async fn revoke(&self, _: Request<v1::RevokeRequest>) -> Result<Response<v1::RevokeResponse>, Status> {
        self.never("Revoke")
    }

    async fn remove(&self, _: Request<v1::RemoveRequest>) -> Result<Response<v1::RemoveResponse>, Status> {
        self.never("Remove")
    }
}

/// One way to be taken for an agent.
struct Case {
    what: &'static str,
    token: Option<String>,
    /// UID of the pod that the endpoint is said to be of.
    pod: String,
    /// What enrolments it counts as; one of these.
    results: &'static [&'static str],
}

/// An agent's token is good for nothing but to tell the controller who it is.
async fn no_rights(client: &Client, cluster: &Cluster, agent: &Agent) -> Result<()> {
    let token =
        token(client, (operator::NAMESPACE, AGENTS), (&agent.pod, &agent.uid), Some(AUDIENCE)).await?;
    let options = KubeConfigOptions::default();
    let server = Config::from_custom_kubeconfig(Kubeconfig::read_from(cluster.kubeconfig())?, &options);
    let mut config = server.await?;
    config.auth_info = AuthInfo { token: Some(token.into()), ..AuthInfo::default() };
    let pods: Api<Pod> = objects(&Client::try_from(config)?);
    match pods.list(&ListParams::default()).await {
        Err(kube::Error::Api(status)) if status.code == 401 => Ok(()),
        other => bail!("the API server answers an agent's token with {other:?}, not 401"),
    }
}

async fn stolen_token(play: Play) -> Result<()> {
    let attacker = Attacker::enter(&play, "n2").await?;
    no_rights(&play.tenant.client(), play.cluster(), attacker.agent("n1")?).await?;
    let normal = Normal::prepare(&play, "tiny").await?;
    let client = play.tenant.client();
    let identity = Identity::new()?;
    identity.trust(&attacker.stolen.trusted);
    let (rogue, stop) = (Rogue::default(), CancellationToken::new());
    let _stopped = stop.clone().drop_guard();
    let listener = attacker.listen(9090).await?;
    let heard = rogue.clone();
    let refusing = Arc::new(move |refusal: Refusal| {
        // Whom it refuses itself, it cannot deceive.
        eprintln!("the rogue has refused somebody: {}", refusal.label());
    });
    let app = Router::new().fallback(move || {
        heard.hear("HTTP");
        std::future::ready(http::StatusCode::NOT_FOUND)
    });
    tokio::spawn(tote_rpc::serve(listener, identity, rogue.clone(), app, refusing, stop));

    let ghost = make_ghost(&client).await?;
    let outcome = every_case(&play, &attacker, &rogue, &ghost).await;
    let pods: Api<Pod> = objects(&client);
    // Whatever has come of it, and perhaps its node's absence was noticed before.
    let gone = pods.delete(&ghost.name_any(), &DeleteParams::default().grace_period(0)).await;
    outcome?;
    match gone {
        Err(kube::Error::Api(status)) if !status.is_not_found() => {
            return Err(kube::Error::Api(status).into());
        }
        Err(kube::Error::Api(_)) | Ok(_) => {}
        Err(error) => return Err(error.into()),
    }
    normal.works().await
}

async fn every_case(play: &Play, attacker: &Attacker<'_>, rogue: &Rogue, ghost: &Pod) -> Result<()> {
    let client = play.tenant.client();
    let (tenant, victim) = (play.tenant.namespace(), attacker.agent("n1")?);
    let (own_name, own) = (attacker.pod.name_any(), attacker.pod.uid().unwrap_or_default());
    let (ghost_name, ghost_uid) = (ghost.name_any(), ghost.uid().unwrap_or_default());
    let theirs = (operator::NAMESPACE, AGENTS);
    let stolen = token(&client, theirs, (&victim.pod, &victim.uid), Some(AUDIENCE)).await?;
    let cases = [
        // The first: before the pod is removed for its node's absence, within a minute.
        Case {
            what: "the token and the pod of an agent that is said to be of that node, from another address",
            token: Some(token(&client, theirs, (&ghost_name, &ghost_uid), Some(AUDIENCE)).await?),
            pod: ghost_uid.clone(),
            results: &["other_address"],
        },
        Case {
            what: "the token of n1's agent, from another pod",
            token: Some(stolen.clone()),
            pod: own.clone(),
            results: &["other_pod"],
        },
        Case {
            what: "the token and the pod of n1's agent, for another node",
            token: Some(stolen),
            pod: victim.uid.clone(),
            results: &["other_node"],
        },
        Case {
            what: "the tenant's own token, of the right audience",
            token: Some(token(&client, (tenant, "default"), (&own_name, &own), Some(AUDIENCE)).await?),
            pod: own.clone(),
            results: &["service_account"],
        },
        Case {
            what: "a token of the agents' account that is for the API server",
            token: Some(token(&client, theirs, (&victim.pod, &victim.uid), None).await?),
            pod: victim.uid.clone(),
            results: &["token", "audience"],
        },
        Case {
            what: "what is no token",
            token: Some("e30.e30.none".to_owned()),
            pod: victim.uid.clone(),
            results: &["token"],
        },
        Case { what: "no token", token: None, pod: victim.uid.clone(), results: &["no_token"] },
    ];
    for case in cases {
        let what = case.what;
        let slices: Api<EndpointSlice> = objects(&client);
        let outcome = play_case(play, attacker, rogue, case).await;
        let gone = slices.delete("tote-agent-rogue", &DeleteParams::default()).await;
        outcome.with_context(|| what.to_owned())?;
        gone.context("deleting the rogue's EndpointSlice")?;
    }
    Ok(())
}

/// Leads the controller to the rogue, and waits until it has turned away again.
async fn play_case(play: &Play, attacker: &Attacker<'_>, rogue: &Rogue, case: Case) -> Result<()> {
    let client = play.tenant.client();
    let names: Vec<String> =
        case.results.iter().map(|result| format!("tote_enrolments_total{{result=\"{result}\"}}")).collect();
    let count = || async {
        let mut sum = 0;
        for name in &names {
            sum += of_leader(&client, name).await?;
        }
        Ok::<_, anyhow::Error>(sum)
    };
    rogue.has(case.token);
    rogue.heard();
    let before = count().await?;
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": "tote-agent-rogue",
            "labels": {
                "kubernetes.io/service-name": AGENTS,
                "endpointslice.kubernetes.io/managed-by": "attacker",
            },
        },
        "addressType": "IPv4",
        "ports": [{ "name": "grpc", "port": 9090, "protocol": "TCP" }],
        "endpoints": [{
            "addresses": [attacker.stolen.address.to_string()],
            "nodeName": NOBODY,
            "conditions": { "ready": true, "serving": true, "terminating": false },
            "targetRef": {
                "kind": "Pod", "namespace": operator::NAMESPACE, "name": "tote-agent-rogue", "uid": case.pod,
            },
        }],
    });
    let slices: Api<EndpointSlice> = objects(&client);
    slices.create(&PostParams::default(), &serde_json::from_value(slice)?).await?;
    let look = || async {
        let now = count().await?;
        ensure!(now >= before + TRIES, "{now} are counted");
        Ok(Some(now))
    };
    let results = case.results.join(" or ");
    let what = format!("{TRIES} enrolments more than {before} to end as {results}: {}", case.what);
    let now = play.tenant.until(&what, SOON, look).await;
    let heard = rogue.heard();
    let now = now.with_context(|| format!("the rogue was asked for {heard:?}"))?;
    println!("{}: {results} went from {before} to {now}", case.what);
    ensure!(
        heard.len() as u64 >= TRIES && heard.iter().all(|call| *call == "Attest"),
        "the rogue was asked for {heard:?}, and is to be asked for Attest {TRIES} times or more, and for nothing else"
    );
    all_connected(play).await.context("the rogue is no agent with a session")
}

/// A token of an account that is bound to a pod, for an audience or for the API server.
async fn token(
    client: &Client,
    (namespace, account): (&str, &str),
    (pod, uid): (&str, &str),
    audience: Option<&str>,
) -> Result<String> {
    let request: TokenRequest = serde_json::from_value(json!({
        "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "metadata": {},
        "spec": {
            "audiences": audience.into_iter().collect::<Vec<_>>(),
            "expirationSeconds": 3600,
            "boundObjectRef": { "apiVersion": "v1", "kind": "Pod", "name": pod, "uid": uid },
        },
    }))?;
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
    let made = accounts.create_token_request(account, &PostParams::default(), &request).await;
    let made = made.with_context(|| format!("a token of {namespace}/{account} for pod {pod}"))?;
    made.status.and_then(|status| status.token).context("the API server answers without a token")
}

/// A pod of the agents' account on the node that does not exist, where nothing runs it: it never has an address.
async fn make_ghost(client: &Client) -> Result<Pod> {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "tote-agent-ghost" },
        "spec": {
            "nodeName": NOBODY,
            "serviceAccountName": AGENTS,
            "tolerations": [{ "operator": "Exists" }],
            "containers": [{ "name": "main", "image": "registry.test/none:v1" }],
        },
    });
    let pods: Api<Pod> = objects(client);
    let made = pods.create(&PostParams::default(), &serde_json::from_value(pod)?).await;
    made.context("a pod of the agents' account on a node that does not exist")
}
