//! Bytes of a file that a user names, which may be a pipe (`<(sed … experiment.toml)`, `/dev/stdin`) or a device.
//!
//! A pipe gives its bytes once; they are kept, so that a config can be looked at before it is loaded. A device may never
//! end (`/dev/zero`): more than 256 MiB is an error instead of all memory.

use std::{
    fs::{self, File},
    io::{Error, ErrorKind, Read, Result},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// Bytes that are taken from a pipe or device.
const MOST: u64 = 1 << 28;

/// What pipes and devices gave.
static KEPT: Mutex<Vec<(PathBuf, Vec<u8>)>> = Mutex::new(Vec::new());

pub fn read(path: &Path) -> Result<Vec<u8>> {
    let there = fs::metadata(path)?;
    if there.is_file() || there.is_dir() {
        return fs::read(path);
    }
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, bytes)) = kept.iter().find(|(known, _)| known == path) {
        return Ok(bytes.clone());
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MOST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST {
        return Err(Error::new(ErrorKind::InvalidData, format!("it gives more than {} MiB", MOST >> 20)));
    }
    kept.push((path.to_path_buf(), bytes.clone()));
    Ok(bytes)
}

/// As [`read`], of a text.
pub fn read_text(path: &Path) -> Result<String> {
    String::from_utf8(read(path)?).map_err(|e| {
        let at = e.utf8_error().valid_up_to() + 1;
        Error::new(ErrorKind::InvalidData, format!("byte {at} is not UTF-8"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_can_be_read_twice_and_a_device_ends() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let writer = std::thread::spawn({
            let pipe = pipe.clone();
            move || fs::write(pipe, "seed = 1").unwrap()
        });
        assert_eq!(read_text(&pipe).unwrap(), "seed = 1");
        writer.join().unwrap();
        assert_eq!(read_text(&pipe).unwrap(), "seed = 1");
        assert!(read(Path::new("/dev/zero")).unwrap_err().to_string().contains("256 MiB"));
        assert!(read(Path::new("/dev/null")).unwrap().is_empty());
        assert!(read(folder.path()).is_err());
    }
}
