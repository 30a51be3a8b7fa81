//! `mpirun -n RANKS rldiff` with more ranks than the embedded experiment has lanes, and than this machine has cores.

mod common;

use std::{path::PathBuf, time::Duration};

use common::{
    empty_folder, one_at_a_time, rldiff, run_within,
    runs::{assert_same_run, checkpoint},
    say, set, Finished,
};
use rldiff::{store, telemetry::RunFiles};

/// Fewer samples a lane, and as little else as makes a run.
const FEW: [&str; 15] = [
    "run.iterations=1",
    "run.checkpoint_every=1",
    "method.timesteps=1",
    "rollout.steps=3",
    "pretrain.batch_per_lane=1",
    "pretrain.steps=1",
    "trajectories.every=0",
    "evaluation.pictures=2",
    "evaluation.every=0",
    "task.composition.samples=128",
    "task.parity.samples=256",
    "task.parity.images_per_prompt=2",
    "task.preference.samples=128",
    "task.composition.evaluation_samples=16",
    "task.preference.evaluation_samples=16",
];

/// All samples of the paper's arithmetic; one iteration with few steps, and a short evaluation.
const WHOLE: [&str; 10] = [
    "run.iterations=1",
    "run.checkpoint_every=1",
    "method.timesteps=2",
    "rollout.steps=3",
    "pretrain.steps=1",
    "evaluation.pictures=2",
    "evaluation.every=0",
    "task.composition.evaluation_samples=16",
    "task.parity.evaluation_samples=32",
    "task.preference.evaluation_samples=16",
];

/// On one rank the TOML by its name, on several bare.
fn train(ranks: usize, out: &RunFiles, settings: &[&str], limit: Duration) -> Finished {
    let mut command = rldiff(ranks, out.root().parent().unwrap());
    if ranks <= 8 {
        command.arg(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("slurm/miniature-128.toml"));
    }
    command.args(set(settings)).arg("--out").arg(out.root());
    run_within(command, limit).expect_success(&format!("{ranks} ranks"))
}

#[test]
fn sixteen_ranks_without_a_config_compute_what_one_rank_computes() {
    let _alone = one_at_a_time();
    let folder = empty_folder("sixteen-ranks");
    let settings =
        [&FEW[..], &["task.parity.evaluation_samples=16", "task.parity.evaluation_images_per_prompt=2"]].concat();
    let of = |ranks: usize| {
        let files = RunFiles::new(folder.join(format!("ranks-{ranks}")));
        let done = train(ranks, &files, &settings, Duration::from_secs(600));
        say(&format!("128 lanes on {ranks} ranks: {:.1} s", done.took.as_secs_f64()));
        (files, done)
    };
    let (one, _) = of(1);
    let (sixteen, done) = of(16);
    assert_same_run(&one, &sixteen, 1);
    let line = done.stderr.lines().find(|line| line.contains("results in")).expect("a first line");
    assert!(line.contains("128 lanes of 16 samples") && line.contains("on 16 ranks, on the CPU"), "{line}");
}

#[test]
#[ignore = "half an hour"]
fn any_number_of_ranks_computes_the_papers_arithmetic_to_one_digest() {
    let _alone = one_at_a_time();
    let folder = empty_folder("many-ranks");
    let mut digests = Vec::new();
    for ranks in [1, 8, 16, 32, 64, 128] {
        let files = RunFiles::new(folder.join(format!("ranks-{ranks}")));
        let done = train(ranks, &files, &WHOLE, Duration::from_secs(1800));
        let digest = store::digest(&checkpoint(&files, 1)).unwrap();
        say(&format!("slurm/miniature-128.toml on {ranks} ranks: {:.0} s, digest {digest}", done.took.as_secs_f64()));
        digests.push(digest);
    }
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
}

/// What a user's own number of lanes asks for is not replaced.
#[test]
fn too_many_ranks_are_refused_with_the_numbers_that_are_possible() {
    let _alone = one_at_a_time();
    let folder = empty_folder("too-many-ranks");
    let mut command = rldiff(3, &folder);
    command.args(["--set", "run.lanes=2", "--out", "run"]);
    let done = run_within(command, Duration::from_secs(60));
    assert_eq!(done.status.code(), Some(2), "{}", done.stderr);
    assert!(
        done.stderr.contains("error: 3 ranks cannot share 2 lanes evenly; possible numbers of ranks: 1, 2"),
        "{}",
        done.stderr
    );
}
