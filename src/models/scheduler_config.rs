//! diffusers' `scheduler_config.json` and the β it stands for.
//!
//! Stable Diffusion ships the file of another sampler (PNDM); its numbers are reinterpreted as DDIM, keys that DDIM
//! does not have are ignored, and missing keys have the defaults of diffusers' DDIMScheduler. Diffusers' Stable Diffusion
//! pipeline sets two keys itself, whatever the file says: `clip_sample` to false and `steps_offset` to 1.
//! [`as_the_pipeline_has_it`] does the same to a model's file.
//!
//! The models were trained with β computed in f32 and ᾱ rounded to f32. Such a table differs from one computed in f64
//! throughout by up to 4.7e-7, which moves σ² by 6e-7 of its value and more at the last step; this module reproduces
//! the f32 table bit for bit.

use std::path::Path;

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};

use crate::python_json;

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

/// Keys of other samplers that say that the model is of another kind (flow matching, EDM, a learned variance), with
/// the texts that do not.
const MUST_BE: &[(&str, &[&str])] = &[
    ("use_flow_sigmas", &[]),
    ("timestep_type", &["discrete"]),
    ("variance_type", &["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"]),
];

/// A model's scheduler config as diffusers' Stable Diffusion pipeline changes it when it is made, and what it changed, in
/// words (source: `StableDiffusionPipeline.__init__`, diffusers 0.39 and 0.42).
pub fn as_the_pipeline_has_it(scheduler: &Value) -> (Value, Vec<String>) {
    let (mut scheduler, mut changes) = (scheduler.clone(), Vec::new());
    let Some(object) = scheduler.as_object_mut() else { return (scheduler, changes) };
    if object.get("clip_sample") == Some(&json!(true)) {
        object.insert("clip_sample".into(), json!(false));
        changes.push("clip_sample = true is for models of pixels and taken for false".to_string());
    }
    let leading = object.get("timestep_spacing").is_none_or(|spacing| spacing.is_null() || spacing == "leading");
    let offset = object.get("steps_offset").filter(|offset| !offset.is_null()).cloned();
    if offset.as_ref().is_none_or(|offset| offset.is_u64() && offset != &json!(1)) {
        object.insert("steps_offset".into(), json!(1));
        if leading {
            let found = offset.map_or("absent".to_string(), |offset| offset.to_string());
            changes.push(format!("steps_offset ({found}) is taken for 1"));
        }
    }
    (scheduler, changes)
}

impl SchedulerConfig {
    /// Parses the text of a `scheduler_config.json`. An error names the key.
    pub fn from_json(text: &str) -> Result<Self> {
        Self::from_value(&python_json::parse(text.as_bytes())?)
    }

    /// As [`SchedulerConfig::from_json`]; null is as absent.
    pub fn from_value(json: &Value) -> Result<Self> {
        for (key, harmless) in MUST_BE {
            let value = json.get(*key).unwrap_or(&Value::Null);
            let fits = value.is_null() || harmless.iter().any(|text| value.as_str() == Some(*text));
            ensure!(fits || value == &json!(false), "{key} = {} is not supported", python_json::shown(value));
        }
        let config: Self =
            python_json::from_value(&python_json::without_nulls(json)?).context("a key of the scheduler")?;
        config.ensure_supported()?;
        Ok(config)
    }

    /// Reads a `scheduler_config.json`. An error names the file and the key.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        Self::from_json(&text).with_context(|| format!("in {}", path.display()))
    }

    pub(crate) fn ensure_supported(&self) -> Result<()> {
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
    pub(crate) fn betas(&self) -> Vec<f32> {
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
pub(crate) fn cumulative_alphas(betas: &[f32]) -> Vec<f32> {
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
    fn what_python_and_other_samplers_write_is_read() {
        // diffusers' DPMSolverMultistepScheduler
        let text = r#"{"beta_end": 0.012, "lambda_min_clipped": -Infinity, "trained_betas": null, "variance_type": null,
            "use_flow_sigmas": false, "timestep_spacing": null, "beta_schedule": "scaled_linear"}"#;
        let config = SchedulerConfig::from_json(text).unwrap();
        assert_eq!((config.beta_end, config.timestep_spacing), (0.012, TimestepSpacing::Leading));
        let e = refusal(r#"{"beta_end": Infinity}"#);
        assert!(e.contains("beta_end is Infinity, a finite number is needed"), "{e}");
        assert!(refusal(r#"{"use_flow_sigmas": true}"#).contains("use_flow_sigmas = true"));
        assert!(refusal(r#"{"variance_type": "learned_range"}"#).contains("variance_type"));
        assert!(refusal(r#"{"timestep_type": "continuous"}"#).contains("timestep_type"));
    }

    #[test]
    fn the_pipeline_sets_two_keys() {
        let (same, changes) = as_the_pipeline_has_it(&json!({"steps_offset": 1, "clip_sample": false}));
        assert_eq!((same, changes.len()), (json!({"steps_offset": 1, "clip_sample": false}), 0));
        let (changed, changes) = as_the_pipeline_has_it(&json!({"steps_offset": 0, "clip_sample": true}));
        assert_eq!((changed, changes.len()), (json!({"steps_offset": 1, "clip_sample": false}), 2));
        // the offset is of the leading spacing alone: nothing to say
        let (changed, changes) = as_the_pipeline_has_it(&json!({"timestep_spacing": "trailing"}));
        assert_eq!((&changed["steps_offset"], changes.len()), (&json!(1), 0));
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = SchedulerConfig::from_file(Path::new("no/such/scheduler_config.json")).unwrap_err();
        assert!(error.to_string().contains("no/such/scheduler_config.json"));
    }
}
