//! `SalvageJob`s: what is known of one, what to do next about it (`plan`), whose turn it is (`schedule`), and
//! how its status reads (`status`). Pure: time is an argument, effects are values.

mod job;
mod plan;
mod schedule;
pub mod status;
mod target;

pub use job::{Job, MAX_HELD_BY, Progress, Run, Source, Wanted, base_name, counter};
pub use plan::{Plan, Step, plan};
pub use schedule::{Agent, Assignment, Demand, Limits, MAX_SOURCES, Turn, schedule};

use jiff::{SignedDuration, Timestamp};

/// The moment `seconds` after `t`.
pub fn after(t: Timestamp, seconds: i64) -> Timestamp {
    t.checked_add(SignedDuration::from_secs(seconds)).unwrap_or(Timestamp::MAX)
}
