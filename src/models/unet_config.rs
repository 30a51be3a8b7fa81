//! `unet/config.json` of a diffusers folder, validated. Absent keys take diffusers' defaults; a value that asks for
//! something the network here does not build is an error that names the key.

use anyhow::{bail, ensure, Context, Result};
use serde::Deserialize;
use serde_json::Value;

use super::config_keys::{ensure_class, ensure_list, ensure_size, ensure_supported};
use crate::python_json;

/// Keys that are read, apart from the fixed ones.
const READ: &[&str] = &[
    "sample_size",
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "up_block_types",
    "mid_block_type",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "use_linear_projection",
    "norm_num_groups",
    "norm_eps",
    "flip_sin_to_cos",
    "freq_shift",
    "downsample_padding",
    "only_cross_attention",
];

/// Keys without effect in a network that is built here. `upcast_attention` has none in diffusers either, where attention is
/// torch's fused one (`AttnProcessor2_0` hands q, k and v over as they are): its softmax is f32 whatever they are.
const WITHOUT_EFFECT: &[&str] = &[
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "upcast_attention",
];

/// Keys that diffusers' U-Net does not know and that nobody reads here.
pub fn unknown_keys(json: &Value) -> Vec<String> {
    super::config_keys::unknown(json, &[READ, WITHOUT_EFFECT], FIXED)
}

/// A number for all levels, or one per level.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum PerLevel<T> {
    One(T),
    Each(Vec<T>),
}

impl<T: Copy> PerLevel<T> {
    fn expand(&self, key: &str, levels: usize) -> Result<Vec<T>> {
        match self {
            PerLevel::One(x) => Ok(vec![*x; levels]),
            PerLevel::Each(xs) => {
                ensure!(xs.len() == levels, "{key} lists {} values for {levels} levels", xs.len());
                Ok(xs.clone())
            }
        }
    }
}

/// One number for height and width, or the two.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(untagged)]
enum Side {
    Both(i64),
    HeightAndWidth([i64; 2]),
}

#[derive(Deserialize)]
#[serde(default)]
struct Raw {
    sample_size: Side,
    in_channels: i64,
    out_channels: i64,
    block_out_channels: Vec<i64>,
    layers_per_block: PerLevel<i64>,
    down_block_types: Vec<String>,
    up_block_types: Vec<String>,
    mid_block_type: Option<String>,
    attention_head_dim: PerLevel<i64>,
    num_attention_heads: Option<PerLevel<i64>>,
    cross_attention_dim: PerLevel<i64>,
    transformer_layers_per_block: PerLevel<i64>,
    use_linear_projection: bool,
    norm_num_groups: i64,
    norm_eps: f64,
    flip_sin_to_cos: bool,
    freq_shift: f64,
    downsample_padding: i64,
}

impl Default for Raw {
    fn default() -> Self {
        let cross = "CrossAttn";
        Raw {
            sample_size: Side::Both(64),
            in_channels: 4,
            out_channels: 4,
            block_out_channels: vec![320, 640, 1280, 1280],
            layers_per_block: PerLevel::One(2),
            down_block_types: [cross, cross, cross, ""].map(|c| format!("{c}DownBlock2D")).to_vec(),
            up_block_types: ["", cross, cross, cross].map(|c| format!("{c}UpBlock2D")).to_vec(),
            mid_block_type: Some("UNetMidBlock2DCrossAttn".into()),
            attention_head_dim: PerLevel::One(8),
            num_attention_heads: None,
            cross_attention_dim: PerLevel::One(1280),
            transformer_layers_per_block: PerLevel::One(1),
            use_linear_projection: false,
            norm_num_groups: 32,
            norm_eps: 1e-5,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            downsample_padding: 1,
        }
    }
}

impl Raw {
    fn sides(&self) -> [i64; 2] {
        match self.sample_size {
            Side::Both(side) => [side; 2],
            Side::HeightAndWidth(sides) => sides,
        }
    }

    fn ensure_sizes(&self) -> Result<()> {
        self.sides().into_iter().try_for_each(|side| ensure_size("sample_size", side))?;
        ensure_size("in_channels", self.in_channels)?;
        ensure_size("norm_num_groups", self.norm_num_groups)?;
        ensure!(
            self.out_channels == self.in_channels,
            "out_channels = {} differs from in_channels = {}, which is not supported",
            self.out_channels,
            self.in_channels
        );
        // half of the time embedding's width are sines, half cosines
        ensure!(self.block_out_channels[0] % 2 == 0, "block_out_channels[0] = {} is odd", self.block_out_channels[0]);
        ensure!((0..=1).contains(&self.downsample_padding), "downsample_padding = {}", self.downsample_padding);
        ensure!(self.norm_eps > 0.0, "norm_eps = {} is not positive", self.norm_eps);
        Ok(())
    }
}

/// Keys that must hold one of these values (or be absent or null): variants of the network that are not built here.
const FIXED: &[(&str, &[&str])] = &[
    ("act_fn", &["\"silu\"", "\"swish\"", "\"SiLU\""]),
    ("center_input_sample", &["false"]),
    ("dual_cross_attention", &["false"]),
    ("quantization_config", &[]),
    ("class_embed_type", &[]),
    ("num_class_embeds", &[]),
    ("addition_embed_type", &[]),
    ("encoder_hid_dim", &[]),
    ("encoder_hid_dim_type", &[]),
    ("resnet_time_scale_shift", &["\"default\""]),
    ("resnet_skip_time_act", &["false"]),
    ("resnet_out_scale_factor", &["1", "1.0"]),
    ("time_embedding_type", &["\"positional\""]),
    ("time_embedding_dim", &[]),
    ("time_embedding_act_fn", &[]),
    ("timestep_post_act", &[]),
    ("time_cond_proj_dim", &[]),
    ("conv_in_kernel", &["3"]),
    ("conv_out_kernel", &["3"]),
    ("attention_type", &["\"default\""]),
    ("class_embeddings_concat", &["false"]),
    ("mid_block_only_cross_attention", &["false"]),
    ("cross_attention_norm", &[]),
    ("reverse_transformer_layers_per_block", &[]),
    ("mid_block_scale_factor", &["1", "1.0"]),
    ("dropout", &["0", "0.0"]),
];

/// One resolution level of the U-Net.
#[derive(Clone, Debug)]
pub struct Level {
    pub channels: i64,
    pub layers: i64,
    pub heads: i64,
    pub context_channels: i64,
    pub transformer_layers: i64,
    pub cross_attention_down: bool,
    pub cross_attention_up: bool,
}

/// What the U-Net is built from.
#[derive(Clone, Debug)]
pub struct UNetConfig {
    /// Height and width of the latents at the model's native size.
    pub sample_size: [i64; 2],
    pub in_channels: i64,
    pub out_channels: i64,
    /// Finest first.
    pub levels: Vec<Level>,
    pub linear_projection: bool,
    pub groups: i64,
    pub norm_eps: f64,
    pub flip_sin_to_cos: bool,
    pub freq_shift: f64,
    pub downsample_padding: i64,
}

impl UNetConfig {
    pub fn from_json(json: &Value) -> Result<Self> {
        ensure_class(json, "UNet2DConditionModel")?;
        ensure_supported(json, FIXED)?;
        ensure_list(json, "only_cross_attention", &Value::Bool(false))?;
        for key in ["mid_block_type", "norm_num_groups", "flip_sin_to_cos", "attention_head_dim"] {
            ensure!(json.get(key) != Some(&Value::Null), "{key} = null is not supported");
        }
        let raw: Raw = python_json::from_value(&python_json::without_nulls(json)?)?;
        let n = raw.block_out_channels.len();
        ensure!(n > 0, "block_out_channels is empty");
        raw.ensure_sizes()?;
        ensure!(
            raw.down_block_types.len() == n,
            "down_block_types lists {} blocks for {n} levels",
            raw.down_block_types.len()
        );
        ensure!(
            raw.up_block_types.len() == n,
            "up_block_types lists {} blocks for {n} levels",
            raw.up_block_types.len()
        );
        if raw.mid_block_type.as_deref() != Some("UNetMidBlock2DCrossAttn") {
            bail!("mid_block_type = {:?} is not supported (only UNetMidBlock2DCrossAttn)", raw.mid_block_type);
        }
        let layers = raw.layers_per_block.expand("layers_per_block", n)?;
        // diffusers' historical slip: where num_attention_heads is null, attention_head_dim IS the number of heads
        let heads =
            raw.num_attention_heads.as_ref().unwrap_or(&raw.attention_head_dim).expand("attention_head_dim", n)?;
        let context = raw.cross_attention_dim.expand("cross_attention_dim", n)?;
        let transformers = raw.transformer_layers_per_block.expand("transformer_layers_per_block", n)?;
        let mut levels = Vec::new();
        for i in 0..n {
            let (down, up) = (&raw.down_block_types[i], &raw.up_block_types[n - 1 - i]);
            for (key, value) in [
                ("block_out_channels", raw.block_out_channels[i]),
                ("layers_per_block", layers[i]),
                ("attention_head_dim", heads[i]),
                ("cross_attention_dim", context[i]),
                ("transformer_layers_per_block", transformers[i]),
            ] {
                ensure_size(key, value)?;
            }
            levels.push(Level {
                channels: raw.block_out_channels[i],
                layers: layers[i],
                heads: heads[i],
                context_channels: context[i],
                transformer_layers: transformers[i],
                cross_attention_down: has_attention(down, "DownBlock2D").context("down_block_types")?,
                cross_attention_up: has_attention(up, "UpBlock2D").context("up_block_types")?,
            });
        }
        Ok(UNetConfig {
            sample_size: raw.sides(),
            in_channels: raw.in_channels,
            out_channels: raw.out_channels,
            levels,
            linear_projection: raw.use_linear_projection,
            groups: raw.norm_num_groups,
            norm_eps: raw.norm_eps,
            flip_sin_to_cos: raw.flip_sin_to_cos,
            freq_shift: raw.freq_shift,
            downsample_padding: raw.downsample_padding,
        })
    }
}

fn has_attention(name: &str, plain: &str) -> Result<bool> {
    // the prefix of diffusers' first releases, which it still takes off
    match name.strip_prefix("UNetRes").unwrap_or(name).strip_suffix(plain) {
        Some("") => Ok(false),
        Some("CrossAttn") => Ok(true),
        _ => bail!("block {name} is not supported (only {plain} and CrossAttn{plain})"),
    }
}
