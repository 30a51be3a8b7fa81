//! Rewards r(x_0, c): one reward per file.

use anyhow::{ensure, Result};
use tch::Tensor;

use crate::prompts::Prompt;

pub mod colorfulness;
pub mod composition;
pub mod ita;
pub mod miniature_detector;
pub mod miniature_skin_tone;
pub mod parity;
pub mod random;
pub mod registry;

/// What a reward says of one batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    /// One reward per image, higher is better. A value that is not finite marks a bad sample: it is excluded from
    /// the statistics and from the update, counted and logged.
    pub rewards: Vec<f32>,
    /// Named values to log, one per image or one per group each (for example `miss_rate`); averaged over the batch.
    pub diagnostics: Vec<(String, Vec<f32>)>,
}

/// r(x_0, c) of the paper: scores decoded pictures against their prompts.
pub trait Reward {
    /// Name in logs and tables.
    fn name(&self) -> &str;
    /// How many consecutive pictures are judged together (the minibatch of Eq. 12); 1 for ordinary rewards.
    fn group(&self) -> usize {
        1
    }
    /// Scores `images`, f32 [n, 3, H, W] with values in [0, 1], where image i was made for `prompts[i]`; n is a
    /// multiple of [`Reward::group`] and the pictures of a group are consecutive.
    fn score(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Scores>;
}

/// Errors unless `images` is [n, 3, H, W] with one prompt per picture; gives n.
fn check_batch(images: &Tensor, prompts: &[Prompt]) -> Result<usize> {
    let size = images.size();
    ensure!(size.len() == 4 && size[1] == 3, "a reward needs pictures [n, 3, H, W], not {size:?}");
    ensure!(size[0] as usize == prompts.len(), "{} pictures and {} prompts", size[0], prompts.len());
    Ok(prompts.len())
}
