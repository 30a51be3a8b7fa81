//! SHA-256: of files, and of a whole training state.

use std::{fs::File, io::Read, path::Path};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use super::checkpoint::Checkpoint;

/// SHA-256 of a file as lower-case hex, and its length.
pub fn of_file(path: &Path) -> Result<(String, u64)> {
    let read = || -> std::io::Result<(String, u64)> {
        let mut file = File::open(path)?;
        let (mut hash, mut length, mut piece) = (Sha256::new(), 0, vec![0u8; 1 << 20]);
        loop {
            match file.read(&mut piece)? {
                0 => return Ok((hex(hash), length)),
                n => {
                    hash.update(&piece[..n]);
                    length += n as u64;
                }
            }
        }
    };
    read().with_context(|| format!("cannot read {}", path.display()))
}

/// SHA-256 of `bytes` as lower-case hex.
pub fn of_bytes(bytes: &[u8]) -> String {
    hex(Sha256::new_with_prefix(bytes))
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// SHA-256 over iteration, counters and statistics, parameter layout and the bits of all vectors. It does not depend
/// on how many shards the state was written in, nor on the config's text: two runs are equal when this is.
pub fn state_digest(checkpoint: &Checkpoint) -> Result<String> {
    let mut hash = Sha256::new();
    let mut part = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    part(&checkpoint.iteration.to_le_bytes());
    part(&serde_json::to_vec(&checkpoint.meta)?);
    part(&serde_json::to_vec(&checkpoint.layout)?);
    for (name, values) in &checkpoint.vectors {
        part(name.as_bytes());
        part(bytemuck::cast_slice(values));
    }
    Ok(hex(hash))
}
