//! SIGKILL at chosen points: a rank dies in every stage of the loop and at every write, fsync and rename of a save, and
//! the run that is resumed ends as the one that was never killed: weights, moments, metrics, evaluation, bit for bit.

mod common;

use std::time::Instant;

use common::{
    empty_folder, one_at_a_time, run_within,
    runs::{assert_same_run, command, train, LIMIT, TINY},
};
use rldiff::telemetry::RunFiles;

const RANKS: usize = 2;
const ITERATIONS: u64 = 3;
const SETTINGS: [&str; 2] = ["run.iterations=3", "run.keep_checkpoints=1"];

/// Stages of the loop, and the rank where only one comes by.
const STAGES: [(&str, Option<usize>); 9] = [
    ("rollout", None),
    ("reward", None),
    ("advantage", None),
    ("update", None),
    ("optimizer", None),
    ("pretrain", None),
    ("saving", None),
    ("metrics", Some(0)),
    ("evaluation", None),
];

/// Steps of a save: point, file, rank.
const STEPS: [(&str, &str, usize); 21] = [
    ("create_folder", "iteration-", 0),
    ("write", "shard-000", 0),
    ("write", "shard-001", 1),
    ("fsync", "shard-000", 0),
    ("fsync", "shard-001", 1),
    ("rename", "shard-000", 0),
    ("rename", "shard-001", 1),
    ("sync_folder", "shard-000", 0),
    ("sync_folder", "shard-001", 1),
    ("digest", "shard-000", 0),
    ("digest", "shard-001", 1),
    ("fsync", "metrics.jsonl", 0),
    ("write", "manifest.json", 0),
    ("fsync", "manifest.json", 0),
    ("rename", "manifest.json", 0),
    ("sync_folder", "manifest.json", 0),
    ("publish", "iteration-", 0),
    ("sync_publish", "iteration-", 0),
    ("published", "iteration-", 0),
    ("remove", "iteration-000001", 0),
    ("remove", ".removed", 0),
];

/// Knuth's linear congruential generator.
struct Draw(u64);

impl Draw {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// Fault number `n`: first every step of a save and every stage, then any of them.
fn fault(n: usize, draw: &mut Draw) -> String {
    let n = if n < STEPS.len() + STAGES.len() { n } else { draw.below((STEPS.len() + STAGES.len()) as u64) as usize };
    match STEPS.get(n) {
        Some((at, file, rank)) => {
            // the first save removes nothing, so there are only two removals
            let save = if *at == "remove" { 1 } else { 1 + draw.below(ITERATIONS) };
            format!("rank={rank},at={at},file={file},nth={save},kind=kill")
        }
        None => {
            let (at, only) = STAGES[n - STEPS.len()];
            let rank = only.unwrap_or(draw.below(RANKS as u64) as usize);
            match at {
                "evaluation" => format!("rank={rank},at={at},kind=kill"),
                _ => format!("rank={rank},at={at},iteration={},kind=kill", draw.below(ITERATIONS)),
            }
        }
    }
}

/// Kills and resumes once for each of `numbers`.
fn kill_and_resume(numbers: impl Iterator<Item = usize>, seed: u64, name: &str) {
    let _alone = one_at_a_time();
    let folder = empty_folder(name);
    let settings = [&TINY[..], &SETTINGS].concat();
    let straight = RunFiles::new(folder.join("straight"));
    train(1, straight.root(), &settings, &[]);
    let mut draw = Draw(seed);
    let started = Instant::now();
    let mut equal = 0;
    for n in numbers {
        let fault = fault(n, &mut draw);
        let files = RunFiles::new(folder.join(format!("kill-{n:02}")));
        let mut killed = command(RANKS, files.root(), &settings, &[]);
        killed.env("RLDIFF_FAULT", &fault);
        let killed = run_within(killed, LIMIT);
        assert!(!killed.status.success(), "{fault}: not killed\n{}", killed.stderr);
        assert!(killed.stderr.contains(&fault), "{fault}: it ended otherwise\n{}", killed.stderr);
        assert!(!files.summary().exists(), "{fault}: it came to its end");
        let ranks = 1 + draw.below(RANKS as u64) as usize;
        train(ranks, files.root(), &settings, &["--resume", "auto"]);
        assert_same_run(&straight, &files, ITERATIONS);
        equal += 1;
        println!("{equal}: {fault}, resumed on {ranks}: the same bits");
        std::fs::remove_dir_all(files.root()).unwrap();
    }
    println!(
        "{equal} of {equal} killed runs were resumed and ended bit-identical, {:.0} s",
        started.elapsed().as_secs_f64()
    );
}

/// A stage, a shard's fsync on the second rank, and the moment after the checkpoint's rename.
#[test]
fn killed_runs_go_on_bit_for_bit() {
    let point = |at: &str, file: &str| STEPS.iter().position(|step| (step.0, step.1) == (at, file)).unwrap();
    let numbers = [point("fsync", "shard-001"), point("sync_publish", "iteration-")];
    kill_and_resume(numbers.into_iter().chain([STEPS.len() + 3]), 1, "kills");
}

#[test]
#[ignore = "long: 50 kills"]
fn fifty_killed_runs_go_on_bit_for_bit() {
    kill_and_resume(0..50, 2, "kills-long");
}
