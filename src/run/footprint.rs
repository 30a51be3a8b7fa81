//! What a run costs: floating-point operations, and the memory of a rank. Measured by a few passes of the networks at
//! batch 1 on the CPU, then multiplied; so it is right for any architecture, and takes as long as those passes do.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::build_for;
use crate::{
    comm::Wire,
    config::{Compute, Config, MethodConfig, PretrainMode, TaskConfig},
    device::numerics::Precision,
    models::{
        allocations::Allocations,
        flops,
        folder::ModelFiles,
        pipeline::{Build, Pipeline},
        recompute::Recomputed,
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
    /// Bytes a row's pass without gradients has alive at once, at most.
    pub rollout_per_row: u64,
    /// Bytes alive at once, at most, while a picture is decoded.
    pub decode_per_picture: u64,
    /// The same with what its backward pass needs, where the method has one.
    pub decode_with_gradient: u64,
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
    /// What recorded denoising steps work with, on a GPU: it is theirs for good.
    pub graphs: u64,
    /// On a GPU: what CUDA and its libraries keep, NCCL's buffers with several ranks.
    pub libraries: u64,
}

/// A context of CUDA, the loaded kernels, the work spaces of cuBLAS and cuDNN; an estimate from what is known of an H100.
const CONTEXT: u64 = 900_000_000;
/// Channels and buffers of NCCL on one GPU; an estimate, from 0.5 to 1.5 GB by the number of its rings.
const NCCL: u64 = 1_250_000_000;

/// How a rank computes.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Lanes of a rank, one after the other.
    pub lanes: usize,
    pub on_gpu: bool,
    /// With other ranks.
    pub in_company: bool,
    /// Denoising steps are recorded.
    pub graphs: bool,
}

impl Memory {
    /// Activations of roll-out and update are not alive at the same time.
    pub fn total(&self) -> u64 {
        let activations = self.update.max(self.rollout);
        self.weights + self.optimizer + self.gradients + activations + self.graphs + self.libraries
    }
}

/// Measures the networks of `architecture`, without weights and in f32 (a CPU may take minutes for a pass in bf16),
/// built as `config` says but for what is computed again in the backward pass.
pub fn measure(architecture: ModelFiles, config: &Config, recomputed: Recomputed) -> Result<Cost> {
    let how = Build { unet_kind: Kind::Float, recomputed, precision: Precision::F32, ..build_for(config) };
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
    // at the whole area: at less of it, copies of weights, which real ones need not, would be the largest
    let rollout_peak = {
        let _no_grad = tch::no_grad_guard();
        let count = Allocations::begin();
        drop(pipeline.unet.forward(&x, &t, &text));
        count.peak()
    };
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
    let (large, decoded) = decode(side)?;
    let mut kept_by_decoder = 0;
    if config.method.needs_gradient_of_reward() {
        let count = Allocations::begin();
        let x_0 = Tensor::zeros([1, c, side, side], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let picture = pipeline.vae.decode_scaled(&x_0);
        kept_by_decoder = count.alive();
        drop(picture);
    }
    // a·area + b·area² through the decoder's cost at this side and at half of it
    let area = (side * side) as f64;
    let b = match side / 2 {
        0 => 0.0,
        half => {
            let quarter = (half * half) as f64;
            (large / area - decode(half)?.0 / quarter) / (area - quarter)
        }
    };
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
        rollout_per_row: rollout_peak / width,
        decode_per_picture: (decoded as f64 * whole / area) as u64,
        decode_with_gradient: ((decoded + kept_by_decoder) as f64 * whole / area) as u64,
    })
}

/// Rows of a guided prediction.
fn guided(guidance_scale: f64) -> f64 {
    if guidance_scale == 1.0 {
        1.0
    } else {
        2.0
    }
}

/// What a method does with a sample: rows of the U-Net that are denoised without gradients and with them, pictures that are
/// decoded without gradients and with them. ReFL's steps are a mean over its choice.
fn work_per_sample(config: &Config) -> [f64; 4] {
    let (steps, g) = (config.rollout.steps as f64, guided(config.rollout.guidance_scale));
    match &config.method {
        MethodConfig::Ours(ours) => [steps * g, ours.timesteps as f64 * g, 1.0, 0.0],
        MethodConfig::Refl(refl) => {
            let (g, last) = (guided(refl.guidance_scale), refl.last_steps.iter().sum::<usize>() as f64 / 2.0);
            [(steps - last) * g, g, 0.0, 1.0]
        }
        MethodConfig::RewardWeighted(weighted) => [steps * g, weighted.updates as f64, 1.0, 0.0],
        MethodConfig::Raft(raft) => [steps * g, raft.updates as f64 / raft.accept_one_in as f64, 1.0, 0.0],
        MethodConfig::Draft(draft) => {
            let (truncation, repeated) = (draft.truncation as f64, draft.renoisings as f64);
            [(steps - truncation) * g, (truncation + repeated) * g, 0.0, 1.0 + repeated]
        }
    }
}

/// Rows that the U-Net sees at once: in the roll-out a lane's samples, twice with guidance; in an update the rows whose
/// activations are alive together, or a lane's pretraining pairs.
fn rows(config: &Config) -> (u64, u64) {
    let g = guided(config.rollout.guidance_scale) as u64;
    let samples = config.trained_tasks().map(|(_, t)| t.samples / config.run.lanes).max().unwrap_or(0) as u64;
    let (rollout, update) = match &config.method {
        MethodConfig::Ours(_) => (samples * g, samples * g),
        MethodConfig::Refl(refl) => {
            let g = guided(refl.guidance_scale) as u64;
            (samples * g, samples * g)
        }
        MethodConfig::RewardWeighted(_) => (samples * g, samples),
        MethodConfig::Raft(raft) => {
            let at_once =
                |task: &TaskConfig| raft.batch.max(task.images_per_prompt).min(task.samples / config.run.lanes);
            let drawn = config.trained_tasks().map(|(_, t)| at_once(t)).max().unwrap_or(0) as u64;
            (drawn * g, samples.div_ceil(raft.accept_one_in as u64))
        }
        MethodConfig::Draft(draft) => (samples * g, samples * g * (draft.truncation + draft.renoisings) as u64),
    };
    let pairs = config.pretrain.batch_per_lane as u64;
    match config.pretrain.mode {
        PretrainMode::Off => (rollout, update),
        PretrainMode::Separate => (rollout, update.max(pairs)),
        PretrainMode::Combined => (rollout, update + pairs),
    }
}

/// Memory of one rank.
pub fn memory(config: &Config, pipeline: &Pipeline, cost: &Cost, setting: Setting) -> Memory {
    let lanes = setting.lanes;
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
    let is_staged = setting.on_gpu && setting.in_company && config.comm.wire == Wire::Bf16;
    let staging = if is_staged { 2 * trained } else { 0 };
    let leaf = if pipeline.lora.is_some() { 4 } else { compute };
    let (rollout_rows, update_rows) = rows(config);
    let lane = config.tasks.iter().map(|t| t.samples / config.run.lanes).max().unwrap_or(0) as u64;
    let at_once = |pictures: u64| match config.model.decode_batch as u64 {
        0 => pictures,
        limit => pictures.min(limit),
    };
    let (pictures, decoded_with_gradient) = match &config.method {
        MethodConfig::Refl(refl) => (0, refl.decode_batch as u64),
        MethodConfig::Draft(draft) => (0, draft.decode_batch as u64),
        MethodConfig::Raft(raft) => (lane.min(raft.batch as u64), 0),
        MethodConfig::Ours(_) | MethodConfig::RewardWeighted(_) => (lane, 0),
    };
    // the reward-weighted method keeps the original beside the network in training; adapters leave it as it is
    let kept_original = matches!(config.method, MethodConfig::RewardWeighted(_)) && pipeline.lora.is_none();
    let unets = 1 + u64::from(kept_original);
    let denoising = rollout_rows * cost.rollout_per_row;
    Memory {
        weights: frozen + unets * compute * scalars(&pipeline.unet_parameters),
        optimizer,
        gradients: trained * (leaf + 4 * (1 + partial_sums)) + staging,
        update: update_rows * (cost.kept_per_row + cost.working_per_row)
            + decoded_with_gradient * cost.decode_with_gradient,
        rollout: (if setting.graphs { 0 } else { denoising }).max(at_once(pictures) * cost.decode_per_picture),
        // all recordings share it, the largest says how much it is
        graphs: if setting.graphs { denoising } else { 0 },
        libraries: match (setting.on_gpu, setting.in_company) {
            (false, _) => 0,
            (true, false) => CONTEXT,
            (true, true) => CONTEXT + NCCL,
        },
    }
}

/// Operations of an iteration over all ranks: roll-out, decoding, texts, update, L_pre. What gradient checkpointing
/// computes again is left out, as is the reward.
pub fn iteration_flops(config: &Config, cost: &Cost) -> f64 {
    let samples: usize = config.trained_tasks().map(|(_, t)| t.samples).sum();
    let prompts: usize = config.trained_tasks().map(|(_, t)| t.samples / t.images_per_prompt).sum();
    let [drawn, trained, decoded, decoded_with_gradient] = work_per_sample(config);
    let passes = match config.pretrain.mode {
        PretrainMode::Off => 0,
        PretrainMode::Separate => config.pretrain.steps,
        PretrainMode::Combined => config.trained_tasks().count() * config.method.updates(),
    };
    let pairs = (passes * config.pretrain.batch_per_lane * config.run.lanes) as f64;
    // a backward pass costs two forward passes; through a frozen decoder, only the half of it that leads to its input
    samples as f64
        * ((drawn + 3.0 * trained) * cost.unet_flops + (decoded + 2.0 * decoded_with_gradient) * cost.decode_flops)
        + prompts as f64 * cost.text_flops
        + pairs * 3.0 * cost.unet_flops
}
