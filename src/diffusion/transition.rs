//! p_θ(x_{t−1} | x_t) on tensors: the only place where a transition is drawn or scored.
//!
//! [`step`] wraps the kernel that does guidance, mean, drawing and log-probability; the objective
//! ([`policy::surrogate`](crate::policy::surrogate)) uses the same kernel function. [`guide`] and [`predict_x0`] are
//! the two parts of it that methods which differentiate through the sampler need as ordinary, differentiable tensor
//! expressions.
//!
//! Latents, noise and log-probabilities are f32; the model's outputs may be of any floating type and are taken to f32
//! first. On a GPU the kernels of `cuda/` do the same.

use crate::diffusion::schedule::Step;
use crate::kernels::ddim_step::{self, StepScalars};
use crate::kernels::on_device::Batch;
use crate::kernels::{from_host, to_host, to_host_f32};
use crate::random::{self, Coordinates};
use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

pub use crate::kernels::ddim_step::Given;

/// What the model predicted for a batch: outputs `[B,C,H,W]` without and with the prompt, and how they combine.
#[derive(Clone, Copy, Debug)]
pub struct Prediction<'a> {
    /// None: no guidance, the guided output is `eps_cond` (and `guidance_scale` is not used).
    pub eps_uncond: Option<&'a Tensor>,
    pub eps_cond: &'a Tensor,
    /// g.
    pub guidance_scale: f64,
}

impl Prediction<'_> {
    /// The batch as the GPU's kernels take it.
    pub(crate) fn on_gpu(self, x_t: &Tensor) -> Result<Batch> {
        Batch::new(self.eps_uncond, self.eps_cond, x_t)
    }

    /// The numbers of a transition with this guidance; a guidance scale of 1 without an unconditional output.
    pub(crate) fn scalars(self, step: &Step) -> StepScalars {
        step.scalars(if self.eps_uncond.is_some() { self.guidance_scale } else { 1.0 })
    }

    /// Both outputs on the host, and the guidance scale that they combine with.
    pub(crate) fn to_host(self, size: &[i64]) -> Result<(Vec<f32>, Vec<f32>, f64)> {
        let eps_cond = to_host(self.eps_cond, size, "eps_cond")?;
        match self.eps_uncond {
            Some(eps_uncond) => Ok((to_host(eps_uncond, size, "eps_uncond")?, eps_cond, self.guidance_scale)),
            None => Ok((eps_cond.clone(), eps_cond, 1.0)),
        }
    }
}

/// A transition that was drawn or scored.
#[derive(Debug)]
pub struct Transition {
    /// x_{t−1}, f32 `[B,C,H,W]`.
    pub x_prev: Tensor,
    /// log p(x_{t−1} | x_t), f32 `[B]`, mean over the C·H·W elements, nats per element; None where σ = 0.
    pub log_prob: Option<Tensor>,
}

impl Transition {
    /// The log-probability, or an error where the transition is deterministic.
    pub fn density(&self) -> Result<&Tensor> {
        self.log_prob
            .as_ref()
            .context("a step with sigma = 0 is deterministic and has no log-probability (use eta > 0)")
    }
}

/// Where the noise of a transition comes from.
#[derive(Debug)]
pub enum Noise {
    /// z, f32 `[B,C,H,W]`.
    Tensor(Tensor),
    /// The streams of samples that follow each other, by the coordinates of the first.
    Rows(Coordinates),
}

impl From<Tensor> for Noise {
    fn from(z: Tensor) -> Self {
        Noise::Tensor(z)
    }
}

impl From<Coordinates> for Noise {
    fn from(first: Coordinates) -> Self {
        Noise::Rows(first)
    }
}

/// Draws x_{t−1}. On a GPU noise from streams is made where it is used, in the kernel.
///
/// # Errors
/// As [`step`].
pub fn draw(at: &Step, x_t: &Tensor, prediction: Prediction, noise: &Noise) -> Result<Transition> {
    match noise {
        Noise::Tensor(z) => step(at, x_t, prediction, Given::Draw(z)),
        Noise::Rows(first) if x_t.device() == Device::Cpu => {
            let size = x_t.size();
            let (&samples, shape) = size.split_first().context("x_t has no batch dimension")?;
            let z = random::normal_rows(*first, first.sample, samples as usize, shape);
            step(at, x_t, prediction, Given::Draw(&z))
        }
        Noise::Rows(first) => {
            let drawn = prediction.on_gpu(x_t).and_then(|batch| batch.draw(&prediction.scalars(at), *first));
            let (x_prev, log_prob) = drawn.with_context(|| place(at))?;
            Ok(Transition { x_prev, log_prob: (at.sigma > 0.0).then_some(log_prob) })
        }
    }
}

fn place(at: &Step) -> String {
    format!("at timestep {} (step {})", at.t, at.index)
}

/// Draws x_{t−1} with the given noise, or scores a given x_{t−1}; `x_t` and what is given are f32 `[B,C,H,W]`.
///
/// Both ways lead through the same arithmetic: scoring what was drawn, with the same prediction, gives the same
/// log-probability bit for bit. With σ = 0 drawing is the plain DDIM sampler, whatever the noise.
///
/// # Errors
/// Shapes that differ from x_t's, latents or noise that are not f32, scoring with σ = 0.
pub fn step(step: &Step, x_t: &Tensor, prediction: Prediction, given: Given<&Tensor>) -> Result<Transition> {
    if x_t.device() == Device::Cpu {
        return step_on_host(step, x_t, prediction, given).with_context(|| place(step));
    }
    let on_gpu = || -> Result<Transition> {
        // log-probabilities always in the kernel's order of summation, so that a ratio starts at 1
        let (x_prev, scored) = match given {
            Given::Draw(_) => (step_on_host(step, x_t, prediction, given)?.x_prev, step.sigma > 0.0),
            Given::Score(x_prev) => (x_prev.copy(), true),
        };
        let score = || prediction.on_gpu(x_t)?.score(&prediction.scalars(step), &x_prev);
        let log_prob = if scored { Some(score()?) } else { None };
        Ok(Transition { x_prev, log_prob })
    };
    on_gpu().with_context(|| place(step))
}

fn step_on_host(step: &Step, x_t: &Tensor, prediction: Prediction, given: Given<&Tensor>) -> Result<Transition> {
    let (size, device) = (x_t.size(), x_t.device());
    let samples = size.first().copied().context("x_t has no batch dimension")?;
    let host_x_t = to_host_f32(x_t, &size, "x_t")?;
    let (eps_uncond, eps_cond, guidance_scale) = prediction.to_host(&size)?;
    let source = match given {
        Given::Draw(noise) => to_host_f32(noise, &size, "noise")?,
        Given::Score(x_prev) => to_host_f32(x_prev, &size, "x_prev")?,
    };
    let host_given = match given {
        Given::Draw(_) => Given::Draw(source.as_slice()),
        Given::Score(_) => Given::Score(source.as_slice()),
    };
    let mut x_prev = vec![0.0; host_x_t.len()];
    let mut log_prob = vec![0.0; samples as usize];
    let scalars = step.scalars(guidance_scale);
    ddim_step::reference(&eps_uncond, &eps_cond, &host_x_t, host_given, &scalars, &mut x_prev, &mut log_prob)?;
    let log_prob = (step.sigma > 0.0).then(|| from_host(&log_prob, &[samples], device));
    Ok(Transition { x_prev: from_host(&x_prev, &size, device), log_prob })
}

/// eps = eps_uncond + g·(eps_cond − eps_uncond) in f32, differentiable; on the CPU the bits of the kernel.
pub fn guide(eps_uncond: &Tensor, eps_cond: &Tensor, guidance_scale: f64) -> Tensor {
    let (eps_uncond, eps_cond) = (eps_uncond.to_kind(Kind::Float), eps_cond.to_kind(Kind::Float));
    &eps_uncond + (eps_cond - &eps_uncond) * guidance_scale
}

/// x̂_0 from x_t and the guided output of the model, f32, differentiable.
pub fn predict_x0(step: &Step, x_t: &Tensor, eps: &Tensor) -> Tensor {
    x_t * step.x0_x + eps.to_kind(Kind::Float) * step.x0_eps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::schedule::{BetaSchedule, Schedule, SchedulerConfig};

    const SIZE: [i64; 4] = [3, 4, 5, 7];

    fn steps(eta: f64) -> Vec<Step> {
        let config = SchedulerConfig {
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: BetaSchedule::ScaledLinear,
            set_alpha_to_one: false,
            steps_offset: 1,
            ..SchedulerConfig::default()
        };
        Schedule::new(&config).unwrap().steps(10, eta).unwrap()
    }

    /// A reproducible field of values of order 1; `phase` tells them apart.
    fn field(phase: f64) -> Tensor {
        let index = Tensor::arange(SIZE.iter().product::<i64>(), (Kind::Float, Device::Cpu));
        ((index * 12.9898 + phase).sin() * 1.7).reshape(SIZE)
    }

    fn same_bits(a: &Tensor, b: &Tensor) -> bool {
        a.equal(b)
    }

    #[test]
    fn scoring_what_was_drawn_gives_the_same_bits() {
        let (uncond, cond) = (field(1.0), field(2.0));
        let prediction = Prediction { eps_uncond: Some(&uncond), eps_cond: &cond, guidance_scale: 7.0 };
        for at in steps(1.0) {
            let drawn = step(&at, &field(3.0), prediction, Given::Draw(&field(4.0))).unwrap();
            let scored = step(&at, &field(3.0), prediction, Given::Score(&drawn.x_prev)).unwrap();
            assert!(same_bits(&drawn.x_prev, &scored.x_prev));
            assert!(same_bits(drawn.density().unwrap(), scored.density().unwrap()));
            assert_eq!(drawn.density().unwrap().size(), [3]);
        }
    }

    #[test]
    fn without_eta_the_chain_is_the_plain_ddim_sampler_bit_for_bit() {
        let (mut ours, mut plain) = (field(3.0), field(3.0));
        for at in steps(0.0) {
            let phase = at.index as f64;
            let (uncond, cond) = (field(10.0 + phase), field(20.0 + phase));
            let prediction = Prediction { eps_uncond: Some(&uncond), eps_cond: &cond, guidance_scale: 7.0 };
            let drawn = step(&at, &ours, prediction, Given::Draw(&field(4.0))).unwrap();
            assert!(drawn.density().unwrap_err().to_string().contains("sigma = 0"));
            let error = step(&at, &ours, prediction, Given::Score(&drawn.x_prev)).unwrap_err();
            assert!(format!("{error:#}").contains(&format!("timestep {}", at.t)), "{error:#}");
            ours = drawn.x_prev;
            plain = plain * at.c_x + guide(&uncond, &cond, 7.0) * at.c_eps;
            assert!(same_bits(&ours, &plain), "step {}", at.index);
        }
    }

    #[test]
    fn no_guidance_means_the_conditional_output_alone() {
        let (cond, at) = (field(2.0), steps(1.0)[3]);
        let alone = Prediction { eps_uncond: None, eps_cond: &cond, guidance_scale: 7.0 };
        let doubled = Prediction { eps_uncond: Some(&cond), eps_cond: &cond, guidance_scale: 7.0 };
        let a = step(&at, &field(3.0), alone, Given::Draw(&field(4.0))).unwrap();
        let b = step(&at, &field(3.0), doubled, Given::Draw(&field(4.0))).unwrap();
        assert!(same_bits(&a.x_prev, &b.x_prev));
    }

    #[test]
    fn mean_and_predicted_x0_satisfy_the_papers_formula() {
        let (eps, x_t, at) = (field(2.0), field(3.0), steps(1.0)[4]);
        let prediction = Prediction { eps_uncond: None, eps_cond: &eps, guidance_scale: 1.0 };
        let mean = step(&at, &x_t, prediction, Given::Draw(&x_t.zeros_like())).unwrap().x_prev;
        let direction = (1.0 - at.alpha_bar_prev - at.sigma * at.sigma).sqrt();
        let expected = predict_x0(&at, &x_t, &eps) * at.alpha_bar_prev.sqrt() + &eps * direction;
        // f32 rounding of values up to 10 in another order: observed 5e-7
        assert!((mean - expected).abs().max().double_value(&[]) < 5e-6);
    }

    #[test]
    fn outputs_of_any_type_and_views_of_a_batch_are_taken_and_wrong_shapes_are_named() {
        let (both, at) = (Tensor::cat(&[field(1.0), field(2.0)], 0).to_kind(Kind::BFloat16), steps(1.0)[3]);
        let (uncond, cond) = (both.narrow(0, 0, 3), both.narrow(0, 3, 3));
        let prediction = Prediction { eps_uncond: Some(&uncond), eps_cond: &cond, guidance_scale: 7.0 };
        let (x_t, noise) = (field(3.0), field(4.0));
        let low = step(&at, &x_t, prediction, Given::Draw(&noise)).unwrap();
        assert_eq!(low.x_prev.kind(), Kind::Float);
        let (uncond, cond) = (uncond.to_kind(Kind::Float), cond.to_kind(Kind::Float));
        let prediction = Prediction { eps_uncond: Some(&uncond), eps_cond: &cond, ..prediction };
        assert!(same_bits(&low.x_prev, &step(&at, &x_t, prediction, Given::Draw(&noise)).unwrap().x_prev));
        let error = step(&at, &x_t, prediction, Given::Draw(&noise.narrow(0, 0, 2))).unwrap_err();
        assert!(format!("{error:#}").contains("noise has shape [2, 4, 5, 7]"), "{error:#}");
        let error = step(&at, &x_t.to_kind(Kind::Half), prediction, Given::Draw(&noise)).unwrap_err();
        assert!(format!("{error:#}").contains("x_t must be f32"), "{error:#}");
    }
}
