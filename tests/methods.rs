//! The rival methods as whole runs: the same bits at 1, 2 and 4 ranks and after a resume, and mistakes before any work.

mod common;

use std::{fs, path::Path, process::Command};

use common::{
    empty_folder, files_below, one_at_a_time, rldiff, run_within,
    runs::{assert_same_run, LIMIT},
    set, Finished,
};
use rldiff::telemetry::{read_metrics, RunFiles};

/// The miniature's experiment of this method.
fn experiment(method: &str) -> String {
    format!("{}/slurm/miniature-{method}.toml", env!("CARGO_MANIFEST_DIR"))
}

const SMALL: [&str; 14] = [
    "evaluation.every=0",
    "run.lanes=4",
    "run.iterations=3",
    "run.checkpoint_every=1",
    "run.keep_checkpoints=9",
    "rollout.steps=3",
    "pretrain.batch_per_lane=1",
    "evaluation.pictures=1",
    "task.preference.samples=96",
    "task.composition.samples=4",
    "task.parity.samples=64",
    "task.composition.evaluation_samples=2",
    "task.parity.evaluation_samples=32",
    "task.preference.evaluation_samples=4",
];

fn command(method: &str, ranks: usize, out: &Path, settings: &[&str], more: &[&str]) -> Command {
    let mut command = rldiff(ranks, out.parent().unwrap());
    command.arg("train").arg(experiment(method)).args(set(&SMALL)).args(set(settings)).args(more);
    command.arg("--out").arg(out);
    command
}

fn run(method: &str, ranks: usize, out: &Path, settings: &[&str], more: &[&str]) -> Finished {
    let done = run_within(command(method, ranks, out, settings, more), LIMIT);
    done.expect_success(&format!("{method} on {ranks} ranks, {settings:?} {more:?}"))
}

/// One rank through, against two iterations on four ranks and the third on two.
fn same_bits(method: &str, settings: &[&str]) {
    let _alone = one_at_a_time();
    let folder = empty_folder(&format!("methods-{method}"));
    let (through, halves) = (RunFiles::new(folder.join("through")), RunFiles::new(folder.join("halves")));
    run(method, 1, through.root(), settings, &[]);
    run(method, 4, halves.root(), &[settings, &["run.iterations=2"]].concat(), &[]);
    run(method, 2, halves.root(), settings, &["--resume", "auto"]);
    assert_same_run(&through, &halves, 3);
    for metrics in read_metrics(&through.metrics()).unwrap() {
        for name in ["preference/reward_mean", "preference/loss", "gradient_norm"] {
            let value = metrics.get(name).unwrap_or_else(|| panic!("{method} logs no {name}"));
            assert!(value.is_finite() && value != 0.0, "{method}: {name} = {value}");
        }
        assert_eq!(metrics.get("bad_rewards"), Some(0.0));
    }
}

#[test]
fn refl_is_the_same_at_every_number_of_ranks_and_resumes() {
    same_bits("refl", &["task.preference.samples=8"]);
}

#[test]
fn reward_weighted_is_the_same_at_every_number_of_ranks_and_resumes() {
    same_bits("reward-weighted", &["task.preference.samples=8"]);
}

/// With the lanes' own samples drawn in several pieces, and lanes that train on one or two of the six that are kept.
#[test]
fn raft_is_the_same_at_every_number_of_ranks_and_resumes() {
    same_bits("raft", &["method.batch=7", "method.updates=2", "task.preference.samples=148"]);
}

#[test]
fn draft_is_the_same_at_every_number_of_ranks_and_resumes() {
    same_bits("draft", &["task.preference.samples=8"]);
}

#[test]
fn a_reward_without_a_gradient_is_refused_before_any_work() {
    let _alone = one_at_a_time();
    let folder = empty_folder("methods-refused");
    let random = ["task.preference.reward={ name = 'random' }"];
    for method in ["refl", "draft"] {
        let done = run_within(command(method, 1, &folder.join("run"), &random, &[]), LIMIT);
        assert_eq!(done.status.code(), Some(2), "{}", done.stderr);
        assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
        let wanted = format!("task.preference.reward: random is not differentiable; method \"{method}\"");
        assert!(done.stderr.contains(&wanted), "{}", done.stderr);
        let mut check = rldiff(1, &folder);
        let check = run_within(
            {
                check.arg("check").arg(experiment(method)).args(set(&random));
                check
            },
            LIMIT,
        );
        assert_eq!(check.status.code(), Some(2), "{}", check.stderr);
        assert!(check.stderr.contains(&wanted), "{}", check.stderr);
        assert!(files_below(&folder).is_empty());
    }
}

/// A checkpoint of one method is not taken for another's.
#[test]
fn a_run_does_not_go_on_with_another_method() {
    let _alone = one_at_a_time();
    let folder = empty_folder("methods-other");
    let out = folder.join("run");
    let settings = ["run.iterations=1", "task.preference.samples=8"];
    run("refl", 1, &out, &settings, &[]);
    let before = fs::read(out.join("config.toml")).unwrap();
    for (method, set, wanted) in [
        ("reward-weighted", "run.seed=1", "the checkpoint was made with another config"),
        ("refl", "method.scale=1.0", "method.scale = 0.1, now 1"),
    ] {
        let done =
            run_within(command(method, 1, &out, &[&settings[..], &[set]].concat(), &["--resume", "auto"]), LIMIT);
        assert_eq!(done.status.code(), Some(2), "{}", done.stderr);
        assert!(done.stderr.contains(wanted), "{}", done.stderr);
    }
    assert_eq!(fs::read(out.join("config.toml")).unwrap(), before);
}
