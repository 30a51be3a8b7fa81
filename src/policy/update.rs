//! One policy update: the clipped objective's gradient over all lanes, its sum over ranks, one AdamW step.

use anyhow::Result;
use tch::Tensor;

use super::surrogate::{blank_excluded, surrogate, Diagnostics, Objective, Stored};
use crate::{
    diffusion::{
        sampler::{Conditioning, Trajectory},
        schedule::Step,
    },
    models::unet::UNet,
};

/// A lane's samples of one task, rolled out and scored.
pub struct LaneBatch {
    pub conditioning: Conditioning,
    pub trajectory: Trajectory,
    /// f32 `[B]`; NaN excludes a sample.
    pub advantage: Tensor,
}

/// The value whose gradient is that of the objective for one lane at one step, with the diagnostics of this pass.
///
/// The U-Net is called as the roll-out called it (same batch, same composition), so the ratio starts at exactly 1.
pub fn lane_objective(
    unet: &UNet,
    step: &Step,
    batch: &LaneBatch,
    objective: &Objective,
) -> Result<(Tensor, Diagnostics)> {
    let i = step.index;
    let x_t = blank_excluded(&batch.trajectory.latents[i], &batch.advantage);
    let output = batch.conditioning.predict(unet, &x_t, step.t);
    let log_prob_old = batch.trajectory.log_probs[i].as_ref().expect("steps without noise are not trained on");
    let stored =
        Stored { x_t: &x_t, x_prev: &batch.trajectory.latents[i + 1], log_prob_old, advantage: &batch.advantage };
    let result = surrogate(step, stored, output.prediction(), objective)?;
    Ok((result.pseudo_loss(output.prediction()), result.diagnostics))
}
