//! What the sources of a transfer are told: that its target may read the image, for a while, again and again until the
//! transfer ends.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::future::join_all;
use tokio::time::timeout;
use tonic::{Code, Status};
use tote_rpc::v1;

use super::agents::Agents;
use super::inventory::NodeName;

/// How long an agent may take to answer.
const CALL: Duration = Duration::from_secs(5);

/// The grants of one transfer.
#[derive(Clone)]
pub struct Grants {
    agents: Agents,
    request: v1::GrantRequest,
    life: Duration,
    /// By source: the session in which it was last asked, if it was.
    asked: BTreeMap<NodeName, Option<u64>>,
    /// Those that may not have the image yet, for a transfer brings it there.
    relays: BTreeSet<NodeName>,
}

impl Grants {
    /// For the sources of a transfer to a node; nothing is granted yet. Each grant lasts for `life`, whole seconds.
    pub fn new(agents: Agents, import: &v1::ImportRequest, target: &str, life: Duration) -> Self {
        let request = v1::GrantRequest {
            term: import.term.clone(),
            transfer_id: import.transfer_id.clone(),
            node_name: target.to_owned(),
            digest: import.digest.clone(),
            seconds: i64::try_from(life.as_secs()).unwrap_or(i64::MAX),
            expected: false,
        };
        let asked = import.sources.iter().map(|source| (source.node_name.as_str().into(), None)).collect();
        let relays = import.sources.iter().filter(|source| source.relay);
        let relays = relays.map(|source| source.node_name.as_str().into()).collect();
        Self { agents, request, life, asked, relays }
    }

    /// Asks every source at once; returns those that do not grant it, each with the reason.
    pub async fn give(&mut self) -> Vec<(NodeName, String)> {
        let calls = self.asked.keys().map(|node| {
            let (node, session) = (node.clone(), self.agents.session(node));
            let request = v1::GrantRequest {
                expected: self.relays.contains(node.as_ref() as &str),
                ..self.request.clone()
            };
            async move {
                let Some((number, mut client)) = session else {
                    return (node, None, Err("has no session".to_owned()));
                };
                let answer = timeout(CALL, client.grant(request)).await;
                let answer = answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer")));
                let outcome = match answer {
                    Ok(_) => Ok(()),
                    // An agent of the version before reads no grants, and asks for none.
                    Err(status) if status.code() == Code::Unimplemented => Ok(()),
                    Err(status) => Err(status.message().to_owned()),
                };
                (node, Some(number), outcome)
            }
        });
        let mut refused = Vec::new();
        for (node, session, outcome) in join_all(calls).await {
            self.asked.insert(node.clone(), session);
            if let Err(reason) = outcome {
                refused.push((node, reason));
            }
        }
        refused
    }

    /// Gives them again for good: before they run out, and at once to a source that has a new session, for an agent that
    /// was started again knows of none.
    pub async fn keep(&mut self) {
        let mut sessions = self.agents.changes();
        loop {
            tokio::select! {
                () = tokio::time::sleep(self.life / 3) => {}
                _ = sessions.wait_for(|_| self.is_new_session()) => {}
            }
            for (node, reason) in self.give().await {
                tracing::info!(%node, transfer = self.request.transfer_id, reason, "grant not renewed");
            }
        }
    }

    fn is_new_session(&self) -> bool {
        self.asked.iter().any(|(node, asked)| {
            let now = self.agents.session(node).map(|(number, _)| number);
            now.is_some() && now != *asked
        })
    }

    /// Those of these sources that another list of sources has no more, to be taken back.
    #[must_use]
    pub fn without(mut self, other: &Self) -> Self {
        self.asked.retain(|node, _| !other.asked.contains_key(node));
        self
    }

    /// Takes them back. One that cannot be reached forgets them by itself.
    pub async fn revoke(self) {
        let revoked =
            self.asked.keys().filter_map(|node| self.agents.session(node)).map(|(_, mut client)| {
                let request = v1::RevokeRequest {
                    term: self.request.term.clone(),
                    transfer_id: self.request.transfer_id.clone(),
                };
                async move {
                    let _ = timeout(CALL, client.revoke(request)).await;
                }
            });
        join_all(revoked).await;
    }
}
