//! Signals in every stage of a run, at chosen points: they are acknowledged at once, the program ends with code 75 in time
//! and says what became of what it was at, and the run that is resumed ends as the one that nothing interrupted, bit for
//! bit. (Signals at random moments: `tests/signals.rs`.)

mod common;

use std::{
    io::{BufRead, BufReader},
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Command, ExitStatus, Stdio},
    sync::mpsc::channel,
    time::{Duration, Instant},
};

use common::{
    empty_folder, files_below, one_at_a_time, rldiff, run_within,
    runs::{assert_same_run, command, train, LIMIT, TINY},
    say,
};
use rldiff::telemetry::{RunFiles, Summary};

/// From the signal to its acknowledgement, and to the end of the program.
const AT_ONCE: Duration = Duration::from_secs(2);
const IN_TIME: Duration = Duration::from_secs(20);

const ITERATIONS: u64 = 4;
const SETTINGS: [&str; 5] =
    ["run.iterations=4", "run.checkpoint_every=2", "evaluation.every=1", "evaluation.prompts=2", "evaluation.images=2"];

/// What a program printed on standard error, by the time of each line, and how and when it ended.
struct Ended {
    status: ExitStatus,
    at: Instant,
    lines: Vec<(Instant, String)>,
}

impl Ended {
    fn of(mut command: Command) -> Ended {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (sender, receiver) = channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let _ = sender.send((Instant::now(), line));
            }
        });
        let started = Instant::now();
        let status = loop {
            match child.try_wait().unwrap() {
                Some(status) => break status,
                None if started.elapsed() > LIMIT => {
                    common::descendants(child.id() as i32).into_iter().for_each(|pid| {
                        // SAFETY: a signal to a process that this test has started.
                        unsafe { libc::kill(pid, libc::SIGKILL) };
                    });
                    panic!("{command:?}: still running after {LIMIT:?}: {:?}", receiver.try_iter().collect::<Vec<_>>());
                }
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let at = Instant::now();
        Ended { status, at, lines: receiver.iter().collect() }
    }

    fn text(&self) -> String {
        self.lines.iter().map(|(_, line)| format!("{line}\n")).collect()
    }

    /// When the first line with `text` came.
    fn time_of(&self, text: &str) -> Instant {
        let line = self.lines.iter().find(|(_, line)| line.contains(text));
        line.unwrap_or_else(|| panic!("no line says {text:?}:\n{}", self.text())).0
    }

    /// Acknowledged once and at once, code 75 in time; gives the seconds from the signal to the end.
    fn expect_interrupted(&self, what: &str) -> f64 {
        let text = self.text();
        assert_eq!(self.status.code(), Some(75), "{what}: {}\n{text}", self.status);
        let asked = self.time_of("asks to stop");
        let acknowledgements = ["SIGTERM: ", "another rank was asked to stop: "];
        let said: Vec<_> =
            self.lines.iter().filter(|(_, line)| acknowledgements.iter().any(|a| line.starts_with(a))).collect();
        assert_eq!(said.len(), 1, "{what}: acknowledgements\n{text}");
        assert!(said[0].0.saturating_duration_since(asked) < AT_ONCE, "{what}: acknowledged late\n{text}");
        let took = self.at - asked;
        assert!(took < IN_TIME, "{what}: took {took:?}\n{text}");
        took.as_secs_f64()
    }
}

/// A place of the signal, how it is acknowledged where rank 0 has it, and what is said in the end.
const STAGES: [(&str, &str, &str); 12] = [
    ("at=loading", "leaving before the next part of the loading", "go on with --resume auto"),
    (
        "at=evaluation",
        "the evaluation of the base model is dropped at the next denoising step",
        "nothing to save; the evaluation of the base model was dropped",
    ),
    ("at=rollout", "iteration 1 is dropped at the next", "nothing to save; the roll-out of iteration 1 was dropped"),
    (
        "at=optimizer",
        "iteration 1 is at changing the weights: it is finished first",
        "saved after iteration 1; the evaluation after iteration 1 was dropped",
    ),
    // made up for by the resumed run
    (
        "at=evaluation",
        "the evaluation after iteration 1 is dropped",
        "saved after iteration 1; the evaluation after iteration 1 was dropped",
    ),
    (
        "at=step,iteration=1,nth=2",
        "iteration 2 is dropped at the next denoising step or reward batch; the state after iteration 1 is kept",
        "saved after iteration 1; the roll-out of iteration 2 was dropped",
    ),
    (
        "at=reward,iteration=1",
        "iteration 2 is dropped",
        "saved after iteration 1; the roll-out of iteration 2 was dropped",
    ),
    (
        "at=pretrain,iteration=1",
        "iteration 2 is at changing the weights: it is finished first",
        "saved after iteration 2; the evaluation after iteration 2 was dropped",
    ),
    (
        "at=advantage,iteration=2",
        "iteration 3 is at changing the weights: it is finished first",
        "saved after iteration 3; the evaluation after iteration 3 was dropped",
    ),
    (
        "at=saving,iteration=3",
        "iteration 4 is done: it is saved first",
        "saved after iteration 4; the evaluation at the end was dropped",
    ),
    (
        "at=step,nth=5",
        "the evaluation at the end is dropped at the next denoising step",
        "saved after iteration 4; the evaluation at the end was dropped",
    ),
    (
        "at=evaluation",
        "the evaluation at the end is dropped at the next denoising step",
        "saved after iteration 4; the evaluation at the end was dropped",
    ),
];

/// One run that a signal stops in every stage, one after the other, on `ranks` ranks; `only` one rank gets every other
/// signal where there are several.
fn in_every_stage(ranks: usize, name: &str) {
    let _alone = one_at_a_time();
    let folder = empty_folder(name);
    let settings = [&TINY[..], &SETTINGS].concat();
    let (straight, files) = (RunFiles::new(folder.join("straight")), RunFiles::new(folder.join("stopped")));
    train(1, straight.root(), &settings, &[]);
    let mut longest = 0f64;
    for (n, (place, acknowledged, left)) in STAGES.iter().enumerate() {
        let one = ranks > 1 && n % 2 == 1;
        let fault = if one { format!("{place},rank=1,kind=term") } else { format!("{place},kind=term") };
        let mut stopped = command(ranks, files.root(), &settings, &["--resume", "auto"]);
        stopped.env("RLDIFF_FAULT", &fault);
        let ended = Ended::of(stopped);
        let took = ended.expect_interrupted(&format!("{fault}, {ranks} ranks"));
        longest = longest.max(took);
        ended.time_of(left);
        if !one {
            ended.time_of(acknowledged);
        }
        assert_eq!(files.root().exists(), n > 0, "{fault}: a folder before there is anything to keep");
        assert!(!files.summary().exists(), "{fault}: it came to its end");
    }
    train(1, files.root(), &settings, &["--resume", "auto"]);
    assert_same_run(&straight, &files, ITERATIONS);
    let stages = STAGES.len();
    say(&format!("{stages} stages on {ranks} ranks: code 75 after {longest:.2} s at most, then the same bits"));
}

#[test]
fn a_signal_in_every_stage() {
    in_every_stage(1, "endings-1");
}

#[test]
fn a_signal_in_every_stage_to_one_rank_and_to_both() {
    in_every_stage(2, "endings-2");
}

/// What is kept by nobody but the trainer: no checkpoints were asked for, and the average of the weights is what is
/// evaluated.
#[test]
fn the_last_state_is_saved_where_nothing_was_and_its_average_is_in_use() {
    let _alone = one_at_a_time();
    let folder = empty_folder("endings-average");
    let more = ["run.iterations=1", "run.checkpoint_every=0", "ema.decay=0.5", "evaluation.every=0"];
    let settings = [&TINY[..], &more].concat();
    let (straight, files) = (RunFiles::new(folder.join("straight")), RunFiles::new(folder.join("stopped")));
    train(1, straight.root(), &settings, &[]);
    let mut stopped = command(1, files.root(), &settings, &[]);
    stopped.env("RLDIFF_FAULT", "at=step,nth=22,kind=term");
    let ended = Ended::of(stopped);
    ended.expect_interrupted("in the last evaluation");
    ended.time_of("saved after iteration 1; the evaluation at the end was dropped");
    train(1, files.root(), &settings, &["--resume", "auto"]);
    let model = |files: &RunFiles| -> Vec<Vec<u8>> {
        files_below(&files.model()).into_iter().map(|(_, bytes)| bytes).collect()
    };
    assert!(model(&straight) == model(&files), "other models");
    let tasks = |files: &RunFiles| Summary::read(&files.summary()).unwrap().tasks;
    assert_eq!(tasks(&straight), tasks(&files));
}

/// Ctrl-C is like SIGTERM; the second one does not wait for the iteration.
#[test]
fn the_second_ctrl_c_ends_at_once() {
    let _alone = one_at_a_time();
    let folder = empty_folder("endings-ctrl-c");
    let settings = [&TINY[..], &SETTINGS].concat();
    let mut slow = command(1, &folder.join("run"), &settings, &[]);
    slow.env("RLDIFF_FAULT", "at=optimizer,kind=slow,ms=4000");
    slow.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = slow.spawn().unwrap();
    let lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    let ctrl_c = |child: &std::process::Child| {
        // SAFETY: a signal to a child that has not been waited for.
        unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    };
    let mut asked = None;
    for line in lines {
        if line.contains("results in") {
            // past the start, and the first update takes four seconds
            std::thread::sleep(Duration::from_secs(2));
            ctrl_c(&child);
        }
        if line.starts_with("SIGINT (Ctrl-C again ends at once): ") {
            std::thread::sleep(Duration::from_millis(700));
            ctrl_c(&child);
            asked = Some(Instant::now());
        }
    }
    let status = child.wait().unwrap();
    assert_eq!(status.signal(), Some(libc::SIGINT), "{status}");
    assert!(asked.expect("acknowledged").elapsed() < AT_ONCE);
}

/// The pieces that an evaluation has judged are kept.
#[test]
fn an_evaluation_goes_on() {
    let _alone = one_at_a_time();
    let folder = empty_folder("endings-eval");
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/small.toml");
    let evaluate = |out: &str| {
        let mut command = rldiff(1, &folder);
        command.args(["eval", "--out", out]).arg(&config);
        command
    };
    run_within(evaluate("straight"), LIMIT).expect_success("eval");
    for fault in ["at=step,nth=2,kind=term", "at=reward,nth=2,kind=term", "at=step,nth=9,kind=term"] {
        let mut stopped = evaluate("stopped");
        stopped.env("RLDIFF_FAULT", fault);
        let ended = Ended::of(stopped);
        ended.expect_interrupted(fault);
        ended.time_of("leaving at the next denoising step; the pieces that are judged are kept");
        ended.time_of("the same command goes on where this one has stopped");
    }
    run_within(evaluate("stopped"), LIMIT).expect_success("eval, again");
    let results = |out: &str| std::fs::read(folder.join(out).join("results.json")).unwrap();
    assert!(results("straight") == results("stopped"), "other results");
}
