//! Checkpoints: a folder `iteration-NNNNNN` with one HDF5 shard per rank and a manifest.
//!
//! ```text
//! checkpoints/iteration-000012/
//! ├── shard-000.h5     elements 0..n/R of every vector; counters, statistics, config and layout as well
//! ├── shard-001.h5     elements n/R..2n/R …
//! └── manifest.json    SHA-256 and length of every shard, and a SHA-256 over itself; written last
//! ```
//! A shard has the attributes `format` (text), `iteration`, `first` (u64: its first element) and per vector a dataset
//! f32 `[elements]`: `weights`, `exp_avg`, `exp_avg_sq` (AdamW's moments) and, with EMA, `ema`. Shard 0 has three texts:
//! `layout` (JSON: name, shape and offset of every parameter in the vectors), `meta` (JSON: step counters and running
//! statistics) and `config` (TOML). How many ranks wrote it does not matter to who loads it.
//!
//! A save copies and writes its rank's share only. Whoever resumes verifies and reads the shards by turns with the other
//! ranks, and passes on what it has read piece by piece: nobody holds more than one piece beside the state itself.
//!
//! That is the whole state. Prompts, noise and the choice of timesteps are pure functions of (run.seed, iteration, task,
//! sample), so the cursor into the prompts is the number of iterations done, and no generator has a state to keep.
//! Adapters (LoRA) are trained in the U-Net's place: then the vectors are theirs, as the layout's names say.
//!
//! The folder is filled under the name `….partial` and renamed when the manifest is in it, so a name without
//! `.partial` is a complete checkpoint.

mod load;
mod manifest;
mod publish;
mod save;
mod shard;
mod stored;
#[cfg(test)]
mod tests;

use std::{
    ops::{Deref, Range},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use load::{load, load_latest, Loaded};
pub use manifest::{Manifest, ShardEntry};
pub use publish::{clear_leftovers, Keep};
pub use save::{save, SaveReport, Saver};
pub use stored::{open, open_latest, Stored};

/// Key in `meta` of the rewards by which `[stop]` decides; a run without that table has none.
pub const REWARDS: &str = "rewards";

/// Version of the shard format.
const FORMAT: &str = "rldiff checkpoint 2";

/// Where a parameter lies in the vectors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParameterEntry {
    pub name: String,
    pub shape: Vec<usize>,
    pub offset: usize,
}

/// Values of a vector of the state, wherever they lie.
pub trait Values {
    fn length(&self) -> usize;
    /// Copies a range of them to the host.
    fn copy(&self, range: Range<usize>) -> Vec<f32>;
}

impl<T: AsRef<[f32]> + ?Sized> Values for T {
    fn length(&self) -> usize {
        self.as_ref().len()
    }

    fn copy(&self, range: Range<usize>) -> Vec<f32> {
        self.as_ref()[range].to_vec()
    }
}

/// A training state to save; every rank has all of it and saves its share.
pub struct CheckpointRef<'a, V: ?Sized> {
    /// Iterations done.
    pub iteration: u64,
    /// Counters and statistics.
    pub meta: &'a Value,
    pub config_toml: &'a str,
    pub layout: &'a [ParameterEntry],
    /// Vectors by name, all of the same length.
    pub vectors: Vec<(&'a str, &'a V)>,
}

/// What a checkpoint holds besides the values of its vectors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Head {
    pub iteration: u64,
    pub meta: Value,
    pub config_toml: String,
    pub layout: Vec<ParameterEntry>,
    /// Of the vectors.
    pub names: Vec<String>,
    /// Of every vector.
    pub elements: usize,
    /// Version of rldiff that wrote it.
    pub code_version: String,
}

/// A training state that was loaded.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    pub head: Head,
    pub vectors: Vec<(String, Vec<f32>)>,
}

impl Deref for Checkpoint {
    type Target = Head;

    fn deref(&self) -> &Head {
        &self.head
    }
}

impl Checkpoint {
    pub fn vector(&self, name: &str) -> Option<&[f32]> {
        self.vectors.iter().find(|(n, _)| n == name).map(|(_, values)| values.as_slice())
    }
}

fn folder_of(checkpoints: &Path, iteration: u64) -> PathBuf {
    checkpoints.join(format!("iteration-{iteration:06}"))
}

/// Is there a checkpoint in `checkpoints` whose manifest is sound?
pub fn is_any(checkpoints: &Path) -> bool {
    list(checkpoints).is_ok_and(|all| all.iter().any(|(_, path)| Manifest::read(path).is_ok()))
}

/// Complete checkpoints of a folder by iteration, oldest first.
fn list(checkpoints: &Path) -> std::io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    let entries = match std::fs::read_dir(checkpoints) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        Err(e) => return Err(e),
    };
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if let Some(iteration) = name.strip_prefix("iteration-").and_then(|n| n.parse().ok()) {
            found.push((iteration, path));
        }
    }
    found.sort();
    Ok(found)
}
