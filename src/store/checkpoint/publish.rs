//! Files and folders of a save: the folder that is filled, its name when it is complete, and which others stay.

use std::{fs, path::Path};

use anyhow::{Context, Result};

use super::list;
use crate::faults;

/// Which checkpoints stay when a new one is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// So many of the newest.
    pub last: usize,
    /// And those whose iteration is a multiple of this; 0 for none.
    pub every: u64,
}

pub(super) fn start_empty(partial: &Path) -> Result<()> {
    faults::file_point("create_folder", partial)?;
    if partial.exists() {
        fs::remove_dir_all(partial).with_context(|| format!("cannot clear {}", partial.display()))?;
    }
    fs::create_dir_all(partial).with_context(|| format!("cannot create {}", partial.display()))
}

/// Gives a complete folder its name. One of that name (a run that fell back past it) is replaced.
pub(super) fn publish(partial: &Path, path: &Path) -> Result<()> {
    let replaced = path.with_extension("replaced");
    if path.exists() {
        remove(&replaced)?; // of a save that was interrupted between its last two steps
        fs::rename(path, &replaced).with_context(|| format!("cannot replace {}", path.display()))?;
    }
    faults::file_point("publish", path)?;
    fs::rename(partial, path).with_context(|| format!("cannot rename {}", partial.display()))?;
    faults::file_point("sync_publish", path)?;
    let parent = path.parent().context("a checkpoint without a folder")?;
    fs::File::open(parent)?.sync_all().with_context(|| format!("cannot sync {}", parent.display()))?;
    faults::file_point("published", path)?;
    remove(&replaced)
}

/// Removes what does not stay beside the checkpoint `newest` at `path`: older ones, and later ones, which a run that
/// went back leaves behind and which would outlive what is saved now; and what interrupted saves have left.
pub(super) fn remove_others(path: &Path, newest: u64, keep: Keep) -> Result<()> {
    let checkpoints = path.parent().context("a checkpoint without a folder")?;
    let all = list(checkpoints).with_context(|| format!("cannot read {}", checkpoints.display()))?;
    let (kept, later): (Vec<_>, Vec<_>) = all.iter().partition(|(iteration, _)| *iteration <= newest);
    let old = kept.into_iter().rev().skip(keep.last).filter(|(n, _)| keep.every == 0 || n % keep.every != 0);
    for (_, path) in later.into_iter().chain(old) {
        // under another name first: half of a checkpoint must not look like one
        let removed = path.with_extension("removed");
        remove(&removed)?;
        faults::file_point("remove", path)?;
        fs::rename(path, &removed).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    clear_leftovers(checkpoints)
}

/// Removes what saves have left in `checkpoints` that were interrupted or failed: it takes the room of the next one.
pub fn clear_leftovers(checkpoints: &Path) -> Result<()> {
    if !checkpoints.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(checkpoints).with_context(|| format!("cannot read {}", checkpoints.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "removed" || e == "replaced" || e == "partial") {
            remove(&path)?;
        }
    }
    Ok(())
}

fn remove(folder: &Path) -> Result<()> {
    if folder.exists() {
        faults::file_point("remove", folder)?;
        fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    Ok(())
}
