//! The command line as its users meet it: mistakes end with one line and code 2 before any work, help reads well, and
//! the small commands do what they say.

mod common;

use std::{fs, path::Path, process::Command, time::Duration};

use common::{mpirun, one_at_a_time, run_within, Finished};
use rldiff::telemetry::read_png;

const RLDIFF: &str = env!("CARGO_BIN_EXE_rldiff");

/// Runs rldiff in `folder`.
fn rldiff(folder: &Path, arguments: &[&str]) -> Finished {
    let mut command = Command::new(RLDIFF);
    command.args(arguments).current_dir(folder);
    run_within(command, Duration::from_secs(60))
}

/// A mistake: code 2, one line on stderr that has all of `words`, nothing written.
fn refused(arguments: &[&str], words: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    refused_in(folder.path(), arguments, words);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{arguments:?} left something behind");
}

fn refused_in(folder: &Path, arguments: &[&str], words: &[&str]) {
    let done = rldiff(folder, arguments);
    assert_eq!(done.status.code(), Some(2), "{arguments:?}\n{}\n{}", done.stdout, done.stderr);
    assert_eq!(done.stderr.trim().lines().count(), 1, "{arguments:?}: {}", done.stderr);
    for word in words {
        assert!(done.stderr.contains(word), "{arguments:?}: no {word:?} in {}", done.stderr);
    }
}

#[test]
fn mistakes_in_settings() {
    for (set, words) in [
        ("run.iteration=2", &["run.iteration", "unknown key"][..]),
        ("rnu.iterations=2", &["no section rnu"]),
        ("run.iterations=many", &["run.iterations"]),
        ("run.iterations=-1", &["run.iterations"]),
        ("run.iterations=2.5", &["run.iterations"]),
        ("run.lanes=0", &["run.lanes"]),
        ("run.lanes=7", &["task.composition.samples", "multiple of 7"]),
        ("task.parity.samples=100", &["task.parity.samples = 100", "multiple"]),
        ("task.nobody.samples=64", &["no task named nobody"]),
        ("task.parity.reward.name=nice", &["nice"]),
        ("update.timesteps=7", &["update.timesteps = 7"]),
        // only five of the six steps are below the embedded config's max_sensitivity
        ("update.timesteps=6", &["update.timesteps = 6", "max_sensitivity"]),
        ("rollout.eta=0", &["rollout.eta"]),
        ("rollout.steps=5000", &["rollout.steps = 5000"]),
        ("pretrain.mode=sometimes", &["pretrain.mode", "sometimes"]),
        ("lora.rank=-3", &["lora.rank"]),
        ("lora.targets=[\"to_z\"]", &["lora.targets", "to_z"]),
        ("model.path=/no/such/model", &["/no/such/model", "does not exist"]),
        ("run.name=\"../elsewhere\"", &["run.name"]),
        ("nonsense", &["KEY=VALUE"]),
    ] {
        refused(&["--set", set], words);
    }
}

#[test]
fn mistakes_in_files_and_arguments() {
    refused(&["absent.toml"], &["absent.toml"]);
    refused(&["check", "absent.toml"], &["absent.toml"]);
    refused(&["inspect", "absent"], &["absent"]);
    refused(&["--resume", "absent"], &["absent"]);
    refused(&["export", "absent", "--out", "x"], &["absent"]);
    refused(&["sample"], &["--prompt"]);
    refused(&["sample", "--prompt", "x", "--eta", "2"], &["--eta"]);
    refused(&["sample", "--prompt", "x", "--height", "33"], &["--height 33", "multiple of 4"]);
    refused(&["sample", "--prompt", "x", "--model", "absent"], &["absent"]);
    refused(&["sample", "--prompts", "absent.txt"], &["absent.txt"]);
    refused(&["eval", "--model", "absent"], &["absent"]);
    refused(&["pretrain", "--out", "x", "--vae-steps", "0"], &["--vae-steps"]);

    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("syntax.toml"), "[run\nname = 3").unwrap();
    refused_in(folder.path(), &["syntax.toml"], &["syntax.toml"]);
    let joint = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/slurm/miniature-joint.toml")).unwrap();
    fs::write(at("extra.toml"), joint.replace("[rollout]", "[rollout]\nspeed = 3")).unwrap();
    refused_in(folder.path(), &["extra.toml"], &["extra.toml", "rollout", "speed"]);
    fs::write(at("missing.toml"), joint.replace("eta = 1.0", "")).unwrap();
    refused_in(folder.path(), &["missing.toml"], &["missing.toml", "eta"]);
    fs::write(at("binary.toml"), [0xff, 0xfe, 0]).unwrap();
    refused_in(folder.path(), &["binary.toml"], &["binary.toml"]);
    fs::write(at("text.h5"), "not HDF5").unwrap();
    refused_in(folder.path(), &["inspect", "text.h5"], &["text.h5"]);
    fs::create_dir(at("empty")).unwrap();
    refused_in(folder.path(), &["inspect", "empty"], &["empty"]);
    refused_in(folder.path(), &["--resume", "empty"], &["empty"]);
    fs::create_dir(at("halfmodel")).unwrap();
    fs::write(at("halfmodel/model_index.json"), "{}").unwrap();
    refused_in(folder.path(), &["sample", "--prompt", "x", "--model", "halfmodel"], &["halfmodel", "is missing"]);
    fs::write(at("latin1.txt"), [0xe9, b'\n']).unwrap();
    refused_in(folder.path(), &["sample", "--prompts", "latin1.txt"], &["latin1.txt"]);
}

#[test]
fn unknown_words_are_refused_by_the_parser() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [&["--no-such-option"][..], &["sample", "--steps", "x"], &["bench", "nothing"]] {
        let done = rldiff(folder.path(), arguments);
        assert_eq!(done.status.code(), Some(2), "{arguments:?}: {}", done.stderr);
        assert!(done.stderr.starts_with("error:"), "{}", done.stderr);
    }
}

#[test]
fn a_number_of_ranks_that_does_not_divide_the_lanes() {
    let _alone = one_at_a_time();
    let folder = tempfile::tempdir().unwrap();
    let mut command = mpirun(3);
    command.arg(RLDIFF).current_dir(folder.path());
    let done = run_within(command, Duration::from_secs(60));
    assert_eq!(done.status.code(), Some(2), "{}", done.stderr);
    let said: Vec<&str> = done.stderr.lines().filter(|line| line.starts_with("error:")).collect();
    assert_eq!(said.len(), 1, "{}", done.stderr);
    assert!(said[0].contains("3 ranks") && said[0].contains("1, 2, 4, 8"), "{}", said[0]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn every_command_has_help() {
    let folder = tempfile::tempdir().unwrap();
    let all = ["train", "check", "inspect", "sample", "eval", "export", "pretrain", "doctor", "bench"];
    let help = rldiff(folder.path(), &["--help"]).expect_success("--help").stdout;
    for command in all {
        assert!(help.contains(&format!("\n  {command} ")), "{command} is not in the help\n{help}");
        let own = rldiff(folder.path(), &[command, "--help"]).expect_success(command).stdout;
        assert!(own.contains("Usage:"), "{own}");
    }
    rldiff(folder.path(), &["--version"]).expect_success("--version");
}

#[test]
fn check_and_doctor() {
    let folder = tempfile::tempdir().unwrap();
    let said = rldiff(folder.path(), &["check"]).expect_success("check").stdout;
    for words in ["miniature-joint is sound", "numbers of ranks", "1, 2, 4, 8", "GFLOP", "1077572"] {
        assert!(said.contains(words), "{said}");
    }
    for name in ["composition", "parity", "preference"] {
        let config = format!("{}/slurm/miniature-{name}.toml", env!("CARGO_MANIFEST_DIR"));
        let said = rldiff(folder.path(), &["check", &config]).expect_success(name).stdout;
        assert_eq!(said.matches("evaluated only").count(), 2, "{said}");
    }
    let said = rldiff(folder.path(), &["doctor"]).expect_success("doctor").stdout;
    for words in ["libtorch works   yes", "MPI works        yes", "HDF5 works       yes", "libtorch_cpu.so"] {
        assert!(said.contains(words), "{said}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn pictures_do_not_depend_on_ranks_or_batch() {
    let folder = tempfile::tempdir().unwrap();
    let common = ["--prompt", "a kite on a book", "--prompt", "a portrait of a nurse", "--images", "3"];
    let common = [&["sample"][..], &common, &["--steps", "4", "--eta", "1", "--seed", "77"]].concat();
    rldiff(folder.path(), &[&common[..], &["--out", "one"]].concat()).expect_success("sample");
    rldiff(folder.path(), &[&common[..], &["--out", "batch", "--batch", "4"]].concat()).expect_success("sample");
    {
        let _alone = one_at_a_time();
        let mut command = mpirun(2);
        command.arg(RLDIFF).args(&common).args(["--out", "two"]).current_dir(folder.path());
        run_within(command, Duration::from_secs(60)).expect_success("two ranks");
    }
    let mut names: Vec<_> = fs::read_dir(folder.path().join("one")).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names.len(), 7);
    for name in &names {
        let of = |run: &str| fs::read(folder.path().join(run).join(name)).unwrap();
        assert!(of("one") == of("two"), "{name:?} differs at 2 ranks");
        assert!(of("one") == of("batch"), "{name:?} differs with --batch 4");
    }
    let (picture, text) = read_png(&folder.path().join("one/0001-02.png")).unwrap();
    assert_eq!((picture.width(), picture.height()), (32, 32));
    for (key, value) in [("prompt", "a portrait of a nurse"), ("seed", "77"), ("steps", "4"), ("sample", "5")] {
        assert!(text.contains(&(key.to_string(), value.to_string())), "{key} in {text:?}");
    }
}

#[test]
fn sizes_other_than_the_models_own() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["sample", "--prompt", "a tree", "--steps", "2", "--height", "40", "--width", "64", "--out", "x"];
    rldiff(folder.path(), &arguments).expect_success("sample");
    let (picture, _) = read_png(&folder.path().join("x/0000-00.png")).unwrap();
    assert_eq!((picture.width(), picture.height()), (64, 40));
}
