//! Algorithm 1: clipped policy gradients over the denoising steps.
//!
//! 1. Draw the prompts, roll out with the current policy, score and normalise the rewards (Eq. 10).
//! 2. Draw a few timesteps, the same for all samples and ranks.
//! 3. For each of them: the gradient of the clipped objective (Eq. 7) over all samples, one AdamW step.

use anyhow::{ensure, Context, Result};
use tch::Tensor;

use super::{InTask, Method};
use crate::{
    config::{AdvantageConfig, Config, Normalisation, OursConfig},
    diffusion::schedule::Step,
    iteration_log::IterationLog,
    policy::{
        advantage::{self, Advantages},
        surrogate::Objective,
        update::{lane_objective, LaneBatch},
    },
    prompts::Prompt,
    random::{Coordinates, Purpose},
    telemetry::names,
    train::{Judged, Observe, RollOut, Trainer, Update},
    watch,
};

pub struct Ours {
    settings: OursConfig,
    advantage: AdvantageConfig,
}

/// A task's samples of one iteration on this rank: one batch per lane, and what the log and the shards want of them.
pub struct TaskBatch {
    pub lanes: Vec<LaneBatch>,
    pub prompts: Vec<Prompt>,
    /// This rank's rewards.
    pub rewards: Vec<f32>,
    /// The global batch's advantages.
    pub advantages: Advantages,
    /// First sample of this rank in the global batch.
    pub first: usize,
}

impl Ours {
    pub fn new(settings: OursConfig, config: &Config) -> Result<Self> {
        let advantage = config.advantage.clone().context("[advantage] is missing")?;
        Ok(Ours { settings, advantage })
    }

    /// 1.: roll-out with the current policy, rewards, advantages.
    fn sample(&self, trainer: &mut Trainer, task: usize, iteration: u64, log: &mut IterationLog) -> Result<TaskBatch> {
        let config = trainer.config;
        let how = RollOut {
            unet: None,
            steps: config.rollout.steps,
            guidance_scale: config.rollout.guidance_scale,
            at_once: usize::MAX,
        };
        let mut rolled = Vec::new();
        let judged = trainer.sample(task, iteration, &how, log, |conditioning, trajectory| {
            rolled.push((conditioning, trajectory));
            Ok(())
        })?;
        let (name, total) = (&config.tasks[task].name, config.tasks[task].samples);
        let _stage = watch::stage("advantage", name);
        let started = std::time::Instant::now();
        let advantages = self.advantages(trainer, task, &judged)?;
        log.spent("advantage", started);
        log.rewards(name, &advantages.moments(), total);
        let share = advantages.without_spread as f64 / advantages.usable_count() as f64;
        log.of_task(name, names::NO_SIGNAL, share);

        let per_lane = total / trainer.lanes.count;
        let first = trainer.lanes.mine().start * per_lane;
        let device = trainer.pipeline.device;
        let lanes = rolled.into_iter().enumerate().map(|(i, (conditioning, trajectory))| {
            let from = first + i * per_lane;
            let advantage = Tensor::from_slice(&advantages.values[from..from + per_lane]).to_device(device);
            LaneBatch { conditioning, trajectory, advantage }
        });
        Ok(TaskBatch { lanes: lanes.collect(), prompts: judged.prompts, rewards: judged.rewards, first, advantages })
    }

    /// Advantages of the global batch: rewards of all ranks, in the order of the global sample index.
    fn advantages(&self, trainer: &mut Trainer, task: usize, judged: &Judged) -> Result<Advantages> {
        let settings = self.advantage.settings();
        let rewards = trainer.gather_rewards(task, judged, &settings)?;
        match self.advantage.normalisation {
            Normalisation::Batch => advantage::normalise(&rewards.compared, &settings),
            Normalisation::PerPrompt => {
                let mine: Vec<&str> = judged.prompts.iter().map(|p| p.text.as_str()).collect();
                let texts = trainer.comm.all_gather_bytes(&serde_json::to_vec(&mine)?)?;
                let mut everyone: Vec<String> = Vec::with_capacity(rewards.compared.len());
                for bytes in &texts {
                    everyone.extend(serde_json::from_slice::<Vec<String>>(bytes)?);
                }
                let per_prompt = self.advantage.per_prompt();
                trainer.learner.statistics[task].normalise(&everyone, &rewards.compared, &settings, &per_prompt)
            }
        }
        .map(|advantages| advantages.described_by(&rewards.plain))
        .in_task(trainer, task)
    }

    /// 2.
    fn choose_steps(&self, trainer: &Trainer, task: usize, iteration: u64) -> Result<Vec<usize>> {
        let usable = trainable_steps(&trainer.steps, &self.settings)?;
        let at = Coordinates {
            iteration: iteration as u32,
            task: trainer.tasks[task].index,
            ..Coordinates::new(trainer.config.run.seed, Purpose::TimestepChoice)
        };
        let picked = at.stream().choose(usable.len(), self.settings.timesteps);
        Ok(picked.into_iter().map(|i| usable[i]).collect())
    }
}

impl Method for Ours {
    fn train_on(
        &self,
        trainer: &mut Trainer,
        task: usize,
        iteration: u64,
        log: &mut IterationLog,
        observe: &mut Observe,
    ) -> Result<()> {
        let batch = self.sample(trainer, task, iteration, log)?;
        let chosen = self.choose_steps(trainer, task, iteration)?;
        observe(trainer, task, Some(&batch), &chosen)?;

        let config = &trainer.config.tasks[task];
        let objective = Objective {
            clip_range: self.settings.clip_range,
            weight: config.weight,
            samples: batch.advantages.usable_count(),
        };
        let (first_lane, per_lane) = (trainer.lanes.mine().start, config.samples / trainer.lanes.count);
        // 3.
        for (pass, &step) in chosen.iter().enumerate() {
            let t = trainer.steps[step].t;
            let at = Update { task, iteration, pass, per_lane, what: format!("timestep {t}") };
            let norm = trainer.optimize(&at, log, |work| {
                let lane_batch = &batch.lanes[work.lane - first_lane];
                let (value, seen) = lane_objective(&work.pipeline.unet, &work.steps[step], lane_batch, &objective)?;
                work.log.objective(&config.name, work.lane, t, pass == 0, &seen);
                if !seen.loss_sum.is_finite() || !seen.ratio_drift.is_finite() {
                    work.broken.push(format!("log-probability of lane {}", work.lane));
                }
                Ok(value)
            })?;
            log.step(&config.name, t, norm);
        }
        Ok(())
    }
}

/// Indices of the steps that may be trained on.
///
/// # Errors
/// They are fewer than `method.timesteps`.
pub fn trainable_steps(steps: &[Step], settings: &OursConfig) -> Result<Vec<usize>> {
    let limit = settings.max_sensitivity;
    let usable = |s: &&Step| s.sigma > 0.0 && (limit == 0.0 || s.sensitivity() <= limit);
    let indices: Vec<usize> = steps.iter().filter(usable).map(|s| s.index).collect();
    ensure!(
        indices.len() >= settings.timesteps,
        "method.timesteps = {}, but only {} of {} steps have noise and a sensitivity within max_sensitivity = {limit}",
        settings.timesteps,
        indices.len(),
        steps.len()
    );
    Ok(indices)
}
