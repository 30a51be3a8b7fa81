//! Feature pyramid: levels p3 to p7 of one number of channels, strides 8 to 128.

use anyhow::Result;
use tch::Tensor;

use super::{
    backbone::Family,
    layers::{Conv, Shape},
};
use crate::models::parameters::Builder;

/// Pixels per feature of each level.
pub const STRIDES: [i64; 5] = [8, 16, 32, 64, 128];

pub struct Pyramid {
    lateral: Vec<Conv>,
    output: Vec<Conv>,
    p6: Conv,
    p7: Conv,
}

impl Pyramid {
    /// `inputs` are the channels of res3, res4, res5.
    pub fn new(b: &Builder, family: Family, inputs: [i64; 3], channels: i64) -> Result<Self> {
        let conv = |name: String, shape: Shape| match family {
            Family::ResNet => Conv::with_bias(&b.sub(name), shape),
            Family::ResNeSt => Conv::with_norm(&b.sub(name), shape),
        };
        let (mut lateral, mut output) = (Vec::new(), Vec::new());
        for (level, inputs) in (3..).zip(inputs) {
            lateral.push(conv(format!("fpn_lateral{level}"), Shape::new(inputs, channels, 1))?);
            output.push(conv(format!("fpn_output{level}"), Shape::new(channels, channels, 3))?);
        }
        let top = b.sub("top_block");
        let down = Shape::new(channels, channels, 3).stride(2);
        Ok(Pyramid {
            lateral,
            output,
            p6: Conv::with_bias(&top.sub("p6"), down)?,
            p7: Conv::with_bias(&top.sub("p7"), down)?,
        })
    }

    /// Features at strides 8, 16, 32 → levels p3 to p7, f32 `[n, channels, h, w]` each.
    pub fn forward(&self, features: &[Tensor; 3]) -> [Tensor; 5] {
        let mut summed = self.lateral[2].forward(&features[2]);
        let p5 = self.output[2].forward(&summed);
        let mut below = |level: usize| {
            let lateral = self.lateral[level].forward(&features[level]);
            let size = lateral.size();
            summed = lateral + summed.upsample_nearest2d([size[2], size[3]], None, None);
            self.output[level].forward(&summed)
        };
        let p4 = below(1);
        let p3 = below(0);
        let p6 = self.p6.forward(&p5);
        let p7 = self.p7.forward(&p6.relu());
        [p3, p4, p5, p6, p7]
    }
}
