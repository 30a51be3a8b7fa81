//! A run is saved on one number of ranks and resumed on another, with the same bits as one that was never stopped.

mod common;

use std::time::Instant;

use common::{
    empty_folder, one_at_a_time,
    runs::{assert_same_run, copy_run, train, TINY},
};
use rldiff::telemetry::RunFiles;

const SETTINGS: [&str; 4] =
    ["run.lanes=8", "task.composition.samples=8", "task.parity.samples=16", "task.preference.samples=8"];

fn pairs(saved_on: &[usize], resumed_on: &[usize], name: &str) {
    let _alone = one_at_a_time();
    let folder = empty_folder(name);
    let settings = |iterations| [&TINY[..], &SETTINGS, &[iterations]].concat();
    let straight = RunFiles::new(folder.join("straight"));
    train(1, straight.root(), &settings("run.iterations=2"), &[]);
    let started = Instant::now();
    let mut equal = Vec::new();
    for &before in saved_on {
        let saved = RunFiles::new(folder.join(format!("saved-{before}")));
        train(before, saved.root(), &settings("run.iterations=1"), &[]);
        for &after in resumed_on {
            let resumed = RunFiles::new(folder.join(format!("resumed-{before}-{after}")));
            copy_run(&saved, &resumed);
            train(after, resumed.root(), &settings("run.iterations=2"), &["--resume", "auto"]);
            assert_same_run(&straight, &resumed, 2);
            equal.push(format!("{before}→{after}"));
            std::fs::remove_dir_all(resumed.root()).unwrap();
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    println!("{n} of {n} pairs of rank counts end bit-identical, {seconds:.0} s: {}", equal.join(" "), n = equal.len());
}

#[test]
fn saved_and_resumed_on_different_numbers_of_ranks() {
    pairs(&[2], &[1, 4], "elastic");
}

#[test]
#[ignore = "long: 16 pairs of rank counts up to 8"]
fn sixteen_pairs_of_rank_counts() {
    pairs(&[1, 2, 4, 8], &[1, 2, 4, 8], "elastic-long");
}
