//! Attacks on agents from a tenant's pod: by whoever has no name, and by a leader of before. Each is refused for its
//! reason, which is counted, and salvages go on.

use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::Code;
use tote_image::Digest;
use tote_rpc::identity::{Identity, Role};
use tote_rpc::testing::Pki;
use tote_rpc::v1;

use crate::attacker::{Attacker, Normal, Shown, Stolen, call, knock, other_client};
use crate::known::Agent;
use crate::play::Play;
use crate::stage::{SOON, Scenario};

/// The ports that are tried.
const PORTS: std::ops::RangeInclusive<u16> = 1..=10_000;

pub fn all() -> Vec<Scenario> {
    vec![
        Scenario::new("attack_without_a_name", "n1", "n2", without_a_name).with("n3"),
        Scenario::new("attack_by_an_old_leader", "n1", "n3", by_an_old_leader).with("n2"),
    ]
}

/// What is said by those without a name that counts: what it is, the reason it is refused for, and what is shown.
fn nameless(stolen: &Stolen) -> Result<Vec<(&'static str, &'static str, Shown)>> {
    let between = |from, until| stolen.believing(stolen.pki.between(&Role::Controller, None, (from, until)));
    let identity = |identity: Arc<Identity>| Shown::Identity(stolen.believing(identity));
    let tls = |shown| Ok::<_, anyhow::Error>(Shown::Tls(other_client(&stolen.trusted, shown)?));
    // The authority's own signature, but nothing that says what it is for.
    let key = KeyPair::from_pem(stolen.pki.authority.key_pem())?;
    let issuer = Issuer::from_ca_cert_pem(stolen.pki.authority.certificate_pem(), key)?;
    let (own, mut params) = (KeyPair::generate()?, CertificateParams::default());
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let roleless = params.signed_by(&own, &issuer)?.der().clone();
    let key = rustls::pki_types::PrivateKeyDer::Pkcs8(own.serialize_der().into());
    Ok(vec![
        ("plain HTTP/1", "not_tls", Shown::Plain(b"GET /v2/ HTTP/1.1\r\nhost: agent\r\n\r\n")),
        // With an empty SETTINGS frame (RFC 9113, section 3.4).
        ("plain gRPC", "not_tls", Shown::Plain(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")),
        ("no certificate", "no_certificate", tls(None)?),
        ("another authority's", "unknown_authority", identity(Pki::new().controller())),
        ("nobody's signature", "unknown_authority", identity(Identity::new()?)),
        ("an expired certificate", "expired", Shown::Identity(between(-1000, -10))),
        ("a certificate of the future", "not_yet_valid", Shown::Identity(between(1000, 2000))),
        ("a certificate without a role", "bad_certificate", tls(Some((roleless, key)))?),
    ])
}

async fn without_a_name(play: Play) -> Result<()> {
    let attacker = Attacker::enter(&play, "n2").await?;
    let normal = Normal::prepare(&play, "tiny").await?;
    let attempts = nameless(&attacker.stolen)?;
    for agent in &attacker.agents {
        for (what, reason, shown) in &attempts {
            let (to, shown, term) = (agent.clone(), shown.clone(), attacker.stolen.term.clone());
            let attack = attacker.inside(move || knock(to, shown, term));
            attacker.refused(agent, (reason, 1), what, attack).await?;
        }
    }
    let agent = attacker.agent("n1")?;
    let to = agent.clone();
    let open = attacker.inside(move || open_ports(to)).await.context("trying the ports")?;
    let (health, rpc) = (agent.health().port(), agent.address.port());
    ensure!(open == [health, rpc], "of {PORTS:?} these are open: {open:?}, not just {health} and {rpc}");
    let to = agent.clone();
    attacker.inside(move || in_the_clear(to)).await.with_context(|| format!("asking {}", agent.health()))?;
    normal.works().await
}

/// The ports of an agent's pod that take a connection.
async fn open_ports(agent: Agent) -> Result<Vec<u16>> {
    let ip = agent.address.ip();
    let tries = stream::iter(PORTS).map(|port| async move {
        match timeout(SOON, TcpStream::connect((ip, port))).await {
            Ok(Ok(_)) => Ok(Some(port)),
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused => Ok(None),
            Ok(Err(error)) => Err(error).with_context(|| format!("port {port}")),
            Err(_) => bail!("port {port} neither takes nor refuses a connection"),
        }
    });
    let tries: Vec<Option<u16>> = tries.buffer_unordered(100).try_collect().await?;
    let mut open: Vec<u16> = tries.into_iter().flatten().collect();
    open.sort_unstable();
    Ok(open)
}

/// What is served without TLS: health and metrics, and nothing beside.
async fn in_the_clear(agent: Agent) -> Result<()> {
    let blob = format!("/v2/app/blobs/{}", Digest::sha256(b"any"));
    for (method, path, due) in [
        ("GET", "/healthz", 200),
        ("GET", "/readyz", 200),
        ("GET", "/metrics", 200),
        ("POST", "/metrics", 405),
        ("DELETE", "/metrics", 405),
        ("GET", "/", 404),
        ("GET", "/v2/", 404),
        ("GET", &blob, 404),
        ("GET", "/metrics/../v2/", 404),
        ("GET", "/debug/pprof/", 404),
        ("POST", "/tote.v1.Agent/Attest", 404),
    ] {
        let mut stream = TcpStream::connect(agent.health()).await?;
        let head = "host: agent\r\ncontent-length: 0\r\nconnection: close";
        stream.write_all(format!("{method} {path} HTTP/1.1\r\n{head}\r\n\r\n").as_bytes()).await?;
        let mut answer = Vec::new();
        timeout(SOON, stream.read_to_end(&mut answer))
            .await
            .with_context(|| format!("{method} {path}"))??;
        let answer = String::from_utf8_lossy(&answer);
        let status = answer.split(' ').nth(1).and_then(|status| status.parse::<u16>().ok());
        ensure!(status == Some(due), "{method} {path} is to be answered {due}, not so:\n{answer}");
    }
    Ok(())
}

/// How many calls the control plane has.
pub fn calls() -> usize {
    let proto = include_str!("../../../proto/tote/v1/agent.proto");
    proto.lines().filter(|line| line.trim_start().starts_with("rpc ")).count()
}

/// Makes every call of the control plane; an error unless each is refused with this code and says this.
pub async fn every_call(
    agent: Agent,
    who: Arc<Identity>,
    term: v1::Term,
    (code, says): (Code, &'static str),
) -> Result<()> {
    let mut to = call(&agent, &who).await?;
    let (transfer_id, digest) = ("attack".to_owned(), Digest::sha256(b"any").to_string());
    let (term, node_name) = (Some(term), agent.node.clone());
    let hello = v1::Hello { term: term.clone(), node_name: node_name.clone() };
    let hello = v1::SessionRequest { message: Some(v1::session_request::Message::Hello(hello)) };
    let import = v1::ImportRequest {
        term: term.clone(),
        transfer_id: transfer_id.clone(),
        reference: format!("registry.test/x@{digest}"),
        digest: digest.clone(),
        sources: Vec::new(),
        pulled: None,
        max_bytes: 0,
    };
    let grant = v1::GrantRequest {
        term: term.clone(),
        transfer_id: transfer_id.clone(),
        node_name,
        digest,
        seconds: 60,
        expected: false,
    };
    let certify = v1::CertifyRequest { term: term.clone(), ..v1::CertifyRequest::default() };
    let cancel = v1::CancelRequest { term: term.clone(), transfer_id: transfer_id.clone() };
    let revoke = v1::RevokeRequest { term: term.clone(), transfer_id };
    let remove = v1::RemoveRequest { term: term.clone(), digest: grant.digest.clone() };
    let answers = [
        ("Session", to.session(stream::iter([hello])).await.map(drop)),
        ("Import", to.import(import).await.map(drop)),
        ("Cancel", to.cancel(cancel).await.map(drop)),
        ("Attest", to.attest(v1::AttestRequest { term }).await.map(drop)),
        ("Certify", to.certify(certify).await.map(drop)),
        ("Grant", to.grant(grant).await.map(drop)),
        ("Revoke", to.revoke(revoke).await.map(drop)),
        ("Remove", to.remove(remove).await.map(drop)),
    ];
    ensure!(answers.len() == calls(), "there are {} calls, these are tried: {answers:?}", calls());
    for (call, answer) in answers {
        let Err(status) = answer else { bail!("{call} is obeyed") };
        let is_due = status.code() == code && status.message().contains(says);
        ensure!(is_due, "{call} is to be refused with {code:?} ({says}), not with {status:?}");
    }
    Ok(())
}

/// A controller that led once: its certificate is good, its term is over.
async fn by_an_old_leader(play: Play) -> Result<()> {
    let attacker = Attacker::enter(&play, "n2").await?;
    let normal = Normal::prepare(&play, "tiny").await?;
    for agent in &attacker.agents {
        let (to, stolen) = (agent.clone(), attacker.stolen.clone());
        let attack = attacker.inside(move || {
            let mut term = stolen.term.clone();
            term.lease_transitions -= 1;
            every_call(to, stolen.certified(&Role::Controller), term, (Code::FailedPrecondition, "is over"))
        });
        let what = "every call, by a controller of the term before";
        attacker.refused(agent, ("term", calls() as u64), what, attack).await?;
    }
    normal.works().await
}
