//! Everything from the tokenizer to AdamW against numbers made with diffusers: a folder with `MANIFEST.json`,
//! `TOLERANCES.json`, tiny pipelines `<variant>-tiny/` and reference tensors `goldens/<variant>/*.safetensors`, named
//! by RLDIFF_GOLDENS. `make parity GOLDENS=DIR` prints one line per tensor.
//!
//! A tensor passes if its largest error or its relative L2 error is within the tolerance of its name, ten times what
//! PyTorch's own f32 run is off. A reference tensor that nothing here compares is a failure too, but for the kinds
//! that [`NOT_COMPARED`] lists.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use rldiff::{
    comm::Local,
    diffusion::{
        sampler::{roll_out, Conditioning},
        schedule::{Schedule, Step},
        transition::{self, Given, Prediction},
    },
    kernels::{adamw::AdamW, clipped_surrogate, FlatBuffer},
    models::{
        folder::{ModelFiles, ModelLocation},
        parameters::{Builder, FlatParameters, Source},
        pipeline::Pipeline,
        time_embedding::TimeEmbedding,
        weights::read_safetensors,
    },
    policy::{
        advantage::{normalise, AdvantageSettings},
        gradient_sum::{GradientSum, Transport},
        optimizer::Optimizer,
        pretraining::{self, Corruption},
        surrogate::{surrogate, Diagnostics, Objective, Stored},
    },
    rewards::parity::statistical_parity,
};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// Beginnings and ends of names that are no result of rldiff.
const NOT_COMPARED: &[(&str, &str)] = &[
    ("", ".fp32run"),
    // activations inside the networks, there to find an error with
    ("debug.", ""),
    // gradients for summed log-probabilities; rldiff's are means
    ("sum.grad", ""),
    // how the set was made
    ("log_ratio_target", ""),
    ("rewards", ""),
    ("final_alpha_cumprod", ""),
    ("betas_f64", ""),
    ("alphas_cumprod_f64", ""),
];

/// Bounds on the relative L2 error of how far AdamW moved one tensor; the set's README says why no other measure is
/// of use. All tensors together have a tolerance in the table.
const ADAMW_BOUND: [(&str, f64); 2] = [("lr1e-4", 2e-2), ("lr2e-6", 1e-1)];

struct Goldens {
    dir: PathBuf,
    tolerances: Value,
    /// What the set should hold: objects with `file` and `name`.
    listing: Vec<Value>,
    guidance_scale: f64,
    clip_range: f64,
    failures: Vec<String>,
}

fn json(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn goldens() -> Option<Goldens> {
    let Some(dir) = std::env::var_os("RLDIFF_GOLDENS").map(PathBuf::from) else {
        eprintln!("SKIPPED: RLDIFF_GOLDENS is not set (folder of diffusers reference numbers)");
        return None;
    };
    let tolerances = json(&dir.join("TOLERANCES.json"))["gaps"].take();
    let mut manifest = json(&dir.join("MANIFEST.json"));
    let (conventions, listing) = (manifest["conventions"].take(), manifest["tensors"].take());
    let listing = listing.as_array().expect("MANIFEST.json: tensors").clone();
    let number = |key: &str| conventions[key].as_f64().unwrap_or_else(|| panic!("MANIFEST.json: conventions.{key}"));
    let (guidance_scale, clip_range) = (number("guidance"), number("clip_range"));
    Some(Goldens { dir, tolerances, listing, guidance_scale, clip_range, failures: Vec::new() })
}

/// The tensors of one reference file, and which of them were used.
struct File {
    /// `sd2/rl`
    prefix: String,
    tensors: BTreeMap<String, Tensor>,
    used: RefCell<BTreeSet<String>>,
}

impl File {
    fn get(&self, name: &str) -> &Tensor {
        self.used.borrow_mut().insert(name.to_string());
        self.tensors.get(name).unwrap_or_else(|| panic!("{}/{name}: the reference tensor is missing", self.prefix))
    }

    fn names(&self, start: &str) -> Vec<String> {
        let plain = |name: &&String| name.starts_with(start) && !name.ends_with(".fp32run");
        self.tensors.keys().filter(plain).cloned().collect()
    }
}

fn doubles(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(&tensor.to_kind(Kind::Double).reshape([-1])).unwrap()
}

/// Largest difference and relative L2 difference.
fn gaps(got: &Tensor, expected: &Tensor) -> (f64, f64) {
    let (got, expected) = (got.to_kind(Kind::Double), expected.to_kind(Kind::Double));
    let difference = got - &expected;
    let norm = |t: &Tensor| t.square().sum(Kind::Double).sqrt().double_value(&[]);
    (difference.abs().max().double_value(&[]), norm(&difference) / norm(&expected).max(1e-300))
}

impl Goldens {
    /// `sd2` for a folder `sd2-tiny`.
    fn variants(&self) -> Vec<String> {
        let names = fs::read_dir(&self.dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut variants: Vec<String> =
            names.filter_map(|name| Some(name.strip_suffix("-tiny")?.to_string())).collect();
        variants.sort();
        assert!(!variants.is_empty(), "{} holds no folder VARIANT-tiny", self.dir.display());
        variants
    }

    fn file(&self, variant: &str, file: &str) -> File {
        let path = self.dir.join(format!("goldens/{variant}/{file}.safetensors"));
        let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let tensors = read_safetensors(&bytes, &path.display().to_string()).unwrap();
        File { prefix: format!("{variant}/{file}"), tensors, used: RefCell::default() }
    }

    fn pipeline(&self, variant: &str) -> (Pipeline, Schedule) {
        let location = ModelLocation::Disk(self.dir.join(format!("{variant}-tiny")));
        let pipeline = Pipeline::from_files(ModelFiles::read(&location).unwrap(), Device::Cpu).unwrap();
        let schedule = Schedule::of_model(&pipeline.scheduler).unwrap();
        (pipeline, schedule)
    }

    /// Prints one line: name, error, tolerance, percent of it used.
    fn line(&mut self, name: &str, measure: &str, error: f64, tolerance: f64) -> f64 {
        let used = if error == 0.0 { 0.0 } else { 100.0 * error / tolerance };
        println!("{name:<70} {measure:<8} {error:9.2e}  tolerance {tolerance:9.2e}  {used:6.1} %");
        used
    }

    fn judge(&mut self, name: &str, measure: &str, error: f64, tolerance: f64) {
        let used = self.line(name, measure, error, tolerance);
        if used.is_nan() || used > 100.0 {
            self.failures.push(name.to_string());
        }
    }

    /// The tolerance `measure` of `name`; its absence is a failure.
    fn tolerance(&mut self, name: &str, measure: &str) -> f64 {
        let found = self.tolerances[name][measure].as_f64();
        found.unwrap_or_else(|| {
            self.failures.push(format!("{name} (no tolerance {measure})"));
            f64::NAN
        })
    }

    /// Compares with a tensor of `file` under the tolerance of its name.
    fn compare(&mut self, file: &File, name: &str, got: &Tensor) {
        let full = format!("{}/{name}", file.prefix);
        self.compare_values(&full, got, file.get(name));
    }

    fn compare_values(&mut self, name: &str, got: &Tensor, expected: &Tensor) {
        assert_eq!(got.size(), expected.size(), "{name}");
        let (largest, relative) = gaps(got, expected);
        let bound = self.tolerance(name, "suggest_max_abs");
        match self.tolerances[name]["suggest_rel_l2"].as_f64() {
            Some(relative_bound) if relative / relative_bound < largest / bound => {
                self.judge(name, "rel. L2", relative, relative_bound);
            }
            _ => self.judge(name, "largest", largest, bound),
        }
    }

    /// A tensor without a tolerance in the table: `bound` on the largest difference, 0 for the same bits.
    fn compare_within(&mut self, file: &File, name: &str, got: &Tensor, bound: f64) {
        let expected = file.get(name);
        assert_eq!(got.size(), expected.size(), "{}/{name}", file.prefix);
        self.judge(&format!("{}/{name}", file.prefix), "largest", gaps(got, expected).0, bound);
    }

    /// Fails for every reference tensor that was not used, and for every one of the manifest that is not there.
    fn all_used(&mut self, file: &File) {
        let path = format!("goldens/{}.safetensors", file.prefix);
        for entry in self.listing.iter().filter(|entry| entry["file"] == path.as_str()) {
            let name = entry["name"].as_str().expect("MANIFEST.json: a name");
            if !file.tensors.contains_key(name) {
                self.failures.push(format!("{}/{name} (in MANIFEST.json, not in the file)", file.prefix));
            }
        }
        let used = file.used.borrow();
        for name in file.tensors.keys().filter(|name| !used.contains(*name)) {
            if !NOT_COMPARED.iter().any(|(start, end)| name.starts_with(start) && name.ends_with(end)) {
                self.failures.push(format!("{}/{name} (not compared)", file.prefix));
            }
        }
    }

    fn finish(self) {
        assert!(self.failures.is_empty(), "over tolerance or missing: {:#?}", self.failures);
    }
}

/// Python has three CLIP tokenizers (plain, with ftfy, compiled); a prompt's ids must be those of one of them.
fn check_token_ids(variant: &str, pipeline: &Pipeline, listing: &Value, prompts: &[String]) {
    for (i, prompt) in prompts.iter().enumerate() {
        let ids = pipeline.tokenizer.encode(prompt).unwrap().ids;
        let key = i.to_string();
        let lists = [&listing["input_ids"][i], &listing["ftfy_input_ids"][&key], &listing["fast_input_ids"][&key]];
        let same = |list: &Value| {
            let list: Vec<u32> = serde_json::from_value(list.clone()).unwrap();
            ids.starts_with(&list) && ids[list.len()..].iter().all(|&id| id == listing["pad_token_id"])
        };
        let mut accepted = lists.into_iter().filter(|list| !list.is_null());
        assert!(accepted.any(same), "{variant}: {prompt:?} became {ids:?}, not {lists:?}");
    }
}

#[test]
fn text_encoder() {
    let Some(mut goldens) = goldens() else { return };
    for variant in goldens.variants() {
        let (pipeline, _) = goldens.pipeline(&variant);
        let text = goldens.file(&variant, "text");
        let listing = json(&goldens.dir.join(format!("goldens/{variant}/tokenizer.json")));
        let prompts: Vec<String> = serde_json::from_value(listing["prompts"].clone()).unwrap();
        check_token_ids(&variant, &pipeline, &listing, &prompts);
        let hidden = tch::no_grad(|| pipeline.text_encoder.forward(text.get("input_ids")));
        goldens.compare(&text, "last_hidden_state", &hidden);
        goldens.all_used(&text);
    }
    goldens.finish();
}

#[test]
fn schedule() {
    let Some(mut goldens) = goldens() else { return };
    for variant in goldens.variants() {
        let (_, schedule) = goldens.pipeline(&variant);
        let file = goldens.file(&variant, "schedule");
        let table = Tensor::from_slice(schedule.alpha_bar());
        let expected = file.get("alphas_cumprod_f32").to_kind(Kind::Double);
        goldens.compare_values(&format!("{variant}/schedule/alphas_cumprod"), &table, &expected);
        goldens.compare_values(
            &format!("{variant}/schedule/one_minus_alphas_cumprod"),
            &(1.0 - &table),
            &(1.0 - &expected),
        );
        for name in file.names("timesteps_") {
            let count: usize = name.trim_start_matches("timesteps_").parse().unwrap();
            let steps = schedule.steps(count, 1.0).unwrap();
            let timesteps: Vec<i64> = steps.iter().map(|step| step.t).collect();
            goldens.compare_within(&file, &name, &Tensor::from_slice(&timesteps), 0.0);
            if !file.tensors.contains_key(&format!("variance_{count}")) {
                continue;
            }
            let column = |of: fn(&Step) -> f64| Tensor::from_slice(&steps.iter().map(of).collect::<Vec<f64>>());
            goldens.compare_within(&file, &format!("alpha_t_{count}"), &column(|s| s.alpha_bar), 0.0);
            goldens.compare_within(&file, &format!("alpha_prev_{count}"), &column(|s| s.alpha_bar_prev), 0.0);
            goldens.compare(&file, &format!("variance_{count}"), &column(|s| s.sigma * s.sigma));
            // the same f64 formula: observed 1e-16
            goldens.compare_within(&file, &format!("std_eta1_{count}"), &column(|s| s.sigma), 1e-15);
        }
        goldens.all_used(&file);
    }
    goldens.finish();
}

#[test]
fn unet() {
    let Some(mut goldens) = goldens() else { return };
    let _no_grad = tch::no_grad_guard();
    for variant in goldens.variants() {
        let (pipeline, _) = goldens.pipeline(&variant);
        let g = goldens.file(&variant, "unet");
        let (sample, text, timesteps) = (g.get("sample"), g.get("encoder_hidden_states"), g.get("timesteps"));
        let rows = sample.size()[0];
        let eps: Vec<Tensor> = (0..timesteps.size()[0])
            .map(|i| pipeline.unet.forward(sample, &timesteps.narrow(0, i, 1).expand([rows], false), text))
            .collect();
        goldens.compare(&g, "eps", &Tensor::stack(&eps, 0));
        let mixed = pipeline.unet.forward(sample, g.get("timesteps_mixed"), text);
        goldens.compare(&g, "eps_mixed", &mixed);

        let config = &pipeline.unet.config;
        let weights = pipeline.unet_parameters.entries.iter().map(|e| (e.name.clone(), e.tensor.shallow_clone()));
        let builder = Builder::new(Source::Tensors(weights.collect()), Kind::Float, Device::Cpu).sub("time_embedding");
        let embedding =
            TimeEmbedding::new(&builder, config.levels[0].channels, config.flip_sin_to_cos, config.freq_shift).unwrap();
        let t = g.get("time_proj.timesteps");
        goldens.compare(&g, "time_proj", &embedding.sinusoids(t));
        goldens.compare(&g, "time_embedding", &embedding.forward(t, Kind::Float));
        goldens.all_used(&g);
    }
    goldens.finish();
}

/// Pictures in [−1, 1] as NHWC bytes.
fn to_bytes(raw: &Tensor) -> Tensor {
    ((raw / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round().permute([0, 2, 3, 1]).to_kind(Kind::Uint8)
}

impl Goldens {
    /// Bytes may be off by one, in a few pixels: ten times the share that PyTorch's own f32 run has, or one in 1000.
    fn compare_bytes(&mut self, file: &File, name: &str, got: &Tensor) {
        let full = format!("{}/{name}", file.prefix);
        let expected = file.get(name).to_kind(Kind::Int);
        assert_eq!(got.size(), expected.size(), "{full}");
        let difference = (got.to_kind(Kind::Int) - expected).abs();
        let share = difference.not_equal(0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        let torch = self.tolerances[&full]["mismatch_fraction"].as_f64().unwrap_or(1e-4);
        self.judge(&full, "share≠", share, 10.0 * torch.max(1e-4));
        self.judge(&full, "largest", difference.max().double_value(&[]), 1.0);
    }
}

#[test]
fn vae() {
    let Some(mut goldens) = goldens() else { return };
    let _no_grad = tch::no_grad_guard();
    for variant in goldens.variants() {
        let (pipeline, _) = goldens.pipeline(&variant);
        let g = goldens.file(&variant, "vae");
        let scale = pipeline.vae.config.scaling_factor;
        let decoded = pipeline.vae.decode(&(g.get("latents") / scale));
        goldens.compare(&g, "decoded", &decoded);
        goldens.compare_bytes(&g, "decoded_u8", &to_bytes(&decoded));
        let posterior = pipeline.vae.encode(g.get("images"));
        goldens.compare(&g, "mean", &posterior.mean);
        goldens.compare(&g, "logvar", &posterior.log_variance);
        goldens.compare(&g, "sampled_scaled", &(posterior.sample(g.get("noise")) * scale));
        goldens.all_used(&g);
    }
    goldens.finish();
}

#[test]
fn trajectories() {
    let Some(mut goldens) = goldens() else { return };
    let _no_grad = tch::no_grad_guard();
    for variant in goldens.variants() {
        let (pipeline, schedule) = goldens.pipeline(&variant);
        for name in ["ddim10", "ddim50"] {
            let g = goldens.file(&variant, name);
            let (x_t, noise) = (g.get("x_T"), g.get("noise"));
            let conditioning = Conditioning::new(g.get("cond"), g.get("uncond"), goldens.guidance_scale);
            for (eta, key) in [(0.0, "eta0"), (1.0, "eta1")] {
                let steps = schedule.steps(noise.size()[0] as usize, eta).unwrap();
                let noise_of = |i: usize| noise.get(i as i64);
                let trajectory =
                    roll_out(&pipeline.unet, None, &steps, x_t.shallow_clone(), &conditioning, noise_of).unwrap();
                goldens.compare(&g, &format!("{key}.latents"), &Tensor::stack(&trajectory.latents, 0));
                let expected = g.get(&format!("{key}.latents"));
                let last = expected.get(expected.size()[0] - 1);
                goldens.compare_values(&format!("{variant}/{name}/{key}.x0_only"), trajectory.x_0(), &last);
                let picture = pipeline.vae.decode(&(trajectory.x_0() / pipeline.vae.config.scaling_factor));
                goldens.compare_bytes(&g, &format!("{key}.image_u8"), &to_bytes(&picture));
                let raw = format!("{key}.image_raw");
                if g.tensors.contains_key(&raw) {
                    goldens.compare(&g, &raw, &picture);
                }
                if eta > 0.0 {
                    let log_probs: Vec<&Tensor> = trajectory.log_probs.iter().map(|p| p.as_ref().unwrap()).collect();
                    let mean = Tensor::stack(&log_probs, 0);
                    goldens.compare(&g, &format!("{key}.logp_mean"), &mean);
                    let elements = x_t.get(0).numel() as f64;
                    let sum = mean.to_kind(Kind::Double) * elements;
                    goldens.compare(&g, &format!("{key}.logp_sum"), &sum);
                }
            }
            goldens.all_used(&g);
        }
    }
    goldens.finish();
}

/// One update's batch through the U-Net and the objective, timesteps differing from sample to sample.
struct Pass {
    /// f32 `[B]`.
    log_prob: Tensor,
    grad_cond: Tensor,
    grad_uncond: Tensor,
    /// Its gradient is that of the objective.
    pseudo_loss: Tensor,
    diagnostics: Diagnostics,
}

fn rl_pass(
    pipeline: &Pipeline,
    steps: &[Step],
    file: &File,
    update: i64,
    guidance_scale: f64,
    clip_range: f64,
) -> Pass {
    let row = |name: &str| file.get(name).get(update);
    let (x_t, x_prev, timesteps, step_index) = (row("x_t"), row("x_prev"), row("timesteps"), row("step_index"));
    let log_prob_old = row("old_logp_mean").to_kind(Kind::Float);
    let advantage = file.get("advantages").to_kind(Kind::Float);
    let batch = x_t.size()[0];
    let text = Tensor::cat(&[&file.get("uncond").expand([batch, -1, -1], false), file.get("cond")], 0);
    let output =
        pipeline.unet.forward(&Tensor::cat(&[&x_t, &x_t], 0), &Tensor::cat(&[&timesteps, &timesteps], 0), &text);
    let halves = output.chunk(2, 0);
    let objective = Objective { clip_range, weight: 1.0, samples: batch as usize };
    let (mut log_probs, mut grads_cond, mut grads_uncond) = (Vec::new(), Vec::new(), Vec::new());
    let mut pseudo_loss = Tensor::zeros([], (Kind::Float, Device::Cpu));
    let mut diagnostics = Diagnostics::default();
    for sample in 0..batch {
        let of = |t: &Tensor| t.narrow(0, sample, 1);
        let step = &steps[step_index.int64_value(&[sample]) as usize];
        assert_eq!(step.t, timesteps.int64_value(&[sample]), "update {update}, sample {sample}");
        let (eps_uncond, eps_cond) = (of(&halves[0]), of(&halves[1]));
        let prediction = Prediction { eps_uncond: Some(&eps_uncond), eps_cond: &eps_cond, guidance_scale };
        let (x_t, x_prev, old, advantage) = (of(&x_t), of(&x_prev), of(&log_prob_old), of(&advantage));
        let scored = transition::step(step, &x_t, prediction, Given::Score(&x_prev)).unwrap();
        log_probs.push(scored.density().unwrap().shallow_clone());
        let stored = Stored { x_t: &x_t, x_prev: &x_prev, log_prob_old: &old, advantage: &advantage };
        let result = surrogate(step, stored, prediction, &objective).unwrap();
        pseudo_loss += result.pseudo_loss(prediction);
        diagnostics.merge(&result.diagnostics);
        grads_cond.push(result.grad_cond);
        grads_uncond.push(result.grad_uncond.unwrap());
    }
    Pass {
        log_prob: Tensor::cat(&log_probs, 0),
        grad_cond: Tensor::cat(&grads_cond, 0),
        grad_uncond: Tensor::cat(&grads_uncond, 0),
        pseudo_loss,
        diagnostics,
    }
}

/// A network being trained: its flat parameters and the names in the order of the reference's vectors of norms.
struct Training {
    params: FlatParameters,
    names: Vec<String>,
    initial: Vec<f32>,
    sum: RefCell<GradientSum>,
}

impl Training {
    fn new(goldens: &Goldens, variant: &str, pipeline: &Pipeline) -> Self {
        let params = FlatParameters::new(&[&pipeline.unet_parameters]).unwrap();
        let listing = json(&goldens.dir.join(format!("goldens/{variant}/param_names.json")));
        let names = serde_json::from_value(listing["all_parameters"].clone()).unwrap();
        let initial = params.buffer().slice().to_vec();
        let sum = RefCell::new(GradientSum::new(&params, Transport::default()).unwrap());
        Training { params, names, initial, sum }
    }

    fn gradient(&self, loss: &Tensor) -> Vec<f32> {
        let mut sum = self.sum.borrow_mut();
        sum.backward(loss, true, &Local).unwrap();
        sum.finish().slice().to_vec()
    }

    fn norms(&self, flat: &[f64]) -> Tensor {
        let named: BTreeMap<&str, f64> = self
            .params
            .layout
            .iter()
            .map(|e| {
                let values = &flat[e.offset..e.offset + e.shape.iter().product::<i64>() as usize];
                (e.name.as_str(), values.iter().map(|v| v * v).sum::<f64>().sqrt())
            })
            .collect();
        assert_eq!(named.len(), self.names.len(), "param_names.json");
        Tensor::from_slice(&self.names.iter().map(|name| named[name.as_str()]).collect::<Vec<f64>>())
    }

    /// How far each parameter is from its initial value.
    fn delta(&self) -> Vec<f64> {
        self.params
            .buffer()
            .slice()
            .iter()
            .zip(&self.initial)
            .map(|(&now, &then)| f64::from(now) - f64::from(then))
            .collect()
    }

    fn named(&self, flat: &[f64], name: &str) -> Tensor {
        let entry = self.params.layout.iter().find(|e| e.name == name).unwrap_or_else(|| panic!("parameter {name}"));
        let count = entry.shape.iter().product::<i64>() as usize;
        Tensor::from_slice(&flat[entry.offset..entry.offset + count]).view(entry.shape.as_slice())
    }
}

fn wide(flat: &[f32]) -> Vec<f64> {
    flat.iter().map(|&v| f64::from(v)).collect()
}

fn norm(flat: &[f32]) -> f64 {
    rldiff::kernels::adamw::global_norm(flat)
}

impl Goldens {
    /// Norms of all gradients, their norm, and single gradients `single`NAME.
    fn compare_gradient(&mut self, file: &File, training: &Training, gradient: &[f32], prefix: &str, single: &str) {
        let flat = wide(gradient);
        self.compare(file, &format!("{prefix}grad_norms"), &training.norms(&flat));
        if file.tensors.contains_key(&format!("{prefix}grad_total_norm")) {
            self.compare(file, &format!("{prefix}grad_total_norm"), &Tensor::from_slice(&[norm(gradient)]));
        }
        for name in file.names(single) {
            self.compare(file, &name, &training.named(&flat, &name[single.len()..]));
        }
    }

    /// What AdamW did to the tensors `prefix`NAME, one by one and (where there is a tolerance) together.
    fn compare_moved(&mut self, file: &File, training: &Training, prefix: &str, bound: f64) {
        let delta = training.delta();
        self.compare(file, &format!("{prefix}delta_norms"), &training.norms(&delta));
        let initial = wide(&training.initial);
        let (mut all_ours, mut all_expected) = (Vec::new(), Vec::new());
        for name in file.names(prefix).into_iter().filter(|name| !name.ends_with("delta_norms")) {
            let parameter = &name[prefix.len()..];
            let ours = training.named(&delta, parameter);
            let expected = file.get(&name).to_kind(Kind::Double) - training.named(&initial, parameter);
            self.judge(&format!("{}/{name}", file.prefix), "moved L2", gaps(&ours, &expected).1, bound);
            all_ours.extend(doubles(&ours));
            all_expected.extend(doubles(&expected));
        }
        let together = format!("{}/DELTA(param-initial).{}", file.prefix, prefix.trim_end_matches('.'));
        if !self.tolerances[&together].is_null() {
            let (_, relative) = gaps(&Tensor::from_slice(&all_ours), &Tensor::from_slice(&all_expected));
            let bound = self.tolerance(&together, "suggest_rel_l2");
            self.judge(&together, "moved L2", relative, bound);
        }
    }

    /// Ratios, losses and diagnostics of the stored transitions, from log-probabilities `[updates, B]`.
    fn compare_objective(&mut self, file: &File, prefix: &str, log_prob: &Tensor, old: &Tensor, clip_range: f64) {
        let (updates, batch) = (log_prob.size()[0], log_prob.size()[1]);
        let (log_probs, olds) = (doubles(log_prob), doubles(old));
        let advantage = doubles(file.get("advantages"));
        let (mut ratio, mut unclipped, mut clipped, mut loss) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut outside, mut kl) = (Vec::new(), Vec::new());
        for i in 0..log_probs.len() {
            let a = advantage[i % batch as usize];
            let (terms, _) = clipped_surrogate::surrogate(log_probs[i] as f32, olds[i] as f32, a as f32, clip_range);
            let w = f64::from(terms.ratio);
            ratio.push(w);
            unclipped.push(-a * w);
            clipped.push(-a * w.clamp(1.0 - clip_range, 1.0 + clip_range));
            loss.push(f64::from(terms.loss));
            outside.push(f64::from(u8::from(terms.clipped)));
            kl.push(f64::from(terms.approx_kl));
        }
        let table = |values: &[f64]| Tensor::from_slice(values).view([updates, batch]);
        let means = |values: &[f64]| table(values).mean_dim(1, false, Kind::Double);
        for (name, got) in [
            ("ratio", table(&ratio)),
            ("unclipped", table(&unclipped)),
            ("clipped", table(&clipped)),
            ("per_sample", table(&loss)),
            ("loss", means(&loss)),
            ("clip_fraction", means(&outside)),
            ("approx_kl", means(&kl)),
        ] {
            self.compare(file, &format!("{prefix}{name}"), &got);
        }
    }
}

/// The schedule that the stored step numbers belong to.
fn steps_of(schedule: &Schedule, file: &File) -> Vec<Step> {
    let (timesteps, indices) = (doubles(file.get("timesteps")), doubles(file.get("step_index")));
    let fits = |steps: &Vec<Step>| {
        timesteps.iter().zip(&indices).all(|(&t, &i)| steps.get(i as usize).is_some_and(|s| s.t as f64 == t))
    };
    let mut counts = [50, 10, 20, 25, 30, 40, 100].into_iter().map(|count| schedule.steps(count, 1.0).unwrap());
    counts.find(fits).expect("a number of steps that rl/timesteps and rl/step_index fit")
}

#[test]
fn policy_gradient() {
    let Some(mut goldens) = goldens() else { return };
    let (guidance_scale, clip_range) = (goldens.guidance_scale, goldens.clip_range);
    for variant in goldens.variants() {
        let (pipeline, schedule) = goldens.pipeline(&variant);
        let g = goldens.file(&variant, "rl");
        let steps = steps_of(&schedule, &g);
        let updates = g.get("x_t").size()[0];
        let training = Training::new(&goldens, &variant, &pipeline);
        let pass = |update| rl_pass(&pipeline, &steps, &g, update, guidance_scale, clip_range);
        let mean = tch::no_grad(|| Tensor::stack(&(0..updates).map(|u| pass(u).log_prob).collect::<Vec<_>>(), 0));
        goldens.compare(&g, "logp_mean", &mean);
        let sum = mean.to_kind(Kind::Double) * g.get("x_t").get(0).get(0).numel() as f64;
        goldens.compare(&g, "logp_sum", &sum);
        goldens.compare_objective(&g, "mean.", &mean, g.get("old_logp_mean"), clip_range);
        // summed log-probabilities are the same function with a range of its own
        goldens.compare_objective(&g, "sum.", &sum, g.get("old_logp_sum"), 0.1);

        let first = pass(0);
        goldens.compare(&g, "mean.grad_eps_cond", &first.grad_cond);
        goldens.compare(&g, "mean.grad_eps_uncond", &first.grad_uncond);
        let gradient = training.gradient(&first.pseudo_loss);
        goldens.compare_gradient(&g, &training, &gradient, "mean.", "grad.");
        for name in g.names("clip_coef.max_norm_") {
            let max_norm: f64 = name.trim_start_matches("clip_coef.max_norm_").parse().unwrap();
            let ours = f64::from(rldiff::kernels::adamw::clip_factor(norm(&gradient), Some(max_norm)));
            // one rounding to f32, and the six digits of the name
            goldens.compare_within(&g, &name, &Tensor::from_slice(&[ours]), 2e-6);
        }
        for (rate, bound) in ADAMW_BOUND {
            train(&mut goldens, &variant, &g, &steps, rate, bound);
        }
        goldens.all_used(&g);
    }
    goldens.finish();
}

/// Five AdamW updates, compared before each and after the first and the last.
fn train(goldens: &mut Goldens, variant: &str, g: &File, steps: &[Step], rate: &str, bound: f64) {
    let (pipeline, _) = goldens.pipeline(variant);
    let mut training = Training::new(goldens, variant, &pipeline);
    let settings = AdamW { learning_rate: rate.trim_start_matches("lr").parse().unwrap(), ..AdamW::default() };
    let mut optimizer = Optimizer::new(training.params.buffer(), settings, None, 0);
    let (mut log_probs, mut losses, mut norms) = (Vec::new(), Vec::new(), Vec::new());
    let updates = g.get("x_t").size()[0];
    for update in 0..updates {
        let pass = rl_pass(&pipeline, steps, g, update, goldens.guidance_scale, goldens.clip_range);
        let gradient = training.gradient(&pass.pseudo_loss);
        norms.push(optimizer.step(&mut training.params, &FlatBuffer::from_slice(&gradient, Device::Cpu)).unwrap());
        losses.push(pass.diagnostics.loss());
        log_probs.push(pass.log_prob);
        if g.tensors.contains_key(&format!("{rate}.after{}.delta_norms", update + 1)) {
            goldens.compare_moved(g, &training, &format!("{rate}.after{}.", update + 1), bound);
        }
    }
    let log_prob = Tensor::stack(&log_probs, 0);
    let ratio = (&log_prob - g.get("old_logp_mean").to_kind(Kind::Float)).exp();
    for (name, got) in [
        ("logp_mean", log_prob),
        ("ratio", ratio),
        ("loss", Tensor::from_slice(&losses)),
        ("grad_total_norm", Tensor::from_slice(&norms)),
    ] {
        goldens.compare(g, &format!("{rate}.per_update.{name}"), &got);
    }
}

#[test]
fn pretraining_loss() {
    let Some(mut goldens) = goldens() else { return };
    for variant in goldens.variants() {
        let (pipeline, schedule) = goldens.pipeline(&variant);
        let g = goldens.file(&variant, "pretrain");
        let mut training = Training::new(&goldens, &variant, &pipeline);
        let (x_0, noise, cond) = (g.get("x0"), g.get("noise"), g.get("cond"));
        let t: Vec<i64> = Vec::try_from(g.get("timesteps")).unwrap();
        let corruption = |from: usize, count: usize| Corruption {
            t: t[from..from + count].to_vec(),
            noise: noise.narrow(0, from as i64, count as i64),
        };
        let loss = |from: usize, count: usize| {
            let of = |x: &Tensor| x.narrow(0, from as i64, count as i64);
            pretraining::loss(&pipeline.unet, &schedule, &of(x_0), &of(cond), &corruption(from, count))
        };

        // the pieces of the loss, which the library does not hand out
        let column = |f: &dyn Fn(f64) -> f64| {
            let values: Vec<f32> = t.iter().map(|&t| f(schedule.alpha_bar()[t as usize]) as f32).collect();
            Tensor::from_slice(&values).view([-1, 1, 1, 1])
        };
        let x_t = column(&|a| a.sqrt()) * x_0 + column(&|a| (1.0 - a).sqrt()) * noise;
        goldens.compare(&g, "x_t", &x_t);
        let eps = tch::no_grad(|| pipeline.unet.forward(&x_t, g.get("timesteps"), cond));
        goldens.compare(&g, "eps", &eps);
        let leaf = eps.copy().set_requires_grad(true);
        (&leaf - noise).square().mean(Kind::Float).backward();
        goldens.compare(&g, "grad_eps", &leaf.grad());

        let each: Vec<f64> = tch::no_grad(|| (0..t.len()).map(|i| loss(i, 1).double_value(&[])).collect());
        goldens.compare(&g, "per_sample_mse", &Tensor::from_slice(&each));
        let whole = loss(0, t.len());
        let mean = whole.double_value(&[]);
        goldens.compare(&g, "loss_mean", &Tensor::from_slice(&[mean]));
        goldens.compare(&g, "loss_sum", &Tensor::from_slice(&[mean * x_0.get(0).numel() as f64]));
        let gradient = training.gradient(&whole);
        goldens.compare_gradient(&g, &training, &gradient, "", "grad.");

        let rl = goldens.file(&variant, "rl");
        let steps = steps_of(&schedule, &rl);
        let pass = rl_pass(&pipeline, &steps, &rl, 0, goldens.guidance_scale, goldens.clip_range);
        let joint = training.gradient(&(pass.pseudo_loss + loss(0, t.len()) * 0.5));
        goldens.compare_gradient(&g, &training, &joint, "joint.", "joint.grad.");
        let settings = AdamW { learning_rate: 1e-4, ..AdamW::default() };
        let mut optimizer = Optimizer::new(training.params.buffer(), settings, None, 0);
        optimizer.step(&mut training.params, &FlatBuffer::from_slice(&joint, Device::Cpu)).unwrap();
        goldens.compare_moved(&g, &training, "joint.after1.", ADAMW_BOUND[0].1);
        goldens.all_used(&g);
    }
    goldens.finish();
}

/// What needs no model: advantages and statistical parity.
#[test]
fn rewards_and_advantages() {
    let Some(mut goldens) = goldens() else { return };
    let file = goldens.file("common", "advantage");
    for name in file.tensors.keys().filter(|name| name.ends_with(".ddof0")) {
        let (batch, rest) = name.split_once(".adv.eps").unwrap();
        let epsilon = rest.trim_end_matches(".ddof0").parse().unwrap();
        let rewards: Vec<f32> = Vec::try_from(&file.get(&format!("{batch}.rewards")).to_kind(Kind::Float)).unwrap();
        let ours = normalise(&rewards, &AdvantageSettings { epsilon, ..AdvantageSettings::default() }).unwrap().values;
        let table = format!("common/advantage/{}", name.replacen(".adv.", ".", 1));
        let (ours, expected) = (Tensor::from_slice(&ours), file.get(name));
        // f32 results of values up to 4 may be one rounding off where PyTorch's f32 run happens to be exact
        let bound = goldens.tolerance(&table, "suggest_max_abs").max(2.4e-7);
        goldens.judge(&table, "largest", gaps(&ours, expected).0, bound);
    }
    let cases = json(&goldens.dir.join("goldens/common/statistical_parity.json"));
    let bound = goldens.tolerance("common/statistical_parity", "suggest_max_abs");
    for case in cases["cases"].as_array().unwrap() {
        let counts: Vec<usize> = serde_json::from_value(case["counts"].clone()).unwrap();
        let error = (statistical_parity(&counts, 0) - case["statistical_parity"].as_f64().unwrap()).abs();
        goldens.judge(
            &format!("common/statistical_parity/{}", case["name"].as_str().unwrap()),
            "largest",
            error,
            bound,
        );
    }
    goldens.finish();
}
