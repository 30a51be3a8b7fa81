//! What the weights of a CLIP do not say: heads and activations. They come from a configuration file or from the table of
//! published models; a model that is in neither is refused, since a wrong number of heads gives wrong scores without an error.

use std::path::Path;

use anyhow::{bail, ensure, Context, Result};
use serde::Deserialize;
use serde_json::Value;

use crate::{
    models::text_encoder::{Activation, TextConfig},
    python_json,
    rewards::{
        vision_transformer::{Sizes, Style, CLIP},
        weights::Checkpoint,
    },
};

/// A tower as its weights' shapes say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tower {
    width: i64,
    layers: i64,
    hidden: i64,
}

/// The whole model as its weights' shapes say it.
#[derive(Clone, Copy, Debug)]
struct Shape {
    picture: Tower,
    patch: i64,
    side: i64,
    joint: i64,
    text: Tower,
    vocabulary: i64,
    positions: i64,
}

/// What a CLIP is built from.
pub struct Plan {
    pub sizes: Sizes,
    pub style: Style,
    pub text: TextConfig,
    pub joint: i64,
    /// The id of the end token, where a text's row is that of the first one; else it is the row of the largest id.
    pub end: Option<i64>,
    /// Mean and standard deviation of the channels, where the configuration says them.
    pub channels: Option<([f32; 3], [f32; 3])>,
}

/// A model as it was published.
struct Published {
    name: &'static str,
    picture: Tower,
    picture_heads: i64,
    patch: i64,
    /// The picture's side, where the same sizes exist with another activation at other sides.
    side: Option<i64>,
    joint: i64,
    text: Tower,
    text_heads: i64,
    /// None: OpenAI's has x·σ(1.702 x), others of these sizes have GELU.
    activation: Option<Activation>,
}

const fn tower(width: i64, layers: i64, hidden: i64) -> Tower {
    Tower { width, layers, hidden }
}

/// OpenAI's models (also trained again by others) and laion's large ones. Sources: the configurations of open_clip.
const PUBLISHED: [Published; 6] = [
    Published {
        name: "ViT-B/32",
        picture: tower(768, 12, 3072),
        picture_heads: 12,
        patch: 32,
        side: None,
        joint: 512,
        text: tower(512, 12, 2048),
        text_heads: 8,
        activation: None,
    },
    Published {
        name: "ViT-B/16",
        picture: tower(768, 12, 3072),
        picture_heads: 12,
        patch: 16,
        side: None,
        joint: 512,
        text: tower(512, 12, 2048),
        text_heads: 8,
        activation: None,
    },
    Published {
        name: "ViT-L/14",
        picture: tower(1024, 24, 4096),
        picture_heads: 16,
        patch: 14,
        side: None,
        joint: 768,
        text: tower(768, 12, 3072),
        text_heads: 12,
        activation: None,
    },
    Published {
        name: "ViT-H/14",
        picture: tower(1280, 32, 5120),
        picture_heads: 16,
        patch: 14,
        side: Some(224),
        joint: 1024,
        text: tower(1024, 24, 4096),
        text_heads: 16,
        activation: Some(Activation::Gelu),
    },
    Published {
        name: "ViT-g/14",
        picture: tower(1408, 40, 6144),
        picture_heads: 16,
        patch: 14,
        side: Some(224),
        joint: 1024,
        text: tower(1024, 24, 4096),
        text_heads: 16,
        activation: Some(Activation::Gelu),
    },
    Published {
        name: "ViT-bigG/14",
        picture: tower(1664, 48, 8192),
        picture_heads: 16,
        patch: 14,
        side: Some(224),
        joint: 1280,
        text: tower(1280, 32, 5120),
        text_heads: 20,
        activation: Some(Activation::Gelu),
    },
];

impl Published {
    fn is(&self, s: &Shape) -> bool {
        let same = self.picture == s.picture && self.patch == s.patch && self.joint == s.joint && self.text == s.text;
        same && self.side.is_none_or(|side| side == s.side) && s.vocabulary == 49_408 && s.positions == 77
    }
}

/// A configuration beside the weights, by the names of the two libraries.
const BESIDE: [&str; 2] = ["config.json", "open_clip_config.json"];

/// Hugging Face's `vision_config`; absent keys take transformers' defaults.
#[derive(Deserialize)]
#[serde(default)]
struct VisionConfig {
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    image_size: i64,
    patch_size: i64,
    hidden_act: Activation,
    layer_norm_eps: f64,
}

impl Default for VisionConfig {
    fn default() -> Self {
        VisionConfig {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            image_size: 224,
            patch_size: 32,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
        }
    }
}

/// `open_clip_config.json`. Keys beyond these change the network, so they are refused.
#[derive(Deserialize)]
struct OpenClip {
    model_cfg: OpenClipModel,
    #[serde(default)]
    preprocess_cfg: OpenClipChannels,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OpenClipModel {
    embed_dim: i64,
    vision_cfg: OpenClipVision,
    text_cfg: OpenClipText,
    #[serde(default)]
    quick_gelu: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OpenClipVision {
    image_size: i64,
    layers: i64,
    width: i64,
    #[serde(default = "sixty_four")]
    head_width: i64,
    patch_size: i64,
    #[serde(default = "four")]
    mlp_ratio: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OpenClipText {
    context_length: i64,
    vocab_size: i64,
    width: i64,
    heads: i64,
    layers: i64,
    #[serde(default = "four")]
    mlp_ratio: f64,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct OpenClipChannels {
    mean: Option<[f32; 3]>,
    std: Option<[f32; 3]>,
}

fn sixty_four() -> i64 {
    64
}

fn four() -> f64 {
    4.0
}

impl Shape {
    fn of(checkpoint: &Checkpoint) -> Result<(Shape, Sizes)> {
        let sizes = Sizes::of(checkpoint, "")?;
        let [joint, _] = checkpoint.shape("projection")?;
        let text = "text_model";
        let [vocabulary, width] = checkpoint.shape(&format!("{text}.embeddings.token_embedding.weight"))?;
        let [positions, _] = checkpoint.shape(&format!("{text}.embeddings.position_embedding.weight"))?;
        let [hidden, _] = checkpoint.shape(&format!("{text}.encoder.layers.0.mlp.fc1.weight"))?;
        let layers = checkpoint.blocks(&format!("{text}.encoder.layers"));
        let [text_joint, _] = checkpoint.shape("text_projection")?;
        ensure!(
            joint == text_joint,
            "{}: pictures are projected to {joint} numbers and texts to {text_joint}",
            checkpoint.path
        );
        let shape = Shape {
            picture: tower(sizes.width, sizes.depth, sizes.hidden),
            patch: sizes.patch,
            side: sizes.side,
            joint,
            text: tower(width, layers, hidden),
            vocabulary,
            positions,
        };
        Ok((shape, sizes))
    }

    fn in_words(&self) -> String {
        let Shape { picture: p, text: t, patch, side, joint, .. } = self;
        format!(
            "pictures of {side} in patches of {patch}, width {}, {} layers, MLP {}; texts of width {}, {} layers, MLP {}; \
             joint width {joint}",
            p.width, p.layers, p.hidden, t.width, t.layers, t.hidden
        )
    }

    fn plan(&self, mut sizes: Sizes, heads: [i64; 2], activations: [Activation; 2], eps: [f64; 2]) -> Result<Plan> {
        for (tower, heads, what) in [(self.picture, heads[0], "pictures"), (self.text, heads[1], "texts")] {
            ensure!(
                heads > 0 && tower.width % heads == 0,
                "the width {} of {what} does not divide into {heads} heads",
                tower.width
            );
        }
        sizes.heads = heads[0];
        let text = TextConfig {
            vocab_size: self.vocabulary,
            hidden_size: self.text.width,
            intermediate_size: self.text.hidden,
            num_hidden_layers: self.text.layers,
            num_attention_heads: heads[1],
            max_position_embeddings: self.positions,
            hidden_act: activations[1],
            layer_norm_eps: eps[1],
        };
        let style = Style { eps: eps[0], activation: activations[0], ..CLIP };
        Ok(Plan { sizes, style, text, joint: self.joint, end: None, channels: None })
    }
}

/// The plan for a checkpoint under canonical names; `config` is the setting, "" for a file beside the weights or, where there
/// is none, the table.
///
/// # Errors
/// A configuration that cannot be read, is of another architecture or does not fit the weights; weights of no published model
/// without a configuration.
pub fn plan(checkpoint: &Checkpoint, config: &str) -> Result<Plan> {
    let (shape, sizes) = Shape::of(checkpoint)?;
    let mut plan = match find(&checkpoint.path, config)? {
        Some((path, json)) => configured(&shape, sizes, &json, &checkpoint.path).with_context(|| path)?,
        None => published(&shape, sizes, checkpoint)?,
    };
    let preprocessing = folder_of(&checkpoint.path).join("preprocessor_config.json");
    if preprocessing.is_file() {
        let path = preprocessing.display().to_string();
        let said: Preprocessing = python_json::from_value(&python_json::without_nulls(&read(&preprocessing)?)?)
            .with_context(|| path.clone())?;
        plan.channels = said.image_mean.zip(said.image_std).or(plan.channels);
        let crop = said.crop_size.as_ref().and_then(|crop| crop.as_i64().or_else(|| crop.get("height")?.as_i64()));
        let side = shape.side;
        ensure!(
            crop.is_none_or(|crop| crop == side),
            "{path}: crop_size = {}, but pictures of {} have {side} pixels: the file of another model",
            crop.unwrap_or_default(),
            checkpoint.path
        );
    }
    Ok(plan)
}

/// Hugging Face's `preprocessor_config.json`, as far as it belongs to the weights; how a size is changed is a setting.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Preprocessing {
    image_mean: Option<[f32; 3]>,
    image_std: Option<[f32; 3]>,
    crop_size: Option<Value>,
}

fn folder_of(weights: &str) -> &Path {
    Path::new(weights).parent().unwrap_or(Path::new(""))
}

fn read(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    python_json::parse(&bytes).map_err(|e| anyhow::anyhow!("{} {e}", path.display()))
}

/// The configuration that a setting names or that lies beside the weights.
fn find(weights: &str, config: &str) -> Result<Option<(String, Value)>> {
    if !config.is_empty() {
        return Ok(Some((config.to_string(), read(Path::new(config))?)));
    }
    let folder = folder_of(weights);
    for path in BESIDE.map(|name| folder.join(name)).iter().filter(|path| path.is_file()) {
        let json = read(path)?;
        if json.get("model_cfg").is_some() || json.get("vision_config").is_some() || is_clip(&json) {
            return Ok(Some((path.display().to_string(), json)));
        }
        let kind = json.get("model_type").and_then(Value::as_str).unwrap_or("none");
        log::warn!("{}: model_type {kind}: it is no CLIP's and is not used for {weights}", path.display());
    }
    Ok(None)
}

fn is_clip(json: &Value) -> bool {
    json.get("model_type").and_then(Value::as_str).is_some_and(|kind| kind.starts_with("clip"))
}

fn published(shape: &Shape, sizes: Sizes, checkpoint: &Checkpoint) -> Result<Plan> {
    let at = &checkpoint.path;
    let ask = "its config.json or open_clip_config.json, beside it or named as `config`, says them";
    let Some(known) = PUBLISHED.iter().find(|known| known.is(shape)) else {
        let names: Vec<&str> = PUBLISHED.iter().map(|known| known.name).collect();
        bail!(
            "{at}: {}: no published CLIP ({}). Weights do not tell the number of heads and the activation; {ask}",
            shape.in_words(),
            names.join(", ")
        );
    };
    let activation = match known.activation {
        Some(activation) => activation,
        // only OpenAI published archives of TorchScript
        None if checkpoint.archive => Activation::QuickGelu,
        None => bail!(
            "{at}: {} exists with two activations (OpenAI's x·σ(1.702 x), others' GELU), which weights do not tell; {ask}",
            known.name
        ),
    };
    shape.plan(sizes, [known.picture_heads, known.text_heads], [activation; 2], [CLIP.eps; 2])
}

fn configured(shape: &Shape, sizes: Sizes, json: &Value, at: &str) -> Result<Plan> {
    match json.get("model_cfg") {
        Some(_) => of_open_clip(shape, sizes, json, at),
        None => of_hugging_face(shape, sizes, json, at),
    }
}

/// Fails where the configuration's numbers are not the weights'.
fn agree(at: &str, rows: &[(&str, i64, i64)]) -> Result<()> {
    for (key, says, has) in rows {
        ensure!(says == has, "{key} = {says}, but {at} has {has}: the configuration of another model");
    }
    Ok(())
}

fn of_hugging_face(shape: &Shape, sizes: Sizes, json: &Value, at: &str) -> Result<Plan> {
    let kind = json.get("model_type").and_then(Value::as_str).unwrap_or("clip");
    ensure!(kind == "clip", "model_type {kind} is not supported (only clip, with both towers)");
    let part = |key: &str| {
        let part = json.get(key).filter(|part| part.is_object());
        part.with_context(|| format!("{key} is missing: no configuration of a CLIP with both towers"))
    };
    let vision: VisionConfig =
        python_json::from_value(&python_json::without_nulls(part("vision_config")?)?).context("vision_config")?;
    let text_json = part("text_config")?;
    let text = TextConfig::from_json(text_json).context("text_config")?;
    agree(
        at,
        &[
            ("vision_config.hidden_size", vision.hidden_size, shape.picture.width),
            ("vision_config.num_hidden_layers", vision.num_hidden_layers, shape.picture.layers),
            ("vision_config.intermediate_size", vision.intermediate_size, shape.picture.hidden),
            ("vision_config.patch_size", vision.patch_size, shape.patch),
            ("vision_config.image_size", vision.image_size, shape.side),
            ("text_config.hidden_size", text.hidden_size, shape.text.width),
            ("text_config.num_hidden_layers", text.num_hidden_layers, shape.text.layers),
            ("text_config.intermediate_size", text.intermediate_size, shape.text.hidden),
            ("text_config.vocab_size", text.vocab_size, shape.vocabulary),
            ("text_config.max_position_embeddings", text.max_position_embeddings, shape.positions),
        ],
    )?;
    if let Some(joint) = json.get("projection_dim").and_then(Value::as_i64) {
        agree(at, &[("projection_dim", joint, shape.joint)])?;
    }
    let heads = [vision.num_attention_heads, text.num_attention_heads];
    let plan =
        shape.plan(sizes, heads, [vision.hidden_act, text.hidden_act], [vision.layer_norm_eps, text.layer_norm_eps])?;
    // configurations of before the key was right say 2; there transformers takes the largest id
    let end = text_json.get("eos_token_id").and_then(Value::as_i64).filter(|&id| id != 2);
    Ok(Plan { end, ..plan })
}

fn of_open_clip(shape: &Shape, sizes: Sizes, json: &Value, at: &str) -> Result<Plan> {
    let OpenClip { model_cfg: model, preprocess_cfg: channels } =
        python_json::from_value(&python_json::without_nulls(json)?)?;
    let (vision, text) = (&model.vision_cfg, &model.text_cfg);
    let hidden = |width: i64, ratio: f64| (width as f64 * ratio) as i64;
    agree(
        at,
        &[
            ("embed_dim", model.embed_dim, shape.joint),
            ("vision_cfg.width", vision.width, shape.picture.width),
            ("vision_cfg.layers", vision.layers, shape.picture.layers),
            ("vision_cfg.width times mlp_ratio", hidden(vision.width, vision.mlp_ratio), shape.picture.hidden),
            ("vision_cfg.patch_size", vision.patch_size, shape.patch),
            ("vision_cfg.image_size", vision.image_size, shape.side),
            ("text_cfg.width", text.width, shape.text.width),
            ("text_cfg.layers", text.layers, shape.text.layers),
            ("text_cfg.width times mlp_ratio", hidden(text.width, text.mlp_ratio), shape.text.hidden),
            ("text_cfg.vocab_size", text.vocab_size, shape.vocabulary),
            ("text_cfg.context_length", text.context_length, shape.positions),
        ],
    )?;
    ensure!(vision.head_width > 0, "vision_cfg.head_width = {} is out of range", vision.head_width);
    ensure!(
        vision.width % vision.head_width == 0,
        "vision_cfg.width = {} does not divide into heads of {}",
        vision.width,
        vision.head_width
    );
    let activation = if model.quick_gelu { Activation::QuickGelu } else { Activation::Gelu };
    let heads = [vision.width / vision.head_width, text.heads];
    let plan = shape.plan(sizes, heads, [activation; 2], [CLIP.eps; 2])?;
    Ok(Plan { channels: channels.mean.zip(channels.std), ..plan })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    /// The tensors that say the sizes of a published model.
    fn checkpoint(known: &Published, side: i64, archive: bool) -> Checkpoint {
        let (p, t) = (known.picture, known.text);
        let tokens = (side / known.patch) * (side / known.patch) + 1;
        let tensors = [
            ("patch_embed.proj.weight".to_string(), vec![p.width, 3, known.patch, known.patch]),
            ("pos_embed".to_string(), vec![1, tokens, p.width]),
            ("blocks.0.mlp.fc1.weight".to_string(), vec![p.hidden, p.width]),
            (format!("blocks.{}.norm1.bias", p.layers - 1), vec![p.width]),
            ("projection".to_string(), vec![known.joint, p.width]),
            ("text_model.embeddings.token_embedding.weight".to_string(), vec![49_408, t.width]),
            ("text_model.embeddings.position_embedding.weight".to_string(), vec![77, t.width]),
            ("text_model.encoder.layers.0.mlp.fc1.weight".to_string(), vec![t.hidden, t.width]),
            (format!("text_model.encoder.layers.{}.mlp.fc1.bias", t.layers - 1), vec![t.hidden]),
            ("text_projection".to_string(), vec![known.joint, t.width]),
        ];
        // `blocks` believes in no more blocks than there are tensors
        let filled = (0..64).map(|i| (format!("filler.{i}"), vec![1]));
        let tensors = tensors.into_iter().chain(filled);
        let tensor = |shape: Vec<i64>| Tensor::zeros(shape, (Kind::Half, Device::Cpu));
        Checkpoint {
            path: "x.pt".into(),
            tensors: tensors.map(|(name, shape)| (name, tensor(shape))).collect(),
            archive,
        }
    }

    #[test]
    fn published_models_have_their_heads_and_activations() {
        for known in &PUBLISHED {
            let laion = known.activation.is_some();
            let plan = plan(&checkpoint(known, 224, !laion), "").unwrap();
            let found = (plan.sizes.heads, plan.text.num_attention_heads, plan.style.activation, plan.text.hidden_act);
            let activation = if laion { Activation::Gelu } else { Activation::QuickGelu };
            assert_eq!(found, (known.picture_heads, known.text_heads, activation, activation), "{}", known.name);
        }
        // 16 heads of 80, not 20 of 64
        let large = plan(&checkpoint(&PUBLISHED[3], 224, false), "").unwrap();
        assert_eq!((large.sizes.width, large.sizes.heads), (1280, 16));
    }

    #[test]
    fn what_weights_do_not_tell_is_refused() {
        let e = |found: Result<Plan>| format!("{:#}", found.err().expect("an error"));
        let ambiguous = e(plan(&checkpoint(&PUBLISHED[2], 224, false), ""));
        assert!(ambiguous.contains("x.pt: ViT-L/14 exists with two activations"), "{ambiguous}");
        // apple's ViT-H has another activation and 378 pixels
        let other = e(plan(&checkpoint(&PUBLISHED[3], 378, false), ""));
        assert!(
            other.contains("pictures of 378 in patches of 14, width 1280") && other.contains("no published CLIP"),
            "{other}"
        );
        let mut short = checkpoint(&PUBLISHED[3], 224, false);
        short.tensors.remove("blocks.31.norm1.bias");
        assert!(e(plan(&short, "")).contains("1 layers"));
        let none = e(plan(&checkpoint(&PUBLISHED[3], 224, false), "no-such.json"));
        assert!(none.contains("cannot read no-such.json"), "{none}");
    }
}
