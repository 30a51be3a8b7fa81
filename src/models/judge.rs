//! What a folder is, before a byte of its weights is read: every JSON file in it is read and judged, in this order, and a
//! model of another kind is called by its name before anything is missed or asked for (a wrong model's weights are many
//! gigabytes, and fetching them would be in vain).

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    sync::{Mutex, PoisonError},
};

use anyhow::{anyhow, bail, Context, Result};
use serde_json::Value;

use super::{
    folder::{ModelFiles, ModelLocation, COMPONENTS},
    model_index::{ensure_supported_pipeline, TRAINED},
    pipeline::Plan,
    weight_files::{ensure_present, is_weight_file},
    weights::ensure_no_pointer,
};
use crate::python_json::{self, shown};

const INDEX: &str = "model_index.json";

/// The configs and the tokenizer of a model that can be built, whose weights are there; and what is to be said once the
/// weights are read: everything in the folder that has no effect.
///
/// # Errors
/// Says what the folder holds instead, or names the file and what is wrong in it.
pub fn judge(location: &ModelLocation) -> Result<(ModelFiles, Vec<String>)> {
    let origin = location.origin()?;
    let json = |path: &str| -> Result<Option<Value>> {
        let Some(bytes) = location.bytes(path)? else { return Ok(None) };
        ensure_no_pointer(&bytes, &format!("{origin}: {path}"))?;
        python_json::parse(&bytes).map(Some).map_err(|e| anyhow!("{origin}: {path} {e}"))
    };
    match json(INDEX)? {
        Some(index) => ensure_supported_pipeline(&index).with_context(|| format!("{origin}: {INDEX}"))?,
        None => bail!(without_index(location, &origin)),
    }
    // what the U-Net is comes before what may be missing
    if let Some(unet) = json("unet/config.json")? {
        ensure_unet_of_this_kind(&unet).with_context(|| format!("{origin}: unet/config.json"))?;
    }
    let files = ModelFiles::read_texts(location)?;
    let plan = Plan::of(&files)?;
    for (component, stem) in COMPONENTS {
        ensure_present(location, &origin, component, stem)?;
    }
    let notes = plan.notes.iter().cloned().chain(plan.unreachable_rows()).chain(unread_files(location));
    let notes = notes.map(|note| format!("{origin}: {note}")).collect();
    Ok((files, notes))
}

/// Says what has not been said in this process yet.
pub fn warn_once(warnings: Vec<String>) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    for warning in warnings {
        if !said.contains(&warning) {
            log::warn!("{warning}");
            said.insert(warning);
        }
    }
}

/// Fails where `config` (unet/config.json) is of a network of another kind, in words.
pub fn ensure_unet_of_this_kind(config: &Value) -> Result<()> {
    let get = |key: &str| config.get(key).unwrap_or(&Value::Null);
    let says = |key: &str, what: &str| anyhow!("{key} = {}: this is {what}; {TRAINED}", shown(get(key)));
    match get("_class_name").as_str() {
        Some("UNet3DConditionModel" | "UNetMotionModel" | "UNetSpatioTemporalConditionModel" | "I2VGenXLUNet") => {
            bail!(says("_class_name", "a network for video"))
        }
        Some("ControlNetModel") => bail!(says("_class_name", "a ControlNet")),
        _ => {}
    }
    let by_channels = match get("in_channels").as_i64() {
        Some(9) => "the U-Net of an inpainting model (latents, masked latents and a mask)",
        Some(8) => "a U-Net that takes a second picture (InstructPix2Pix, image variations)",
        Some(7) => "the U-Net of an upscaler",
        Some(5) => "a U-Net that takes a depth map",
        _ => "",
    };
    if !by_channels.is_empty() {
        bail!(says("in_channels", by_channels));
    }
    for (key, what) in [
        (
            "addition_embed_type",
            "the U-Net of another model (SDXL has \"text_time\", Kandinsky \"image\", IF \"text\")",
        ),
        ("time_cond_proj_dim", "a distilled U-Net (latent consistency model)"),
        ("class_embed_type", "a U-Net that takes more than a prompt (unCLIP, AudioLDM, an upscaler)"),
        ("encoder_hid_dim_type", "a U-Net of another text encoder (IF, Kandinsky, Kolors)"),
    ] {
        if !get(key).is_null() {
            let value = shown(get(key));
            bail!("{key} = {value} is not supported: this is {what}; {TRAINED}");
        }
    }
    Ok(())
}

/// What a name that is no folder may be.
pub fn no_folder(path: &Path) -> String {
    let name = path.display().to_string();
    if path.is_file() {
        return format!(
            "{name} is one file, not a folder in diffusers' layout: convert it first \
             (StableDiffusionPipeline.from_single_file(\"{name}\").save_pretrained(DIR)); for adapters there is --lora"
        );
    }
    let parts: Vec<&str> = name.split('/').collect();
    let plain = |part: &&str| !part.is_empty() && !part.starts_with(['.', '~']);
    match parts.len() == 2 && parts.iter().all(plain) {
        true => format!(
            "model folder {name} does not exist; if it is a name on the Hugging Face hub: rldiff reads folders and \
             downloads nothing, so fetch it first (hf download {name} --local-dir DIR) and give DIR"
        ),
        false => format!("model folder {name} does not exist"),
    }
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// What a folder without `model_index.json` may be.
fn without_index(location: &ModelLocation, origin: &str) -> String {
    let missing = format!("{origin}: {INDEX} is missing");
    let ModelLocation::Disk(dir) = location else { return missing };
    let names = names_in(dir);
    let has = |name: &str| names.iter().any(|found| found == name);
    let config = fs::read(dir.join("config.json")).ok().and_then(|bytes| python_json::parse(&bytes).ok());
    let class = config.as_ref().and_then(|config| {
        config.get("_class_name").or_else(|| config.get("architectures")?.get(0)).and_then(Value::as_str)
    });
    let is_weights = |name: &String| [".safetensors", ".ckpt", ".bin", ".pt"].iter().any(|end| name.ends_with(end));
    if let Some(class) = class {
        return format!("{missing}: this is one network ({class}), not a whole pipeline in diffusers' layout");
    }
    if has("adapter_config.json") || names.iter().any(|name| name.contains("lora") && is_weights(name)) {
        return format!(
            "{missing}: this is a folder of adapters (LoRA), not a model; `sample --lora` takes their file"
        );
    }
    if has("learned_embeds.bin") || has("learned_embeds.safetensors") {
        return format!("{missing}: this is a textual inversion (an added token), not a model");
    }
    if has("snapshots") {
        let inside = names_in(&dir.join("snapshots"));
        let hint =
            inside.last().map_or(String::new(), |name| format!(" in {}", dir.join("snapshots").join(name).display()));
        return format!("{missing}: this is a cache of the hub, whose models lie{hint} below snapshots");
    }
    let inside = |name: &&String| dir.join(name.as_str()).join(INDEX).is_file();
    if let Some(name) = names.iter().find(inside) {
        return format!("{missing}; there is one in {}", dir.join(name).display());
    }
    match names.iter().find(|name| is_weights(name)) {
        Some(name) => format!(
            "{missing}: {name} is a model in one file: convert it first \
             (StableDiffusionPipeline.from_single_file(\"{}\").save_pretrained(DIR))",
            dir.join(name).display()
        ),
        None => missing,
    }
}

/// A sentence that names the files with weights and the folders that nobody reads, if there are any.
fn unread_files(location: &ModelLocation) -> Option<String> {
    let ModelLocation::Disk(dir) = location else { return None };
    let known = ["scheduler", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"];
    let is_weights =
        |name: &str| [".safetensors", ".ckpt", ".bin", ".pt", ".pth"].iter().any(|end| name.ends_with(end));
    let mut unread = Vec::new();
    for name in names_in(dir) {
        let expected = known.contains(&name.as_str()) || COMPONENTS.iter().any(|(component, _)| *component == name);
        let network = dir.join(&name).join("config.json").is_file();
        if !name.starts_with('.') && !expected && (is_weights(&name) || network || name.contains("tokenizer")) {
            unread.push(name);
        }
    }
    for (component, stem) in COMPONENTS {
        let folder = dir.join(component);
        let names = names_in(&folder);
        let indices: Vec<String> = names
            .iter()
            .filter(|name| name.contains(".index."))
            .filter_map(|name| fs::read_to_string(folder.join(name)).ok())
            .collect();
        let listed = |name: &str| indices.iter().any(|index| index.contains(&format!("\"{name}\"")));
        let strange = names.into_iter().filter(|name| is_weights(name) && !is_weight_file(name, stem) && !listed(name));
        // another form of the same weights, as published folders hold them
        unread.extend(strange.filter(|name| !name.contains("non_ema")).map(|name| format!("{component}/{name}")));
    }
    (!unread.is_empty()).then(|| format!("not read, without effect: {}", unread.join(", ")))
}
