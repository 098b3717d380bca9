//! Leadership by a `coordination.k8s.io/v1` Lease, as client-go's leader election has it: a candidate takes
//! over when the record has not changed for its duration by the candidate's own clock, so that clocks that
//! differ do not matter. Must not know what a leader does.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::tenure::Tenure;

/// How long a record holds without being renewed.
const DURATION: Duration = Duration::from_secs(10);

/// A leader that could not renew for this long stops acting, well before another may take over.
const RENEW_DEADLINE: Duration = Duration::from_secs(6);

/// Between two looks at the record, or two renewals.
const PERIOD: Duration = Duration::from_secs(1);

/// How long one look or one write may take.
const CALL: Duration = Duration::from_secs(2);

/// A leader stops before another may start, even if its last renewal hangs.
const _: () = assert!(RENEW_DEADLINE.as_secs() + PERIOD.as_secs() + CALL.as_secs() < DURATION.as_secs());

/// One leadership. A later one under the same Lease has more transitions; a Lease that was deleted and made
/// again has another UID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Term {
    /// `metadata.uid` of the Lease.
    pub lease_uid: String,
    /// `spec.leaseTransitions` of the Lease.
    pub transitions: i64,
}

/// What to do about a record.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// It is ours: renew it.
    Renew,
    /// It is free, or was not renewed in time: take it.
    Take,
    /// Somebody else leads.
    Wait,
}

/// Decides over a record that has stood unchanged for so long.
fn evaluate(spec: &LeaseSpec, unchanged: Duration, me: &str) -> Verdict {
    let holder = spec.holder_identity.as_deref().unwrap_or("");
    let seconds = spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok());
    let duration = seconds.map_or(DURATION, Duration::from_secs);
    if holder == me {
        Verdict::Renew
    } else if holder.is_empty() || unchanged >= duration {
        Verdict::Take
    } else {
        Verdict::Wait
    }
}

/// The record that a verdict leads to.
fn next(spec: &LeaseSpec, verdict: &Verdict, me: &str, now: Timestamp) -> LeaseSpec {
    let taken = *verdict == Verdict::Take;
    let before = spec.lease_transitions.unwrap_or_else(|| floor(now));
    LeaseSpec {
        holder_identity: Some(me.to_owned()),
        lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
        lease_transitions: Some(if taken { before.saturating_add(1) } else { before }),
        acquire_time: if taken { Some(MicroTime(now)) } else { spec.acquire_time.clone() },
        renew_time: Some(MicroTime(now)),
        ..spec.clone()
    }
}

/// The count of a record that has none, or has lost it: higher than any that agents can have heard of, for a `replace`
/// of the chart's Lease empties it and keeps its UID. Seconds since 2020, which is beyond a century of elections.
fn floor(now: Timestamp) -> i32 {
    i32::try_from(now.as_second().saturating_sub(1_577_836_800).max(0)).unwrap_or(i32::MAX - (1 << 20))
}

/// A candidate for the leadership.
pub struct Leader {
    leases: Api<Lease>,
    lease: String,
    me: String,
    /// The record last seen, and since when it has stood unchanged.
    seen: Option<(String, Instant)>,
    /// The record as this candidate last wrote it.
    held: Option<Lease>,
}

impl Leader {
    /// A candidate called `me` (the pod's name: a restarted container goes on leading) for a Lease.
    pub fn new(client: Client, namespace: &str, lease: &str, me: &str) -> Self {
        let leases = Api::namespaced(client, namespace);
        Self { leases, lease: lease.to_owned(), me: me.to_owned(), seen: None, held: None }
    }

    /// Stands for election until `stop`, then gives the Lease back. `terms` has the term while this candidate
    /// leads, `None` while it does not; it turns to `None` before anyone else may take over, unless the process is
    /// stopped: then `tenure` has ended when it goes on.
    pub async fn run(mut self, terms: watch::Sender<Option<Term>>, tenure: Tenure, stop: CancellationToken) {
        let mut renewed = None;
        while !stop.is_cancelled() {
            let asked = Instant::now();
            match timeout(CALL, self.step()).await {
                Ok(Ok(Some(term))) => {
                    renewed = Some(asked);
                    tenure.confirm(asked.into_std(), RENEW_DEADLINE);
                    terms.send_if_modified(|held| {
                        let changed = held.as_ref() != Some(&term);
                        if changed {
                            tracing::info!(lease = self.lease, transitions = term.transitions, "leading");
                            *held = Some(term);
                        }
                        changed
                    });
                }
                Ok(Ok(None)) => renewed = None,
                Ok(Err(error)) => {
                    tracing::warn!(lease = self.lease, %error, "cannot read or write the Lease");
                }
                Err(_) => tracing::warn!(lease = self.lease, "the API server does not answer"),
            }
            if renewed.is_none_or(|at| at.elapsed() >= RENEW_DEADLINE) {
                tenure.end();
                terms.send_if_modified(|held| {
                    if held.is_some() {
                        tracing::warn!(lease = self.lease, "no longer leading");
                    }
                    held.take().is_some()
                });
            }
            let _ = timeout(PERIOD, stop.cancelled()).await;
        }
        tenure.end();
        let led = terms.send_replace(None).is_some();
        if led && let Ok(Err(error)) = timeout(CALL, self.release()).await {
            tracing::warn!(lease = self.lease, %error, "cannot give the Lease back");
        }
    }

    async fn step(&mut self) -> kube::Result<Option<Term>> {
        // Who leads renews by one call: the resourceVersion tells whether anybody has written since.
        if let Some(lease) = self.held.clone() {
            match self.write(lease, &Verdict::Renew).await? {
                None => self.held = None,
                term => return Ok(term),
            }
        }
        let Some(lease) = self.leases.get_opt(&self.lease).await? else {
            let metadata = ObjectMeta { name: Some(self.lease.clone()), ..ObjectMeta::default() };
            let spec = next(&LeaseSpec::default(), &Verdict::Take, &self.me, Timestamp::now());
            let made = Lease { metadata, spec: Some(spec) };
            return match self.leases.create(&PostParams::default(), &made).await {
                Ok(lease) => Ok(Some(self.term_of(lease))),
                Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(None),
                Err(error) => Err(error),
            };
        };
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        let since = match &self.seen {
            Some((seen, since)) if *seen == version => *since,
            _ => Instant::now(),
        };
        self.seen = Some((version, since));
        let spec = lease.spec.clone().unwrap_or_default();
        let verdict = evaluate(&spec, since.elapsed(), &self.me);
        if verdict == Verdict::Wait {
            return Ok(None);
        }
        self.write(lease, &verdict).await
    }

    /// Writes the record that a verdict over `lease` leads to; none if somebody else has written meanwhile, or deleted it.
    async fn write(&mut self, lease: Lease, verdict: &Verdict) -> kube::Result<Option<Term>> {
        let spec = lease.spec.clone().unwrap_or_default();
        let spec = Some(next(&spec, verdict, &self.me, Timestamp::now()));
        // The resourceVersion goes along: of two candidates one gets a conflict.
        match self.leases.replace(&self.lease, &PostParams::default(), &Lease { spec, ..lease }).await {
            Ok(lease) => Ok(Some(self.term_of(lease))),
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn term_of(&mut self, lease: Lease) -> Term {
        self.seen = lease.metadata.resource_version.clone().map(|version| (version, Instant::now()));
        self.held = Some(lease.clone());
        Term {
            lease_uid: lease.metadata.uid.unwrap_or_default(),
            transitions: lease.spec.and_then(|spec| spec.lease_transitions).unwrap_or(0).into(),
        }
    }

    async fn release(&self) -> kube::Result<()> {
        let Some(lease) = self.leases.get_opt(&self.lease).await? else { return Ok(()) };
        let spec = lease.spec.clone().unwrap_or_default();
        if spec.holder_identity.as_deref() != Some(&self.me) {
            return Ok(());
        }
        let spec = Some(LeaseSpec { holder_identity: Some(String::new()), ..spec });
        self.leases.replace(&self.lease, &PostParams::default(), &Lease { spec, ..lease }).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    fn held(by: &str) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(by.to_owned()),
            lease_duration_seconds: Some(10),
            lease_transitions: Some(3),
            ..LeaseSpec::default()
        }
    }

    #[test]
    fn verdicts() {
        let seconds = Duration::from_secs;
        for (spec, unchanged, verdict) in [
            (held("me"), 0, Verdict::Renew),
            (held("me"), 100, Verdict::Renew),
            (held("other"), 9, Verdict::Wait),
            (held("other"), 10, Verdict::Take),
            (held(""), 0, Verdict::Take),
            (LeaseSpec::default(), 0, Verdict::Take),
            (LeaseSpec { lease_duration_seconds: None, ..held("other") }, 9, Verdict::Wait),
            (LeaseSpec { lease_duration_seconds: Some(-1), ..held("other") }, 9, Verdict::Wait),
        ] {
            assert_eq!(evaluate(&spec, seconds(unchanged), "me"), verdict, "{spec:?} after {unchanged} s");
        }
    }

    #[test]
    fn an_emptied_record_goes_on_above_what_it_was() {
        let at = |time: &str| time.parse::<Timestamp>().unwrap();
        let count = |now| next(&LeaseSpec::default(), &Verdict::Take, "me", now).lease_transitions.unwrap();
        let first = count(at("2026-01-01T00:00:00Z"));
        assert!(count(at("2026-01-01T00:01:00Z")) > first + 5, "after five more elections within a minute");
        assert!(count(at("2090-01-01T00:00:00Z")) > first);
    }

    #[test]
    fn taking_counts_and_renewing_does_not() {
        let now = Timestamp::UNIX_EPOCH;
        let taken = next(&held("other"), &Verdict::Take, "me", now);
        assert_eq!((taken.lease_transitions, taken.holder_identity.as_deref()), (Some(4), Some("me")));
        let later = now + Duration::from_secs(1);
        let renewed = next(&taken, &Verdict::Renew, "me", later);
        assert_eq!(renewed.lease_transitions, Some(4));
        assert_eq!(renewed.acquire_time, taken.acquire_time);
        assert_ne!(renewed.renew_time, taken.renew_time);
    }

    type Shared<T> = Arc<Mutex<T>>;

    /// An API server that holds one Lease; says which calls came.
    fn played() -> (Client, Shared<Vec<String>>, Shared<Option<Lease>>) {
        let (calls, kept) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(None::<Lease>)));
        let (noted, store) = (calls.clone(), kept.clone());
        let answer = move |request: http::Request<kube::client::Body>| {
            let (noted, store) = (noted.clone(), store.clone());
            async move {
                noted.lock().unwrap().push(request.method().to_string());
                let is_read = request.method() == http::Method::GET;
                let body = request.into_body().collect_bytes().await.unwrap();
                let mut store = store.lock().unwrap();
                let version = |lease: &Lease| lease.metadata.resource_version.clone();
                let code = if is_read {
                    if store.is_some() { 200 } else { 404 }
                } else {
                    let mut lease: Lease = serde_json::from_slice(&body).unwrap();
                    let known = store.as_ref().and_then(version);
                    if version(&lease) == known {
                        let next = known.map_or(1, |known| known.parse::<u64>().unwrap() + 1);
                        lease.metadata.resource_version = Some(next.to_string());
                        lease.metadata.uid = Some("uid".to_owned());
                        *store = Some(lease);
                        200
                    } else {
                        409
                    }
                };
                let status = serde_json::json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                    "message": "", "reason": if code == 409 { "Conflict" } else { "NotFound" }, "code": code});
                let text =
                    if code == 200 { serde_json::to_vec(&*store) } else { serde_json::to_vec(&status) };
                let body = kube::client::Body::from(text.unwrap());
                Ok::<_, std::io::Error>(http::Response::builder().status(code).body(body).unwrap())
            }
        };
        (Client::new(tower::service_fn(answer), "default"), calls, kept)
    }

    #[tokio::test]
    async fn a_leader_renews_by_one_call_and_sees_who_writes_in_between() {
        let (client, calls, kept) = played();
        let mut leader = Leader::new(client, "default", "tote", "me");
        let term = leader.step().await.unwrap().unwrap();
        for _ in 0..2 {
            assert_eq!(leader.step().await.unwrap().unwrap(), term);
        }
        assert_eq!(std::mem::take(&mut *calls.lock().unwrap()), ["GET", "POST", "PUT", "PUT"]);
        if let Some(lease) = kept.lock().unwrap().as_mut() {
            lease.metadata.resource_version = Some("70".to_owned());
            lease.spec = Some(held("other"));
        }
        assert_eq!(leader.step().await.unwrap(), None, "somebody else leads");
        assert_eq!(leader.step().await.unwrap(), None);
        assert_eq!(*calls.lock().unwrap(), ["PUT", "GET", "GET"]);
    }

    /// It is asked whether it holds as of the beginning: that does not change while time passes.
    #[tokio::test]
    async fn a_tenure_holds_while_this_candidate_leads_and_no_longer() {
        let (client, _, kept) = played();
        let (began, tenure, stop) = (std::time::Instant::now(), Tenure::default(), CancellationToken::new());
        let (terms, mut term) = watch::channel(None);
        let leader = Leader::new(client, "default", "tote", "me");
        let running = tokio::spawn(leader.run(terms, tenure.clone(), stop.clone()));
        let mut leads = async |does: bool| {
            let told = timeout(Duration::from_secs(30), term.wait_for(|term| term.is_some() == does));
            told.await.unwrap().unwrap();
        };
        leads(true).await;
        assert!(tenure.holds(began), "whoever hears of the term may act already");
        assert!(!tenure.holds(std::time::Instant::now() + RENEW_DEADLINE), "and for no longer than that");
        let write = |holder: &str, version: &str| {
            let mut kept = kept.lock().unwrap();
            let lease = kept.as_mut().unwrap();
            lease.metadata.resource_version = Some(version.to_owned());
            lease.spec = Some(held(holder));
        };
        write("other", "70");
        leads(false).await;
        assert!(!tenure.holds(began), "somebody else leads");
        write("", "80");
        leads(true).await;
        assert!(tenure.holds(began), "it is free again");
        stop.cancel();
        leads(false).await;
        assert!(!tenure.holds(began), "stopped");
        running.await.unwrap();
        assert_eq!(kept.lock().unwrap().take().unwrap().spec.unwrap().holder_identity.as_deref(), Some(""));
    }
}
