//! Loading a whole checkpoint into memory.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{open, open_latest, Checkpoint, Stored};
use crate::comm::Communicator;

/// A checkpoint with what is to be said about it.
#[derive(Debug)]
pub struct Loaded {
    pub checkpoint: Checkpoint,
    pub path: PathBuf,
    /// Newer checkpoints that were damaged, one line each.
    pub warnings: Vec<String>,
}

impl Loaded {
    /// With all vectors of what was found. A collective call.
    pub fn of(stored: Stored, comm: &dyn Communicator) -> Result<Self> {
        let named = |name: &String| Ok((name.clone(), stored.vector(name, comm)?));
        let vectors = stored.head.names.iter().map(named).collect::<Result<_>>()?;
        let Stored { head, path, warnings, .. } = stored;
        Ok(Loaded { checkpoint: Checkpoint { head, vectors }, path, warnings })
    }
}

/// As [`open_latest`], with all vectors.
pub fn load_latest(checkpoints: &Path, comm: &dyn Communicator) -> Result<Option<Loaded>> {
    open_latest(checkpoints, comm)?.map(|stored| Loaded::of(stored, comm)).transpose()
}

/// As [`open`], with all vectors.
pub fn load(path: &Path, comm: &dyn Communicator) -> Result<Loaded> {
    Loaded::of(open(path, comm)?, comm)
}
