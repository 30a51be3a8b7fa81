//! The vision transformers of BLIP and CLIP: a picture as a row of tokens.
//!
//! Patches become tokens by a linear map, a class token stands in front, positions are added; then blocks of
//! self-attention and a two-layer network, each behind a LayerNorm and added. Names are those of BLIP's file (timm's);
//! [`super::clip::layouts`] gives CLIP's tensors these names.

use anyhow::{ensure, Result};
use tch::Tensor;

use super::weights::Checkpoint;
use crate::models::{
    attention::multi_head,
    layers::{LayerNorm, Linear},
    parameters::{Builder, Init},
    text_encoder::Activation,
};

/// Channels of an attention head in BLIP, and in CLIP's models of up to 1024 channels.
pub const HEAD: i64 = 64;
/// Heads of the published towers whose heads are wider.
const WIDE: [(i64, i64); 3] = [(1280, 16), (1408, 16), (1664, 16)];

/// What distinguishes the two families.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// The patches' linear map has a bias.
    pub patch_bias: bool,
    /// A LayerNorm before the first block.
    pub norm_first: bool,
    pub eps: f64,
    pub activation: Activation,
}

/// BLIP's ViT: erf GELU, ε = 1e-6.
pub const BLIP: Style = Style { patch_bias: true, norm_first: false, eps: 1e-6, activation: Activation::Gelu };
/// CLIP's ViT: x·σ(1.702 x), ε = 1e-5.
pub const CLIP: Style = Style { patch_bias: false, norm_first: true, eps: 1e-5, activation: Activation::QuickGelu };

/// Sizes, as a checkpoint's shapes say them.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub width: i64,
    /// Side of a patch in pixels.
    pub patch: i64,
    /// Side of the picture in pixels.
    pub side: i64,
    pub depth: i64,
    pub hidden: i64,
    /// Attention heads, as published for this width: the shapes do not say them.
    pub heads: i64,
}

impl Sizes {
    /// # Errors
    /// Tensors without which there is no such network, and sizes that do not fit together.
    pub fn of(checkpoint: &Checkpoint, prefix: &str) -> Result<Sizes> {
        let [width, _, patch, _] = checkpoint.shape(&format!("{prefix}patch_embed.proj.weight"))?;
        let [_, tokens, _] = checkpoint.shape(&format!("{prefix}pos_embed"))?;
        let [hidden, _] = checkpoint.shape(&format!("{prefix}blocks.0.mlp.fc1.weight"))?;
        let at = &checkpoint.path;
        let grid = ((tokens - 1).max(0) as f64).sqrt() as i64;
        ensure!(grid > 0 && grid * grid == tokens - 1, "{at}: {tokens} positions are no square of patches and one");
        ensure!(patch > 0, "{at}: patches of {patch} pixels");
        let depth = checkpoint.blocks(&format!("{prefix}blocks"));
        let wide = WIDE.iter().find(|(wide, _)| *wide == width).map(|(_, heads)| *heads);
        let heads = wide.unwrap_or(if width % HEAD == 0 { width / HEAD } else { 0 });
        Ok(Sizes { width, patch, side: grid * patch, depth, hidden, heads })
    }
}

struct Block {
    norm1: LayerNorm,
    qkv: Linear,
    proj: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

pub struct VisionTransformer {
    pub sizes: Sizes,
    style: Style,
    class_token: Tensor,
    positions: Tensor,
    patch_weight: Tensor,
    patch_bias: Option<Tensor>,
    norm_first: Option<LayerNorm>,
    blocks: Vec<Block>,
    norm: LayerNorm,
}

impl VisionTransformer {
    pub fn new(b: &Builder, sizes: Sizes, style: Style) -> Result<Self> {
        let Sizes { width, patch, side, depth, hidden, heads } = sizes;
        ensure!(heads > 0 && width % heads == 0, "width {width} does not divide into heads of {HEAD}");
        let tokens = (side / patch) * (side / patch) + 1;
        let (small, patches) = (Init::Normal(0.02), b.sub("patch_embed.proj"));
        let norm = |b: &Builder, name: &str| LayerNorm::new(&b.sub(name), width, style.eps);
        let block = |i: i64| -> Result<Block> {
            let b = b.sub("blocks").sub(i);
            Ok(Block {
                norm1: norm(&b, "norm1")?,
                qkv: Linear::new(&b.sub("attn.qkv"), width, 3 * width)?,
                proj: Linear::new(&b.sub("attn.proj"), width, width)?,
                norm2: norm(&b, "norm2")?,
                fc1: Linear::new(&b.sub("mlp.fc1"), width, hidden)?,
                fc2: Linear::new(&b.sub("mlp.fc2"), hidden, width)?,
            })
        };
        Ok(VisionTransformer {
            sizes,
            style,
            class_token: b.parameter("cls_token", &[1, 1, width], small)?,
            positions: b.parameter("pos_embed", &[1, tokens, width], small)?,
            patch_weight: patches.parameter("weight", &[width, 3, patch, patch], small)?,
            patch_bias: if style.patch_bias { Some(patches.parameter("bias", &[width], Init::Zeros)?) } else { None },
            norm_first: if style.norm_first { Some(norm(b, "norm_pre")?) } else { None },
            blocks: (0..depth).map(block).collect::<Result<_>>()?,
            norm: norm(b, "norm")?,
        })
    }

    /// Normalised pictures f32 `[n, 3, side, side]` → tokens f32 `[n, 1 + patches, width]` after the last block, the
    /// class token first; [`VisionTransformer::norm`] is not applied yet.
    pub fn forward(&self, pictures: &Tensor) -> Tensor {
        let patch = self.sizes.patch;
        let patches = pictures.conv2d(&self.patch_weight, self.patch_bias.as_ref(), patch, 0, 1, 1);
        let class = self.class_token.expand([pictures.size()[0], 1, self.sizes.width], false);
        let mut x = Tensor::cat(&[class, patches.flatten(2, 3).transpose(1, 2)], 1) + &self.positions;
        if let Some(norm) = &self.norm_first {
            x = norm.forward(&x);
        }
        for block in &self.blocks {
            let qkv = block.qkv.forward(&block.norm1.forward(&x)).chunk(3, -1);
            x = block.proj.forward(&multi_head(&qkv[0], &qkv[1], &qkv[2], self.sizes.heads, false)) + x;
            let hidden = self.style.activation.apply(&block.fc1.forward(&block.norm2.forward(&x)));
            x = block.fc2.forward(&hidden) + x;
        }
        x
    }

    /// The LayerNorm after the last block, of any of its tokens.
    pub fn norm(&self, tokens: &Tensor) -> Tensor {
        self.norm.forward(tokens)
    }
}
