//! HDF5 files: checkpoints (the whole training state, in one shard per rank) and trajectory shards.
//!
//! Every file appears whole or not at all, and a checkpoint's digests are verified before HDF5 opens a file of it.
//! This is the only folder that names hdf5.

pub mod checkpoint;
pub mod digest;
mod encoded_pairs;
mod h5;
mod inspect;
mod trajectory;

pub use checkpoint::{
    load, load_latest, open, open_latest, save, Checkpoint, CheckpointRef, Head, Keep, Loaded, ParameterEntry,
    SaveReport, Saver, Stored,
};
pub use digest::state_digest;
pub use encoded_pairs::{pairs_path, read_pairs_header, write_pairs, EncodedPairs, PairIndex, PairReader, PairsHeader};
pub use inspect::{digest, find, inspect};
pub use trajectory::{LatentPrecision, Latents, TrajectoryShard};

/// Version of the HDF5 library in use.
pub fn hdf5_version() -> String {
    h5::version()
}

/// Saves a tiny checkpoint in `folder` and loads it again: does HDF5 work here?
pub fn round_trip(folder: &std::path::Path) -> anyhow::Result<()> {
    let (weights, meta) = ([1.0f32, -0.5], serde_json::json!({}));
    let checkpoint =
        CheckpointRef { iteration: 1, meta: &meta, config_toml: "", layout: &[], vectors: vec![("weights", &weights)] };
    save(folder, &checkpoint, Keep { last: 1, every: 0 }, &crate::comm::Local)?;
    let loaded = load_latest(folder, &crate::comm::Local)?;
    let same = loaded.is_some_and(|l| l.checkpoint.vector("weights") == Some(&weights[..]));
    anyhow::ensure!(same, "what was read is not what was written");
    Ok(())
}
