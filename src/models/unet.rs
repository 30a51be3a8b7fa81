//! ε_θ(x_t, t, c): the text-conditioned U-Net (diffusers' `UNet2DConditionModel`).

use anyhow::Result;
use tch::{Kind, Tensor};

use super::{
    attention::{Transformer2d, TransformerShape},
    layers::{Conv2d, GroupNorm},
    parameters::Builder,
    resnet::{Downsample, ResnetBlock, Upsample},
    time_embedding::TimeEmbedding,
    unet_config::{Level, UNetConfig},
};

/// ResNet blocks, each followed by a transformer where the block has attention.
struct Stage {
    resnets: Vec<ResnetBlock>,
    attentions: Vec<Transformer2d>,
}

impl Stage {
    fn forward_one(&self, i: usize, x: &Tensor, time: &Tensor, text: &Tensor) -> Tensor {
        let x = self.resnets[i].forward(x, Some(time));
        match self.attentions.get(i) {
            Some(attention) => attention.forward(&x, text),
            None => x,
        }
    }
}

struct MidBlock {
    resnet0: ResnetBlock,
    attention: Transformer2d,
    resnet1: ResnetBlock,
}

pub struct UNet {
    pub config: UNetConfig,
    kind: Kind,
    conv_in: Conv2d,
    time_embedding: TimeEmbedding,
    down: Vec<(Stage, Option<Downsample>)>,
    mid: MidBlock,
    up: Vec<(Stage, Option<Upsample>)>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

fn transformer(b: &Builder, config: &UNetConfig, level: &Level) -> Result<Transformer2d> {
    let shape = TransformerShape {
        channels: level.channels,
        context_channels: level.context_channels,
        heads: level.heads,
        layers: level.transformer_layers,
        groups: config.groups,
        linear_projection: config.linear_projection,
        upcast: config.upcast_attention,
    };
    Transformer2d::new(b, shape)
}

impl UNet {
    pub fn new(b: &Builder, config: &UNetConfig, kind: Kind) -> Result<Self> {
        let c = config;
        let n = c.levels.len();
        let first = c.levels[0].channels;
        let time_channels = Some(4 * first);
        let resnet =
            |b: &Builder, inputs, outputs| ResnetBlock::new(b, inputs, outputs, time_channels, c.groups, c.norm_eps);

        let conv_in = Conv2d::new(&b.sub("conv_in"), c.in_channels, first, 3, 1, 1)?;
        let time_embedding = TimeEmbedding::new(&b.sub("time_embedding"), first, c.flip_sin_to_cos, c.freq_shift)?;

        // widths of the skip connections, in the order in which the way down makes them
        let mut skips = vec![first];
        let mut down = Vec::new();
        for (i, level) in c.levels.iter().enumerate() {
            let b = b.sub("down_blocks").sub(i);
            let mut stage = Stage { resnets: Vec::new(), attentions: Vec::new() };
            for j in 0..level.layers {
                let inputs = *skips.last().expect("conv_in made the first skip");
                stage.resnets.push(resnet(&b.sub("resnets").sub(j), inputs, level.channels)?);
                if level.cross_attention_down {
                    stage.attentions.push(transformer(&b.sub("attentions").sub(j), c, level)?);
                }
                skips.push(level.channels);
            }
            let sampler = if i + 1 < n {
                skips.push(level.channels);
                Some(Downsample::new(&b.sub("downsamplers.0"), level.channels, c.downsample_padding)?)
            } else {
                None
            };
            down.push((stage, sampler));
        }

        let last = &c.levels[n - 1];
        let b_mid = b.sub("mid_block");
        let mid = MidBlock {
            resnet0: resnet(&b_mid.sub("resnets.0"), last.channels, last.channels)?,
            attention: transformer(&b_mid.sub("attentions.0"), c, last)?,
            resnet1: resnet(&b_mid.sub("resnets.1"), last.channels, last.channels)?,
        };

        let mut up = Vec::new();
        let mut width = last.channels;
        for (i, level) in c.levels.iter().rev().enumerate() {
            let b = b.sub("up_blocks").sub(i);
            let mut stage = Stage { resnets: Vec::new(), attentions: Vec::new() };
            for j in 0..=level.layers {
                let skip = skips.pop().expect("as many resnets up as skips down");
                stage.resnets.push(resnet(&b.sub("resnets").sub(j), width + skip, level.channels)?);
                width = level.channels;
                if level.cross_attention_up {
                    stage.attentions.push(transformer(&b.sub("attentions").sub(j), c, level)?);
                }
            }
            let sampler = if i + 1 < n { Some(Upsample::new(&b.sub("upsamplers.0"), level.channels)?) } else { None };
            up.push((stage, sampler));
        }

        Ok(UNet {
            config: c.clone(),
            kind,
            conv_in,
            time_embedding,
            down,
            mid,
            up,
            conv_norm_out: GroupNorm::new(&b.sub("conv_norm_out"), c.groups, first, c.norm_eps)?,
            conv_out: Conv2d::new(&b.sub("conv_out"), first, c.out_channels, 3, 1, 1)?,
        })
    }

    /// x_t f32 [B, C, H, W], t `[B]` (any number kind), text embedding [B, tokens, context] → prediction f32 [B, C, H, W].
    pub fn forward(&self, x_t: &Tensor, t: &Tensor, text: &Tensor) -> Tensor {
        let time = self.time_embedding.forward(t, self.kind).silu();
        let text = text.to_kind(self.kind);
        let mut x = self.conv_in.forward(&x_t.to_kind(self.kind));

        let mut skips = vec![x.shallow_clone()];
        for (stage, sampler) in &self.down {
            for i in 0..stage.resnets.len() {
                x = stage.forward_one(i, &x, &time, &text);
                skips.push(x.shallow_clone());
            }
            if let Some(sampler) = sampler {
                x = sampler.forward(&x);
                skips.push(x.shallow_clone());
            }
        }

        x = self.mid.resnet0.forward(&x, Some(&time));
        x = self.mid.attention.forward(&x, &text);
        x = self.mid.resnet1.forward(&x, Some(&time));

        for (stage, sampler) in &self.up {
            for i in 0..stage.resnets.len() {
                let skip = skips.pop().expect("one skip per resnet");
                x = stage.forward_one(i, &Tensor::cat(&[&x, &skip], 1), &time, &text);
            }
            if let Some(sampler) = sampler {
                // sizes that are no multiple of 2^levels: resize to the skip that comes next
                let size = skips.last().map(|s| (s.size()[2], s.size()[3]));
                x = sampler.forward(&x, size);
            }
        }
        self.conv_out.forward(&self.conv_norm_out.forward(&x).silu()).to_kind(Kind::Float)
    }
}
