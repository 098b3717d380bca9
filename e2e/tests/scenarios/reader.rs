//! Whoever has a node's key commands nobody, and reads from agents what was granted to that node, while it is granted.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use tokio::time::timeout;
use tonic::Code;
use tote_e2e::images::{Descriptor, Image};
use tote_e2e::registry::Control as _;
use tote_image::Digest;
use tote_rpc::identity::Role;
use tote_rpc::{BlobClient, v1};

use crate::attacker::{Attacker, NOBODY, Normal, Stolen};
use crate::attacks::{calls, every_call};
use crate::known::Agent;
use crate::play::Play;
use crate::stage::{SOON, Scenario};

pub fn all() -> Vec<Scenario> {
    vec![Scenario::new("attack_with_a_nodes_name", "n1", "n2", with_a_nodes_name).with("n3")]
}

fn nobody() -> Role {
    Role::Node(NOBODY.into())
}

async fn with_a_nodes_name(play: Play) -> Result<()> {
    let attacker = Attacker::enter(&play, "n2").await?;
    let other = play.image_seeded("tiny", "other")?;
    let (tagged, _) = play.push_as(&other, "other").await?;
    play.pull_on("other", "n1", &tagged).await?;
    // Large enough that it does not fit into any buffer on the way.
    let normal = Normal::prepare(&play, "random-64").await?;
    let commanded = attacker.agent("n3")?;
    let (to, stolen) = (commanded.clone(), attacker.stolen.clone());
    let attack = attacker.inside(move || {
        let due = (Code::PermissionDenied, "may not call this");
        every_call(to, stolen.certified(&nobody()), stolen.term.clone(), due)
    });
    attacker.refused(commanded, ("role", calls() as u64), "every call, by a node", attack).await?;

    let source = attacker.agent("n1")?;
    let (granted, others) = (paths(&normal.image)?, paths(&other)?);
    let registry = play.registry.upstream().name();
    let tag = |tag: &str| format!("/v2/other/manifests/{tag}?ns={registry}");
    let absent = Digest::sha256(play.tenant.namespace().as_bytes());
    let absent = |part: &str| format!("/v2/other/{part}/{absent}");
    let alike = [
        (others[0].0.clone(), absent("manifests")),
        (others[1].0.clone(), absent("blobs")),
        (tag("v1"), tag("v2")),
    ];
    let all: Vec<String> = granted.iter().chain(&others).map(|(path, _)| path.clone()).collect();
    // Each pair is asked for twice over, by HEAD and by GET.
    let times = (all.len() + 4 * alike.len()) as u64;
    let reader = Reads { stolen: attacker.stolen.clone(), agent: source.clone() };
    let own = reader.clone();
    let attack = attacker.inside(move || own.nothing(all, alike));
    attacker.refused(source, ("grant", times), "reading without a grant", attack).await?;

    let times = (granted.len() + others.len()) as u64;
    let (own, image) = (reader.clone(), normal.image.digest().to_owned());
    let attack = attacker.inside(move || own.what_is_granted(image, granted, others));
    attacker.refused(source, ("grant", times), "reading beside a grant and after it", attack).await?;
    let (own, image) = (reader.clone(), normal.image.clone());
    let attack = attacker.inside(move || own.until_it_runs_out(image));
    attacker.refused(source, ("grant", 1), "reading after a grant of 2 s", attack).await?;
    let image = normal.image.clone();
    attacker.inside(move || reader.until_it_is_revoked(image)).await.context("reading on after Revoke")?;
    normal.works().await
}

/// The paths of all that a node needs of an image, each with its digest, the manifest first.
fn paths(image: &Image) -> Result<Vec<(String, Digest)>> {
    let needed = image.needed()?.into_iter().enumerate();
    let path = |(at, blob): (usize, Descriptor)| {
        let part = if at == 0 { "manifests" } else { "blobs" };
        Ok((format!("/v2/other/{part}/{}", blob.digest), blob.digest.parse()?))
    };
    needed.map(path).collect()
}

/// Reads from an agent in the name of [`NOBODY`], and speaks to it as the leader does.
#[derive(Clone)]
struct Reads {
    stolen: Stolen,
    agent: Agent,
}

impl Reads {
    fn client(&self) -> Result<BlobClient> {
        Ok(tote_rpc::blob_client(&self.stolen.certified(&nobody()))?)
    }

    async fn ask(&self, client: &BlobClient, method: Method, path: &str) -> Result<http::Response<Incoming>> {
        let uri = format!("https://{}{path}", self.agent.address);
        let request = Request::builder().method(method.clone()).uri(uri).body(Empty::<Bytes>::new())?;
        let answer = timeout(SOON, client.request(request)).await;
        Ok(answer.with_context(|| format!("{method} {path}: no answer"))??)
    }

    async fn whole(
        &self,
        client: &BlobClient,
        method: Method,
        path: &str,
    ) -> Result<(StatusCode, HeaderMap, Bytes)> {
        let (head, body) = self.ask(client, method, path).await?.into_parts();
        let body = timeout(SOON, body.collect()).await.with_context(|| format!("{path} does not end"))??;
        Ok((head.status, head.headers, body.to_bytes()))
    }

    async fn denied(&self, client: &BlobClient, path: &str) -> Result<()> {
        let (status, _, body) = self.whole(client, Method::GET, path).await?;
        let body = String::from_utf8_lossy(&body[..body.len().min(300)]).into_owned();
        let is_denied = status == StatusCode::FORBIDDEN && body.contains("DENIED");
        ensure!(is_denied, "GET {path} is to be answered 403 DENIED, not {status}: {}", body.escape_debug());
        Ok(())
    }

    /// Grants an image for a while.
    async fn grant(&self, image: &str, seconds: i64) -> Result<i64> {
        let request = v1::GrantRequest {
            term: Some(self.stolen.term.clone()),
            transfer_id: "attack".to_owned(),
            node_name: NOBODY.to_owned(),
            digest: image.to_owned(),
            seconds,
            expected: false,
        };
        let granted = self.stolen.lead(&self.agent).await?.grant(request).await;
        Ok(granted.context("Grant, by a leader")?.into_inner().blobs)
    }

    async fn revoke(&self) -> Result<()> {
        let (term, transfer_id) = (Some(self.stolen.term.clone()), "attack".to_owned());
        let request = v1::RevokeRequest { term, transfer_id };
        let revoked = self.stolen.lead(&self.agent).await?.revoke(request).await;
        ensure!(revoked.context("Revoke, by a leader")?.into_inner().found, "Revoke finds no grant");
        Ok(())
    }

    /// Is denied all that there is; and what there is, is not told from what there is not.
    async fn nothing(self, all: Vec<String>, alike: [(String, String); 3]) -> Result<()> {
        let client = self.client()?;
        for path in &all {
            self.denied(&client, path).await?;
        }
        for (there, absent) in &alike {
            for method in [Method::HEAD, Method::GET] {
                let mut one = self.whole(&client, method.clone(), there).await?;
                let mut other = self.whole(&client, method.clone(), absent).await?;
                one.1.remove(header::DATE);
                other.1.remove(header::DATE);
                ensure!(one.0 == StatusCode::FORBIDDEN, "{method} {there} is answered {}, not 403", one.0);
                ensure!(one == other, "{method} {there} and {absent} differ:\n{one:?}\n{other:?}");
            }
        }
        Ok(())
    }

    /// Reads all of the one image, nothing of the other, and nothing at all once it is revoked.
    async fn what_is_granted(
        self,
        image: String,
        granted: Vec<(String, Digest)>,
        others: Vec<(String, Digest)>,
    ) -> Result<()> {
        let client = self.client()?;
        let blobs = self.grant(&image, 60).await?;
        ensure!(blobs == i64::try_from(granted.len())?, "{blobs} blobs are granted, of {}", granted.len());
        for (path, digest) in &granted {
            let (status, _, body) = self.whole(&client, Method::GET, path).await?;
            ensure!(status == StatusCode::OK, "GET {path} is answered {status} though it is granted");
            ensure!(Digest::sha256(&body) == *digest, "GET {path} gives {} other bytes", body.len());
        }
        for (path, _) in &others {
            self.denied(&client, path).await.context("another image than the one that is granted")?;
        }
        self.revoke().await?;
        for (path, _) in &granted {
            self.denied(&client, path).await.context("after Revoke")?;
        }
        Ok(())
    }

    /// A grant of 2 s lasts that long, and not much longer.
    async fn until_it_runs_out(self, image: Image) -> Result<()> {
        let (client, path) = (self.client()?, &paths(&image)?[0].0);
        // The connection stands by then: on a busy machine to make one takes longer than the grant lasts.
        self.denied(&client, path).await?;
        let begun = Instant::now();
        self.grant(image.digest(), 2).await?;
        let mut reads = 0;
        loop {
            let (status, ..) = self.whole(&client, Method::GET, path).await?;
            let lasted = begun.elapsed();
            match status {
                StatusCode::OK => reads += 1,
                StatusCode::FORBIDDEN => {
                    let is_due = reads > 0 && lasted >= Duration::from_secs(2);
                    ensure!(is_due, "a grant of 2 s is over after {lasted:?} and {reads} reads");
                    return Ok(());
                }
                other => bail!("GET {path} is answered {other} during a grant"),
            }
            ensure!(lasted < Duration::from_secs(10), "a grant of 2 s still holds after {lasted:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// A blob that is being read is cut off.
    async fn until_it_is_revoked(self, image: Image) -> Result<()> {
        let client = self.client()?;
        let largest = image.needed()?.into_iter().max_by_key(|blob| blob.size).context("no blobs")?;
        self.grant(image.digest(), 60).await?;
        let path = format!("/v2/other/blobs/{}", largest.digest);
        let answer = self.ask(&client, Method::GET, &path).await?;
        ensure!(answer.status() == StatusCode::OK, "GET {path} is answered {}", answer.status());
        let (mut body, mut read, mut is_revoked) = (answer.into_body(), 0, false);
        loop {
            let frame = timeout(SOON, body.frame()).await;
            let frame =
                frame.with_context(|| format!("{path} neither goes on nor ends after {read} bytes"))?;
            match frame {
                Some(Ok(frame)) => read += frame.data_ref().map_or(0, Bytes::len),
                Some(Err(error)) => {
                    ensure!(is_revoked, "{path} breaks off before the grant is revoked: {error}");
                    println!("{read} of {} bytes were read of a blob whose grant ended", largest.size);
                    return Ok(());
                }
                None => bail!("all {read} bytes of {path} are given though the grant was revoked meanwhile"),
            }
            if !is_revoked {
                self.revoke().await?;
                is_revoked = true;
            }
        }
    }
}
