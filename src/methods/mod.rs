//! The paper's method and the four that it is compared with (Table 6). Each is what happens to one task in one iteration;
//! sampling, lanes, the optimizer's step, L_pre, checkpoints and logs are [`crate::train`]'s and the same for all.
//!
//! | method | samples of | what is minimised |
//! |---|---|---|
//! | [`ours`] | the current model | the clipped objective of Eq. 7, a few timesteps of every sample |
//! | [`refl`] | the current model, up to one of the last steps | λ·ReLU(offset − r(x̂_0)), through that step, VAE and reward |
//! | [`reward_weighted`] | the original model | r̂·‖ε − ε_θ‖², r̂ the reward on the batch's scale from 0 to 1 |
//! | [`raft`] | the current model | ‖ε − ε_θ‖² on the best 1/24 |
//! | [`draft`] | the current model, deterministically | −r(x_0), through the last step, VAE and reward |
//!
//! Each one's β·L_pre is `[pretrain]`. All randomness is a function of (seed, purpose, iteration, task, global sample,
//! step), and gradients are sums over lanes: the same bits at 1, 2 and 4 ranks.

mod denoising;
pub mod draft;
pub mod ours;
pub mod raft;
pub mod refl;
pub mod reward_weighted;
#[cfg(test)]
pub(crate) mod testing;
mod through_reward;

use std::rc::Rc;

use anyhow::{bail, Context, Result};

use crate::{
    config::{Config, MethodConfig, RewardConfig},
    diffusion::schedule::Step,
    iteration_log::IterationLog,
    models::pipeline::Pipeline,
    policy::advantage::{batch_moments, AdvantageSettings, BatchMoments},
    task::Task,
    telemetry::names,
    train::{GlobalRewards, Judged, Observe, Trainer},
};

/// What happens to a task in an iteration.
pub trait Method {
    /// Samples, and changes the weights. A collective call.
    fn train_on(
        &self,
        trainer: &mut Trainer,
        task: usize,
        iteration: u64,
        log: &mut IterationLog,
        observe: &mut Observe,
    ) -> Result<()>;
}

/// The config's method, before any training: `pipeline` has the model's own weights.
///
/// # Errors
/// Too few steps to train on.
pub fn build(config: &Config, pipeline: &Pipeline, steps: &[Step]) -> Result<Rc<dyn Method>> {
    check_steps(config, steps)?;
    let guidance_scale = config.rollout.guidance_scale;
    Ok(match config.method.clone() {
        MethodConfig::Ours(settings) => Rc::new(ours::Ours::new(settings, config)?),
        MethodConfig::Refl(settings) => Rc::new(refl::Refl { settings }),
        MethodConfig::RewardWeighted(settings) => {
            Rc::new(reward_weighted::RewardWeighted { settings, guidance_scale, original: pipeline.frozen_unet()? })
        }
        MethodConfig::Raft(settings) => Rc::new(raft::Raft { settings, guidance_scale }),
        MethodConfig::Draft(settings) => Rc::new(draft::Draft { settings, guidance_scale }),
    })
}

/// Whether the method can train with these steps.
///
/// # Errors
/// See [`ours::trainable_steps`].
pub fn check_steps(config: &Config, steps: &[Step]) -> Result<()> {
    match &config.method {
        MethodConfig::Ours(settings) => ours::trainable_steps(steps, settings).map(drop),
        _ => Ok(()),
    }
}

/// Whether the method can train on this task's reward; tried with the model's pictures.
///
/// # Errors
/// As [`check_gradient`]; a trial gradient fails.
pub fn check_reward(config: &Config, pipeline: &Pipeline, task: &mut Task) -> Result<()> {
    check_gradient(config, task)?;
    match config.method.needs_gradient_of_reward() && task.config.train {
        true => through_reward::try_out(pipeline, task),
        false => Ok(()),
    }
}

/// Whether this task's reward is differentiable where the method asks for it.
///
/// # Errors
/// It is not, and the method needs its gradient.
pub fn check_gradient(config: &Config, task: &mut Task) -> Result<()> {
    let needed = config.method.needs_gradient_of_reward() && task.config.train;
    if !needed || task.reward.differentiable().is_some() {
        return Ok(());
    }
    let why = match &task.config.reward {
        RewardConfig::Sum { normalise: true, .. } => ": its parts are normalised over the batch",
        RewardConfig::Sum { .. } => ": a part of it is not",
        _ => "",
    };
    bail!(
        "task.{}.reward: {} is not differentiable{why}; method \"{}\" needs a gradient of the reward",
        task.config.name,
        task.config.reward.name()?,
        config.method.name()
    )
}

/// How many rewards that are not finite a method bears.
fn bearing(max_bad_fraction: f64) -> AdvantageSettings {
    AdvantageSettings { max_bad_fraction, ..AdvantageSettings::default() }
}

/// The global batch's rewards with their moments, which are logged. A collective call.
fn judged_batch(
    trainer: &Trainer,
    task: usize,
    judged: &Judged,
    settings: &AdvantageSettings,
    log: &mut IterationLog,
) -> Result<(GlobalRewards, BatchMoments)> {
    let config = &trainer.config.tasks[task];
    let rewards = trainer.gather_rewards(task, judged, settings)?;
    let moments = batch_moments(&rewards.plain, settings).in_task(trainer, task)?;
    log.rewards(&config.name, &moments, config.samples);
    let spread = batch_moments(&rewards.compared, settings).in_task(trainer, task)?.std;
    log.of_task(&config.name, names::NO_SIGNAL, if spread == 0.0 { 1.0 } else { 0.0 });
    Ok((rewards, moments))
}

/// This task in errors.
trait InTask<T> {
    fn in_task(self, trainer: &Trainer, task: usize) -> Result<T>;
}

impl<T> InTask<T> for Result<T> {
    fn in_task(self, trainer: &Trainer, task: usize) -> Result<T> {
        self.with_context(|| format!("task {}", trainer.tasks[task].config.name))
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::testing::config;
    use crate::{comm::Local, run::load_for_training, train::Trainer};

    #[test]
    fn a_reward_without_a_gradient_is_refused_by_name() {
        let random = "task.preference.reward={ name = 'random' }";
        let jpeg = "{ weight = 1.0, reward = { name = 'jpeg_compressibility' } }";
        let color = "{ weight = 1.0, reward = { name = 'colorfulness' } }";
        let sum = |normalise: bool, parts: &str| {
            format!("task.preference.reward={{ name = 'sum', normalise = {normalise}, parts = [{parts}] }}")
        };
        let error = |method: &str, settings: &[&str]| {
            let config = config(method, settings);
            let pipeline = load_for_training(&config, &Local, Device::Cpu).unwrap();
            let refused = Trainer::new(&config, &Local, pipeline).err();
            refused.map_or("none".to_string(), |e| format!("{e:#}"))
        };
        for method in ["refl", "draft"] {
            for (settings, wanted) in [
                (vec![random.to_string()], "task.preference.reward: random is not differentiable; method"),
                (vec![sum(false, &format!("{color}, {jpeg}"))], "sum is not differentiable: a part of it is not"),
                (vec![sum(true, color)], "sum is not differentiable: its parts are normalised"),
                (
                    vec!["task.preference.train=false".to_string(), "task.parity.train=true".to_string()],
                    "task.parity.reward: parity is not differentiable",
                ),
                (vec![sum(false, color)], "none"),
                (vec!["task.composition.train=true".to_string()], "none"),
            ] {
                let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
                let e = error(method, &settings);
                assert!(e.contains(wanted) && !e.contains('\n'), "{method} {settings:?}: {e}");
                assert!(e == "none" || e.contains(&format!("method \"{method}\"")), "{e}");
            }
        }
        for method in ["raft", "reward-weighted", "preference"] {
            assert_eq!(error(method, &[random]), "none", "{method}");
        }
    }
}
