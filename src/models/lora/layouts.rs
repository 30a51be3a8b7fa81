//! Names of adapters' tensors → which layer of which network, and which of its tensors. Every layout that diffusers, PEFT,
//! kohya's sd-scripts and LyCORIS' LoCon write:
//!
//! ```text
//! PEFT           base_model.model.PATH.lora_A.weight, lora_B; with an adapter's name: lora_A.default.weight
//! diffusers      unet.PATH.lora_A.weight, lora_B          unet.PATH.lora.down.weight, lora.up
//!                text_encoder.PATH.lora_linear_layer.down.weight, up
//! older          unet.PATH.processor.to_q_lora.down.weight, up; also without `unet.`
//! kohya, LoCon   lora_unet_PATH_WITH_UNDERSCORES.lora_down.weight, lora_up, lora_mid, alpha; lora_te_, lora_te1_
//! ```
//!
//! Dots and underscores are not told apart: a layer is known by its path with underscores (`mid_block_resnets_0_conv1`),
//! which is unique in these networks.

use anyhow::{bail, Result};

/// A network that adapters are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Network {
    UNet,
    TextEncoder,
}

impl Network {
    /// Its folder in a model.
    pub fn component(self) -> &'static str {
        match self {
            Network::UNet => "unet",
            Network::TextEncoder => "text_encoder",
        }
    }
}

/// What a tensor is to its layer; W is the layer's weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// A, `[rank, inputs, …]`.
    Down,
    /// B, `[outputs, rank, …]`.
    Up,
    /// Between the two, `[rank, rank, height, width]` (LoCon's Tucker decomposition of a convolution).
    Mid,
    /// Added to the layer's bias as B is to its weight (PEFT's `lora_bias`).
    UpBias,
    /// The product is multiplied by alpha / rank.
    Alpha,
    /// Lengths of the rows of the adapted weight (DoRA).
    Magnitude,
    /// Added to W as it is.
    WeightDifference,
    /// Added to the bias as it is.
    BiasDifference,
}

/// Where a tensor of an adapter belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub network: Network,
    /// The layer's path in the network, with underscores, without the text encoder's `text_model_`.
    pub layer: String,
    pub part: Part,
}

/// Ends of names and what they say, the longer before what they end with.
const PARTS: &[(&str, Part)] = &[
    (".lora_linear_layer.down.weight", Part::Down),
    (".lora_linear_layer.up.weight", Part::Up),
    (".lora.down.weight", Part::Down),
    (".lora.up.weight", Part::Up),
    ("_lora.down.weight", Part::Down),
    ("_lora.up.weight", Part::Up),
    (".lora_down.weight", Part::Down),
    (".lora_up.weight", Part::Up),
    (".lora_mid.weight", Part::Mid),
    (".lora.alpha", Part::Alpha),
    ("_lora.alpha", Part::Alpha),
    (".alpha", Part::Alpha),
    (".lora_magnitude_vector", Part::Magnitude),
    (".diff_b", Part::BiasDifference),
    (".diff", Part::WeightDifference),
    (".b_norm", Part::BiasDifference),
    (".w_norm", Part::WeightDifference),
];

/// Beginnings of a path that say nothing, or only which network it is of.
const PREFIXES: &[(&str, Option<Network>)] = &[
    ("base_model.model.", None),
    ("module.", None),
    ("unet.", Some(Network::UNet)),
    ("lora_unet_", Some(Network::UNet)),
    ("lora_unet.", Some(Network::UNet)),
    ("text_encoder.", Some(Network::TextEncoder)),
    ("lora_te_", Some(Network::TextEncoder)),
    ("lora_te.", Some(Network::TextEncoder)),
    ("lora_te1_", Some(Network::TextEncoder)),
    ("lora_te1.", Some(Network::TextEncoder)),
];

/// Splits a name into the layer's path and the part.
fn split(name: &str) -> Option<(&str, Part)> {
    // PEFT puts the adapter's own name between `lora_A` and `weight`
    for (mark, weight, bias) in [(".lora_A.", Some(Part::Down), None), (".lora_B.", Some(Part::Up), Some(Part::UpBias))]
    {
        if let Some((path, rest)) = name.rsplit_once(mark) {
            let part = match rest.rsplit('.').next() {
                Some("weight") => weight,
                Some("bias") => bias,
                _ => None,
            };
            return part.map(|part| (path, part));
        }
    }
    if let Some((path, _)) = name.rsplit_once(".lora_magnitude_vector.") {
        return Some((path, Part::Magnitude));
    }
    PARTS.iter().find_map(|&(end, part)| Some((name.strip_suffix(end)?, part)))
}

/// Where the tensor `name` belongs. `default` is the network of paths that do not say theirs.
///
/// # Errors
/// It is no part of a LoRA adapter.
pub fn place(name: &str, default: Network) -> Result<Place> {
    let plain = name.replace("_orig_mod.", "");
    let Some((mut path, part)) = split(&plain) else { bail!("tensor {name} is no part of a LoRA adapter") };
    let mut network = None;
    while let Some((rest, of)) = PREFIXES.iter().find_map(|&(p, of)| Some((path.strip_prefix(p)?, of))) {
        path = rest;
        network = network.or(of);
    }
    let text = ["text_model", "encoder.layers", "encoder_layers"].iter().any(|start| path.starts_with(start));
    let network = network.unwrap_or(if text { Network::TextEncoder } else { default });
    let mut layer = path.replace(".processor.", ".").replace('.', "_");
    match network {
        // older files name the layer by its projection alone
        Network::UNet if layer.ends_with("_to_out") => layer.push_str("_0"),
        Network::UNet => {}
        Network::TextEncoder => {
            layer = layer.strip_prefix("text_model_").unwrap_or(&layer).to_string();
            for projection in ["q", "k", "v", "out"] {
                if let Some(attention) = layer.strip_suffix(&format!("self_attn_to_{projection}")) {
                    layer = format!("{attention}self_attn_{projection}_proj");
                }
            }
        }
    }
    Ok(Place { network, layer, part })
}

/// What else a file can be: texts of which one occurs in a tensor's name (`^` for its beginning), and what it is called.
const OTHERS: &[(&[&str], &str)] = &[
    (&["lora_te2_", "lora_te2.", "^text_encoder_2."], "an adapter of SDXL, which has a second text encoder"),
    (&["lora_te3_", "^text_encoder_3."], "an adapter of Stable Diffusion 3"),
    (
        &[
            "^transformer.",
            "^lora_transformer_",
            "^diffusion_model.",
            "^transformer_blocks.",
            "^base_model.model.transformer_blocks.",
            "^lora_unet_double_blocks_",
            "^lora_unet_single_blocks_",
            "^lora_unet_joint_blocks_",
            "single_transformer_blocks",
        ],
        "an adapter of a diffusion transformer (Stable Diffusion 3, Flux and others)",
    ),
    (&["^lora_prior_"], "an adapter of Stable Cascade or Kandinsky"),
    (&["motion_modules"], "a motion adapter of AnimateDiff"),
    (&[".hada_"], "a LoHa adapter (LyCORIS)"),
    (&[".lokr_"], "a LoKr adapter (LyCORIS)"),
    (&[".oft_", ".boft_"], "an OFT adapter"),
    (&[".on_input", ".ia3_"], "an (IA)³ adapter"),
    (&[".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"], "a GLoRA adapter (LyCORIS)"),
    (&["vera_lambda", "vera_A", "vera_B"], "a VeRA adapter"),
    (&[".lora_embedding_A", ".lora_embedding_B"], "an adapter of the table of token embeddings"),
    (&["dora_scale"], "a DoRA adapter in LyCORIS' layout"),
    (&["lora_controlnet", "^controlnet", "^control_model.", "^input_hint_block"], "a ControlNet or an adapter of one"),
    (&["^ip_adapter", "^image_proj."], "an IP-Adapter"),
    (&["_custom_diffusion"], "Custom Diffusion's attention weights"),
    (&["^unet:", "^text_encoder:"], "an adapter in the numbered layout of the first LoRA trainer for diffusion models"),
    (
        &["emb_params", "string_to_param", "^clip_l", "^clip_g", "^<"],
        "a textual inversion (an embedding, not an adapter)",
    ),
    (
        &["^model.diffusion_model.", "^first_stage_model.", "^cond_stage_model."],
        "a whole model in one file, not an adapter",
    ),
    (&[".base_layer."], "a network saved together with its adapters"),
];

/// What rldiff reads, for messages.
pub const READ: &str =
    "rldiff reads LoRA and LoCon adapters of Stable Diffusion 1 and 2 as diffusers, PEFT and kohya write them";

/// Fails where the names are of another kind of file, which the message names.
pub fn ensure_lora<'a>(names: impl Iterator<Item = &'a String> + Clone) -> Result<()> {
    for (marks, kind) in OTHERS {
        let has = |name: &&String| {
            marks.iter().any(|mark| match mark.strip_prefix('^') {
                Some(start) => name.starts_with(start),
                None => name.contains(mark),
            })
        };
        if let Some(name) = names.clone().find(has) {
            bail!("this is {kind} (tensor {name}); {READ}");
        }
    }
    let count = names.clone().count();
    match names.clone().find(|name| split(name).is_none()) {
        Some(first) if names.clone().all(|name| split(name).is_none()) => {
            bail!("this holds no adapter: none of its {count} tensors (the first is {first}) is a lora_A or lora_down; {READ}")
        }
        Some(first) => {
            bail!("tensor {first} is no part of a LoRA adapter, and what it would change is not known; {READ}")
        }
        None if count == 0 => bail!("this holds no tensors"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_layouts_name_the_same_layers() {
        let at = |name: &str| {
            let place = place(name, Network::UNet).unwrap();
            (place.network, place.layer, place.part)
        };
        let attention = "mid_block_attentions_0_transformer_blocks_0_attn2";
        for name in [
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_A.weight",
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_A.weight",
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_A.default_0.weight",
            "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_A.default.weight",
            "unet.base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_A.weight",
            "unet._orig_mod.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_A.weight",
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora.down.weight",
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora.down.weight",
            "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora.down.weight",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0.lora_down.weight",
        ] {
            assert_eq!(at(name), (Network::UNet, format!("{attention}_to_out_0"), Part::Down), "{name}");
        }
        for name in [
            "text_encoder.text_model.encoder.layers.1.self_attn.to_q_lora.up.weight",
            "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_linear_layer.up.weight",
            "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_B.weight",
            "text_encoder.encoder.layers.1.self_attn.q_proj.lora_B.weight",
            "base_model.model.text_model.encoder.layers.1.self_attn.q_proj.lora_B.weight",
            "lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_up.weight",
            "lora_te1_text_model_encoder_layers_1_self_attn_q_proj.lora_up.weight",
        ] {
            let expected = (Network::TextEncoder, "encoder_layers_1_self_attn_q_proj".to_string(), Part::Up);
            assert_eq!(at(name), expected, "{name}");
        }
        let part = |end: &str| at(&format!("lora_unet_conv_in{end}")).2;
        assert_eq!(part(".alpha"), Part::Alpha);
        assert_eq!(part(".lora_mid.weight"), Part::Mid);
        assert_eq!(part(".diff"), Part::WeightDifference);
        assert_eq!(part(".diff_b"), Part::BiasDifference);
        assert_eq!(at("unet.conv_in.lora_B.bias").2, Part::UpBias);
        assert_eq!(at("unet.conv_in.lora_magnitude_vector.default.weight").2, Part::Magnitude);
        assert!(place("unet.conv_in.lora_A.bias", Network::UNet).is_err());
        assert!(place("unet.conv_in.weight", Network::UNet).is_err());
    }

    #[test]
    fn other_files_are_named() {
        for (name, kind) in [
            ("lora_unet_conv_in.hada_w1_a", "LoHa"),
            ("lora_unet_conv_in.lokr_w1", "LoKr"),
            ("lora_unet_conv_in.on_input", "(IA)³"),
            ("lora_unet_conv_in.oft_blocks", "OFT"),
            ("base_model.model.conv_in.oft_R.weight", "OFT"),
            ("lora_unet_conv_in.a1.weight", "GLoRA"),
            ("lora_unet_conv_in.dora_scale", "DoRA adapter in LyCORIS' layout"),
            ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "SDXL"),
            ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "diffusion transformer"),
            ("base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight", "diffusion transformer"),
            ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "diffusion transformer"),
            ("lora_te3_encoder_block_0.alpha", "Stable Diffusion 3"),
            ("lora_controlnet", "ControlNet"),
            ("unet.down_blocks.0.motion_modules.0.proj_in.lora_A.weight", "AnimateDiff"),
            ("unet:0:up", "first LoRA trainer"),
            ("emb_params", "textual inversion"),
            ("<cat-toy>", "textual inversion"),
            ("model.diffusion_model.out.2.weight", "whole model"),
            ("mid_block.attn2.processor.to_k_custom_diffusion.weight", "Custom Diffusion"),
            ("unet.conv_in.base_layer.weight", "together with its adapters"),
            ("conv_in.weight", "holds no adapter"),
        ] {
            let names = ["lora_unet_conv_in.alpha".to_string(), name.to_string()];
            let alone = if kind == "holds no adapter" { &names[1..] } else { &names[..] };
            let error = ensure_lora(alone.iter()).unwrap_err().to_string();
            assert!(error.contains(kind) && error.contains(name), "{name}: {error}");
        }
        assert!(ensure_lora([].iter()).is_err());
    }
}
