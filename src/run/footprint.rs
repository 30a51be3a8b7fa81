//! What a run costs: floating-point operations, and the memory of a rank. Measured by a few passes of the networks at
//! batch 1 on the CPU, then multiplied; so it is right for any architecture, and takes as long as those passes do.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::build_for;
use crate::{
    config::{Compute, Config, PretrainMode},
    models::{
        allocations::Allocations,
        flops,
        folder::ModelFiles,
        pipeline::{Build, Pipeline},
    },
};

/// Side of the latents at which the VAE's decoder is measured, and at half of it: its convolutions cost as much as the
/// area, its attention as much as the area squared.
const DECODED_SIDE: i64 = 16;

/// Costs of the networks at the model's native size.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// Operations of one forward pass of one row (one half of a guided prediction).
    pub unet_flops: f64,
    /// Of the text encoder, per prompt.
    pub text_flops: f64,
    /// Of decoding a picture.
    pub decode_flops: f64,
    /// Bytes a row's forward pass keeps for its backward pass.
    pub kept_per_row: u64,
    /// Bytes a row's passes have alive at once, at most, beside what is kept.
    pub working_per_row: u64,
    /// Bytes alive at once, at most, while a picture is decoded.
    pub decode_per_picture: u64,
}

/// Bytes of a rank's memory, by what they are for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    /// Weights of all networks as they compute.
    pub weights: u64,
    /// f32 weights where the network computes in another type, AdamW's moments, the average of the weights.
    pub optimizer: u64,
    /// A lane's gradients and the sums over lanes.
    pub gradients: u64,
    /// Activations of a lane's update.
    pub update: u64,
    /// Activations of a lane's roll-out, or of decoding its pictures if those are more.
    pub rollout: u64,
}

impl Memory {
    /// Activations of roll-out and update are not alive at the same time.
    pub fn total(&self) -> u64 {
        self.weights + self.optimizer + self.gradients + self.update.max(self.rollout)
    }
}

/// Measures the networks of `architecture`, without weights and in f32 (a CPU may take minutes for a pass in bf16),
/// built as `config` says.
pub fn measure(architecture: ModelFiles, config: &Config) -> Result<Cost> {
    let how = Build { unet_kind: Kind::Float, ..build_for(config) };
    let pipeline = &Pipeline::shapes_only(architecture, Device::Cpu, how)?;
    let counted = |work: &mut dyn FnMut() -> Result<()>| -> Result<f64> {
        let before = flops::counted();
        work()?;
        Ok((flops::counted() - before) as f64)
    };
    let mut text = Tensor::new();
    let text_flops = counted(&mut || {
        text = pipeline.embed(&[""])?;
        Ok(())
    })?;

    let [c, h, w] = pipeline.latent_shape();
    let x = Tensor::zeros([1, c, h, w], (Kind::Float, Device::Cpu));
    let t = Tensor::zeros([1], (Kind::Int64, Device::Cpu));
    let parameters = &pipeline.trainable().entries;
    parameters.iter().for_each(|p| drop(p.tensor.shallow_clone().set_requires_grad(true)));
    let (mut kept, mut peak) = (0, 0);
    let unet_flops = counted(&mut || {
        let count = Allocations::begin();
        let eps = pipeline.unet.forward(&x, &t, &text);
        (kept, peak) = (count.alive(), count.peak());
        drop(eps);
        Ok(())
    })?;
    let side = h.min(w).min(DECODED_SIDE);
    let decode = |side: i64| -> Result<(f64, u64)> {
        let _no_grad = tch::no_grad_guard();
        let mut peak = 0;
        let flops = counted(&mut || {
            let count = Allocations::begin();
            drop(pipeline.vae.decode_scaled(&Tensor::zeros([1, c, side, side], (Kind::Float, Device::Cpu))));
            peak = count.peak();
            Ok(())
        })?;
        Ok((flops, peak))
    };
    let ((small, _), (large, decoded)) = (decode(side / 2)?, decode(side)?);
    // a·area + b·area² through both
    let (area, quarter) = ((side * side) as f64, ((side / 2) * (side / 2)) as f64);
    let b = (large / area - small / quarter) / (area - quarter);
    let a = large / area - b * area;
    let whole = (h * w) as f64;
    // activations of the U-Net are as wide as its numbers
    let width = match config.model.compute {
        Compute::F32 => 1,
        Compute::Bf16 => 2,
    };
    Ok(Cost {
        unet_flops,
        text_flops,
        decode_flops: a * whole + b * whole * whole,
        kept_per_row: kept / width,
        working_per_row: (peak - kept) / width,
        decode_per_picture: (decoded as f64 * whole / area) as u64,
    })
}

/// Rows that the U-Net sees at once: a lane's samples, twice with guidance, or a lane's pretraining pairs.
fn rows(config: &Config) -> (u64, u64) {
    let guided = if config.rollout.guidance_scale == 1.0 { 1 } else { 2 };
    let samples = config.trained_tasks().map(|(_, t)| t.samples / config.run.lanes).max().unwrap_or(0) as u64;
    let pairs = if config.pretrain.mode == PretrainMode::Off { 0 } else { config.pretrain.batch_per_lane as u64 };
    let combined = config.pretrain.mode == PretrainMode::Combined;
    let update = if combined { samples * guided + pairs } else { (samples * guided).max(pairs) };
    (samples * guided, update)
}

/// Memory of one rank that runs `lanes` lanes, one after the other.
pub fn memory(config: &Config, pipeline: &Pipeline, cost: &Cost, lanes: usize) -> Memory {
    let scalars = |p: &crate::models::parameters::Parameters| p.count();
    let compute = match config.model.compute {
        Compute::F32 => 4,
        Compute::Bf16 => 2,
    };
    let trained = pipeline.trainable().count();
    let adapters = pipeline.lora.as_ref().map_or(0, |(_, p)| scalars(p));
    // adapters are f32, as are the text encoder and the VAE
    let frozen = 4 * (scalars(&pipeline.text_parameters) + scalars(&pipeline.vae_parameters) + adapters);
    // f32 parameters that are their own master copy count once
    let own_master = pipeline.lora.is_some() || config.model.compute == Compute::F32;
    let optimizer = 4 * trained * (2 + u64::from(!own_master) + u64::from(config.ema.decay > 0.0));
    // one lane's tensors, its flat copy, and the partial sums of the tree over lanes
    let partial_sums = u64::from(lanes.next_power_of_two().trailing_zeros());
    let leaf = if pipeline.lora.is_some() { 4 } else { compute };
    let (rollout_rows, update_rows) = rows(config);
    let pictures = config.tasks.iter().map(|t| t.samples / config.run.lanes).max().unwrap_or(0) as u64;
    Memory {
        weights: frozen + compute * scalars(&pipeline.unet_parameters),
        optimizer,
        gradients: trained * (leaf + 4 * (1 + partial_sums)),
        update: update_rows * (cost.kept_per_row + cost.working_per_row),
        rollout: (rollout_rows * cost.working_per_row).max(pictures * cost.decode_per_picture),
    }
}

/// Operations of an iteration over all ranks: roll-out, decoding, texts, update, L_pre. What gradient checkpointing
/// computes again is left out, as is the reward.
pub fn iteration_flops(config: &Config, cost: &Cost) -> f64 {
    let guided = if config.rollout.guidance_scale == 1.0 { 1.0 } else { 2.0 };
    let samples: usize = config.trained_tasks().map(|(_, t)| t.samples).sum();
    let prompts: usize = config.trained_tasks().map(|(_, t)| t.samples / t.images_per_prompt).sum();
    let rollout = config.rollout.steps as f64 * guided * cost.unet_flops;
    let update = config.update.timesteps as f64 * guided * 3.0 * cost.unet_flops;
    let passes = match config.pretrain.mode {
        PretrainMode::Off => 0,
        PretrainMode::Separate => config.pretrain.steps,
        PretrainMode::Combined => config.trained_tasks().count() * config.update.timesteps,
    };
    let pairs = (passes * config.pretrain.batch_per_lane * config.run.lanes) as f64;
    samples as f64 * (rollout + update + cost.decode_flops)
        + prompts as f64 * cost.text_flops
        + pairs * 3.0 * cost.unet_flops
}
