//! The networks against numbers made with diffusers: a folder with `MANIFEST.json`, `TOLERANCES.json`, tiny pipelines
//! `<variant>-tiny/` and reference tensors `goldens/<variant>/*.safetensors`, named by RLDIFF_GOLDENS.
//! `make parity GOLDENS=DIR` prints every line.

use std::{collections::BTreeMap, fs, path::PathBuf};

use rldiff::models::{
    folder::{ModelFiles, ModelLocation},
    pipeline::Pipeline,
    weights::read_safetensors,
};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

struct Goldens {
    dir: PathBuf,
    tolerances: Value,
    failures: Vec<String>,
}

fn goldens() -> Option<Goldens> {
    let Some(dir) = std::env::var_os("RLDIFF_GOLDENS").map(PathBuf::from) else {
        eprintln!("SKIPPED: RLDIFF_GOLDENS is not set (folder of diffusers reference numbers)");
        return None;
    };
    let text = fs::read_to_string(dir.join("TOLERANCES.json")).expect("TOLERANCES.json");
    let tolerances = serde_json::from_str(&text).expect("TOLERANCES.json is JSON");
    Some(Goldens { dir, tolerances, failures: Vec::new() })
}

impl Goldens {
    fn tensors(&self, variant: &str, file: &str) -> BTreeMap<String, Tensor> {
        let path = self.dir.join(format!("goldens/{variant}/{file}.safetensors"));
        read_safetensors(&fs::read(&path).expect("golden file"), &path.display().to_string()).expect("golden file")
    }

    fn pipeline(&self, variant: &str) -> Pipeline {
        let location = ModelLocation::Disk(self.dir.join(format!("{variant}-tiny")));
        Pipeline::from_files(ModelFiles::read(&location).expect("model folder"), Device::Cpu).expect("pipeline")
    }

    /// Prints one line: name, largest error, tolerance, percent of it used.
    fn compare(&mut self, name: &str, got: &Tensor, expected: &Tensor) {
        let tolerance = self.tolerances["gaps"][name]["suggest_max_abs"].as_f64().expect("a tolerance for the tensor");
        assert_eq!(got.size(), expected.size(), "{name}");
        let error = (got.to_kind(Kind::Double) - expected.to_kind(Kind::Double)).abs().max().double_value(&[]);
        println!("{name:<40} error {error:9.2e}  tolerance {tolerance:9.2e}  {:5.1} %", 100.0 * error / tolerance);
        if error.is_nan() || error > tolerance {
            self.failures.push(name.to_string());
        }
    }

    fn finish(self) {
        assert!(self.failures.is_empty(), "over tolerance: {:?}", self.failures);
    }
}

/// Python has three CLIP tokenizers (plain, with ftfy, compiled); a prompt's ids must be those of one of them.
fn check_token_ids(variant: &str, pipeline: &Pipeline, listing: &Value, prompts: &[String]) {
    for (i, prompt) in prompts.iter().enumerate() {
        let ids = pipeline.tokenizer.encode(prompt).unwrap().ids;
        let lists = [&listing["input_ids"][i], &listing["ftfy_input_ids"][i.to_string()]];
        let accepted = lists.into_iter().chain([&listing["fast_input_ids"][i.to_string()]]).filter(|l| !l.is_null());
        let same = |list: &Value| {
            let list: Vec<u32> = serde_json::from_value(list.clone()).unwrap();
            ids.starts_with(&list) && ids[list.len()..].iter().all(|&id| id == listing["pad_token_id"])
        };
        assert!(
            accepted.clone().any(same),
            "{variant}: {prompt:?} became {ids:?}, not {:?}",
            accepted.collect::<Vec<_>>()
        );
    }
}

#[test]
fn text_encoder() {
    let Some(mut goldens) = goldens() else { return };
    for variant in ["sd2", "sd15"] {
        let pipeline = goldens.pipeline(variant);
        let text = goldens.tensors(variant, "text");
        let listing = fs::read_to_string(goldens.dir.join(format!("goldens/{variant}/tokenizer.json"))).unwrap();
        let listing: Value = serde_json::from_str(&listing).unwrap();
        let prompts: Vec<String> = serde_json::from_value(listing["prompts"].clone()).unwrap();
        check_token_ids(variant, &pipeline, &listing, &prompts);
        let hidden = tch::no_grad(|| pipeline.text_encoder.forward(&text["input_ids"]));
        goldens.compare(&format!("{variant}/text/last_hidden_state"), &hidden, &text["last_hidden_state"]);
    }
    goldens.finish();
}

#[test]
fn unet() {
    let Some(mut goldens) = goldens() else { return };
    let _no_grad = tch::no_grad_guard();
    for variant in ["sd2", "sd15"] {
        let pipeline = goldens.pipeline(variant);
        let g = goldens.tensors(variant, "unet");
        let (sample, text) = (&g["sample"], &g["encoder_hidden_states"]);
        let eps: Vec<Tensor> = (0..g["timesteps"].size()[0])
            .map(|i| pipeline.unet.forward(sample, &g["timesteps"].narrow(0, i, 1).expand([2], false), text))
            .collect();
        goldens.compare(&format!("{variant}/unet/eps"), &Tensor::stack(&eps, 0), &g["eps"]);
        let mixed = pipeline.unet.forward(sample, &g["timesteps_mixed"], text);
        goldens.compare(&format!("{variant}/unet/eps_mixed"), &mixed, &g["eps_mixed"]);
    }
    goldens.finish();
}

#[test]
fn vae() {
    let Some(mut goldens) = goldens() else { return };
    let _no_grad = tch::no_grad_guard();
    for variant in ["sd2", "sd15"] {
        let pipeline = goldens.pipeline(variant);
        let g = goldens.tensors(variant, "vae");
        let scale = pipeline.vae.config.scaling_factor;
        let decoded = pipeline.vae.decode(&(&g["latents"] / scale));
        goldens.compare(&format!("{variant}/vae/decoded"), &decoded, &g["decoded"]);
        let posterior = pipeline.vae.encode(&g["images"]);
        goldens.compare(&format!("{variant}/vae/mean"), &posterior.mean, &g["mean"]);
        goldens.compare(&format!("{variant}/vae/logvar"), &posterior.log_variance, &g["logvar"]);
        let sampled = posterior.sample(&g["noise"]) * scale;
        goldens.compare(&format!("{variant}/vae/sampled_scaled"), &sampled, &g["sampled_scaled"]);
    }
    goldens.finish();
}
