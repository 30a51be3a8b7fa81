//! Evaluation: rewards of a model on held-out prompts with fixed noise, so that two models differ in their weights only.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::{
    comm::Communicator,
    config::Config,
    diffusion::schedule::Step,
    memory,
    models::pipeline::Pipeline,
    prompts::{self, Prompt},
    task::{NoiseOf, Roller, Task},
    telemetry::Picture,
};

/// Samples per U-Net call where a prompt has fewer pictures; part of what the bits of a result depend on.
const CHUNK: usize = 16;

/// A task's evaluation.
#[derive(Clone, Debug)]
pub struct TaskEvaluation {
    pub task: String,
    /// Reward of every sample, in the order of the global sample index.
    pub rewards: Vec<f32>,
    /// What the statistics are over: a value per sample, or per group where a reward judges groups.
    pub units: Vec<f64>,
    /// The first samples, for people.
    pub shown: Vec<Shown>,
}

#[derive(Clone, Debug)]
pub struct Shown {
    pub prompt: String,
    pub picture: Picture,
    pub reward: f32,
}

/// Should the evaluation be given up? The same answer on all ranks.
pub type Stop<'a> = dyn Fn() -> Result<bool> + 'a;

/// One chunk's results on their way between ranks.
#[derive(Serialize, Deserialize)]
struct ChunkResult {
    first: usize,
    /// Bits of the rewards: JSON has no NaN.
    rewards: Vec<u32>,
    /// Width, height and RGB bytes of the pictures to show.
    pictures: Vec<(usize, usize, Vec<u8>)>,
}

/// Evaluates every task of the config (also those with `train = false`) with the pipeline's current weights. A
/// collective call; chunks go round robin over the ranks, and the result is the same on all of them. Before each round
/// all ranks ask `stop` together; where it says so there is no result.
pub fn evaluate(
    config: &Config,
    pipeline: &Pipeline,
    steps: &[Step],
    tasks: &mut [Task],
    comm: &dyn Communicator,
    stop: &Stop,
) -> Result<Option<Vec<TaskEvaluation>>> {
    let empty_prompt = pipeline.embed(&[""])?;
    let roller = Roller {
        pipeline,
        unet: &pipeline.unet,
        steps,
        empty_prompt: &empty_prompt,
        guidance_scale: config.rollout.guidance_scale,
        latent_shape: pipeline.latent_shape(),
        recorded: None,
    };
    tasks.iter_mut().map(|task| evaluate_task(config, &roller, task, comm, stop)).collect()
}

fn evaluate_task(
    config: &Config,
    roller: &Roller,
    task: &mut Task,
    comm: &dyn Communicator,
    stop: &Stop,
) -> Result<Option<TaskEvaluation>> {
    let settings = &config.evaluation;
    let (total, per_prompt) = (task.config.evaluation_samples, task.config.evaluation_images_per_prompt);
    let groups =
        prompts::registry::evaluation_prompts(task.prompts.as_ref(), settings.seed, task.index, total / per_prompt);
    let prompt_of: Vec<Prompt> = (0..total).map(|sample| groups[sample / per_prompt].clone()).collect();
    let noise = NoiseOf { seed: settings.seed, iteration: u32::MAX, task: task.index };

    let chunk = CHUNK.next_multiple_of(per_prompt);
    let mut mine = Vec::new();
    for round in 0..total.div_ceil(chunk * comm.size()) {
        if stop()? {
            return Ok(None);
        }
        let first = (round * comm.size() + comm.rank()) * chunk;
        if first >= total {
            continue;
        }
        let count = chunk.min(total - first);
        let prompts = &prompt_of[first..first + count];
        let name = &task.config.name;
        let advice = format!("lower task.{name}.evaluation_images_per_prompt if it is above {CHUNK}");
        let _stage = memory::stage(format!("evaluation of task {name}"), count, advice);
        let trajectory = roller.roll_out(&roller.conditioning(prompts)?, noise, first, count)?;
        let scored = task.evaluate(roller.pipeline, trajectory.x_0(), prompts, first)?;
        let shown = settings.pictures.saturating_sub(first).min(count);
        mine.push(ChunkResult {
            first,
            rewards: scored.scores.rewards.iter().map(|r| r.to_bits()).collect(),
            pictures: (0..shown as i64)
                .map(|i| {
                    let picture = to_picture(&scored.images.get(i))?;
                    Ok((picture.width(), picture.height(), picture.rgb().to_vec()))
                })
                .collect::<Result<_>>()?,
        });
    }

    let mut chunks: Vec<ChunkResult> = Vec::new();
    for bytes in comm.all_gather_bytes(&serde_json::to_vec(&mine)?)? {
        chunks.extend(serde_json::from_slice::<Vec<ChunkResult>>(&bytes).context("evaluation of another rank")?);
    }
    chunks.sort_by_key(|c| c.first);
    let rewards: Vec<f32> = chunks.iter().flat_map(|c| c.rewards.iter().map(|&bits| f32::from_bits(bits))).collect();
    let mut shown = Vec::new();
    for chunk in chunks {
        for (i, (width, height, rgb)) in chunk.pictures.into_iter().enumerate() {
            let sample = chunk.first + i;
            shown.push(Shown {
                prompt: prompt_of[sample].text.clone(),
                picture: Picture::new(width, height, rgb)?,
                reward: rewards[sample],
            });
        }
    }
    let group = task.reward.group();
    let units = rewards.chunks(group).map(|g| g.iter().map(|&r| f64::from(r)).sum::<f64>() / g.len() as f64).collect();
    Ok(Some(TaskEvaluation { task: task.config.name.clone(), rewards, units, shown }))
}

/// An image f32 `[3, H, W]` in \[0, 1\] as a picture for people.
pub fn to_picture(image: &Tensor) -> Result<Picture> {
    let size = image.size();
    let planes = Vec::<f32>::try_from(&image.to_device(Device::Cpu).to_kind(Kind::Float).contiguous().view([-1]))?;
    Picture::from_planes(size[2] as usize, size[1] as usize, &planes)
}
