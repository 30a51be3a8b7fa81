//! Files and folders of a save: the folder that is filled, its name when it is complete, and which others stay.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use super::{list, manifest};
use crate::{cannot_write::make_folder, faults};

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
    remove_files(partial)?;
    make_folder(partial)
}

/// Gives a complete folder its name. One of that name (a run that fell back past it) is replaced.
pub(super) fn publish(partial: &Path, path: &Path) -> Result<()> {
    let mut replaced = path.with_extension("replaced");
    if path.exists() {
        remove(&replaced)?; // of a save that was interrupted between its last two steps
        replaced = free(path, "replaced");
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
    for (_, path) in later.into_iter().chain(old).filter(|(_, path)| own_files(path).is_ok_and(|own| !own.is_empty())) {
        // under another name first: half of a checkpoint must not look like one
        remove(&path.with_extension("removed"))?;
        let removed = free(path, "removed");
        faults::file_point("remove", path)?;
        fs::rename(path, &removed).with_context(|| format!("cannot remove {}", path.display()))?;
        remove(&removed)?;
        if removed.exists() {
            log::warn!("{}: what is in it was not written by a save and stays", removed.display());
        }
    }
    clear_leftovers(checkpoints)
}

/// The path of `checkpoint` with an extension that says what became of it; a number more where something stays there.
fn free(checkpoint: &Path, what: &str) -> PathBuf {
    let numbered = (2..).map(|n| checkpoint.with_extension(format!("{what}-{n}")));
    let mut all = std::iter::once(checkpoint.with_extension(what)).chain(numbered);
    all.find(|path| !path.exists()).expect("some number is free")
}

/// Removes what saves have left in `checkpoints` that were interrupted or failed: it takes the room of the next one.
pub fn clear_leftovers(checkpoints: &Path) -> Result<()> {
    if !checkpoints.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(checkpoints).with_context(|| format!("cannot read {}", checkpoints.display()))? {
        let path = entry?.path();
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let is_iteration = stem.strip_prefix("iteration-").is_some_and(|n| n.parse::<u64>().is_ok());
        let of_a_save = |e: &str| e == "partial" || e.starts_with("removed") || e.starts_with("replaced");
        if is_iteration && path.extension().is_some_and(|e| of_a_save(&e.to_string_lossy())) {
            remove(&path)?;
        }
    }
    Ok(())
}

/// The files in a checkpoint's folder that a save writes.
fn own_files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let is_own = |name: &str| {
        // one that was being written is called `.NAME.HOST-PID.tmp`
        let name =
            name.strip_prefix('.').and_then(|name| name.strip_suffix(".tmp")?.rsplit_once('.')).map_or(name, |n| n.0);
        name == manifest::NAME || name.starts_with("shard-") && name.ends_with(".h5")
    };
    let mut own = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if is_own(&entry.file_name().to_string_lossy()) && !entry.file_type()?.is_dir() {
            own.push(entry.path());
        }
    }
    Ok(own)
}

fn remove_files(folder: &Path) -> Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    let cleared = own_files(folder).and_then(|own| own.iter().try_for_each(fs::remove_file));
    cleared.with_context(|| format!("cannot clear {}", folder.display()))
}

/// Removes what a save has written in `folder`, and the folder unless something else is in it.
fn remove(folder: &Path) -> Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    faults::file_point("remove", folder)?;
    remove_files(folder)?;
    match fs::remove_dir(folder) {
        Err(e) if e.kind() != io::ErrorKind::DirectoryNotEmpty => {
            Err(e).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}
