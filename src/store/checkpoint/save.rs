//! Writing a checkpoint: every rank its range of elements, rank 0 the manifest.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{ensure, Context, Result};

use super::{
    folder_of, list,
    manifest::{Manifest, ShardEntry},
    CheckpointRef, FORMAT,
};
use crate::{
    comm::{agree, Communicator},
    store::{digest, h5},
};

/// What a save did.
#[derive(Clone, Debug)]
pub struct SaveReport {
    pub path: PathBuf,
    /// Time the training loop waited.
    pub took: Duration,
    /// Bytes this rank wrote.
    pub bytes: u64,
}

/// Saves the state to `checkpoints/iteration-N` and removes all but the newest `keep_last`. Later ones, which a run
/// that went back leaves behind, are removed first: they would outlive what is saved now. A collective call; an error
/// on one rank is an error on all, and leaves what was there before.
pub fn save(
    checkpoints: &Path,
    checkpoint: &CheckpointRef,
    keep_last: usize,
    comm: &dyn Communicator,
) -> Result<SaveReport> {
    let started = Instant::now();
    let path = folder_of(checkpoints, checkpoint.iteration);
    let partial = path.with_extension("partial");
    agree(comm, if comm.rank() == 0 { start_empty(&partial) } else { Ok(()) })?;

    let written = write_shard(&partial, checkpoint, comm);
    let entry = written.as_ref().ok().cloned();
    agree(comm, written.map(drop))?;
    let entry = entry.expect("agreed");
    let entries = comm.all_gather_bytes(&serde_json::to_vec(&entry)?)?;

    let finish = || -> Result<()> {
        let shards = entries.iter().map(|bytes| Ok(serde_json::from_slice(bytes)?)).collect::<Result<_>>()?;
        let manifest = Manifest {
            format: FORMAT.to_string(),
            code_version: env!("CARGO_PKG_VERSION").to_string(),
            iteration: checkpoint.iteration,
            elements: elements(checkpoint)?,
            shards,
        };
        manifest.write(&partial)?;
        publish(&partial, &path)?;
        remove_others(checkpoints, checkpoint.iteration, keep_last)
    };
    agree(comm, if comm.rank() == 0 { finish() } else { Ok(()) })?;
    Ok(SaveReport { path, took: started.elapsed(), bytes: entry.bytes })
}

fn start_empty(partial: &Path) -> Result<()> {
    if partial.exists() {
        fs::remove_dir_all(partial).with_context(|| format!("cannot clear {}", partial.display()))?;
    }
    fs::create_dir_all(partial).with_context(|| format!("cannot create {}", partial.display()))
}

fn elements(checkpoint: &CheckpointRef) -> Result<usize> {
    let elements = checkpoint.vectors.first().map_or(0, |(_, values)| values.len());
    for (name, values) in &checkpoint.vectors {
        ensure!(values.len() == elements, "vector {name} has {} elements, the first has {elements}", values.len());
    }
    Ok(elements)
}

fn write_shard(folder: &Path, checkpoint: &CheckpointRef, comm: &dyn Communicator) -> Result<ShardEntry> {
    let (rank, size) = (comm.rank(), comm.size());
    let elements = elements(checkpoint)?;
    let range = elements * rank / size..elements * (rank + 1) / size;
    let file = format!("shard-{rank:03}.h5");
    let path = folder.join(&file);
    h5::write_file(&path, |out| {
        h5::write_text_attribute(out, "format", FORMAT)?;
        h5::write_attribute(out, "iteration", checkpoint.iteration)?;
        h5::write_attribute(out, "first", range.start as u64)?;
        // the order of the vectors: HDF5 lists datasets by name
        let names: Vec<String> = checkpoint.vectors.iter().map(|(name, _)| name.to_string()).collect();
        h5::write_texts(out, "vectors", &names)?;
        for (name, values) in &checkpoint.vectors {
            h5::write_array(out, name, &values[range.clone()], &[range.len()])?;
        }
        if rank == 0 {
            h5::write_text(out, "meta", &serde_json::to_string(checkpoint.meta)?)?;
            h5::write_text(out, "config", checkpoint.config_toml)?;
            h5::write_text(out, "layout", &serde_json::to_string(checkpoint.layout)?)?;
        }
        Ok(())
    })?;
    let (sha256, bytes) = digest::of_file(&path)?;
    Ok(ShardEntry { file, bytes, sha256, first: range.start, count: range.len() })
}

/// Gives a complete folder its name. One of that name (a run that fell back past it) is replaced.
fn publish(partial: &Path, path: &Path) -> Result<()> {
    let replaced = path.with_extension("replaced");
    if path.exists() {
        if replaced.exists() {
            // of a save that was interrupted between its last two steps
            fs::remove_dir_all(&replaced).with_context(|| format!("cannot remove {}", replaced.display()))?;
        }
        fs::rename(path, &replaced).with_context(|| format!("cannot replace {}", path.display()))?;
    }
    fs::rename(partial, path).with_context(|| format!("cannot rename {}", partial.display()))?;
    let parent = path.parent().context("a checkpoint without a folder")?;
    fs::File::open(parent)?.sync_all()?;
    if replaced.exists() {
        fs::remove_dir_all(&replaced).with_context(|| format!("cannot remove {}", replaced.display()))?;
    }
    Ok(())
}

fn remove_others(checkpoints: &Path, newest: u64, keep_last: usize) -> Result<()> {
    let all = list(checkpoints).with_context(|| format!("cannot read {}", checkpoints.display()))?;
    let (kept, later): (Vec<_>, Vec<_>) = all.iter().partition(|(iteration, _)| *iteration <= newest);
    for (_, path) in later.into_iter().chain(kept.into_iter().rev().skip(keep_last)) {
        fs::remove_dir_all(path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}
