//! Attention and the transformer blocks of the U-Net (diffusers' `Attention`, `BasicTransformerBlock`, `Transformer2DModel`).

use anyhow::{ensure, Result};
use tch::{Device, Tensor};

use super::{
    flops,
    layers::{to_pixels, to_tokens, Conv2d, GroupNorm, LayerNorm, Linear},
    parameters::Builder,
};
use crate::kernels::geglu::geglu;

/// softmax(q·kᵀ/√d)·v over `heads` heads; q, k, v of shape [B, tokens, heads·d]. Result [B, tokens of q, heads·d].
pub fn multi_head(q: &Tensor, k: &Tensor, v: &Tensor, heads: i64, causal: bool) -> Tensor {
    attend(q, k, v, heads, None, causal)
}

/// As [`multi_head`] with `mask` added to q·kᵀ/√d; it has a shape that expands to [B, heads, tokens of q, tokens of k].
pub fn multi_head_masked(q: &Tensor, k: &Tensor, v: &Tensor, heads: i64, mask: &Tensor) -> Tensor {
    attend(q, k, v, heads, Some(mask), false)
}

fn attend(q: &Tensor, k: &Tensor, v: &Tensor, heads: i64, mask: Option<&Tensor>, causal: bool) -> Tensor {
    // q·kᵀ and the weighted sum of v
    flops::add(2 * q.numel() as i64 * k.size()[1]);
    let split = |x: &Tensor| {
        let s = x.size();
        x.view([s[0], s[1], heads, s[2] / heads]).transpose(1, 2)
    };
    let out =
        Tensor::scaled_dot_product_attention(&split(q), &split(k), &split(v), mask, 0.0, causal, None::<f64>, false);
    let s = q.size();
    out.transpose(1, 2).reshape([s[0], s[1], s[2]])
}

/// Attention from `channels` wide tokens to `context_channels` wide ones (the same tokens for self-attention).
pub struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: i64,
}

impl Attention {
    pub fn new(b: &Builder, channels: i64, context_channels: i64, heads: i64) -> Result<Self> {
        ensure!(heads > 0 && channels % heads == 0, "{channels} channels do not divide into {heads} attention heads");
        Ok(Attention {
            to_q: Linear::without_bias(&b.sub("to_q"), channels, channels)?,
            to_k: Linear::without_bias(&b.sub("to_k"), context_channels, channels)?,
            to_v: Linear::without_bias(&b.sub("to_v"), context_channels, channels)?,
            to_out: Linear::new(&b.sub("to_out.0"), channels, channels)?,
            heads,
        })
    }

    /// x [B, N, channels], context [B, M, context_channels] → [B, N, channels].
    pub fn forward(&self, x: &Tensor, context: &Tensor) -> Tensor {
        let (q, k, v) = (self.to_q.forward(x), self.to_k.forward(context), self.to_v.forward(context));
        self.to_out.forward(&multi_head(&q, &k, &v, self.heads, false))
    }
}

/// Self-attention, cross-attention to the text, GEGLU feed-forward; each behind a LayerNorm and added.
struct TransformerBlock {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff_in: Linear,
    ff_out: Linear,
}

impl TransformerBlock {
    fn new(b: &Builder, channels: i64, context_channels: i64, heads: i64) -> Result<Self> {
        let eps = 1e-5;
        Ok(TransformerBlock {
            norm1: LayerNorm::new(&b.sub("norm1"), channels, eps)?,
            attn1: Attention::new(&b.sub("attn1"), channels, channels, heads)?,
            norm2: LayerNorm::new(&b.sub("norm2"), channels, eps)?,
            attn2: Attention::new(&b.sub("attn2"), channels, context_channels, heads)?,
            norm3: LayerNorm::new(&b.sub("norm3"), channels, eps)?,
            ff_in: Linear::new(&b.sub("ff.net.0.proj"), channels, 8 * channels)?,
            ff_out: Linear::new(&b.sub("ff.net.2"), 4 * channels, channels)?,
        })
    }

    fn forward(&self, x: &Tensor, context: &Tensor) -> Tensor {
        let n = self.norm1.forward(x);
        let x = self.attn1.forward(&n, &n) + x;
        let x = self.attn2.forward(&self.norm2.forward(&x), context) + x;
        let hidden = self.ff_in.forward(&self.norm3.forward(&x));
        self.ff_out.forward(&gated(&hidden)) + x
    }
}

/// a·gelu(b) of tokens [a | b].
fn gated(hidden: &Tensor) -> Tensor {
    if hidden.device() == Device::Cpu {
        let halves = hidden.chunk(2, -1);
        return &halves[0] * halves[1].gelu("none");
    }
    // as libtorch's own operations here: a failure ends the rank with the message
    geglu(hidden).unwrap_or_else(|e| panic!("{e:#}"))
}

enum Projection {
    Linear(Linear),
    /// SD 1.x: 1×1 convolutions.
    Conv(Conv2d),
}

/// A stack of transformer blocks over the pixels of a feature map.
pub struct Transformer2d {
    norm: GroupNorm,
    proj_in: Projection,
    blocks: Vec<TransformerBlock>,
    proj_out: Projection,
}

/// Shape of a [`Transformer2d`].
#[derive(Clone, Copy)]
pub struct TransformerShape {
    pub channels: i64,
    pub context_channels: i64,
    pub heads: i64,
    pub layers: i64,
    pub groups: i64,
    pub linear_projection: bool,
}

impl Transformer2d {
    pub fn new(b: &Builder, s: TransformerShape) -> Result<Self> {
        let projection = |name: &str| -> Result<Projection> {
            let b = b.sub(name);
            Ok(if s.linear_projection {
                Projection::Linear(Linear::new(&b, s.channels, s.channels)?)
            } else {
                Projection::Conv(Conv2d::new(&b, s.channels, s.channels, 1, 1, 0)?)
            })
        };
        let blocks = b.sub("transformer_blocks");
        Ok(Transformer2d {
            norm: GroupNorm::new(&b.sub("norm"), s.groups, s.channels, 1e-6)?,
            proj_in: projection("proj_in")?,
            blocks: (0..s.layers)
                .map(|i| TransformerBlock::new(&blocks.sub(i), s.channels, s.context_channels, s.heads))
                .collect::<Result<_>>()?,
            proj_out: projection("proj_out")?,
        })
    }

    /// x [B, C, H, W], context [B, M, context_channels] → [B, C, H, W].
    pub fn forward(&self, x: &Tensor, context: &Tensor) -> Tensor {
        let s = x.size();

        let normed = self.norm.forward(x);
        let mut tokens = match &self.proj_in {
            Projection::Linear(l) => l.forward(&to_tokens(&normed)),
            Projection::Conv(c) => to_tokens(&c.forward(&normed)),
        };
        for block in &self.blocks {
            tokens = block.forward(&tokens, context);
        }
        let out = match &self.proj_out {
            Projection::Linear(l) => to_pixels(&l.forward(&tokens), &s),
            Projection::Conv(c) => c.forward(&to_pixels(&tokens, &s)),
        };
        out + x
    }
}
