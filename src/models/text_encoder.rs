//! c → text embedding: the CLIP text model (transformers' `CLIPTextModel`), its last hidden state.

use anyhow::{bail, ensure, Result};
use serde::Deserialize;
use serde_json::Value;
use tch::{Kind, Tensor};

use super::{
    attention::multi_head,
    config_keys::{self, ensure_size, ensure_supported},
    layers::{LayerNorm, Linear},
    parameters::{Builder, Init},
};
use crate::python_json;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    Gelu,
    QuickGelu,
}

impl Activation {
    pub fn apply(self, x: &Tensor) -> Tensor {
        match self {
            Activation::Gelu => x.gelu("none"),
            Activation::QuickGelu => x * (x * 1.702).sigmoid(),
        }
    }
}

/// `text_encoder/config.json`; absent keys take transformers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct TextConfig {
    pub vocab_size: i64,
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub num_hidden_layers: i64,
    pub num_attention_heads: i64,
    pub max_position_embeddings: i64,
    pub hidden_act: Activation,
    pub layer_norm_eps: f64,
}

impl Default for TextConfig {
    fn default() -> Self {
        TextConfig {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
        }
    }
}

/// Keys of the text encoder itself; the others are of transformers, of training, or of the pooled output.
const READ: &[&str] = &[
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
];

/// Keys without effect on the last hidden state: the rest of transformers' `CLIPTextConfig`.
const WITHOUT_EFFECT: &[&str] = &[
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dropout",
    "dtype",
    "eos_token_id",
    "initializer_factor",
    "initializer_range",
    "model_type",
    "pad_token_id",
    "projection_dim",
    "torch_dtype",
    "transformers_version",
];

/// Keys that transformers' `CLIPTextConfig` does not know, apart from those of all its configs (which come in dozens).
pub fn unknown_keys(json: &Value) -> Vec<String> {
    let json = of_text(json);
    // a config that was written with all its defaults has the keys of generation, pruning and the like
    if json.get("output_hidden_states").is_some() {
        return Vec::new();
    }
    config_keys::unknown(json, &[READ, WITHOUT_EFFECT], &[])
}

/// The part of a whole CLIP model's config that is the text encoder's.
fn of_text(json: &Value) -> &Value {
    match json.get("model_type").and_then(Value::as_str) {
        Some("clip") => json.get("text_config").filter(|text| text.is_object()).unwrap_or(json),
        _ => json,
    }
}

impl TextConfig {
    pub fn from_json(json: &Value) -> Result<Self> {
        let json = of_text(json);
        if let Some(kind) = json.get("model_type").and_then(Value::as_str) {
            if kind != "clip_text_model" {
                bail!("model_type {kind} is not supported (only clip_text_model)");
            }
        }
        ensure_supported(json, &[("quantization_config", &[])])?;
        let config: TextConfig = python_json::from_value(&python_json::without_nulls(json)?)?;
        for (key, size) in [
            ("vocab_size", config.vocab_size),
            ("hidden_size", config.hidden_size),
            ("intermediate_size", config.intermediate_size),
            ("num_hidden_layers", config.num_hidden_layers),
            ("max_position_embeddings", config.max_position_embeddings),
        ] {
            ensure_size(key, size)?;
        }
        ensure!(
            config.num_attention_heads > 0 && config.hidden_size % config.num_attention_heads == 0,
            "hidden_size {} does not divide into {} heads",
            config.hidden_size,
            config.num_attention_heads
        );
        Ok(config)
    }
}

struct Layer {
    layer_norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

pub struct TextEncoder {
    pub config: TextConfig,
    token_embedding: Tensor,
    position_embedding: Tensor,
    layers: Vec<Layer>,
    final_layer_norm: LayerNorm,
}

impl TextEncoder {
    pub fn new(b: &Builder, config: &TextConfig) -> Result<Self> {
        let c = config;
        let b = b.sub("text_model");
        let width = c.hidden_size;
        let depth_scale = (2.0 * c.num_hidden_layers as f64).powf(-0.5);
        let (in_std, out_std) = ((width as f64).powf(-0.5) * depth_scale, (width as f64).powf(-0.5));
        let (fc1_std, fc2_std) = ((2.0 * width as f64).powf(-0.5), (width as f64).powf(-0.5) * depth_scale);
        let mut layers = Vec::new();
        for i in 0..c.num_hidden_layers {
            let b = b.sub("encoder.layers").sub(i);
            let a = b.sub("self_attn");
            layers.push(Layer {
                layer_norm1: LayerNorm::new(&b.sub("layer_norm1"), width, c.layer_norm_eps)?,
                q_proj: Linear::normal(&a.sub("q_proj"), width, width, in_std)?,
                k_proj: Linear::normal(&a.sub("k_proj"), width, width, in_std)?,
                v_proj: Linear::normal(&a.sub("v_proj"), width, width, in_std)?,
                out_proj: Linear::normal(&a.sub("out_proj"), width, width, out_std)?,
                layer_norm2: LayerNorm::new(&b.sub("layer_norm2"), width, c.layer_norm_eps)?,
                fc1: Linear::normal(&b.sub("mlp.fc1"), width, c.intermediate_size, fc1_std)?,
                fc2: Linear::normal(&b.sub("mlp.fc2"), c.intermediate_size, width, fc2_std)?,
            });
        }
        let e = b.sub("embeddings");
        Ok(TextEncoder {
            config: c.clone(),
            token_embedding: e.sub("token_embedding").parameter(
                "weight",
                &[c.vocab_size, width],
                Init::Normal(0.02),
            )?,
            position_embedding: e.sub("position_embedding").parameter(
                "weight",
                &[c.max_position_embeddings, width],
                Init::Normal(0.02),
            )?,
            layers,
            final_layer_norm: LayerNorm::new(&b.sub("final_layer_norm"), width, c.layer_norm_eps)?,
        })
    }

    /// Token ids i64 [B, tokens] → last hidden state f32 [B, tokens, hidden].
    pub fn forward(&self, ids: &Tensor) -> Tensor {
        let tokens = ids.size()[1];
        let positions = self.position_embedding.narrow(0, 0, tokens);
        let mut x = Tensor::embedding(&self.token_embedding, ids, -1, false, false) + positions;
        for layer in &self.layers {
            let n = layer.layer_norm1.forward(&x);
            let (q, k, v) = (layer.q_proj.forward(&n), layer.k_proj.forward(&n), layer.v_proj.forward(&n));
            x = layer.out_proj.forward(&multi_head(&q, &k, &v, self.config.num_attention_heads, true)) + x;
            let hidden = self.config.hidden_act.apply(&layer.fc1.forward(&layer.layer_norm2.forward(&x)));
            x = layer.fc2.forward(&hidden) + x;
        }
        self.final_layer_norm.forward(&x).to_kind(Kind::Float)
    }
}
