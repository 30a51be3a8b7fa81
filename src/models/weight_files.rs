//! Which file holds a network's weights, in what format.
//!
//! Looked for in this order, full precision before half, safetensors before pickles, one file before shards:
//!
//! ```text
//! STEM.safetensors        STEM.safetensors.index.json        STEM.bin|.pt|.pth        STEM.bin.index.json
//! STEM.fp16.safetensors   STEM.safetensors.index.fp16.json   STEM.fp16.bin|.pt|.pth   STEM.bin.index.fp16.json
//! ```
//!
//! STEM is `diffusion_pytorch_model`, for the text encoder `model` (pickles: also `pytorch_model`). What a file is, its
//! first bytes decide, not its name.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{bail, ensure, Context, Result};
use serde_json::{Map, Value};
use tch::Tensor;

use super::{
    folder::ModelLocation,
    torch_file::{is_pickle, is_zip, read_torch_file},
    weights::{ensure_no_pointer, read_safetensors},
};
use crate::python_json;

/// File names of a component's weights, the preferred first.
fn candidates(stem: &str) -> Vec<String> {
    let mut names = Vec::new();
    for variant in ["", ".fp16"] {
        names.push(format!("{stem}{variant}.safetensors"));
        names.push(format!("{stem}.safetensors.index{variant}.json"));
        names.push(format!("{stem}{variant}.safetensors.index.json"));
        for stem in [stem, "pytorch_model"] {
            names.extend(["bin", "pt", "pth"].map(|suffix| format!("{stem}{variant}.{suffix}")));
            names.push(format!("{stem}.bin.index{variant}.json"));
            names.push(format!("{stem}{variant}.bin.index.json"));
        }
    }
    names
}

/// The tensors of `component`, in the types they are stored in, by their names in the file.
///
/// # Errors
/// Names the file that is missing or damaged.
pub fn read_weights(
    location: &ModelLocation,
    origin: &str,
    component: &str,
    stem: &str,
) -> Result<BTreeMap<String, Tensor>> {
    for name in candidates(stem) {
        let path = format!("{component}/{name}");
        let Some(bytes) = location.bytes(&path)? else { continue };
        log::debug!("{origin}: the weights of {component} are read from {name}");
        if !name.ends_with(".json") {
            return read_tensors(&bytes, &format!("{origin}: {path}"));
        }
        return read_shards(location, origin, component, &path, &bytes);
    }
    bail!(missing(origin, component, stem))
}

fn missing(origin: &str, component: &str, stem: &str) -> String {
    format!("{origin}: {component}/{stem}.safetensors is missing (and there is no .fp16, .bin or sharded form of it)")
}

/// Fails where the weights of `component` are not there, or Git's placeholders for them are; reads only beginnings.
pub fn ensure_present(location: &ModelLocation, origin: &str, component: &str, stem: &str) -> Result<()> {
    for name in candidates(stem) {
        let path = format!("{component}/{name}");
        let Some(bytes) = location.bytes(&path)? else { continue };
        ensure_no_pointer(&bytes, &format!("{origin}: {path}"))?;
        if !name.ends_with(".json") {
            return Ok(());
        }
        let at = format!("{origin}: {path}");
        let index = python_json::parse(&bytes).with_context(|| at.clone())?;
        for file in shards_of(weight_map(&index, &at)?, &at)? {
            let shard = format!("{component}/{file}");
            let bytes = location.bytes(&shard)?;
            let bytes = bytes.with_context(|| format!("{origin}: {shard}, named in {path}, is missing"))?;
            ensure_no_pointer(&bytes, &format!("{origin}: {shard}"))?;
        }
        return Ok(());
    }
    bail!(missing(origin, component, stem))
}

/// Whether diffusers or transformers put a file of this name beside a component's config.
pub fn is_weight_file(name: &str, stem: &str) -> bool {
    let shard = |name: &str| name.contains("-of-") && name.starts_with(stem);
    candidates(stem).iter().any(|known| known == name) || shard(name) || name.starts_with("pytorch_model")
}

/// The tensors of one file of any format.
pub fn read_tensors(bytes: &[u8], origin: &str) -> Result<BTreeMap<String, Tensor>> {
    ensure_no_pointer(bytes, origin)?;
    // the length of a safetensors header could look like a pickle's first bytes, but then `{` follows
    let pickled = is_pickle(bytes) && bytes.get(8) != Some(&b'{');
    let safetensors = origin.ends_with(".safetensors") && !is_zip(bytes) && !pickled;
    match safetensors || bytes.get(8) == Some(&b'{') {
        true => read_safetensors(bytes, origin),
        false => read_torch_file(bytes).with_context(|| format!("{origin} is not a sound file of torch.save")),
    }
}

/// Tensors and the files they are in, of an index.
fn weight_map<'a>(index: &'a Value, at: &str) -> Result<&'a Map<String, Value>> {
    index.get("weight_map").and_then(Value::as_object).with_context(|| format!("{at}: weight_map is missing"))
}

/// The names of all shards.
fn shards_of<'a>(map: &'a Map<String, Value>, at: &str) -> Result<BTreeSet<&'a str>> {
    let file_name = |(name, file): (&String, &'a Value)| {
        let file = file.as_str().filter(|file| !file.is_empty() && !file.contains(['/', '\\']));
        file.with_context(|| format!("{at}: weight_map.{name} is not a file name"))
    };
    map.iter().map(file_name).collect()
}

/// All shards that an index names.
fn read_shards(
    location: &ModelLocation,
    origin: &str,
    component: &str,
    index_path: &str,
    index: &[u8],
) -> Result<BTreeMap<String, Tensor>> {
    let at = || format!("{origin}: {index_path}");
    ensure_no_pointer(index, &at())?;
    let index = python_json::parse(index).with_context(at)?;
    let map = weight_map(&index, &at())?;
    let shards = shards_of(map, &at())?;
    let mut tensors = BTreeMap::new();
    for file in shards {
        let path = format!("{component}/{file}");
        let bytes = location.bytes(&path)?;
        let bytes = bytes.with_context(|| format!("{origin}: {path}, named in {index_path}, is missing"))?;
        for (name, tensor) in read_tensors(&bytes, &format!("{origin}: {path}"))? {
            if map.get(&name).and_then(Value::as_str) == Some(file) {
                tensors.insert(name, tensor);
            }
        }
    }
    for (name, file) in map {
        ensure!(tensors.contains_key(name), "{}: tensor {name} is not in {}", at(), file.as_str().unwrap_or_default());
    }
    Ok(tensors)
}

/// Tensors with values that are not finite: damage that training would spread, or a broken conversion.
pub fn warn_of_bad_values(tensors: &BTreeMap<String, Tensor>, origin: &str) {
    for (name, tensor) in tensors {
        if tensor.is_floating_point() && tensor.isfinite().all().int64_value(&[]) == 0 {
            log::warn!("{origin}: tensor {name} holds values that are not finite (NaN or infinite)");
        }
    }
}
