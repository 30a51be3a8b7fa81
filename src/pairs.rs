//! (Picture, caption) pairs for L_pre, and the loss of one lane on them.

use anyhow::Result;
use tch::Tensor;

use crate::{
    config::{PairData, PretrainConfig},
    diffusion::schedule::Schedule,
    miniature,
    models::pipeline::Pipeline,
    policy::pretraining::{self, Corruption},
    random::{Coordinates, Purpose},
};

/// Pictures of the miniature's pretraining that are drawn from.
const MINIATURE_PAIRS: u64 = 24_000;

/// Which pair a sample gets is a function of (seed, iteration, step, global sample) alone.
pub struct PairSource {
    data: PairData,
    batch_per_lane: usize,
    caption_dropout: f64,
    seed: u64,
}

impl PairSource {
    pub fn new(config: &PretrainConfig, seed: u64) -> Self {
        PairSource {
            data: config.data,
            batch_per_lane: config.batch_per_lane,
            caption_dropout: config.caption_dropout,
            seed,
        }
    }

    /// Pictures f32 `[n, 3, H, W]` in \[−1, 1\] and captions (some of them empty) of the lane's samples.
    fn pairs(&self, iteration: u64, slot: u16, first: usize) -> (Tensor, Vec<String>) {
        let PairData::Miniature = self.data;
        let world = miniature::pretrain::PretrainSettings::default().seed;
        let (mut indices, mut captions) = (Vec::new(), Vec::new());
        for sample in first..first + self.batch_per_lane {
            let at = Coordinates {
                iteration: iteration as u32,
                sample: sample as u32,
                step: slot,
                ..Coordinates::new(self.seed, Purpose::PretrainPair)
            };
            let mut stream = at.stream();
            let index = stream.below(MINIATURE_PAIRS);
            let dropped = stream.uniform() < self.caption_dropout;
            indices.push(index);
            captions.push(if dropped { String::new() } else { miniature::scene::draw(world, index).caption });
        }
        (miniature::pretrain::pictures(world, &indices), captions)
    }

    /// L_pre of `lane`'s pairs, mean over its samples. `slot` tells the steps of an iteration apart.
    pub fn loss(
        &self,
        pipeline: &Pipeline,
        schedule: &Schedule,
        iteration: u64,
        slot: u16,
        lane: usize,
    ) -> Result<Tensor> {
        let first = lane * self.batch_per_lane;
        let (pictures, captions) = self.pairs(iteration, slot, first);
        let z_0 = tch::no_grad(|| pipeline.vae.encode_scaled(&pictures.to_device(pipeline.device)));
        let text = pipeline.embed(&captions)?;
        let at = Corruption::draw(
            self.seed,
            iteration as u32,
            slot,
            first as u32,
            self.batch_per_lane,
            &z_0.size()[1..],
            schedule.alpha_bar().len(),
        );
        Ok(pretraining::loss(&pipeline.unet, schedule, &z_0, &text, &at))
    }
}
