//! The reward-weighted likelihood: the original model's samples, each as heavy as it is liked.
//!
//! L = 1/N · Σ_i r̂_i · ‖ε_i − ε_θ(x_{t_i}^i, t_i, c_i)‖² + β·L_pre, with r̂ = (r − min r)/(max r − min r) over the task's global
//! batch of the iteration, N its usable samples, and x_0^i made on the fly by the model that training began with.
//! A reward that is not finite has weight 0 and is no part of minimum and maximum. β·L_pre is `[pretrain]`, `combined`.

use anyhow::Result;
use tch::Tensor;

use super::{
    bearing,
    denoising::{self, LaneSamples},
    judged_batch, Method,
};
use crate::{
    config::RewardWeightedConfig,
    iteration_log::IterationLog,
    models::unet::UNet,
    train::{Observe, RollOut, Trainer},
    watch,
};

pub struct RewardWeighted {
    pub settings: RewardWeightedConfig,
    /// g.
    pub guidance_scale: f64,
    /// The model that training began with; a resumed run reads it anew.
    pub original: UNet,
}

/// Rewards on the scale from 0 (the batch's least) to 1 (its highest). Where all are equal none is better: all 0. Weight 0
/// where a reward is not finite.
pub fn min_max(rewards: &[f32]) -> Vec<f32> {
    let finite = || rewards.iter().copied().filter(|reward| reward.is_finite()).map(f64::from);
    let (least, highest) = finite().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), r| (a.min(r), b.max(r)));
    let weight = |reward: f32| match reward.is_finite() && highest > least {
        true => ((f64::from(reward) - least) / (highest - least)) as f32,
        false => 0.0,
    };
    rewards.iter().map(|&reward| weight(reward)).collect()
}

impl Method for RewardWeighted {
    fn train_on(
        &self,
        trainer: &mut Trainer,
        task: usize,
        iteration: u64,
        log: &mut IterationLog,
        observe: &mut Observe,
    ) -> Result<()> {
        let config = &trainer.config.tasks[task];
        let how = RollOut {
            unet: Some(&self.original),
            steps: trainer.steps.len(),
            guidance_scale: self.guidance_scale,
            at_once: usize::MAX,
        };
        let mut lanes: Vec<(Tensor, Tensor)> = Vec::new();
        let judged = trainer.sample(task, iteration, &how, log, |conditioning, trajectory| {
            lanes.push((trajectory.x_0().shallow_clone(), conditioning.prompts()));
            Ok(())
        })?;
        observe(trainer, task, None, &[])?;
        let stage = watch::stage("advantage", &config.name);
        let settings = bearing(self.settings.max_bad_fraction);
        let (rewards, moments) = judged_batch(trainer, task, &judged, &settings, log)?;
        let weights = min_max(&rewards.compared);
        drop(stage);

        let (per_lane, first_lane) = (config.samples / trainer.lanes.count, trainer.lanes.mine().start);
        let device = trainer.pipeline.device;
        let samples: Vec<LaneSamples> = lanes
            .into_iter()
            .zip(weights.chunks(per_lane).enumerate().skip(first_lane))
            .map(|((x_0, text), (lane, weights))| LaneSamples {
                first: lane * per_lane,
                x_0,
                text,
                weights: Tensor::from_slice(weights).to_device(device),
            })
            .collect();
        let factor = config.weight / (config.samples - moments.bad_count) as f64;
        denoising::train(trainer, (task, iteration), log, &samples, per_lane, factor, self.settings.updates)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        methods::testing::{config, trainer},
        telemetry::names,
    };

    #[test]
    fn weights_are_the_min_max_map() {
        assert_eq!(min_max(&[1.0, 3.0, 2.0, 5.0]), [0.0, 0.5, 0.25, 1.0]);
        assert_eq!(min_max(&[-2.0, f32::NAN, 2.0, f32::INFINITY, 0.0]), [0.0, 0.0, 1.0, 0.0, 0.5]);
        assert_eq!(min_max(&[7.0; 3]), [0.0; 3]);
        assert_eq!(min_max(&[f32::NAN; 2]), [0.0; 2]);
        // the whole range of f32 without an overflow
        assert_eq!(min_max(&[f32::MIN, 0.0, f32::MAX]), [0.0, 0.5, 1.0]);
    }

    /// Rewards of the second iteration after a first one with a learning rate that changes everything, and with none.
    #[test]
    fn samples_are_of_the_original_weights() {
        let second = |name: &str, settings: &[&str]| {
            [0.0, 1e-2].map(|rate| {
                let rate = format!("update.learning_rate={rate:?}");
                let more = ["update.warmup_steps=0", "update.max_grad_norm=0.0", rate.as_str()];
                let config = config(name, &[settings, &more].concat());
                let mut trainer = trainer(&config);
                let mut rewards = (0..2).map(|i| {
                    let metrics = trainer.iterate(i, &mut |_, _, _, _| Ok(())).unwrap();
                    metrics.get(&names::reward_mean("preference")).unwrap()
                });
                (rewards.next().unwrap(), rewards.next().unwrap())
            })
        };
        for adapters in ["lora.rank=0", "lora.rank=2"] {
            let small = ["task.preference.samples=4", "rollout.steps=2", adapters];
            let [still, moved] = second("reward-weighted", &small);
            assert_eq!(still, moved, "{adapters}");
        }
        let [still, moved] = second("raft", &["task.preference.samples=48", "rollout.steps=2"]);
        assert_eq!(still.0, moved.0);
        assert_ne!(still.1, moved.1, "the weights did not change");
    }
}
