//! Roll-outs: from noise to x_0 by a chain of transitions, kept as a [`Trajectory`].

use anyhow::Result;
use tch::{Kind, Tensor};

use super::{
    recorded::RecordedUNet,
    schedule::Step,
    transition::{self, Noise, Prediction},
};
use crate::{faults, models::unet::UNet, signals};

/// The text of a batch as the U-Net takes it.
#[derive(Debug)]
pub struct Conditioning {
    /// Embeddings f32: `[B, tokens, width]` without guidance, `[2B, tokens, width]` (empty prompts first) with.
    text: Tensor,
    /// g; None for no guidance.
    guidance_scale: Option<f64>,
    batch: i64,
}

impl Conditioning {
    /// `cond` `[B, tokens, width]`, `uncond` `[1, tokens, width]` the empty prompt. With g = 1 the guided output is the
    /// conditional one, so the unconditional half is left out.
    pub fn new(cond: &Tensor, uncond: &Tensor, guidance_scale: f64) -> Self {
        let batch = cond.size()[0];
        if guidance_scale == 1.0 {
            return Conditioning { text: cond.shallow_clone(), guidance_scale: None, batch };
        }
        let empty = uncond.expand([batch, -1, -1], false);
        Conditioning { text: Tensor::cat(&[&empty, cond], 0), guidance_scale: Some(guidance_scale), batch }
    }

    /// The prompts' embeddings alone, f32 `[B, tokens, width]`.
    pub fn prompts(&self) -> Tensor {
        match self.guidance_scale {
            Some(_) => self.text.narrow(0, self.batch, self.batch),
            None => self.text.shallow_clone(),
        }
    }

    /// Both halves of the U-Net's output at `t`, from ONE batched call.
    pub fn predict(&self, unet: &UNet, x_t: &Tensor, t: i64) -> Output {
        let (input, timesteps) = self.inputs(x_t, t);
        self.output(unet.forward(&input, &timesteps, &self.text))
    }

    /// As [`Conditioning::predict`], by a replay; the output holds until the next one.
    pub fn predict_recorded(&self, recorded: &RecordedUNet, unet: &UNet, x_t: &Tensor, t: i64) -> Result<Output> {
        let (input, timesteps) = self.inputs(x_t, t);
        Ok(self.output(recorded.forward(unet, &input, &timesteps, &self.text)?))
    }

    fn inputs(&self, x_t: &Tensor, t: i64) -> (Tensor, Tensor) {
        let (input, rows) = match self.guidance_scale {
            Some(_) => (Tensor::cat(&[x_t, x_t], 0), 2 * self.batch),
            None => (x_t.shallow_clone(), self.batch),
        };
        (input, Tensor::full([rows], t, (Kind::Int64, x_t.device())))
    }

    fn output(&self, output: Tensor) -> Output {
        match self.guidance_scale {
            Some(guidance_scale) => {
                let halves = output.chunk(2, 0);
                Output {
                    eps_uncond: Some(halves[0].shallow_clone()),
                    eps_cond: halves[1].shallow_clone(),
                    guidance_scale,
                }
            }
            None => Output { eps_uncond: None, eps_cond: output, guidance_scale: 1.0 },
        }
    }
}

/// What the U-Net said, `[B,C,H,W]` each.
#[derive(Debug)]
pub struct Output {
    pub eps_uncond: Option<Tensor>,
    pub eps_cond: Tensor,
    pub guidance_scale: f64,
}

impl Output {
    /// The guided output in f32, differentiable.
    pub fn guided(&self) -> Tensor {
        match &self.eps_uncond {
            Some(eps_uncond) => transition::guide(eps_uncond, &self.eps_cond, self.guidance_scale),
            None => self.eps_cond.to_kind(Kind::Float),
        }
    }

    pub fn prediction(&self) -> Prediction<'_> {
        Prediction {
            eps_uncond: self.eps_uncond.as_ref(),
            eps_cond: &self.eps_cond,
            guidance_scale: self.guidance_scale,
        }
    }
}

/// The latents and log-probabilities of a batch's roll-out.
#[derive(Debug)]
pub struct Trajectory {
    /// x_T first, x_0 last: f32 `[B,C,H,W]`, one more than steps.
    pub latents: Vec<Tensor>,
    /// log p_θold of each transition, f32 `[B]`; None where σ = 0.
    pub log_probs: Vec<Option<Tensor>>,
}

impl Trajectory {
    pub fn x_0(&self) -> &Tensor {
        self.latents.last().expect("a trajectory begins with x_T")
    }
}

/// Rolls out all `steps` from `x_t`, without gradients. `noise(i)` is that of step i. With `recorded` the
/// U-Net's calls are replays.
///
/// # Errors
/// A replay that fails; [`signals::Interrupted`] before a step, where what is under way can be dropped.
pub fn roll_out<N: Into<Noise>>(
    unet: &UNet,
    recorded: Option<&RecordedUNet>,
    steps: &[Step],
    x_t: Tensor,
    conditioning: &Conditioning,
    mut noise: impl FnMut(usize) -> N,
) -> Result<Trajectory> {
    let _no_grad = tch::no_grad_guard();
    let mut trajectory = Trajectory { latents: vec![x_t], log_probs: Vec::with_capacity(steps.len()) };
    for (i, step) in steps.iter().enumerate() {
        faults::point("step");
        signals::check()?;
        let x_t = trajectory.x_0();
        let output = match recorded {
            Some(recorded) => conditioning.predict_recorded(recorded, unet, x_t, step.t)?,
            None => conditioning.predict(unet, x_t, step.t),
        };
        let drawn = transition::draw(step, x_t, output.prediction(), &noise(i).into())?;
        trajectory.latents.push(drawn.x_prev);
        trajectory.log_probs.push(drawn.log_prob);
    }
    Ok(trajectory)
}
