//! The mark of errors that came from writing: disk full or over quota, read-only, no permission, an error of the device.
//!
//! The command line has an exit code for them (74). What writes a file marks its errors itself, as context:
//! `.context(CannotWrite::file(path))`; [`crate::comm::agree`] carries the mark to the other ranks.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Error, Result};

/// Context of an error from writing `what`.
#[derive(Clone, Debug)]
pub struct CannotWrite {
    what: String,
}

impl CannotWrite {
    /// `what` in words: "standard output".
    pub fn new(what: impl Into<String>) -> Self {
        CannotWrite { what: what.into() }
    }

    pub fn file(path: &Path) -> Self {
        CannotWrite { what: path.display().to_string() }
    }

    /// Whether `error` came from writing.
    pub fn caused(error: &Error) -> bool {
        error.downcast_ref::<CannotWrite>().is_some() || error.downcast_ref::<OfRanks>().is_some_and(|e| e.of_writing)
    }
}

impl fmt::Display for CannotWrite {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "cannot write {}", self.what)
    }
}

/// An error on which all ranks have agreed.
#[derive(Debug)]
pub struct OfRanks {
    pub text: String,
    /// Whether one of them could not write.
    pub of_writing: bool,
}

impl fmt::Display for OfRanks {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for OfRanks {}

/// Makes a folder and those above it; one that is there stays.
pub fn make_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).context(CannotWrite::file(path))
}

/// Removes a folder that was begun, when dropped: unless it is kept, what is half done does not take the disk's room.
pub struct Unfinished {
    path: Option<PathBuf>,
}

impl Unfinished {
    pub fn at(path: &Path) -> Self {
        Unfinished { path: Some(path.to_path_buf()) }
    }

    pub fn keep(mut self) {
        self.path = None;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // best effort: the error that led here is the one worth reporting
            let _ = fs::remove_dir_all(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn the_mark_is_found_below_other_contexts() {
        let marked = anyhow!("disk full").context(CannotWrite::file(Path::new("a/b"))).context("saving").context("run");
        assert!(CannotWrite::caused(&marked));
        assert_eq!(format!("{marked:#}"), "run: saving: cannot write a/b: disk full");
        assert!(!CannotWrite::caused(&anyhow!("disk full").context("saving")));
        for of_writing in [true, false] {
            let e = Error::new(OfRanks { text: "rank 1: x".into(), of_writing }).context("saving");
            assert_eq!(CannotWrite::caused(&e), of_writing);
        }
    }
}
