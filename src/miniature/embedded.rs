//! The pretrained miniatures in the binary: diffusers folders, made by `rldiff pretrain` with its defaults and the number of their
//! edition.

/// The files of a folder beside this file: (path inside it, contents).
macro_rules! model {
    ($folder:literal) => {
        model!($folder,
            "model_index.json",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            "tokenizer/merges.txt",
            "tokenizer/special_tokens_map.json",
            "tokenizer/tokenizer_config.json",
            "tokenizer/vocab.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
        )
    };
    ($folder:literal, $($path:literal),* $(,)?) => {
        &[$(($path, include_bytes!(concat!($folder, "/", $path)))),*]
    };
}

/// "embedded": the miniature of the first edition.
pub const EMBEDDED_MODEL: &[(&str, &[u8])] = model!("base");

/// "miniature": that of the second edition.
pub const MINIATURE_MODEL: &[(&str, &[u8])] = model!("base2");
