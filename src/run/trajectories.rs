//! Trajectory shards of an iteration: this rank's samples of one task.

use anyhow::Result;

use crate::{
    config::{StoredLatents, StoredPrecision},
    methods::ours::TaskBatch,
    store::{LatentPrecision, Latents, TrajectoryShard},
    telemetry::RunFiles,
    train::Trainer,
};

/// `chosen` are the steps about to be trained on.
pub fn write(
    trainer: &Trainer,
    files: &RunFiles,
    task: usize,
    iteration: u64,
    batch: &TaskBatch,
    chosen: &[usize],
) -> Result<()> {
    let config = trainer.config;
    let count = batch.prompts.len();
    let values = |t: &tch::Tensor| -> Result<Vec<f32>> {
        Ok(Vec::<f32>::try_from(&t.to_device(tch::Device::Cpu).contiguous().view([-1]))?)
    };
    // [N, along, C, H, W] over the lanes of this rank, from lists of [B, C, H, W]
    let stack = |pick: &dyn Fn(usize) -> usize, along: usize| -> Result<Vec<f32>> {
        let mut all = Vec::new();
        for lane in &batch.lanes {
            let parts: Vec<&tch::Tensor> = (0..along).map(|i| &lane.trajectory.latents[pick(i)]).collect();
            all.extend(values(&tch::Tensor::stack(&parts, 1))?);
        }
        Ok(all)
    };
    let latents = match config.trajectories.latents {
        StoredLatents::All => Latents::Path(stack(&|i| i, trainer.steps.len() + 1)?),
        StoredLatents::Selected => Latents::Transitions {
            selected_steps: chosen.iter().map(|&i| i as i64).collect(),
            x_t: stack(&|i| chosen[i], chosen.len())?,
            x_prev: stack(&|i| chosen[i] + 1, chosen.len())?,
        },
    };
    let mut log_probs = Vec::new();
    for lane in &batch.lanes {
        let nan = lane.advantage.full_like(f64::NAN);
        let columns: Vec<&tch::Tensor> = lane.trajectory.log_probs.iter().map(|l| l.as_ref().unwrap_or(&nan)).collect();
        log_probs.extend(values(&tch::Tensor::stack(&columns, 1))?);
    }
    let shape = trainer.pipeline.latent_shape();
    let shard = TrajectoryShard {
        task: config.tasks[task].name.clone(),
        iteration,
        rank: trainer.comm.rank(),
        seed: config.run.seed,
        eta: config.rollout.eta,
        guidance_scale: config.rollout.guidance_scale,
        prompts: batch.prompts.iter().map(|p| p.text.clone()).collect(),
        global_sample: (batch.first..batch.first + count).map(|i| i as u32).collect(),
        timesteps: trainer.steps.iter().map(|s| s.t).collect(),
        log_probs,
        rewards: batch.rewards.clone(),
        advantages: batch.advantages.values[batch.first..batch.first + count].to_vec(),
        latent_shape: shape.map(|d| d as usize),
        latents,
    };
    let precision = match config.trajectories.precision {
        StoredPrecision::F16 => LatentPrecision::F16,
        StoredPrecision::F32 => LatentPrecision::F32,
    };
    shard.write(&files.trajectories(), precision).map(drop)
}
