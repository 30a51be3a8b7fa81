//! Whole runs of the program on a small config: what they leave, that the number of ranks does not change a bit of it,
//! that a run that was killed or stopped goes on as if it had not been, and how failures end.

mod common;

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::Command,
    sync::OnceLock,
    time::{Duration, Instant},
};

use common::{
    descendants, empty_folder, files_below, mpirun, one_at_a_time, rldiff, run_within,
    runs::{assert_same_run, checkpoint, command, computed_lines, train, LIMIT},
    set, SMALL,
};
use rldiff::{
    device::numerics,
    models::folder::{ModelFiles, ModelLocation},
    store,
    telemetry::{read_metrics, read_png, RunFiles, Summary},
};
use tch::{Device, Kind, Tensor};

const TASKS: [&str; 3] = ["composition", "parity", "preference"];
const FOUR: [&str; 2] = ["run.iterations=4", "trajectories.every=1"];

/// Four iterations on one rank, never interrupted.
fn straight() -> &'static RunFiles {
    static RUN: OnceLock<RunFiles> = OnceLock::new();
    RUN.get_or_init(|| {
        let out = empty_folder("runs-straight").join("run");
        train(1, &out, &FOUR, &[]);
        RunFiles::new(out)
    })
}

/// The same on two ranks, with whole trajectories in f16.
fn on_two_ranks() -> &'static RunFiles {
    static RUN: OnceLock<RunFiles> = OnceLock::new();
    RUN.get_or_init(|| {
        let out = empty_folder("runs-two-ranks").join("run");
        train(2, &out, &[&FOUR[..], &["trajectories.latents=all", "trajectories.precision=f16"]].concat(), &[]);
        RunFiles::new(out)
    })
}

/// A copy of `run` that ends after checkpoint `iteration`, without its results.
fn copy_until(run: &RunFiles, iteration: u64, name: &str) -> RunFiles {
    let copy = RunFiles::new(empty_folder(name).join("run"));
    for (path, bytes) in files_below(run.root()) {
        let target = copy.root().join(path.strip_prefix(run.root()).unwrap());
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::write(target, bytes).unwrap();
    }
    for later in iteration + 1..=4 {
        fs::remove_dir_all(checkpoint(&copy, later)).unwrap();
    }
    fs::remove_file(copy.summary()).unwrap();
    copy
}

#[test]
fn a_run_leaves_everything_it_promises() {
    let _alone = one_at_a_time();
    let files = straight();
    let config = fs::read_to_string(files.config()).unwrap();
    assert!(config.contains("iterations = 4") && config.contains("lanes = 4"), "{config}");
    for picture in [files.before_after(), files.reward_curves()] {
        assert!(read_png(&picture).unwrap().0.width() > 100, "{}", picture.display());
    }
    let events = files_below(&files.tensorboard());
    assert!(events.len() == 1 && events[0].1.len() > 10_000, "events of {} files", events.len());
    for part in ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"] {
        assert!(files.model().join(part).is_file(), "{part}");
    }
    for iteration in 0..4 {
        for task in TASKS {
            let shard = files.trajectories().join(format!("iteration-{iteration:06}/{task}-rank-000.h5"));
            assert!(store::inspect(&shard).unwrap().contains("log_probs"), "{}", shard.display());
        }
    }
    let shown = run_within(
        {
            let mut inspect = rldiff(1, files.root());
            inspect.args(["inspect", "."]);
            inspect
        },
        LIMIT,
    )
    .expect_success("inspect");
    let state = store::digest(files.root()).unwrap();
    let parts = ["iteration     4", "exp_avg_sq", "optimizer_steps", "prompt_statistics", "run.seed", "lanes = 4"];
    for part in parts.iter().chain(&["shard-000.h5", "those of iteration 5", "rldiff 0.", &state]) {
        assert!(shown.stdout.contains(part), "{part:?} is not in\n{}", shown.stdout);
    }

    let summary: serde_json::Value = serde_json::from_slice(&fs::read(files.summary()).unwrap()).unwrap();
    let tasks = summary["tasks"].as_array().unwrap();
    assert_eq!(tasks.iter().map(|task| task["name"].as_str().unwrap()).collect::<Vec<_>>(), TASKS);
    for task in tasks {
        for model in ["base", "tuned"] {
            assert!(task[model]["mean"].is_number() && task[model]["stderr"].is_number(), "{task}");
        }
    }
    assert!(summary["samples_per_second"].as_f64().unwrap() > 0.0);
    assert_eq!(summary["ratio_drift"].as_f64(), Some(0.0));
    for stage in ["rollout", "reward", "advantage", "update", "pretrain"] {
        assert!(summary["seconds_per_stage"][stage].is_number(), "{stage}");
    }
}

/// On a CPU: kernels that repeat, the f32 of a frozen network, and what "auto" decides. Only the log says that they are there.
#[test]
fn settings_of_a_gpu_change_no_bit_on_a_cpu() {
    let _alone = one_at_a_time();
    let out = empty_folder("runs-gpu-settings").join("run");
    let settings = [
        "run.deterministic=true",
        "model.frozen_compute=f32",
        "model.gradient_checkpointing=level_0",
        "rollout.cuda_graph=auto",
    ];
    let done = train(1, &out, &[&FOUR[..], &settings].concat(), &[]);
    assert!(done.stderr.contains("chosen by \"auto\": CUDA graphs: off"), "{}", done.stderr);
    assert_same_run(straight(), &RunFiles::new(out), 4);
}

/// In this process, which trains nothing itself.
#[test]
fn an_operation_whose_results_cannot_repeat_is_refused_with_its_name() {
    let put = || {
        Tensor::zeros([4], (Kind::Float, Device::Cpu)).f_put_(
            &Tensor::from_slice(&[1i64, 1]),
            &Tensor::from_slice(&[1f32, 2.0]),
            false,
        )
    };
    drop(put().unwrap());
    numerics::set_deterministic(true);
    let refused = put();
    numerics::set_deterministic(false);
    let told = numerics::explain(&refused.unwrap_err().to_string()).unwrap();
    assert!(told.starts_with("libtorch's put_ has no kernel whose results repeat"), "{told}");
}

/// f32 masters that begin as rounded weights would change a model by up to 2^-9 of each weight before it is trained.
#[test]
fn a_run_of_no_iterations_in_bf16_writes_the_model_it_was_given() {
    let _alone = one_at_a_time();
    let folder = empty_folder("runs-no-iterations");
    let weights = |model: &Path| -> BTreeMap<String, Vec<f32>> {
        let files = ModelFiles::read(&ModelLocation::Disk(model.to_path_buf())).unwrap();
        let unet = files.weights["unet"].iter();
        unet.map(|(name, t)| (name.clone(), Vec::try_from(t.to_kind(Kind::Float).contiguous().view([-1])).unwrap()))
            .collect()
    };
    // a model in f32 whose weights bf16 does not hold
    let trained = folder.join("trained");
    train(1, &trained, &["run.iterations=1", "update.learning_rate=1e-3"], &[]);
    let given = RunFiles::new(&trained).model();
    for (name, more) in [("plain", &["ema.decay=0.9"][..]), ("adapters", &["lora.rank=2"])] {
        let out = folder.join(name);
        let model = format!("model.path={}", given.display());
        let settings = ["run.iterations=0", "evaluation.every=0", "model.compute=bf16", model.as_str()];
        train(2, &out, &[&settings[..], more].concat(), &[]);
        assert!(weights(&RunFiles::new(out).model()) == weights(&given), "{name}");
    }
}

#[test]
fn every_promised_metric_is_logged_and_the_first_pass_has_ratio_one() {
    let _alone = one_at_a_time();
    let lines = read_metrics(&straight().metrics()).unwrap();
    assert_eq!(lines.iter().map(|line| line.iteration).collect::<Vec<_>>(), [0, 1, 2, 3]);
    for line in &lines {
        let of_tasks = TASKS.iter().flat_map(|t| ["reward_mean", "reward_std"].map(|name| format!("{t}/{name}")));
        let stages = ["rollout", "reward", "advantage", "update", "pretrain", "iteration"];
        let waiting = ["seconds/save"];
        let others = ["clip_fraction", "approx_kl", "ratio_drift", "gradient_norm", "bad_rewards", "pretraining_loss"];
        let speed = ["samples_per_second", "tflops"];
        let wanted = of_tasks
            .chain(stages.map(|stage| format!("seconds/{stage}")))
            .chain(others.map(String::from))
            .chain(speed.map(String::from))
            .chain(waiting.map(String::from));
        for name in wanted {
            assert!(line.get(&name).is_some_and(f64::is_finite), "iteration {}: {name}", line.iteration);
        }
        let drifts: Vec<_> = line.iter().filter(|(name, _)| name.starts_with("ratio_drift")).collect();
        assert!(drifts.len() >= 2 && drifts.iter().all(|(_, drift)| *drift == 0.0), "{drifts:?}");
        assert!(line.get("gradient_norm").unwrap() > 0.0 && line.get("tflops").unwrap() > 0.0);
        assert_eq!(line.get("bad_rewards"), Some(0.0));
        for task in TASKS {
            let norms = line.iter().filter(|(name, _)| name.starts_with(&format!("{task}/gradient_norm/t"))).count();
            assert_eq!(norms, 2, "{task}: one gradient norm per timestep");
        }
    }
}

#[test]
fn two_ranks_compute_the_same_bits_as_one() {
    let _alone = one_at_a_time();
    assert_same_run(straight(), on_two_ranks(), 4);
}

/// Two iterations on four ranks, the other two on one; the results of the shorter run do not pass for the longer one's.
#[test]
fn a_stopped_run_is_extended_on_another_number_of_ranks() {
    let _alone = one_at_a_time();
    let files = RunFiles::new(empty_folder("runs-extended").join("run"));
    train(4, files.root(), &["run.iterations=2"], &[]);
    let at = |run: &RunFiles| store::digest(&checkpoint(run, 2)).unwrap();
    assert_eq!(at(&files), at(straight()), "four ranks");
    assert_eq!(computed_lines(&files), computed_lines(straight())[..2], "four ranks");
    train(1, files.root(), &FOUR, &["--resume", "auto"]);
    assert_same_run(straight(), &files, 4);
    assert_eq!(files_below(&files.tensorboard()).len(), 2, "one event file for each start");

    // ended after the last checkpoint, before the evaluation: what lies there is of the shorter run
    let text = fs::read_to_string(files.summary()).unwrap();
    fs::write(files.summary(), text.replace("\"iterations\": 4", "\"iterations\": 2")).unwrap();
    train(1, files.root(), &FOUR, &["--resume", "auto"]);
    assert_same_run(straight(), &files, 4);
}

/// Lines of metrics so far.
fn logged(files: &RunFiles) -> usize {
    read_metrics(&files.metrics()).map_or(0, |metrics| metrics.len())
}

/// Starts `command` and kills all its processes as soon as `now` says so.
fn kill_once(mut command: Command, now: impl Fn() -> bool) {
    let mut child = command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
    let started = Instant::now();
    while !now() {
        assert!(child.try_wait().unwrap().is_none(), "the run ended before it could be killed");
        assert!(started.elapsed() < LIMIT, "not yet after {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
    for pid in descendants(child.id() as i32) {
        // SAFETY: a signal to this child, which has not been waited for, and to processes that it started.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
    child.wait().unwrap();
}

/// Killed in the fourth iteration, after the checkpoint of the second: the third is done again.
#[test]
fn a_killed_run_goes_on_bit_for_bit() {
    let _alone = one_at_a_time();
    let files = RunFiles::new(empty_folder("runs-killed").join("run"));
    let settings = [&FOUR[..], &["run.checkpoint_every=2"]].concat();
    kill_once(command(2, files.root(), &settings, &[]), || logged(&files) >= 3 && checkpoint(&files, 2).exists());
    assert!(!files.summary().exists() && !checkpoint(&files, 4).exists());
    train(1, files.root(), &settings, &["--resume", "auto"]);
    assert_same_run(straight(), &files, 4);
    // the two ranks' shards of iterations that were done again by one rank are gone
    let shards: Vec<_> = files_below(&files.trajectories()).into_iter().map(|(path, _)| path).collect();
    let of_second_rank = shards.iter().filter(|path| path.to_string_lossy().contains("rank-001")).count();
    assert_eq!((shards.len(), of_second_rank), (2 * 3 * 2 + 2 * 3, 2 * 3), "{shards:?}");
}

/// Before there is a checkpoint a run begins anew, whatever the killed one left.
#[test]
fn a_run_killed_before_its_first_checkpoint_begins_anew() {
    let _alone = one_at_a_time();
    let files = RunFiles::new(empty_folder("runs-killed-early").join("run"));
    let settings = ["run.iterations=3", "run.checkpoint_every=3"];
    kill_once(command(1, files.root(), &settings, &[]), || logged(&files) >= 1);
    train(1, files.root(), &["run.iterations=1"], &["--resume", "auto"]);
    assert_eq!(computed_lines(&files), computed_lines(straight())[..1]);
    assert!(files.root().with_file_name("run.1").join("metrics.jsonl").is_file(), "the earlier metrics are gone");
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let _alone = one_at_a_time();
    let files = copy_until(straight(), 4, "runs-damaged");
    let shard = checkpoint(&files, 4).join("shard-000.h5");
    let mut bytes = fs::read(&shard).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 128;
    fs::write(&shard, bytes).unwrap();
    let done = train(2, files.root(), &FOUR, &["--resume", "auto"]);
    assert!(done.stderr.contains("iteration-000004") && done.stderr.contains("rank 0"), "{}", done.stderr);
    assert_same_run(straight(), &files, 4);
}

#[test]
fn a_run_resumed_into_another_folder_takes_its_metrics_along() {
    let _alone = one_at_a_time();
    let files = RunFiles::new(empty_folder("runs-elsewhere").join("run"));
    let from = checkpoint(straight(), 2);
    train(1, files.root(), &["run.iterations=3"], &["--resume", from.to_str().unwrap()]);
    assert_eq!(computed_lines(&files), computed_lines(straight())[..3]);
    assert_eq!(store::digest(files.root()).unwrap(), store::digest(&checkpoint(straight(), 3)).unwrap());
}

/// State of every kind: the average of the weights, running rewards per prompt, β∇L_pre in the policy's steps.
#[test]
fn every_part_of_the_state_survives_a_resume() {
    let _alone = one_at_a_time();
    let settings = [
        "ema.decay=0.9",
        "advantage.normalisation=per_prompt",
        "advantage.prompt_min_count=2",
        "pretrain.mode=combined",
        "trajectories.every=0",
    ];
    let folder = empty_folder("runs-variant");
    let [whole, parts] = ["whole", "parts"].map(|name| RunFiles::new(folder.join(name)));
    train(1, whole.root(), &[&settings[..], &["run.iterations=2"]].concat(), &[]);
    train(2, parts.root(), &[&settings[..], &["run.iterations=1"]].concat(), &[]);
    train(1, parts.root(), &[&settings[..], &["run.iterations=2"]].concat(), &["--resume", "auto"]);
    assert_same_run(&whole, &parts, 2);
    let shown = store::inspect(whole.root()).unwrap();
    assert!(shown.contains("\nema ") && shown.contains(" shirt"), "{shown}");
    assert_ne!(store::digest(whole.root()).unwrap(), store::digest(&checkpoint(straight(), 2)).unwrap());
}

#[test]
fn another_config_is_refused_and_a_finished_run_says_so() {
    let _alone = one_at_a_time();
    let files = straight();
    let before = files_below(files.root());
    for (setting, wanted) in [
        ("method.clip_range=1e-3", "method.clip_range = 0.0001, now 0.001"),
        ("run.seed=2", "run.seed = 1, now 2"),
        ("task.parity.weight=2.0", "task.parity.weight = 1.0, now 2.0"),
        ("ema.decay=0.5", "ema.decay"),
        ("run.iterations=3", "run.iterations is 3"),
    ] {
        let settings = [&FOUR[..], &[setting]].concat();
        let done = run_within(command(1, files.root(), &settings, &["--resume", "auto"]), LIMIT);
        assert_eq!(done.status.code(), Some(2), "{setting}\n{}", done.stderr);
        assert!(done.stderr.lines().count() == 1 && done.stderr.contains(wanted), "{setting}: {}", done.stderr);
    }
    for ranks in [1, 2] {
        let done = train(ranks, files.root(), &FOUR, &["--resume", "auto"]);
        assert!(done.stdout.contains("all 4 iterations are done"), "{}", done.stdout);
    }
    assert!(files_below(files.root()) == before, "a refused or finished run changed its folder");
}

#[test]
fn earlier_results_are_moved_aside() {
    let _alone = one_at_a_time();
    let files = copy_until(straight(), 4, "runs-aside");
    let before = fs::read(files.metrics()).unwrap();
    // no iteration at all: base and tuned model are the same
    train(1, files.root(), &["run.iterations=0"], &[]);
    let aside = RunFiles::new(files.root().with_file_name("run.1"));
    assert_eq!(fs::read(aside.metrics()).unwrap(), before);
    assert!(checkpoint(&aside, 4).exists() && !files.checkpoints().exists());
    let summary = Summary::read(&files.summary()).unwrap();
    assert!(summary.tasks.iter().all(|task| task.base == task.tuned && task.difference.mean == 0.0));
}

#[test]
fn other_programs_read_the_hdf5_files() {
    let Some(python) = std::env::var_os("RLDIFF_TEST_PYTHON") else {
        eprintln!("SKIPPED: set RLDIFF_TEST_PYTHON to a python with h5py to read the HDF5 files with it");
        return;
    };
    let _alone = one_at_a_time();
    let mut reader = Command::new(python);
    reader.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/read_hdf5.py"));
    reader.args([straight().root(), on_two_ranks().root()]);
    let done = run_within(reader, LIMIT).expect_success("h5py");
    assert_eq!(done.stdout.trim(), "ok");
}

/// Expects the run to end with the exit code of files that cannot be written and to name `file`, without waiting for
/// anything.
fn fails(command: Command, file: &str) {
    let done = run_within(command, LIMIT);
    assert_eq!(done.status.code(), Some(74), "{}\n{}", done.status, done.stderr);
    assert!(done.stderr.contains(file), "{file} is not named\n{}", done.stderr);
    // start, one iteration and the end of all ranks; six seconds were observed on two busy cores
    assert!(done.took < Duration::from_secs(60), "took {:?}", done.took);
}

#[test]
fn files_that_cannot_be_written_end_all_ranks() {
    let _alone = one_at_a_time();
    let files = copy_until(straight(), 2, "runs-blocked");
    fs::remove_dir_all(files.trajectories()).unwrap();
    fs::write(files.trajectories(), b"in the way").unwrap();
    fails(command(2, files.root(), &FOUR, &["--resume", "auto"]), "trajectories/iteration-000002");

    let blocked = files.checkpoints().join("iteration-000003.partial");
    fs::write(&blocked, b"in the way").unwrap();
    let settings = [&FOUR[..], &["trajectories.every=0"]].concat();
    fails(command(2, files.root(), &settings, &["--resume", "auto"]), "iteration-000003.partial");
    assert!(checkpoint(&files, 2).exists() && !checkpoint(&files, 3).exists());

    // out of the way, it goes on
    fs::remove_file(&blocked).unwrap();
    fs::remove_file(files.trajectories()).unwrap();
    train(1, files.root(), &FOUR, &["--resume", "auto"]);
    assert_same_run(straight(), &files, 4);
}

/// From the moment the run's folder is there, rank 1 may write no file of more than four kilobytes.
fn limit_rank_1(files: &RunFiles) {
    let is_rank_1 = |pid: &i32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let ranks = [&b"PMI_RANK=1"[..], b"OMPI_COMM_WORLD_RANK=1"];
        name.trim() == "rldiff" && environment.split(|&byte| byte == 0).any(|variable| ranks.contains(&variable))
    };
    let started = Instant::now();
    while !files.config().exists() {
        assert!(started.elapsed() < LIMIT, "the run did not begin");
        std::thread::sleep(Duration::from_millis(5));
    }
    let pid = descendants(std::process::id() as i32).into_iter().find(is_rank_1).expect("there is a rank 1");
    let limit = libc::rlimit { rlim_cur: 4096, rlim_max: 4096 };
    // SAFETY: `limit` outlives the call, and the old limit is not asked for.
    let set = unsafe { libc::prlimit(pid, libc::RLIMIT_FSIZE, &limit, std::ptr::null_mut()) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

/// One rank cannot write its shard, of trajectories or of the checkpoint: all end, and the file is named.
#[test]
fn a_failure_of_one_rank_ends_all() {
    let _alone = one_at_a_time();
    for (every, file) in [("1", "composition-rank-001.h5"), ("0", "shard-001.h5")] {
        let files = RunFiles::new(empty_folder("runs-one-fails").join("run"));
        // without the signal a write beyond the limit is an error like that of a full disk
        let mut command = mpirun(2);
        command.args(["sh", "-c", "trap '' XFSZ; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_rldiff")]);
        command.args(set(&SMALL)).arg("--out").arg(files.root());
        command.args(["--set", "run.iterations=1", "--set", &format!("trajectories.every={every}")]);
        std::thread::scope(|scope| {
            scope.spawn(|| limit_rank_1(&files));
            fails(command, file);
        });
        assert!(!files.summary().exists() && !checkpoint(&files, 1).exists());
    }
}

#[test]
#[ignore = "long: eight ranks"]
fn eight_ranks_compute_the_same_bits_as_one() {
    let _alone = one_at_a_time();
    let settings = ["run.lanes=8", "task.composition.samples=8", "task.parity.samples=16", "task.preference.samples=8"];
    let folder = empty_folder("runs-eight-ranks");
    let runs = [1, 4, 8].map(|ranks| {
        let files = RunFiles::new(folder.join(format!("ranks-{ranks}")));
        train(ranks, files.root(), &settings, &[]);
        files
    });
    assert_same_run(&runs[0], &runs[1], 2);
    assert_same_run(&runs[0], &runs[2], 2);
}
