//! The manifest of a checkpoint: what must be in its folder, byte for byte.

use std::path::Path;

use anyhow::{bail, ensure, Context, Result};
use serde::{Deserialize, Serialize};

use super::FORMAT;
use crate::{store::digest, telemetry::write_atomic};

pub const NAME: &str = "manifest.json";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format: String,
    pub code_version: String,
    pub iteration: u64,
    /// Elements of every vector.
    pub elements: usize,
    /// In the order of the ranks that wrote them.
    pub shards: Vec<ShardEntry>,
}

/// The file: the manifest with the SHA-256 of its compact JSON. The bytes must be exactly what [`Manifest::write`] makes
/// of it, so that no bit of the file can change unnoticed.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    manifest: Manifest,
    sha256: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    pub file: String,
    pub bytes: u64,
    pub sha256: String,
    pub first: usize,
    pub count: usize,
}

impl Manifest {
    fn sealed(&self) -> Result<Vec<u8>> {
        let sha256 = digest::of_bytes(&serde_json::to_vec(self)?);
        Ok(serde_json::to_vec_pretty(&Sealed { manifest: self.clone(), sha256 })?)
    }

    pub fn write(&self, folder: &Path) -> Result<()> {
        write_atomic(&folder.join(NAME), &self.sealed()?)
    }

    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(NAME);
        let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let sealed: Sealed =
            serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))?;
        let manifest = sealed.manifest;
        ensure!(manifest.sealed()? == bytes, "{} is damaged: its SHA-256 differs", path.display());
        ensure!(
            manifest.format == FORMAT,
            "{}: format {:?}, this rldiff reads {FORMAT:?}",
            path.display(),
            manifest.format
        );
        let mut next = 0;
        for (rank, shard) in manifest.shards.iter().enumerate() {
            ensure!(
                shard.first == next && !shard.file.contains('/'),
                "{} is damaged: the shard of rank {rank} does not continue the one before",
                path.display()
            );
            next = shard.first + shard.count;
        }
        ensure!(next == manifest.elements, "{} is damaged: the shards have {next} elements", path.display());
        Ok(manifest)
    }

    /// Compares the shard that `rank` wrote with its digest.
    pub fn verify(&self, folder: &Path, rank: usize) -> Result<()> {
        let shard = &self.shards[rank];
        let path = folder.join(&shard.file);
        let (sha256, bytes) = digest::of_file(&path).with_context(|| format!("shard of rank {rank}"))?;
        if bytes != shard.bytes {
            bail!("{} (rank {rank}) has {bytes} bytes, the manifest says {}", path.display(), shard.bytes);
        }
        ensure!(sha256 == shard.sha256, "{} (rank {rank}) is damaged: its SHA-256 differs", path.display());
        Ok(())
    }
}
