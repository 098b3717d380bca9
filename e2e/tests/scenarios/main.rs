//! Scenarios on one real cluster, side by side where they do not disturb each other.
//!
//! `cargo test -p tote-e2e --test scenarios -- NAME` runs some of them. The cluster is made first, shared, and
//! removed at the end, also after Ctrl-C.

mod access;
mod attacker;
mod attacks;
mod classes;
mod commands;
mod corrupt;
mod crowd;
mod faults;
mod gitops;
mod identity;
mod jobs;
mod known;
mod leaders;
mod nodes;
mod outage;
mod outputs;
mod owners;
mod play;
mod policy;
mod reader;
mod reign;
mod relay;
mod renewal;
mod rogue;
mod several;
mod shapes;
mod stage;
mod values;

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Failed, Trial};
use stage::{Scenario, Stage};

/// A thread for each scenario, unless `--test-threads` says otherwise: the stage itself bounds what plays at once.
const THREADS: usize = 100;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(THREADS);
    let scenarios = [
        outage::all(),
        shapes::all(),
        policy::all(),
        outputs::all(),
        access::all(),
        owners::all(),
        jobs::all(),
        classes::all(),
        commands::all(),
        corrupt::all(),
        identity::all(),
        gitops::all(),
        faults::all(),
        relay::all(),
        several::all(),
        leaders::all(),
        nodes::all(),
        values::all(),
    ];
    let scenarios: Vec<Scenario> = scenarios.into_iter().flatten().collect();
    if arguments.list {
        let trials = scenarios.into_iter().map(|scenario| Trial::test(scenario.name, || Ok(()))).collect();
        return libtest_mimic::run(&arguments, trials).exit_code();
    }
    let stage = match Stage::set() {
        Ok(stage) => Arc::new(stage),
        Err(error) => {
            eprintln!("the cluster did not come up: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let trials = scenarios.into_iter().map(|scenario| {
        let stage = stage.clone();
        Trial::test(scenario.name, move || {
            stage.play(scenario.clone()).map_err(|error| Failed::from(format!("{error:#}")))
        })
    });
    let trials = trials.collect();
    let outcome = libtest_mimic::run(&arguments, trials);
    if let Err(error) = stage.strike() {
        eprintln!("taking the cluster down: {error:#}");
        return ExitCode::FAILURE;
    }
    outcome.exit_code()
}
