//! The noise schedule: the table of ᾱ_t, and the DDIM steps taken through it.
//!
//! ```text
//! ᾱ_t = Π_{i≤t} (1 − β_i)
//! σ   = η·√((1−ᾱ_prev)/(1−ᾱ_t))·√(1−ᾱ_t/ᾱ_prev)
//! μ   = √ᾱ_prev·x̂_0 + √(1−ᾱ_prev−σ²)·ε  =  c_x·x_t + c_eps·eps
//! ```
//!
//! x̂_0 and ε are affine in x_t and the model's output `eps`, whichever of the two the model predicts
//! (ε, or v = √ᾱ·ε − √(1−ᾱ)·x_0), so both kinds of model differ in the coefficients only.
//!
//! The table is diffusers' f32 table (see [`scheduler_config`](crate::models::scheduler_config)), bit for bit; all that follows
//! from it is f64.

use crate::kernels::ddim_step::StepScalars;
use crate::models::scheduler_config::cumulative_alphas;
use anyhow::{bail, ensure, Context, Result};

pub use crate::models::scheduler_config::{BetaSchedule, PredictionType, SchedulerConfig, TimestepSpacing};

/// One DDIM step: where it goes and the coefficients of its transition.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Position in sampling order, 0 first.
    pub index: usize,
    /// The timestep that the model is called with.
    pub t: i64,
    /// The timestep arrived at; negative at the end.
    pub t_prev: i64,
    /// ᾱ_t.
    pub alpha_bar: f64,
    /// ᾱ_{t−1}.
    pub alpha_bar_prev: f64,
    /// σ, standard deviation of the transition; 0 where η = 0 and at a last step that ends in ᾱ = 1. Such a step can
    /// be drawn, but neither scored nor trained on.
    pub sigma: f64,
    /// ∂μ/∂x_t.
    pub c_x: f64,
    /// ∂μ/∂eps, where eps is the guided output of the model, be it ε or v.
    pub c_eps: f64,
    /// ∂x̂_0/∂x_t.
    pub x0_x: f64,
    /// ∂x̂_0/∂eps.
    pub x0_eps: f64,
}

impl Step {
    /// What the kernels need to know of this step.
    pub fn scalars(&self, guidance_scale: f64) -> StepScalars {
        StepScalars { c_x: self.c_x, c_eps: self.c_eps, sigma: self.sigma, guidance_scale }
    }

    /// |∂μ/∂eps|/σ: how strongly the log-probability reacts to the model's output. Between 1 and 2 at most steps; with
    /// few `leading` steps the one before the last stands out (12 with 6 steps) and its gradients spike. Infinite for σ = 0.
    pub fn sensitivity(&self) -> f64 {
        self.c_eps.abs() / self.sigma
    }
}

/// A table of ᾱ and the rules for stepping through it.
#[derive(Clone, Debug)]
pub struct Schedule {
    config: SchedulerConfig,
    alpha_bar: Vec<f64>,
    alpha_bar_final: f64,
}

impl Schedule {
    /// # Errors
    /// An unsupported value or a β outside [0, 1), naming the key.
    pub fn new(config: &SchedulerConfig) -> Result<Self> {
        config.ensure_supported()?;
        let betas = config.betas();
        let largest = if config.rescale_betas_zero_snr { 1.0 } else { 1.0 - f32::EPSILON };
        if let Some(t) = betas.iter().position(|beta| !(0.0..=largest).contains(beta)) {
            bail!("beta_start, beta_end or trained_betas: beta at timestep {t} is {}, not in [0, 1)", betas[t]);
        }
        let alpha_bar: Vec<f64> = cumulative_alphas(&betas).into_iter().map(f64::from).collect();
        let alpha_bar_final = if config.set_alpha_to_one { 1.0 } else { alpha_bar[0] };
        Ok(Schedule { config: config.clone(), alpha_bar, alpha_bar_final })
    }

    /// As [`Schedule::new`], from a model's `scheduler_config.json`.
    pub fn of_model(scheduler: &serde_json::Value) -> Result<Self> {
        Schedule::new(&SchedulerConfig::from_value(scheduler)?)
    }

    /// The config this schedule was made from.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// ᾱ_0…ᾱ_{T−1}; z_t = √ᾱ_t·z_0 + √(1−ᾱ_t)·ε.
    pub fn alpha_bar(&self) -> &[f64] {
        &self.alpha_bar
    }

    /// The `count` DDIM steps with noise scale `eta`, in sampling order.
    ///
    /// # Errors
    /// `count` outside 1..=T, `eta` outside [0, 1], a timestep beyond the table, or one at which x̂_0 is undefined.
    pub fn steps(&self, count: usize, eta: f64) -> Result<Vec<Step>> {
        let total = self.config.num_train_timesteps;
        ensure!((1..=total).contains(&count), "{count} sampling steps: there must be between 1 and {total}");
        ensure!((0.0..=1.0).contains(&eta), "eta = {eta}: it must lie between 0 and 1");
        let stride = (total / count) as i64;
        let make = |(index, t)| self.step(index, t, t - stride, eta);
        self.timesteps(count).into_iter().enumerate().map(make).collect()
    }

    fn timesteps(&self, count: usize) -> Vec<i64> {
        let total = self.config.num_train_timesteps;
        let ascending = |k: usize| count - 1 - k;
        let timestep = |k: usize| match self.config.timestep_spacing {
            TimestepSpacing::Leading => (ascending(k) * (total / count) + self.config.steps_offset) as i64,
            TimestepSpacing::Trailing => {
                let stride = total as f64 / count as f64;
                (total as f64 - k as f64 * stride).round_ties_even() as i64 - 1
            }
            TimestepSpacing::Linspace => {
                let stride = (total - 1) as f64 / (count - 1).max(1) as f64;
                (ascending(k) as f64 * stride).round_ties_even() as i64
            }
        };
        (0..count).map(timestep).collect()
    }

    fn step(&self, index: usize, t: i64, t_prev: i64, eta: f64) -> Result<Step> {
        let alpha_bar = usize::try_from(t).ok().and_then(|t| self.alpha_bar.get(t)).copied();
        let alpha_bar = alpha_bar.with_context(|| {
            let last = self.alpha_bar.len() - 1;
            format!("steps_offset {}: timestep {t} is beyond the last one, {last}", self.config.steps_offset)
        })?;
        let alpha_bar_prev = usize::try_from(t_prev).map_or(self.alpha_bar_final, |t| self.alpha_bar[t]);
        let sigma = eta * ((1.0 - alpha_bar_prev) / (1.0 - alpha_bar) * (1.0 - alpha_bar / alpha_bar_prev)).sqrt();
        // at η = 1 and ᾱ_t = 0 this is a difference of equal numbers
        let direction = (1.0 - alpha_bar_prev - sigma * sigma).max(0.0).sqrt();
        let (signal, noise) = (alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt());
        // x̂_0 = x0_x·x_t + x0_eps·eps and ε = noise_x·x_t + noise_eps·eps
        let (x0_x, x0_eps, noise_x, noise_eps) = match self.config.prediction_type {
            PredictionType::Epsilon => (1.0 / signal, -noise / signal, 0.0, 1.0),
            PredictionType::VPrediction => (signal, -noise, noise, signal),
        };
        let c_x = alpha_bar_prev.sqrt() * x0_x + direction * noise_x;
        let c_eps = alpha_bar_prev.sqrt() * x0_eps + direction * noise_eps;
        ensure!(
            [sigma, c_x, c_eps].iter().all(|c| c.is_finite()),
            "timestep {t} has alpha_bar {alpha_bar} and arrives at {alpha_bar_prev}: the transition is undefined"
        );
        Ok(Step { index, t, t_prev, alpha_bar, alpha_bar_prev, sigma, c_x, c_eps, x0_x, x0_eps })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stable Diffusion's own file: PNDM's, with keys that DDIM does not know.
    const STABLE_DIFFUSION: &str = r#"{"_class_name": "PNDMScheduler", "_diffusers_version": "0.10.0.dev0",
        "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": false,
        "num_train_timesteps": 1000, "prediction_type": "epsilon", "set_alpha_to_one": false,
        "skip_prk_steps": true, "steps_offset": 1, "trained_betas": null}"#;

    fn stable_diffusion() -> SchedulerConfig {
        SchedulerConfig::from_json(STABLE_DIFFUSION).unwrap()
    }

    #[test]
    fn constants_of_the_papers_sampler() {
        let steps = Schedule::new(&stable_diffusion()).unwrap().steps(50, 1.0).unwrap();
        let t: Vec<i64> = steps.iter().map(|step| step.t).collect();
        assert_eq!(t, (0..50).rev().map(|k| 20 * k + 1).collect::<Vec<i64>>());
        let last = steps[49];
        assert_eq!((last.index, last.t, last.t_prev), (49, 1, -19));
        // five printed digits of a value known from diffusers, 0.0206483
        assert!((last.sigma - 0.02065).abs() < 5e-6, "{}", last.sigma);
        assert!((last.alpha_bar_prev - 0.99915).abs() < 1e-6, "{}", last.alpha_bar_prev);
    }

    #[test]
    fn the_coefficients_are_the_papers_transition() {
        for prediction_type in [PredictionType::Epsilon, PredictionType::VPrediction] {
            let schedule = Schedule::new(&SchedulerConfig { prediction_type, ..stable_diffusion() }).unwrap();
            for step in schedule.steps(7, 0.6).unwrap() {
                let (a, b) = (step.alpha_bar, step.alpha_bar_prev);
                let (x_t, output) = (0.7, -1.3);
                let (x0, eps) = match prediction_type {
                    PredictionType::Epsilon => ((x_t - (1.0 - a).sqrt() * output) / a.sqrt(), output),
                    PredictionType::VPrediction => {
                        let x0 = a.sqrt() * x_t - (1.0 - a).sqrt() * output;
                        (x0, (x_t - a.sqrt() * x0) / (1.0 - a).sqrt())
                    }
                };
                let mean = b.sqrt() * x0 + (1.0 - b - step.sigma.powi(2)).sqrt() * eps;
                // f64 rounding: observed 4e-16; at t = 1 x̂_0 → ε divides by √(1 − ᾱ) = 0.04
                assert!((step.c_x * x_t + step.c_eps * output - mean).abs() < 1e-12, "{step:?}");
                assert!((step.x0_x * x_t + step.x0_eps * output - x0).abs() < 1e-12, "{step:?}");
            }
        }
    }

    #[test]
    fn sensitivity_singles_out_the_step_before_the_last() {
        let steps = Schedule::new(&stable_diffusion()).unwrap().steps(6, 1.0).unwrap();
        let sensitivity: Vec<f64> = steps.iter().map(Step::sensitivity).collect();
        let spike = sensitivity.iter().copied().fold(0.0, f64::max);
        assert_eq!(sensitivity[4], spike);
        assert!((11.0..13.0).contains(&spike), "{sensitivity:?}");
        assert!(sensitivity[0] < 2.0);
        let plain = Schedule::new(&stable_diffusion()).unwrap().steps(6, 0.0).unwrap();
        assert!(plain.iter().all(|step| step.sigma == 0.0 && step.sensitivity().is_infinite()));
    }

    #[test]
    fn impossible_steps_are_refused() {
        let schedule = Schedule::new(&stable_diffusion()).unwrap();
        assert!(schedule.steps(0, 1.0).is_err());
        assert!(schedule.steps(1001, 1.0).is_err());
        assert!(schedule.steps(10, 1.1).is_err());
        assert!(schedule.steps(1000, 1.0).unwrap_err().to_string().contains("steps_offset"));
    }

    #[test]
    fn a_schedule_that_ends_in_alpha_one_has_no_noise_there() {
        let config = SchedulerConfig { set_alpha_to_one: true, ..stable_diffusion() };
        let steps = Schedule::new(&config).unwrap().steps(50, 1.0).unwrap();
        assert_eq!(steps[49].sigma, 0.0);
        assert!(steps[48].sigma > 0.0);
    }

    #[test]
    fn a_beta_out_of_range_is_named() {
        let config = SchedulerConfig::from_json(r#"{"num_train_timesteps": 2, "trained_betas": [0.1, 1.0]}"#).unwrap();
        assert!(Schedule::new(&config).unwrap_err().to_string().contains("beta at timestep 1 is 1"));
    }
}
