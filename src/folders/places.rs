//! Can a command write where it is told to? Asked before its work, which may take hours.
//!
//! A name that cannot be right is the user's mistake; a place where the operating system lets nobody write is marked
//! with [`CannotWrite`]. What only turns out in the writing (the disk is full) is found there.

use std::{
    ffi::CString,
    fs,
    io::{Error, ErrorKind},
    os::unix::ffi::OsStrExt,
    path::Path,
};

use anyhow::{bail, ensure, Context, Result};

use crate::cannot_write::CannotWrite;

/// What a file system takes as one part of a path, in bytes.
const LONGEST_NAME: usize = 255;

/// Whether `path` is a folder or could be made one: the nearest thing on the way to it that exists is a folder that can be
/// written to.
pub fn can_be_folder(path: &Path) -> Result<()> {
    if path.components().next().is_some_and(|first| first.as_os_str() == "~") {
        bail!("{}: the shell has not put your home in the place of ~; write it without quotes", path.display());
    }
    let long = path.iter().find(|name| name.len() > LONGEST_NAME);
    ensure!(long.is_none(), "{}: a name has at most {LONGEST_NAME} bytes", path.display());
    for place in path.ancestors() {
        let place = if place.as_os_str().is_empty() { Path::new(".") } else { place };
        match fs::metadata(place) {
            Ok(there) if there.is_dir() => return can_write_into(place),
            Ok(_) => bail!("{} is not a folder", place.display()),
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                if let Ok(target) = fs::read_link(place) {
                    bail!("{} is a symbolic link to nothing ({})", place.display(), target.display());
                }
            }
            Err(e) if e.kind() == ErrorKind::PermissionDenied => return Err(e).context(CannotWrite::file(path)),
            Err(e) => bail!("{}: {e}", place.display()),
        }
    }
    Ok(())
}

/// Whether a file can be made at `path`, or the one that is there replaced: its folder exists and can be written to.
pub fn can_be_file(path: &Path) -> Result<()> {
    match fs::metadata(path) {
        Ok(there) if there.is_dir() => bail!("{} is a folder, not a file", path.display()),
        // a device or a pipe: opening it is part of writing
        Ok(there) if !there.is_file() => return Ok(()),
        _ => {}
    }
    ensure!(path.file_name().is_some(), "{} names no file", path.display());
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    can_be_folder(path.parent().unwrap_or(folder))?;
    ensure!(folder.is_dir(), "{}: there is no folder {}", path.display(), folder.display());
    let length = path.file_name().map_or(0, |name| name.len());
    ensure!(length <= LONGEST_NAME, "{}: a name has at most {LONGEST_NAME} bytes", path.display());
    Ok(())
}

/// As the operating system says for this user: permissions, read-only file systems.
fn can_write_into(folder: &Path) -> Result<()> {
    let name = CString::new(folder.as_os_str().as_bytes()).context("a path with a zero byte")?;
    // SAFETY: a string with its end.
    if unsafe { libc::access(name.as_ptr(), libc::W_OK | libc::X_OK) } == 0 {
        return Ok(());
    }
    Err(Error::last_os_error()).context(CannotWrite::new(format!("into {}", folder.display())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{symlink, PermissionsExt};

    use super::*;

    fn refused(result: Result<()>) -> String {
        let error = result.unwrap_err();
        assert!(!CannotWrite::caused(&error), "{error:#}");
        format!("{error:#}")
    }

    #[test]
    fn mistakes_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("file"), b"").unwrap();
        symlink(at("nowhere"), at("link")).unwrap();
        assert!(refused(can_be_folder(&at("file/joint/model"))).ends_with("file is not a folder"));
        assert!(
            refused(can_be_folder(&at("link"))).contains("link is a symbolic link to nothing (")
                && !Path::new("~").exists()
        );
        assert!(refused(can_be_folder(Path::new("~/runs/a"))).contains("the shell has not"));
        assert!(refused(can_be_folder(&at("new").join("x".repeat(256)))).ends_with("at most 255 bytes"));
        assert!(refused(can_be_file(folder.path())).ends_with("is a folder, not a file"));
        assert!(refused(can_be_file(&at("absent/a.json"))).contains("there is no folder"));
        assert!(refused(can_be_file(&at("file/a.json"))).ends_with("file is not a folder"));
        assert!(refused(can_be_file(&at(&"x".repeat(256)))).ends_with("at most 255 bytes"));
        for sound in ["results/joint", "results"] {
            can_be_folder(&at(sound)).unwrap();
            can_be_folder(Path::new(sound)).unwrap();
        }
        for sound in [at("a.json"), at("file"), "a.json".into(), "/dev/full".into()] {
            can_be_file(&sound).unwrap();
        }
    }

    #[test]
    fn where_nobody_may_write_the_operating_system_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let closed = folder.path().join("closed");
        fs::create_dir(&closed).unwrap();
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o555)).unwrap();
        if fs::write(closed.join("x"), b"").is_ok() {
            eprintln!("SKIPPED: root may write anywhere; a row of the corpus has a read-only disk");
            return;
        }
        let error = can_be_folder(&closed.join("x")).unwrap_err();
        assert!(CannotWrite::caused(&error) && format!("{error:#}").contains("closed"), "{error:#}");
    }
}
