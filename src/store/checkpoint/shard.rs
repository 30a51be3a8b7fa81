//! What one rank contributes to a checkpoint: a copy of its range of every vector, and the file it goes to.

use std::{ops::Range, path::Path};

use anyhow::{ensure, Result};

use super::{manifest::ShardEntry, CheckpointRef, Values, FORMAT};
use crate::{
    faults,
    store::{digest, h5},
};

/// Copied at one moment, so that the training may go on while it is written.
pub(super) struct Share {
    pub iteration: u64,
    rank: usize,
    /// Of every vector of the whole checkpoint.
    pub elements: usize,
    range: Range<usize>,
    vectors: Vec<(String, Vec<f32>)>,
    /// Rank 0 only.
    texts: Option<Texts>,
}

struct Texts {
    meta: String,
    config: String,
    layout: String,
}

impl Share {
    /// # Errors
    /// The vectors have different lengths.
    pub fn copy(checkpoint: &CheckpointRef<impl Values + ?Sized>, rank: usize, size: usize) -> Result<Self> {
        let elements = checkpoint.vectors.first().map_or(0, |(_, values)| values.length());
        for (name, values) in &checkpoint.vectors {
            let length = values.length();
            ensure!(length == elements, "vector {name} has {length} elements, the first has {elements}");
        }
        let range = elements * rank / size..elements * (rank + 1) / size;
        let texts = || -> Result<Texts> {
            Ok(Texts {
                meta: serde_json::to_string(checkpoint.meta)?,
                config: checkpoint.config_toml.to_string(),
                layout: serde_json::to_string(checkpoint.layout)?,
            })
        };
        Ok(Share {
            iteration: checkpoint.iteration,
            rank,
            elements,
            vectors: checkpoint.vectors.iter().map(|(name, v)| (name.to_string(), v.copy(range.clone()))).collect(),
            texts: if rank == 0 { Some(texts()?) } else { None },
            range,
        })
    }

    /// Writes the shard into `folder`, durable when this returns.
    pub fn write(&self, folder: &Path) -> Result<ShardEntry> {
        let file = format!("shard-{:03}.h5", self.rank);
        let path = folder.join(&file);
        h5::write_file(&path, |out| {
            h5::write_text_attribute(out, "format", FORMAT)?;
            h5::write_attribute(out, "iteration", self.iteration)?;
            h5::write_attribute(out, "first", self.range.start as u64)?;
            // the order of the vectors: HDF5 lists datasets by name
            let names: Vec<String> = self.vectors.iter().map(|(name, _)| name.clone()).collect();
            h5::write_texts(out, "vectors", &names)?;
            for (name, values) in &self.vectors {
                h5::write_array(out, name, values, &[values.len()])?;
            }
            if let Some(texts) = &self.texts {
                h5::write_text(out, "meta", &texts.meta)?;
                h5::write_text(out, "config", &texts.config)?;
                h5::write_text(out, "layout", &texts.layout)?;
            }
            Ok(())
        })?;
        faults::file_point("digest", &path)?;
        let (sha256, bytes) = digest::of_file(&path)?;
        Ok(ShardEntry { file, bytes, sha256, first: self.range.start, count: self.range.len() })
    }
}
