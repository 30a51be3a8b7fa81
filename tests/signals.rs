//! Signals at random moments, to one rank, to all, to the launcher, doubled, during a save: the run ends in time with
//! code 75 or 0, its newest checkpoint is sound, and resumed to the end it is the run that nothing interrupted.

mod common;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use common::{empty_folder, listening_ranks, one_at_a_time, rldiff, run_within, say, set, SMALL};
use rldiff::{
    store,
    telemetry::{read_metrics, RunFiles},
};

/// For a start, whatever is left of the run, and its evaluation; 12 s were observed on two busy cores.
const LIMIT: Duration = Duration::from_secs(90);
const RANKS: usize = 2;
const SIGNALS: [(&str, i32); 3] = [("TERM", libc::SIGTERM), ("USR1", libc::SIGUSR1), ("USR2", libc::SIGUSR2)];

fn run(files: &RunFiles) -> Command {
    let mut command = rldiff(RANKS, files.root().parent().unwrap());
    command.args(set(&SMALL)).args(set(&["run.iterations=4", "method.timesteps=1", "rollout.steps=3"]));
    command.args(["--resume", "auto", "--out"]).arg(files.root());
    command
}

/// SplitMix64: the moments must not change with the program.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

fn send(pid: i32, signal: i32) {
    // SAFETY: a signal to a process that this test has started, directly or through the launcher.
    unsafe { libc::kill(pid, signal) };
}

/// Waits for `condition`, at most until the child has ended or the limit is over; says whether it came true.
fn wait_for(child: &mut Child, mut condition: impl FnMut() -> bool) -> bool {
    let started = Instant::now();
    loop {
        if condition() {
            return true;
        }
        if child.try_wait().unwrap().is_some() || started.elapsed() > LIMIT {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn wait_to_end(child: &mut Child, what: &str) -> ExitStatus {
    let started = Instant::now();
    while started.elapsed() < LIMIT {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    for pid in common::descendants(child.id() as i32) {
        send(pid, libc::SIGKILL);
    }
    child.wait().unwrap();
    panic!("{what}: still running after {LIMIT:?}");
}

/// One start of the run with one delivery; whether the run is complete afterwards.
fn deliver(files: &RunFiles, dice: &mut Dice, moments: Duration, seen: &mut BTreeMap<String, usize>) -> bool {
    let (signal_name, signal) = SIGNALS[dice.below(3)];
    let during_save = dice.below(4) == 0;
    let target = ["one rank", "all ranks", "the launcher"][dice.below(3)];
    let times = 1 + dice.below(2);
    let after = moments.mul_f64((dice.next() >> 11) as f64 / (1u64 << 53) as f64);
    let what = format!("{signal_name} ×{times} to {target}{}", if during_save { " during a save" } else { "" });

    let mut child = run(files).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let launcher = child.id() as i32;
    let mut ranks = Vec::new();
    // before its first instructions no program can do anything about a signal
    let all_listen = wait_for(&mut child, || {
        ranks = listening_ranks(launcher);
        ranks.len() == RANKS
    });
    assert!(all_listen, "{what}: the ranks did not start");
    if during_save {
        let saves = || {
            let entries = fs::read_dir(files.checkpoints()).into_iter().flatten().flatten();
            entries.into_iter().any(|entry| entry.file_name().to_string_lossy().contains(".partial"))
        };
        wait_for(&mut child, saves);
    } else {
        std::thread::sleep(after);
    }
    for _ in 0..times {
        match target {
            "one rank" => send(ranks[dice.below(RANKS)], signal),
            "all ranks" => ranks.iter().for_each(|&rank| send(rank, signal)),
            // the launcher may be gone, but has not been waited for, so its id is still its own
            _ => send(launcher, signal),
        }
    }
    let status = wait_to_end(&mut child, &what);
    // a launcher may end everything at once at TERM, and die of USR2 (MPICH's does); the code is then its own, and the
    // run must survive that
    let by_launcher = target == "the launcher" && signal != libc::SIGUSR1;
    let started = Instant::now();
    while ranks.iter().any(|rank| Path::new(&format!("/proc/{rank}")).exists()) {
        assert!(started.elapsed() < LIMIT, "{what}: ranks outlive the launcher");
        std::thread::sleep(Duration::from_millis(5));
    }
    let outcome = match status.code() {
        Some(75) => "saved and left",
        Some(0) => "done",
        _ if by_launcher => "ended by the launcher",
        _ => panic!("{what}, {after:?} after the start: {status}"),
    };
    *seen.entry(format!("{target}: {outcome}")).or_default() += 1;
    if files.checkpoints().is_dir() {
        // reads and verifies the newest
        let newest = fs::read_dir(files.checkpoints()).unwrap().flatten();
        if newest.into_iter().any(|entry| !entry.file_name().to_string_lossy().contains(".partial")) {
            store::digest(files.root()).unwrap_or_else(|e| panic!("{what}, {after:?} after the start: {e:#}"));
        }
    }
    status.code() == Some(0)
}

/// `count` deliveries, over as many runs as they need; each run ends like the one that nothing interrupted.
fn storm(name: &str, seed: u64, count: usize) {
    let _alone = one_at_a_time();
    let folder = empty_folder(name);
    let straight = RunFiles::new(folder.join("straight"));
    let started = Instant::now();
    run_within(run(&straight), LIMIT).expect_success("the run that nothing interrupts");
    // later than the run's end now and then
    let moments = started.elapsed().mul_f64(1.1);
    let rewards = |files: &RunFiles| -> Vec<_> {
        let lines = read_metrics(&files.metrics()).unwrap();
        let computed = |name: &str| name.contains("reward_mean") || name.contains("gradient_norm");
        lines.iter().flat_map(|line| line.iter().filter(|(n, _)| computed(n)).map(|(_, v)| v.to_bits())).collect()
    };
    let expect_same = |files: &RunFiles| {
        let name = files.root().display();
        assert_eq!(store::digest(files.root()).unwrap(), store::digest(straight.root()).unwrap(), "{name}: state");
        assert_eq!(rewards(files), rewards(&straight), "{name}: metrics");
        assert!(files.summary().is_file(), "{name}: no results");
    };

    let (mut dice, mut seen, mut runs) = (Dice(seed), BTreeMap::new(), 1);
    let mut files = RunFiles::new(folder.join("run-1"));
    for _ in 0..count {
        if deliver(&files, &mut dice, moments, &mut seen) {
            expect_same(&files);
            runs += 1;
            files = RunFiles::new(folder.join(format!("run-{runs}")));
        }
    }
    run_within(run(&files), LIMIT).expect_success("the last run, resumed");
    expect_same(&files);
    say(&format!(
        "{count} signal deliveries, seed {seed}: {runs} runs, bit for bit like the uninterrupted one; {seen:?}"
    ));
    let left = seen.iter().filter(|(name, _)| name.ends_with("saved and left")).map(|(_, n)| n).sum::<usize>();
    assert!(left * 4 >= count, "only {left} of {count} deliveries stopped a run: the moments miss it");
}

#[test]
fn twelve_signals_at_random_moments() {
    storm("signals-short", 1, 12);
}

#[test]
#[ignore = "long: 200 deliveries, seven minutes on 2 busy cores"]
fn two_hundred_signals_at_random_moments() {
    storm("signals-long", 2, 200);
}

/// What has nothing to save ends at once.
#[test]
fn other_commands_die_of_a_signal() {
    let _alone = one_at_a_time();
    let mut command = rldiff(1, Path::new("."));
    let mut child = command.args(["bench", "iteration", "--measured", "1000"]).stdout(Stdio::null()).spawn().unwrap();
    let started = Instant::now();
    // past the start, where all commands still hold signals back
    while listening_ranks(child.id() as i32).is_empty() && started.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_micros(200));
    }
    send(child.id() as i32, libc::SIGTERM);
    assert_eq!(wait_to_end(&mut child, "bench").signal(), Some(libc::SIGTERM));
}
