//! A folder that is written at once and appears whole or not at all.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{bail, Context, Result};

use super::{contents::first_entry, lock::FolderLock, places::can_be_folder};
use crate::cannot_write::CannotWrite;

/// A folder on its way: filled as `NAME.partial`, which is removed where it is dropped before [`NewFolder::finish`].
pub struct NewFolder {
    folder: PathBuf,
    partial: PathBuf,
    lock: Option<FolderLock>,
    is_finished: bool,
}

impl NewFolder {
    /// Nothing may be at `folder` yet, or an empty folder. Another process that makes the same one is refused.
    ///
    /// # Errors
    /// What is in the way. `NAME.partial` is, too, where nothing says that it is left from a process that was killed.
    pub fn begin(folder: &Path, command: &str) -> Result<Self> {
        can_be_new(folder)?;
        let partial = partial_of(folder)?;
        // what was killed has left its lock in it
        if partial.exists() && !partial.join(super::contents::LOCK).is_file() {
            bail!("{} is in the way: remove it, or give another --out", partial.display());
        }
        let lock = FolderLock::take(&partial, command)?;
        lock.stay();
        empty(&partial)?;
        Ok(NewFolder { folder: folder.to_path_buf(), partial, lock: Some(lock), is_finished: false })
    }

    /// Where to put the files.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Gives the folder its name.
    pub fn finish(mut self) -> Result<()> {
        let lock = self.lock.take().context("a folder that is finished twice")?;
        // fails where there is something by now
        let renamed = lock.rename(&self.folder);
        if renamed.is_err() {
            self.lock = Some(lock);
        }
        renamed
            .with_context(|| format!("cannot rename {}", self.partial.display()))
            .context(CannotWrite::file(&self.folder))?;
        self.is_finished = true;
        Ok(())
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        if !self.is_finished {
            // best effort: the error that led here is the one worth reporting
            let _ = empty(&self.partial);
            drop(self.lock.take());
            let _ = fs::remove_dir(&self.partial);
        }
    }
}

/// # Errors
/// Something is at `folder`, or on the way to it.
pub fn can_be_new(folder: &Path) -> Result<()> {
    if fs::symlink_metadata(folder).is_ok_and(|there| !there.is_dir()) || first_entry(folder)?.is_some() {
        bail!("{} exists already: give another --out", folder.display());
    }
    can_be_folder(folder)
}

fn partial_of(folder: &Path) -> Result<PathBuf> {
    let mut name = folder.file_name().with_context(|| format!("{} names no folder", folder.display()))?.to_owned();
    name.push(".partial");
    Ok(folder.with_file_name(name))
}

/// Removes all but the lock.
fn empty(folder: &Path) -> Result<()> {
    let clear = || -> std::io::Result<()> {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_name() == super::contents::LOCK {
                continue;
            }
            match entry.file_type()?.is_dir() {
                true => fs::remove_dir_all(entry.path())?,
                false => fs::remove_file(entry.path())?,
            }
        }
        Ok(())
    };
    clear().context("cannot clear it").context(CannotWrite::file(folder))
}

/// Gives `new` the place of `old`, a folder inside one that this process holds. Files of `old` that `new` does not have are
/// in `new` then; at any moment there is one of the two, whole, or none.
pub fn replace_folder(new: &Path, old: &Path) -> Result<()> {
    let replaced = old.with_extension("replaced");
    let replace = || -> io::Result<()> {
        if old.exists() {
            // of one that was interrupted
            carry_over(&replaced, old)?;
            fs::rename(old, &replaced)?;
        }
        fs::rename(new, old)?;
        carry_over(&replaced, old)
    };
    replace().context("cannot replace it").context(CannotWrite::file(old))
}

/// Moves what only `from` has to `to`, and removes the rest of it.
fn carry_over(from: &Path, to: &Path) -> io::Result<()> {
    if !from.exists() {
        return Ok(());
    }
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (there, here) = (entry.path(), to.join(entry.file_name()));
        match (entry.file_type()?.is_dir(), fs::symlink_metadata(&here).is_ok()) {
            (true, _) => carry_over(&there, &here)?,
            (false, true) => fs::remove_file(&there)?,
            (false, false) => fs::rename(&there, &here)?,
        }
    }
    fs::remove_dir(from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_appears_whole_and_takes_nothing_elses_place() {
        let outer = tempfile::tempdir().unwrap();
        let at = |name: &str| outer.path().join(name);
        // given up
        let begun = NewFolder::begin(&at("a/model"), "export").unwrap();
        fs::write(begun.path().join("x"), b"1").unwrap();
        let error = NewFolder::begin(&at("a/model"), "export").err().unwrap().to_string();
        assert!(error.contains("is in use: rldiff export, process"), "{error}");
        drop(begun);
        assert!(!at("a/model").exists() && !at("a/model.partial").exists());
        // a name with a dot keeps it
        let begun = NewFolder::begin(&at("sd-1.5"), "export").unwrap();
        fs::write(begun.path().join("x"), b"1").unwrap();
        begun.finish().unwrap();
        assert_eq!(fs::read_dir(at("sd-1.5")).unwrap().count(), 1);
        // somebody's folders and files
        fs::create_dir(at("b.partial")).unwrap();
        fs::write(at("b.partial/mine"), b"1").unwrap();
        for name in ["b", "sd-1.5"] {
            assert!(NewFolder::begin(&at(name), "export").is_err(), "{name}");
        }
        assert!(at("b.partial/mine").exists() && at("sd-1.5/x").exists());
        fs::create_dir(at("empty")).unwrap();
        NewFolder::begin(&at("empty"), "export").unwrap().finish().unwrap();
    }

    #[test]
    fn what_a_killed_process_left_is_cleared() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("model");
        let begun = NewFolder::begin(&folder, "export").unwrap();
        fs::write(begun.path().join("half"), b"1").unwrap();
        let lock = begun.path().join(super::super::contents::LOCK);
        let bytes = fs::read(&lock).unwrap();
        std::mem::forget(begun);
        // as of a process that is gone
        let mut owner: super::super::Owner = serde_json::from_slice(&bytes).unwrap();
        owner.started += 1;
        fs::write(&lock, serde_json::to_vec(&owner).unwrap()).unwrap();
        let again = NewFolder::begin(&folder, "export").unwrap();
        assert!(!again.path().join("half").exists());
        again.finish().unwrap();
        assert!(folder.is_dir());
    }

    #[test]
    fn files_are_replaced_and_others_stay() {
        let outer = tempfile::tempdir().unwrap();
        let (new, old) = (outer.path().join("new"), outer.path().join("old"));
        fs::create_dir_all(new.join("unet")).unwrap();
        fs::create_dir_all(old.join("unet")).unwrap();
        fs::write(new.join("unet/w"), b"new").unwrap();
        fs::write(old.join("unet/w"), b"old").unwrap();
        fs::write(old.join("unet/mine"), b"mine").unwrap();
        replace_folder(&new, &old).unwrap();
        assert_eq!(fs::read(old.join("unet/w")).unwrap(), b"new");
        assert_eq!(fs::read(old.join("unet/mine")).unwrap(), b"mine");
        assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 1);
    }
}
