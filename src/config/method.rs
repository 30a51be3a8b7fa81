//! `[method]`: how a model is trained, and the settings that only this way has.

use anyhow::{ensure, Result};
use serde::{Deserialize, Serialize};

use super::{Config, Normalisation};

/// The paper's method and its four rivals; the mathematics is in [`crate::methods`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case", deny_unknown_fields)]
pub enum MethodConfig {
    /// Clipped policy gradients (Algorithm 1).
    Ours(OursConfig),
    /// Reward feedback learning: a gradient through one late denoising step.
    Refl(ReflConfig),
    /// The denoising loss on the original model's samples, weighted by their rewards.
    RewardWeighted(RewardWeightedConfig),
    /// The denoising loss on the best of the model's own samples.
    Raft(RaftConfig),
    /// DRaFT-LV: a gradient through the last denoising step.
    Draft(DraftConfig),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OursConfig {
    /// Denoising steps trained on per task and iteration, one AdamW step each.
    pub timesteps: usize,
    /// ε of Eq. 7.
    pub clip_range: f64,
    /// Denoising steps with |∂μ/∂eps|/σ above this are never trained on; 0 excludes none.
    pub max_sensitivity: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReflConfig {
    /// T1 and T2: the step with the gradient is one of the T1-th to the T2-th from the end.
    pub last_steps: [usize; 2],
    /// λ.
    pub scale: f64,
    /// The loss is λ·ReLU(offset − r): rewards above it are good enough.
    pub offset: f64,
    /// g while training; evaluations use `rollout.guidance_scale`.
    pub guidance_scale: f64,
    /// Pictures that are decoded and judged with gradients at once.
    pub decode_batch: usize,
    /// The run stops where more than this share of a batch's rewards is not finite.
    pub max_bad_fraction: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewardWeightedConfig {
    /// AdamW steps per task and iteration, each with noise of its own.
    pub updates: usize,
    /// As in [`ReflConfig`].
    pub max_bad_fraction: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RaftConfig {
    /// One in so many samples is kept (the acceptance ratio's inverse).
    pub accept_one_in: usize,
    /// Samples drawn at once.
    pub batch: usize,
    /// AdamW steps on what was kept, per task and iteration, each with noise of its own.
    pub updates: usize,
    /// As in [`ReflConfig`].
    pub max_bad_fraction: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DraftConfig {
    /// K: the gradient goes through the last K steps.
    pub truncation: usize,
    /// n: how often the final sample is noised again, for gradients of lower variance (K = 1 only); 0 for never.
    pub renoisings: usize,
    /// As in [`ReflConfig`].
    pub decode_batch: usize,
    /// As in [`ReflConfig`].
    pub max_bad_fraction: f64,
}

impl MethodConfig {
    /// The method's name in configs.
    pub fn name(&self) -> &'static str {
        match self {
            MethodConfig::Ours(_) => "ours",
            MethodConfig::Refl(_) => "refl",
            MethodConfig::RewardWeighted(_) => "reward_weighted",
            MethodConfig::Raft(_) => "raft",
            MethodConfig::Draft(_) => "draft",
        }
    }

    /// AdamW steps per task and iteration, without those of L_pre alone.
    pub fn updates(&self) -> usize {
        match self {
            MethodConfig::Ours(ours) => ours.timesteps,
            MethodConfig::RewardWeighted(weighted) => weighted.updates,
            MethodConfig::Raft(raft) => raft.updates,
            MethodConfig::Refl(_) | MethodConfig::Draft(_) => 1,
        }
    }

    /// Whether it back-propagates through the reward.
    pub fn needs_gradient_of_reward(&self) -> bool {
        matches!(self, MethodConfig::Refl(_) | MethodConfig::Draft(_))
    }

    pub(super) fn validate(&self, config: &Config) -> Result<()> {
        match self {
            MethodConfig::Ours(ours) => ours.validate(config)?,
            MethodConfig::Refl(refl) => refl.validate(config)?,
            MethodConfig::RewardWeighted(_) => {}
            MethodConfig::Raft(raft) => raft.validate(config)?,
            MethodConfig::Draft(draft) => draft.validate(config)?,
        }
        let name = self.name();
        let is_ours = matches!(self, MethodConfig::Ours(_));
        ensure!(is_ours || config.advantage.is_none(), "[advantage] belongs to method \"ours\", not to \"{name}\"");
        ensure!(
            is_ours || config.trajectories.every == 0,
            "trajectories.every = {}: method \"{name}\" keeps no trajectories, it must be 0",
            config.trajectories.every
        );
        Ok(())
    }
}

impl OursConfig {
    fn validate(&self, config: &Config) -> Result<()> {
        let steps = config.rollout.steps;
        ensure!(
            self.timesteps <= steps,
            "method.timesteps = {} must be in 1..={steps} (rollout.steps)",
            self.timesteps
        );
        ensure!(config.rollout.eta > 0.0, "rollout.eta must be above 0: without noise there is no policy gradient");
        let a = config.advantage.as_ref();
        let a = a.ok_or_else(|| anyhow::anyhow!("[advantage] is missing: method \"ours\" needs it"))?;
        ensure!(
            a.normalisation == Normalisation::Batch || a.prompt_min_count <= a.prompt_buffer,
            "advantage.prompt_min_count = {} is above advantage.prompt_buffer = {}: no prompt would ever be compared with its \
             own rewards",
            a.prompt_min_count,
            a.prompt_buffer
        );
        Ok(())
    }
}

impl ReflConfig {
    fn validate(&self, config: &Config) -> Result<()> {
        let ([first, last], steps) = (self.last_steps, config.rollout.steps);
        ensure!(
            first <= last && last <= steps,
            "method.last_steps = [{first}, {last}] must ascend within 1..={steps} (rollout.steps)"
        );
        Ok(())
    }
}

impl RaftConfig {
    fn validate(&self, config: &Config) -> Result<()> {
        let lanes = config.run.lanes;
        for (_, task) in config.trained_tasks() {
            let kept = task.samples / self.accept_one_in;
            ensure!(
                kept >= lanes,
                "task.{}.samples = {}: one in method.accept_one_in = {} is {kept}, and every one of run.lanes = {lanes} needs one \
                 to train on",
                task.name,
                task.samples,
                self.accept_one_in
            );
        }
        Ok(())
    }
}

impl DraftConfig {
    fn validate(&self, config: &Config) -> Result<()> {
        let steps = config.rollout.steps;
        ensure!(
            self.truncation <= steps,
            "method.truncation = {} must be in 1..={steps} (rollout.steps)",
            self.truncation
        );
        ensure!(
            self.renoisings == 0 || self.truncation == 1,
            "method.renoisings = {}: only the last step can be taken again, method.truncation must be 1",
            self.renoisings
        );
        ensure!(config.rollout.eta == 0.0, "rollout.eta must be 0: method \"draft\" rolls out deterministically");
        ensure!(config.lora.rank > 0, "lora.rank must be above 0 (the paper: 32): method \"draft\" trains LoRA");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::config::testing::error;

    #[test]
    fn impossible_settings_are_refused() {
        for (name, setting, wanted) in [
            ("refl", "method.last_steps=[0, 2]", "method.last_steps.0 = 0 must be in 1..=1000"),
            ("refl", "method.last_steps=[3, 2]", "method.last_steps"),
            ("refl", "method.last_steps=[1, 7]", "within 1..=6"),
            ("refl", "method.scale=0.0", "method.scale"),
            ("refl", "method.offset=nan", "method.offset"),
            ("refl", "method.decode_batch=0", "method.decode_batch"),
            ("refl", "method.max_bad_fraction=1.5", "method.max_bad_fraction = 1.5"),
            (
                "preference",
                "advantage={ normalisation = 'per_prompt', epsilon = 1e-8, clip = 5.0, max_bad_fraction = 0.1, prompt_buffer = 8, \
                 prompt_min_count = 9 }",
                "advantage.prompt_min_count = 9 is above",
            ),
            ("refl", "trajectories.every=4", "trajectories.every = 4"),
            ("refl", "method.clip_range=1.0", "unknown key clip_range"),
            ("refl", "advantage.clip=1.0", "no section advantage"),
            ("reward-weighted", "method.updates=0", "method.updates"),
            ("raft", "method.accept_one_in=0", "method.accept_one_in"),
            ("raft", "method.batch=0", "method.batch"),
            ("raft", "task.preference.samples=96", "one in method.accept_one_in = 24 is 4, and every one of run.lanes = 8 needs"),
            ("draft", "method.truncation=7", "method.truncation = 7"),
            ("draft", "method.truncation=2", "method.renoisings = 2"),
            ("draft", "rollout.eta=1.0", "rollout.eta must be 0"),
            ("draft", "lora.rank=0", "lora.rank must be above 0 (the paper: 32)"),
            ("preference", "method={ name = 'reinforce' }", "unknown variant `reinforce`, expected one of `ours`"),
            (
                "preference",
                "method={ name = 'reward_weighted', updates = 1, max_bad_fraction = 0.1 }",
                "[advantage] belongs to method \"ours\"",
            ),
            (
                "raft",
                "method={ name = 'ours', timesteps = 1, clip_range = 1e-4, max_sensitivity = 0.0 }",
                "[advantage] is missing",
            ),
            ("raft", "method={ name = 'reward_weighted', updates = 1 }", "missing field `max_bad_fraction`"),
        ] {
            let e = error(name, &[setting]);
            assert!(e.contains(wanted) && !e.contains('\n'), "{name} {setting}: {e}");
        }
        for name in ["refl", "reward-weighted", "raft", "draft", "preference"] {
            assert_eq!(error(name, &[]), "none");
        }
    }
}
