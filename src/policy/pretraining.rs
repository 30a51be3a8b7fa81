//! L_pre (Eq. 8, 9): the denoising loss of pretraining, the regulariser of the RL objective.

use tch::{Kind, Tensor};

use crate::{
    diffusion::schedule::{PredictionType, Schedule},
    models::unet::UNet,
    random::Coordinates,
};

/// What a denoising loss is measured at: timesteps and noise of a batch.
pub struct Corruption {
    /// Timesteps, uniform in 0..T, one per sample.
    pub t: Vec<i64>,
    /// ε ~ N(0, 1), f32 [B, C, H, W].
    pub noise: Tensor,
}

impl Corruption {
    /// For `count` samples from that of `first` on; a function of its coordinates alone.
    pub fn draw(first: Coordinates, count: usize, shape: &[i64], train_steps: usize) -> Self {
        let row: usize = shape.iter().product::<i64>() as usize;
        let mut values = vec![0f32; row * count];
        let mut t = Vec::with_capacity(count);
        for (i, out) in values.chunks_mut(row).enumerate() {
            let mut stream = Coordinates { sample: first.sample + i as u32, ..first }.stream();
            t.push(stream.below(train_steps as u64) as i64);
            stream.fill_normal(out);
        }
        let mut size = vec![count as i64];
        size.extend_from_slice(shape);
        Corruption { t, noise: Tensor::from_slice(&values).view(size.as_slice()) }
    }
}

/// Mean over the batch and all latent elements of ‖ε − ε_θ(z_t, t, text)‖², z_t = √ᾱ_t·z_0 + √(1−ᾱ_t)·ε.
///
/// `z_0` f32 [B, C, H, W] scaled latents, `text` f32 [B, tokens, width]. A v-prediction model is trained on its own
/// target v = √ᾱ_t·ε − √(1−ᾱ_t)·z_0, as it was pretrained.
pub fn loss(unet: &UNet, schedule: &Schedule, z_0: &Tensor, text: &Tensor, at: &Corruption) -> Tensor {
    squared_errors(unet, schedule, z_0, text, at).mean(Kind::Float)
}

/// As [`loss`], of every sample by itself: f32 `[B]`.
pub fn sample_losses(unet: &UNet, schedule: &Schedule, z_0: &Tensor, text: &Tensor, at: &Corruption) -> Tensor {
    squared_errors(unet, schedule, z_0, text, at).mean_dim([1, 2, 3].as_slice(), false, Kind::Float)
}

fn squared_errors(unet: &UNet, schedule: &Schedule, z_0: &Tensor, text: &Tensor, at: &Corruption) -> Tensor {
    let device = z_0.device();
    let noise = at.noise.to_device(device);
    let column = |f: &dyn Fn(f64) -> f64| {
        let values: Vec<f32> = at.t.iter().map(|&t| f(schedule.alpha_bar()[t as usize]) as f32).collect();
        Tensor::from_slice(&values).view([-1, 1, 1, 1]).to_device(device)
    };
    let (signal, sigma) = (column(&|a| a.sqrt()), column(&|a| (1.0 - a).sqrt()));
    let z_t = &signal * z_0 + &sigma * &noise;
    let target = match schedule.config().prediction_type {
        PredictionType::VPrediction => &signal * &noise - &sigma * z_0,
        PredictionType::Epsilon => noise,
    };
    let prediction = unet.forward(&z_t, &Tensor::from_slice(&at.t).to_device(device), text);
    (prediction - target).square()
}
