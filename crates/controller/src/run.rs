//! Wires the parts: watches and sessions feed the state, its decisions are performed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kube::Client;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tote_rpc::identity::Identity;
use tote_rpc::v1;

use crate::ca::{Keeper, Names};
use crate::decide::{Event, Policy, State};
use crate::fleet::{Agents, Enrolment, Fleet, FleetEvent};
use crate::http::Health;
use crate::leader::Term;
use crate::lookup::Upstream;
use crate::notify::Notifier;
use crate::owners::OwnerKind;
use crate::perform::Performer;
use crate::tenure::Tenure;
use crate::watch;

/// Events that may wait for a decision.
const QUEUE: usize = 4096;

/// The most events taken in before one decision.
const BATCH: usize = 1024;

/// What a leader needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What is allowed.
    pub policy: Policy,
    /// The controller's own namespace: the agents' Service is there.
    pub namespace: String,
    /// Name of this pod.
    pub me: String,
    /// Name of the agents' headless Service.
    pub agent_service: String,
    /// Where agents listen.
    pub agent_port: u16,
    /// Service account of the agents.
    pub agent_account: String,
    /// Where the certificate authority is kept.
    pub ca: Names,
    /// The controller's key.
    pub identity: Arc<Identity>,
    /// How long certificates last.
    pub certificate_life: Duration,
    /// How long a grant lasts unless it is given again.
    pub grant_life: Duration,
    /// The webhook, if there is one; it outlives the term.
    pub notifier: Option<Notifier>,
    /// How registries are asked, if [`Policy::look_up`] says that they are.
    pub upstream: Option<Upstream>,
}

/// How far back the clock may be set without notice.
const STEP: Duration = Duration::from_secs(10);

/// Leads for a term until dropped, until its tenure has run out unnoticed (the process was stopped), until
/// the clock is set back (what was noted for a time then lies in a future that may be far: it is best begun
/// anew), or until a watch ends, which none does by itself.
pub async fn lead(client: Client, settings: Settings, (term, tenure): (Term, Tenure), health: Arc<Health>) {
    let client = tenure.fence(client);
    let term = v1::Term { lease_uid: term.lease_uid, lease_transitions: term.transitions };
    let (events, mut incoming) = mpsc::channel(QUEUE);
    let (fleet_events, mut fleet_incoming) = mpsc::channel::<FleetEvent>(QUEUE);
    let agents = Agents::default();
    let stop = CancellationToken::new();
    let _stopped_with_this = stop.clone().drop_guard();
    let identity = settings.identity.clone();
    let (life, ca) = (settings.certificate_life, settings.ca.clone());
    let keeper = Keeper::new(client.clone(), ca, identity.clone(), life, health.clone());
    let account = (settings.namespace.as_str(), settings.agent_account.as_str());
    let mut standing = keeper.standing();
    let enrolment = Enrolment::new(
        client.clone(),
        account,
        term.clone(),
        identity,
        standing.clone(),
        life,
        health.clone(),
    );
    let fleet = Fleet::new(term.clone(), agents.clone(), fleet_events, Arc::new(enrolment), stop);
    let mut watches = JoinSet::new();
    watches.spawn(keeper.run());
    watches.spawn(watch::pods(client.clone(), events.clone()));
    watches.spawn(watch::namespaces(client.clone(), events.clone()));
    watches.spawn(watch::nodes(client.clone(), events.clone()));
    watches.spawn(watch::kubelet::sandboxes(client.clone(), events.clone()));
    watches.spawn(watch::kubelet::secrets(client.clone(), events.clone()));
    watches.spawn(watch::jobs(client.clone(), events.clone()));
    for kind in OwnerKind::ALL {
        watches.spawn(watch::owners(client.clone(), kind, events.clone()));
    }
    let agents_of = (settings.namespace.clone(), settings.agent_service.clone());
    let agents_client = client.clone();
    watches.spawn(async move {
        // Before there is an authority no agent can be spoken to.
        let _ = standing.wait_for(Option::is_some).await;
        watch::agents(agents_client, &agents_of.0, &agents_of.1, settings.agent_port, fleet).await;
    });
    let outputs = (health.clone(), settings.notifier, settings.upstream);
    let mut performer =
        Performer::new(client, &settings.me, (agents, settings.grant_life), term, events, outputs);
    let mut state = State::new(settings.policy);
    let mut again = None;
    let mut clock = Clock { wall: Timestamp::now(), steady: Instant::now() };
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        let alarm = async {
            match again {
                Some(at) => tokio::time::sleep(until(at)).await,
                None => std::future::pending().await,
            }
        };
        let mut due = false;
        tokio::select! {
            n = incoming.recv_many(&mut batch, BATCH) => {
                if n == 0 {
                    return;
                }
            }
            event = fleet_incoming.recv() => {
                let Some(event) = event else { return };
                batch.push(Event::Fleet(event));
                while batch.len() < BATCH && let Ok(event) = fleet_incoming.try_recv() {
                    batch.push(Event::Fleet(event));
                }
            }
            () = alarm => due = true,
            ended = watches.join_next() => {
                tracing::error!(?ended, "a watch ended");
                return;
            }
        }
        let began = Instant::now();
        let now = Timestamp::now();
        if let Some(why) = over(&tenure, &mut clock, now, began) {
            tracing::warn!(%now, "{why}: beginning anew");
            return;
        }
        for event in batch.drain(..) {
            due |= state.apply(event, now);
        }
        if !due {
            continue;
        }
        let decision = state.decide(now);
        again = decision.again;
        for action in decision.actions {
            performer.perform(action);
        }
        if state.is_synced() {
            health.set_synced();
        }
        health.metrics.figures(&state.figures(), began.elapsed().as_secs_f64());
    }
}

/// Why what is known may be acted on no more, if it may not.
fn over(tenure: &Tenure, clock: &mut Clock, wall: Timestamp, steady: Instant) -> Option<&'static str> {
    if !tenure.holds(steady) {
        return Some("the leadership has run out unnoticed");
    }
    clock.is_set_back(wall, steady).then_some("the clock was set back")
}

/// The wall clock, held against one that cannot be set.
struct Clock {
    wall: Timestamp,
    steady: Instant,
}

impl Clock {
    /// Whether the wall clock was set back by more than a moment since the last call.
    fn is_set_back(&mut self, wall: Timestamp, steady: Instant) -> bool {
        let expected = self.wall.checked_add(steady.duration_since(self.steady)).unwrap_or(self.wall);
        *self = Self { wall, steady };
        wall.checked_add(STEP).unwrap_or(Timestamp::MAX) < expected
    }
}

/// How long until a time, at least a moment so that a clock that lags cannot make a busy loop.
fn until(at: Timestamp) -> Duration {
    let left = at.duration_since(Timestamp::now());
    Duration::try_from(left).unwrap_or_default().max(Duration::from_millis(5))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_over_once_the_tenure_has_run_out_or_the_clock_goes_back() {
        let (wall, steady) = (Timestamp::from_second(1_800_000_000).unwrap(), Instant::now());
        let (tenure, mut clock) = (Tenure::default(), Clock { wall, steady });
        let mut over_at = |tenure: &Tenure, wall_seconds: i64, steady_seconds: u64| {
            let wall = wall + jiff::SignedDuration::from_secs(wall_seconds);
            over(tenure, &mut clock, wall, steady + Duration::from_secs(steady_seconds))
        };
        let run_out = Some("the leadership has run out unnoticed");
        assert_eq!(over_at(&tenure, 0, 0), run_out, "never confirmed");
        tenure.confirm(steady, Duration::from_secs(6));
        assert_eq!(over_at(&tenure, 5, 5), None);
        assert_eq!(over_at(&tenure, 6, 6), run_out, "the process was stopped meanwhile");
        tenure.confirm(steady + Duration::from_secs(6), Duration::from_secs(6));
        assert_eq!(over_at(&tenure, 7, 7), None, "it was confirmed again");
        assert_eq!(over_at(&tenure, -60, 8), Some("the clock was set back"));
        assert_eq!(over_at(&tenure, -59, 9), None, "once");
        tenure.end();
        assert_eq!(over_at(&tenure, -58, 10), run_out);
    }

    #[test]
    fn a_clock_that_goes_back_is_noticed_and_one_that_is_slewed_is_not() {
        let (wall, steady) = (Timestamp::from_second(1_800_000_000).unwrap(), Instant::now());
        let mut clock = Clock { wall, steady };
        let mut at = |wall_seconds: i64, steady_seconds: u64| {
            let wall = wall + jiff::SignedDuration::from_secs(wall_seconds);
            clock.is_set_back(wall, steady + Duration::from_secs(steady_seconds))
        };
        assert!(!at(60, 60), "they go together");
        assert!(!at(115, 120), "a few seconds are no matter");
        assert!(!at(4000, 180), "forward neither: all that was waited for is due");
        assert!(at(500, 240));
        assert!(!at(560, 300), "once");
    }
}
