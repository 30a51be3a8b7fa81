//! AdamW on a flat parameter buffer, with its state.

use anyhow::{ensure, Result};
use tch::Device;

use crate::{
    kernels::{
        adamw::{self, AdamW},
        on_device::{Stepped, Stepper},
        FlatBuffer,
    },
    models::flat_parameters::FlatParameters,
};

/// AdamW and its moments. All ranks hold the same state.
pub struct Optimizer {
    pub settings: AdamW,
    /// Global gradient norm above which gradients are scaled down; None never does.
    pub max_norm: Option<f64>,
    /// Steps over which the learning rate rises linearly from 0; 0 for none.
    pub warmup_steps: u64,
    pub exp_avg: FlatBuffer,
    pub exp_avg_sq: FlatBuffer,
    /// Steps taken so far.
    pub steps: u64,
    stepper: Stepper,
}

impl Optimizer {
    /// For parameters like `params`: as many, on the same device.
    pub fn new(params: &FlatBuffer, settings: AdamW, max_norm: Option<f64>, warmup_steps: u64) -> Self {
        Optimizer {
            settings,
            max_norm,
            warmup_steps,
            exp_avg: FlatBuffer::zeros(params.len(), params.device()),
            exp_avg_sq: FlatBuffer::zeros(params.len(), params.device()),
            steps: 0,
            stepper: Stepper::default(),
        }
    }

    /// One step with `gradient` (of as many scalars, on the same device); returns the gradient's norm before clipping.
    ///
    /// # Errors
    /// The gradient is not finite: nothing is changed then, on any rank, since all hold the same gradient.
    pub fn step(&mut self, params: &mut FlatParameters, gradient: &FlatBuffer) -> Result<f64> {
        let (buffer, copies) = params.buffer_and_copies();
        let stepped = Stepped {
            params: buffer,
            copies: &copies,
            grads: gradient,
            exp_avg: &mut self.exp_avg,
            exp_avg_sq: &mut self.exp_avg_sq,
        };
        let norm = self.stepper.gradient_norm(&stepped)?;
        ensure!(
            norm.is_finite(),
            "the gradient of optimizer step {} is not finite (norm {norm}): NaN or infinity in the U-Net's output or in \
             its backward pass",
            self.steps + 1
        );
        let scale = adamw::clip_factor(norm, self.max_norm);
        let mut settings = self.settings;
        if self.warmup_steps > 0 {
            settings.learning_rate *= ((self.steps + 1) as f64 / self.warmup_steps as f64).min(1.0);
        }
        self.steps += 1;
        self.stepper.step(stepped, &settings, self.steps, scale)?;
        Ok(norm)
    }
}

/// Exponential moving average of the weights: average += (1 − decay)·(weights − average).
pub fn update_average(average: &mut FlatBuffer, weights: &FlatBuffer, decay: f64) {
    let rest = 1.0 - decay;
    if average.device() != Device::Cpu {
        // in place: beside weights and average there is no room for a third vector
        let _ = average.tensor().shallow_clone().lerp_(weights.tensor(), rest);
        return;
    }
    for (a, &w) in average.slice_mut().iter_mut().zip(weights.slice()) {
        *a += rest as f32 * (w - *a);
    }
}
