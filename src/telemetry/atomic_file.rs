//! Files that appear whole or not at all.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result};

use crate::{cannot_write::CannotWrite, faults, host};

/// Writes `bytes` to `path` so that a crash leaves the old file or the new one, never a torn one: a temporary file
/// in the same folder, fsync, rename, fsync of the folder. What cannot be replaced by a file (`/dev/stdout`, a pipe with
/// a name) is written to as it is. Errors name `path`.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    if is_stream(path) {
        let written = OpenOptions::new().append(true).open(path).and_then(|mut stream| stream.write_all(bytes));
        return written.context(CannotWrite::file(path));
    }
    write_atomic_with(path, |temporary| Ok(fs::write(temporary, bytes)?))
}

/// Whether `path` names a device, a pipe or a socket, or a stream of this process.
fn is_stream(path: &Path) -> bool {
    let special = fs::metadata(path).is_ok_and(|there| !there.is_file() && !there.is_dir());
    special
        || ["/dev/std", "/dev/fd/", "/proc/"]
            .iter()
            .any(|start| path.as_os_str().as_bytes().starts_with(start.as_bytes()))
}

/// Bytes of a name of which the name of its temporary file is made: both fit the 255 bytes that file systems allow.
const NAME_IN_TEMPORARY: usize = 200;

/// As [`write_atomic`], for a file that `write` makes under the temporary name it is given.
pub fn write_atomic_with(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let name = path.file_name().with_context(|| format!("{} names no file", path.display()))?;
    let mut temporary_name = OsString::from(".");
    temporary_name.push(OsStr::from_bytes(&name.as_bytes()[..name.len().min(NAME_IN_TEMPORARY)]));
    temporary_name.push(format!(".{}.tmp", host::process_mark()));
    let temporary = folder.join(temporary_name);
    let written = write_and_rename(&temporary, path, folder, write);
    if written.is_err() {
        // best effort: the first error is the one worth reporting
        let _ = fs::remove_file(&temporary);
    }
    written.context(CannotWrite::file(path))
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
    fn a_device_or_pipe_is_written_to_and_stays_what_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            move || fs::read(pipe).unwrap()
        });
        write_atomic(&pipe, b"through").unwrap();
        assert_eq!(reader.join().unwrap(), b"through");
        let error = write_atomic(Path::new("/dev/full"), b"x").unwrap_err();
        assert!(
            CannotWrite::caused(&error) && format!("{error:#}").starts_with("cannot write /dev/full: "),
            "{error:#}"
        );
        assert!(is_stream(&pipe) && is_stream(Path::new("/dev/full")));
    }

    /// Another host may have a process of the same number.
    #[test]
    fn the_temporary_name_carries_the_host() {
        let folder = tempfile::tempdir().unwrap();
        let mut seen = String::new();
        write_atomic_with(&folder.path().join("a.json"), |temporary| {
            seen = temporary.file_name().unwrap().to_str().unwrap().to_string();
            Ok(fs::write(temporary, "x")?)
        })
        .unwrap();
        assert_eq!(seen, format!(".a.json.{}.tmp", host::process_mark()));
        // leftovers are known by what is left without the end and the mark
        assert_eq!(seen.strip_suffix(".tmp").unwrap().rsplit_once('.').unwrap().0, ".a.json");
    }

    #[test]
    fn the_longest_name_is_a_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("é".repeat(127));
        write_atomic(&path, b"x").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"x");
        assert!(CannotWrite::caused(&write_atomic(&folder.path().join("é".repeat(128)), b"x").unwrap_err()));
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
