//! The arguments by which commands that draw pictures are told how.

use super::numbers::{whole, within};
use crate::{
    config::bounds::{ETA, GUIDANCE},
    draw::Drawing,
};

#[derive(clap::Args, Clone, Debug)]
pub struct DrawingArgs {
    /// DDIM steps.
    #[arg(long, default_value_t = 50, value_name = "N", value_parser = whole::<usize>(1, 1000))]
    steps: usize,
    /// Guidance scale g; 1 for no guidance.
    #[arg(long, default_value_t = 7.0, value_name = "G", value_parser = within(GUIDANCE))]
    guidance: f64,
    /// Noise of the transitions: 0 is deterministic DDIM.
    #[arg(long, default_value_t = 0.0, value_parser = within(ETA))]
    eta: f64,
    /// What to steer away from.
    #[arg(long, default_value = "", value_name = "TEXT")]
    negative: String,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Height of the pictures in pixels [default: the model's own].
    #[arg(long, value_name = "PIXELS", value_parser = whole::<i64>(1, 16_384))]
    height: Option<i64>,
    /// Width of the pictures in pixels [default: the model's own].
    #[arg(long, value_name = "PIXELS", value_parser = whole::<i64>(1, 16_384))]
    width: Option<i64>,
}

impl DrawingArgs {
    pub fn drawing(&self) -> Drawing {
        Drawing {
            seed: self.seed,
            steps: self.steps,
            guidance_scale: self.guidance,
            eta: self.eta,
            negative: self.negative.clone(),
            height: self.height,
            width: self.width,
        }
    }
}
