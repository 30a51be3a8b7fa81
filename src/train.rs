//! The loop that all methods share: for each task what [`crate::methods`] makes of it, then L_pre.

use std::{collections::BTreeMap, rc::Rc, time::Instant};

use anyhow::{anyhow, Context, Error, Result};
use tch::{Device, Tensor};

use crate::{
    comm::{agree, all_made, Communicator},
    config::{Config, PretrainMode},
    device::numerics,
    diffusion::{
        recorded::RecordedUNet,
        sampler::{Conditioning, Trajectory},
        schedule::{Schedule, Step},
    },
    faults,
    iteration_log::IterationLog,
    learner::Learner,
    memory,
    methods::{self, ours::TaskBatch, Method},
    models::{pipeline::Pipeline, unet::UNet},
    pairs::{self, PairSource},
    policy::{
        advantage::{self, AdvantageSettings},
        gradient_sum::GradientSum,
        lanes::Lanes,
    },
    prompts::Prompt,
    rewards::{self, Part},
    run::fit::{self, Chosen},
    signals::{self, Scope},
    stragglers::StageSeconds,
    task::{Begun, NoiseOf, Roller, Task},
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
    /// What was left to the program.
    pub chosen: Chosen,
    /// Own work of all ranks in the last iteration.
    pub stage_seconds: Vec<StageSeconds>,
    pub(crate) lanes: Lanes,
    method: Rc<dyn Method>,
    pairs: PairSource,
    sum: GradientSum,
    empty_prompt: Tensor,
    /// Where the roll-out replays CUDA graphs.
    recorded: Option<RecordedUNet>,
    /// The iteration is at changing the weights, and a signal does not drop it any more.
    changing: Option<Scope>,
}

/// Sees what a task has sampled, before it is trained on: (trainer, task, the scored samples where the method keeps whole
/// trajectories, the steps about to be trained on).
pub type Observe<'o> = dyn FnMut(&Trainer, usize, Option<&TaskBatch>, &[usize]) -> Result<()> + 'o;

/// How a task's samples are made.
pub(crate) struct RollOut<'r> {
    /// The network that samples; None: the one in training.
    pub unet: Option<&'r UNet>,
    /// So many of the first steps are taken; all of them give x_0.
    pub steps: usize,
    pub guidance_scale: f64,
    /// Samples at once, at most (but at least a prompt's).
    pub at_once: usize,
}

/// Samples that were rolled out together: a lane of one task, or a part of it.
pub(crate) struct Piece {
    pub lane: usize,
    /// First sample in the global batch.
    pub first: usize,
    pub prompts: Vec<Prompt>,
    pub conditioning: Conditioning,
    pub trajectory: Trajectory,
}

/// This rank's samples of a task in the order of their numbers, judged.
#[derive(Default)]
pub(crate) struct Judged {
    pub prompts: Vec<Prompt>,
    pub rewards: Vec<f32>,
    pub parts: Vec<Part>,
}

impl Judged {
    fn add(&mut self, task: &mut Task, lane: usize, begun: Begun, log: &mut IterationLog) -> Result<()> {
        let started = Instant::now();
        let scores = task.collect(begun)?.scores;
        log.spent("reward", started);
        log.diagnostics(&task.config.name, lane, &scores);
        self.rewards.extend(scores.rewards);
        rewards::append_parts(&mut self.parts, scores.parts);
        Ok(())
    }
}

/// The rewards of a task's global batch.
pub(crate) struct GlobalRewards {
    /// As the reward gave them.
    pub plain: Vec<f32>,
    /// What samples are compared by: the same, but for sums whose parts are normalised first.
    pub compared: Vec<f32>,
}

/// One optimizer step on a task.
pub(crate) struct Update {
    pub task: usize,
    pub iteration: u64,
    /// Number of the step among those of the task and iteration.
    pub pass: usize,
    /// Samples of a lane.
    pub per_lane: usize,
    /// Which step it is, for errors: "timestep 981".
    pub what: String,
}

/// What a lane's objective is computed with.
pub(crate) struct LaneWork<'w> {
    pub lane: usize,
    pub pipeline: &'w Pipeline,
    pub schedule: &'w Schedule,
    pub steps: &'w [Step],
    pub task: &'w mut Task,
    pub log: &'w mut IterationLog,
    /// What was not finite, for the error that follows.
    pub broken: &'w mut Vec<String>,
}

impl<'a> Trainer<'a> {
    pub fn new(config: &'a Config, comm: &'a dyn Communicator, mut pipeline: Pipeline) -> Result<Self> {
        numerics::set_deterministic(config.run.deterministic);
        let lanes = Lanes::new(config.run.lanes, comm)?;
        let schedule = Schedule::of_model(&pipeline.scheduler)?;
        let steps = schedule.steps(config.rollout.steps, config.rollout.eta)?;
        let tasks = (0..config.tasks.len()).map(|index| Task::ready(config, index, &pipeline, comm));
        let tasks = tasks.collect::<Result<Vec<_>>>()?;
        signals::stop_here(comm)?;
        let first = comm.rank() == 0;
        agree(comm, tasks.iter().filter(|_| first).try_for_each(|task| task.warn_of_cut_prompts(&pipeline)))?;
        let of_rewards = tasks.iter().map(|task| task.reward.weight_bytes()).sum();
        let chosen = fit::choose(config, &pipeline, of_rewards, lanes.mine().len(), comm)?;
        pipeline.unet.recomputed = chosen.choice.recomputed;
        // before training can change a weight: a method may keep the model as it is now
        let method = all_made(comm, methods::build(config, &pipeline, &steps))?;
        let learner = Learner::new(&pipeline, config)?;
        if !first {
            // rank 0 writes the model
            pipeline.forget_given();
        }
        Ok(Trainer {
            sum: GradientSum::new(&learner.params, config.comm.transport())?,
            empty_prompt: pipeline.embed(&[""])?,
            recorded: (chosen.choice.graphs && pipeline.device != Device::Cpu).then(RecordedUNet::default),
            pairs: PairSource::new(config, comm, &pipeline, lanes.mine())?,
            config,
            comm,
            pipeline,
            schedule,
            steps,
            tasks,
            learner,
            chosen,
            stage_seconds: Vec::new(),
            lanes,
            method,
            changing: None,
        })
    }

    /// One iteration. `observe` sees every task's samples before they are used up.
    ///
    /// # Errors
    /// [`signals::Interrupted`] on all ranks, in a roll-out before the weights have changed: the state is the one before.
    pub fn iterate(&mut self, iteration: u64, observe: &mut Observe) -> Result<Metrics> {
        watch::iteration(iteration);
        let mut log = IterationLog::new(iteration, self.pipeline.device);
        let method = self.method.clone();
        for task in self.config.trained_tasks().map(|(index, _)| index).collect::<Vec<_>>() {
            method.train_on(self, task, iteration, &mut log, observe)?;
        }
        if self.config.pretrain.mode == PretrainMode::Separate {
            self.pretrain(iteration, &mut log)?;
        }
        self.changing = None;
        let (metrics, stage_seconds) = log.finish(self.comm, self.config)?;
        self.stage_seconds = stage_seconds;
        self.learner.ratio_drift = self.learner.ratio_drift.max(metrics.get("ratio_drift").unwrap_or(f64::NAN));
        Ok(metrics)
    }

    /// From now on the iteration is finished, whatever comes: its samples are there, the weights are next.
    fn change(&mut self, iteration: u64) {
        let words = || format!("iteration {} is at changing the weights: it is finished first", iteration + 1);
        self.changing.get_or_insert_with(|| signals::finishing(words()));
    }

    /// Rolls out this rank's samples of a task, piece after piece in the order of their numbers. A signal drops them, where
    /// nothing has changed the weights yet. A collective call.
    pub(crate) fn roll_out(
        &mut self,
        task: usize,
        iteration: u64,
        how: &RollOut,
        log: &mut IterationLog,
        keep: impl FnMut(&mut Task, &Pipeline, &mut IterationLog, Piece) -> Result<()>,
    ) -> Result<()> {
        let rolled = self.roll_out_mine(task, iteration, how, log, keep);
        self.meet(iteration, rolled)
    }

    /// What this rank has made for the iteration's first update where all ranks have, see [`signals::meet`]; nothing is
    /// dropped after that.
    fn meet<T>(&mut self, iteration: u64, mine: Result<T>) -> Result<T> {
        if self.changing.is_some() {
            return mine;
        }
        let made = signals::meet(self.comm, mine)?;
        self.change(iteration);
        Ok(made)
    }

    fn roll_out_mine(
        &mut self,
        task: usize,
        iteration: u64,
        how: &RollOut,
        log: &mut IterationLog,
        mut keep: impl FnMut(&mut Task, &Pipeline, &mut IterationLog, Piece) -> Result<()>,
    ) -> Result<()> {
        let task = &mut self.tasks[task];
        let seed = self.config.run.seed;
        let noise = NoiseOf { seed, iteration: iteration as u32, task: task.index };
        let roller = Roller {
            pipeline: &self.pipeline,
            unet: how.unet.unwrap_or(&self.pipeline.unet),
            steps: &self.steps[..how.steps],
            empty_prompt: &self.empty_prompt,
            guidance_scale: how.guidance_scale,
            latent_shape: self.pipeline.latent_shape(),
            recorded: self.recorded.as_ref(),
        };
        let name = task.config.name.clone();
        let (per_lane, group) = (task.config.samples / self.lanes.count, task.config.images_per_prompt);
        let at_once = (how.at_once / group * group).max(group);
        for lane in self.lanes.mine() {
            let end = (lane + 1) * per_lane;
            for first in (lane * per_lane..end).step_by(at_once) {
                let count = at_once.min(end - first);
                let prompts = task.draw_prompts(seed, iteration as u32, first, count);
                let started = Instant::now();
                let stage = (
                    watch::stage("rollout", &name),
                    memory::stage(format!("roll-out of task {name}"), count, advice(&name)),
                );
                let conditioning = roller.conditioning(&prompts)?;
                let trajectory = roller.roll_out(&conditioning, noise, first, count)?;
                log.spent("rollout", started);
                drop(stage);
                keep(task, &self.pipeline, log, Piece { lane, first, prompts, conditioning, trajectory })?;
            }
        }
        Ok(())
    }

    /// As [`Trainer::roll_out`] to the end, and judges what came out: a piece while the next one is rolled out, where the
    /// reward is a program. A collective call.
    pub(crate) fn sample(
        &mut self,
        task: usize,
        iteration: u64,
        how: &RollOut,
        log: &mut IterationLog,
        keep: impl FnMut(Conditioning, Trajectory) -> Result<()>,
    ) -> Result<Judged> {
        let judged = self.sample_mine(task, iteration, how, log, keep);
        self.meet(iteration, judged)
    }

    fn sample_mine(
        &mut self,
        task: usize,
        iteration: u64,
        how: &RollOut,
        log: &mut IterationLog,
        mut keep: impl FnMut(Conditioning, Trajectory) -> Result<()>,
    ) -> Result<Judged> {
        let mut judged = Judged::default();
        let mut under_way = None;
        self.roll_out_mine(task, iteration, how, log, |task, pipeline, log, piece| {
            let name = task.config.name.clone();
            spoil_log_probs(&piece.trajectory);
            if let Some((lane, begun)) = under_way.take() {
                judged.add(task, lane, begun, log)?;
            }
            let started = Instant::now();
            let advice = format!("lower model.decode_batch (0: no limit), {}", advice(&name));
            let _stage = memory::stage(format!("reward of task {name}"), piece.prompts.len(), advice);
            let begun = task.begin(pipeline, piece.trajectory.x_0(), &piece.prompts, iteration, piece.first)?;
            log.spent("reward", started);
            under_way = Some((piece.lane, begun));
            judged.prompts.extend(piece.prompts);
            keep(piece.conditioning, piece.trajectory)
        })?;
        if let Some((lane, begun)) = under_way {
            judged.add(&mut self.tasks[task], lane, begun, log)?;
        }
        Ok(judged)
    }

    /// The global batch's rewards, in the order of the global sample index. A collective call.
    pub(crate) fn gather_rewards(
        &self,
        task: usize,
        judged: &Judged,
        settings: &AdvantageSettings,
    ) -> Result<GlobalRewards> {
        let plain = self.gather(&judged.rewards)?;
        if judged.parts.is_empty() {
            return Ok(GlobalRewards { compared: plain.clone(), plain });
        }
        let parts = judged.parts.iter().map(|p| Ok((p.weight, self.gather(&p.rewards)?)));
        let compared = advantage::weighted_sum(&parts.collect::<Result<Vec<_>>>()?, settings)
            .with_context(|| format!("task {}", self.tasks[task].config.name))?;
        Ok(GlobalRewards { plain, compared })
    }

    /// The values of all ranks, in the order of the global sample index.
    pub(crate) fn gather(&self, values: &[f32]) -> Result<Vec<f32>> {
        let gathered = self.comm.all_gather_bytes(bytemuck::cast_slice(values))?;
        Ok(gathered.iter().flat_map(|bytes| bytemuck::pod_collect_to_vec::<u8, f32>(bytes)).collect())
    }

    /// One optimizer step: the gradient of Σ over all lanes of `value_of`, with L_pre where it is combined. Returns the
    /// gradient's norm. A collective call.
    pub(crate) fn optimize(
        &mut self,
        at: &Update,
        log: &mut IterationLog,
        mut value_of: impl FnMut(&mut LaneWork) -> Result<Tensor>,
    ) -> Result<f64> {
        let config = self.config;
        let name = self.tasks[at.task].config.name.clone();
        let _stage = watch::stage("update", &name);
        signals::check()?;
        let started = Instant::now();
        let mut broken = Vec::new();
        let _memory = {
            let more = "set model.gradient_checkpointing = true and rollout.cuda_graph = false";
            memory::stage(format!("update of task {name}"), at.per_lane, format!("{more}, {}", advice(&name)))
        };
        let gradient = self.lanes.sum_gradients(&mut self.sum, self.comm, |lane| {
            let mut value = value_of(&mut LaneWork {
                lane,
                pipeline: &self.pipeline,
                schedule: &self.schedule,
                steps: &self.steps,
                task: &mut self.tasks[at.task],
                log,
                broken: &mut broken,
            })?;
            value = spoil_value(value);
            if config.pretrain.mode == PretrainMode::Combined {
                let slot = pairs::combined_slot(config, at.task, at.pass);
                let loss = self.pairs.loss(&self.pipeline, &self.schedule, at.iteration, slot, lane)?;
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
        let norm = stepped.with_context(|| format!("task {name}, {}", at.what))?;
        self.learner.spoil();
        self.sum.recycle(gradient);
        log.spent("update", started);
        Ok(norm)
    }

    fn pretrain(&mut self, iteration: u64, log: &mut IterationLog) -> Result<()> {
        let _stage = watch::stage("pretrain", "");
        signals::check()?;
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
        // the step that failed has changed nothing: what is wrong with the weights was wrong before it
        const WEIGHTS: &str = "weights, already before this step";
        if !self.learner.is_finite() {
            broken.insert(0, WEIGHTS.to_string());
        }
        let mine = if broken.is_empty() { Ok(()) } else { Err(anyhow!("not finite: {}", broken.join(", "))) };
        match agree(self.comm, mine) {
            Ok(()) => anyhow!("{error:#}; the weights are as before"),
            Err(found) if found.to_string().contains(WEIGHTS) => anyhow!("{error:#}; {found:#}"),
            Err(found) => anyhow!("{error:#}; {found:#}; the weights are as before"),
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

/// What to do against too little memory.
fn advice(task: &str) -> String {
    format!("raise run.lanes, or lower task.{task}.samples")
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
