//! Algorithm 1: joint fine-tuning by the clipped policy gradient, task after task.

use std::{collections::BTreeMap, time::Instant};

use anyhow::{anyhow, ensure, Context, Error, Result};
use tch::{Device, Tensor};

use crate::{
    comm::{agree, all_made, Communicator},
    config::{Config, Normalisation, PretrainMode},
    diffusion::{
        recorded::RecordedUNet,
        sampler::Trajectory,
        schedule::{Schedule, Step},
    },
    faults,
    iteration_log::IterationLog,
    learner::Learner,
    memory,
    models::pipeline::Pipeline,
    pairs::{self, PairSource},
    policy::{
        advantage::{self, Advantages},
        gradient_sum::GradientSum,
        lanes::Lanes,
        surrogate::Objective,
        update::{lane_objective, LaneBatch},
    },
    prompts::Prompt,
    random::{Coordinates, Purpose},
    rewards::{self, Part},
    stragglers::StageSeconds,
    task::{NoiseOf, Roller, Task},
    telemetry::Metrics,
    watch,
};

/// A run's fixed parts and what it has learnt so far.
pub struct Trainer<'a> {
    pub config: &'a Config,
    pub comm: &'a dyn Communicator,
    pub pipeline: Pipeline,
    pub schedule: Schedule,
    /// The roll-out's transitions, in sampling order.
    pub steps: Vec<Step>,
    pub tasks: Vec<Task>,
    pub learner: Learner,
    /// Own work of all ranks in the last iteration.
    pub stage_seconds: Vec<StageSeconds>,
    lanes: Lanes,
    pairs: PairSource,
    sum: GradientSum,
    empty_prompt: Tensor,
    /// Where the roll-out replays CUDA graphs.
    recorded: Option<RecordedUNet>,
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

/// Sees a task's scored samples and the steps about to be trained on: (trainer, task, batch, steps).
pub type Observe<'o> = dyn FnMut(&Trainer, usize, &TaskBatch, &[usize]) -> Result<()> + 'o;

impl<'a> Trainer<'a> {
    pub fn new(config: &'a Config, comm: &'a dyn Communicator, pipeline: Pipeline) -> Result<Self> {
        let lanes = Lanes::new(config.run.lanes, comm)?;
        let schedule = Schedule::of_model(&pipeline.scheduler)?;
        let steps = schedule.steps(config.rollout.steps, config.rollout.eta)?;
        let tasks =
            config.tasks.iter().enumerate().map(|(i, task)| Task::new(task, i, config.run.seed, pipeline.device));
        // files and programs that only some ranks lack must end all of them
        let tasks = all_made(comm, tasks.collect::<Result<Vec<_>>>())?;
        let learner = Learner::new(&pipeline, config)?;
        let trainer = Trainer {
            sum: GradientSum::new(&learner.params, config.comm.transport())?,
            empty_prompt: pipeline.embed(&[""])?,
            recorded: (config.rollout.cuda_graph && pipeline.device != Device::Cpu).then(RecordedUNet::default),
            pairs: PairSource::new(config, comm, &pipeline, lanes.mine())?,
            config,
            comm,
            pipeline,
            schedule,
            steps,
            tasks,
            learner,
            stage_seconds: Vec::new(),
            lanes,
        };
        trainable_steps(&trainer.steps, config)?;
        Ok(trainer)
    }

    /// One iteration of Algorithm 1. `observe` sees every task's scored samples before they are used up.
    pub fn iterate(&mut self, iteration: u64, observe: &mut Observe) -> Result<Metrics> {
        watch::iteration(iteration);
        let mut log = IterationLog::new(iteration, self.pipeline.device);
        for task in self.config.trained_tasks().map(|(index, _)| index).collect::<Vec<_>>() {
            // 1a–c. prompts, roll-out with the current policy, rewards, advantages
            let batch = self.sample(task, iteration, &mut log)?;
            // 1d. the same few timesteps for all samples and ranks
            let chosen = self.choose_steps(task, iteration)?;
            observe(self, task, &batch, &chosen)?;
            // 1e. one optimizer step for each
            for (pass, &step) in chosen.iter().enumerate() {
                self.update(task, iteration, pass, step, &batch, &mut log)?;
            }
        }
        // 2. the pretraining loss
        if self.config.pretrain.mode == PretrainMode::Separate {
            self.pretrain(iteration, &mut log)?;
        }
        let (metrics, stage_seconds) = log.finish(self.comm, self.config)?;
        self.stage_seconds = stage_seconds;
        self.learner.ratio_drift = self.learner.ratio_drift.max(metrics.get("ratio_drift").unwrap_or(f64::NAN));
        Ok(metrics)
    }

    fn sample(&mut self, task: usize, iteration: u64, log: &mut IterationLog) -> Result<TaskBatch> {
        let seed = self.config.run.seed;
        let (total, index) = (self.tasks[task].config.samples, self.tasks[task].index);
        let per_lane = total / self.lanes.count;
        let noise = NoiseOf { seed, iteration: iteration as u32, task: index };
        let roller = Roller {
            pipeline: &self.pipeline,
            steps: &self.steps,
            empty_prompt: &self.empty_prompt,
            rollout: &self.config.rollout,
            latent_shape: self.pipeline.latent_shape(),
            recorded: self.recorded.as_ref(),
        };
        let name = self.tasks[task].config.name.clone();
        let advice = format!("raise run.lanes, or lower task.{name}.samples");
        let (mut rolled, mut prompts, mut rewards, mut parts) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for lane in self.lanes.mine() {
            let first = lane * per_lane;
            let lane_prompts = self.tasks[task].draw_prompts(seed, iteration as u32, first, per_lane);
            let started = Instant::now();
            let stage =
                (watch::stage("rollout", &name), memory::stage(format!("roll-out of task {name}"), per_lane, &advice));
            let conditioning = roller.conditioning(&lane_prompts)?;
            let trajectory = roller.roll_out(&conditioning, noise, first, per_lane)?;
            spoil_log_probs(&trajectory);
            log.spent("rollout", started);
            drop(stage);
            let started = Instant::now();
            let _stage = memory::stage(format!("reward of task {name}"), per_lane, &advice);
            let scored = self.tasks[task].score(&self.pipeline, trajectory.x_0(), &lane_prompts, iteration, first)?;
            log.spent("reward", started);
            log.diagnostics(&self.tasks[task].config.name, lane, &scored.scores);
            rewards.extend(scored.scores.rewards);
            rewards::append_parts(&mut parts, scored.scores.parts);
            rolled.push((conditioning, trajectory));
            prompts.extend(lane_prompts);
        }
        let _stage = watch::stage("advantage", &self.tasks[task].config.name);
        let started = Instant::now();
        let advantages = self.advantages(task, &prompts, &rewards, &parts)?;
        log.spent("advantage", started);
        log.rewards(&self.tasks[task].config.name, &advantages, total);

        let first = self.lanes.mine().start * per_lane;
        let lanes = rolled.into_iter().enumerate().map(|(i, (conditioning, trajectory))| {
            let from = first + i * per_lane;
            let advantage =
                Tensor::from_slice(&advantages.values[from..from + per_lane]).to_device(self.pipeline.device);
            LaneBatch { conditioning, trajectory, advantage }
        });
        Ok(TaskBatch { lanes: lanes.collect(), prompts, rewards, first, advantages })
    }

    /// Advantages of the global batch: rewards of all ranks, in the order of the global sample index.
    fn advantages(&mut self, task: usize, prompts: &[Prompt], rewards: &[f32], parts: &[Part]) -> Result<Advantages> {
        let settings = self.config.advantage.settings();
        let name = &self.tasks[task].config.name;
        let plain = self.gather(rewards)?;
        let all = if parts.is_empty() {
            plain.clone()
        } else {
            let gathered =
                parts.iter().map(|p| Ok((p.weight, self.gather(&p.rewards)?))).collect::<Result<Vec<_>>>()?;
            advantage::weighted_sum(&gathered, &settings).with_context(|| format!("task {name}"))?
        };
        match self.config.advantage.normalisation {
            Normalisation::Batch => advantage::normalise(&all, &settings),
            Normalisation::PerPrompt => {
                let mine: Vec<&str> = prompts.iter().map(|p| p.text.as_str()).collect();
                let texts = self.comm.all_gather_bytes(&serde_json::to_vec(&mine)?)?;
                let mut everyone: Vec<String> = Vec::with_capacity(all.len());
                for bytes in &texts {
                    everyone.extend(serde_json::from_slice::<Vec<String>>(bytes)?);
                }
                let per_prompt = self.config.advantage.per_prompt();
                self.learner.statistics[task].normalise(&everyone, &all, &settings, &per_prompt)
            }
        }
        .map(|advantages| advantages.described_by(&plain))
        .with_context(|| format!("task {name}"))
    }

    /// The values of all ranks, in the order of the global sample index.
    fn gather(&self, values: &[f32]) -> Result<Vec<f32>> {
        let gathered = self.comm.all_gather_bytes(bytemuck::cast_slice(values))?;
        Ok(gathered.iter().flat_map(|bytes| bytemuck::pod_collect_to_vec::<u8, f32>(bytes)).collect())
    }

    fn choose_steps(&self, task: usize, iteration: u64) -> Result<Vec<usize>> {
        let usable = trainable_steps(&self.steps, self.config)?;
        let at = Coordinates {
            iteration: iteration as u32,
            task: self.tasks[task].index,
            ..Coordinates::new(self.config.run.seed, Purpose::TimestepChoice)
        };
        let picked = at.stream().choose(usable.len(), self.config.update.timesteps);
        Ok(picked.into_iter().map(|i| usable[i]).collect())
    }

    fn update(
        &mut self,
        task: usize,
        iteration: u64,
        pass: usize,
        step: usize,
        batch: &TaskBatch,
        log: &mut IterationLog,
    ) -> Result<()> {
        let config = self.config;
        let _stage = watch::stage("update", &self.tasks[task].config.name);
        let started = Instant::now();
        let mut broken = Vec::new();
        let objective = Objective {
            clip_range: config.update.clip_range,
            weight: self.tasks[task].config.weight,
            samples: batch.advantages.usable_count(),
        };
        let first_lane = self.lanes.mine().start;
        let _memory = {
            let task = &self.tasks[task].config;
            let more = "set model.gradient_checkpointing = true";
            let advice = format!("{more}, raise run.lanes, or lower task.{}.samples", task.name);
            memory::stage(format!("update of task {}", task.name), task.samples / self.lanes.count, advice)
        };
        let (t, name) = (self.steps[step].t, &self.tasks[task].config.name);
        let gradient = self.lanes.sum_gradients(&mut self.sum, self.comm, |lane| {
            let lane_batch = &batch.lanes[lane - first_lane];
            let (mut value, diagnostics) =
                lane_objective(&self.pipeline.unet, &self.steps[step], lane_batch, &objective)?;
            log.objective(name, lane, t, pass == 0, &diagnostics);
            if !diagnostics.loss_sum.is_finite() || !diagnostics.ratio_drift.is_finite() {
                broken.push(format!("log-probability of lane {lane}"));
            }
            value = spoil_value(value);
            if config.pretrain.mode == PretrainMode::Combined {
                let slot = pairs::combined_slot(config, task, pass);
                let loss = self.pairs.loss(&self.pipeline, &self.schedule, iteration, slot, lane)?;
                log.pretraining(lane, loss.double_value(&[]));
                value += loss * (config.pretrain.weight / self.lanes.count as f64);
            }
            if !value.double_value(&[]).is_finite() {
                broken.push(format!("objective of lane {lane}"));
            }
            Ok(value)
        })?;
        faults::point("optimizer");
        let stepped = self.learner.step(&gradient).map_err(|e| self.where_from(e, broken));
        let norm = stepped.with_context(|| format!("task {name}, timestep {t}"))?;
        self.learner.spoil_weights();
        self.sum.recycle(gradient);
        log.step(name, t, norm);
        log.spent("update", started);
        Ok(())
    }

    fn pretrain(&mut self, iteration: u64, log: &mut IterationLog) -> Result<()> {
        let _stage = watch::stage("pretrain", "");
        let started = Instant::now();
        let batch = self.config.pretrain.batch_per_lane;
        let _memory = memory::stage("pretraining step", batch, "lower pretrain.batch_per_lane");
        for slot in 0..self.config.pretrain.steps {
            let mut broken = Vec::new();
            let gradient = self.lanes.sum_gradients(&mut self.sum, self.comm, |lane| {
                let loss = self.pairs.loss(&self.pipeline, &self.schedule, iteration, slot as u16, lane)?;
                log.pretraining(lane, loss.double_value(&[]));
                if !loss.double_value(&[]).is_finite() {
                    broken.push(format!("pretraining loss of lane {lane}"));
                }
                Ok(loss * (self.config.pretrain.weight / self.lanes.count as f64))
            })?;
            self.learner.step(&gradient).map_err(|e| self.where_from(e, broken)).context("pretraining step")?;
            self.sum.recycle(gradient);
        }
        log.spent("pretrain", started);
        Ok(())
    }

    /// A gradient that is not finite is an error on all ranks in the same step, since all hold the same sum; this adds
    /// on which rank it began. `broken` is what this rank saw. A collective call.
    fn where_from(&self, error: Error, mut broken: Vec<String>) -> Error {
        if !self.learner.is_finite() {
            broken.insert(0, "weights".to_string());
        }
        let mine = if broken.is_empty() { Ok(()) } else { Err(anyhow!("not finite: {}", broken.join(", "))) };
        match agree(self.comm, mine) {
            Ok(()) => error,
            Err(found) => anyhow!("{error:#}; {found:#}"),
        }
    }

    /// # Errors
    /// The weights of a rank are not finite: the same error on all ranks. A collective call.
    pub fn check_weights(&self, iteration: u64) -> Result<()> {
        let finite = self.learner.is_finite();
        let mine = if finite { Ok(()) } else { Err(anyhow!("the weights after iteration {iteration} are not finite")) };
        agree(self.comm, mine)
    }

    /// The weights by name: what `evaluate` compares and `save` writes.
    pub fn result(&self) -> BTreeMap<String, Tensor> {
        self.learner.result()
    }
}

/// Indices of the steps that may be trained on.
///
/// # Errors
/// They are fewer than `update.timesteps`.
pub fn trainable_steps(steps: &[Step], config: &Config) -> Result<Vec<usize>> {
    let limit = config.update.max_sensitivity;
    let usable = |s: &&Step| s.sigma > 0.0 && (limit == 0.0 || s.sensitivity() <= limit);
    let indices: Vec<usize> = steps.iter().filter(usable).map(|s| s.index).collect();
    ensure!(
        indices.len() >= config.update.timesteps,
        "update.timesteps = {}, but only {} of {} steps have noise and a sensitivity within max_sensitivity = {limit}",
        config.update.timesteps,
        indices.len(),
        steps.len()
    );
    Ok(indices)
}

/// The fault `log_prob`: the first sample's log-probabilities become NaN.
fn spoil_log_probs(trajectory: &Trajectory) {
    let mut number = [0.0];
    if faults::spoil("log_prob", &mut number) {
        for log_prob in trajectory.log_probs.iter().flatten() {
            let _ = log_prob.get(0).fill_(f64::from(number[0]));
        }
    }
}

/// The fault `gradient`: a value that is NaN, and so is its gradient.
fn spoil_value(value: Tensor) -> Tensor {
    let mut factor = [1.0];
    match faults::spoil("gradient", &mut factor) {
        true => value * f64::from(factor[0]),
        false => value,
    }
}
