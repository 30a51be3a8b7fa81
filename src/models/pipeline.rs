//! A whole latent diffusion model: text encoder, U-Net, VAE, tokenizer and noise schedule numbers.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{ensure, Context, Result};
use serde_json::{json, Value};
use tch::{Device, Kind, Tensor};

use super::{
    folder::{ModelFiles, COMPONENTS},
    judge::ensure_unet_of_this_kind,
    lora::{self, LoraSettings},
    model_index::{ensure_supported_pipeline, ensure_supported_scheduler, unread_components},
    parameters::{Builder, Parameters, Source},
    recompute::Recomputed,
    scheduler_config::{as_the_pipeline_has_it, SchedulerConfig},
    text_encoder::{self, TextConfig, TextEncoder},
    tokenizer::Tokenizer,
    tokenizer_files::for_older_readers,
    unet::UNet,
    unet_config::{self, UNetConfig},
    vae::{self, Vae, VaeConfig},
    weights::{save_safetensors, write_safetensors},
};
use crate::{
    cannot_write::{make_folder, CannotWrite, Unfinished},
    device::numerics::{Entered, Precision},
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
    /// `scheduler/scheduler_config.json` as diffusers' pipeline takes it.
    pub scheduler: Value,
    pub text_parameters: Parameters,
    pub unet_parameters: Parameters,
    pub vae_parameters: Parameters,
    /// Adapters of the U-Net's attention, where it was built with them.
    pub lora: Option<(LoraSettings, Parameters)>,
    texts: BTreeMap<String, Vec<u8>>,
}

/// How the networks are built; the weights of text encoder and VAE are always f32.
pub struct Build {
    /// Number type of its weights and activations: f32 or bf16. Latents and predictions are f32 in any case.
    pub unet_kind: Kind,
    /// Which of its blocks' activations are computed again in the backward pass instead of kept.
    pub recomputed: Recomputed,
    /// Pictures that the VAE decodes at once; 0 for all it is given.
    pub decode_batch: usize,
    /// What text encoder and VAE compute in.
    pub precision: Precision,
    /// Low-rank adapters, and where their values come from.
    pub lora: Option<(LoraSettings, Source)>,
}

impl Default for Build {
    fn default() -> Self {
        Build {
            unet_kind: Kind::Float,
            recomputed: Recomputed::Nothing,
            decode_batch: 0,
            precision: Precision::default(),
            lora: None,
        }
    }
}

/// Tensor names that checkpoints carry though no layer needs them: constants, and what makes the pooled output.
fn harmless(name: &str) -> bool {
    name.ends_with("position_ids") || name == "text_projection.weight" || name == "logit_scale"
}

const INDEX: &str = "model_index.json";
const TEXT: &str = "text_encoder/config.json";
const UNET: &str = "unet/config.json";
const VAE: &str = "vae/config.json";
const SCHEDULER: &str = "scheduler/scheduler_config.json";

/// What a model is built from: everything in its files but the weights.
pub(super) struct Plan {
    text: TextConfig,
    unet: UNetConfig,
    vae: VaeConfig,
    /// As diffusers' pipeline has it.
    scheduler: Value,
    tokenizer: Tokenizer,
    /// What in the files has no effect or another one than they say.
    pub notes: Vec<String>,
}

impl Plan {
    /// # Errors
    /// Names the file and the key that asks for what is not built here, or the parts that do not fit together.
    pub(super) fn of(files: &ModelFiles) -> Result<Self> {
        let at = |path: &str| format!("{}: {path}", files.origin);
        let index = files.json(INDEX)?;
        ensure_supported_pipeline(&index).with_context(|| at(INDEX))?;
        let [unet_json, text_json, vae_json] = [UNET, TEXT, VAE].map(|path| files.json(path));
        let (unet_json, text_json, vae_json) = (unet_json?, text_json?, vae_json?);
        ensure_unet_of_this_kind(&unet_json).with_context(|| at(UNET))?;
        let mut unet = UNetConfig::from_json(&unet_json).with_context(|| at(UNET))?;
        let text = TextConfig::from_json(&text_json).with_context(|| at(TEXT))?;
        let vae = VaeConfig::from_json(&vae_json).with_context(|| at(VAE))?;
        let stored = files.json(SCHEDULER)?;
        ensure_supported_scheduler(&stored).with_context(|| at(SCHEDULER))?;
        let (scheduler, changes) = as_the_pipeline_has_it(&stored);
        SchedulerConfig::from_value(&scheduler).with_context(|| at(SCHEDULER))?;
        let tokenizer = Tokenizer::from_files(files)?;

        let mut notes = Vec::new();
        let class = stored.get("_class_name").and_then(Value::as_str).unwrap_or("DDIMScheduler");
        if class != "DDIMScheduler" {
            notes.push(format!("{SCHEDULER}: {class}'s betas are used, its steps are not: they are DDIM's"));
        }
        if !changes.is_empty() {
            notes.push(format!("{SCHEDULER}: {}, as diffusers' pipeline does", changes.join("; ")));
        }
        notes.extend(tokenizer.notes.iter().cloned());
        notes.extend(unread(&index, &unet_json, &text_json, &vae_json));
        if unet.sample_size[0] < 64 && unet_json["sample_size"].is_i64() && is_before_0_9(&unet_json) {
            notes.push(format!(
                "{UNET}: sample_size = {} is taken for 64, as diffusers' pipeline does with files from \
                                before its version 0.9",
                unet.sample_size[0]
            ));
            unet.sample_size = [64; 2];
        }
        if unet_json.get("sample_size").is_none_or(Value::is_null) {
            notes.push(format!("{UNET}: sample_size is not set, it is taken for {}", unet.sample_size[0]));
        }
        let plan = Plan { text, unet, vae, scheduler, tokenizer, notes };
        plan.ensure_it_fits().with_context(|| files.origin.clone())?;
        Ok(plan)
    }

    /// Fails where one part makes what the next cannot take.
    fn ensure_it_fits(&self) -> Result<()> {
        let Plan { text, unet, vae, tokenizer, .. } = self;
        let (id, token) = &tokenizer.largest;
        ensure!(
            i64::from(*id) < text.vocab_size,
            "the tokenizer gives {token} the id {id}, {TEXT} says vocab_size = {}: the text encoder has no row for it",
            text.vocab_size
        );
        for level in &unet.levels {
            ensure!(
                level.context_channels == text.hidden_size,
                "{UNET}: cross_attention_dim = {}, {TEXT}: hidden_size = {}",
                level.context_channels,
                text.hidden_size
            );
        }
        ensure!(
            unet.in_channels == vae.latent_channels,
            "{UNET}: in_channels = {}, {VAE}: latent_channels = {}",
            unet.in_channels,
            vae.latent_channels
        );
        Ok(())
    }

    /// A sentence where the text encoder has rows that no token leads to.
    pub(super) fn unreachable_rows(&self) -> Option<String> {
        let (last, rows) = (i64::from(self.tokenizer.largest.0), self.text.vocab_size);
        (last + 1 < rows).then(|| {
            format!(
                "the text encoder has {rows} rows, the tokenizer's last id is {last}: the rows after it have no effect \
                 (were there added tokens? then tokenizer/ lacks them)"
            )
        })
    }
}

/// Whether a config was written by a diffusers of before 0.9.
fn is_before_0_9(config: &Value) -> bool {
    let version = config.get("_diffusers_version").and_then(Value::as_str).unwrap_or_default();
    let mut numbers = version.split('.').map(|part| part.parse::<u32>().ok());
    matches!((numbers.next().flatten(), numbers.next().flatten()), (Some(0), Some(minor)) if minor < 9)
}

/// Keys and components that nobody reads, in one sentence, if there are any.
fn unread(index: &Value, unet: &Value, text: &Value, vae: &Value) -> Option<String> {
    let found = [
        (INDEX, unread_components(index)),
        (UNET, unet_config::unknown_keys(unet)),
        (TEXT, text_encoder::unknown_keys(text)),
        (VAE, vae::unknown_keys(vae)),
    ];
    let found: Vec<String> = found
        .into_iter()
        .filter(|(_, keys)| !keys.is_empty())
        .map(|(path, keys)| format!("{path}: {}", keys.join(", ")))
        .collect();
    (!found.is_empty()).then(|| format!("what is not known here has no effect: {}", found.join("; ")))
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
    let unused: Vec<_> = unused.iter().filter(|name| !harmless(name)).collect();
    if let Some(name) = unused.first() {
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
        let plan = Plan::of(&files)?;
        let Plan { text: text_config, unet: unet_config, vae: vae_config, scheduler, tokenizer, .. } = plan;

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
            let unet = UNet::new(b, &unet_config, how.unet_kind, how.recomputed)?;
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
        vae.precision = how.precision;
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

    /// For a process that writes no model: lets go of what the files gave where a network computes in another number type.
    pub fn forget_given(&self) {
        for network in [&self.text_parameters, &self.unet_parameters, &self.vae_parameters] {
            network.forget_given();
        }
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
        UNet::new(&builder, &self.unet.config, self.unet.kind, Recomputed::Nothing)
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
        let _precision = self.enter_precision();
        Ok(tch::no_grad(|| self.text_encoder.forward(&ids)).to_kind(Kind::Float))
    }

    /// While what this gives lives, this thread computes as text encoder and VAE do: for the networks of rewards, and for
    /// backward passes through any of them.
    pub fn enter_precision(&self) -> Entered {
        self.vae.precision.enter(self.device)
    }

    /// Latent channels, height and width at the model's native size.
    pub fn latent_shape(&self) -> [i64; 3] {
        let c = &self.unet.config;
        [c.in_channels, c.sample_size[0], c.sample_size[1]]
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

    /// Configs and tokenizer as they came, with what older readers need beside them, and an index of what is written.
    fn files_to_save(&self) -> Result<BTreeMap<String, Vec<u8>>> {
        let files = self.architecture();
        let mut saved = self.texts.clone();
        saved.extend(for_older_readers(&files)?.into_iter().map(|(path, bytes)| (path.to_string(), bytes)));
        let index = files.json(INDEX)?;
        let changed = index_of_what_is_saved(&index, &saved);
        if changed != index {
            saved.insert(INDEX.to_string(), serde_json::to_vec_pretty(&changed)?);
        }
        Ok(saved)
    }

    /// Writes the model as a diffusers folder, weights in `kind` (f32, f16, bf16). `unet` replaces the U-Net's
    /// weights where given (an average of them, for example). The folder appears whole or not at all.
    ///
    /// # Errors
    /// Something is at `dir` already, or it cannot be written ([`CannotWrite`]); what was begun is removed.
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
        for (path, bytes) in self.files_to_save()? {
            write(&dir.join(path), &bytes)?;
        }
        for (component, stem) in COMPONENTS {
            let tensors = match component {
                "text_encoder" => self.text_parameters.exact(),
                "vae" => self.vae_parameters.exact(),
                _ => match unet {
                    Some(weights) => weights.iter().map(|(k, v)| (k.clone(), v.shallow_clone())).collect(),
                    None => self.unet_parameters.exact(),
                },
            };
            save_safetensors(&dir.join(component).join(format!("{stem}.safetensors")), &tensors, kind)?;
        }
        Ok(())
    }
}

/// `index` without the components that are not written: the optional ones are null, as diffusers has them.
fn index_of_what_is_saved(index: &Value, saved: &BTreeMap<String, Vec<u8>>) -> Value {
    let mut index = index.clone();
    let Some(entries) = index.as_object_mut() else { return index };
    let is_written = |name: &str| saved.keys().any(|path| path.starts_with(&format!("{name}/")));
    for (name, entry) in entries.iter_mut() {
        if entry.is_array() && !name.starts_with('_') && !is_written(name) {
            *entry = json!([null, null]);
        }
    }
    let optional = ["safety_checker", "feature_extractor", "image_encoder"];
    entries.retain(|name, entry| *entry != json!([null, null]) || optional.contains(&name.as_str()));
    index
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(parent) = path.parent() {
        make_folder(parent)?;
    }
    fs::write(path, bytes).context(CannotWrite::file(path))
}
