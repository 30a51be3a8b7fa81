//! What `rldiff inspect` says of a checkpoint, a run's checkpoints, or a trajectory shard.

use std::{fmt::Write, path::Path};

use anyhow::{bail, Context, Result};

use super::{
    checkpoint::{self, Checkpoint, Loaded, Stored, REWARDS},
    h5, state_digest,
};
use crate::{comm::Local, convergence::Rewards, kernels::adamw::global_norm};

/// A readable account of `path`: a run's folder or its checkpoints (the newest), one checkpoint, or an HDF5 file.
pub fn inspect(path: &Path) -> Result<String> {
    if path.is_file() {
        return describe_file(path);
    }
    let Loaded { checkpoint, path: folder, warnings } = Loaded::of(find(path)?, &Local)?;
    let mut out = String::new();
    for warning in warnings {
        writeln!(out, "warning: {warning}")?;
    }
    writeln!(out, "checkpoint    {}", folder.display())?;
    writeln!(out, "iteration     {}", checkpoint.iteration)?;
    writeln!(out, "written by    rldiff {}", checkpoint.code_version)?;
    writeln!(out, "digest        {} (SHA-256 over the training state)", state_digest(&checkpoint)?)?;
    writeln!(
        out,
        "prompts       the next are those of iteration {}: a function of (run.seed, iteration, task, sample) alone",
        checkpoint.iteration + 1
    )?;
    writeln!(out, "parameters    {} in {} tensors", elements(&checkpoint), checkpoint.layout.len())?;
    writeln!(out, "adapters      {}", adapters(&checkpoint.config_toml))?;
    for (name, values) in &checkpoint.vectors {
        writeln!(out, "{name:<13} norm {:.6e}", global_norm(values))?;
    }
    let manifest = checkpoint::Manifest::read(&folder)?;
    writeln!(out, "\nshards, one per rank that saved (first element, elements, bytes, SHA-256)")?;
    for shard in &manifest.shards {
        writeln!(out, "{}  {:>10} {:>10} {:>12}  {}", shard.file, shard.first, shard.count, shard.bytes, shard.sha256)?;
    }
    let mut state = checkpoint.meta.clone();
    // a line for each iteration
    if let Some(kept) = state.as_object_mut().and_then(|state| state.remove(REWARDS)) {
        let rewards: Rewards = serde_json::from_value(kept).context("the checkpoint's rewards")?;
        let tasks: Vec<&str> = rewards.tasks().collect();
        writeln!(
            out,
            "\nrewards       of {} iterations, of {}: what [stop] decides by",
            rewards.len(),
            tasks.join(", ")
        )?;
    }
    writeln!(out, "\nstate\n{}", serde_json::to_string_pretty(&state)?)?;
    writeln!(out, "\nconfig\n{}", checkpoint.config_toml)?;
    writeln!(out, "tensors (offset, shape, name)")?;
    for entry in &checkpoint.layout {
        writeln!(out, "{:>10}  {:<20} {}", entry.offset, format!("{:?}", entry.shape), entry.name)?;
    }
    Ok(out)
}

/// SHA-256 over the whole training state of the checkpoint at `path` (see [`state_digest`]).
pub fn digest(path: &Path) -> Result<String> {
    state_digest(&Loaded::of(find(path)?, &Local)?.checkpoint)
}

/// Whether the vectors are the U-Net's or those of its adapters, as the config says.
fn adapters(config_toml: &str) -> String {
    let config: Option<toml::Table> = config_toml.parse().ok();
    let rank = config.as_ref().and_then(|config| config.get("lora")?.get("rank")?.as_integer());
    match rank {
        Some(0) => "none: the parameters are the U-Net's".to_string(),
        Some(rank) => format!("LoRA of rank {rank}: the parameters are theirs"),
        None => "the config does not say".to_string(),
    }
}

fn elements(checkpoint: &Checkpoint) -> usize {
    checkpoint.vectors.first().map_or(0, |(_, values)| values.len())
}

/// The checkpoint at `path` (a checkpoint, a folder of them or a run's folder: the newest sound one).
pub fn find(path: &Path) -> Result<Stored> {
    if !path.exists() {
        bail!("{} does not exist", path.display());
    }
    if path.join("manifest.json").exists() {
        return checkpoint::open(path, &Local);
    }
    let inner = path.join("checkpoints");
    let folder = if inner.is_dir() { inner } else { path.to_path_buf() };
    checkpoint::open_latest(&folder, &Local)?.with_context(|| format!("{} holds no checkpoint", folder.display()))
}

fn describe_file(path: &Path) -> Result<String> {
    let file = h5::open(path).with_context(|| format!("{} is not an HDF5 file", path.display()))?;
    let mut out = format!("{}\n", path.display());
    for name in file.attr_names()? {
        let attribute = file.attr(&name)?;
        let value = h5::read_text_attribute(&file, &name)
            .or_else(|_| attribute.read_scalar::<f64>().map(|v| v.to_string()).map_err(anyhow::Error::from))
            .unwrap_or_else(|_| "(not a number or text)".to_string());
        writeln!(out, "  @{name} = {value}")?;
    }
    let mut names = file.member_names()?;
    names.sort();
    for name in names {
        let dataset = file.dataset(&name).with_context(|| format!("{}: {name}", path.display()))?;
        let kind = format!("{:?}", dataset.dtype()?.to_descriptor()?);
        writeln!(out, "  {name:<16} {:<20} {kind}", format!("{:?}", dataset.shape()))?;
    }
    Ok(out)
}
