//! Adapters as they lie on disk: files or folders of any layout (`layouts.rs`) → the tensors of each layer.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use anyhow::{bail, ensure, Context, Result};
use safetensors::SafeTensors;
use serde_json::Value;
use tch::{Kind, Tensor};

use super::{
    config::PeftConfig,
    layouts::{ensure_lora, place, Network, Part},
};
use crate::{
    comm::{agree, Communicator},
    models::weight_files::read_tensors,
    user_file,
};

/// Names that libraries save adapters under, the preferred first.
const WEIGHTS: [&str; 4] =
    ["pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapter_model.safetensors", "adapter_model.bin"];
const CONFIG: &str = "adapter_config.json";

/// Adapters of one model, from one file or folder.
#[derive(Debug)]
pub struct Adapter {
    /// For messages.
    pub origin: String,
    /// By network and the layer's path with underscores.
    pub layers: BTreeMap<(Network, String), LayerAdapter>,
    /// What had to be guessed, for the log.
    pub guesses: Vec<String>,
}

/// What an adapter holds for one layer.
#[derive(Debug, Default)]
pub struct LayerAdapter {
    /// Name of its first tensor in the file, for messages.
    pub name: String,
    pub parts: BTreeMap<Part, Tensor>,
    /// alpha / rank, where there is a product.
    pub scale: f64,
}

impl LayerAdapter {
    pub fn get(&self, part: Part) -> Option<&Tensor> {
        self.parts.get(&part)
    }
}

/// A file that belongs to an adapter, as bytes.
struct AdapterFile {
    origin: String,
    /// What its tensors are of where their names do not say.
    network: Network,
    weights: Vec<u8>,
    config: Option<Vec<u8>>,
}

impl Adapter {
    /// Reads an adapter on every rank; rank 0 reads the files. A collective call.
    ///
    /// # Errors
    /// Names what is missing, damaged or of another kind.
    pub fn read(path: &Path, comm: &dyn Communicator) -> Result<Adapter> {
        let found = if comm.rank() == 0 { find(path).map(Some) } else { Ok(None) };
        let (found, outcome) = match found {
            Ok(found) => (found.unwrap_or_default(), Ok(())),
            Err(e) => (Vec::new(), Err(e)),
        };
        match comm.size() {
            1 => outcome?,
            _ => agree(comm, outcome)?,
        }
        let mut adapter = Adapter { origin: path.display().to_string(), layers: BTreeMap::new(), guesses: Vec::new() };
        for file in shared(found, comm)? {
            let tensors = read_tensors(&file.weights, &file.origin)?;
            adapter.add(&file, tensors).with_context(|| file.origin.clone())?;
        }
        Ok(adapter)
    }

    fn add(&mut self, file: &AdapterFile, tensors: BTreeMap<String, Tensor>) -> Result<()> {
        let metadata = metadata(&file.weights);
        ensure_lora(tensors.keys())?;
        let mut new: BTreeMap<(Network, String), LayerAdapter> = BTreeMap::new();
        for (name, tensor) in tensors {
            let place = place(&name, file.network)?;
            let numbers = tensor.is_floating_point() || place.part == Part::Alpha;
            ensure!(numbers, "tensor {name} has type {:?}, expected floating-point numbers", tensor.kind());
            let tensor = tensor.to_kind(Kind::Double);
            ensure!(
                tensor.isfinite().all().int64_value(&[]) != 0,
                "tensor {name} holds values that are not finite (NaN or infinite)"
            );
            let at = (place.network, place.layer);
            ensure!(!self.layers.contains_key(&at), "tensor {name}: another file adapts the same layer");
            let layer = new.entry(at).or_default();
            if layer.parts.insert(place.part, tensor).is_some() {
                bail!("tensor {name} is there twice, under two names: the file holds more than one adapter");
            }
            if layer.name.is_empty() {
                layer.name = name;
            }
        }

        let before = new.len();
        let mut first = None;
        new.retain(|_, layer| {
            let alone = layer.parts.keys().all(|part| *part == Part::Alpha);
            first = first.take().or(alone.then(|| layer.name.clone()));
            !alone
        });
        if let Some(first) = first {
            ensure!(!new.is_empty(), "the file holds alphas without lora_down and lora_up, the first is {first}");
            let count = before - new.len();
            self.guesses.push(format!(
                "{}: {count} alphas without lora_down and lora_up have no effect, the first is {first}",
                file.origin
            ));
        }

        let configs = [Network::UNet, Network::TextEncoder].map(|network| -> Result<Option<PeftConfig>> {
            if let Some(json) = metadata.get("lora_adapter_metadata") {
                return PeftConfig::from_metadata(json, network);
            }
            let Some(bytes) = &file.config else { return Ok(None) };
            let json: Value = serde_json::from_slice(bytes).with_context(|| format!("{CONFIG} is not JSON"))?;
            let json = json.as_object().with_context(|| format!("{CONFIG} is no JSON object"))?;
            PeftConfig::from_json(json).context(CONFIG).map(Some)
        });
        let [unet, text] = configs;
        let (unet, text) = (unet?, text?);
        for ((network, path), layer) in &mut new {
            let config = match network {
                Network::UNet => &unet,
                Network::TextEncoder => &text,
            };
            layer.scale = scale(layer, path, config.as_ref())?;
        }
        if unet.is_none() && text.is_none() {
            self.note_guesses(&new, &file.origin);
        }
        self.layers.extend(new);
        Ok(())
    }

    /// Without a configuration and without a layer's own alpha its product is added as it is.
    fn note_guesses(&mut self, layers: &BTreeMap<(Network, String), LayerAdapter>, origin: &str) {
        let products = || layers.iter().filter(|(_, layer)| layer.get(Part::Down).is_some());
        let silent = products().filter(|(_, layer)| layer.get(Part::Alpha).is_none()).count();
        let ranks_of = |network| -> BTreeSet<i64> {
            products()
                .filter(|((of, _), _)| *of == network)
                .map(|(_, layer)| layer.parts[&Part::Down].size()[0])
                .collect()
        };
        // one rank for each network is what trainers write
        let ranks = [Network::UNet, Network::TextEncoder].map(ranks_of).into_iter().find(|ranks| ranks.len() > 1);
        if silent > 0 && silent < products().count() {
            self.guesses
                .push(format!("{origin}: {silent} layers of the adapter have no alpha; it is taken for their rank"));
        } else if let Some(ranks) = ranks.filter(|_| silent > 0) {
            let ranks: Vec<String> = ranks.iter().map(i64::to_string).collect();
            self.guesses.push(format!(
                "{origin}: the file has no alpha and layers of different ranks ({}); each alpha is taken for the rank",
                ranks.join(", ")
            ));
        } else if silent > 0 && origin.rsplit('/').next().is_some_and(|name| name.starts_with("adapter_model.")) {
            self.guesses.push(format!("{origin}: there is no {CONFIG} beside it; alpha is taken for the rank"));
        }
    }
}

/// alpha / rank of one layer: by its own alpha, else the configuration's, else 1.
fn scale(layer: &LayerAdapter, path: &str, config: Option<&PeftConfig>) -> Result<f64> {
    let name = &layer.name;
    let down = match (layer.get(Part::Down), layer.get(Part::Up)) {
        (Some(down), Some(_)) => down,
        (Some(_), None) => bail!("{name} has no partner: lora_B (lora.up, lora_up) of that layer is missing"),
        (None, Some(_)) => bail!("{name} has no partner: lora_A (lora.down, lora_down) of that layer is missing"),
        (None, None) => {
            let alone = [Part::Mid, Part::UpBias, Part::Magnitude].iter().any(|part| layer.get(*part).is_some());
            ensure!(!alone, "{name} stands alone: lora_A and lora_B of that layer are missing");
            return Ok(1.0);
        }
    };
    let rank = down.size().first().copied().unwrap_or(0);
    ensure!(rank > 0, "{name}: the rank is 0");
    match layer.get(Part::Alpha) {
        Some(alpha) => {
            ensure!(alpha.numel() == 1, "{name}: alpha has shape {:?}, expected one number", alpha.size());
            Ok(alpha.sum(Kind::Double).double_value(&[]) / rank as f64)
        }
        None => Ok(config.map_or(1.0, |config| config.scale(path, rank))),
    }
}

/// The texts in the header of a safetensors file; none of a pickle.
fn metadata(bytes: &[u8]) -> BTreeMap<String, String> {
    let header = SafeTensors::read_metadata(bytes).ok();
    header.and_then(|(_, header)| header.metadata().clone()).into_iter().flatten().collect()
}

/// The files that make up the adapter at `path`.
fn find(path: &Path) -> Result<Vec<AdapterFile>> {
    ensure!(path.exists(), "{}: there is no such file or folder", path.display());
    if !path.is_dir() {
        let config = path.with_file_name(CONFIG);
        // a folder of another adapter may lie around: the config is of the file that PEFT names
        let of_peft = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("adapter_model."));
        return Ok(vec![file(path.to_path_buf(), (of_peft && config.is_file()).then_some(config), Network::UNet)?]);
    }
    if let Some(whole) = in_folder(path, Network::UNet)? {
        return Ok(vec![whole]);
    }
    let mut parts = Vec::new();
    for network in [Network::UNet, Network::TextEncoder] {
        parts.extend(in_folder(&path.join(network.component()), network)?);
    }
    if !parts.is_empty() {
        return Ok(parts);
    }
    // as diffusers guesses: the only file of weights
    let entries = std::fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))?;
    let weights = |path: &PathBuf| path.extension().is_some_and(|e| e == "safetensors" || e == "bin" || e == "pt");
    let mut guesses: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).filter(weights).collect();
    guesses.sort();
    match guesses.as_slice() {
        [one] => Ok(vec![file(one.clone(), None, Network::UNet)?]),
        [] => bail!("{} holds no adapter: none of {} is in it", path.display(), WEIGHTS.join(", ")),
        many => bail!("{} holds {} files of weights: name one of them", path.display(), many.len()),
    }
}

/// What a folder holds under the names of [`WEIGHTS`].
fn in_folder(dir: &Path, network: Network) -> Result<Option<AdapterFile>> {
    let Some(name) = WEIGHTS.iter().find(|name| dir.join(name).is_file()) else { return Ok(None) };
    let config = dir.join(CONFIG);
    ensure!(
        config.is_file() || !name.starts_with("adapter_model"),
        "{} is missing beside {name}: alpha stands in it",
        config.display()
    );
    file(dir.join(name), name.starts_with("adapter_model").then_some(config), network).map(Some)
}

fn file(path: PathBuf, config: Option<PathBuf>, network: Network) -> Result<AdapterFile> {
    let read = |path: &Path| user_file::read(path).with_context(|| format!("cannot read {}", path.display()));
    Ok(AdapterFile {
        origin: path.display().to_string(),
        network,
        weights: read(&path)?,
        config: config.map(|path| read(&path)).transpose()?,
    })
}

/// Rank 0's files, on every rank.
fn shared(mut files: Vec<AdapterFile>, comm: &dyn Communicator) -> Result<Vec<AdapterFile>> {
    if comm.size() == 1 {
        return Ok(files);
    }
    let headers = files.iter().map(|f| (f.origin.clone(), f.network == Network::UNet, f.config.is_some()));
    let mut header = serde_json::to_vec(&headers.collect::<Vec<_>>())?;
    comm.broadcast_bytes(&mut header, 0)?;
    let headers: Vec<(String, bool, bool)> = serde_json::from_slice(&header).context("adapter's header from rank 0")?;
    if comm.rank() != 0 {
        let empty = |(origin, unet, config): (String, bool, bool)| AdapterFile {
            origin,
            network: if unet { Network::UNet } else { Network::TextEncoder },
            weights: Vec::new(),
            config: config.then(Vec::new),
        };
        files = headers.into_iter().map(empty).collect();
    }
    for file in &mut files {
        comm.broadcast_bytes(&mut file.weights, 0)?;
        if let Some(config) = &mut file.config {
            comm.broadcast_bytes(config, 0)?;
        }
    }
    Ok(files)
}
