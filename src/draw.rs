//! Pictures from prompts by a model as it is: what `sample` and `human-eval` draw.

use anyhow::{bail, Context, Result};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    diffusion::schedule::{Schedule, Step},
    evaluate::to_picture,
    models::pipeline::Pipeline,
    prompts::Prompt,
    task::{NoiseOf, Roller},
    telemetry::Picture,
};

/// How pictures are drawn, by whatever model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drawing {
    pub seed: u64,
    /// DDIM steps.
    pub steps: usize,
    /// g; 1 for no guidance.
    pub guidance_scale: f64,
    /// Noise of the transitions: 0 is deterministic DDIM.
    pub eta: f64,
    /// What to steer away from.
    pub negative: String,
    /// In pixels; the model's own where there is none.
    pub height: Option<i64>,
    pub width: Option<i64>,
}

/// A model with everything set up to draw.
pub struct Painter<'a> {
    pipeline: &'a Pipeline,
    steps: Vec<Step>,
    guidance_scale: f64,
    negative: Tensor,
    latent_shape: [i64; 3],
    noise: NoiseOf,
}

impl<'a> Painter<'a> {
    /// `origin` names the model in errors.
    pub fn new(pipeline: &'a Pipeline, origin: &str, drawing: &Drawing) -> Result<Self> {
        let schedule = Schedule::of_model(&pipeline.scheduler)
            .with_context(|| format!("{origin}: scheduler/scheduler_config.json"))?;
        Ok(Painter {
            latent_shape: latent_shape(pipeline, drawing)?,
            steps: schedule.steps(drawing.steps, drawing.eta)?,
            negative: pipeline.embed(&[drawing.negative.as_str()])?,
            noise: NoiseOf { seed: drawing.seed, iteration: u32::MAX, task: u8::MAX },
            guidance_scale: drawing.guidance_scale,
            pipeline,
        })
    }

    /// Height and width of the pictures.
    pub fn size(&self) -> (i64, i64) {
        let factor = self.pipeline.vae.config.downscale();
        (self.latent_shape[1] * factor, self.latent_shape[2] * factor)
    }

    /// The picture of `prompt` with noise number `sample`: drawn by itself, since libtorch's last bits depend on the
    /// batch.
    pub fn picture(&self, prompt: &str, sample: usize) -> Result<Picture> {
        let roller = Roller {
            pipeline: self.pipeline,
            unet: &self.pipeline.unet,
            steps: &self.steps,
            empty_prompt: &self.negative,
            guidance_scale: self.guidance_scale,
            latent_shape: self.latent_shape,
            recorded: None,
        };
        let conditioning = roller.conditioning(&[Prompt { text: prompt.to_owned(), objects: Vec::new() }])?;
        let trajectory = roller.roll_out(&conditioning, self.noise, sample, 1)?;
        to_picture(&tch::no_grad(|| self.pipeline.vae.decode_scaled(trajectory.x_0())).get(0))
    }
}

/// Latents of the asked size.
fn latent_shape(pipeline: &Pipeline, drawing: &Drawing) -> Result<[i64; 3]> {
    let [channels, height, width] = pipeline.latent_shape();
    let factor = pipeline.vae.config.downscale();
    let side = |name: &str, wanted: Option<i64>, own: i64| match wanted {
        None => Ok(own),
        Some(pixels) if pixels > 0 && pixels % factor == 0 => Ok(pixels / factor),
        Some(pixels) => bail!("--{name} {pixels} must be a positive multiple of {factor}"),
    };
    Ok([channels, side("height", drawing.height, height)?, side("width", drawing.width, width)?])
}
