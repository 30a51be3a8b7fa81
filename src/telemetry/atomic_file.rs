//! Files that appear whole or not at all.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};

use crate::faults;

/// Writes `bytes` to `path` so that a crash leaves the old file or the new one, never a torn one: a temporary file
/// in the same folder, fsync, rename, fsync of the folder. Errors name `path`.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic_with(path, |temporary| Ok(fs::write(temporary, bytes)?))
}

/// As [`write_atomic`], for a file that `write` makes under the temporary name it is given.
pub fn write_atomic_with(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let name = path.file_name().with_context(|| format!("{} names no file", path.display()))?;
    let mut temporary_name = OsString::from(".");
    temporary_name.push(name);
    temporary_name.push(format!(".{}.tmp", std::process::id()));
    let temporary = folder.join(temporary_name);
    let written = write_and_rename(&temporary, path, folder, write);
    if written.is_err() {
        // best effort: the first error is the one worth reporting
        let _ = fs::remove_file(&temporary);
    }
    written.with_context(|| format!("cannot write {}", path.display()))
}

fn write_and_rename(
    temporary: &Path,
    path: &Path,
    folder: &Path,
    write: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    faults::file_point("write", path)?;
    write(temporary)?;
    faults::file_point("fsync", path)?;
    File::open(temporary)?.sync_all()?;
    faults::file_point("rename", path)?;
    fs::rename(temporary, path)?;
    // the rename itself is durable only once the folder is
    faults::file_point("sync_folder", path)?;
    File::open(folder)?.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_the_old_content_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write_atomic(&path, b"old, and longer").unwrap();
        write_atomic(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_error_names_the_file_and_leaves_no_temporary() {
        let folder = tempfile::tempdir().unwrap();
        let error = write_atomic(&folder.path().join("absent/a.json"), b"x").unwrap_err();
        assert!(format!("{error:#}").contains("absent/a.json"), "{error:#}");
        // the target is a folder: the temporary file can be written, the rename fails
        let taken = folder.path().join("taken");
        fs::create_dir(&taken).unwrap();
        fs::write(taken.join("inside"), b"x").unwrap();
        assert!(write_atomic(&taken, b"x").is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
