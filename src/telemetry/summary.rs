//! `summary.json`, what a run reached, and the table that ends its output.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};

use super::atomic_file::write_atomic;
use super::ending::{Ending, FallBack};
use super::number;

/// A mean and its standard error. Numbers that are not finite are written as "NaN", "inf", "-inf".
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    #[serde(with = "number")]
    pub mean: f64,
    #[serde(with = "number")]
    pub stderr: f64,
}

impl Estimate {
    /// mean(x) and √(Σ(x − mean)² / (n − 1) / n) over independent values: one per picture, or one per group for
    /// rewards that judge groups. NaN without values; the error is NaN for a single one.
    pub fn of(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        Estimate { mean, stderr: (squares / (n - 1.0) / n).sqrt() }
    }
}

/// One reward on the held-out prompts, higher is better.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskSummary {
    pub name: String,
    pub base: Estimate,
    pub tuned: Estimate,
    /// Of tuned − base, pair by pair: the same prompt and the same noise.
    pub difference: Estimate,
}

impl TaskSummary {
    /// `base[i]` and `tuned[i]` come from the same prompt and the same noise.
    pub fn paired(name: &str, base: &[f64], tuned: &[f64]) -> Result<Self> {
        ensure!(base.len() == tuned.len(), "{name}: {} base rewards, {} tuned ones", base.len(), tuned.len());
        let differences: Vec<f64> = tuned.iter().zip(base).map(|(tuned, base)| tuned - base).collect();
        Ok(TaskSummary {
            name: name.to_owned(),
            base: Estimate::of(base),
            tuned: Estimate::of(tuned),
            difference: Estimate::of(&differences),
        })
    }

    /// The difference in units of its standard error.
    pub fn standard_errors(&self) -> f64 {
        self.difference.mean / self.difference.stderr
    }
}

/// What a run reached.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    pub config_name: String,
    pub tasks: Vec<TaskSummary>,
    /// Iterations done.
    pub iterations: u64,
    /// Why it ended there; not in summaries of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Ending>,
    /// The tasks whose reward fell back from its best.
    #[serde(default)]
    pub diverged: Vec<FallBack>,
    pub world_size: usize,
    /// Training samples per second over the whole run, all ranks together.
    #[serde(with = "number")]
    pub samples_per_second: f64,
    /// Seconds of the whole run, evaluation included.
    #[serde(with = "number")]
    pub wall_seconds: f64,
    /// Seconds spent in each stage, summed over the iterations.
    pub seconds_per_stage: BTreeMap<String, f64>,
    /// Largest |w − 1| seen before the first optimizer step of any iteration.
    #[serde(with = "number")]
    pub ratio_drift: f64,
}

impl Summary {
    /// Writes pretty JSON, atomically.
    pub fn write(&self, path: &Path) -> Result<()> {
        let stage = self.seconds_per_stage.iter().find(|(_, seconds)| !seconds.is_finite());
        ensure!(stage.is_none(), "cannot write {}: seconds_per_stage {stage:?}", path.display());
        let mut text =
            serde_json::to_string_pretty(self).with_context(|| format!("cannot write {}", path.display()))?;
        text.push('\n');
        write_atomic(path, text.as_bytes())
    }

    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is no summary of a run", path.display()))
    }

    /// Base, tuned and difference of every reward, columns aligned, a newline after each line.
    pub fn table(&self) -> String {
        let header = ["reward", "base", "tuned", "difference", "in std. errors"].map(str::to_owned);
        let mut rows = vec![header];
        for task in &self.tasks {
            rows.push([
                task.name.clone(),
                format!("{:.4} ± {:.4}", task.base.mean, task.base.stderr),
                format!("{:.4} ± {:.4}", task.tuned.mean, task.tuned.stderr),
                format!("{:+.4} ± {:.4}", task.difference.mean, task.difference.stderr),
                match task.standard_errors() {
                    errors if errors.is_finite() => format!("{errors:+.1}"),
                    _ => "-".to_owned(),
                },
            ]);
        }
        aligned(&rows)
    }
}

/// The first column flush left, the others flush right, two spaces between.
fn aligned(rows: &[[String; 5]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 5] = std::array::from_fn(width);
    let mut text = String::new();
    for row in rows {
        text.push_str(&format!("{:<1$}", row[0], widths[0]));
        for (cell, width) in row.iter().zip(widths).skip(1) {
            text.push_str(&format!("   {cell:>width$}"));
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Summary {
        Summary {
            config_name: "joint".to_owned(),
            tasks: vec![
                TaskSummary::paired("composition", &[0.5, 0.75, 0.25], &[0.75, 0.75, 1.0]).unwrap(),
                TaskSummary::paired("parity", &[-10.0, -11.0], &[-10.0, -11.0]).unwrap(),
            ],
            iterations: 24,
            ended: Some(Ending::all_iterations(24)),
            diverged: Vec::new(),
            world_size: 2,
            samples_per_second: 12.25,
            wall_seconds: 300.5,
            seconds_per_stage: BTreeMap::from([("sample".to_owned(), 100.0), ("update".to_owned(), 150.0)]),
            ratio_drift: 0.0,
        }
    }

    #[test]
    fn estimates_follow_their_formulas() {
        // mean 2, squares 1 + 0 + 1, variance 1, error 1/√3
        let estimate = Estimate::of(&[1.0, 2.0, 3.0]);
        assert_eq!(estimate, Estimate { mean: 2.0, stderr: (1.0_f64 / 3.0).sqrt() });
        assert!(Estimate::of(&[1.0]).stderr.is_nan() && Estimate::of(&[]).mean.is_nan());
        // pairs, not the two errors added: the differences are .25, 0, .75
        let task = &example().tasks[0];
        assert_eq!(task.difference, Estimate::of(&[0.25, 0.0, 0.75]));
        assert!((task.standard_errors() - 1.511857892036909).abs() < 1e-12);
        let error = TaskSummary::paired("parity", &[1.0], &[]).unwrap_err();
        assert!(error.to_string().contains("parity: 1 base rewards, 0 tuned ones"), "{error}");
    }

    #[test]
    fn json_has_the_promised_shape_and_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("summary.json");
        let mut summary = example();
        summary.write(&path).unwrap();
        assert_eq!(Summary::read(&path).unwrap(), summary);
        let json: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(json["tasks"][0]["name"], "composition");
        assert_eq!(json["tasks"][0]["base"]["mean"], 0.5);
        assert!(json["tasks"][0]["tuned"]["stderr"].is_f64() && json["tasks"][0]["difference"]["mean"].is_f64());
        assert_eq!(json["seconds_per_stage"]["update"], 150.0);
        for key in ["samples_per_second", "ratio_drift", "iterations", "world_size", "wall_seconds"] {
            assert!(json[key].is_number(), "{key}");
        }

        assert_eq!(json["ended"]["reason"], "iterations_done");
        assert_eq!(json["diverged"], serde_json::json!([]));

        // one of an earlier version
        let mut earlier = json.clone();
        for key in ["ended", "diverged"] {
            earlier.as_object_mut().unwrap().remove(key).unwrap();
        }
        let read: Summary = serde_json::from_value(earlier).unwrap();
        assert_eq!((read.ended, read.diverged.len(), read.iterations), (None, 0, 24));

        summary.ratio_drift = f64::INFINITY;
        summary.write(&path).unwrap();
        assert_eq!(Summary::read(&path).unwrap().ratio_drift, f64::INFINITY);
        summary.seconds_per_stage.insert("idle".to_owned(), f64::NAN);
        let error = summary.write(&path).unwrap_err().to_string();
        assert!(error.contains("summary.json") && error.contains("idle"), "{error}");
        std::fs::write(&path, "{}").unwrap();
        assert!(format!("{:#}", Summary::read(&path).unwrap_err()).contains("summary.json"));
    }

    #[test]
    fn the_table_is_aligned() {
        let expected = "\
reward                     base               tuned         difference   in std. errors
composition     0.5000 ± 0.1443     0.8333 ± 0.0833   +0.3333 ± 0.2205             +1.5
parity        -10.5000 ± 0.5000   -10.5000 ± 0.5000   +0.0000 ± 0.0000                -
";
        assert_eq!(example().table(), expected);
    }
}
