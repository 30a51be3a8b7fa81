//! The networks of a latent diffusion model (text encoder, U-Net, VAE) and their diffusers folder layout.
//!
//! ```text
//! folder.rs       files of a model, on disk or embedded        weights.rs   safetensors <-> named tensors
//! judge.rs        what a folder is, before its weights are read
//! model_index.rs  the classes a model may be made of      config_keys.rs   keys of the networks' configs
//! flat_parameters.rs   a network's weights as one vector        row_major.rs   that vector on its way out and in
//! scheduler_config.rs   the betas and steps that a model was trained with
//! weight_files.rs which file holds a network's weights
//! torch_file.rs, pickle.rs, zip_entries.rs                     files of torch.save -> named tensors
//! parameters.rs   named parameters of a network, one flat buffer to train
//! tokenizer_files.rs, tokenizer.rs, prompt_cleaning.rs, open_clip_text.rs   text -> token ids
//! text_encoder.rs   CLIP text model
//! unet.rs         UNet2DConditionModel       vae.rs            AutoencoderKL
//! recompute.rs    gradient checkpointing     allocations.rs, flops.rs   what a pass costs
//! layers.rs, resnet.rs, attention.rs, time_embedding.rs        the pieces they share
//! lora/           low-rank adapters: trained ones as layers, others into the weights
//! architectures.rs   published sizes, without weights
//! gradient_hooks.rs  gradients in the middle of the backward pass
//! pipeline.rs     all of it together: load, encode prompts, predict eps, decode, save
//! ```

pub mod allocations;
pub mod architectures;
pub mod attention;
pub mod config_keys;
pub mod flat_parameters;
pub mod flops;
pub mod folder;
pub mod gradient_hooks;
pub mod judge;
pub mod layers;
pub mod lora;
pub mod model_index;
pub mod open_clip_text;
pub mod parameters;
pub mod pickle;
pub mod pipeline;
pub mod prompt_cleaning;
pub mod recompute;
pub mod resnet;
pub mod row_major;
pub mod scheduler_config;
pub mod text_encoder;
pub mod time_embedding;
pub mod tokenizer;
pub mod tokenizer_files;
pub mod torch_file;
pub mod unet;
pub mod unet_config;
pub mod vae;
pub mod weight_files;
pub mod weights;
pub mod zip_entries;
