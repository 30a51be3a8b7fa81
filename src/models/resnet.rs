//! ResNet blocks and resampling, as in diffusers' `ResnetBlock2D`, `Downsample2D`, `Upsample2D`.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::{
    layers::{Conv2d, GroupNorm, Linear},
    parameters::Builder,
};

/// x + conv2(silu(norm2(conv1(silu(norm1(x))) + time))), with a 1×1 convolution on x where the widths differ.
pub struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
}

impl ResnetBlock {
    /// `time_channels` is the width of the time embedding; None for the VAE.
    pub fn new(
        b: &Builder,
        inputs: i64,
        outputs: i64,
        time_channels: Option<i64>,
        groups: i64,
        eps: f64,
    ) -> Result<Self> {
        Ok(ResnetBlock {
            norm1: GroupNorm::new(&b.sub("norm1"), groups, inputs, eps)?,
            conv1: Conv2d::new(&b.sub("conv1"), inputs, outputs, 3, 1, 1)?,
            time_emb_proj: time_channels.map(|t| Linear::new(&b.sub("time_emb_proj"), t, outputs)).transpose()?,
            norm2: GroupNorm::new(&b.sub("norm2"), groups, outputs, eps)?,
            conv2: Conv2d::new(&b.sub("conv2"), outputs, outputs, 3, 1, 1)?,
            conv_shortcut: if inputs == outputs {
                None
            } else {
                Some(Conv2d::new(&b.sub("conv_shortcut"), inputs, outputs, 1, 1, 0)?)
            },
        })
    }

    /// x [B, inputs, H, W]; `time_activation` is silu(time embedding) [B, time_channels].
    pub fn forward(&self, x: &Tensor, time_activation: Option<&Tensor>) -> Tensor {
        if x.device() != Device::Cpu {
            return self.forward_with_few_passes(x, time_activation);
        }
        let h = self.conv1.forward(&self.norm1.forward_silu(x));
        let h = match (&self.time_emb_proj, time_activation) {
            (Some(projection), Some(time)) => self.norm2.forward_shifted_silu(&h, &projection.forward(time)),
            _ => self.norm2.forward_silu(&h),
        };
        let h = self.conv2.forward(&h);
        match &self.conv_shortcut {
            Some(shortcut) => shortcut.forward(x) + h,
            None => x + h,
        }
    }

    /// The same on a GPU: conv1's bias goes with the time embedding into the normalisation, conv2's with the shortcut's
    /// into its product, so that no pass over memory is for a bias alone.
    fn forward_with_few_passes(&self, x: &Tensor, time_activation: Option<&Tensor>) -> Tensor {
        let h = self.conv1.forward_without_bias(&self.norm1.forward_silu(x));
        let bias = self.conv1.bias().to_kind(Kind::Float);
        let shift = match (&self.time_emb_proj, time_activation) {
            (Some(projection), Some(time)) => projection.forward(time).to_kind(Kind::Float) + bias,
            _ => bias.expand([h.size()[0], -1], false),
        };
        let h = self.norm2.forward_shifted_silu(&h, &shift);
        match &self.conv_shortcut {
            Some(shortcut) => shortcut.forward_as_product(x, self.conv2.bias()) + self.conv2.forward_without_bias(&h),
            None => x + self.conv2.forward(&h),
        }
    }
}

/// Halves height and width by a strided 3×3 convolution.
pub struct Downsample {
    conv: Conv2d,
    /// The VAE pads one pixel right and below only.
    pad_right_below: bool,
}

impl Downsample {
    pub fn new(b: &Builder, channels: i64, padding: i64) -> Result<Self> {
        Ok(Downsample {
            conv: Conv2d::new(&b.sub("conv"), channels, channels, 3, 2, padding)?,
            pad_right_below: padding == 0,
        })
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        if self.pad_right_below {
            self.conv.forward(&x.constant_pad_nd([0, 1, 0, 1]))
        } else {
            self.conv.forward(x)
        }
    }
}

/// Nearest-neighbour resize, then a 3×3 convolution.
pub struct Upsample {
    conv: Conv2d,
}

impl Upsample {
    pub fn new(b: &Builder, channels: i64) -> Result<Self> {
        Ok(Upsample { conv: Conv2d::new(&b.sub("conv"), channels, channels, 3, 1, 1)? })
    }

    /// Resizes to `size` = (H, W), or doubles where None.
    pub fn forward(&self, x: &Tensor, size: Option<(i64, i64)>) -> Tensor {
        let s = x.size();
        let (h, w) = size.unwrap_or((s[2] * 2, s[3] * 2));
        self.conv.forward(&x.upsample_nearest2d([h, w], None, None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::parameters::Source;

    /// Output and gradients of the input, the time embedding and every parameter.
    fn differentiate(inputs: i64, time_channels: Option<i64>, few_passes: bool) -> Vec<Tensor> {
        let builder = Builder::new(Source::Seeded(3), Kind::Double, Device::Cpu);
        let block = ResnetBlock::new(&builder, inputs, 8, time_channels, 4, 1e-5).unwrap();
        let field = |size: &[i64]| {
            let count = size.iter().product::<i64>();
            (Tensor::arange(count, (Kind::Double, Device::Cpu)) * 0.37).sin().view(size).set_requires_grad(true)
        };
        let (x, time) = (field(&[2, inputs, 5, 3]), field(&[2, 6]));
        let (parameters, _) = builder.finish();
        let mut leaves = vec![x];
        leaves.extend(time_channels.map(|_| time));
        leaves.extend(parameters.entries.iter().map(|p| p.tensor.shallow_clone().set_requires_grad(true)));
        let y = if few_passes {
            block.forward_with_few_passes(&leaves[0], time_channels.map(|_| &leaves[1]))
        } else {
            block.forward(&leaves[0], time_channels.map(|_| &leaves[1]))
        };
        let weights = (Tensor::arange(y.numel() as i64, (Kind::Double, Device::Cpu)) * 0.91).cos().view_as(&y);
        let mut all = Tensor::run_backward(&[(&y * weights).sum(Kind::Double)], &leaves, false, false);
        all.push(y);
        all
    }

    #[test]
    fn few_passes_compute_the_same_as_many() {
        for (inputs, time_channels) in [(8, Some(6)), (12, Some(6)), (8, None), (12, None)] {
            let (many, few) = (differentiate(inputs, time_channels, false), differentiate(inputs, time_channels, true));
            assert_eq!(many.len(), few.len());
            for (i, (a, b)) in many.iter().zip(&few).enumerate() {
                let gap = ((a - b).abs().max() / a.abs().max()).double_value(&[]);
                // the time embedding and conv1's bias are rounded to f32 on the way: observed 1e-7
                assert!(gap < 1e-6, "{inputs} channels, time {time_channels:?}, tensor {i}: {gap}");
            }
        }
    }
}
