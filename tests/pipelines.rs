//! Pipelines as two generations of diffusers and transformers save them: token ids, latents and pictures are theirs, and
//! what is saved again keeps all. `tests/data/pipelines/make_pipelines.py` made the folders and the numbers.

mod common;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use common::empty_folder;
use rldiff::{
    diffusion::schedule::Schedule,
    models::{
        folder::{ModelFiles, ModelLocation},
        model_index::ensure_supported_scheduler,
        pipeline::Pipeline,
        scheduler_config::as_the_pipeline_has_it,
    },
    python_json,
};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

/// What diffusers and transformers make of a pipeline.
#[derive(Deserialize)]
struct Expected {
    ids: BTreeMap<String, Vec<u32>>,
    prompt: String,
    steps: usize,
    timesteps: Vec<i64>,
    latents: Vec<f32>,
    picture: Vec<f32>,
}

const FOLDERS: [&str; 2] = ["transformers-5", "transformers-4"];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/pipelines").join(name)
}

fn load(model: &Path) -> Pipeline {
    let files = ModelFiles::read(&ModelLocation::Disk(model.to_path_buf())).unwrap();
    Pipeline::from_files(files, Device::Cpu).unwrap()
}

fn largest_gap(ours: &Tensor, theirs: &[f32]) -> f64 {
    (ours.view([-1]) - Tensor::from_slice(theirs)).abs().max().double_value(&[])
}

fn holds(pipeline: &Pipeline, expected: &Expected, name: &str) {
    for (prompt, ids) in &expected.ids {
        assert_eq!(&pipeline.tokenizer.encode(prompt).unwrap().ids, ids, "{name}: {prompt:?}");
    }
    // the config's sample_size is a list: height, width
    assert_eq!(pipeline.latent_shape(), [4, 4, 8]);
    let steps = Schedule::of_model(&pipeline.scheduler).unwrap().steps(expected.steps, 0.0).unwrap();
    assert_eq!(steps.iter().map(|step| step.t).collect::<Vec<_>>(), expected.timesteps, "{name}");
    let _no_gradients = tch::no_grad_guard();
    let text = pipeline.embed(&[&expected.prompt]).unwrap();
    let mut x = (Tensor::arange(4 * 4 * 8, (Kind::Float, Device::Cpu)) * 0.37).sin().view([1, 4, 4, 8]);
    for step in steps {
        let eps = pipeline.unet.forward(&x, &Tensor::from_slice(&[step.t]), &text);
        x = x * step.c_x + eps * step.c_eps;
    }
    let picture = pipeline.vae.decode(&(&x / pipeline.vae.config.scaling_factor));
    let gaps = (largest_gap(&x, &expected.latents), largest_gap(&picture, &expected.picture));
    println!("{name}: latents differ by {:e}, pictures by {:e}", gaps.0, gaps.1);
    // six printed digits; DDIM's coefficients are f32 there and f64 here
    assert!(gaps.0 < 1e-4 && gaps.1 < 1e-4, "{name}: {gaps:?}");
}

#[test]
fn pipelines_of_both_generations_give_their_librarys_numbers() {
    for name in FOLDERS {
        let text = fs::read_to_string(folder(name).join("expected.json")).unwrap();
        let expected: Expected = serde_json::from_str(&text).unwrap();
        let pipeline = load(&folder(name).join("model"));
        holds(&pipeline, &expected, name);

        let saved = empty_folder(&format!("pipelines-{name}")).join("saved");
        pipeline.save(&saved, Kind::Float, None).unwrap();
        holds(&load(&saved), &expected, &format!("{name}, saved"));
        // the tokenizer as it came, and with it what transformers 4 asks for
        let tokenizer = folder(name).join("model/tokenizer");
        for entry in fs::read_dir(&tokenizer).unwrap() {
            let file = entry.unwrap().file_name();
            let bytes = |folder: &Path| fs::read(folder.join(&file)).unwrap();
            assert!(bytes(&tokenizer) == bytes(&saved.join("tokenizer")), "{name}: {file:?} has changed");
        }
        for file in ["vocab.json", "merges.txt", "added_tokens.json"] {
            assert!(saved.join("tokenizer").join(file).is_file(), "{name}: {file} is not saved");
        }
    }
}

/// Diffusers 0.39 with transformers 4 (the installed pair) reads what was saved from both, with the same ids.
#[test]
fn what_is_saved_is_read_by_the_older_pair() {
    let Some(python) = std::env::var_os("RLDIFF_TEST_PYTHON").filter(|path| !path.is_empty()) else {
        common::say("SKIPPED: RLDIFF_TEST_PYTHON is not set");
        return;
    };
    for name in FOLDERS {
        let saved = empty_folder(&format!("pipelines-older-{name}")).join("saved");
        load(&folder(name).join("model")).save(&saved, Kind::Float, None).unwrap();
        let script = r#"
import json, sys
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1])
expected = json.load(open(sys.argv[2]))["ids"]
for prompt, ids in expected.items():
    ours = pipeline.tokenizer(prompt, padding="max_length", truncation=True).input_ids
    assert ours == ids, (prompt, ours, ids)
"#;
        let mut command = std::process::Command::new(&python);
        command.arg("-c").arg(script).arg(&saved).arg(folder(name).join("expected.json"));
        common::run_within(command, std::time::Duration::from_secs(240)).expect_success(name);
    }
}

/// Every scheduler of diffusers 0.42 that can be made from betas, as it writes its config: it gives Stable Diffusion's
/// table, or is refused.
#[test]
fn every_scheduler_is_read_or_refused_by_name() {
    let bytes = fs::read(folder("schedulers.json")).unwrap();
    assert!(serde_json::from_slice::<serde_json::Value>(&bytes).is_err(), "there is no infinity in the file");
    let configs: BTreeMap<String, serde_json::Value> = python_json::read(&bytes).unwrap();
    let mut read = Vec::new();
    for (name, config) in &configs {
        let schedule = ensure_supported_scheduler(config)
            .and_then(|()| Schedule::of_model(&as_the_pipeline_has_it(config).0))
            .and_then(|schedule| schedule.steps(20, 1.0).map(|steps| (schedule.alpha_bar()[999], steps.len())));
        match schedule {
            Ok((last, steps)) => {
                assert!(steps == 20 && (last - 0.004660).abs() < 1e-6, "{name}: {last}");
                read.push(name.as_str());
            }
            Err(e) => assert!(format!("{e:#}").contains(name), "{name}: {e:#}"),
        }
    }
    let expected = [
        "DDIMParallelScheduler",
        "DDIMScheduler",
        "DDPMParallelScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "PNDMScheduler",
        "SASolverScheduler",
        "UniPCMultistepScheduler",
    ];
    assert_eq!(read, expected);
    assert_eq!(configs.len(), 42);
}
