//! What was measured, for a person and for a program: `target/bench/results.json`.

use anyhow::Result;
use serde::Serialize;
use tote_e2e::operator;

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// What it is.
    pub name: &'static str,
    /// The median of what was measured.
    pub value: f64,
    /// Its unit.
    pub unit: &'static str,
    /// What it, or its ratio, is to be at most, or with `at_least` at least; none if it only stands beside others.
    pub goal: Option<f64>,
    /// Whether more is better.
    pub at_least: bool,
    /// What it is compared with; empty if it stands for itself.
    pub reference: String,
    /// The reference's median.
    pub reference_value: Option<f64>,
    /// The median of the ratios of all pairs.
    pub ratio: Option<f64>,
    /// The least and the greatest ratio, or value where there is no reference.
    pub spread: [f64; 2],
}

impl Figure {
    /// From values alone.
    pub fn alone(name: &'static str, unit: &'static str, goal: f64, values: &[f64]) -> Self {
        let value = median(values);
        let spread = spread(values);
        Self {
            name,
            value,
            unit,
            goal: Some(goal),
            at_least: false,
            reference: String::new(),
            reference_value: None,
            ratio: None,
            spread,
        }
    }

    /// From pairs of a value and its reference, each measured one after the other.
    pub fn of_pairs(
        name: &'static str,
        unit: &'static str,
        goal: Option<f64>,
        reference: &str,
        pairs: &[[f64; 2]],
    ) -> Self {
        let ratios: Vec<f64> = pairs.iter().map(|[value, reference]| value / reference).collect();
        let of = |which: fn(&[f64; 2]) -> f64| median(&pairs.iter().map(which).collect::<Vec<_>>());
        Self {
            name,
            value: of(|pair| pair[0]),
            unit,
            goal,
            at_least: false,
            reference: reference.to_owned(),
            reference_value: Some(of(|pair| pair[1])),
            ratio: Some(median(&ratios)),
            spread: spread(&ratios),
        }
    }

    /// More is better.
    #[must_use]
    pub fn at_least(self) -> Self {
        Self { at_least: true, ..self }
    }

    /// The goal, and whether it is met.
    fn verdict(&self) -> String {
        let Some(goal) = self.goal else { return String::new() };
        let judged = self.ratio.unwrap_or(self.value);
        let (sign, is_met) = if self.at_least { (">=", judged >= goal) } else { ("<=", judged <= goal) };
        format!("goal {sign} {goal}: {}; ", if is_met { "met" } else { "MISSED" })
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

fn spread(values: &[f64]) -> [f64; 2] {
    let bound = |of: fn(f64, f64) -> f64| values.iter().copied().reduce(of).unwrap_or(f64::NAN);
    [bound(f64::min), bound(f64::max)]
}

/// Prints one figure as a line of a table.
pub fn print(figure: &Figure) {
    let Figure { name, value, unit, reference, reference_value, ratio, spread, .. } = figure;
    let compared = match (reference_value, ratio) {
        (Some(of), Some(ratio)) => format!("{ratio:6.2} of {of:.3} {unit} ({reference})"),
        _ => String::new(),
    };
    println!(
        "{name:<25} {value:10.3} {unit:<4} {compared}\n{:25} {}{:.2} to {:.2}",
        "",
        figure.verdict(),
        spread[0],
        spread[1]
    );
}

/// Writes them all to `target/bench/results.json`.
pub fn write(figures: &[Figure]) -> Result<()> {
    let dir = operator::checkout().join("target/bench");
    std::fs::create_dir_all(&dir)?;
    std::fs::write(dir.join("results.json"), serde_json::to_vec_pretty(figures)?)?;
    println!("\nwritten to target/bench/results.json");
    Ok(())
}
