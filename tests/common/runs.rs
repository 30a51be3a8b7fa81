//! Whole runs of the program, and whether two of them are the same, bit for bit.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use rldiff::{
    store,
    telemetry::{read_metrics, Metrics, RunFiles, Summary},
};

use super::{files_below, rldiff, run_within, set, Finished, SMALL};

/// For one run; seconds were observed.
pub const LIMIT: Duration = Duration::from_secs(180);

/// `mpirun -n ranks rldiff --out out`, the small config changed by `settings`, and `more` arguments.
pub fn command(ranks: usize, out: &Path, settings: &[&str], more: &[&str]) -> Command {
    let mut command = rldiff(ranks, out.parent().unwrap());
    command.args(set(&SMALL)).args(set(settings)).args(more).arg("--out").arg(out);
    command
}

pub fn train(ranks: usize, out: &Path, settings: &[&str], more: &[&str]) -> Finished {
    let done = run_within(command(ranks, out, settings, more), LIMIT);
    done.expect_success(&format!("{} on {ranks} ranks, {settings:?} {more:?}", out.display()))
}

pub fn checkpoint(files: &RunFiles, iteration: u64) -> PathBuf {
    files.checkpoints().join(format!("iteration-{iteration:06}"))
}

/// What an iteration computed: every metric but the measured times, as bits.
pub fn computed(metrics: &Metrics) -> (u64, Vec<(String, u64)>) {
    let timed = |name: &str| name.starts_with("seconds/") || name.starts_with("background/");
    let measured = |name: &str| timed(name) || name == "samples_per_second" || name == "tflops";
    let values = metrics.iter().filter(|(name, _)| !measured(name));
    (metrics.iteration, values.map(|(name, value)| (name.to_string(), value.to_bits())).collect())
}

pub fn computed_lines(files: &RunFiles) -> Vec<(u64, Vec<(String, u64)>)> {
    read_metrics(&files.metrics()).unwrap().iter().map(computed).collect()
}

/// The two runs have the same training state, tuned model, metrics and evaluation, bit for bit.
pub fn assert_same_run(a: &RunFiles, b: &RunFiles, iteration: u64) {
    let names = format!("{} and {}", a.root().display(), b.root().display());
    let digest = |files: &RunFiles| store::digest(&checkpoint(files, iteration)).unwrap();
    assert_eq!(digest(a), digest(b), "{names}: other states");
    let model = |files: &RunFiles| -> Vec<_> {
        let relative = |(path, bytes): (PathBuf, _)| (path.strip_prefix(files.root()).unwrap().to_path_buf(), bytes);
        files_below(&files.model()).into_iter().map(relative).collect()
    };
    assert!(model(a) == model(b), "{names}: other models");
    let (of_a, of_b) = (computed_lines(a), computed_lines(b));
    assert_eq!((of_a.len(), of_b.len()), (iteration as usize, iteration as usize), "{names}: lines of metrics");
    for (line, other) in of_a.iter().zip(&of_b) {
        let differing: Vec<_> = line.1.iter().zip(&other.1).filter(|(x, y)| x != y).collect();
        assert!(line == other, "{names}, iteration {}: {differing:?}", line.0);
    }
    let summary = |files: &RunFiles| Summary::read(&files.summary()).unwrap();
    assert_eq!(summary(a).tasks, summary(b).tasks, "{names}");
    assert_eq!((summary(a).iterations, summary(b).iterations), (iteration, iteration), "{names}");
}

/// Copies a run's folder, without its results.
pub fn copy_run(from: &RunFiles, to: &RunFiles) {
    for (path, bytes) in files_below(from.root()) {
        let target = to.root().join(path.strip_prefix(from.root()).unwrap());
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::write(target, bytes).unwrap();
    }
    fs::remove_file(to.summary()).unwrap();
}

/// With [`SMALL`]: as little work as trains, evaluates and saves everything.
pub const TINY: [&str; 10] = [
    "run.lanes=2",
    "rollout.steps=3",
    "method.timesteps=1",
    "trajectories.every=0",
    "evaluation.pictures=1",
    "task.composition.samples=2",
    "task.parity.samples=4",
    "task.preference.samples=2",
    "task.composition.evaluation_samples=2",
    "task.preference.evaluation_samples=2",
];
