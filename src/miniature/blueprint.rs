//! The miniature's networks as a diffusers folder without weights: configs and tokenizer.

use serde_json::json;

use super::{bpe, captions, edition::Edition, raster::SIZE};
use crate::models::folder::ModelFiles;

/// Tokens per prompt; the longest caption has 8 words.
const TOKENS: usize = 12;
const TEXT_WIDTH: usize = 64;

/// Configs for a 1.1 M-parameter U-Net on 4×8×8 latents, a 0.4 M-parameter VAE and a two-layer text encoder.
pub fn files(edition: Edition) -> ModelFiles {
    let pairs = bpe::build(&captions::vocabulary(edition));
    let merges: String = std::iter::once("#version: 0.2\n".to_string())
        .chain(pairs.merges.iter().map(|(a, b)| format!("{a} {b}\n")))
        .collect();
    let (start, end) = (pairs.ids[bpe::START], pairs.ids[bpe::END]);
    let texts = [
        (
            "model_index.json",
            json!({
                "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.39.0",
                "feature_extractor": [null, null], "image_encoder": [null, null], "requires_safety_checker": false,
                "safety_checker": [null, null], "scheduler": ["diffusers", "DDIMScheduler"],
                "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
                "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]
            }),
        ),
        (
            "scheduler/scheduler_config.json",
            json!({
                "_class_name": "DDIMScheduler", "_diffusers_version": "0.39.0", "beta_start": 0.00085, "beta_end": 0.012,
                "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "clip_sample": false,
                "set_alpha_to_one": false, "steps_offset": 1, "timestep_spacing": "leading",
                "prediction_type": "epsilon"
            }),
        ),
        (
            "text_encoder/config.json",
            json!({
                "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": pairs.ids.len(),
                "hidden_size": TEXT_WIDTH, "intermediate_size": 2 * TEXT_WIDTH, "num_hidden_layers": 2,
                "num_attention_heads": 2, "max_position_embeddings": TOKENS, "hidden_act": "gelu",
                "layer_norm_eps": 1e-5, "bos_token_id": start, "eos_token_id": end, "pad_token_id": end,
                "projection_dim": TEXT_WIDTH
            }),
        ),
        (
            "tokenizer/tokenizer_config.json",
            json!({
                "tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": true,
                "bos_token": bpe::START, "eos_token": bpe::END, "pad_token": bpe::END, "unk_token": bpe::END
            }),
        ),
        (
            "tokenizer/special_tokens_map.json",
            json!({"bos_token": bpe::START, "eos_token": bpe::END, "pad_token": bpe::END, "unk_token": bpe::END}),
        ),
        ("tokenizer/vocab.json", json!(pairs.ids)),
        (
            "unet/config.json",
            json!({
                "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.39.0", "sample_size": 8, "in_channels": 4,
                "out_channels": 4, "block_out_channels": [32, 64], "layers_per_block": 1,
                "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
                "cross_attention_dim": TEXT_WIDTH, "attention_head_dim": [2, 4], "norm_num_groups": 8,
                "use_linear_projection": true
            }),
        ),
        (
            "vae/config.json",
            json!({
                "_class_name": "AutoencoderKL", "_diffusers_version": "0.39.0", "in_channels": 3, "out_channels": 3,
                "latent_channels": 4, "block_out_channels": [16, 32, 48], "layers_per_block": 1, "norm_num_groups": 8,
                "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
                "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
                "sample_size": SIZE, "scaling_factor": 1.0
            }),
        ),
    ];
    let mut files = ModelFiles { origin: "miniature blueprint".into(), ..Default::default() };
    for (path, json) in texts {
        let text = serde_json::to_string_pretty(&json).expect("JSON values are writable");
        files.texts.insert(path.into(), text.into_bytes());
    }
    files.texts.insert("tokenizer/merges.txt".into(), merges.into_bytes());
    files
}
