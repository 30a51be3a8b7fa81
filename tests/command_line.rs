//! The command line as a user meets it: mistakes are one line and exit code 2, and change nothing on disk.

mod common;

use std::{fs, path::Path, time::Duration};

use common::{empty_folder, files_below, one_at_a_time, rldiff, run_within, set, Finished, SMALL};
use rldiff::{config::load::EMBEDDED_JOINT, store, telemetry::read_png};

// a check at the size of SD2 computes for 20 s where nothing else does
const LIMIT: Duration = Duration::from_secs(240);

fn run(ranks: usize, folder: &Path, args: &[&str]) -> Finished {
    let _alone = one_at_a_time();
    let mut command = rldiff(ranks, folder);
    command.args(args);
    run_within(command, LIMIT)
}

/// Runs in `folder` and expects exit code 2, one line on stderr with all of `wanted`, and no change in the folder.
fn mistake(folder: &Path, args: &[&str], wanted: &[&str]) {
    let before = files_below(folder);
    let done = run(1, folder, args);
    assert_eq!(done.status.code(), Some(2), "{args:?}\n{}\n{}", done.stdout, done.stderr);
    assert_eq!(done.stderr.lines().count(), 1, "{args:?}\n{}", done.stderr);
    assert!(done.stderr.starts_with("error: "), "{args:?}: {}", done.stderr);
    for text in wanted {
        assert!(done.stderr.contains(text), "{args:?}: no {text:?} in {}", done.stderr);
    }
    assert_eq!(done.stdout, "", "{args:?}");
    assert_eq!(files_below(folder), before, "{args:?} wrote something");
    assert!(!folder.join("runs").exists() && !folder.join("samples").exists(), "{args:?} made a folder");
}

#[test]
fn mistakes_in_settings_are_one_line_that_names_the_key() {
    let folder = empty_folder("mistakes-settings");
    for (setting, wanted) in [
        ("run.iteration=2", "unknown key iteration"),
        ("runs.iterations=2", "runs"),
        ("run.iterations", "KEY=VALUE"),
        ("=2", "unknown key"),
        ("run.iterations=many", "run.iterations"),
        ("run.iterations=2.5", "run.iterations"),
        ("run.iterations=-1", "run.iterations"),
        ("run.threads=0", "run.threads"),
        ("run.name=a/b", "run.name"),
        ("task.nobody.samples=8", "nobody"),
        ("task.parity.samples=100", "task.parity.samples"),
        ("task.parity.samples=0", "task.parity.samples"),
        ("task.composition.weight=-1.0", "task.composition.weight"),
        ("task.composition.reward.name=nice", "nice"),
        ("rollout.steps=0", "rollout.steps"),
        ("rollout.eta=1.5", "rollout.eta"),
        ("method.timesteps=7", "method.timesteps"),
        ("method.clip_range=nan", "method.clip_range"),
        ("update.beta1=1.0", "update.beta1"),
        ("method.max_sensitivity=1e-6", "max_sensitivity"),
        ("advantage.normalisation=median", "advantage.normalisation"),
        ("pretrain.caption_dropout=1.1", "pretrain.caption_dropout"),
        ("ema.decay=1.0", "ema.decay"),
    ] {
        mistake(&folder, &["--set", setting], &[wanted]);
    }
}

#[test]
fn mistakes_in_files_are_one_line_that_names_the_file() {
    let folder = empty_folder("mistakes-files");
    let write = |name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
    write("syntax.toml", &EMBEDDED_JOINT.replace("seed = 1\n", "seed = = 1\n"));
    write("unknown.toml", &EMBEDDED_JOINT.replace("[rollout]", "[rollout]\nstep = 3"));
    write("type.toml", &EMBEDDED_JOINT.replace("seed = 1\n", "seed = \"one\"\n"));
    write("missing.toml", &EMBEDDED_JOINT.replace("eta = 1.0", ""));
    write("twice.toml", &EMBEDDED_JOINT.replace("name = \"parity\"\ntrain", "name = \"preference\"\ntrain"));
    write("empty.toml", "");
    write("arithmetic.toml", &EMBEDDED_JOINT.replace("samples = 256", "samples = 120"));
    fs::create_dir_all(folder.join("model")).unwrap();
    write("model/model_index.json", "{}");
    for command in ["train", "check", "eval"] {
        mistake(&folder, &[command, "nothing.toml"], &["nothing.toml"]);
    }
    // a command that is none counts as a config
    mistake(&folder, &["frobnicate"], &["frobnicate"]);
    mistake(&folder, &["syntax.toml"], &["syntax.toml", "line"]);
    mistake(&folder, &["unknown.toml"], &["unknown.toml", "rollout", "step"]);
    mistake(&folder, &["check", "type.toml"], &["type.toml", "run.seed"]);
    mistake(&folder, &["missing.toml"], &["missing.toml", "rollout", "eta"]);
    mistake(&folder, &["twice.toml"], &["twice.toml", "preference"]);
    mistake(&folder, &["empty.toml"], &["empty.toml"]);
    mistake(&folder, &["arithmetic.toml"], &["arithmetic.toml", "task.parity.samples = 120", "multiple of 128"]);
    mistake(&folder, &["--set", "model.path=nowhere"], &["nowhere"]);
    mistake(&folder, &["check", "--set", "model.path=model"], &["model", "scheduler_config.json"]);
    mistake(&folder, &["eval", "--model", "nowhere"], &["nowhere"]);
    // also before the first model is scored
    mistake(&folder, &["eval", "--model", "embedded", "--model", "nowhere"], &["nowhere"]);
}

#[test]
fn mistakes_in_arguments_are_one_line() {
    let folder = empty_folder("mistakes-arguments");
    fs::write(folder.join("file"), b"not an HDF5 file").unwrap();
    fs::create_dir_all(folder.join("run/checkpoints")).unwrap();
    mistake(&folder, &["--frobnicate"], &["--frobnicate"]);
    mistake(&folder, &["--set"], &["--set"]);
    mistake(&folder, &["pretrain"], &["--out"]);
    mistake(&folder, &["pretrain", "--out", "file"], &["file exists already"]);
    mistake(&folder, &["sample"], &["--prompt"]);
    mistake(&folder, &["sample", "--prompts", "nowhere"], &["nowhere"]);
    mistake(&folder, &["sample", "--prompt", "a cat", "--steps", "0"], &["--steps"]);
    mistake(&folder, &["sample", "--prompt", "a cat", "--steps", "1001"], &["1001"]);
    mistake(&folder, &["sample", "--prompt", "a cat", "--images", "few"], &["--images"]);
    mistake(&folder, &["sample", "--prompt", "a cat", "--model", "nowhere"], &["nowhere"]);
    mistake(&folder, &["sample", "--prompt", "a cat", "--out", "file"], &["file is not a folder"]);
    mistake(&folder, &["--out", "file"], &["file is not a folder"]);
    mistake(&folder, &["--out", "file/run"], &["file is not a folder"]);
    mistake(&folder, &["--resume", "nowhere"], &["nowhere holds no checkpoint"]);
    mistake(&folder, &["--resume", "run"], &["run holds no checkpoint"]);
    mistake(&folder, &["inspect"], &["<PATH>"]);
    mistake(&folder, &["inspect", "nowhere"], &["nowhere does not exist"]);
    mistake(&folder, &["inspect", "file"], &["file is not an HDF5 file"]);
    mistake(&folder, &["inspect", "run"], &["holds no checkpoint"]);
}

#[test]
fn a_damaged_checkpoint_is_named_with_its_file_and_rank() {
    let folder = empty_folder("mistakes-damage");
    store::round_trip(&folder.join("run/checkpoints")).unwrap();
    let sound = run(1, &folder, &["inspect", "--digest", "run"]).expect_success("inspect");
    assert_eq!(sound.stdout.trim().len(), 64, "{}", sound.stdout);
    let shard = folder.join("run/checkpoints/iteration-000001/shard-000.h5");
    let mut bytes = fs::read(&shard).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&shard, bytes).unwrap();
    for args in [&["inspect", "run"][..], &["inspect", "--digest", "run/checkpoints/iteration-000001"]] {
        mistake(&folder, args, &["shard-000.h5", "rank 0"]);
    }
    for resume in ["run", "auto", "run/checkpoints/iteration-000001"] {
        mistake(&folder, &["--out", "run", "--resume", resume], &["shard-000.h5", "rank 0"]);
    }
}

/// The launcher may add lines of its own.
#[test]
fn ranks_that_cannot_share_the_lanes_are_refused() {
    let folder = empty_folder("mistakes-ranks");
    let done = run(3, &folder, &set(&SMALL));
    assert_eq!(done.status.code(), Some(2), "{}", done.stderr);
    let lines: Vec<&str> = done.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(lines, ["error: 3 ranks cannot share 4 lanes evenly; possible numbers of ranks: 1, 2, 4"]);
    assert!(files_below(&folder).is_empty() && !folder.join("runs").exists());
    let done = run(2, &folder, &["--set", "run.iteration=2"]);
    assert_eq!(done.status.code(), Some(2), "{}", done.stderr);
    assert_eq!(done.stderr.matches("unknown key iteration").count(), 1, "{}", done.stderr);
}

#[test]
fn every_command_has_help() {
    let folder = empty_folder("help");
    let names = ["train", "check", "inspect", "sample", "eval", "pretrain", "doctor", "bench"];
    let overview = run(1, &folder, &["--help"]).expect_success("help");
    for name in names {
        assert!(overview.stdout.contains(&format!("\n  {name} ")), "{name}\n{}", overview.stdout);
        let done = run(1, &folder, &[name, "--help"]).expect_success(name);
        assert!(done.stdout.contains(&format!("Usage: rldiff {name}")), "{}", done.stdout);
        assert_eq!(done.stderr, "");
    }
    run(1, &folder, &["bench", "iteration", "--help"]).expect_success("bench iteration");
}

#[test]
fn check_prints_the_batch_arithmetic_and_writes_nothing() {
    let folder = empty_folder("check");
    let args = [vec!["check"], set(&SMALL)].concat();
    let done = run(1, &folder, &args).expect_success("check");
    for wanted in [
        "miniature-joint is sound",
        "8 samples per iteration, 2 per lane, 4 prompts",
        "samples per iteration      16",
        // 3 tasks, 2 timesteps each, and one step of the pretraining loss
        "7 per iteration, 14 in all",
        "numbers of ranks           1, 2, 4",
        "U-Net forward 51.99 MFLOP",
        // 4 bytes for each parameter of the three networks; AdamW's moments of the trained ones
        "weights                    6.476 MB",
        "optimizer                  8.621 MB",
        "fits in 80.00 GB",
        // on the GPU that it is reckoned for
        "chosen by \"auto\": gradient checkpointing: off, CUDA graphs: on",
        "recorded steps ",
    ] {
        assert!(done.stdout.contains(wanted), "no {wanted:?} in\n{}", done.stdout);
    }
    assert!(files_below(&folder).is_empty());
}

/// Also those of the paper's size, whose models and data a machine need not have.
#[test]
fn every_experiment_is_sound() {
    let folder = empty_folder("check-all");
    // a study names its experiments
    std::os::unix::fs::symlink(std::path::absolute("slurm").unwrap(), folder.join("slurm")).unwrap();
    let experiments = std::fs::read_dir("slurm").unwrap().map(|entry| entry.unwrap().path());
    let tomls: Vec<_> = experiments.filter(|path| path.extension().is_some_and(|e| e == "toml")).collect();
    assert!(tomls.len() >= 8, "{tomls:?}");
    for toml in tomls {
        let path = std::path::absolute(&toml).unwrap();
        let done = run(1, &folder, &["check", "--without-files", path.to_str().unwrap()]);
        let done = done.expect_success(&toml.display().to_string());
        let wanted = " is valid; its files were not looked at\n";
        assert!(done.stdout.contains(wanted), "{}: {}", toml.display(), done.stdout);
        // what needs no files can also start
        if toml.display().to_string().contains("miniature") {
            let whole = run(1, &folder, &["check", path.to_str().unwrap()]);
            let whole = whole.expect_success(&toml.display().to_string());
            assert!(whole.stdout.contains(" is sound\n"), "{}: {}", toml.display(), whole.stdout);
        }
        if !["miniature", "eval-", "evaluation", "study"].iter().any(|kind| toml.display().to_string().contains(kind)) {
            let wanted =
                ["numbers of ranks           1, 2, 4, 8, 16, 32, 64, 128", "U-Net forward 804.3 GFLOP", "865910724"];
            wanted
                .iter()
                .for_each(|w| assert!(done.stdout.contains(w), "{}: no {w:?} in {}", toml.display(), done.stdout));
        }
    }
}

#[test]
fn every_pass_is_measured() {
    let folder = empty_folder("bench-passes");
    for ranks in [1, 2] {
        for what in ["unet", "rollout", "update"] {
            let args = ["bench", what, "--samples", "2", "--steps", "3", "--repeats", "2", "--threads", "1", "--json"];
            let done = run(ranks, &folder, &args).expect_success(what);
            let report: serde_json::Value = serde_json::from_str(&done.stdout).unwrap();
            assert_eq!((report["what"].as_str(), report["ranks"].as_u64()), (Some(what), Some(ranks as u64)));
            assert_eq!(report["seconds"].as_array().unwrap().len(), 2);
            // 52 MFLOP a row, two rows a sample; three steps of a roll-out; a backward pass costs two forward passes
            let passes = if what == "unet" { 1.0 } else { 3.0 };
            let expected = 2.0 * 2.0 * passes * 51.99e-6;
            let tflop = report["tflop"].as_f64().unwrap();
            assert!((tflop / expected - 1.0).abs() < 1e-2, "{what}: {tflop} {expected}");
        }
    }
    assert!(files_below(&folder).is_empty());
}

#[test]
fn doctor_tries_every_library() {
    let folder = empty_folder("doctor");
    for ranks in [1, 2] {
        let done = run(ranks, &folder, &["doctor"]).expect_success("doctor");
        for library in ["libtorch", "MPI", "HDF5"] {
            let works = format!("{library} works");
            let line = done.stdout.lines().find(|line| line.starts_with(&works));
            assert!(line.is_some_and(|line| line.ends_with(" yes")), "{works}\n{}", done.stdout);
        }
        assert!(done.stdout.contains(&format!("{ranks} in all")), "{}", done.stdout);
        // present or missing, each part has its line
        for part in ["device ", "NVIDIA driver ", "libtorch_cuda ", "NVRTC ", "NCCL "] {
            let line = done.stdout.lines().find(|line| line.starts_with(part));
            assert!(line.is_some_and(|line| line.len() > 18), "{part}\n{}", done.stdout);
        }
    }
}

/// A machine with a GPU runs tests/gpu.rs instead.
#[test]
fn a_gpu_that_is_not_there_is_one_line_and_code_2() {
    if rldiff::device::parts::gpus().is_ok() {
        eprintln!("SKIPPED: this machine has a GPU");
        return;
    }
    let folder = empty_folder("no-gpu");
    for command in ["train", "sample", "eval", "doctor"] {
        for ranks in [1, 2] {
            let more: &[&str] = if command == "sample" { &["--prompt", "a"] } else { &[] };
            let done = run(ranks, &folder, &[&[command, "--device", "cuda"], more].concat());
            assert_eq!(done.status.code(), Some(2), "{command}: {}", done.stderr);
            // Open MPI's launcher says something too, below a ruler
            let told = done.stderr.split("\n-----").next().unwrap().trim();
            assert!(told.starts_with("error: --device cuda: no NVIDIA driver: libcuda.so.1"), "{command}: {told}");
            assert_eq!(told.lines().count(), 1, "{command}: {told}");
        }
    }
    let done = run(1, &folder, &["--set", "rollout.cuda_graph=true"]);
    assert_eq!(done.status.code(), Some(2), "{}", done.stderr);
    let wanted = "error: rollout.cuda_graph = true needs a GPU, but this run computes on the CPU (--device cuda)";
    assert_eq!(done.stderr.trim(), wanted);
    assert_eq!(files_below(&folder), []);
}

#[test]
fn sample_writes_the_same_pictures_at_every_number_of_ranks() {
    let folder = empty_folder("sample");
    let prompts = ["a red apple", "a portrait of a «doctor»"];
    let mut args = vec!["sample", "--images", "2", "--steps", "2", "--seed", "3", "--eta", "1"];
    prompts.iter().for_each(|prompt| args.extend(["--prompt", prompt]));
    for (ranks, out) in [(1, "one"), (2, "two")] {
        run(ranks, &folder, &[&args[..], &["--out", out]].concat()).expect_success("sample");
    }
    let (one, two) = (files_below(&folder.join("one")), files_below(&folder.join("two")));
    let names: Vec<_> = one.iter().map(|(path, _)| path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["0000-00.png", "0000-01.png", "0001-00.png", "0001-01.png", "grid.png"]);
    assert!(one.iter().map(|f| &f.1).eq(two.iter().map(|f| &f.1)), "other pictures on two ranks");

    let mut pictures = Vec::new();
    for (index, (path, _)) in one[..4].iter().enumerate() {
        let (picture, text) = read_png(path).unwrap();
        let value = |key: &str| text.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
        assert_eq!(value("prompt"), Some(prompts[index / 2]));
        assert_eq!((value("seed"), value("steps"), value("sample")), (Some("3"), Some("2"), Some(&*index.to_string())));
        assert_eq!((picture.width(), picture.height()), (32, 32));
        assert!(pictures.iter().all(|other: &Vec<u8>| other != picture.rgb()), "the same picture twice");
        pictures.push(picture.rgb().to_vec());
    }
    let (grid, text) = read_png(&one[4].0).unwrap();
    assert!(grid.width() > 64 && grid.height() > 64);
    assert!(text.iter().any(|(key, value)| key == "prompt" && *value == prompts.join("\n")), "{text:?}");
}
