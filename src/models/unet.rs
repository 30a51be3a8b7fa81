//! ε_θ(x_t, t, c): the text-conditioned U-Net (diffusers' `UNet2DConditionModel`).

use std::sync::{
    atomic::{AtomicU64, Ordering},
    Arc,
};

use anyhow::Result;
use tch::{Kind, Tensor};

use super::{
    attention::{Transformer2d, TransformerShape},
    layers::{Conv2d, GroupNorm},
    parameters::Builder,
    recompute::{recompute, Recomputed},
    resnet::{Downsample, ResnetBlock, Upsample},
    time_embedding::TimeEmbedding,
    unet_config::{Level, UNetConfig},
};

/// A ResNet block, followed by a transformer where its level has attention.
struct Unit {
    resnet: ResnetBlock,
    attention: Option<Transformer2d>,
}

impl Unit {
    fn forward(&self, x: &Tensor, time: &Tensor, text: &Tensor) -> Tensor {
        let x = self.resnet.forward(x, Some(time));
        match &self.attention {
            Some(attention) => attention.forward(&x, text),
            None => x,
        }
    }
}

/// A unit that can be run with its activations kept or recomputed.
struct Checkpointed {
    unit: Arc<Unit>,
    parameters: Vec<Tensor>,
}

impl Checkpointed {
    fn new(b: &Builder, make: impl FnOnce() -> Result<Unit>) -> Result<Self> {
        let (unit, parameters) = b.with_parameters(make)?;
        // counted atomically because the graph may let go of it on a thread of libtorch's
        #[allow(clippy::arc_with_non_send_sync)]
        let unit = Arc::new(unit);
        Ok(Checkpointed { unit, parameters })
    }

    /// The unit's output for `x`, with the skip connection's channels appended to it on the way up.
    fn forward(&self, x: &Tensor, skip: Option<&Tensor>, time: &Tensor, text: &Tensor, recomputed: bool) -> Tensor {
        let joined = |x: &Tensor, skip: Option<&Tensor>| match skip {
            Some(skip) => Tensor::cat(&[x, skip], 1),
            // a node of its own: the gradients of the unit's uses of x are summed here before others are added, as
            // they are where the unit is recomputed, so both ways give the same bits
            None => x.view_as(x),
        };
        if !recomputed {
            return self.unit.forward(&joined(x, skip), time, text);
        }
        let unit = self.unit.clone();
        let inputs = [Some(time), Some(text), Some(x), skip];
        let inputs: Vec<&Tensor> = inputs.into_iter().flatten().collect();
        recompute(&inputs, &self.parameters, move |i| unit.forward(&joined(&i[2], i.get(3)), &i[0], &i[1]))
    }
}

pub struct UNet {
    /// Of this process, never given twice.
    id: u64,
    pub config: UNetConfig,
    /// What it computes in.
    pub kind: Kind,
    /// Units whose activations are computed again in the backward pass instead of kept: the same results for less memory and,
    /// with all of them, a third more time.
    pub recomputed: Recomputed,
    conv_in: Conv2d,
    time_embedding: TimeEmbedding,
    down: Vec<(Vec<Checkpointed>, Option<Downsample>)>,
    mid: [Checkpointed; 2],
    up: Vec<(Vec<Checkpointed>, Option<Upsample>)>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    /// Everything it computes with, adapters included.
    weights: Vec<Tensor>,
}

fn transformer(b: &Builder, config: &UNetConfig, level: &Level) -> Result<Transformer2d> {
    let shape = TransformerShape {
        channels: level.channels,
        context_channels: level.context_channels,
        heads: level.heads,
        layers: level.transformer_layers,
        groups: config.groups,
        linear_projection: config.linear_projection,
    };
    Transformer2d::new(b, shape)
}

impl UNet {
    /// `kind` is what it computes in.
    pub fn new(b: &Builder, config: &UNetConfig, kind: Kind, recomputed: Recomputed) -> Result<Self> {
        let (mut unet, weights) = b.with_parameters(|| UNet::build(b, config, kind, recomputed))?;
        unet.weights = weights;
        Ok(unet)
    }

    fn build(b: &Builder, config: &UNetConfig, kind: Kind, recomputed: Recomputed) -> Result<Self> {
        static MADE: AtomicU64 = AtomicU64::new(0);
        let c = config;
        let n = c.levels.len();
        let first = c.levels[0].channels;
        let time_channels = Some(4 * first);
        let unit = |b: &Builder, j: i64, inputs: i64, level: &Level, attention: bool| {
            Checkpointed::new(b, || {
                let b_resnet = b.sub("resnets").sub(j);
                let resnet = ResnetBlock::new(&b_resnet, inputs, level.channels, time_channels, c.groups, c.norm_eps)?;
                let attention = attention.then(|| transformer(&b.sub("attentions").sub(j), c, level)).transpose()?;
                Ok(Unit { resnet, attention })
            })
        };

        let conv_in = Conv2d::new(&b.sub("conv_in"), c.in_channels, first, 3, 1, 1)?;
        let time_embedding = TimeEmbedding::new(&b.sub("time_embedding"), first, c.flip_sin_to_cos, c.freq_shift)?;

        // widths of the skip connections, in the order in which the way down makes them
        let mut skips = vec![first];
        let mut down = Vec::new();
        for (i, level) in c.levels.iter().enumerate() {
            let b = b.sub("down_blocks").sub(i);
            let mut units = Vec::new();
            for j in 0..level.layers {
                let inputs = *skips.last().expect("conv_in made the first skip");
                units.push(unit(&b, j, inputs, level, level.cross_attention_down)?);
                skips.push(level.channels);
            }
            let sampler = if i + 1 < n {
                skips.push(level.channels);
                Some(Downsample::new(&b.sub("downsamplers.0"), level.channels, c.downsample_padding)?)
            } else {
                None
            };
            down.push((units, sampler));
        }

        let last = &c.levels[n - 1];
        let b_mid = b.sub("mid_block");
        let mid = [unit(&b_mid, 0, last.channels, last, true)?, unit(&b_mid, 1, last.channels, last, false)?];

        let mut up = Vec::new();
        let mut width = last.channels;
        for (i, level) in c.levels.iter().rev().enumerate() {
            let b = b.sub("up_blocks").sub(i);
            let mut units = Vec::new();
            for j in 0..=level.layers {
                let skip = skips.pop().expect("as many resnets up as skips down");
                units.push(unit(&b, j, width + skip, level, level.cross_attention_up)?);
                width = level.channels;
            }
            let sampler = if i + 1 < n { Some(Upsample::new(&b.sub("upsamplers.0"), level.channels)?) } else { None };
            up.push((units, sampler));
        }

        Ok(UNet {
            id: MADE.fetch_add(1, Ordering::Relaxed),
            config: c.clone(),
            kind,
            recomputed,
            conv_in,
            time_embedding,
            down,
            mid,
            up,
            conv_norm_out: GroupNorm::new(&b.sub("conv_norm_out"), c.groups, first, c.norm_eps)?,
            conv_out: Conv2d::new(&b.sub("conv_out"), first, c.out_channels, 3, 1, 1)?,
            weights: Vec::new(),
        })
    }

    /// Tells the networks of this process apart.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Where its weights lie now.
    pub fn weight_addresses(&self) -> Vec<usize> {
        self.weights.iter().map(|weight| weight.data_ptr() as usize).collect()
    }

    /// x_t f32 [B, C, H, W], t `[B]` (any number kind), text embedding [B, tokens, context] → prediction f32 [B, C, H, W].
    pub fn forward(&self, x_t: &Tensor, t: &Tensor, text: &Tensor) -> Tensor {
        let time = self.time_embedding.forward(t, self.kind).silu();
        let text = text.to_kind(self.kind);
        let mut x = self.conv_in.forward(&x_t.to_kind(self.kind));

        let everything = self.recomputed == Recomputed::Everything;
        let at_level_0 = self.recomputed != Recomputed::Nothing;
        let mut skips = vec![x.shallow_clone()];
        for (level, (units, sampler)) in self.down.iter().enumerate() {
            let recomputed = if level == 0 { at_level_0 } else { everything };
            for unit in units {
                x = unit.forward(&x, None, &time, &text, recomputed);
                skips.push(x.shallow_clone());
            }
            if let Some(sampler) = sampler {
                x = sampler.forward(&x);
                skips.push(x.shallow_clone());
            }
        }
        for unit in &self.mid {
            x = unit.forward(&x, None, &time, &text, everything);
        }
        for (level, (units, sampler)) in (0..self.up.len()).rev().zip(&self.up) {
            let recomputed = if level == 0 { at_level_0 } else { everything };
            for unit in units {
                let skip = skips.pop().expect("one skip per unit");
                x = unit.forward(&x, Some(&skip), &time, &text, recomputed);
            }
            if let Some(sampler) = sampler {
                // sizes that are no multiple of 2^levels: resize to the skip that comes next
                let size = skips.last().map(|s| (s.size()[2], s.size()[3]));
                x = sampler.forward(&x, size);
            }
        }
        self.conv_out.forward(&self.conv_norm_out.forward_silu(&x)).to_kind(Kind::Float)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        miniature::EMBEDDED_MODEL,
        models::{
            allocations::Allocations,
            folder::{ModelFiles, ModelLocation},
            lora::LoraSettings,
            parameters::Source,
            pipeline::{Build, Pipeline},
        },
    };
    use tch::Device;

    /// Prediction of the embedded model and gradients of its mean square.
    fn differentiate(recomputed: Recomputed, unet_kind: Kind, lora: bool) -> (Tensor, Vec<Tensor>, u64) {
        let files = ModelFiles::read(&ModelLocation::Embedded(EMBEDDED_MODEL)).unwrap();
        let settings = LoraSettings { rank: 2, alpha: 2.0, targets: vec!["to_q".into(), "to_v".into()] };
        let lora = lora.then_some((settings, Source::Seeded(1)));
        let pipeline =
            Pipeline::with(files, Device::Cpu, Build { unet_kind, recomputed, lora, ..Build::default() }).unwrap();
        let leaves: Vec<Tensor> =
            pipeline.trainable().entries.iter().map(|p| p.tensor.shallow_clone().set_requires_grad(true)).collect();
        let [c, h, w] = pipeline.latent_shape();
        let x = (Tensor::arange(2 * c * h * w, (Kind::Float, Device::Cpu)) * 0.37).sin().view([2, c, h, w]);
        let text = pipeline.embed(&["a kite on a book", "a portrait of a nurse"]).unwrap();
        let count = Allocations::begin();
        let eps = pipeline.unet.forward(&x, &Tensor::from_slice(&[501i64, 1]), &text);
        let kept = count.alive();
        let gradients = Tensor::run_backward(&[eps.square().mean(Kind::Float)], &leaves, false, false);
        (eps, gradients, kept)
    }

    /// Stable Diffusion 2.1's key: diffusers' AttnProcessor2_0 does not widen q, k and v, which would leave a GPU without its
    /// fused kernels.
    #[test]
    fn upcast_attention_is_not_an_attention_in_f32() {
        let predict = |upcast: bool| {
            let mut files = ModelFiles::read(&ModelLocation::Embedded(EMBEDDED_MODEL)).unwrap();
            let mut json = files.json("unet/config.json").unwrap();
            json["upcast_attention"] = upcast.into();
            files.texts.insert("unet/config.json".into(), serde_json::to_vec(&json).unwrap());
            let how = Build { unet_kind: Kind::BFloat16, ..Build::default() };
            let pipeline = Pipeline::with(files, Device::Cpu, how).unwrap();
            let [c, h, w] = pipeline.latent_shape();
            let x = (Tensor::arange(c * h * w, (Kind::Float, Device::Cpu)) * 0.37).sin().view([1, c, h, w]);
            let text = pipeline.embed(&["a kite on a book"]).unwrap();
            tch::no_grad(|| pipeline.unet.forward(&x, &Tensor::from_slice(&[501i64]), &text))
        };
        assert_eq!(predict(true), predict(false));
    }

    #[test]
    fn gradient_checkpointing_changes_no_bit() {
        for (kind, lora) in [(Kind::Float, false), (Kind::BFloat16, false), (Kind::Float, true)] {
            let (eps, gradients, all_kept) = differentiate(Recomputed::Nothing, kind, lora);
            let kept = [Recomputed::Level0, Recomputed::Everything].map(|recomputed| {
                let (eps_again, gradients_again, kept) = differentiate(recomputed, kind, lora);
                assert_eq!(eps, eps_again, "{kind:?}, {recomputed:?}");
                assert_eq!(gradients.len(), gradients_again.len());
                for (i, (a, b)) in gradients.iter().zip(&gradients_again).enumerate() {
                    assert!(a.abs().sum(Kind::Float).double_value(&[]) > 0.0 || lora, "{kind:?}: gradient {i} is zero");
                    assert_eq!(a, b, "{kind:?}, lora {lora}, {recomputed:?}: gradient {i}");
                }
                kept
            });
            println!("{kind:?}, lora {lora}: {all_kept} bytes kept, {kept:?} with checkpointing");
            assert!(kept[1] < kept[0] && kept[0] < all_kept, "{kept:?} of {all_kept}");
        }
    }
}
