//! What was seen under load: the facts that must hold on any machine, and the figures of this one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use anyhow::{Result, ensure};
use kube::ResourceExt as _;
use tote_agent::import::CHUNK;
use tote_api::{Phase, SalvageJob};

use super::audit::Requests;
use super::usage::Used;
use super::wave::Wave;
use super::{Counted, PODS, is_distinct, pairs};
use crate::tenant::phase;

/// Writes of the status of a job that is Imported at once: Queued, Transferring, progress, Imported with the pods that it woke.
/// Each further pod may add its name.
const STATUS_WRITES: usize = 4 + PODS - 1;

/// Seconds between two writes of progress.
const PROGRESS: i64 = 5;

/// Wakes of a pod at first (1, 2, 4, 8 s), and seconds between two later ones, less their jitter.
const WAKES: u64 = 4;
const WAKE: u64 = 8;

/// Of all that is given at most the tenth part may be lost, however many requests are left.
const LOST: u64 = 10;

/// Goal: to the same pods with their images in place.
const RATIO: f64 = 1.5;

/// All of it.
#[derive(Debug)]
pub struct Report {
    /// How many pods a wave has.
    pub pods: usize,
    /// The same number of pods, with other images that were there.
    pub before: Wave,
    /// Pods whose images were missing.
    pub load: Wave,
    /// The same pods with the images that were brought.
    pub after: Wave,
    /// Bytes that were missing, by digest and node.
    pub wanted: BTreeMap<(String, String), u64>,
    /// All jobs.
    pub jobs: Vec<SalvageJob>,
    /// What agents counted meanwhile.
    pub counted: Counted,
    /// What the controller asked of the API server,
    pub requests: Requests,
    /// in this time.
    pub span: Duration,
    /// Its events: objects by kind and reason, and how often it was told.
    pub events: BTreeMap<String, (usize, i32)>,
    /// Its metrics, after.
    pub metrics: String,
    /// Processes: resident before, and used from the first pod to the last.
    pub(super) used: Vec<(String, u64, Used)>,
    /// Processor time of the whole machine in that time.
    pub busy: Duration,
}

impl Report {
    /// The time until all pods ran, to the mean of the other two waves.
    pub fn ratio(&self) -> f64 {
        2.0 * self.load.took().as_secs_f64() / (self.before.took() + self.after.took()).as_secs_f64()
    }

    /// What must hold on any machine.
    ///
    /// # Errors
    /// It does not; what does not.
    pub fn check(&self) -> Result<()> {
        for wave in [&self.before, &self.load, &self.after] {
            ensure!(wave.ready.len() == self.pods, "{} of {} pods ran", wave.ready.len(), self.pods);
        }
        let failed = self.load.failed.len();
        ensure!(failed >= self.wanted.len(), "only {failed} pods were seen failing: what was salvaged?");
        ensure!(
            self.before.failed.is_empty() && self.after.failed.is_empty(),
            "a pod failed whose image is there"
        );
        let pairs = pairs(&self.jobs);
        ensure!(is_distinct(&pairs), "two jobs for one digest and node: {pairs:?}");
        let (made, wanted): (BTreeSet<_>, BTreeSet<_>) =
            (pairs.iter().collect(), self.wanted.keys().collect());
        ensure!(made == wanted, "there are jobs for {made:?}, wanted are {wanted:?}");
        for (job, pair) in self.jobs.iter().zip(&pairs) {
            let status = job.status.clone().unwrap_or_default();
            ensure!(phase(job) == Some(Phase::Imported), "{} is not Imported: {status:?}", job.name_any());
            let transfer = status.transfer.unwrap_or_default();
            let (moved, missing) = (transfer.transferred_bytes, self.wanted.get(pair).copied());
            ensure!(
                u64::try_from(moved).ok() == missing,
                "{} moved {moved} bytes, {missing:?} were missing",
                job.name_any()
            );
        }
        let missing: u64 = self.wanted.values().sum();
        let Counted { served, received, left } = self.counted;
        ensure!(received == missing, "agents got {received} bytes, {missing} were missing");
        // What a source has sent of a part when it is left is lost: where a machine halts for half a second that happens.
        let most = (missing + left * CHUNK).min(missing + missing / LOST);
        ensure!(
            (missing..=most).contains(&served),
            "agents gave {served} bytes, {missing} were missing, {most} are allowed ({left} requests left)"
        );
        let mut allowed = 0;
        for job in &self.jobs {
            let name = job.name_any();
            let writes = self.requests.status_writes.get(&name).copied().unwrap_or_default();
            let most = status_writes(job);
            ensure!(writes <= most, "{writes} writes of the status of {name}, {most} are allowed");
            // Made, its writes, as many events, and for each pod three events and its wakes.
            let wakes = usize::try_from(WAKES + self.load.took().as_secs() / WAKE)?;
            allowed += 1 + 2 * most + PODS * (3 + wakes);
        }
        let asked = self.requests.total();
        ensure!(asked <= allowed, "{asked} requests for {} salvages, {allowed} are allowed", self.jobs.len());
        let refused = self.requests.refused();
        ensure!(refused.is_empty(), "the API server refused {refused:?}");
        Ok(())
    }

    fn each(&self, count: usize) -> f64 {
        ratio(count, self.jobs.len())
    }

    /// From when a pod's image was there until the pod was ready.
    fn after_import(&self) -> BTreeMap<String, Duration> {
        let mut waited = BTreeMap::new();
        for job in &self.jobs {
            let Some(imported) = self.load.imported.get(&job.name_any()) else { continue };
            for pod in job.status.iter().flat_map(|status| &status.pods) {
                if let Some(ready) = self.load.ready.get(pod) {
                    waited.insert(pod.clone(), ready.saturating_sub(*imported));
                }
            }
        }
        waited
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (took, jobs) = (self.load.took().as_secs_f64(), self.jobs.len());
        writeln!(f, "{} pods, {jobs} salvages", self.pods)?;
        for (what, wave) in [
            ("their images there, before", &self.before),
            ("their images missing", &self.load),
            ("the same, images brought", &self.after),
        ] {
            let (made, took, cpu) =
                (wave.made.as_secs_f64(), wave.took().as_secs_f64(), wave.processor.as_secs_f64());
            writeln!(
                f,
                "  {what:<28} all Running after {took:6.1} s (made after {made:.1} s; {cpu:.1} s of processor time)"
            )?;
        }
        let processor = 2.0 * self.load.processor.as_secs_f64()
            / (self.before.processor + self.after.processor).as_secs_f64();
        writeln!(
            f,
            "  ratio {:.2} (goal {RATIO}); of the cluster's processor time {processor:.2}",
            self.ratio()
        )?;
        writeln!(
            f,
            "seconds since the first pod was asked for:  first   tenth    half  ninety    last  (count)"
        )?;
        for (what, times) in [
            ("pods ready, images there before", &self.before.ready),
            ("pods ready, images brought", &self.after.ready),
            ("pods seen failing", &self.load.failed),
            ("jobs seen", &self.load.asked),
            ("jobs seen Transferring", &self.load.begun),
            ("jobs seen Imported", &self.load.imported),
            ("pods ready", &self.load.ready),
            ("a job from seen to Transferring", &between(&self.load.asked, &self.load.begun)),
            ("a job from Transferring to Imported", &between(&self.load.begun, &self.load.imported)),
            ("a pod woken, from Imported to ready", &self.after_import()),
        ] {
            spread(f, what, times)?;
        }
        let asked = self.requests.total();
        writeln!(f, "requests of the controller: {asked}, {:.1} a salvage", self.each(asked))?;
        for (what, count) in &self.requests.salvage {
            writeln!(f, "  {what:<28} {count:6}   {:6.2} a salvage", self.each(*count))?;
        }
        let most = self.requests.status_writes.values().max().copied().unwrap_or_default();
        writeln!(f, "  at most {most} writes of one job's status")?;
        for ((what, code), count) in &self.requests.failed {
            writeln!(f, "  answered with {code}: {what} {count}")?;
        }
        for (what, count) in &self.requests.upkeep {
            #[allow(clippy::cast_precision_loss)]
            let rate = *count as f64 / self.span.as_secs_f64();
            writeln!(f, "  all the time: {what:<28} {rate:6.2} a second")?;
        }
        for (what, (objects, told)) in &self.events {
            writeln!(f, "  event {what:<32} on {objects:4} objects, {told:4} times")?;
        }
        let missing: u64 = self.wanted.values().sum();
        let Counted { served, received, left } = self.counted;
        writeln!(
            f,
            "bytes: {missing} missing, {served} given and {received} got by agents; {left} requests left"
        )?;
        for line in self.metrics.lines().filter(|line| is_of_interest(line)) {
            writeln!(f, "  {line}")?;
        }
        writeln!(f, "from the first pod to the last ({took:.1} s): resident before, at most; processor")?;
        let mut groups: BTreeMap<&str, (u64, u64, Duration)> = BTreeMap::new();
        for (name, before, used) in &self.used {
            let group = groups.entry(name).or_default();
            *group = (group.0 + before, group.1 + used.peak, group.2 + used.cpu);
        }
        for (name, (before, peak, cpu)) in groups {
            let cpu = cpu.as_secs_f64();
            writeln!(f, "  {name:<24} {:5} MiB {:5} MiB {cpu:7.1} s", before >> 20, peak >> 20)?;
        }
        writeln!(f, "  {:<24} {:>19} {:7.1} s", "the whole machine", "", self.busy.as_secs_f64())
    }
}

/// How often the status of a job may be written, by what it went through.
fn status_writes(job: &SalvageJob) -> usize {
    let status = job.status.clone().unwrap_or_default();
    let took = match (&status.start_time, &status.completion_time) {
        (Some(began), Some(ended)) => ended.0.as_second() - began.0.as_second(),
        _ => 0,
    };
    let more = took / PROGRESS + 2 * i64::from(status.attempts - 1);
    STATUS_WRITES + usize::try_from(more).unwrap_or(0)
}

fn is_of_interest(line: &str) -> bool {
    ["tote_decision_seconds_sum", "tote_decision_seconds_count", "tote_pod_wakes", "tote_salvage_attempts"]
        .iter()
        .any(|name| line.starts_with(name))
}

#[allow(clippy::cast_precision_loss)]
fn ratio(count: usize, of: usize) -> f64 {
    count as f64 / of.max(1) as f64
}

fn between(from: &BTreeMap<String, Duration>, to: &BTreeMap<String, Duration>) -> BTreeMap<String, Duration> {
    let span = |(name, to): (&String, &Duration)| Some((name.clone(), to.saturating_sub(*from.get(name)?)));
    to.iter().filter_map(span).collect()
}

fn spread(f: &mut fmt::Formatter<'_>, what: &str, times: &BTreeMap<String, Duration>) -> fmt::Result {
    let mut sorted: Vec<f64> = times.values().map(Duration::as_secs_f64).collect();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    let at = |tenths: usize| sorted.get(last * tenths / 10).copied().unwrap_or_default();
    write!(f, "  {what:<38}")?;
    for tenths in [0, 1, 5, 9, 10] {
        write!(f, " {:7.1}", at(tenths))?;
    }
    writeln!(f, "  ({})", sorted.len())
}
