//! A task of the joint training: a prompt distribution and a reward; its share of Algorithm 1 up to the scored samples.

use anyhow::{ensure, Context, Result};
use tch::{Device, Tensor};

use crate::{
    comm::{all_made, Communicator},
    config::{Config, TaskConfig},
    cut_prompts,
    diffusion::{
        recorded::RecordedUNet,
        sampler::{self, Conditioning, Trajectory},
        schedule::Step,
    },
    faults, methods,
    models::{pipeline::Pipeline, unet::UNet},
    prompts::{self, Prompt, PromptSource},
    random::{self, Coordinates, Purpose},
    rewards::{self, registry::Place, Pending, Reward, Scores},
    signals, watch,
};

/// A task with everything it needs at run time.
pub struct Task {
    pub config: TaskConfig,
    /// Position in the config; random numbers depend on it.
    pub index: u8,
    pub prompts: Box<dyn PromptSource>,
    pub reward: Box<dyn Reward>,
}

impl Task {
    /// As [`Task::new`], for training `pipeline`, and held against it: does the reward take its pictures, and has it the
    /// gradient that the method asks for? `check` and training both decide by this. A collective call.
    pub fn ready(config: &Config, index: usize, pipeline: &Pipeline, comm: &dyn Communicator) -> Result<Self> {
        let mut task = Task::new(&config.tasks[index], index, config.run.seed, pipeline.device, comm)?;
        let name = &config.tasks[index].name;
        let [height, width] = pipeline.picture_size();
        let tried = task.reward.check_size(height, width).with_context(|| format!("task.{name}.reward"));
        all_made(comm, tried.and_then(|()| methods::check_reward(config, pipeline, &mut task)))?;
        Ok(task)
    }

    /// Prompts and reward of a task; networks of the reward go to `device`. A collective call; errors are the same on
    /// all ranks: files and programs that only some of them lack end all.
    pub fn new(config: &TaskConfig, index: usize, seed: u64, device: Device, comm: &dyn Communicator) -> Result<Self> {
        let index = u8::try_from(index).context("at most 255 tasks")?;
        let place = Place { task: &config.name, index, seed, device, group: config.images_per_prompt };
        let prompts = prompts::registry::build(&config.prompts, comm);
        let prompts = prompts.with_context(|| format!("task {}: prompts", config.name))?;
        signals::stop_here(comm)?;
        let reward = all_made(comm, rewards::registry::build(&config.reward, place));
        let reward = reward.with_context(|| format!("task {}: reward", config.name))?;
        reward
            .check_objects(&prompts.objects(), prompts.nameless().as_deref())
            .with_context(|| format!("task {}", config.name))?;
        Ok(Task { config: config.clone(), index, prompts, reward })
    }

    /// Says how many of its prompts are longer than the model reads.
    pub fn warn_of_cut_prompts(&self, pipeline: &Pipeline) -> Result<()> {
        let of = format!("task {}: ", self.config.name);
        cut_prompts::warn_of_source(&of, &pipeline.tokenizer, self.prompts.as_ref())
    }

    /// The prompts of the samples `first..first + count` of an iteration.
    pub fn draw_prompts(&self, seed: u64, iteration: u32, first: usize, count: usize) -> Vec<Prompt> {
        let per_prompt = self.config.images_per_prompt;
        (first..first + count)
            .map(|sample| {
                let group = (sample / per_prompt) as u32;
                prompts::registry::draw(self.prompts.as_ref(), seed, iteration, self.index, group)
            })
            .collect()
    }

    /// Begins to judge x_0 of a batch made of whole groups: the samples of `iteration` from number `first` on.
    /// [`Task::collect`] ends it; one batch at a time.
    pub fn begin(
        &mut self,
        pipeline: &Pipeline,
        x_0: &Tensor,
        prompts: &[Prompt],
        iteration: u64,
        first: usize,
    ) -> Result<Begun> {
        self.reward.set_group(self.config.images_per_prompt);
        self.begin_to_judge(pipeline, x_0, prompts, &format!("{iteration:06}"), first)
    }

    /// As [`Task::begin`] and [`Task::collect`], with the groups of evaluations.
    pub fn evaluate(&mut self, pipeline: &Pipeline, x_0: &Tensor, prompts: &[Prompt], first: usize) -> Result<Scored> {
        self.reward.set_group(self.config.evaluation_images_per_prompt);
        let begun = self.begin_to_judge(pipeline, x_0, prompts, "evaluation", first)?;
        self.collect(begun)
    }

    fn begin_to_judge(
        &mut self,
        pipeline: &Pipeline,
        x_0: &Tensor,
        prompts: &[Prompt],
        when: &str,
        first: usize,
    ) -> Result<Begun> {
        let task = &self.config.name;
        let _stage = watch::stage(watch::REWARD, task);
        signals::check()?;
        let _no_grad = tch::no_grad_guard();
        // rewards judge on the host
        let images = pipeline.vae.decode_scaled(x_0).to_device(Device::Cpu);
        let ids: Vec<String> = (first..first + prompts.len()).map(|i| format!("{task}-{when}-{i:06}")).collect();
        let pending = self.reward.begin(&images, prompts, &ids).with_context(|| format!("reward of task {task}"))?;
        Ok(Begun { images, pending })
    }

    /// The scores of what was begun.
    pub fn collect(&mut self, begun: Begun) -> Result<Scored> {
        let task = &self.config.name;
        let _stage = watch::stage(watch::REWARD, task);
        let _no_grad = tch::no_grad_guard();
        let Begun { images, pending } = begun;
        let mut scores = self.reward.collect(pending).with_context(|| format!("reward of task {task}"))?;
        let pictures = images.size()[0] as usize;
        ensure!(
            scores.rewards.len() == pictures,
            "reward of task {task} gave {} values for {pictures} pictures",
            scores.rewards.len()
        );
        faults::spoil("rewards", &mut scores.rewards);
        Ok(Scored { images, scores })
    }
}

/// Decoded pictures that are being judged.
pub struct Begun {
    images: Tensor,
    pending: Pending,
}

/// Decoded pictures, f32 `[B, 3, H, W]` in \[0, 1\], with their scores.
pub struct Scored {
    pub images: Tensor,
    pub scores: Scores,
}

/// What all roll-outs of a run share.
#[derive(Clone, Copy)]
pub struct Roller<'a> {
    pub pipeline: &'a Pipeline,
    /// The network that samples: the pipeline's, or another of its kind.
    pub unet: &'a UNet,
    pub steps: &'a [Step],
    /// Embedding of the empty prompt, `[1, tokens, width]`.
    pub empty_prompt: &'a Tensor,
    /// g.
    pub guidance_scale: f64,
    /// C, H, W of the latents.
    pub latent_shape: [i64; 3],
    /// Where the U-Net's calls are replayed instead of made.
    pub recorded: Option<&'a RecordedUNet>,
}

impl Roller<'_> {
    /// Text of a batch for the U-Net; equal prompts are encoded once.
    pub fn conditioning(&self, prompts: &[Prompt]) -> Result<Conditioning> {
        let mut texts: Vec<&str> = Vec::new();
        let mut rows: Vec<i64> = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let known = texts.iter().position(|t| *t == prompt.text);
            rows.push(known.unwrap_or(texts.len()) as i64);
            if known.is_none() {
                texts.push(&prompt.text);
            }
        }
        let rows = Tensor::from_slice(&rows).to_device(self.pipeline.device);
        let cond = self.pipeline.embed(&texts)?.index_select(0, &rows);
        Ok(Conditioning::new(&cond, self.empty_prompt, self.guidance_scale))
    }

    /// Rolls out the samples `first..first + count`: noise is a function of `at` (its sample and step are filled in
    /// here) and the global sample index alone.
    pub fn roll_out(&self, conditioning: &Conditioning, at: NoiseOf, first: usize, count: usize) -> Result<Trajectory> {
        let shape = self.latent_shape;
        let stream = |purpose: Purpose, step: usize| Coordinates {
            sample: first as u32,
            step: step as u16,
            iteration: at.iteration,
            task: at.task,
            ..Coordinates::new(at.seed, purpose)
        };
        let start = stream(Purpose::InitialLatent, 0);
        let x_t = random::normal_rows(start, first as u32, count, &shape).to_device(self.pipeline.device);
        let noise = |i| stream(Purpose::TransitionNoise, i);
        sampler::roll_out(self.unet, self.recorded, self.steps, x_t, conditioning, noise)
    }
}

/// Which noise a roll-out draws.
#[derive(Clone, Copy, Debug)]
pub struct NoiseOf {
    pub seed: u64,
    pub iteration: u32,
    pub task: u8,
}
