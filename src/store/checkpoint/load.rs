//! Reading a checkpoint: rank 0 verifies and reads, the others receive.

use std::path::{Path, PathBuf};

use anyhow::{anyhow, bail, ensure, Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    list,
    manifest::{self, Manifest},
    Checkpoint, ParameterEntry, FORMAT,
};
use crate::{comm::Communicator, store::h5};

/// A checkpoint with what is to be said about it.
#[derive(Debug)]
pub struct Loaded {
    pub checkpoint: Checkpoint,
    pub path: PathBuf,
    /// Newer checkpoints that were damaged, one line each.
    pub warnings: Vec<String>,
}

/// Loads the newest sound checkpoint of a folder; None when there is none at all. A collective call.
///
/// # Errors
/// All checkpoints are damaged: each is named with its file and rank.
pub fn load_latest(checkpoints: &Path, comm: &dyn Communicator) -> Result<Option<Loaded>> {
    let found = if comm.rank() == 0 { Some(newest_sound(checkpoints)) } else { None };
    share(found, comm)
}

/// Loads the checkpoint in `path`. A collective call.
pub fn load(path: &Path, comm: &dyn Communicator) -> Result<Loaded> {
    let found = (comm.rank() == 0).then(|| {
        ensure!(path.join(manifest::NAME).is_file(), "{} holds no checkpoint", path.display());
        let checkpoint = read(path)?;
        Ok(Some(Loaded { checkpoint, path: path.to_path_buf(), warnings: Vec::new() }))
    });
    share(found, comm)?.context("rank 0 sent no checkpoint")
}

fn newest_sound(checkpoints: &Path) -> Result<Option<Loaded>> {
    let all = list(checkpoints).with_context(|| format!("cannot read {}", checkpoints.display()))?;
    let mut warnings = Vec::new();
    for (_, path) in all.iter().rev() {
        match read(path) {
            Ok(checkpoint) => return Ok(Some(Loaded { checkpoint, path: path.clone(), warnings })),
            Err(e) => warnings.push(format!("checkpoint {} cannot be used: {e:#}", path.display())),
        }
    }
    if !warnings.is_empty() {
        bail!("{}", warnings.join("; "));
    }
    Ok(None)
}

/// Verifies and reads one checkpoint folder.
///
/// # Errors
/// Names the file, and the rank whose shard it is.
pub fn read(folder: &Path) -> Result<Checkpoint> {
    let manifest = Manifest::read(folder)?;
    manifest.verify(folder)?;
    let mut checkpoint = Checkpoint {
        iteration: manifest.iteration,
        meta: Value::Null,
        config_toml: String::new(),
        layout: Vec::new(),
        vectors: Vec::new(),
        code_version: manifest.code_version.clone(),
    };
    for (rank, shard) in manifest.shards.iter().enumerate() {
        let path = folder.join(&shard.file);
        read_shard(&path, rank, shard.first, &mut checkpoint)
            .with_context(|| format!("{} (rank {rank})", path.display()))?;
    }
    for (name, values) in &checkpoint.vectors {
        ensure!(values.len() == manifest.elements, "{}: vector {name} is incomplete", folder.display());
    }
    Ok(checkpoint)
}

fn read_shard(path: &Path, rank: usize, first: usize, into: &mut Checkpoint) -> Result<()> {
    let file = h5::open(path)?;
    let format = h5::read_text_attribute(&file, "format")?;
    ensure!(format == FORMAT, "format {format:?}, this rldiff reads {FORMAT:?}");
    ensure!(h5::read_attribute::<u64>(&file, "iteration")? == into.iteration, "it is of another iteration");
    ensure!(h5::read_attribute::<u64>(&file, "first")? == first as u64, "it begins at another element");
    let names = h5::read_vector::<hdf5::types::VarLenUnicode>(&file, "vectors")?;
    if rank == 0 {
        into.meta = serde_json::from_str(&h5::read_text(&file, "meta")?).context("dataset meta")?;
        into.config_toml = h5::read_text(&file, "config")?;
        into.layout = serde_json::from_str(&h5::read_text(&file, "layout")?).context("dataset layout")?;
        into.vectors = names.iter().map(|name| (name.as_str().to_string(), Vec::new())).collect();
    }
    ensure!(names.len() == into.vectors.len(), "it has other vectors than shard 0");
    for (name, values) in &mut into.vectors {
        values.extend(h5::read_vector::<f32>(&file, name)?);
    }
    Ok(())
}

/// What rank 0 tells the others before the vectors.
#[derive(Default, Serialize, Deserialize)]
struct Header {
    error: Option<String>,
    found: bool,
    path: PathBuf,
    warnings: Vec<String>,
    iteration: u64,
    meta: Value,
    config_toml: String,
    layout: Vec<ParameterEntry>,
    code_version: String,
    vectors: Vec<(String, usize)>,
}

fn share(found: Option<Result<Option<Loaded>>>, comm: &dyn Communicator) -> Result<Option<Loaded>> {
    let mut header = match &found {
        Some(Err(e)) => Header { error: Some(format!("{e:#}")), ..Header::default() },
        Some(Ok(Some(loaded))) => Header {
            found: true,
            path: loaded.path.clone(),
            warnings: loaded.warnings.clone(),
            iteration: loaded.checkpoint.iteration,
            meta: loaded.checkpoint.meta.clone(),
            config_toml: loaded.checkpoint.config_toml.clone(),
            layout: loaded.checkpoint.layout.clone(),
            code_version: loaded.checkpoint.code_version.clone(),
            vectors: loaded.checkpoint.vectors.iter().map(|(name, v)| (name.clone(), v.len())).collect(),
            ..Header::default()
        },
        Some(Ok(None)) | None => Header::default(),
    };
    let mut bytes = serde_json::to_vec(&header)?;
    comm.broadcast_bytes(&mut bytes, 0)?;
    header = serde_json::from_slice(&bytes).context("checkpoint header from rank 0")?;
    if let Some(error) = header.error {
        return Err(anyhow!(error));
    }
    if !header.found {
        return Ok(None);
    }
    let mut mine = match found {
        Some(loaded) => loaded?.map(|l| l.checkpoint.vectors).unwrap_or_default(),
        None => header.vectors.iter().map(|(name, length)| (name.clone(), vec![0f32; *length])).collect(),
    };
    for (_, values) in &mut mine {
        comm.broadcast_f32(values, 0)?;
    }
    let checkpoint = Checkpoint {
        iteration: header.iteration,
        meta: header.meta,
        config_toml: header.config_toml,
        layout: header.layout,
        vectors: mine,
        code_version: header.code_version,
    };
    Ok(Some(Loaded { checkpoint, path: header.path, warnings: header.warnings }))
}
