//! The published architectures of Stable Diffusion as diffusers folders without weights: what a check, a measurement or
//! a model of random weights is made of where nobody's folder is at hand. Sizes are those of the models' own JSON files;
//! the tokenizer knows single bytes only (the vocabulary is not ours to give away), in as many tokens per prompt.

use std::collections::BTreeMap;

use serde_json::{json, Value};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::folder::ModelFiles;

/// Architectures by the name that a command line gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Architecture {
    /// Stable Diffusion 1.1 to 1.5.
    #[value(name = "sd1.5")]
    Sd15,
    /// Stable Diffusion 2-base and 2.1-base, the paper's.
    #[value(name = "sd2-base")]
    Sd2Base,
}

impl std::fmt::Display for Architecture {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(match self {
            Architecture::Sd15 => "sd1.5",
            Architecture::Sd2Base => "sd2-base",
        })
    }
}

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";
const TOKENS: usize = 77;

impl Architecture {
    /// Configs and tokenizer; no weights.
    pub fn files(self) -> ModelFiles {
        let v1 = self == Architecture::Sd15;
        let specials = json!({
            "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": if v1 { END } else { "!" }
        });
        let tokenizer = json!({"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": true});
        let texts = [
            ("model_index.json", model_index()),
            ("scheduler/scheduler_config.json", scheduler()),
            ("text_encoder/config.json", text_encoder(v1)),
            ("tokenizer/tokenizer_config.json", tokenizer),
            ("tokenizer/special_tokens_map.json", specials),
            ("tokenizer/vocab.json", json!(bytes())),
            ("unet/config.json", unet(v1)),
            ("vae/config.json", vae()),
        ];
        let mut files = ModelFiles { origin: format!("{self} (architecture only)"), ..Default::default() };
        for (path, json) in texts {
            let text = serde_json::to_string_pretty(&json).expect("JSON values are writable");
            files.texts.insert(path.into(), text.into_bytes());
        }
        files.texts.insert("tokenizer/merges.txt".into(), b"#version: 0.2\n".to_vec());
        files
    }
}

/// CLIP's vocabulary without merges: byte symbols, the same at the end of a word, start and end at CLIP's places.
fn bytes() -> BTreeMap<String, u32> {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let inside = alphabet.iter().map(char::to_string);
    let tokens = inside.chain(alphabet.iter().map(|c| format!("{c}</w>")));
    let mut ids: BTreeMap<String, u32> = tokens.zip(0..).collect();
    ids.extend([(START.to_string(), 49406), (END.to_string(), 49407)]);
    ids
}

fn model_index() -> Value {
    json!({
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.39.0", "feature_extractor": [null, null],
        "image_encoder": [null, null], "requires_safety_checker": false, "safety_checker": [null, null],
        "scheduler": ["diffusers", "PNDMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"]
    })
}

fn scheduler() -> Value {
    json!({
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.39.0", "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "clip_sample": false, "skip_prk_steps": true,
        "set_alpha_to_one": false, "steps_offset": 1, "prediction_type": "epsilon"
    })
}

fn text_encoder(v1: bool) -> Value {
    let (width, heads, layers, activation) = if v1 { (768, 12, 12, "quick_gelu") } else { (1024, 16, 23, "gelu") };
    json!({
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 49408, "hidden_size": width,
        "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "max_position_embeddings": TOKENS, "hidden_act": activation, "layer_norm_eps": 1e-5, "bos_token_id": 0,
        "eos_token_id": 2, "pad_token_id": 1, "projection_dim": if v1 { 768 } else { 512 }
    })
}

fn unet(v1: bool) -> Value {
    let (down, up) = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D");
    json!({
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.39.0", "sample_size": 64, "in_channels": 4,
        "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
        "down_block_types": [down, down, down, "DownBlock2D"], "up_block_types": ["UpBlock2D", up, up, up],
        "cross_attention_dim": if v1 { 768 } else { 1024 },
        // the number of heads, whatever the key's name says
        "attention_head_dim": if v1 { json!(8) } else { json!([5, 10, 20, 20]) },
        "use_linear_projection": !v1, "norm_num_groups": 32, "norm_eps": 1e-5, "act_fn": "silu",
        "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "mid_block_scale_factor": 1
    })
}

fn vae() -> Value {
    json!({
        "_class_name": "AutoencoderKL", "_diffusers_version": "0.39.0", "in_channels": 3, "out_channels": 3,
        "latent_channels": 4, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
        "norm_num_groups": 32, "act_fn": "silu", "sample_size": 512, "scaling_factor": 0.18215,
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::pipeline::Pipeline;
    use tch::Device;

    #[test]
    fn parameters_are_as_many_as_published() {
        // counted in the published weight files
        for (architecture, unet, tensors, text, vae) in [
            (Architecture::Sd2Base, 865_910_724, 686, 340_387_840, 83_653_863),
            (Architecture::Sd15, 859_520_964, 686, 123_060_480, 83_653_863),
        ] {
            let pipeline = Pipeline::shapes_only(architecture.files(), Device::Cpu, Default::default()).unwrap();
            assert_eq!(pipeline.unet_parameters.count(), unet, "{architecture}");
            assert_eq!(pipeline.unet_parameters.entries.len(), tensors, "{architecture}");
            assert_eq!(pipeline.text_parameters.count(), text, "{architecture}");
            assert_eq!(pipeline.vae_parameters.count(), vae, "{architecture}");
            assert_eq!(pipeline.vae_parameters.entries.len(), 248, "{architecture}");
            assert_eq!(pipeline.latent_shape(), [4, 64, 64]);
        }
    }
}
