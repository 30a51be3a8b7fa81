//! CLIP's two towers with their projections: pictures and texts as rows of one space.

use anyhow::Result;
use tch::{Kind, Tensor};

use crate::{
    models::{
        parameters::{Builder, Init},
        text_encoder::{TextConfig, TextEncoder},
    },
    rewards::vision_transformer::{Sizes, Style, VisionTransformer},
};

const SMALL: Init = Init::Normal(0.02);

/// The picture's class token after the last LayerNorm, projected.
pub struct PictureTower {
    vision: VisionTransformer,
    /// `[joint, width]`.
    projection: Tensor,
}

impl PictureTower {
    pub fn new(b: &Builder, sizes: Sizes, style: Style, joint: i64) -> Result<Self> {
        Ok(PictureTower {
            vision: VisionTransformer::new(b, sizes, style)?,
            projection: b.parameter("projection", &[joint, sizes.width], SMALL)?,
        })
    }

    /// Normalised pictures f32 `[n, 3, side, side]` → features f32 `[n, joint]` of any length.
    pub fn features(&self, input: &Tensor) -> Tensor {
        let class = self.vision.norm(&self.vision.forward(input).select(1, 0));
        class.linear(&self.projection, None::<&Tensor>)
    }
}

/// The text's end token after the last LayerNorm, projected.
pub struct TextTower {
    encoder: TextEncoder,
    /// `[joint, width]`.
    projection: Tensor,
}

impl TextTower {
    pub fn new(b: &Builder, config: &TextConfig, joint: i64) -> Result<Self> {
        Ok(TextTower {
            encoder: TextEncoder::new(b, config)?,
            projection: b.parameter("text_projection", &[joint, config.hidden_size], SMALL)?,
        })
    }

    /// Token ids i64 `[n, tokens]`, the end token last (what would follow it has no influence) → features f32 `[n, joint]`.
    pub fn features(&self, ids: &Tensor) -> Tensor {
        let last = self.encoder.forward(ids).select(1, -1);
        last.linear(&self.projection, None::<&Tensor>)
    }
}

/// Rows divided by their length; a row of zeros stays.
pub fn unit(rows: &Tensor) -> Tensor {
    let length = rows.square().sum_dim_intlist(1, true, Kind::Float).sqrt();
    rows / length.where_self(&length.gt(0.0), &length.ones_like())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_become_one_and_zero_stays() {
        let rows = unit(&Tensor::from_slice(&[3.0f32, 4.0, 0.0, 0.0]).view([2, 2]));
        assert_eq!(Vec::<f32>::try_from(rows.view([-1])).unwrap(), [0.6, 0.8, 0.0, 0.0]);
    }
}
