//! A whole latent diffusion model: text encoder, U-Net, VAE, tokenizer and noise schedule numbers.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{ensure, Context, Result};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::{
    folder::{ModelFiles, COMPONENTS},
    lora::{self, LoraSettings},
    model_index::{ensure_supported_pipeline, ensure_supported_scheduler},
    parameters::{Builder, Parameters, Source},
    text_encoder::{TextConfig, TextEncoder},
    tokenizer::Tokenizer,
    unet::UNet,
    unet_config::UNetConfig,
    vae::{Vae, VaeConfig},
    weights::{save_safetensors, write_safetensors},
};
use crate::{
    cannot_write::{make_folder, CannotWrite, Unfinished},
    folders::{replace_folder, NewFolder},
    kernels::on_device,
    telemetry::write_atomic,
};

pub struct Pipeline {
    /// Where the networks lie, and what they take and give.
    pub device: Device,
    pub tokenizer: Tokenizer,
    pub text_encoder: TextEncoder,
    pub unet: UNet,
    pub vae: Vae,
    /// `scheduler/scheduler_config.json` as it stands.
    pub scheduler: Value,
    pub text_parameters: Parameters,
    pub unet_parameters: Parameters,
    pub vae_parameters: Parameters,
    /// Adapters of the U-Net's attention, where it was built with them.
    pub lora: Option<(LoraSettings, Parameters)>,
    texts: BTreeMap<String, Vec<u8>>,
}

/// How the networks are built; the text encoder and the VAE are always f32.
pub struct Build {
    /// Number type of its weights and activations: f32 or bf16. Latents and predictions are f32 in any case.
    pub unet_kind: Kind,
    /// Its blocks' activations are computed again in the backward pass instead of kept.
    pub gradient_checkpointing: bool,
    /// Pictures that the VAE decodes at once; 0 for all it is given.
    pub decode_batch: usize,
    /// Low-rank adapters, and where their values come from.
    pub lora: Option<(LoraSettings, Source)>,
}

impl Default for Build {
    fn default() -> Self {
        Build { unet_kind: Kind::Float, gradient_checkpointing: false, decode_batch: 0, lora: None }
    }
}

/// Tensor names that checkpoints carry though no layer needs them.
fn harmless(name: &str) -> bool {
    name.ends_with("position_ids")
}

const INDEX: &str = "model_index.json";
const SCHEDULER: &str = "scheduler/scheduler_config.json";

/// Fails where one part makes what the next cannot take.
fn ensure_they_fit(tokenizer: &Tokenizer, text: &TextConfig, unet: &UNetConfig, vae: &VaeConfig) -> Result<()> {
    ensure!(
        i64::from(tokenizer.largest_id) < text.vocab_size,
        "tokenizer/vocab.json holds id {}, text_encoder/config.json says vocab_size = {}",
        tokenizer.largest_id,
        text.vocab_size
    );
    for level in &unet.levels {
        ensure!(
            level.context_channels == text.hidden_size,
            "unet/config.json: cross_attention_dim = {}, text_encoder/config.json: hidden_size = {}",
            level.context_channels,
            text.hidden_size
        );
    }
    ensure!(
        unet.in_channels == vae.latent_channels,
        "unet/config.json: in_channels = {}, vae/config.json: latent_channels = {}",
        unet.in_channels,
        vae.latent_channels
    );
    Ok(())
}

/// Builds one network and checks that the checkpoint held no more than it needs.
fn build<T>(
    component: &str,
    origin: &str,
    source: Source,
    kind: Kind,
    device: Device,
    make: impl FnOnce(&Builder) -> Result<T>,
) -> Result<(T, Parameters)> {
    let builder = Builder::new(source, kind, device);
    let network = make(&builder).with_context(|| format!("{origin}: {component}"))?;
    let (parameters, unused) = builder.finish();
    if let Some(name) = unused.iter().find(|n| !harmless(n)) {
        log::warn!("{origin}: {component}: {} tensors are not used, the first is {name}", unused.len());
    }
    Ok((network, parameters))
}

impl Pipeline {
    /// Builds the networks from the files' configs and weights, in f32. All parameters are frozen; training frees some.
    pub fn from_files(files: ModelFiles, device: Device) -> Result<Self> {
        Pipeline::with(files, device, Build::default())
    }

    /// As [`Pipeline::from_files`], built in another way.
    pub fn with(mut files: ModelFiles, device: Device, how: Build) -> Result<Self> {
        let mut weights = std::mem::take(&mut files.weights);
        let mut sources =
            COMPONENTS.map(|(c, _)| Some(Source::Tensors(weights.remove(c).unwrap_or_default()))).into_iter();
        let mut next = || sources.next().flatten().expect("three components");
        let pipeline = Pipeline::build(files, [next(), next(), next()], how, device)?;
        for p in [&pipeline.text_parameters, &pipeline.unet_parameters, &pipeline.vae_parameters] {
            p.freeze();
        }
        Ok(pipeline)
    }

    /// Random initial weights for the configs in `files`: a model to pretrain, or to measure.
    pub fn seeded(files: ModelFiles, seed: u64, device: Device) -> Result<Self> {
        Pipeline::seeded_with(files, seed, device, Build::default())
    }

    /// As [`Pipeline::seeded`], built in another way.
    pub fn seeded_with(files: ModelFiles, seed: u64, device: Device, how: Build) -> Result<Self> {
        Pipeline::build(files, [Source::Seeded(seed), Source::Seeded(seed), Source::Seeded(seed)], how, device)
    }

    /// For the sizes: networks that compute, without weights ([`Source::ShapesOnly`]).
    pub fn shapes_only(files: ModelFiles, device: Device, how: Build) -> Result<Self> {
        Pipeline::build(files, [Source::ShapesOnly, Source::ShapesOnly, Source::ShapesOnly], how, device)
    }

    fn build(files: ModelFiles, sources: [Source; 3], how: Build, device: Device) -> Result<Self> {
        let at = |path: &str| format!("{}: {path}", files.origin);
        let text_config = TextConfig::from_json(&files.json("text_encoder/config.json")?)
            .with_context(|| at("text_encoder/config.json"))?;
        let unet_config =
            UNetConfig::from_json(&files.json("unet/config.json")?).with_context(|| at("unet/config.json"))?;
        let vae_config =
            VaeConfig::from_json(&files.json("vae/config.json")?).with_context(|| at("vae/config.json"))?;
        let scheduler = files.json(SCHEDULER)?;
        ensure_supported_pipeline(&files.json(INDEX)?).with_context(|| at(INDEX))?;
        ensure_supported_scheduler(&scheduler).with_context(|| at(SCHEDULER))?;
        let tokenizer = Tokenizer::from_files(&files)?;
        ensure_they_fit(&tokenizer, &text_config, &unet_config, &vae_config).with_context(|| files.origin.clone())?;

        on_device::prepare(device)?;
        let [text_source, unet_source, vae_source] = sources;
        let kind = Kind::Float;
        let origin = &files.origin;
        let (text_encoder, text_parameters) =
            build("text_encoder", origin, text_source, kind, device, |b| TextEncoder::new(b, &text_config))?;
        let mut adapters = None;
        let (unet, unet_parameters) = build("unet", origin, unet_source, how.unet_kind, device, |b| {
            let b = match how.lora {
                Some((settings, source)) => &b.clone().with_lora(settings, source),
                None => b,
            };
            let unet = UNet::new(b, &unet_config, how.unet_kind, how.gradient_checkpointing)?;
            adapters = b.finish_lora();
            Ok(unet)
        })?;
        if let Some((settings, parameters)) = &adapters {
            ensure!(
                !parameters.entries.is_empty(),
                "{origin}: no attention layer of the U-Net is named {}",
                settings.targets.join(" or ")
            );
        }
        let (mut vae, vae_parameters) =
            build("vae", origin, vae_source, kind, device, |b| Vae::new(b, &vae_config, kind))?;
        vae.decode_batch = how.decode_batch;
        Ok(Pipeline {
            device,
            tokenizer,
            text_encoder,
            unet,
            vae,
            scheduler,
            text_parameters,
            unet_parameters,
            vae_parameters,
            lora: adapters,
            texts: files.texts,
        })
    }

    /// What fine-tuning changes: the adapters where there are some, else the U-Net.
    pub fn trainable(&self) -> &Parameters {
        self.lora.as_ref().map_or(&self.unet_parameters, |(_, adapters)| adapters)
    }

    /// The U-Net with the weights it has now and without adapters, which training does not change.
    pub fn frozen_unet(&self) -> Result<UNet> {
        let tensors = self.unet_parameters.entries.iter().map(|p| {
            // with adapters these weights stay as they are and can be shared
            let tensor = if self.lora.is_some() { p.tensor.detach() } else { p.tensor.detach().copy() };
            (p.name.clone(), tensor)
        });
        let builder = Builder::new(Source::Tensors(tensors.collect()), self.unet.kind, self.device);
        UNet::new(&builder, &self.unet.config, self.unet.kind, false)
    }

    /// The whole U-Net, without adapters, for given values of [`Pipeline::trainable`].
    pub fn unet_with(&self, trained: &BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>> {
        match &self.lora {
            Some((settings, _)) => lora::merge(&self.unet_parameters, trained, settings.scale()),
            None => Ok(trained.iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect()),
        }
    }

    /// Writes given values of the adapters as a LoRA file; without adapters there is none to write.
    pub fn save_lora(&self, path: &Path, trained: &BTreeMap<String, Tensor>, kind: Kind) -> Result<()> {
        let (settings, _) = self.lora.as_ref().context("the model has no adapters")?;
        write_atomic(path, &write_safetensors(&lora::to_file(trained, settings.scale()), kind)?)
    }

    /// Prompts → text embeddings f32 [prompts, tokens, width].
    pub fn embed<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Tensor> {
        let ids = self.tokenizer.encode_batch(prompts)?.to_device(self.device);
        Ok(tch::no_grad(|| self.text_encoder.forward(&ids)))
    }

    /// Latent channels, height and width at the model's native size.
    pub fn latent_shape(&self) -> [i64; 3] {
        let c = &self.unet.config;
        [c.in_channels, c.sample_size, c.sample_size]
    }

    /// Height and width of the pictures at the model's native size, in pixels.
    pub fn picture_size(&self) -> [i64; 2] {
        let [_, height, width] = self.latent_shape();
        [height, width].map(|side| side * self.vae.config.downscale())
    }

    /// The model's files without its weights.
    pub fn architecture(&self) -> ModelFiles {
        ModelFiles { texts: self.texts.clone(), origin: "the model's architecture".into(), ..Default::default() }
    }

    /// A config or tokenizer file as it was read.
    pub fn text_file(&self, path: &str) -> Result<&[u8]> {
        self.texts.get(path).map(Vec::as_slice).with_context(|| format!("the model has no file {path}"))
    }

    /// Replaces a config file that `save` will write.
    pub fn set_text_file(&mut self, path: &str, contents: Vec<u8>) {
        self.texts.insert(path.to_string(), contents);
    }

    /// Writes the model as a diffusers folder, weights in `kind` (f32, f16, bf16). `unet` replaces the U-Net's
    /// weights where given (an average of them, for example). The folder appears whole or not at all.
    ///
    /// # Errors
    /// Something is at `dir` already, or it cannot be written ([`CannotWrite`](crate::cannot_write::CannotWrite)); what was begun is removed.
    pub fn save(&self, dir: &Path, kind: Kind, unet: Option<&BTreeMap<String, Tensor>>) -> Result<()> {
        let new = NewFolder::begin(dir, "model")?;
        self.save_into(new.path(), kind, unet)?;
        new.finish()
    }

    /// As [`Pipeline::save`], inside a folder that this process holds: an earlier model there is replaced, and files in it
    /// that are no part of a model stay.
    pub fn save_again(&self, dir: &Path, kind: Kind, unet: Option<&BTreeMap<String, Tensor>>) -> Result<()> {
        let partial = dir.with_extension("partial");
        let begun = Unfinished::at(&partial);
        self.save_into(&partial, kind, unet)?;
        replace_folder(&partial, dir)?;
        begun.keep();
        Ok(())
    }

    /// Writes the files of [`Pipeline::save`] into a folder.
    pub fn save_into(&self, dir: &Path, kind: Kind, unet: Option<&BTreeMap<String, Tensor>>) -> Result<()> {
        for (path, bytes) in &self.texts {
            write(&dir.join(path), bytes)?;
        }
        let named =
            |p: &Parameters| p.entries.iter().map(|e| (e.name.clone(), e.tensor.detach())).collect::<BTreeMap<_, _>>();
        for (component, stem) in COMPONENTS {
            let tensors = match component {
                "text_encoder" => named(&self.text_parameters),
                "vae" => named(&self.vae_parameters),
                _ => match unet {
                    Some(weights) => weights.iter().map(|(k, v)| (k.clone(), v.shallow_clone())).collect(),
                    None => named(&self.unet_parameters),
                },
            };
            save_safetensors(&dir.join(component).join(format!("{stem}.safetensors")), &tensors, kind)?;
        }
        Ok(())
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(parent) = path.parent() {
        make_folder(parent)?;
    }
    fs::write(path, bytes).context(CannotWrite::file(path))
}
