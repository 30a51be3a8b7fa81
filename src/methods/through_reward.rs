//! Gradients of rewards in latents: through the VAE's decoder and the reward, picture by picture.
//!
//! A loss of the reward of x_0 is differentiated in two parts. Here x_0 is a leaf: its gradient g = ∂loss/∂x_0 goes through
//! decoder and reward for a few pictures at a time, so only their activations are alive. The network then sees
//! (x_0·g).sum(), whose gradient in its weights is that of the loss by the chain rule.

use anyhow::{ensure, Context, Result};
use tch::{Device, Kind, Tensor};

use super::{bearing, InTask};
use crate::{
    iteration_log::IterationLog,
    models::pipeline::Pipeline,
    policy::advantage::batch_moments,
    prompts::{registry::draw, Prompt},
    task::Task,
    telemetry::names,
    train::{LaneWork, Observe, Piece, RollOut, Trainer, Update},
    watch,
};

/// What judging a lane's latents gave.
pub(super) struct ThroughReward {
    /// One per sample; NaN where the reward or its gradient is not finite: the sample's gradient is then 0.
    pub rewards: Vec<f32>,
    /// Σ over the other samples of their losses.
    pub loss_sum: f64,
    /// ∂(Σ losses)/∂x_0, f32 like x_0.
    pub gradient: Tensor,
}

/// Differentiates Σ_i loss(r_i) in `x_0`, f32 [n, C, H, W]. `loss` makes f32 `[k]` of rewards f32 `[k]`; `at_once` pictures
/// are decoded together (but at least a group that the reward judges together).
pub(super) fn differentiate(
    pipeline: &Pipeline,
    task: &mut Task,
    x_0: &Tensor,
    prompts: &[Prompt],
    at_once: usize,
    loss: impl Fn(&Tensor) -> Tensor,
) -> Result<ThroughReward> {
    let name = task.config.name.clone();
    let _stage = watch::stage(watch::REWARD, &name);
    let _precision = pipeline.enter_precision();
    task.reward.set_group(task.config.images_per_prompt);
    let group = task.reward.group();
    let at_once = (at_once / group * group).max(group);
    let reward = task.reward.differentiable().context("the reward is not differentiable")?;
    let (mut rewards, mut loss_sum, mut gradients) = (Vec::with_capacity(prompts.len()), 0.0, Vec::new());
    for first in (0..prompts.len()).step_by(at_once) {
        let prompts = &prompts[first..prompts.len().min(first + at_once)];
        let leaf = x_0.narrow(0, first as i64, prompts.len() as i64).detach().copy().set_requires_grad(true);
        let images = pipeline.vae.decode_scaled(&leaf);
        let scores = reward.rewards(&images, prompts).with_context(|| format!("reward of task {name}"))?;
        ensure!(
            scores.size() == [prompts.len() as i64],
            "reward of task {name} gave {:?} values for {} pictures",
            scores.size(),
            prompts.len()
        );
        let losses = loss(&scores);
        let gradient = Tensor::f_run_backward(&[losses.sum(Kind::Float)], &[&leaf], false, false)
            .with_context(|| format!("gradient of the reward of task {name}"))?
            .remove(0);
        let finite = scores.detach().isfinite().logical_and(&gradient.isfinite().flatten(1, -1).all_dim(1, false));
        let nan = scores.full_like(f64::NAN);
        rewards.extend(Vec::<f32>::try_from(&scores.detach().where_self(&finite, &nan).to_device(Device::Cpu))?);
        loss_sum += losses.detach().where_scalarother(&finite, 0.0).sum(Kind::Double).double_value(&[]);
        gradients.push(gradient.where_scalarother(&finite.view([-1, 1, 1, 1]), 0.0));
    }
    Ok(ThroughReward { rewards, loss_sum, gradient: Tensor::cat(&gradients, 0) })
}

impl ThroughReward {
    /// A scalar whose gradient, in whatever made `x_0`, is that of `factor` · Σ losses (its value means nothing).
    pub fn value(&self, x_0: &Tensor, factor: f64) -> Tensor {
        (x_0 * &self.gradient).sum(Kind::Float) * factor
    }

    /// Logs the losses as `<task>/loss`, and of how many samples the gradient is 0.
    pub fn log(&self, work: &mut LaneWork) {
        let usable = self.rewards.iter().filter(|reward| reward.is_finite()).count();
        let name = &work.task.config.name;
        work.log.task_mean(name, "loss", work.lane, self.loss_sum, usable);
        // bad samples have none either
        let samples = self.gradient.ne(0.0).flatten(1, -1).any_dim(1, false).logical_not();
        let zero = samples.sum(Kind::Int64).int64_value(&[]) as usize;
        let zero = zero - (self.rewards.len() - usable);
        work.log.task_mean(name, names::NO_SIGNAL, work.lane, zero as f64, usable);
    }
}

/// A task's iteration of a method that follows the reward's gradient.
pub(super) struct Course<'c> {
    pub task: usize,
    pub iteration: u64,
    /// Up to where the samples are rolled out without gradients.
    pub how: RollOut<'c>,
    /// Indices of the steps that have gradients.
    pub chosen: Vec<usize>,
    /// As [`Update::what`].
    pub what: String,
    pub max_bad_fraction: f64,
}

impl Course<'_> {
    /// Rolls out the task's samples, and takes one optimizer step by what `lane_value` makes of every lane: its objective,
    /// a sum over samples times the factor given, and its rewards. A collective call.
    pub fn train(
        self,
        trainer: &mut Trainer,
        log: &mut IterationLog,
        observe: &mut Observe,
        mut lane_value: impl FnMut(&mut LaneWork, &Piece, f64) -> Result<(Tensor, Vec<f32>)>,
    ) -> Result<()> {
        let Course { task, iteration, .. } = self;
        let config = &trainer.config.tasks[task];
        let mut pieces = Vec::new();
        trainer.roll_out(task, iteration, &self.how, log, |_, _, _, piece| {
            pieces.push(piece);
            Ok(())
        })?;
        observe(trainer, task, None, &self.chosen)?;
        let per_lane = config.samples / trainer.lanes.count;
        let at = Update { task, iteration, pass: 0, per_lane, what: self.what };
        let (mut pieces, mut rewards) = (pieces.into_iter(), Vec::new());
        let factor = config.weight / config.samples as f64;
        let norm = trainer.optimize(&at, log, |work| {
            let piece = pieces.next().context("a lane without samples")?;
            let (value, judged) = lane_value(work, &piece, factor)?;
            rewards.extend(judged);
            Ok(value)
        })?;
        log.norm(norm);
        let moments = batch_moments(&trainer.gather(&rewards)?, &bearing(self.max_bad_fraction));
        log.rewards(&config.name, &moments.in_task(trainer, task)?, config.samples);
        Ok(())
    }
}

/// One gradient of the task's reward, of grey pictures, so that a reward without one is found before any work.
pub(super) fn try_out(pipeline: &Pipeline, task: &mut Task) -> Result<()> {
    task.reward.set_group(task.config.images_per_prompt);
    let group = task.reward.group();
    let [height, width] = pipeline.picture_size();
    let size = [group as i64, 3, height, width];
    let grey = Tensor::full(size, 0.5, (Kind::Float, pipeline.device)).set_requires_grad(true);
    let prompts = vec![draw(task.prompts.as_ref(), 0, 0, task.index, 0); group];
    let name = &task.config.name;
    let reward = task.reward.differentiable().context("the reward is not differentiable")?;
    let gradient = reward
        .rewards(&grey, &prompts)
        .and_then(|scores| Ok(Tensor::f_run_backward(&[scores.sum(Kind::Float)], &[&grey], false, false)?.remove(0)));
    let gradient = gradient.with_context(|| format!("task.{name}.reward"))?;
    ensure!(gradient.size() == size, "task.{name}.reward: its gradient has shape {:?}", gradient.size());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        methods::testing::{config, piece, trainer, TASK},
        rewards::{DifferentiableReward, Reward, Scores},
    };

    /// Mean brightness; not a number for the picture of this number.
    struct Brightness {
        bad: Option<i64>,
    }

    impl Reward for Brightness {
        fn name(&self) -> &str {
            "brightness"
        }
        fn score(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Scores> {
            Ok(Scores { rewards: Vec::try_from(&self.rewards(images, prompts)?)?, ..Scores::default() })
        }
        fn differentiable(&mut self) -> Option<&mut dyn DifferentiableReward> {
            Some(self)
        }
    }

    impl DifferentiableReward for Brightness {
        fn rewards(&mut self, images: &Tensor, _: &[Prompt]) -> Result<Tensor> {
            let rewards = images.mean_dim([1, 2, 3].as_slice(), false, Kind::Float);
            let factor = Tensor::ones_like(&rewards);
            if let Some(bad) = self.bad {
                let _ = factor.get(bad).fill_(f64::NAN);
            }
            Ok(rewards * factor)
        }
    }

    /// Along random directions in the latents; the loss bends, so the chain rule matters.
    #[test]
    fn gradients_in_latents_are_those_of_finite_differences() {
        let config = config("refl", &["task.preference.samples=4"]);
        let mut trainer = trainer(&config);
        let piece = piece(&mut trainer, 6, 3.0);
        let x_0 = piece.trajectory.x_0();
        let pipeline = &trainer.pipeline;
        let mut judge = |x_0: &Tensor, at_once: usize| {
            let loss = |rewards: &Tensor| (rewards * -1.0 + 2.0).square();
            differentiate(pipeline, &mut trainer.tasks[TASK], x_0, &piece.prompts, at_once, loss).unwrap()
        };
        let whole = judge(x_0, 2);
        let norm = whole.gradient.norm().double_value(&[]);
        for direction in [whole.gradient.shallow_clone(), whole.gradient.sign() * x_0.cos()] {
            let direction = &direction / direction.norm();
            let step = 1e-2;
            let moved = |sign: f64| x_0 + &direction * (sign * step);
            let expected = (judge(&moved(1.0), 2).loss_sum - judge(&moved(-1.0), 2).loss_sum) / (2.0 * step);
            let found = (&whole.gradient * &direction).sum(Kind::Double).double_value(&[]);
            println!("{found:.6} against {expected:.6}, norm {norm:.6}");
            // observed 2e-4 of the norm: pixels that the step takes over the edge of [0, 1]
            assert!((found - expected).abs() < 2e-3 * norm, "{found} instead of {expected}");
        }
        // one picture at a time: the same but for rounding in convolutions of another batch
        let single = judge(x_0, 1);
        assert!((&single.gradient - &whole.gradient).abs().max().double_value(&[]) < 1e-4 * norm);
        let close = single.rewards.iter().zip(&whole.rewards).all(|(a, b)| (a - b).abs() < 1e-5);
        assert!(close, "{:?} {:?}", single.rewards, whole.rewards);
    }

    #[test]
    fn a_bad_sample_adds_nothing_and_harms_nobody() {
        let config = config("refl", &["task.preference.samples=6"]);
        let mut trainer = trainer(&config);
        let piece = piece(&mut trainer, 6, 3.0);
        let mut judge = |bad: Option<i64>| {
            trainer.tasks[TASK].reward = Box::new(Brightness { bad });
            let x_0 = piece.trajectory.x_0();
            let plain = |rewards: &Tensor| rewards.shallow_clone();
            differentiate(&trainer.pipeline, &mut trainer.tasks[TASK], x_0, &piece.prompts, 3, plain).unwrap()
        };
        let (sound, broken) = (judge(None), judge(Some(1)));
        assert!(broken.rewards[1].is_nan());
        assert_eq!((broken.rewards[0], broken.rewards[2]), (sound.rewards[0], sound.rewards[2]));
        assert_eq!(broken.gradient.get(1), sound.gradient.get(1).zeros_like());
        for i in [0, 2] {
            assert_eq!(broken.gradient.get(i), sound.gradient.get(i));
            assert!(sound.gradient.get(i).abs().max().double_value(&[]) > 0.0);
        }
        let others = f64::from(sound.rewards[0]) + f64::from(sound.rewards[2]);
        assert!((broken.loss_sum - others).abs() < 1e-6);
    }
}
