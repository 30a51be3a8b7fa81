//! BLIP's text encoder: BERT whose layers also attend to the picture's tokens.
//!
//! A layer is self-attention over the prompt (padding masked by −10,000), cross-attention to the picture, and a
//! feed-forward network, each added to its input and then normalised (ε = 1e-12).

use anyhow::{ensure, Result};
use tch::{Kind, Tensor};

use super::tokenizer::Tokens;
use crate::{
    models::{
        attention::{multi_head, multi_head_masked},
        layers::{LayerNorm, Linear},
        parameters::{Builder, Init},
        text_encoder::Activation,
    },
    rewards::{vision_transformer::HEAD, weights::Checkpoint},
};

const EPS: f64 = 1e-12;
/// Added where a token must not be seen.
const HIDDEN: f64 = -10_000.0;

/// Sizes, as a checkpoint's shapes say them.
#[derive(Clone, Copy, Debug)]
pub struct TextSizes {
    pub vocabulary: i64,
    pub positions: i64,
    pub width: i64,
    pub depth: i64,
    pub hidden: i64,
    /// Width of the picture's tokens.
    pub context: i64,
}

impl TextSizes {
    /// # Errors
    /// Tensors without which there is no such network.
    pub fn of(checkpoint: &Checkpoint, prefix: &str) -> Result<TextSizes> {
        let [vocabulary, width] = checkpoint.shape(&format!("{prefix}embeddings.word_embeddings.weight"))?;
        let [positions, _] = checkpoint.shape(&format!("{prefix}embeddings.position_embeddings.weight"))?;
        let layer = format!("{prefix}encoder.layer");
        let [hidden, _] = checkpoint.shape(&format!("{layer}.0.intermediate.dense.weight"))?;
        let [_, context] = checkpoint.shape(&format!("{layer}.0.crossattention.self.key.weight"))?;
        ensure!(width % HEAD == 0, "{}: text width {width} does not divide into heads of {HEAD}", checkpoint.path);
        Ok(TextSizes { vocabulary, positions, width, depth: checkpoint.blocks(&layer), hidden, context })
    }
}

struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    dense: Linear,
    norm: LayerNorm,
}

impl Attention {
    fn new(b: &Builder, width: i64, context: i64) -> Result<Self> {
        let own = b.sub("self");
        Ok(Attention {
            query: Linear::new(&own.sub("query"), width, width)?,
            key: Linear::new(&own.sub("key"), context, width)?,
            value: Linear::new(&own.sub("value"), context, width)?,
            dense: Linear::new(&b.sub("output.dense"), width, width)?,
            norm: LayerNorm::new(&b.sub("output.LayerNorm"), width, EPS)?,
        })
    }

    fn forward(&self, x: &Tensor, context: &Tensor, mask: Option<&Tensor>) -> Tensor {
        let (q, k, v) = (self.query.forward(x), self.key.forward(context), self.value.forward(context));
        let heads = q.size()[2] / HEAD;
        let mixed = match mask {
            Some(mask) => multi_head_masked(&q, &k, &v, heads, mask),
            None => multi_head(&q, &k, &v, heads, false),
        };
        self.norm.forward(&(self.dense.forward(&mixed) + x))
    }
}

struct Layer {
    attention: Attention,
    crossattention: Attention,
    intermediate: Linear,
    output: Linear,
    norm: LayerNorm,
}

pub struct TextEncoder {
    words: Tensor,
    positions: Tensor,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

impl TextEncoder {
    pub fn new(b: &Builder, s: TextSizes) -> Result<Self> {
        let e = b.sub("embeddings");
        let small = Init::Normal(0.02);
        let layer = |i: i64| -> Result<Layer> {
            let b = b.sub("encoder.layer").sub(i);
            Ok(Layer {
                attention: Attention::new(&b.sub("attention"), s.width, s.width)?,
                crossattention: Attention::new(&b.sub("crossattention"), s.width, s.context)?,
                intermediate: Linear::new(&b.sub("intermediate.dense"), s.width, s.hidden)?,
                output: Linear::new(&b.sub("output.dense"), s.hidden, s.width)?,
                norm: LayerNorm::new(&b.sub("output.LayerNorm"), s.width, EPS)?,
            })
        };
        Ok(TextEncoder {
            words: e.sub("word_embeddings").parameter("weight", &[s.vocabulary, s.width], small)?,
            positions: e.sub("position_embeddings").parameter("weight", &[s.positions, s.width], small)?,
            norm: LayerNorm::new(&e.sub("LayerNorm"), s.width, EPS)?,
            layers: (0..s.depth).map(layer).collect::<Result<_>>()?,
        })
    }

    /// Prompts and the pictures they are judged with, f32 `[n, tokens, context]` → the last hidden state of \[CLS\],
    /// f32 `[n, width]`.
    pub fn forward(&self, prompts: &Tokens, pictures: &Tensor) -> Tensor {
        let device = pictures.device();
        let (ids, lengths) = (prompts.ids.to_device(device), prompts.lengths.to_device(device));
        let tokens = ids.size()[1];
        let place = Tensor::arange(tokens, (Kind::Int64, device)).view([1, 1, 1, -1]);
        let mask = place.ge_tensor(&lengths.view([-1, 1, 1, 1])).to_kind(Kind::Float) * HIDDEN;
        let words = Tensor::embedding(&self.words, &ids, -1, false, false);
        let mut x = self.norm.forward(&(words + self.positions.narrow(0, 0, tokens)));
        for layer in &self.layers {
            x = layer.attention.forward(&x, &x, Some(&mask));
            x = layer.crossattention.forward(&x, pictures, None);
            let hidden = Activation::Gelu.apply(&layer.intermediate.forward(&x));
            x = layer.norm.forward(&(layer.output.forward(&hidden) + x));
        }
        x.select(1, 0)
    }
}
