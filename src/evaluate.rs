//! Evaluation: rewards of a model on held-out prompts with fixed noise, so that two models differ in their weights only.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::{
    comm::Communicator,
    config::Config,
    diffusion::schedule::Step,
    image_statistics::{diversity, high_frequency_share},
    memory,
    models::pipeline::Pipeline,
    prompts::{self, Prompt},
    signals,
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
    /// Share of fine detail in every picture ([`high_frequency_share`]).
    pub high_frequency: Vec<f64>,
    /// How different the pictures of each prompt are ([`diversity`]); nothing where a prompt has one picture.
    pub diversity: Vec<f64>,
    /// The first samples, for people.
    pub shown: Vec<Shown>,
}

#[derive(Clone, Debug)]
pub struct Shown {
    pub prompt: String,
    pub picture: Picture,
    pub reward: f32,
}

/// How much is drawn of a task.
#[derive(Clone, Copy, Debug)]
struct Extent {
    prompts: usize,
    /// Of each prompt.
    images: usize,
    /// Of the first samples, how many are kept for people, and of each prompt at most how many.
    shown: usize,
    shown_per_prompt: usize,
}

/// Pictures of a prompt that a small evaluation keeps.
const SHOWN_PER_PROMPT: usize = 4;

/// One chunk's results on their way between ranks.
#[derive(Serialize, Deserialize)]
struct ChunkResult {
    first: usize,
    /// Bits of the rewards: JSON has no NaN.
    rewards: Vec<u32>,
    /// Bits of the share of every picture and of the diversity of every prompt.
    high_frequency: Vec<u64>,
    diversity: Vec<u64>,
    /// Width, height and RGB bytes of the pictures to show.
    pictures: Vec<(usize, usize, Vec<u8>)>,
}

/// Evaluates every task of the config (also those with `train = false`) with the pipeline's current weights. A
/// collective call; chunks go round robin over the ranks, and the result is the same on all of them.
///
/// # Errors
/// Among others [`signals::Interrupted`], on all ranks.
pub fn evaluate(
    config: &Config,
    pipeline: &Pipeline,
    steps: &[Step],
    tasks: &mut [Task],
    comm: &dyn Communicator,
) -> Result<Vec<TaskEvaluation>> {
    each_task(config, pipeline, steps, tasks, comm, |task| {
        let images = task.config.evaluation_images_per_prompt;
        let prompts = task.config.evaluation_samples / images;
        Extent { prompts, images, shown: config.evaluation.pictures, shown_per_prompt: images }
    })
}

/// A small evaluation in the course of training: the first `evaluation.prompts` held-out prompts of every task with
/// `evaluation.images` pictures each (a reward that judges groups gets its groups), always with the same noise.
pub fn evaluate_few(
    config: &Config,
    pipeline: &Pipeline,
    steps: &[Step],
    tasks: &mut [Task],
    comm: &dyn Communicator,
) -> Result<Vec<TaskEvaluation>> {
    each_task(config, pipeline, steps, tasks, comm, |task| {
        task.reward.set_group(task.config.evaluation_images_per_prompt);
        let images = if task.reward.group() > 1 { task.reward.group() } else { config.evaluation.images };
        let prompts = config.evaluation.prompts;
        Extent { prompts, images, shown: prompts * images, shown_per_prompt: SHOWN_PER_PROMPT }
    })
}

fn each_task(
    config: &Config,
    pipeline: &Pipeline,
    steps: &[Step],
    tasks: &mut [Task],
    comm: &dyn Communicator,
    extent: impl Fn(&mut Task) -> Extent,
) -> Result<Vec<TaskEvaluation>> {
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
    tasks
        .iter_mut()
        .map(|task| {
            let extent = extent(task);
            evaluate_task(config, &roller, task, extent, comm)
        })
        .collect()
}

fn evaluate_task(
    config: &Config,
    roller: &Roller,
    task: &mut Task,
    extent: Extent,
    comm: &dyn Communicator,
) -> Result<TaskEvaluation> {
    let settings = &config.evaluation;
    let (per_prompt, total) = (extent.images, extent.prompts * extent.images);
    let groups =
        prompts::registry::evaluation_prompts(task.prompts.as_ref(), settings.seed, task.index, extent.prompts);
    let prompt_of: Vec<Prompt> = (0..total).map(|sample| groups[sample / per_prompt].clone()).collect();
    let noise = NoiseOf { seed: settings.seed, iteration: u32::MAX, task: task.index };
    let is_shown = |sample: usize| sample < extent.shown && sample % per_prompt < extent.shown_per_prompt;

    let chunk = CHUNK.next_multiple_of(per_prompt);
    let mut judge = |first: usize| -> Result<ChunkResult> {
        let count = chunk.min(total - first);
        let prompts = &prompt_of[first..first + count];
        let name = &task.config.name;
        let advice = format!(
            "lower model.decode_batch (0: no limit), and task.{name}.evaluation_images_per_prompt if it is above {CHUNK}"
        );
        let _stage = memory::stage(format!("evaluation of task {name}"), count, advice);
        let trajectory = roller.roll_out(&roller.conditioning(prompts)?, noise, first, count)?;
        let scored = task.evaluate(roller.pipeline, trajectory.x_0(), prompts, first)?;
        let _no_grad = tch::no_grad_guard();
        let mut of_prompts = Vec::new();
        for prompt in (0..count).step_by(per_prompt).filter(|_| per_prompt > 1) {
            of_prompts.push(diversity(&scored.images.narrow(0, prompt as i64, per_prompt as i64))?.to_bits());
        }
        Ok(ChunkResult {
            first,
            rewards: scored.scores.rewards.iter().map(|r| r.to_bits()).collect(),
            high_frequency: high_frequency_share(&scored.images)?.into_iter().map(f64::to_bits).collect(),
            diversity: of_prompts,
            pictures: (0..count)
                .filter(|i| is_shown(first + i))
                .map(|i| {
                    let picture = to_picture(&scored.images.get(i as i64))?;
                    Ok((picture.width(), picture.height(), picture.rgb().to_vec()))
                })
                .collect::<Result<_>>()?,
        })
    };
    let firsts = (comm.rank() * chunk..total).step_by(comm.size() * chunk);
    let mine: Vec<ChunkResult> = signals::meet(comm, firsts.map(&mut judge).collect())?;

    let mut chunks: Vec<ChunkResult> = Vec::new();
    for bytes in comm.all_gather_bytes(&serde_json::to_vec(&mine)?)? {
        chunks.extend(serde_json::from_slice::<Vec<ChunkResult>>(&bytes).context("evaluation of another rank")?);
    }
    chunks.sort_by_key(|c| c.first);
    let rewards: Vec<f32> = chunks.iter().flat_map(|c| c.rewards.iter().map(|&bits| f32::from_bits(bits))).collect();
    let numbers = |of: fn(&ChunkResult) -> &[u64]| -> Vec<f64> {
        chunks.iter().flat_map(|c| of(c).iter().map(|&bits| f64::from_bits(bits))).collect()
    };
    let (high_frequency, diversity) = (numbers(|c| &c.high_frequency), numbers(|c| &c.diversity));
    let pictures = chunks.into_iter().flat_map(|chunk| chunk.pictures);
    let shown = (0..total).filter(|&sample| is_shown(sample)).zip(pictures).map(|(sample, (width, height, rgb))| {
        let (prompt, picture) = (prompt_of[sample].text.clone(), Picture::new(width, height, rgb)?);
        Ok(Shown { prompt, picture, reward: rewards[sample] })
    });
    let shown = shown.collect::<Result<Vec<_>>>()?;
    let group = task.reward.group();
    let units = rewards.chunks(group).map(|g| g.iter().map(|&r| f64::from(r)).sum::<f64>() / g.len() as f64).collect();
    Ok(TaskEvaluation { task: task.config.name.clone(), rewards, units, high_frequency, diversity, shown })
}

/// An image f32 `[3, H, W]` in \[0, 1\] as a picture for people.
pub fn to_picture(image: &Tensor) -> Result<Picture> {
    let size = image.size();
    let planes = Vec::<f32>::try_from(&image.to_device(Device::Cpu).to_kind(Kind::Float).contiguous().view([-1]))?;
    Picture::from_planes(size[2] as usize, size[1] as usize, &planes)
}
