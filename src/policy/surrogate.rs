//! The clipped objective (Eq. 7) on tensors: gradients of the model's outputs, and what there is to log.
//!
//! ```text
//! L = weight/N · Σ max(−Â·w, −Â·clip(w, 1−ε, 1+ε)),   w = exp(log p_θ − log p_θold)
//! ```
//!
//! The gradients come in closed form from the kernel and enter autograd through [`Surrogate::pseudo_loss`], whose
//! backward pass hands them on to the U-Net.

use crate::diffusion::schedule::Step;
use crate::diffusion::transition::Prediction;
use crate::kernels::clipped_surrogate::{self, SampleTerms};
use crate::kernels::{from_host, to_host_f32};
use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

pub use crate::kernels::clipped_surrogate::Objective;

/// The stored transitions of a batch at one step.
#[derive(Clone, Copy, Debug)]
pub struct Stored<'a> {
    /// f32 `[B,C,H,W]`.
    pub x_t: &'a Tensor,
    /// f32 `[B,C,H,W]`.
    pub x_prev: &'a Tensor,
    /// log p_θold, f32 `[B]`, nats per element.
    pub log_prob_old: &'a Tensor,
    /// Â, f32 `[B]`; NaN excludes the sample.
    pub advantage: &'a Tensor,
}

/// Gradients of L and the diagnostics of the batch they come from.
#[derive(Debug)]
pub struct Surrogate {
    /// ∂L/∂eps_uncond, f32; None where there was no guidance.
    pub grad_uncond: Option<Tensor>,
    /// ∂L/∂eps_cond, f32.
    pub grad_cond: Tensor,
    pub diagnostics: Diagnostics,
}

impl Surrogate {
    /// A scalar whose gradient with respect to the outputs is that of L (its value means nothing).
    pub fn pseudo_loss(&self, prediction: Prediction) -> Tensor {
        let part = |eps: &Tensor, grad: &Tensor| (eps.to_kind(Kind::Float) * grad).sum(Kind::Float);
        let conditional = part(prediction.eps_cond, &self.grad_cond);
        match (prediction.eps_uncond, &self.grad_uncond) {
            (Some(eps), Some(grad)) => conditional + part(eps, grad),
            _ => conditional,
        }
    }
}

/// Sums over samples, to be merged over micro-batches and ranks (integers and sums add, the drift takes the maximum).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Diagnostics {
    /// Samples that were not excluded.
    pub samples: usize,
    /// Those with |w − 1| > ε.
    pub clipped: usize,
    /// Sum of max(−Â·w, −Â·clip(w)), without the task's weight.
    pub loss_sum: f64,
    /// Sum of ½(log_prob − log_prob_old)².
    pub kl_sum: f64,
    /// max |w − 1|; 0 before the first optimizer step of an iteration. Infinite where a ratio is not finite.
    pub ratio_drift: f64,
}

impl Diagnostics {
    fn of(terms: &[SampleTerms]) -> Self {
        let mut all = Diagnostics::default();
        for term in terms.iter().filter(|term| term.used) {
            let drift = (f64::from(term.ratio) - 1.0).abs();
            all.merge(&Diagnostics {
                samples: 1,
                clipped: usize::from(term.clipped),
                loss_sum: f64::from(term.loss),
                kl_sum: f64::from(term.approx_kl),
                ratio_drift: if drift.is_finite() { drift } else { f64::INFINITY },
            });
        }
        all
    }

    /// Adds the diagnostics of another part of the batch.
    pub fn merge(&mut self, other: &Diagnostics) {
        self.samples += other.samples;
        self.clipped += other.clipped;
        self.loss_sum += other.loss_sum;
        self.kl_sum += other.kl_sum;
        self.ratio_drift = self.ratio_drift.max(other.ratio_drift);
    }

    /// Share of the samples with |w − 1| > ε; 0 without samples.
    pub fn clip_fraction(&self) -> f64 {
        self.clipped as f64 / self.samples.max(1) as f64
    }

    /// Mean loss per sample, without the task's weight; 0 without samples.
    pub fn loss(&self) -> f64 {
        self.loss_sum / self.samples.max(1) as f64
    }

    /// Mean of ½(log_prob − log_prob_old)², nats² per element²; 0 without samples.
    pub fn approx_kl(&self) -> f64 {
        self.kl_sum / self.samples.max(1) as f64
    }
}

/// Eq. 7 for a batch at one step.
///
/// # Errors
/// Shapes that do not fit together, latents or log-probabilities that are not f32, σ = 0.
pub fn surrogate(step: &Step, stored: Stored, prediction: Prediction, objective: &Objective) -> Result<Surrogate> {
    let context = || format!("objective at timestep {} (step {})", step.t, step.index);
    match stored.x_t.device() {
        Device::Cpu => surrogate_on_host(step, stored, prediction, objective),
        _ => surrogate_on_gpu(step, stored, prediction, objective),
    }
    .with_context(context)
}

fn surrogate_on_gpu(step: &Step, stored: Stored, prediction: Prediction, objective: &Objective) -> Result<Surrogate> {
    let (terms, grad_uncond, grad_cond) = prediction.on_gpu(stored.x_t)?.surrogate(
        &prediction.scalars(step),
        stored.x_prev,
        stored.log_prob_old,
        stored.advantage,
        objective,
        prediction.eps_uncond.is_some(),
    )?;
    Ok(Surrogate { grad_uncond, grad_cond, diagnostics: Diagnostics::of(&terms) })
}

fn surrogate_on_host(step: &Step, stored: Stored, prediction: Prediction, objective: &Objective) -> Result<Surrogate> {
    let size = stored.x_t.size();
    let samples = size.first().copied().context("x_t has no batch dimension")?;
    let x_t = to_host_f32(stored.x_t, &size, "x_t")?;
    let x_prev = to_host_f32(stored.x_prev, &size, "x_prev")?;
    let log_prob_old = to_host_f32(stored.log_prob_old, &[samples], "log_prob_old")?;
    let advantage = to_host_f32(stored.advantage, &[samples], "advantage")?;
    let (eps_uncond, eps_cond, guidance_scale) = prediction.to_host(&size)?;
    let (mut grad_uncond, mut grad_cond) = (vec![0.0; x_t.len()], vec![0.0; x_t.len()]);
    let terms = clipped_surrogate::reference(
        &eps_uncond,
        &eps_cond,
        &x_t,
        &x_prev,
        &log_prob_old,
        &advantage,
        &step.scalars(guidance_scale),
        objective,
        &mut grad_uncond,
        &mut grad_cond,
    )?;
    let device = prediction.eps_cond.device();
    Ok(Surrogate {
        grad_uncond: prediction.eps_uncond.map(|_| from_host(&grad_uncond, &size, device)),
        grad_cond: from_host(&grad_cond, &size, device),
        diagnostics: Diagnostics::of(&terms),
    })
}

/// `latents` `[B,…]` with the rows of excluded samples (advantage NaN) set to 0.
///
/// Feed these to the U-Net: a gradient of 0 at its output does not help against latents that are NaN themselves,
/// because 0·NaN would reach every weight. The other rows keep their bits and the batch its shape.
pub fn blank_excluded(latents: &Tensor, advantage: &Tensor) -> Tensor {
    let mut shape = vec![1; latents.dim()];
    shape[0] = -1;
    latents.where_self(&advantage.isnan().logical_not().reshape(shape), &latents.zeros_like())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::schedule::{Schedule, SchedulerConfig};
    use crate::diffusion::transition::{self, Given};

    const SIZE: [i64; 4] = [4, 2, 3, 5];
    const OBJECTIVE: Objective = Objective { clip_range: 1e-4, weight: 1.0, samples: 4 };

    fn field(phase: f64) -> Tensor {
        let index = Tensor::arange(SIZE.iter().product::<i64>(), (Kind::Float, Device::Cpu));
        ((index * 12.9898 + phase).sin() * 1.7).reshape(SIZE)
    }

    fn step() -> Step {
        Schedule::new(&SchedulerConfig::default()).unwrap().steps(10, 1.0).unwrap()[4]
    }

    #[test]
    fn first_pass_of_an_iteration_has_ratio_one_bit_for_bit() {
        // a model of one weight, called on [uncond; cond] as the roll-out and the update call theirs
        let weight = Tensor::from(0.37f32).set_requires_grad(true);
        let model = |x_t: &Tensor| Tensor::cat(&[x_t * 0.9, x_t.sin() + x_t], 0) * &weight;
        let (x_t, at) = (field(1.0), step());
        let output = tch::no_grad(|| model(&x_t));
        let (uncond, cond) = (output.narrow(0, 0, 4), output.narrow(0, 4, 4));
        let prediction = Prediction { eps_uncond: Some(&uncond), eps_cond: &cond, guidance_scale: 7.0 };
        let drawn = transition::step(&at, &x_t, prediction, Given::Draw(&field(2.0))).unwrap();
        let advantage = Tensor::from_slice(&[1.0f32, -2.0, f32::NAN, 0.5]);
        let stored =
            Stored { x_t: &x_t, x_prev: &drawn.x_prev, log_prob_old: drawn.density().unwrap(), advantage: &advantage };

        let output = model(&x_t);
        let (uncond, cond) = (output.narrow(0, 0, 4), output.narrow(0, 4, 4));
        let prediction = Prediction { eps_uncond: Some(&uncond), eps_cond: &cond, guidance_scale: 7.0 };
        let ours = surrogate(&at, stored, prediction, &OBJECTIVE).unwrap();
        assert_eq!(ours.diagnostics.ratio_drift, 0.0);
        assert_eq!(ours.diagnostics.approx_kl(), 0.0);
        assert_eq!((ours.diagnostics.samples, ours.diagnostics.clipped), (3, 0));
        assert_eq!(ours.diagnostics.loss(), (-1.0 + 2.0 - 0.5) / 3.0);
        ours.pseudo_loss(prediction).backward();
        let grad = weight.grad();

        let fresh = weight.detach().to_kind(Kind::Double).set_requires_grad(true);
        let x = x_t.to_kind(Kind::Double);
        let eps = (&x * 0.9 + ((x.sin() + &x) - &x * 0.9) * 7.0) * &fresh;
        let z = (drawn.x_prev.to_kind(Kind::Double) - (x * at.c_x + eps * at.c_eps)) / at.sigma;
        let log_prob = z.square().mean_dim([1i64, 2, 3].as_slice(), false, Kind::Double) * -0.5;
        let ratio = (&log_prob - log_prob.detach()).exp();
        let advantage = Tensor::from_slice(&[1.0f64, -2.0, 0.0, 0.5]);
        ((ratio * -advantage).sum(Kind::Double) / 4.0).backward();
        let expected = fresh.grad().double_value(&[]);
        let gap = (grad.double_value(&[]) - expected).abs() / expected.abs();
        // f32 sums of 120 terms of mixed sign: observed 6e-7
        assert!(gap < 5e-6, "{grad} {expected}");
    }

    #[test]
    fn without_guidance_the_conditional_output_gets_the_whole_gradient() {
        let (eps, x_t, at) = (field(3.0), field(1.0), step());
        let alone = Prediction { eps_uncond: None, eps_cond: &eps, guidance_scale: 7.0 };
        let both = Prediction { eps_uncond: Some(&eps), eps_cond: &eps, guidance_scale: 7.0 };
        let drawn = transition::step(&at, &x_t, alone, Given::Draw(&field(2.0))).unwrap();
        let advantage = Tensor::from_slice(&[1.0f32, -2.0, 0.3, 0.5]);
        let log_prob_old = drawn.density().unwrap();
        let stored = Stored { x_t: &x_t, x_prev: &drawn.x_prev, log_prob_old, advantage: &advantage };
        let alone = surrogate(&at, stored, alone, &OBJECTIVE).unwrap();
        let both = surrogate(&at, stored, both, &OBJECTIVE).unwrap();
        assert!(alone.grad_uncond.is_none());
        let gap = (&alone.grad_cond - (both.grad_cond + both.grad_uncond.unwrap())).norm() / alone.grad_cond.norm();
        // g − (g − 1) in f32: observed 3e-7
        assert!(gap.double_value(&[]) < 1e-6);
    }

    #[test]
    fn an_excluded_sample_of_nan_latents_leaves_the_weights_finite() {
        let weight = Tensor::from(0.37f32).set_requires_grad(true);
        let (x_t, at) = (field(1.0), step());
        let _ = x_t.get(2).fill_(f64::NAN);
        let advantage = Tensor::from_slice(&[1.0f32, -2.0, f32::NAN, 0.5]);
        let blanked = blank_excluded(&x_t, &advantage);
        assert!(blanked.narrow(0, 0, 2).equal(&x_t.narrow(0, 0, 2)));
        assert_eq!(blanked.get(2).abs().sum(Kind::Float).double_value(&[]), 0.0);
        let eps = &blanked * &weight;
        let prediction = Prediction { eps_uncond: None, eps_cond: &eps, guidance_scale: 1.0 };
        let log_prob_old = Tensor::zeros([4], (Kind::Float, Device::Cpu));
        let stored = Stored { x_t: &x_t, x_prev: &field(2.0), log_prob_old: &log_prob_old, advantage: &advantage };
        let ours = surrogate(&at, stored, prediction, &OBJECTIVE).unwrap();
        assert_eq!(ours.diagnostics.samples, 3);
        ours.pseudo_loss(prediction).backward();
        assert!(weight.grad().double_value(&[]).is_finite());
    }

    #[test]
    fn diagnostics_merge_and_show_a_broken_ratio() {
        let term = |ratio: f32, clipped| SampleTerms { ratio, clipped, loss: -1.0, used: true, ..Default::default() };
        let mut all = Diagnostics::of(&[term(1.5, true), term(1.0, false), SampleTerms::default()]);
        assert_eq!((all.samples, all.clip_fraction(), all.loss(), all.ratio_drift), (2, 0.5, -1.0, 0.5));
        all.merge(&Diagnostics::of(&[term(f32::NAN, false)]));
        assert_eq!((all.samples, all.ratio_drift), (3, f64::INFINITY));
        assert_eq!(Diagnostics::default().loss(), 0.0);
    }

    #[test]
    fn a_wrong_shape_names_the_tensor_and_the_step() {
        let (x, wrong) = (field(1.0), Tensor::zeros([3], (Kind::Float, Device::Cpu)));
        let prediction = Prediction { eps_uncond: None, eps_cond: &x, guidance_scale: 1.0 };
        let stored = Stored { x_t: &x, x_prev: &x, log_prob_old: &wrong, advantage: &wrong };
        let error = format!("{:#}", surrogate(&step(), stored, prediction, &OBJECTIVE).unwrap_err());
        assert!(error.contains("log_prob_old has shape [3]") && error.contains("step 4"), "{error}");
    }
}
