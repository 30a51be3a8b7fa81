//! The autoencoder between pictures and latents (diffusers' `AutoencoderKL`).

use anyhow::{ensure, Result};
use serde::Deserialize;
use serde_json::Value;
use tch::{Kind, Tensor};

use super::{
    attention::multi_head,
    config_keys::{self, ensure_class, ensure_size, ensure_supported},
    layers::{to_pixels, to_tokens, Conv2d, GroupNorm, Linear},
    parameters::Builder,
    resnet::{Downsample, ResnetBlock, Upsample},
};
use crate::{device::numerics::Precision, python_json};

const NORM_EPS: f64 = 1e-6;

/// `vae/config.json`; absent keys take diffusers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct VaeConfig {
    pub in_channels: i64,
    pub out_channels: i64,
    pub latent_channels: i64,
    pub block_out_channels: Vec<i64>,
    pub layers_per_block: i64,
    pub norm_num_groups: i64,
    /// Latents are multiplied by this so that the U-Net sees unit variance.
    pub scaling_factor: f64,
}

impl Default for VaeConfig {
    fn default() -> Self {
        VaeConfig {
            in_channels: 3,
            out_channels: 3,
            latent_channels: 4,
            block_out_channels: vec![64],
            layers_per_block: 1,
            norm_num_groups: 32,
            scaling_factor: 0.18215,
        }
    }
}

/// Variants that are not built here.
const FIXED: &[(&str, &[&str])] = &[
    ("act_fn", &["\"silu\"", "\"swish\"", "\"SiLU\""]),
    ("shift_factor", &["0", "0.0"]),
    ("latents_mean", &[]),
    ("latents_std", &[]),
    ("use_quant_conv", &["true"]),
    ("use_post_quant_conv", &["true"]),
    ("mid_block_add_attention", &["true"]),
    ("quantization_config", &[]),
];

const READ: &[&str] = &[
    "in_channels",
    "out_channels",
    "latent_channels",
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "norm_num_groups",
    "scaling_factor",
];

/// The first is of tiles, the second of half precision.
const WITHOUT_EFFECT: &[&str] = &["sample_size", "force_upcast"];

/// Keys that diffusers' AutoencoderKL does not know and that nobody reads here.
pub fn unknown_keys(json: &Value) -> Vec<String> {
    config_keys::unknown(json, &[READ, WITHOUT_EFFECT], FIXED)
}

impl VaeConfig {
    pub fn from_json(json: &Value) -> Result<Self> {
        ensure_class(json, "AutoencoderKL")?;
        ensure_supported(json, FIXED)?;
        ensure!(json.get("norm_num_groups") != Some(&Value::Null), "norm_num_groups = null is not supported");
        let config: VaeConfig = python_json::from_value(&python_json::without_nulls(json)?)?;
        ensure!(!config.block_out_channels.is_empty(), "block_out_channels is empty");
        for (key, expected) in [("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")] {
            let Some(blocks) = json.get(key).and_then(Value::as_array) else { continue };
            let levels = config.block_out_channels.len();
            ensure!(blocks.len() == levels, "{key} lists {} blocks for {levels} levels", blocks.len());
            for block in blocks {
                ensure!(block == expected, "{key}: block {block} is not supported (only {expected})");
            }
        }
        config.ensure_sizes()?;
        Ok(config)
    }

    fn ensure_sizes(&self) -> Result<()> {
        ensure!(
            (self.in_channels, self.out_channels) == (3, 3),
            "in_channels = {}, out_channels = {}: only pictures of 3 channels are supported",
            self.in_channels,
            self.out_channels
        );
        ensure_size("latent_channels", self.latent_channels)?;
        ensure_size("layers_per_block", self.layers_per_block)?;
        ensure_size("norm_num_groups", self.norm_num_groups)?;
        ensure!(
            self.block_out_channels.len() <= 16,
            "block_out_channels lists {} levels",
            self.block_out_channels.len()
        );
        self.block_out_channels.iter().try_for_each(|&channels| ensure_size("block_out_channels", channels))?;
        let factor = self.scaling_factor;
        ensure!(factor.is_finite() && factor > 0.0, "scaling_factor = {factor} is not positive");
        Ok(())
    }

    /// Pixels per latent, along each side.
    pub fn downscale(&self) -> i64 {
        1 << (self.block_out_channels.len() - 1)
    }
}

/// Single-head self-attention over the pixels, added to its input.
struct PixelAttention {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl PixelAttention {
    fn new(b: &Builder, channels: i64, groups: i64) -> Result<Self> {
        Ok(PixelAttention {
            group_norm: GroupNorm::new(&b.sub("group_norm"), groups, channels, NORM_EPS)?,
            to_q: Linear::new(&b.sub("to_q"), channels, channels)?,
            to_k: Linear::new(&b.sub("to_k"), channels, channels)?,
            to_v: Linear::new(&b.sub("to_v"), channels, channels)?,
            to_out: Linear::new(&b.sub("to_out.0"), channels, channels)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let tokens = to_tokens(&self.group_norm.forward(x));
        let (q, k, v) = (self.to_q.forward(&tokens), self.to_k.forward(&tokens), self.to_v.forward(&tokens));
        let out = self.to_out.forward(&multi_head(&q, &k, &v, 1, false));
        to_pixels(&out, &x.size()) + x
    }
}

struct MidBlock {
    resnet0: ResnetBlock,
    attention: PixelAttention,
    resnet1: ResnetBlock,
}

impl MidBlock {
    fn new(b: &Builder, channels: i64, groups: i64) -> Result<Self> {
        Ok(MidBlock {
            resnet0: ResnetBlock::new(&b.sub("resnets.0"), channels, channels, None, groups, NORM_EPS)?,
            attention: PixelAttention::new(&b.sub("attentions.0"), channels, groups)?,
            resnet1: ResnetBlock::new(&b.sub("resnets.1"), channels, channels, None, groups, NORM_EPS)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        self.resnet1.forward(&self.attention.forward(&self.resnet0.forward(x, None)), None)
    }
}

struct Coder<Sampler> {
    conv_in: Conv2d,
    blocks: Vec<(Vec<ResnetBlock>, Option<Sampler>)>,
    mid: MidBlock,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl<Sampler> Coder<Sampler> {
    fn head(&self, x: &Tensor) -> Tensor {
        self.conv_out.forward(&self.conv_norm_out.forward_silu(x))
    }
}

pub struct Vae {
    pub config: VaeConfig,
    /// Pictures that [`Vae::decode_scaled`] decodes at once, so that memory does not grow with the batch; 0 for all.
    pub decode_batch: usize,
    /// What it computes in; weights, latents and pictures are f32.
    pub precision: Precision,
    kind: Kind,
    encoder: Coder<Downsample>,
    quant_conv: Conv2d,
    post_quant_conv: Conv2d,
    decoder: Coder<Upsample>,
}

/// q(z | x): a Gaussian per latent element.
pub struct Posterior {
    /// [B, latent, H/8, W/8], before the scaling factor.
    pub mean: Tensor,
    /// ln σ², clamped to [−30, 20].
    pub log_variance: Tensor,
}

impl Posterior {
    /// mean + σ·noise.
    pub fn sample(&self, noise: &Tensor) -> Tensor {
        &self.mean + (&self.log_variance * 0.5).exp() * noise
    }

    /// KL(q ‖ N(0, 1)) in nats per latent element, averaged over everything.
    pub fn kl(&self) -> Tensor {
        let per_element = (self.mean.square() + self.log_variance.exp() - 1.0 - &self.log_variance) * 0.5;
        per_element.mean(Kind::Float)
    }
}

impl Vae {
    pub fn new(b: &Builder, config: &VaeConfig, kind: Kind) -> Result<Self> {
        let c = config;
        let n = c.block_out_channels.len();
        let (first, last) = (c.block_out_channels[0], c.block_out_channels[n - 1]);
        let groups = c.norm_num_groups;
        let resnet = |b: &Builder, inputs, outputs| ResnetBlock::new(b, inputs, outputs, None, groups, NORM_EPS);

        let e = b.sub("encoder");
        let conv_in = Conv2d::new(&e.sub("conv_in"), c.in_channels, first, 3, 1, 1)?;
        let mut blocks = Vec::new();
        let mut width = first;
        for (i, &channels) in c.block_out_channels.iter().enumerate() {
            let b = e.sub("down_blocks").sub(i);
            let mut resnets = Vec::new();
            for j in 0..c.layers_per_block {
                resnets.push(resnet(&b.sub("resnets").sub(j), width, channels)?);
                width = channels;
            }
            let sampler = if i + 1 < n { Some(Downsample::new(&b.sub("downsamplers.0"), channels, 0)?) } else { None };
            blocks.push((resnets, sampler));
        }
        let encoder = Coder {
            conv_in,
            blocks,
            mid: MidBlock::new(&e.sub("mid_block"), last, groups)?,
            conv_norm_out: GroupNorm::new(&e.sub("conv_norm_out"), groups, last, NORM_EPS)?,
            conv_out: Conv2d::new(&e.sub("conv_out"), last, 2 * c.latent_channels, 3, 1, 1)?,
        };

        let d = b.sub("decoder");
        let conv_in = Conv2d::new(&d.sub("conv_in"), c.latent_channels, last, 3, 1, 1)?;
        let mid = MidBlock::new(&d.sub("mid_block"), last, groups)?;
        let mut blocks = Vec::new();
        let mut width = last;
        for (i, &channels) in c.block_out_channels.iter().rev().enumerate() {
            let b = d.sub("up_blocks").sub(i);
            let mut resnets = Vec::new();
            for j in 0..=c.layers_per_block {
                resnets.push(resnet(&b.sub("resnets").sub(j), width, channels)?);
                width = channels;
            }
            let sampler = if i + 1 < n { Some(Upsample::new(&b.sub("upsamplers.0"), channels)?) } else { None };
            blocks.push((resnets, sampler));
        }
        let decoder = Coder {
            conv_in,
            blocks,
            mid,
            conv_norm_out: GroupNorm::new(&d.sub("conv_norm_out"), groups, first, NORM_EPS)?,
            conv_out: Conv2d::new(&d.sub("conv_out"), first, c.out_channels, 3, 1, 1)?,
        };

        Ok(Vae {
            config: c.clone(),
            decode_batch: 0,
            precision: Precision::default(),
            kind,
            encoder,
            quant_conv: Conv2d::new(&b.sub("quant_conv"), 2 * c.latent_channels, 2 * c.latent_channels, 1, 1, 0)?,
            post_quant_conv: Conv2d::new(&b.sub("post_quant_conv"), c.latent_channels, c.latent_channels, 1, 1, 0)?,
            decoder,
        })
    }

    /// Pictures [B, 3, H, W] in [−1, 1] → posterior over latents, f32, not scaled.
    pub fn encode(&self, pictures: &Tensor) -> Posterior {
        let _precision = self.precision.enter(pictures.device());
        let mut x = self.encoder.conv_in.forward(&pictures.to_kind(self.kind));
        for (resnets, sampler) in &self.encoder.blocks {
            for resnet in resnets {
                x = resnet.forward(&x, None);
            }
            if let Some(sampler) = sampler {
                x = sampler.forward(&x);
            }
        }
        let moments = self.quant_conv.forward(&self.encoder.head(&self.encoder.mid.forward(&x))).to_kind(Kind::Float);
        let halves = moments.chunk(2, 1);
        Posterior { mean: halves[0].shallow_clone(), log_variance: halves[1].clamp(-30.0, 20.0) }
    }

    /// z_0 of Eq. 8: the posterior's mean times the scaling factor.
    pub fn encode_scaled(&self, pictures: &Tensor) -> Tensor {
        self.encode(pictures).mean * self.config.scaling_factor
    }

    /// Latents [B, latent, h, w] (not scaled) → pictures f32 [B, 3, H, W], nominally in [−1, 1].
    pub fn decode(&self, latents: &Tensor) -> Tensor {
        let _precision = self.precision.enter(latents.device());
        let z = self.post_quant_conv.forward(&latents.to_kind(self.kind));
        let mut x = self.decoder.mid.forward(&self.decoder.conv_in.forward(&z));
        for (resnets, sampler) in &self.decoder.blocks {
            for resnet in resnets {
                x = resnet.forward(&x, None);
            }
            if let Some(sampler) = sampler {
                x = sampler.forward(&x, None);
            }
        }
        self.decoder.head(&x).to_kind(Kind::Float)
    }

    /// Scaled latents x_0 → pictures in [0, 1], [`Vae::decode_batch`] at once.
    pub fn decode_scaled(&self, x_0: &Tensor) -> Tensor {
        let decode = |x_0: &Tensor| (self.decode(&(x_0 / self.config.scaling_factor)) / 2.0 + 0.5).clamp(0.0, 1.0);
        match self.decode_batch {
            0 => decode(x_0),
            at_once => Tensor::cat(&x_0.split(at_once as i64, 0).iter().map(decode).collect::<Vec<_>>(), 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::{
        miniature::EMBEDDED_MODEL,
        models::{
            folder::{ModelFiles, ModelLocation},
            pipeline::{Build, Pipeline},
        },
    };

    #[test]
    fn a_vae_in_another_number_type_draws_nearly_the_same() {
        let files = || ModelFiles::read(&ModelLocation::Embedded(EMBEDDED_MODEL)).unwrap();
        let drawn = |precision: Precision| {
            let how = Build { precision, ..Build::default() };
            let pipeline = Pipeline::with(files(), Device::Cpu, how).unwrap();
            let [c, h, w] = pipeline.latent_shape();
            let x_0 = (Tensor::arange(2 * c * h * w, (Kind::Float, Device::Cpu)) * 0.37).sin().view([2, c, h, w]);
            let text = pipeline.embed(&["a kite on a book"]).unwrap();
            let pictures = tch::no_grad(|| pipeline.vae.decode_scaled(&x_0));
            let latents = tch::no_grad(|| pipeline.vae.encode_scaled(&pictures));
            for made in [&text, &pictures, &latents] {
                assert_eq!(made.kind(), Kind::Float, "{precision:?}");
            }
            let kept = pipeline.vae_parameters.entries.iter().all(|p| p.tensor.kind() == Kind::Float);
            assert!(kept, "weights are f32 whatever they compute in");
            (text, pictures, latents)
        };
        let gap = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]) / b.abs().max().double_value(&[]);
        let f32 = drawn(Precision::F32);
        // a CPU has no TF32
        assert_eq!(drawn(Precision::Tf32).1, f32.1);
        let bf16 = drawn(Precision::Bf16);
        let gaps = [gap(&bf16.0, &f32.0), gap(&bf16.1, &f32.1), gap(&bf16.2, &f32.2)];
        println!("text, pictures, latents: {gaps:?}");
        assert!(gaps.iter().all(|&gap| gap > 0.0 && gap < 0.1), "{gaps:?}");
    }

    #[test]
    fn pictures_do_not_depend_on_how_many_are_decoded_at_once() {
        let files = ModelFiles::read(&ModelLocation::Embedded(EMBEDDED_MODEL)).unwrap();
        let mut pipeline = Pipeline::from_files(files, Device::Cpu).unwrap();
        let [c, h, w] = pipeline.latent_shape();
        let x_0 = (Tensor::arange(5 * c * h * w, (Kind::Float, Device::Cpu)) * 0.37).sin().view([5, c, h, w]);
        let together = pipeline.vae.decode_scaled(&x_0);
        for decode_batch in [1, 2, 5, 9] {
            pipeline.vae.decode_batch = decode_batch;
            let apart = pipeline.vae.decode_scaled(&x_0);
            assert_eq!(apart.size(), together.size());
            let gap = (apart - &together).abs().max().double_value(&[]);
            println!("{decode_batch} at once: largest difference {gap:e}");
            // libtorch's last bits depend on the batch: observed 3e-7
            assert!(gap < 1e-6, "{decode_batch} at once: {gap}");
        }
        let none = pipeline.vae.decode_scaled(&x_0.narrow(0, 0, 0));
        let factor = pipeline.vae.config.downscale();
        assert_eq!(none.size(), [0, 3, h * factor, w * factor]);
    }
}
