//! Ranks that hang, stop, are slow, differ or compute nonsense: each is noticed, named and ends the run (a slow one is
//! only named).

mod common;

use std::{
    fs,
    time::{Duration, Instant},
};

use common::{
    descendants, empty_folder, one_at_a_time, run_within,
    runs::{command, LIMIT, TINY},
    Finished,
};
use rldiff::telemetry::{read_metrics, RunFiles};

const RANKS: usize = 2;
/// Seconds after a limit in which all ranks must have ended.
const GRACE: Duration = Duration::from_secs(5);

fn host() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim().to_string()
}

fn faulty(name: &str, settings: &[&str], fault: &str) -> (RunFiles, Finished) {
    let files = RunFiles::new(empty_folder(name).join("run"));
    let mut run = command(RANKS, files.root(), &[&TINY[..], settings].concat(), &[]);
    run.env("RLDIFF_FAULT", fault);
    let done = run_within(run, LIMIT);
    (files, done)
}

/// When the record of the last iteration before the hang was written: shortly before the hang began.
fn ended_after_metrics(files: &RunFiles, done: &Finished, began: std::time::SystemTime) -> Duration {
    let hang = fs::metadata(files.metrics()).unwrap().modified().unwrap();
    (began + done.took).duration_since(hang).unwrap()
}

/// A rank hangs in the second iteration: in a stage, where the other waits for it, and in its reward.
#[test]
fn a_rank_that_hangs_is_named_with_its_host_and_operation() {
    let _alone = one_at_a_time();
    for (at, limits, wanted) in [
        (
            "update",
            ["run.collective_limit=3.0", "run.reward_limit=0.0"],
            format!("rank 1 on {} is late: it is in update (composition) of iteration 2 for", host()),
        ),
        (
            "reward",
            ["run.collective_limit=60.0", "run.reward_limit=3.0"],
            format!("rank 1 on {} is late: it is in reward (composition) of iteration 2 for", host()),
        ),
    ] {
        let fault = format!("rank=1,at={at},iteration=1,kind=hang");
        let began = std::time::SystemTime::now();
        let (files, done) = faulty("watching-hang", &limits, &fault);
        assert_eq!(done.status.code(), Some(1), "{at}: {}\n{}", done.status, done.stderr);
        assert!(done.stderr.contains(&wanted), "{at}: not {wanted:?}\n{}", done.stderr);
        assert!(!done.stderr.contains("rank 0 on"), "{at}: the innocent rank is named\n{}", done.stderr);
        // what lies between the metrics and the hang (a checkpoint, the stages before) counts as well
        let after = ended_after_metrics(&files, &done, began);
        assert!(after < Duration::from_secs(3) + GRACE, "{at}: ended {after:?} after the last iteration");
        println!("hang in {at}, limit 3 s: all ranks ended {:.1} s after the last iteration", after.as_secs_f64());
    }
}

/// A rank whose whole process stands still cannot say so itself.
#[test]
fn a_rank_that_is_stopped_is_named() {
    let _alone = one_at_a_time();
    let files = RunFiles::new(empty_folder("watching-stopped").join("run"));
    let settings =
        [&TINY[..], &["run.iterations=100000", "run.checkpoint_every=0", "run.collective_limit=3.0"]].concat();
    let run = command(RANKS, files.root(), &settings, &[]);
    let stopped = std::sync::Mutex::new(None);
    let done = std::thread::scope(|scope| {
        scope.spawn(|| {
            let pid = rank_1_once_it_trains(&files);
            // SAFETY: a signal to a process that this test has started.
            assert_eq!(unsafe { libc::kill(pid, libc::SIGSTOP) }, 0);
            *stopped.lock().unwrap() = Some(Instant::now());
        });
        let done = run_within(run, LIMIT);
        (done, Instant::now())
    });
    let (done, ended) = done;
    let took = ended - stopped.lock().unwrap().unwrap();
    let wanted = format!("rank 1 on {} does not answer: its process is stopped or its host is gone", host());
    assert!(!done.status.success() && done.stderr.contains(&wanted), "{}", done.stderr);
    assert!(took < Duration::from_secs(3) + GRACE, "{took:?}");
    println!("SIGSTOP, limit 3 s: all ranks ended after {:.1} s", took.as_secs_f64());
}

fn rank_1_once_it_trains(files: &RunFiles) -> i32 {
    let is_rank_1 = |pid: &i32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let ranks = [&b"PMI_RANK=1"[..], b"OMPI_COMM_WORLD_RANK=1"];
        name.trim() == "rldiff" && environment.split(|&byte| byte == 0).any(|variable| ranks.contains(&variable))
    };
    let started = Instant::now();
    while read_metrics(&files.metrics()).map_or(0, |lines| lines.len()) == 0 {
        assert!(started.elapsed() < LIMIT, "the run did not begin");
        std::thread::sleep(Duration::from_millis(5));
    }
    descendants(std::process::id() as i32).into_iter().find(is_rank_1).expect("there is a rank 1")
}

#[test]
fn a_slow_rank_is_named_within_three_iterations() {
    let _alone = one_at_a_time();
    let settings = ["run.iterations=3", "run.checkpoint_every=0"];
    let (files, done) = faulty("watching-slow", &settings, "rank=1,at=rollout,kind=slow,ms=600");
    let done = done.expect_success("a slow rank ends no run");
    let line = done.stderr.lines().find(|line| line.contains("is slow")).unwrap_or_else(|| panic!("{}", done.stderr));
    assert!(line.contains(&format!("rank 1 on {} is slow: rollout took", host())), "{line}");
    assert!(["iteration 2:", "iteration 3:"].iter().any(|at| line.contains(at)), "{line}");
    // (of another stage it may be, on a busy machine)
    assert!(!done.stderr.contains(&format!("rank 0 on {} is slow: rollout", host())), "{}", done.stderr);
    assert_eq!(read_metrics(&files.metrics()).unwrap().len(), 3);
    println!("{line}");
}

#[test]
fn replicas_that_differ_stop_the_run_before_they_are_saved() {
    let _alone = one_at_a_time();
    let settings = ["run.iterations=4", "run.compare_every=2", "run.checkpoint_every=2"];
    // the lowest bit of one weight in the first iteration; of one moment, where it may round away later, before the last
    // step that is taken
    for (at, when, named) in [("weights", "iteration=0", "weights"), ("moments", "iteration=1,nth=3", "exp_avg")] {
        let (files, done) = faulty("watching-differ", &settings, &format!("rank=1,at={at},{when},kind=flip"));
        assert_eq!(done.status.code(), Some(1), "{}", done.stderr);
        let wanted = format!("after iteration 2 rank 0 on {0}, rank 1 on {0} has other ", host());
        let line = done.stderr.lines().find_map(|line| Some(line.split_once(&wanted)?.1));
        let line = line.unwrap_or_else(|| panic!("{at}: {}", done.stderr));
        assert!(line.split(" and no majority").next().unwrap().split(", ").any(|name| name == named), "{at}: {line}");
        assert!(!files.checkpoints().exists(), "a checkpoint of two different models");
    }
}

/// NaN in a log-probability, a gradient or a weight of one rank: both ranks stop in that step, and nothing is saved.
#[test]
fn nan_is_caught_on_all_ranks_in_the_same_step() {
    let _alone = one_at_a_time();
    for (at, wanted) in [
        ("log_prob", "rank 1: not finite: log-probability of lane 1"),
        ("gradient", "rank 1: not finite: objective of lane 1"),
        ("weights", "rank 1: not finite: weights"),
    ] {
        // the weights after the last of three policy steps, so that the pretraining meets them and not a reward
        let nth = if at == "weights" { 3 } else { 1 };
        let fault = format!("rank=1,at={at},iteration=1,nth={nth},kind=nan");
        let (files, done) = faulty("watching-nan", &["run.iterations=3"], &fault);
        assert_eq!(done.status.code(), Some(1), "{at}: {}\n{}", done.status, done.stderr);
        for rank in 0..RANKS {
            let line = done.stderr.lines().find(|line| line.starts_with(&format!("error: rank {rank}: ")));
            let line = line.unwrap_or_else(|| panic!("{at}: rank {rank} says nothing\n{}", done.stderr));
            assert!(line.contains(wanted) || at == "weights" && line.contains("not finite"), "{at}: {line}");
        }
        assert!(done.stderr.contains(wanted), "{at}: {}", done.stderr);
        assert_eq!(read_metrics(&files.metrics()).unwrap().len(), 1, "{at}: later iterations were logged");
        let newest = rldiff::store::load_latest(&files.checkpoints(), &rldiff::comm::Local).unwrap();
        if let Some(newest) = newest {
            assert_eq!(newest.checkpoint.iteration, 1, "{at}");
            assert!(newest.checkpoint.vector("weights").unwrap().iter().all(|w| w.is_finite()), "{at}");
        }
        println!("NaN in {at} of rank 1: both ranks ended in that step");
    }
}

/// A reward that is not finite leaves its sample out, up to the share that is allowed; beyond it all ranks stop.
#[test]
fn a_nan_reward_is_left_out_or_stops_all_ranks() {
    let _alone = one_at_a_time();
    let fault = "rank=1,at=rewards,iteration=1,kind=nan";
    let (_, done) = faulty("watching-reward", &["run.iterations=3"], fault);
    assert_eq!(done.status.code(), Some(1), "{}", done.stderr);
    for rank in 0..RANKS {
        let line = format!("error: rank {rank}: task composition: 1 of 2 rewards are not finite");
        assert!(done.stderr.contains(&line), "{line}\n{}", done.stderr);
    }
    let settings = ["run.iterations=3", "advantage.max_bad_fraction=0.5"];
    let (files, done) = faulty("watching-reward", &settings, fault);
    done.expect_success("half of the rewards may be bad");
    let bad: Vec<_> = read_metrics(&files.metrics()).unwrap().iter().map(|m| m.get("bad_rewards").unwrap()).collect();
    assert_eq!(bad, [0.0, 1.0, 0.0]);
    let newest = rldiff::store::load_latest(&files.checkpoints(), &rldiff::comm::Local).unwrap().unwrap();
    assert!(newest.checkpoint.vectors.iter().all(|(_, values)| values.iter().all(|v| v.is_finite())));
}
