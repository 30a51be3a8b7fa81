//! Runs in other ways than the embedded experiment's: adapters, bf16, stopped by a signal. Everything that should be
//! equal is compared bit for bit.

mod common;

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use common::{mpirun, one_at_a_time, run_within, Finished};
use rldiff::telemetry::{read_metrics, Metrics, RunFiles};

const RLDIFF: &str = env!("CARGO_BIN_EXE_rldiff");
/// A whole test may take this long on busy cores; seconds were observed.
const LIMIT: Duration = Duration::from_secs(240);

/// The embedded experiment made small.
const SMALL: [&str; 14] = [
    "run.lanes=2",
    "run.iterations=4",
    "run.checkpoint_every=1",
    "run.keep_checkpoints=9",
    "trajectories.every=0",
    // the last iteration of a run has an evaluation, so one that was meant to end earlier has another log
    "evaluation.every=0",
    "pretrain.batch_per_lane=2",
    "task.composition.samples=4",
    "task.parity.samples=32",
    "task.parity.train=false",
    "task.preference.samples=4",
    "task.composition.evaluation_samples=4",
    "task.parity.evaluation_samples=16",
    "task.preference.evaluation_samples=4",
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
    let timed = |name: &str| name.starts_with("seconds/") || name.starts_with("background/");
    let measured = |name: &str| timed(name) || ["samples_per_second", "tflops"].contains(&name);
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

/// Every timestep comes first sooner or later; none of them may have a ratio other than 1 before its update.
#[test]
fn the_first_ratio_is_one_at_every_timestep() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    run(
        1,
        &out,
        &["run.iterations=12", "method.timesteps=1", "method.max_sensitivity=0.0", "update.learning_rate=1e-3"],
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

/// Without a step of the weights every ratio is a first one: all samples at all timesteps, with and without adapters.
#[test]
fn the_first_ratio_is_one_for_every_sample_and_timestep() {
    let folder = tempfile::tempdir().unwrap();
    let settings = [
        "run.iterations=2",
        "method.timesteps=6",
        "method.max_sensitivity=0.0",
        "update.learning_rate=0.0",
        "pretrain.mode=off",
    ];
    let mut ratios = 0;
    for (ranks, rank_of_adapters) in [(1, "lora.rank=0"), (2, "lora.rank=2")] {
        let out = folder.path().join(rank_of_adapters);
        run(ranks, &out, &[&settings[..], &[rank_of_adapters]].concat());
        for metrics in read_metrics(&RunFiles::new(&out).metrics()).unwrap() {
            // ½(log w)² summed over samples and timesteps: 0 only where each w is exactly 1
            for name in ["approx_kl", "ratio_drift", "clip_fraction"] {
                assert_eq!(metrics.get(name), Some(0.0), "{name} of iteration {}", metrics.iteration);
            }
            for task in ["composition", "preference"] {
                let timesteps =
                    metrics.iter().filter(|(name, _)| name.starts_with(&format!("{task}/gradient_norm/t"))).count();
                assert_eq!(timesteps, 6, "{task}");
                ratios += 4 * timesteps;
            }
        }
    }
    assert_eq!(ratios, 192);
    println!("{ratios} of {ratios} first ratios (sample, timestep) are exactly 1");
}

#[test]
fn adapters_in_bf16_resume_to_the_same_bits_at_two_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let (through, halves) = (folder.path().join("through"), folder.path().join("halves"));
    let extra = ["lora.rank=2", "model.compute=bf16"];
    run(1, &through, &extra);
    run(1, &halves, &[&extra[..], &["run.iterations=2"]].concat());
    resume(2, &halves, &extra).expect_success("resume");
    assert_same(&through, &halves, "adapters in bf16");
    assert!(through.join("pytorch_lora_weights.safetensors").exists());
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
