//! Sinusoidal embedding of the timestep and the two layers behind it (diffusers: `time_proj`, `time_embedding`).

use anyhow::Result;
use tch::{Kind, Tensor};

use super::{layers::Linear, parameters::Builder};

pub struct TimeEmbedding {
    channels: i64,
    flip_sin_to_cos: bool,
    freq_shift: f64,
    linear_1: Linear,
    linear_2: Linear,
}

impl TimeEmbedding {
    /// `channels` sinusoids, then `channels` → `4·channels` → `4·channels` with SiLU between.
    pub fn new(b: &Builder, channels: i64, flip_sin_to_cos: bool, freq_shift: f64) -> Result<Self> {
        Ok(TimeEmbedding {
            channels,
            flip_sin_to_cos,
            freq_shift,
            linear_1: Linear::new(&b.sub("linear_1"), channels, 4 * channels)?,
            linear_2: Linear::new(&b.sub("linear_2"), 4 * channels, 4 * channels)?,
        })
    }

    /// The sinusoids in f32: frequencies 10000^(−i/(half − freq_shift)); shape `[B]` → `[B, channels]`.
    pub fn sinusoids(&self, t: &Tensor) -> Tensor {
        let half = self.channels / 2;
        let exponent =
            Tensor::arange(half, (Kind::Float, t.device())) * -(10_000f64.ln()) / (half as f64 - self.freq_shift);
        let angle = t.to_kind(Kind::Float).unsqueeze(1) * exponent.exp().unsqueeze(0);
        let (sin, cos) = (angle.sin(), angle.cos());
        let pair = if self.flip_sin_to_cos { [cos, sin] } else { [sin, cos] };
        Tensor::cat(&pair, 1)
    }

    /// Timesteps `[B]` → embeddings `[B, 4·channels]` in `kind`.
    pub fn forward(&self, t: &Tensor, kind: Kind) -> Tensor {
        self.linear_2.forward(&self.linear_1.forward(&self.sinusoids(t).to_kind(kind)).silu())
    }
}
