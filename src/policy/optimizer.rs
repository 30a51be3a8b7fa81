//! AdamW on a flat parameter buffer, with its state.

use anyhow::{ensure, Result};

use crate::{
    kernels::adamw::{self, AdamW},
    models::parameters::FlatParameters,
};

/// AdamW and its moments. All ranks hold the same state.
pub struct Optimizer {
    pub settings: AdamW,
    /// Global gradient norm above which gradients are scaled down; None never does.
    pub max_norm: Option<f64>,
    /// Steps over which the learning rate rises linearly from 0; 0 for none.
    pub warmup_steps: u64,
    pub exp_avg: Vec<f32>,
    pub exp_avg_sq: Vec<f32>,
    /// Steps taken so far.
    pub steps: u64,
}

impl Optimizer {
    pub fn new(length: usize, settings: AdamW, max_norm: Option<f64>, warmup_steps: u64) -> Self {
        Optimizer {
            settings,
            max_norm,
            warmup_steps,
            exp_avg: vec![0.0; length],
            exp_avg_sq: vec![0.0; length],
            steps: 0,
        }
    }

    /// One step with `gradient` (of `params.len()` scalars); returns the gradient's norm before clipping.
    ///
    /// # Errors
    /// The gradient is not finite: nothing is changed then, on any rank, since all hold the same gradient.
    pub fn step(&mut self, params: &mut FlatParameters, gradient: &[f32]) -> Result<f64> {
        let norm = adamw::global_norm(gradient);
        ensure!(norm.is_finite(), "the gradient of optimizer step {} is not finite (norm {norm})", self.steps + 1);
        let scale = adamw::clip_factor(norm, self.max_norm);
        let mut settings = self.settings;
        if self.warmup_steps > 0 {
            settings.learning_rate *= ((self.steps + 1) as f64 / self.warmup_steps as f64).min(1.0);
        }
        self.steps += 1;
        adamw::reference(
            params.values_mut(),
            gradient,
            &mut self.exp_avg,
            &mut self.exp_avg_sq,
            &settings,
            self.steps,
            scale,
        )?;
        params.publish();
        Ok(norm)
    }
}

/// Exponential moving average of the weights: average += (1 − decay)·(weights − average).
pub fn update_average(average: &mut [f32], weights: &[f32], decay: f64) {
    let rest = (1.0 - decay) as f32;
    for (a, &w) in average.iter_mut().zip(weights) {
        *a += rest * (w - *a);
    }
}
