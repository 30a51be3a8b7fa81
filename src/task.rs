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
    models::{pipeline::Pipeline, unet::UNet, vae::Vae},
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
        let _precision = pipeline.enter_precision();
        let ids: Vec<String> = (first..first + prompts.len()).map(|i| format!("{task}-{when}-{i:06}")).collect();
        let mut pictures = Decoding::new(&pipeline.vae, x_0, Decoding::part(pipeline, x_0.size()[0]));
        let begun = self.reward.begin_in_parts(&mut pictures, prompts, &ids);
        let pending = begun.with_context(|| format!("reward of task {task}"))?;
        Ok(Begun { images: pictures.all(), pending })
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

/// The pictures of a batch, part after part, on the host, where rewards judge. A GPU decodes the next part meanwhile.
struct Decoding<'v> {
    vae: &'v Vae,
    parts: std::vec::IntoIter<Tensor>,
    /// Given to the device, and not waited for.
    ahead: Option<Tensor>,
    done: Vec<Tensor>,
}

impl<'v> Decoding<'v> {
    fn new(vae: &'v Vae, x_0: &Tensor, part: i64) -> Self {
        let mut parts = x_0.split(part, 0).into_iter();
        let ahead = parts.next().map(|first| vae.decode_scaled(&first));
        Decoding { vae, parts, ahead, done: Vec::new() }
    }

    /// Pictures of a part. A CPU does one thing after the other: all at once, cut by the VAE alone. A GPU has what the VAE
    /// decodes at once anyway, or half of what there is.
    fn part(pipeline: &Pipeline, pictures: i64) -> i64 {
        let at_once = pipeline.vae.decode_batch as i64;
        match pipeline.device {
            Device::Cpu => pictures,
            _ if at_once == 0 || at_once >= pictures => (pictures + 1) / 2,
            _ => at_once,
        }
        .max(1)
    }

    /// Those that were given so far.
    fn all(self) -> Tensor {
        match &self.done[..] {
            [whole] => whole.shallow_clone(),
            parts => Tensor::cat(parts, 0),
        }
    }
}

impl Iterator for Decoding<'_> {
    type Item = Tensor;

    fn next(&mut self) -> Option<Tensor> {
        // waits for this part; only then the next is begun, or this copy would wait for it too
        let images = self.ahead.take()?.to_device(Device::Cpu);
        self.ahead = self.parts.next().map(|next| self.vae.decode_scaled(&next));
        self.done.push(images.shallow_clone());
        Some(images)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        comm::Local,
        config::load::{parse, EMBEDDED_JOINT},
        run::load_for_training,
    };

    /// What a GPU does while a reward judges on the host, here one after the other.
    #[test]
    fn pictures_judged_part_by_part_have_the_scores_of_the_whole() {
        let config = parse(EMBEDDED_JOINT, "joint", &["model.decode_batch=3".to_string()]).unwrap();
        let pipeline = load_for_training(&config, &Local, Device::Cpu).unwrap();
        let [c, h, w] = pipeline.latent_shape();
        let _no_grad = tch::no_grad_guard();
        for index in 0..config.tasks.len() {
            let mut task = Task::ready(&config, index, &pipeline, &Local).unwrap();
            let pictures = 2 * task.config.images_per_prompt.max(4);
            let x_0 = random::normal_rows(Coordinates::new(5, Purpose::Sample), 0, pictures, &[c, h, w]);
            let prompts = task.draw_prompts(1, 0, 0, pictures);
            let ids: Vec<String> = (0..pictures).map(|i| i.to_string()).collect();
            task.reward.set_group(task.config.images_per_prompt);
            let mut judged = |part: i64| {
                let mut decoding = Decoding::new(&pipeline.vae, &x_0, part);
                let pending = task.reward.begin_in_parts(&mut decoding, &prompts, &ids).unwrap();
                (task.reward.collect(pending).unwrap(), decoding.all())
            };
            let (scores, images) = judged(pictures as i64);
            assert_eq!(images.size()[0], pictures as i64);
            assert!(
                scores.rewards.len() == pictures && scores.rewards.iter().any(|r| *r != scores.rewards[0])
                    || index == 1
            );
            // the VAE decodes three at once in any case
            for part in [3, 6] {
                let (in_parts, same) = judged(part);
                assert_eq!(same, images, "{}: parts of {part}", config.tasks[index].name);
                assert_eq!(in_parts, scores, "{}: parts of {part}", config.tasks[index].name);
            }
        }
    }

    #[test]
    fn a_cpu_decodes_at_once_what_a_gpu_decodes_in_parts() {
        let config = parse(EMBEDDED_JOINT, "joint", &[]).unwrap();
        let mut pipeline = load_for_training(&config, &Local, Device::Cpu).unwrap();
        let mut part = |device: Device, decode_batch: usize, pictures: i64| {
            pipeline.device = device;
            pipeline.vae.decode_batch = decode_batch;
            Decoding::part(&pipeline, pictures)
        };
        assert_eq!([part(Device::Cpu, 4, 16), part(Device::Cpu, 0, 16)], [16, 16]);
        let gpu = Device::Cuda(0);
        assert_eq!([part(gpu, 4, 16), part(gpu, 0, 16), part(gpu, 16, 16), part(gpu, 0, 1)], [4, 8, 8, 1]);
    }
}
