//! What rldiff draws, Python's diffusers draws too: from a model folder, from an exported checkpoint, with adapters.
//! Needs a Python with diffusers, named by RLDIFF_TEST_PYTHON (`make test` sets it up).

mod common;

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use common::run_within;
use rldiff::miniature::EMBEDDED_MODEL;

fn python() -> Option<PathBuf> {
    let python = std::env::var_os("RLDIFF_TEST_PYTHON").filter(|p| !p.is_empty()).map(PathBuf::from);
    if python.is_none() {
        eprintln!("SKIPPED: RLDIFF_TEST_PYTHON is not set (a Python with diffusers)");
    }
    python
}

fn rldiff(arguments: &[&str]) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rldiff"));
    command.args(arguments);
    run_within(command, Duration::from_secs(120)).expect_success(&arguments.join(" "));
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The embedded miniature as a folder.
fn model_folder(at: &Path) {
    for (path, bytes) in EMBEDDED_MODEL {
        let path = at.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

/// Draws with rldiff and again with diffusers; pictures are rounded to whole grey levels, so 0.5 apart is equal.
/// Largest difference observed: 0.501.
fn same_pictures(python: &Path, model: &Path, adapters: Option<&Path>, folder: &Path) {
    let out = folder.join("pictures");
    for (eta, guidance) in [("0", "3"), ("1", "7")] {
        let mut arguments = vec!["sample", "--model", text(model), "--out", text(&out), "--seed", "98765432109"];
        arguments.extend(["--prompt", "a kite on a book", "--images", "2", "--steps", "10"]);
        arguments.extend(["--eta", eta, "--guidance", guidance, "--negative", "a book"]);
        if let Some(file) = adapters {
            arguments.extend(["--lora", text(file)]);
        }
        rldiff(&arguments);
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/same_image_in_diffusers.py");
        let mut command = Command::new(python);
        command.args([script, text(model), text(&out.join("0000-00.png")), text(&out.join("0000-01.png"))]);
        if let Some(file) = adapters {
            command.args(["--lora", text(file)]);
        }
        let done = run_within(command, Duration::from_secs(120)).expect_success("diffusers");
        let lines: Vec<&str> = done.stdout.lines().filter(|line| line.starts_with('{')).collect();
        assert_eq!(lines.len(), 2, "{}", done.stdout);
        for line in lines {
            let result: serde_json::Value = serde_json::from_str(line).unwrap();
            println!("{line}");
            assert!(result["largest"].as_f64().unwrap() < 0.6, "eta {eta}: {line}");
        }
    }
}

/// Two short iterations, with adapters or without.
fn short_run(out: &Path, model: &Path, rank: u32) {
    let mut arguments: Vec<String> = vec!["--out".into(), text(out).into()];
    for (key, value) in [
        ("model.path", text(model).to_string()),
        ("lora.rank", rank.to_string()),
        ("update.warmup_steps", "0".into()),
        ("run.lanes", "1".into()),
        ("run.iterations", "2".into()),
        ("run.checkpoint_every", "2".into()),
        ("task.parity.train", "false".into()),
        ("task.composition.samples", "8".into()),
        ("task.preference.samples", "8".into()),
        ("task.composition.evaluation_samples", "8".into()),
        ("task.parity.evaluation_samples", "32".into()),
        ("task.preference.evaluation_samples", "8".into()),
    ] {
        arguments.extend(["--set".into(), format!("{key}={value}")]);
    }
    rldiff(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn an_exported_model_draws_the_same_in_diffusers() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (base, run, exported) = (folder.path().join("base"), folder.path().join("run"), folder.path().join("exported"));
    model_folder(&base);
    same_pictures(&python, &base, None, folder.path());
    short_run(&run, &base, 0);
    rldiff(&["export", text(&run), "--out", text(&exported)]);
    // without an average, what a run leaves as its model is its last checkpoint
    let unet = "unet/diffusion_pytorch_model.safetensors";
    assert!(std::fs::read(exported.join(unet)).unwrap() == std::fs::read(run.join("model").join(unet)).unwrap());
    same_pictures(&python, &exported, None, folder.path());
}

#[test]
fn exported_adapters_draw_the_same_in_diffusers() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (base, run) = (folder.path().join("base"), folder.path().join("run"));
    let adapters = folder.path().join("adapters/pytorch_lora_weights.safetensors");
    std::fs::create_dir_all(adapters.parent().unwrap()).unwrap();
    model_folder(&base);
    short_run(&run, &base, 4);
    rldiff(&["export", text(&run), "--lora", "--out", text(&adapters)]);
    same_pictures(&python, &base, Some(&adapters), folder.path());
}
