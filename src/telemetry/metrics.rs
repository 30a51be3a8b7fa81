//! The numbers of one iteration, and `metrics.jsonl`: one JSON object per line, every digit kept.
//!
//! A run that is stopped and resumed leaves the same file as one that ran through (but for the measured seconds):
//! on resume, lines of iterations that the checkpoint does not contain are cut off and will be written again.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use serde_json::{Map, Value};

use super::{atomic_file::write_atomic, number};
use crate::cannot_write::CannotWrite;

/// Key of the iteration in a line of `metrics.jsonl`.
const ITERATION: &str = "iteration";

/// The names that the loop writes and the screen, the curves and the tools read.
pub mod names {
    /// Fraction of (sample, step) pairs whose ratio left [1 − ε, 1 + ε].
    pub const CLIP_FRACTION: &str = "clip_fraction";
    /// Mean of ½ (log w)², nats² per latent element: the usual small-ratio estimate of the divergence.
    pub const APPROX_KL: &str = "approx_kl";
    /// max |w − 1| before the first optimizer step of the iteration; exactly 0 on the CPU.
    pub const RATIO_DRIFT: &str = "ratio_drift";
    /// Norm of the whole gradient before clipping, mean over the optimizer steps of the iteration.
    pub const GRADIENT_NORM: &str = "gradient_norm";
    /// Samples whose reward was not finite, over all tasks.
    pub const BAD_REWARDS: &str = "bad_rewards";
    /// Samples per second of the whole iteration, over all ranks.
    pub const SAMPLES_PER_SECOND: &str = "samples_per_second";
    /// Achieved TFLOP/s, over all ranks.
    pub const TFLOPS: &str = "tflops";
    /// Seconds of the whole iteration.
    pub const SECONDS: &str = "seconds/iteration";
    /// Seconds that the loop waited for checkpoints: for the copy of the state, and at the steps of an earlier save.
    pub const SAVE_STALL: &str = "seconds/save";
    /// Seconds that rank 0's threads worked on the checkpoint that became complete in this iteration.
    pub const SAVE_IN_BACKGROUND: &str = "background/save_seconds";
    /// L_pre, mean over the pretraining steps of the iteration.
    pub const PRETRAINING_LOSS: &str = "pretraining_loss";

    /// Share of a task's samples from which nothing can be learnt: what their rewards are compared with are equal
    /// rewards, or (ReFL, DRaFT) the reward has no gradient in their pictures.
    pub const NO_SIGNAL: &str = "no_signal";

    /// RAFT: mean reward of the samples that a task keeps.
    pub const KEPT_REWARD_MEAN: &str = "kept_reward_mean";
    /// RAFT: the lowest of what they are compared by.
    pub const LEAST_KEPT_REWARD: &str = "least_kept_reward";
    /// Mean reward of a task on the few prompts of the evaluations in the course of training.
    pub const EVALUATION_REWARD: &str = "evaluation_reward";
    /// Share of fine detail in those pictures (`image_statistics::high_frequency_share`), mean over pictures.
    pub const HIGH_FREQUENCY: &str = "high_frequency";
    /// `[stop]`, where an iteration completes a window: the mean of the reward over the window, of each task and, without a
    /// task's name, of their mean.
    pub const WINDOW_MEAN: &str = "window_mean";
    /// By how many standard errors the best of the newest windows is above the best of those before.
    pub const WINDOW_RISE: &str = "window_rise";
    /// How different the pictures of a prompt are (`image_statistics::diversity`), mean over prompts.
    pub const DIVERSITY: &str = "diversity";

    /// Mean reward of `task` over its global batch.
    pub fn reward_mean(task: &str) -> String {
        of_task(task, "reward_mean")
    }

    /// Standard deviation of the reward of `task` over its global batch.
    pub fn reward_std(task: &str) -> String {
        of_task(task, "reward_std")
    }

    /// Seconds that the ranks spent in `stage`.
    pub fn seconds(stage: &str) -> String {
        format!("seconds/{stage}")
    }

    /// Any metric that exists once per task: `composition/clip_fraction`.
    pub fn of_task(task: &str, name: &str) -> String {
        format!("{task}/{name}")
    }
}

/// The numbers of one iteration, in the order in which they were set.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    /// Counted from 0; the screen shows it from 1.
    pub iteration: u64,
    values: Vec<(String, f64)>,
}

impl Metrics {
    pub fn new(iteration: u64) -> Self {
        Metrics { iteration, values: Vec::new() }
    }

    /// Sets `name` (like `composition/reward_mean`), replacing an earlier value in its place.
    pub fn set(&mut self, name: impl Into<String>, value: f64) {
        let name = name.into();
        debug_assert_ne!(name, ITERATION, "the iteration is a field of its own");
        match self.values.iter_mut().find(|(known, _)| *known == name) {
            Some(entry) => entry.1 = value,
            None => self.values.push((name, value)),
        }
    }

    pub fn get(&self, name: &str) -> Option<f64> {
        self.values.iter().find(|(known, _)| known == name).map(|(_, value)| *value)
    }

    /// Names and values in the order of their first setting.
    pub fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.values.iter().map(|(name, value)| (name.as_str(), *value))
    }

    /// One line of JSON without its newline. Values that are not finite are the strings "NaN", "inf" and "-inf".
    pub fn to_json(&self) -> String {
        let mut object = Map::new();
        object.insert(ITERATION.to_owned(), Value::from(self.iteration));
        for (name, value) in self.iter() {
            object.insert(name.to_owned(), number::to_value(value));
        }
        Value::Object(object).to_string()
    }

    /// The inverse of [`Metrics::to_json`]; an error says which key is wrong.
    pub fn from_json(line: &str) -> Result<Self> {
        let object: Map<String, Value> = serde_json::from_str(line).context("not a JSON object")?;
        let iteration = object.get(ITERATION).and_then(Value::as_u64);
        let mut metrics = Metrics::new(iteration.with_context(|| format!("no whole number under \"{ITERATION}\""))?);
        for (name, value) in object.iter().filter(|(name, _)| *name != ITERATION) {
            let value = number::from_value(value).with_context(|| format!("{name}: {value} is no number"))?;
            // not `set`: names are unique in a map, and looking each up again would be quadratic
            metrics.values.push((name.clone(), value));
        }
        Ok(metrics)
    }
}

/// Appends to `metrics.jsonl`. Each line reaches the operating system before [`JsonlWriter::append`] returns, so it
/// outlives the process; a sync of [`JsonlWriter::file`] makes it outlive the machine.
#[derive(Debug)]
pub struct JsonlWriter {
    file: File,
    path: PathBuf,
}

impl JsonlWriter {
    /// Starts an empty file, replacing what was there.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).context(CannotWrite::file(path))?;
        Ok(JsonlWriter { file, path: path.to_owned() })
    }

    /// Opens the file of a run whose checkpoint holds `iterations_done` iterations (0 … `iterations_done` − 1): cuts
    /// off the lines of later iterations and a torn last line, and appends from there. A missing file is created.
    ///
    /// # Errors
    /// A damaged line among those to keep, or iterations that do not increase, with the file and the line number.
    pub fn open_for_resume(path: &Path, iterations_done: u64) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(path).context(CannotWrite::file(path))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).with_context(|| format!("cannot read {}", path.display()))?;
        let (kept, lines) = length_to_keep(&bytes, iterations_done).with_context(|| path.display().to_string())?;
        if lines < iterations_done {
            log::warn!(
                "{} holds {lines} iterations, the checkpoint {iterations_done}: the others are lost to the log",
                path.display()
            );
        }
        file.set_len(kept as u64).context(CannotWrite::file(path))?;
        file.seek(SeekFrom::Start(kept as u64)).with_context(|| format!("cannot seek in {}", path.display()))?;
        Ok(JsonlWriter { file, path: path.to_owned() })
    }

    /// Appends one line, in a single write.
    pub fn append(&mut self, metrics: &Metrics) -> Result<()> {
        let mut line = metrics.to_json();
        line.push('\n');
        self.file.write_all(line.as_bytes()).context(CannotWrite::file(&self.path))
    }

    /// Puts `metrics` in the place of the last line, its iteration's. At any moment the file has one of the two.
    pub fn replace_last(&mut self, metrics: &Metrics) -> Result<()> {
        let mut bytes = std::fs::read(&self.path).with_context(|| format!("cannot read {}", self.path.display()))?;
        let (kept, _) = length_to_keep(&bytes, metrics.iteration).with_context(|| self.path.display().to_string())?;
        bytes.truncate(kept);
        bytes.extend(format!("{}\n", metrics.to_json()).into_bytes());
        write_atomic(&self.path, &bytes)?;
        *self = JsonlWriter::open_for_resume(&self.path, metrics.iteration + 1)?;
        Ok(())
    }

    /// The file, to be synced in the moment before a checkpoint is declared complete.
    pub fn file(&self) -> Result<File> {
        self.file.try_clone().with_context(|| format!("cannot sync {}", self.path.display()))
    }
}

/// All lines of a `metrics.jsonl`, in order. A torn last line (no newline: the run may still be writing it) is left
/// out; any other damage is an error with the line number.
pub fn read_metrics(path: &Path) -> Result<Vec<Metrics>> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    complete_lines(&bytes)
        .enumerate()
        .map(|(index, line)| parse(line).with_context(|| format!("{}, line {}", path.display(), index + 1)))
        .collect()
}

/// How many bytes, and lines, belong to iterations below `iterations_done`.
fn length_to_keep(bytes: &[u8], iterations_done: u64) -> Result<(usize, u64)> {
    let mut length = 0;
    let mut lines = 0;
    let mut next = 0;
    for (index, line) in complete_lines(bytes).enumerate() {
        let is_last = length + line.len() == bytes.len();
        let metrics = match parse(line) {
            Ok(metrics) => metrics,
            // a crash of the machine can leave zeros up to the end of the file
            Err(_) if is_last => break,
            Err(error) => return Err(error.context(format!("line {}", index + 1))),
        };
        if metrics.iteration >= iterations_done {
            break;
        }
        if metrics.iteration < next {
            bail!("line {}: iteration {} is there a second time", index + 1, metrics.iteration);
        }
        next = metrics.iteration + 1;
        lines += 1;
        length += line.len();
    }
    Ok((length, lines))
}

/// The lines that end in a newline, with it.
fn complete_lines(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n"))
}

fn parse(line: &[u8]) -> Result<Metrics> {
    Metrics::from_json(std::str::from_utf8(line).context("not UTF-8")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(iteration: u64) -> Metrics {
        let mut metrics = Metrics::new(iteration);
        metrics.set(names::reward_mean("composition"), 0.1 + iteration as f64 / 3.0);
        metrics.set(names::GRADIENT_NORM, 1e-17 * iteration as f64);
        metrics
    }

    fn write(path: &Path, iterations: std::ops::Range<u64>) {
        let mut writer = JsonlWriter::create(path).unwrap();
        iterations.for_each(|i| writer.append(&sample(i)).unwrap());
        writer.file().unwrap().sync_all().unwrap();
    }

    #[test]
    fn keeps_order_and_replaces_in_place() {
        let mut metrics = Metrics::new(4);
        metrics.set("b", 1.0);
        metrics.set("a", 2.0);
        metrics.set("b", 3.0);
        assert_eq!(metrics.iter().collect::<Vec<_>>(), [("b", 3.0), ("a", 2.0)]);
        assert_eq!(metrics.get("a"), Some(2.0));
        assert_eq!(metrics.get("c"), None);
        assert_eq!(metrics.to_json(), r#"{"iteration":4,"b":3.0,"a":2.0}"#);
    }

    #[test]
    fn what_is_not_finite_is_said_in_words() {
        let mut metrics = Metrics::new(0);
        metrics.set("x", f64::NAN);
        metrics.set("y", f64::INFINITY);
        metrics.set("z", f64::NEG_INFINITY);
        assert_eq!(metrics.to_json(), r#"{"iteration":0,"x":"NaN","y":"inf","z":"-inf"}"#);
        let read = Metrics::from_json(&metrics.to_json()).unwrap();
        assert!(read.get("x").unwrap().is_nan());
        assert_eq!(read.get("z"), Some(f64::NEG_INFINITY));
    }

    #[test]
    fn reads_back_what_it_wrote() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        write(&path, 0..5);
        assert_eq!(read_metrics(&path).unwrap(), (0..5).map(sample).collect::<Vec<_>>());
    }

    /// Interrupted after 7 iterations with a checkpoint of 4, in every state the last line can be torn into.
    #[test]
    fn a_resumed_log_equals_the_uninterrupted_one() {
        let folder = tempfile::tempdir().unwrap();
        let (whole, resumed) = (folder.path().join("whole"), folder.path().join("resumed"));
        write(&whole, 0..9);
        write(&resumed, 0..7);
        let interrupted = std::fs::read(&resumed).unwrap();
        let four_lines: usize = (0..4).map(|i| sample(i).to_json().len() + 1).sum();
        for length in four_lines..=interrupted.len() {
            std::fs::write(&resumed, &interrupted[..length]).unwrap();
            let mut writer = JsonlWriter::open_for_resume(&resumed, 4).unwrap();
            (4..9).for_each(|i| writer.append(&sample(i)).unwrap());
            assert_eq!(std::fs::read(&resumed).unwrap(), std::fs::read(&whole).unwrap(), "cut at byte {length}");
        }
    }

    #[test]
    fn resuming_from_nothing_starts_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        JsonlWriter::open_for_resume(&path, 0).unwrap().append(&sample(0)).unwrap();
        assert_eq!(read_metrics(&path).unwrap(), [sample(0)]);
        // a torn only line, and a last line of zeros
        for damaged in [&b"{\"iterat"[..], b"\0\0\0\0\n"] {
            std::fs::write(&path, damaged).unwrap();
            JsonlWriter::open_for_resume(&path, 1).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), b"");
        }
    }

    #[test]
    fn the_last_line_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        write(&path, 0..3);
        let mut writer = JsonlWriter::open_for_resume(&path, 3).unwrap();
        let mut whole = sample(2);
        whole.set("composition/evaluation_reward", 0.5);
        writer.replace_last(&whole).unwrap();
        writer.append(&sample(3)).unwrap();
        assert_eq!(read_metrics(&path).unwrap(), [sample(0), sample(1), whole, sample(3)]);
    }

    #[test]
    fn damage_before_the_last_line_names_file_and_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let good = sample(0).to_json();
        for (second, what) in [
            ("garbage", "not a JSON object"),
            ("{\"x\":1.0}", "iteration"),
            ("{\"iteration\":1,\"x\":null}", "x: null is no number"),
            (good.as_str(), "second time"),
        ] {
            std::fs::write(&path, format!("{good}\n{second}\n{}\n", sample(2).to_json())).unwrap();
            let error = format!("{:#}", JsonlWriter::open_for_resume(&path, 3).unwrap_err());
            assert!(error.contains("metrics.jsonl") && error.contains("line 2") && error.contains(what), "{error}");
        }
        std::fs::write(&path, format!("{good}\ngarbage\n")).unwrap();
        let error = format!("{:#}", read_metrics(&path).unwrap_err());
        assert!(error.contains("metrics.jsonl, line 2"), "{error}");
    }
}
