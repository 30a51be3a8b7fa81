//! diffusers' `scheduler_config.json` and the β it stands for.
//!
//! Stable Diffusion ships the file of another sampler (PNDM); its numbers are reinterpreted as DDIM, keys that DDIM
//! does not have are ignored, and missing keys have the defaults of diffusers' DDIMScheduler. One exception:
//! `clip_sample` counts as false where it is missing, since diffusers' Stable Diffusion pipeline turns it off.
//!
//! The models were trained with β computed in f32 and ᾱ rounded to f32. Such a table differs from one computed in f64
//! throughout by up to 4.7e-7, which moves σ² by 6e-7 of its value and more at the last step; this module reproduces
//! the f32 table bit for bit.

use anyhow::{anyhow, ensure, Context, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// How β grows from `beta_start` to `beta_end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BetaSchedule {
    /// β linear in t.
    Linear,
    /// √β linear in t (Stable Diffusion).
    ScaledLinear,
    /// ᾱ = cos²((t/T + 0.008)/1.008·π/2), β at most 0.999; ignores `beta_start` and `beta_end`.
    SquaredcosCapV2,
}

/// What the U-Net's output stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PredictionType {
    /// The noise ε.
    Epsilon,
    /// v = √ᾱ·ε − √(1−ᾱ)·x_0.
    VPrediction,
}

/// Which of the T training timesteps the N sampling steps visit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimestepSpacing {
    /// k·⌊T/N⌋ + steps_offset.
    Leading,
    /// round(T − k·T/N) − 1.
    Trailing,
    /// round(k·(T−1)/(N−1)).
    Linspace,
}

/// diffusers' `scheduler_config.json`, as far as DDIM needs it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SchedulerConfig {
    /// T.
    pub num_train_timesteps: usize,
    pub beta_start: f64,
    pub beta_end: f64,
    pub beta_schedule: BetaSchedule,
    /// β_0…β_{T−1} themselves, instead of a formula.
    pub trained_betas: Option<Vec<f64>>,
    pub prediction_type: PredictionType,
    /// ᾱ before the first timestep is 1, else ᾱ_0.
    pub set_alpha_to_one: bool,
    /// Added to every timestep of the `leading` spacing.
    pub steps_offset: usize,
    pub timestep_spacing: TimestepSpacing,
    /// Only false is supported.
    pub clip_sample: bool,
    /// Only false is supported.
    pub thresholding: bool,
    /// Shift β so that ᾱ_{T−1} = 0; needs `v_prediction`.
    pub rescale_betas_zero_snr: bool,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        SchedulerConfig {
            num_train_timesteps: 1000,
            beta_start: 1e-4,
            beta_end: 0.02,
            beta_schedule: BetaSchedule::Linear,
            trained_betas: None,
            prediction_type: PredictionType::Epsilon,
            set_alpha_to_one: true,
            steps_offset: 0,
            timestep_spacing: TimestepSpacing::Leading,
            clip_sample: false,
            thresholding: false,
            rescale_betas_zero_snr: false,
        }
    }
}

impl SchedulerConfig {
    /// Parses the text of a `scheduler_config.json`. An error names the key.
    pub fn from_json(text: &str) -> Result<Self> {
        let config: Self = serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(text))
            .map_err(|error| anyhow!("key {}: {}", error.path(), error.inner()))?;
        config.ensure_supported()?;
        Ok(config)
    }

    /// Reads a `scheduler_config.json`. An error names the file and the key.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        Self::from_json(&text).with_context(|| format!("in {}", path.display()))
    }

    pub(super) fn ensure_supported(&self) -> Result<()> {
        ensure!(
            !self.clip_sample,
            "clip_sample: true is for models of pixels, rldiff trains latent models; set it to false"
        );
        ensure!(
            !self.thresholding,
            "thresholding: true is for models of pixels, rldiff trains latent models; set it to false"
        );
        ensure!(self.num_train_timesteps > 0, "num_train_timesteps must be at least 1");
        if let Some(betas) = &self.trained_betas {
            ensure!(
                betas.len() == self.num_train_timesteps,
                "trained_betas has {} entries, num_train_timesteps is {}",
                betas.len(),
                self.num_train_timesteps
            );
        }
        ensure!(
            !self.rescale_betas_zero_snr || self.prediction_type == PredictionType::VPrediction,
            "rescale_betas_zero_snr makes alpha_bar 0 at the last timestep, where prediction_type epsilon determines no \
             x_0; it needs v_prediction"
        );
        Ok(())
    }

    /// β_t in f32, as diffusers makes them.
    pub(super) fn betas(&self) -> Vec<f32> {
        let count = self.num_train_timesteps;
        let betas = match (&self.trained_betas, self.beta_schedule) {
            (Some(betas), _) => betas.iter().map(|&beta| beta as f32).collect(),
            (None, BetaSchedule::Linear) => linspace(self.beta_start, self.beta_end, count),
            (None, BetaSchedule::ScaledLinear) => {
                linspace(self.beta_start.sqrt(), self.beta_end.sqrt(), count).into_iter().map(|b| b * b).collect()
            }
            (None, BetaSchedule::SquaredcosCapV2) => squared_cosine_betas(count),
        };
        if self.rescale_betas_zero_snr {
            zero_terminal_snr(&betas)
        } else {
            betas
        }
    }
}

/// `count` equidistant f32 numbers, bit for bit as torch.linspace makes them: from both ends towards the middle, each
/// with one fused multiply-add.
fn linspace(start: f64, end: f64, count: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    if count == 1 {
        return vec![start];
    }
    let step = (end - start) / (count - 1) as f32;
    let value = |i: usize| match i < count / 2 {
        true => step.mul_add(i as f32, start),
        false => (-step).mul_add((count - 1 - i) as f32, end),
    };
    (0..count).map(value).collect()
}

fn squared_cosine_betas(count: usize) -> Vec<f32> {
    let alpha_bar = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
    let at = |i: usize| alpha_bar(i as f64 / count as f64);
    (0..count).map(|i| (1.0 - at(i + 1) / at(i)).min(0.999) as f32).collect()
}

/// Π(1−β), multiplied up in f64, each product rounded to f32 (as torch.cumprod does on the CPU).
pub(super) fn cumulative_alphas(betas: &[f32]) -> Vec<f32> {
    let mut product = 1.0;
    let step = |&beta: &f32| {
        product *= f64::from(1.0 - beta);
        product as f32
    };
    betas.iter().map(step).collect()
}

/// Shifts and scales √ᾱ so that its last value is 0 and its first is kept (Lin et al., arXiv 2305.08891, alg. 1).
fn zero_terminal_snr(betas: &[f32]) -> Vec<f32> {
    let roots: Vec<f32> = cumulative_alphas(betas).into_iter().map(f32::sqrt).collect();
    let (first, last) = (roots[0], roots[roots.len() - 1]);
    let alpha_bars: Vec<f32> =
        roots.into_iter().map(|root| (root - last) * (first / (first - last))).map(|root| root * root).collect();
    let alpha = |i: usize| if i == 0 { alpha_bars[0] } else { alpha_bars[i] / alpha_bars[i - 1] };
    (0..alpha_bars.len()).map(|i| 1.0 - alpha(i)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(json: &str) -> String {
        format!("{:#}", SchedulerConfig::from_json(json).unwrap_err())
    }

    #[test]
    fn unsupported_values_are_refused_by_name() {
        assert!(refusal(r#"{"prediction_type": "sample"}"#).contains("prediction_type"));
        assert!(refusal(r#"{"beta_schedule": "sigmoid"}"#).contains("beta_schedule"));
        assert!(refusal(r#"{"timestep_spacing": "middle"}"#).contains("timestep_spacing"));
        assert!(refusal(r#"{"clip_sample": true}"#).contains("clip_sample"));
        assert!(refusal(r#"{"thresholding": true}"#).contains("thresholding"));
        assert!(refusal(r#"{"rescale_betas_zero_snr": true}"#).contains("v_prediction"));
        assert!(refusal(r#"{"trained_betas": [0.1]}"#).contains("trained_betas"));
        assert!(refusal(r#"{"num_train_timesteps": 0}"#).contains("num_train_timesteps"));
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = SchedulerConfig::from_file(Path::new("no/such/scheduler_config.json")).unwrap_err();
        assert!(error.to_string().contains("no/such/scheduler_config.json"));
    }
}
