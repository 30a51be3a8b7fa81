//! Shards of encoded pretraining pairs: what the VAE and the text encoder make of pictures and captions, once for all
//! iterations.
//!
//! `pairs-00012.h5`, with n pairs:
//!
//! | dataset | type, shape | meaning |
//! |---|---|---|
//! | `latents` | f16 or f32 `[n, C, H, W]` | z_0: the posterior's mean, scaled |
//! | `text` | f16 or f32 `[n, tokens, width]` | the caption's embedding |
//! | `captions` | text `[n]` | for people |
//! | `empty_text` | f32 `[tokens, width]` | the empty caption's embedding |
//!
//! Each row of `latents` and `text` has a checksum (HDF5's Fletcher-32), which reading it verifies.
//!
//! Attributes: `format`, `encoders` (text: SHA-256 of the networks that made it), `shard`, `shards` (u64), `first` (u64:
//! number of the first pair of the data set that the shard was made of), `source` (text).

use std::{
    cell::RefCell,
    path::{Path, PathBuf},
};

use anyhow::{bail, ensure, Context, Result};
use half::f16;
use serde::{Deserialize, Serialize};

use super::h5;

const FORMAT: &str = "rldiff pairs 2";

/// Pairs of one shard, row by row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EncodedPairs {
    pub latents: Vec<f32>,
    pub text: Vec<f32>,
    pub captions: Vec<String>,
}

/// What all shards of a folder share, and which one it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PairsHeader {
    /// SHA-256 of VAE and text encoder.
    pub encoders: String,
    pub shard: u64,
    pub shards: u64,
    pub first: u64,
    pub source: String,
    pub latent_shape: [usize; 3],
    pub text_shape: [usize; 2],
    /// Embedding of the empty caption.
    pub empty_text: Vec<f32>,
}

/// Where shard number `shard` of a folder lies.
pub fn pairs_path(folder: &Path, shard: u64) -> PathBuf {
    folder.join(format!("pairs-{shard:05}.h5"))
}

/// Writes a shard whole or not at all; `half`: in f16.
pub fn write_pairs(folder: &Path, header: &PairsHeader, pairs: &EncodedPairs, half: bool) -> Result<()> {
    let n = pairs.captions.len();
    let ([c, h, w], [tokens, width]) = (header.latent_shape, header.text_shape);
    h5::write_file(&pairs_path(folder, header.shard), |out| {
        h5::write_text_attribute(out, "format", FORMAT)?;
        h5::write_text_attribute(out, "encoders", &header.encoders)?;
        h5::write_text_attribute(out, "source", &header.source)?;
        h5::write_attribute(out, "shard", header.shard)?;
        h5::write_attribute(out, "shards", header.shards)?;
        h5::write_attribute(out, "first", header.first)?;
        for (name, values, shape) in
            [("latents", &pairs.latents, vec![n, c, h, w]), ("text", &pairs.text, vec![n, tokens, width])]
        {
            match half {
                true => {
                    let values: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
                    h5::write_checked_rows(out, name, &values, &shape)?;
                }
                false => h5::write_checked_rows(out, name, values, &shape)?,
            }
        }
        h5::write_texts(out, "captions", &pairs.captions)?;
        h5::write_array(out, "empty_text", &header.empty_text, &[tokens, width])
    })
}

/// The header of a shard and how many pairs it holds.
fn read_header(path: &Path) -> Result<(PairsHeader, u64)> {
    let read = || -> Result<(PairsHeader, u64)> {
        let file = h5::open(path).context("it is no HDF5 file, or a broken one")?;
        let format = h5::read_text_attribute(&file, "format")?;
        ensure!(format == FORMAT, "it has the format {format:?}, {FORMAT:?} is wanted");
        let [latents, text] = ["latents", "text"].map(|name| file.dataset(name).map(|d| d.shape()));
        let (latents, text) = (latents?, text?);
        let (&[rows, c, h, w], &[texts, tokens, width]) = (latents.as_slice(), text.as_slice()) else {
            bail!(
                "latents {latents:?} and text {text:?} have other dimensions than [n, C, H, W] and [n, tokens, width]"
            )
        };
        ensure!(rows == texts, "{rows} latents and {texts} texts");
        let empty_text = h5::read_vector(&file, "empty_text")?;
        ensure!(empty_text.len() == tokens * width, "empty_text has {} numbers", empty_text.len());
        let header = PairsHeader {
            encoders: h5::read_text_attribute(&file, "encoders")?,
            shard: h5::read_attribute(&file, "shard")?,
            shards: h5::read_attribute(&file, "shards")?,
            first: h5::read_attribute(&file, "first")?,
            source: h5::read_text_attribute(&file, "source")?,
            latent_shape: [c, h, w],
            text_shape: [tokens, width],
            empty_text,
        };
        Ok((header, rows as u64))
    };
    read().with_context(|| path.display().to_string())
}

/// The header of a shard that is there already.
pub fn read_pairs_header(folder: &Path, shard: u64) -> Result<Option<PairsHeader>> {
    let path = pairs_path(folder, shard);
    if !path.exists() {
        return Ok(None);
    }
    read_header(&path).map(|(header, _)| Some(header))
}

/// What the shards of a folder hold, without the pairs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PairIndex {
    /// Of the first shard.
    pub header: PairsHeader,
    /// The number of each shard's first pair, and of all pairs at the end.
    starts: Vec<u64>,
}

impl PairIndex {
    /// # Errors
    /// Names the shard that is missing, broken, or made by other networks than the first one.
    pub fn read(folder: &Path) -> Result<PairIndex> {
        let first = pairs_path(folder, 0);
        ensure!(first.exists(), "{} is missing: rldiff encode makes such shards", first.display());
        let (reference, _) = read_header(&first)?;
        let mut starts = vec![0];
        for number in 0..reference.shards {
            let path = pairs_path(folder, number);
            ensure!(path.exists(), "{} is missing: the folder is to hold {} shards", path.display(), reference.shards);
            let (header, rows) = read_header(&path)?;
            let expected = PairsHeader { shard: number, first: header.first, ..reference.clone() };
            ensure!(header == expected, "{} does not belong to the folder's other shards", path.display());
            starts.push(starts[number as usize] + rows);
        }
        ensure!(starts.last() > Some(&0), "{}: the shards hold no pair", folder.display());
        Ok(PairIndex { header: reference, starts })
    }

    pub fn len(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn shards(&self) -> usize {
        self.starts.len() - 1
    }
}

/// Shards that stay open; a data set has more than a process may keep.
const OPEN: usize = 32;

/// Pairs of a folder by their number.
pub struct PairReader {
    folder: PathBuf,
    pub index: PairIndex,
    /// The last ones used, the newest at the end.
    open: RefCell<Vec<(usize, hdf5::File)>>,
}

impl PairReader {
    pub fn new(folder: &Path, index: PairIndex) -> PairReader {
        PairReader { folder: folder.to_path_buf(), index, open: RefCell::default() }
    }

    /// Latents and text of pair number `index`.
    ///
    /// # Errors
    /// A shard that cannot be read any more; it is named.
    pub fn read(&self, index: u64) -> Result<(Vec<f32>, Vec<f32>)> {
        let starts = &self.index.starts;
        let number = starts.partition_point(|&start| start <= index) - 1;
        let row = (index - starts[number]) as usize;
        let path = pairs_path(&self.folder, number as u64);
        let read = || -> Result<_> {
            let file = self.file(number, &path)?;
            let dataset = file.dataset("latents")?;
            let latent_shape = self.index.header.latent_shape;
            let mut latents = Vec::with_capacity(latent_shape.iter().product());
            for channel in 0..latent_shape[0] {
                latents.extend(dataset.read_slice_2d::<f32, _>((row, channel, .., ..))?);
            }
            let text = file.dataset("text")?.read_slice_2d::<f32, _>((row, .., ..))?;
            Ok((latents, text.into_iter().collect()))
        };
        read().with_context(|| format!("{}: pair {row}", path.display()))
    }

    fn file(&self, number: usize, path: &Path) -> Result<hdf5::File> {
        let mut open = self.open.borrow_mut();
        let entry = match open.iter().position(|(other, _)| *other == number) {
            Some(place) => open.remove(place),
            None => (number, h5::open(path)?),
        };
        if open.len() == OPEN {
            open.remove(0);
        }
        let file = entry.1.clone();
        open.push(entry);
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(shard: u64) -> PairsHeader {
        PairsHeader {
            encoders: "e".into(),
            shard,
            shards: 2,
            first: 3 * shard,
            source: "here".into(),
            latent_shape: [2, 3, 4],
            text_shape: [5, 6],
            empty_text: (0..30).map(|i| i as f32).collect(),
        }
    }

    /// Eighths are exact in f16.
    fn pairs(from: usize, n: usize) -> EncodedPairs {
        let numbers = |length: usize| (from * length..(from + n) * length).map(|i| i as f32 / 8.0).collect();
        EncodedPairs { latents: numbers(24), text: numbers(30), captions: (0..n).map(|i| format!("ä {i}")).collect() }
    }

    #[test]
    fn pairs_come_back_by_their_number() {
        for half in [true, false] {
            let folder = tempfile::tempdir().unwrap();
            write_pairs(folder.path(), &header(0), &pairs(0, 3), half).unwrap();
            write_pairs(folder.path(), &header(1), &pairs(3, 2), half).unwrap();
            let index = PairIndex::read(folder.path()).unwrap();
            assert_eq!((index.len(), index.shards(), &index.header), (5, 2, &header(0)));
            let reader = PairReader::new(folder.path(), index);
            for index in [4, 0, 2, 3, 1] {
                let one = pairs(index as usize, 1);
                assert_eq!(reader.read(index).unwrap(), (one.latents, one.text), "{index}");
            }
            assert_eq!(read_pairs_header(folder.path(), 1).unwrap().unwrap(), header(1));
            assert!(read_pairs_header(folder.path(), 2).unwrap().is_none());
        }
    }

    #[test]
    fn a_damaged_row_is_noticed_when_it_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let alone = PairsHeader { shards: 1, ..header(0) };
        write_pairs(folder.path(), &alone, &pairs(0, 3), false).unwrap();
        let path = pairs_path(folder.path(), 0);
        let sound = std::fs::read(&path).unwrap();
        // a number of the second pair's latents
        let wanted = (30.0f32 / 8.0).to_le_bytes();
        let places = sound.windows(4).enumerate().filter(|(at, bytes)| at % 4 == 0 && **bytes == wanted);
        for (at, _) in places {
            let mut damaged = sound.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, damaged).unwrap();
            let reader = PairReader::new(folder.path(), PairIndex::read(folder.path()).unwrap());
            let of_rows = [0, 1, 2].map(|row| reader.read(row));
            let failed: Vec<String> = of_rows.iter().filter_map(|r| Some(format!("{:#}", r.as_ref().err()?))).collect();
            assert_eq!(failed.len(), 1, "{failed:?}");
            assert!(failed[0].contains("pairs-00000.h5: pair ") && !failed[0].contains('\n'), "{failed:?}");
        }
    }

    /// More shards than stay open.
    #[test]
    fn shards_are_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let shards = OPEN as u64 + 5;
        for shard in 0..shards {
            let header = PairsHeader { shards, first: shard, ..header(shard) };
            write_pairs(folder.path(), &header, &pairs(shard as usize, 1), true).unwrap();
        }
        let reader = PairReader::new(folder.path(), PairIndex::read(folder.path()).unwrap());
        for index in (0..shards).chain((0..shards).rev()) {
            assert_eq!(reader.read(index).unwrap().1, pairs(index as usize, 1).text);
            assert!(reader.open.borrow().len() <= OPEN);
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let failing = |wanted: &str| {
            let e = format!("{:#}", PairIndex::read(folder.path()).expect_err("an error"));
            assert!(e.contains(wanted) && !e.contains('\n'), "{e}");
        };
        failing("pairs-00000.h5 is missing: rldiff encode makes such shards");
        write_pairs(folder.path(), &header(0), &pairs(0, 3), true).unwrap();
        failing("pairs-00001.h5 is missing: the folder is to hold 2 shards");
        let other = PairsHeader { encoders: "f".into(), ..header(1) };
        write_pairs(folder.path(), &other, &pairs(3, 2), true).unwrap();
        failing("pairs-00001.h5 does not belong to the folder's other shards");
        std::fs::write(pairs_path(folder.path(), 1), b"no HDF5").unwrap();
        failing("pairs-00001.h5: it is no HDF5 file, or a broken one");
    }
}
