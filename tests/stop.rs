//! `[stop]`: runs that end where their reward has saturated, on any number of ranks and after resumes, and what is
//! said of runs that end so, that cannot, and that have diverged.

mod common;

use std::{fs, path::Path};

use common::{
    empty_folder, one_at_a_time, rldiff, run_within,
    runs::{assert_same_run, checkpoint, command, computed_lines, train, LIMIT, TINY},
    set,
};
use rldiff::{
    config::RewardSource,
    convergence::{Criterion, Rewards},
    telemetry::{names, read_metrics, Reason, RunFiles, SampleSheet, Summary},
};

const MOST: u64 = 60;
/// Two tasks are trained on; windows of two iterations.
const SETTINGS: [&str; 6] = [
    "run.iterations=60",
    "run.checkpoint_every=1",
    "run.keep_checkpoints=99",
    "task.parity.train=false",
    "evaluation.prompts=1",
    "evaluation.images=2",
];
const RULE: Criterion = Criterion { window: 2, patience: 1, min_iterations: 5, rise: 0.25, fall: 4.0 };

/// The table, with `rise` standard errors.
fn table(reward: &str, rise: f64) -> String {
    format!(
        "stop={{ criterion = 'saturation', reward = '{reward}', window = 2, patience = 1, min_iterations = 5, rise = {rise:?}, \
         fall = 4.0 }}"
    )
}

fn settings<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&TINY[..], &SETTINGS, more].concat()
}

fn summary(files: &RunFiles) -> Summary {
    Summary::read(&files.summary()).unwrap()
}

#[test]
fn a_run_ends_where_its_training_reward_has_saturated() {
    let _alone = one_at_a_time();
    let folder = empty_folder("stop-training");
    let at = |name: &str| RunFiles::new(folder.join(name));
    let table = table("training", RULE.rise);
    let settings = settings(&["evaluation.every=3", &table]);
    let one = at("one");
    let done = train(1, one.root(), &settings, &[]);
    let found = summary(&one);
    let (end, ended) = (found.iterations, found.ended.unwrap());
    assert!(end < MOST && end % 2 == 0 && end > 5, "{end}");
    assert_eq!((ended.reason, ended.iterations, ended.at_most), (Reason::Saturated, end, MOST));
    let words = format!(
        "the training reward has saturated after {end} of at most {MOST} iterations: no rise by more than 0.25"
    );
    assert!(ended.words.starts_with(&words) && done.stderr.contains(&words), "{}\n{}", ended.words, done.stderr);
    for curve in ["composition: ", "preference: ", "mean of tasks: "] {
        assert!(ended.words.contains(curve), "{}", ended.words);
    }
    assert!(!ended.words.contains("parity"), "{}", ended.words);

    // it is where the definition says, from the metrics alone
    let history = read_metrics(&one.metrics()).unwrap();
    let rewards = Rewards::of(["composition", "preference"], &history);
    assert_eq!(RULE.first_saturated(&rewards.curves(RewardSource::Training), end), Some(end));
    assert_eq!(history.len() as u64, end);
    for metrics in &history {
        let complete = (metrics.iteration + 1) % 2 == 0;
        for name in ["composition/window_mean", "preference/window_mean", "window_mean"] {
            assert_eq!(metrics.get(name).is_some(), complete, "{name} in iteration {}", metrics.iteration + 1);
        }
        assert_eq!(metrics.get("window_rise").is_some(), complete && metrics.iteration > 2);
    }
    assert!(["composition", "preference"]
        .iter()
        .all(|t| history[end as usize - 1].get(&format!("{t}/window_rise")) <= Some(0.25)));

    // it ends like any other: an evaluation, a checkpoint, the results; and the page says why
    let last = SampleSheet::list(&one.samples("preference")).unwrap().last().unwrap().0;
    assert_eq!(last, end);
    assert!(checkpoint(&one, end).is_dir() && one.model().is_dir() && one.before_after().is_file());
    let mut report = rldiff(1, &folder);
    report.args(["report", "one"]);
    run_within(report, LIMIT).expect_success("report");
    let page = fs::read_to_string(folder.join("one/report.html")).unwrap();
    assert!(page.contains(&format!("{end} of {MOST} (saturated)")) && page.contains(&words), "the page says nothing");

    // the same on two ranks, and from checkpoints early and late; one of them without the metrics of before
    let two = at("two");
    train(2, two.root(), &settings, &[]);
    assert_same_run(&one, &two, end);
    for (from, ranks) in [(1, 1), (end / 2, 2), (end - 1, 1)] {
        let resumed = at(&format!("from-{from}"));
        train(ranks, resumed.root(), &settings, &["--resume", checkpoint(&one, from).to_str().unwrap()]);
        assert_same_run(&one, &resumed, end);
        assert_eq!(summary(&resumed).ended.unwrap(), summary(&one).ended.unwrap());
    }
    let alone = folder.join("alone");
    fs::create_dir(&alone).unwrap();
    copy_folder(&checkpoint(&one, end - 1), &alone.join("iteration"));
    let resumed = at("without-metrics");
    train(1, resumed.root(), &settings, &["--resume", alone.join("iteration").to_str().unwrap()]);
    assert_eq!(summary(&resumed).iterations, end);

    // nothing is left to do, unless the table goes
    let again = train(2, one.root(), &settings, &["--resume", "auto"]);
    assert!(again.stdout.contains("the training reward has saturated after"), "{}", again.stdout);
    let most = format!("run.iterations={}", end + 1);
    let further = [&settings[..], &[&most, "stop.criterion=none"]].concat();
    train(1, one.root(), &further, &["--resume", "auto"]);
    let found = summary(&one);
    assert_eq!((found.iterations, found.ended.unwrap().reason), (end + 1, Reason::IterationsDone));
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for file in fs::read_dir(from).unwrap() {
        let file = file.unwrap().path();
        fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
    }
}

/// By the evaluations: one that a signal has dropped decides when it is made up for.
#[test]
fn a_run_ends_where_its_evaluated_reward_has_saturated() {
    let _alone = one_at_a_time();
    let folder = empty_folder("stop-evaluation");
    let (straight, cut) = (RunFiles::new(folder.join("straight")), RunFiles::new(folder.join("cut")));
    let table = table("evaluation", 1e6);
    let settings = settings(&["evaluation.every=1", &table]);
    train(1, straight.root(), &settings, &[]);
    let found = summary(&straight).ended.unwrap();
    // no rise is large enough: the first window that ends after min_iterations
    assert_eq!((found.reason, found.iterations), (Reason::Saturated, 6));
    assert!(found.words.starts_with("the evaluated reward has saturated after 6 "), "{}", found.words);
    // of the base model, after each iteration: the last is the seventh
    let mut stopped = command(1, cut.root(), &settings, &[]);
    stopped.env("RLDIFF_FAULT", "at=evaluation,nth=7,kind=term");
    let stopped = run_within(stopped, LIMIT);
    assert_eq!(stopped.status.code(), Some(75), "{}", stopped.stderr);
    assert!(stopped.stderr.contains("the evaluation after iteration 6 was dropped"), "{}", stopped.stderr);
    train(2, cut.root(), &settings, &["--resume", "auto"]);
    assert_same_run(&straight, &cut, 6);
}

/// The checkpoints have no rewards then; the metrics have.
#[test]
fn a_run_without_the_table_is_as_before_and_can_get_it_when_it_is_resumed() {
    let _alone = one_at_a_time();
    let folder = empty_folder("stop-added");
    let (plain, none, added) =
        (RunFiles::new(folder.join("plain")), RunFiles::new(folder.join("none")), RunFiles::new(folder.join("added")));
    let table = table("training", 1e6);
    let seven = settings(&["evaluation.every=0", "run.iterations=7"]);
    train(1, plain.root(), &seven, &[]);
    let config = fs::read_to_string(plain.config()).unwrap();
    assert!(!config.contains("[stop]"), "{config}");
    train(1, none.root(), &[&seven[..], &[&table, "stop.criterion=none"]].concat(), &[]);
    assert_same_run(&plain, &none, 7);
    assert!(computed_lines(&plain).iter().flat_map(|(_, line)| line).all(|(name, _)| !name.contains("window")));

    let with = settings(&["evaluation.every=0", &table]);
    let from = checkpoint(&plain, 3);
    train(2, added.root(), &with, &["--resume", from.to_str().unwrap()]);
    assert_eq!(summary(&added).iterations, 6);
    // without the metrics the first windows are not known, and that is said
    let alone = folder.join("alone");
    copy_folder(&from, &alone);
    let resumed = RunFiles::new(folder.join("resumed"));
    let done = train(1, resumed.root(), &with, &["--resume", alone.to_str().unwrap()]);
    assert!(
        done.stderr.contains("the rewards of 3 of the 3 iterations that are done are not known"),
        "{}",
        done.stderr
    );
    assert_eq!(summary(&resumed).iterations, 8);
}

#[test]
fn what_the_table_will_do_is_said_before() {
    let folder = empty_folder("stop-check");
    let check = |more: &[&str]| {
        let mut command = rldiff(1, &folder);
        command.arg("check").args(set(more));
        run_within(command, LIMIT).expect_success("check").stdout
    };
    let table = table("training", 1.0);
    let said = check(&["run.iterations=50", &table]);
    let line = said.lines().find(|line| line.starts_with("stop ")).unwrap_or_else(|| panic!("{said}"));
    for words in ["saturation of the training reward", "after 5 iterations or more", "at most 50 iterations"] {
        assert!(line.contains(words), "{line}");
    }
    assert!(said.contains("in all") && said.contains("per iteration, at most "), "{said}");
    assert!(
        check(&["run.iterations=6", &table]).contains("[stop] has no effect: it cannot end a run before iteration 6")
    );
    assert!(!check(&[]).lines().any(|line| line.starts_with("stop")));
    let short = train(1, &folder.join("short"), &settings(&["evaluation.every=0", "run.iterations=2", &table]), &[]);
    assert_eq!(short.stderr.matches("[stop] has no effect").count(), 1, "{}", short.stderr);
}

/// A learning rate that ruins the model: its pictures hold no objects any more.
#[test]
fn a_run_that_falls_back_is_said_to_have_diverged() {
    let _alone = one_at_a_time();
    let folder = empty_folder("stop-diverged");
    let files = RunFiles::new(folder.join("ruined"));
    let ruin = [
        "run.iterations=16",
        "evaluation.every=0",
        "task.preference.train=false",
        "task.composition.samples=16",
        "update.learning_rate=0.1",
        "update.max_grad_norm=0.0",
        "update.warmup_steps=100",
    ];
    let done = train(1, files.root(), &settings(&ruin), &[]);
    let history = read_metrics(&files.metrics()).unwrap();
    let rewards: Vec<f64> = history.iter().filter_map(|m| m.get(&names::reward_mean("composition"))).collect();
    let found = summary(&files).diverged;
    assert_eq!(found.len(), 1, "{rewards:?}");
    assert_eq!((found[0].task.as_str(), found[0].newest_iterations), ("composition", [13, 16]));
    assert!(found[0].best > 2.0 * found[0].newest, "{rewards:?}");
    let words = found[0].to_string();
    assert!(words.contains("fell back from") && done.stderr.contains(&words), "{words}: {}", done.stderr);
    let mut report = rldiff(1, &folder);
    report.args(["report", "ruined"]);
    run_within(report, LIMIT).expect_success("report");
    let page = fs::read_to_string(folder.join("ruined/report.html")).unwrap();
    assert!(page.contains(&format!("<p class=\"warning\">{words}")), "the page says nothing");
}
