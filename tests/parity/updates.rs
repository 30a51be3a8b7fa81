//! What training computes: policy gradient, L_pre, AdamW, advantages.

use std::{cell::RefCell, collections::BTreeMap};

use rldiff::{
    comm::Local,
    diffusion::{
        schedule::{Schedule, Step},
        transition::{self, Given, Prediction},
    },
    kernels::{adamw::AdamW, clipped_surrogate, FlatBuffer},
    models::{flat_parameters::FlatParameters, pipeline::Pipeline},
    policy::{
        advantage::{normalise, AdvantageSettings},
        gradient_sum::{GradientSum, Transport},
        optimizer::Optimizer,
        pretraining::{self, Corruption},
        surrogate::{surrogate, Diagnostics, Objective, Stored},
    },
    rewards::parity::statistical_parity,
};
use tch::{Device, Kind, Tensor};

use crate::goldens::{doubles, gaps, goldens, json, File, Goldens};

/// Bounds on the relative L2 error of how far AdamW moved one tensor; the set's README says why no other measure is
/// of use. All tensors together have a tolerance in the table.
const ADAMW_BOUND: [(&str, f64); 2] = [("lr1e-4", 2e-2), ("lr2e-6", 1e-1)];

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
