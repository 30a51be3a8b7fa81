//! A checkpoint on disk, found and verified, whose vectors are read when they are asked for.
//!
//! The ranks share the work: each hashes every R-th shard, and reads every R-th piece of a vector when the pieces are
//! passed around. Ranks that do not see the checkpoint's folder, or another one in its place, only receive. What a rank
//! finds wrong is the error of all.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use anyhow::{anyhow, bail, ensure, Context, Result};
use hdf5::types::VarLenUnicode;
use serde::{de::DeserializeOwned, Deserialize, Serialize};

use super::{
    list,
    manifest::{self, Manifest},
    Head, FORMAT,
};
use crate::{
    comm::{agree, Communicator},
    store::h5,
};

/// Elements of a vector that are read and passed on at once: 16 MiB.
const PIECE: usize = 1 << 22;

/// A checkpoint with what is to be said about it. The same on all ranks.
#[derive(Debug)]
pub struct Stored {
    pub head: Head,
    pub path: PathBuf,
    /// Newer checkpoints that were damaged, one line each.
    pub warnings: Vec<String>,
    manifest: Manifest,
    /// Ranks that read.
    readers: Vec<usize>,
}

/// Finds the newest sound checkpoint of a folder; None when there is none at all. A collective call.
///
/// # Errors
/// All checkpoints are damaged: each is named with its file and rank.
pub fn open_latest(checkpoints: &Path, comm: &dyn Communicator) -> Result<Option<Stored>> {
    let all = by_rank_0(comm, || list(checkpoints).with_context(|| format!("cannot read {}", checkpoints.display())))?;
    let mut warnings = Vec::new();
    for (_, path) in all.iter().rev() {
        match open_at(path, comm)? {
            Ok(stored) => return Ok(Some(Stored { warnings, ..stored })),
            Err(why) => warnings.push(format!("checkpoint {} cannot be used: {why}", path.display())),
        }
    }
    if !warnings.is_empty() {
        bail!("{}", warnings.join("; "));
    }
    Ok(None)
}

/// The checkpoint in `path`. A collective call.
pub fn open(path: &Path, comm: &dyn Communicator) -> Result<Stored> {
    by_rank_0(comm, || {
        ensure!(path.join(manifest::NAME).is_file(), "{} holds no checkpoint", path.display());
        Ok(())
    })?;
    open_at(path, comm)?.map_err(|why| anyhow!(why))
}

/// What rank 0 finds, or its error, on all ranks.
fn by_rank_0<T: Serialize + DeserializeOwned>(comm: &dyn Communicator, find: impl FnOnce() -> Result<T>) -> Result<T> {
    let mut bytes = Vec::new();
    if comm.rank() == 0 {
        bytes = serde_json::to_vec(&find().map_err(|e| format!("{e:#}")))?;
    }
    comm.broadcast_bytes(&mut bytes, 0)?;
    let found: Result<T, String> = serde_json::from_slice(&bytes).context("what rank 0 found of a checkpoint")?;
    found.map_err(|why| anyhow!(why))
}

/// What is wrong with a shard.
#[derive(Serialize, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
struct Wrong {
    shard: usize,
    why: String,
}

/// Verifies the checkpoint in `folder`; the inner error, the same on all ranks, names the file and the rank whose shard it
/// is. A collective call.
fn open_at(folder: &Path, comm: &dyn Communicator) -> Result<Result<Stored, String>> {
    // what a candidate lacks is no failure of the search; an outer error is one of the ranks' talk
    let manifest: Manifest = match by_rank_0(comm, || Manifest::read(folder)) {
        Ok(manifest) => manifest,
        Err(e) => return Ok(Err(format!("{e:#}"))),
    };
    let sees = comm.rank() == 0 || Manifest::read(folder).is_ok_and(|mine| mine == manifest);
    let seen = comm.all_gather_bytes(&[u8::from(sees)])?;
    let readers: Vec<usize> = (0..comm.size()).filter(|&rank| seen[rank] == [1]).collect();
    let turn = readers.iter().position(|&rank| rank == comm.rank());
    let mine = || (0..manifest.shards.len()).filter(|shard| turn == Some(shard % readers.len()));

    // all digests before HDF5 opens a file
    if let Some(why) = first_wrong(comm, mine(), |shard| manifest.verify(folder, shard))? {
        return Ok(Err(why));
    }
    let head: Head = match by_rank_0(comm, || read_head(folder, &manifest)) {
        Ok(head) => head,
        Err(e) => return Ok(Err(format!("{e:#}"))),
    };
    if let Some(why) = first_wrong(comm, mine(), |shard| check_shard(folder, &manifest, shard, &head))? {
        return Ok(Err(why));
    }
    Ok(Ok(Stored { head, path: folder.to_path_buf(), warnings: Vec::new(), manifest, readers }))
}

/// The first error among those of all ranks, in the order of the shards. A collective call.
fn first_wrong(
    comm: &dyn Communicator,
    mut mine: impl Iterator<Item = usize>,
    check: impl Fn(usize) -> Result<()>,
) -> Result<Option<String>> {
    let wrong = mine.find_map(|shard| Some(Wrong { shard, why: format!("{:#}", check(shard).err()?) }));
    let all = comm.all_gather_bytes(&serde_json::to_vec(&wrong)?)?;
    let all = all.iter().map(|bytes| Ok(serde_json::from_slice(bytes)?)).collect::<Result<Vec<Option<Wrong>>>>()?;
    Ok(all.into_iter().flatten().min().map(|wrong| wrong.why))
}

/// Opens the shard of `rank`; errors name it.
fn with_shard<T>(
    folder: &Path,
    manifest: &Manifest,
    rank: usize,
    act: impl FnOnce(&hdf5::File) -> Result<T>,
) -> Result<T> {
    let path = folder.join(&manifest.shards[rank].file);
    let opened = h5::open(&path).map_err(anyhow::Error::from);
    opened.and_then(|file| act(&file)).with_context(|| format!("{} (rank {rank})", path.display()))
}

fn names(file: &hdf5::File) -> Result<Vec<String>> {
    let names = h5::read_vector::<VarLenUnicode>(file, "vectors")?;
    Ok(names.iter().map(|name| name.as_str().to_string()).collect())
}

/// From the first shard.
fn read_head(folder: &Path, manifest: &Manifest) -> Result<Head> {
    let head = |meta, config_toml, layout, names| Head {
        iteration: manifest.iteration,
        meta,
        config_toml,
        layout,
        names,
        elements: manifest.elements,
        code_version: manifest.code_version.clone(),
    };
    if manifest.shards.is_empty() {
        return Ok(head(serde_json::Value::Null, String::new(), Vec::new(), Vec::new()));
    }
    with_shard(folder, manifest, 0, |file| {
        check_place(file, manifest, 0)?;
        let meta = serde_json::from_str(&h5::read_text(file, "meta")?).context("dataset meta")?;
        let config_toml = h5::read_text(file, "config")?;
        let layout = serde_json::from_str(&h5::read_text(file, "layout")?).context("dataset layout")?;
        Ok(head(meta, config_toml, layout, names(file)?))
    })
}

fn check_place(file: &hdf5::File, manifest: &Manifest, shard: usize) -> Result<()> {
    let format = h5::read_text_attribute(file, "format")?;
    ensure!(format == FORMAT, "format {format:?}, this rldiff reads {FORMAT:?}");
    ensure!(h5::read_attribute::<u64>(file, "iteration")? == manifest.iteration, "it is of another iteration");
    let first = manifest.shards[shard].first as u64;
    ensure!(h5::read_attribute::<u64>(file, "first")? == first, "it begins at another element");
    Ok(())
}

/// Everything of a shard but the values.
fn check_shard(folder: &Path, manifest: &Manifest, shard: usize, head: &Head) -> Result<()> {
    with_shard(folder, manifest, shard, |file| {
        check_place(file, manifest, shard)?;
        ensure!(names(file)?.len() == head.names.len(), "it has other vectors than shard 0");
        let count = manifest.shards[shard].count;
        for name in &head.names {
            let length = h5::length(file, name)?;
            ensure!(length == count, "vector {name} is incomplete: {length} elements of {count}");
        }
        Ok(())
    })
}

/// A part of a vector that lies in one shard.
#[derive(Debug, PartialEq)]
struct Piece {
    shard: usize,
    /// Of the shard's elements.
    range: Range<usize>,
    /// Place of its first element in the vector.
    at: usize,
}

impl Stored {
    fn plan(&self, longest: usize) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for (shard, entry) in self.manifest.shards.iter().enumerate() {
            let starts = (0..entry.count).step_by(longest);
            let piece = |start: usize| Piece {
                shard,
                range: start..(start + longest).min(entry.count),
                at: entry.first + start,
            };
            pieces.extend(starts.map(piece));
        }
        pieces
    }

    /// Hands the values of a vector to `take`, piece by piece in their order, each with the place of its first. The ranks
    /// read as many pieces at once as there are readers. A collective call.
    ///
    /// # Errors
    /// There is no such vector, or a file cannot be read: the same on all ranks.
    pub fn pieces(&self, name: &str, comm: &dyn Communicator, take: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        ensure!(self.head.names.iter().any(|held| held == name), "the checkpoint holds no vector {name}");
        self.pieces_of(name, comm, PIECE, take)
    }

    fn pieces_of(
        &self,
        name: &str,
        comm: &dyn Communicator,
        longest: usize,
        take: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()> {
        let turn = self.readers.iter().position(|&rank| rank == comm.rank());
        let mut received = Vec::new();
        for round in self.plan(longest).chunks(self.readers.len()) {
            let mine = turn.and_then(|turn| round.get(turn)).map(|piece| {
                with_shard(&self.path, &self.manifest, piece.shard, |file| {
                    h5::read_range::<f32>(file, name, piece.range.clone())
                })
            });
            let (mut mine, read) = match mine.transpose() {
                Ok(values) => (values.unwrap_or_default(), Ok(())),
                Err(e) => (Vec::new(), Err(e)),
            };
            agree(comm, read)?;
            for (piece, &reader) in round.iter().zip(&self.readers) {
                let values = if reader == comm.rank() { &mut mine } else { &mut received };
                values.resize(piece.range.len(), 0.0);
                comm.broadcast_f32(values, reader)?;
                take(piece.at, values);
            }
        }
        Ok(())
    }

    /// A vector as a whole. A collective call.
    pub fn vector(&self, name: &str, comm: &dyn Communicator) -> Result<Vec<f32>> {
        let mut values = vec![0f32; self.head.elements];
        self.pieces(name, comm, &mut |at, piece| values[at..at + piece.len()].copy_from_slice(piece))?;
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        comm::Local,
        store::{save, CheckpointRef, Keep},
    };

    #[test]
    fn pieces_are_of_one_shard_each_and_together_the_vector() {
        let folder = tempfile::tempdir().unwrap();
        let (weights, meta) = ((0..37).map(|i| i as f32).collect::<Vec<_>>(), json!({}));
        let vectors = vec![("weights", &weights)];
        let checkpoint = CheckpointRef { iteration: 1, meta: &meta, config_toml: "", layout: &[], vectors };
        save(folder.path(), &checkpoint, Keep { last: 1, every: 0 }, &Local).unwrap();
        let stored = open_latest(folder.path(), &Local).unwrap().unwrap();
        for longest in [1, 5, 36, 37, 1000] {
            let (mut seen, mut most) = (Vec::new(), 0);
            let mut take = |at: usize, piece: &[f32]| {
                assert_eq!(at, seen.len());
                most = most.max(piece.len());
                seen.extend_from_slice(piece);
            };
            stored.pieces_of("weights", &Local, longest, &mut take).unwrap();
            assert_eq!((seen, most), (weights.clone(), longest.min(37)), "pieces of {longest}");
        }
        let error = stored.vector("ema", &Local).unwrap_err().to_string();
        assert!(error.contains("no vector ema"), "{error}");
    }

    #[test]
    fn no_piece_spans_two_shards() {
        let entry =
            |first, count| manifest::ShardEntry { file: String::new(), bytes: 0, sha256: String::new(), first, count };
        let stored = Stored {
            head: Head {
                iteration: 0,
                meta: json!({}),
                config_toml: String::new(),
                layout: Vec::new(),
                names: Vec::new(),
                elements: 9,
                code_version: String::new(),
            },
            path: PathBuf::new(),
            warnings: Vec::new(),
            manifest: Manifest {
                format: String::new(),
                code_version: String::new(),
                iteration: 0,
                elements: 9,
                shards: vec![entry(0, 5), entry(5, 0), entry(5, 4)],
            },
            readers: vec![0],
        };
        let piece = |shard, range, at| Piece { shard, range, at };
        assert_eq!(stored.plan(4), [piece(0, 0..4, 0), piece(0, 4..5, 4), piece(2, 0..4, 5)]);
    }
}
