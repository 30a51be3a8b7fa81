//! Whole runs of the binary: what they leave, that the number of ranks does not show, that resuming is exact.
//! Everything that should be equal is compared bit for bit.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use common::{mpirun, one_at_a_time, run_within, Finished};
use rldiff::telemetry::{read_metrics, Metrics, RunFiles, Summary};

const RLDIFF: &str = env!("CARGO_BIN_EXE_rldiff");
/// A whole test may take this long on busy cores; seconds were observed.
const LIMIT: Duration = Duration::from_secs(240);

/// The embedded experiment made small.
const SMALL: [&str; 13] = [
    "run.lanes=4",
    "run.iterations=4",
    "run.checkpoint_every=1",
    "run.keep_checkpoints=9",
    "trajectories.every=2",
    "pretrain.batch_per_lane=2",
    "task.composition.samples=8",
    "task.parity.samples=64",
    "task.parity.train=false",
    "task.preference.samples=8",
    "task.composition.evaluation_samples=8",
    "task.parity.evaluation_samples=32",
    "task.preference.evaluation_samples=8",
];

fn settings(extra: &[&str]) -> Vec<String> {
    SMALL.iter().chain(extra).flat_map(|s| ["--set".to_string(), s.to_string()]).collect()
}

fn command(ranks: usize, out: &Path, extra: &[&str]) -> Command {
    let mut command = if ranks == 1 {
        Command::new(RLDIFF)
    } else {
        let mut launcher = mpirun(ranks);
        launcher.arg(RLDIFF);
        launcher
    };
    command.arg("--out").arg(out).args(settings(extra));
    command
}

fn run(ranks: usize, out: &Path, extra: &[&str]) -> Finished {
    let _alone = one_at_a_time();
    run_within(command(ranks, out, extra), LIMIT).expect_success(&format!("{ranks} ranks, {extra:?}"))
}

fn resume(ranks: usize, out: &Path, extra: &[&str]) -> Finished {
    let _alone = one_at_a_time();
    let mut command = command(ranks, out, extra);
    command.args(["--resume", "auto"]);
    run_within(command, LIMIT)
}

fn digest(path: &Path) -> String {
    let mut command = Command::new(RLDIFF);
    command.args(["inspect", "--digest"]).arg(path);
    run_within(command, LIMIT).expect_success("inspect").stdout
}

/// All metrics but the measured ones, as text with every digit.
fn numbers(out: &Path) -> Vec<Vec<(String, String)>> {
    let measured = |name: &str| name.starts_with("seconds/") || ["samples_per_second", "tflops"].contains(&name);
    let of = |m: &Metrics| {
        let kept = m.iter().filter(|(name, _)| !measured(name));
        kept.map(|(name, value)| (name.to_string(), format!("{value:?}"))).collect()
    };
    read_metrics(&RunFiles::new(out).metrics()).unwrap().iter().map(of).collect()
}

/// State, model and metrics of two runs are the same bits.
fn assert_same(a: &Path, b: &Path, what: &str) {
    assert_eq!(digest(a), digest(b), "{what}: training state");
    let unet = |run: &Path| fs::read(run.join("model/unet/diffusion_pytorch_model.safetensors")).unwrap();
    assert!(unet(a) == unet(b), "{what}: U-Net");
    let (a, b) = (numbers(a), numbers(b));
    assert_eq!(a.len(), b.len(), "{what}: iterations");
    for (line_a, line_b) in a.iter().zip(&b) {
        for (x, y) in line_a.iter().zip(line_b) {
            assert_eq!(x, y, "{what}: metrics");
        }
        assert_eq!(line_a.len(), line_b.len(), "{what}: number of metrics");
    }
}

#[test]
fn what_a_run_leaves() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let done = run(1, &out, &["task.parity.train=true", "run.iterations=2", "update.max_sensitivity=0.0"]);
    assert!(done.stdout.contains("in std. errors") && done.stdout.contains("preference"), "{}", done.stdout);

    let files = RunFiles::new(&out);
    for path in [files.config(), files.metrics(), files.reward_curves(), files.before_after(), files.summary()] {
        assert!(path.metadata().unwrap().len() > 100, "{}", path.display());
    }
    let summary: serde_json::Value = serde_json::from_slice(&fs::read(files.summary()).unwrap()).unwrap();
    for (i, name) in ["composition", "parity", "preference"].iter().enumerate() {
        assert_eq!(summary["tasks"][i]["name"], *name);
        for model in ["base", "tuned"] {
            assert!(summary["tasks"][i][model]["mean"].is_number(), "{summary}");
            assert!(summary["tasks"][i][model]["stderr"].is_number(), "{summary}");
        }
    }
    assert!(summary["samples_per_second"].as_f64().unwrap() > 0.0);
    assert_eq!(Summary::read(&files.summary()).unwrap().ratio_drift, 0.0);
    assert_eq!(fs::read_dir(files.tensorboard()).unwrap().count(), 1);
    assert!(files.model().join("model_index.json").exists());

    let history = read_metrics(&files.metrics()).unwrap();
    assert_eq!(history.len(), 2);
    for metrics in &history {
        for name in ["clip_fraction", "approx_kl", "ratio_drift", "gradient_norm", "bad_rewards", "pretraining_loss"] {
            assert!(metrics.get(name).is_some_and(f64::is_finite), "{name} in {metrics:?}");
        }
        for stage in ["rollout", "reward", "advantage", "update", "pretrain", "iteration"] {
            assert!(metrics.get(&format!("seconds/{stage}")).is_some(), "{stage}");
        }
        for name in ["samples_per_second", "tflops", "parity/reward_mean", "composition/reward_std"] {
            assert!(metrics.get(name).is_some(), "{name}");
        }
        // before the first update of a task's batch every ratio is exactly 1
        assert_eq!(metrics.get("ratio_drift"), Some(0.0));
    }

    // a second run of the name keeps the first
    run(1, &out, &["run.iterations=1"]);
    assert_eq!(read_metrics(&RunFiles::new(folder.path().join("run.1")).metrics()).unwrap().len(), 2);
    assert_eq!(read_metrics(&files.metrics()).unwrap().len(), 1);
}

/// Every timestep comes first sooner or later; none of them may have a ratio other than 1 before its update.
#[test]
fn the_first_ratio_is_one_at_every_timestep() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    run(
        1,
        &out,
        &["run.iterations=12", "update.timesteps=1", "update.max_sensitivity=0.0", "update.learning_rate=1e-3"],
    );
    let mut seen = std::collections::BTreeSet::new();
    for metrics in read_metrics(&RunFiles::new(&out).metrics()).unwrap() {
        for (name, value) in metrics.iter().filter(|(name, _)| name.starts_with("ratio_drift")) {
            assert_eq!(value, 0.0, "{name}");
            seen.insert(name.to_string());
        }
    }
    // the total and the six timesteps
    assert_eq!(seen.len(), 7, "{seen:?}");
}

#[test]
fn the_number_of_ranks_does_not_show() {
    let folder = tempfile::tempdir().unwrap();
    let one = folder.path().join("1");
    run(1, &one, &["run.iterations=2", "task.parity.train=true"]);
    for ranks in [2, 4] {
        let many = folder.path().join(ranks.to_string());
        run(ranks, &many, &["run.iterations=2", "task.parity.train=true"]);
        assert_same(&one, &many, &format!("{ranks} ranks"));
    }
}

#[test]
#[ignore = "long: 8 and 16 ranks on few cores"]
fn nor_do_many_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let extra = ["run.lanes=16", "task.composition.samples=16", "task.preference.samples=16"];
    run(1, &folder.path().join("1"), &extra);
    for ranks in [8, 16] {
        let many = folder.path().join(ranks.to_string());
        run(ranks, &many, &extra);
        assert_same(&folder.path().join("1"), &many, &format!("{ranks} ranks"));
    }
}

/// Settings that carry state of their own from one iteration to the next.
const STATEFUL: [&str; 6] = [
    "ema.decay=0.9",
    "advantage.normalisation=per_prompt",
    "advantage.prompt_min_count=1",
    "pretrain.mode=combined",
    "lora.rank=0",
    "model.compute=f32",
];

#[test]
fn a_stopped_run_resumes_to_the_same_bits_with_any_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    for (name, extra) in
        [("plain", &[][..]), ("stateful", &STATEFUL), ("adapters in bf16", &["lora.rank=2", "model.compute=bf16"])]
    {
        let through = folder.path().join(format!("{name} through"));
        run(1, &through, extra);
        let halves = folder.path().join(name);
        run(1, &halves, &[extra, &["run.iterations=2"]].concat());
        resume(2, &halves, extra).expect_success("resume");
        assert_same(&through, &halves, name);
    }
}

#[test]
fn a_killed_run_resumes_to_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let (through, killed) = (folder.path().join("through"), folder.path().join("killed"));
    run(1, &through, &[]);
    let mut child = command(1, &killed, &[]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let checkpoint = killed.join("checkpoints/iteration-000002");
    let begun = Instant::now();
    while !checkpoint.exists() {
        assert!(begun.elapsed() < LIMIT && child.try_wait().unwrap().is_none(), "no checkpoint");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let done = resume(1, &killed, &[]).expect_success("resume");
    assert!(done.stderr.contains("after iteration"), "{}", done.stderr);
    assert_same(&through, &killed, "killed");

    // finished: says so and changes nothing
    let before = fs::metadata(killed.join("summary.json")).unwrap().modified().unwrap();
    let again = resume(1, &killed, &[]).expect_success("resume of a finished run");
    assert!(again.stdout.contains("all 4 iterations are done"), "{}", again.stdout);
    assert_eq!(fs::metadata(killed.join("summary.json")).unwrap().modified().unwrap(), before);

    // damaged: the newest is named, the one before is used, and the end is the same again
    let shard = killed.join("checkpoints/iteration-000004/shard-000.h5");
    let mut bytes = fs::read(&shard).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&shard, bytes).unwrap();
    let done = resume(1, &killed, &[]).expect_success("resume from the one before");
    assert!(done.stderr.contains("iteration-000004") && done.stderr.contains("rank 0"), "{}", done.stderr);
    assert_same(&through, &killed, "damaged");
}

#[test]
fn a_signal_saves_and_asks_to_be_started_again() {
    let folder = tempfile::tempdir().unwrap();
    let (through, stopped) = (folder.path().join("through"), folder.path().join("stopped"));
    let sparse = ["run.checkpoint_every=100"];
    run(1, &through, &sparse);
    for signal in [libc::SIGUSR1, libc::SIGTERM] {
        let mut started = command(1, &stopped, &sparse);
        started.args(["--resume", "auto"]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = started.spawn().unwrap();
        // the second time the file is there from the start; what matters is that a signal comes at some point
        let begun = Instant::now();
        while !stopped.join("metrics.jsonl").exists() {
            assert!(begun.elapsed() < LIMIT);
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(1500));
        // SAFETY: a signal to a child that has not been waited for.
        unsafe { libc::kill(child.id() as i32, signal) };
        let status = child.wait().unwrap();
        assert!(matches!(status.code(), Some(0 | 75)), "{status}");
    }
    resume(1, &stopped, &sparse).expect_success("resume");
    assert_same(&through, &stopped, "signals");
}

#[test]
fn a_changed_config_is_not_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    run(1, &out, &["run.iterations=1"]);
    for changed in ["update.clip_range=1e-3", "run.seed=9", "task.composition.weight=0.5", "rollout.steps=7"] {
        let done = resume(1, &out, &[changed]);
        assert_eq!(done.status.code(), Some(2), "{changed}: {}", done.stderr);
        assert!(done.stderr.contains("another config"), "{changed}: {}", done.stderr);
        assert_eq!(done.stderr.trim().lines().count(), 1, "{}", done.stderr);
    }
}

#[test]
fn failures_at_work_name_the_file_and_end_all_ranks() {
    let folder = tempfile::tempdir().unwrap();
    for ranks in [1, 2] {
        let out: PathBuf = folder.path().join(format!("run{ranks}"));
        let _alone = one_at_a_time();
        let begun = Instant::now();
        let mut child = command(ranks, &out, &["run.iterations=50"]);
        // a file where the shards' folder should be: made as soon as the run's folder is there
        let blocker = out.join("trajectories");
        let watched = out.clone();
        let blocking = std::thread::spawn(move || {
            while !watched.is_dir() && begun.elapsed() < LIMIT {
                std::thread::sleep(Duration::from_millis(1));
            }
            fs::write(blocker, "in the way").unwrap();
        });
        child.stdin(Stdio::null());
        let done = run_within(child, LIMIT);
        blocking.join().unwrap();
        assert_eq!(done.status.code(), Some(1), "{ranks} ranks: {}", done.stderr);
        assert!(done.stderr.contains("trajectories/iteration-000001"), "{}", done.stderr);
    }
}

#[test]
fn shards_and_checkpoints_are_readable_by_h5py() {
    let Some(python) = std::env::var_os("RLDIFF_TEST_PYTHON").filter(|p| !p.is_empty()) else {
        eprintln!("SKIPPED: RLDIFF_TEST_PYTHON is not set (a Python with h5py)");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let short = ["run.iterations=2", "pretrain.mode=off"];
    run(2, &folder.path().join("selected"), &short);
    run(
        1,
        &folder.path().join("all"),
        &[&short[..], &["trajectories.latents=all", "trajectories.precision=f16"]].concat(),
    );
    let mut command = Command::new(python);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/read_shards.py")).arg(folder.path());
    let done = run_within(command, LIMIT).expect_success("h5py");
    assert!(done.stdout.contains("all shards are as documented"), "{}", done.stdout);
}
