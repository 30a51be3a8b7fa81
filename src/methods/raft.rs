//! RAFT, reward-ranked fine-tuning (Dong et al., arXiv 2304.06767).
//!
//! The current model draws a batch; the best 1/24 of it by reward (rounded down), over all ranks and lanes, is kept; the model is
//! trained on these with the ordinary denoising loss, L = 1/K · Σ_i ‖ε_i − ε_θ(x_{t_i}^i, t_i, c_i)‖² over the K kept.
//! Of equal rewards the sample with the lower global number is kept. What is kept, wherever it was drawn, is shared out in
//! the order of its numbers, as many to each lane, or one more to some.

use std::ops::Range;

use anyhow::{ensure, Context, Result};
use tch::{Device, Tensor};

use super::{
    bearing,
    denoising::{self, LaneSamples},
    judged_batch, InTask, Method,
};
use crate::{
    comm::Communicator,
    config::RaftConfig,
    iteration_log::IterationLog,
    models::pipeline::Pipeline,
    policy::advantage::batch_moments,
    telemetry::names,
    train::{Observe, RollOut, Trainer},
    watch,
};

pub struct Raft {
    pub settings: RaftConfig,
    /// g.
    pub guidance_scale: f64,
}

/// Numbers of the `count` highest of `rewards`, ascending; of equal ones the lower numbers.
///
/// # Errors
/// Fewer are finite.
pub fn best(rewards: &[f32], count: usize) -> Result<Vec<usize>> {
    let mut order: Vec<usize> = (0..rewards.len()).filter(|&i| rewards[i].is_finite()).collect();
    ensure!(order.len() >= count, "{count} samples are to be kept, only {} have a finite reward", order.len());
    // a stable sort: equal rewards stay in the order of their numbers
    order.sort_by(|&a, &b| rewards[b].total_cmp(&rewards[a]));
    order.truncate(count);
    order.sort_unstable();
    Ok(order)
}

/// Which of the `keep` samples that are kept are a lane's.
fn share(keep: usize, lane: usize, lanes: usize) -> Range<usize> {
    keep * lane / lanes..keep * (lane + 1) / lanes
}

/// Prompts and latents of the samples that all ranks keep, in the order of their numbers; a rank's own are `prompts` and
/// `latents`. A collective call.
fn share_out(comm: &dyn Communicator, prompts: &[String], latents: &[f32]) -> Result<(Vec<String>, Vec<f32>)> {
    let (mut all_prompts, mut all_latents) = (Vec::new(), Vec::new());
    for bytes in comm.all_gather_bytes(&serde_json::to_vec(prompts)?)? {
        all_prompts.extend(serde_json::from_slice::<Vec<String>>(&bytes).context("samples of another rank")?);
    }
    for bytes in comm.all_gather_bytes(bytemuck::cast_slice(latents))? {
        all_latents.extend(bytemuck::pod_collect_to_vec::<u8, f32>(&bytes));
    }
    Ok((all_prompts, all_latents))
}

/// Prompts' embeddings, each prompt encoded once.
fn embed(pipeline: &Pipeline, prompts: &[String]) -> Result<Tensor> {
    let mut texts: Vec<&String> = prompts.iter().collect();
    texts.sort_unstable();
    texts.dedup();
    let rows: Vec<i64> = prompts.iter().map(|p| texts.partition_point(|t| *t < p) as i64).collect();
    Ok(pipeline.embed(&texts)?.index_select(0, &Tensor::from_slice(&rows).to_device(pipeline.device)))
}

impl Method for Raft {
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
            unet: None,
            steps: trainer.steps.len(),
            guidance_scale: self.guidance_scale,
            at_once: self.settings.batch,
        };
        let mut drawn: Vec<Tensor> = Vec::new();
        let judged = trainer.sample(task, iteration, &how, log, |_, trajectory| {
            drawn.push(trajectory.x_0().to_device(Device::Cpu));
            Ok(())
        })?;
        observe(trainer, task, None, &[])?;
        let stage = watch::stage("advantage", &config.name);
        let settings = bearing(self.settings.max_bad_fraction);
        let (rewards, _) = judged_batch(trainer, task, &judged, &settings, log)?;
        let keep = config.samples / self.settings.accept_one_in;
        let kept = best(&rewards.compared, keep).in_task(trainer, task)?;
        let of_kept: Vec<f32> = kept.iter().map(|&i| rewards.plain[i]).collect();
        let least = kept.iter().map(|&i| rewards.compared[i]).fold(f32::INFINITY, f32::min);
        log.of_task(&config.name, names::KEPT_REWARD_MEAN, batch_moments(&of_kept, &settings)?.mean);
        log.of_task(&config.name, names::LEAST_KEPT_REWARD, f64::from(least));

        let (per_lane, mine) = (config.samples / trainer.lanes.count, trainer.lanes.mine());
        let first = mine.start * per_lane;
        let of_mine: Vec<i64> =
            kept.iter().filter(|&&i| (first..mine.end * per_lane).contains(&i)).map(|&i| (i - first) as i64).collect();
        let latents = Tensor::cat(&drawn, 0).index_select(0, &Tensor::from_slice(&of_mine));
        let prompts: Vec<String> = of_mine.iter().map(|&i| judged.prompts[i as usize].text.clone()).collect();
        let flat = Vec::<f32>::try_from(&latents.contiguous().view([-1]))?;
        let (prompts, latents) = share_out(trainer.comm, &prompts, &flat)?;
        drop(stage);

        let lanes = trainer.lanes.count;
        let shape = trainer.pipeline.latent_shape();
        let row = shape.iter().product::<i64>() as usize;
        let device = trainer.pipeline.device;
        let samples = mine.clone().map(|lane| {
            let kept = share(keep, lane, lanes);
            let (first, count) = (kept.start, kept.len() as i64);
            let x_0 = Tensor::from_slice(&latents[kept.start * row..kept.end * row]);
            Ok(LaneSamples {
                first,
                x_0: x_0.view([count, shape[0], shape[1], shape[2]]).to_device(device),
                text: embed(&trainer.pipeline, &prompts[kept])?,
                weights: Tensor::ones([count], (tch::Kind::Float, device)),
            })
        });
        let samples = samples.collect::<Result<Vec<_>>>()?;
        let factor = config.weight / keep as f64;
        denoising::train(trainer, (task, iteration), log, &samples, keep.div_ceil(lanes), factor, self.settings.updates)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        methods::testing::{config, trainer, TASK},
        random::{Coordinates, Purpose},
    };

    #[test]
    fn the_best_are_kept_and_ties_go_to_the_lower_number() {
        assert_eq!(best(&[1.0, 5.0, 3.0, 5.0, 4.0], 2).unwrap(), [1, 3]);
        assert_eq!(best(&[2.0; 6], 3).unwrap(), [0, 1, 2]);
        assert_eq!(best(&[0.0, 1.0, -0.0, 0.0], 3).unwrap(), [0, 1, 3]);
        assert_eq!(best(&[f32::NAN, -1.0, f32::INFINITY, -3.0], 2).unwrap(), [1, 3]);
        assert!(best(&[f32::NAN, 1.0], 2).unwrap_err().to_string().contains("only 1 have a finite reward"));
    }

    /// Against a slow selection, on rewards with many ties: no sample left out is better than one kept.
    #[test]
    fn exactly_the_best_24th_of_a_large_batch() {
        let mut stream = Coordinates::new(4, Purpose::Sample).stream();
        let rewards: Vec<f32> = (0..4800).map(|_| stream.below(400) as f32 / 7.0).collect();
        let kept = best(&rewards, 200).unwrap();
        assert_eq!(kept.len(), 200);
        assert!(kept.windows(2).all(|w| w[0] < w[1]));
        let better = |a: usize, b: usize| rewards[a] > rewards[b] || rewards[a] == rewards[b] && a < b;
        for &k in &kept {
            assert!((0..4800).filter(|&other| better(other, k)).count() < 200);
        }
    }

    /// The paper's sizes: 32 drawn by each of 128 lanes, one in 24 of all is kept.
    #[test]
    fn what_is_kept_is_shared_out_whole_and_evenly() {
        let (keep, lanes) = (128 * 32 / 24, 128);
        let shares: Vec<Range<usize>> = (0..lanes).map(|lane| share(keep, lane, lanes)).collect();
        assert_eq!((keep, shares[0].start, shares[127].end), (170, 0, keep));
        assert!(shares.windows(2).all(|pair| pair[0].end == pair[1].start));
        assert!(shares.iter().all(|share| (1..=2).contains(&share.len())), "{shares:?}");
        assert_eq!(share(16, 3, 8), 6..8);
    }

    /// What an iteration keeps, found again from a roll-out of its own.
    #[test]
    fn an_iteration_keeps_the_best_of_its_own_samples() {
        let settings = ["task.preference.samples=96", "rollout.steps=3", "update.learning_rate=0.0", "method.batch=7"];
        let config = config("raft", &settings);
        let mut trainer = trainer(&config);
        let metrics = trainer.iterate(3, &mut |_, _, _, _| Ok(())).unwrap();
        let how = RollOut { unet: None, steps: 3, guidance_scale: config.rollout.guidance_scale, at_once: 7 };
        let mut log = IterationLog::new(3, Device::Cpu);
        let mut rewards = trainer.sample(TASK, 3, &how, &mut log, |_, _| Ok(())).unwrap().rewards;
        assert_eq!(rewards.len(), 96);
        rewards.sort_by(|a, b| b.total_cmp(a));
        let mean = rewards[..4].iter().map(|&r| f64::from(r)).sum::<f64>() / 4.0;
        let kept = metrics.get("preference/kept_reward_mean").unwrap();
        assert!((kept - mean).abs() < 1e-12, "{kept} instead of {mean}");
        assert_eq!(metrics.get("preference/least_kept_reward"), Some(f64::from(rewards[3])));
        assert!(metrics.get("preference/reward_mean").unwrap() < kept);
    }

    #[test]
    fn prompts_are_embedded_in_their_order() {
        let config = config("raft", &[]);
        let trainer = trainer(&config);
        let prompts = ["b", "a", "b"].map(String::from);
        let together = embed(&trainer.pipeline, &prompts).unwrap();
        for (i, prompt) in prompts.iter().enumerate() {
            let alone = trainer.pipeline.embed(&[prompt]).unwrap().get(0);
            let gap = (together.get(i as i64) - alone).abs().max().double_value(&[]);
            // rounding in products of another batch
            assert!(gap < 1e-5, "{prompt}: {gap}");
        }
    }
}
