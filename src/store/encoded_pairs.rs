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
//! Attributes: `format`, `encoders` (text: SHA-256 of the networks that made it), `shard`, `shards` (u64), `first` (u64:
//! number of the first pair of the data set that the shard was made of), `source` (text).

use std::path::{Path, PathBuf};

use anyhow::{bail, ensure, Context, Result};
use half::f16;

use super::h5;

const FORMAT: &str = "rldiff pairs 1";

/// Pairs of one shard, row by row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EncodedPairs {
    pub latents: Vec<f32>,
    pub text: Vec<f32>,
    pub captions: Vec<String>,
}

/// What all shards of a folder share, and which one it is.
#[derive(Clone, Debug, PartialEq)]
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
                    h5::write_array(out, name, &values, &shape)?;
                }
                false => h5::write_array(out, name, values, &shape)?,
            }
        }
        h5::write_texts(out, "captions", &pairs.captions)?;
        h5::write_array(out, "empty_text", &header.empty_text, &[tokens, width])
    })
}

/// An open shard.
struct Shard {
    path: PathBuf,
    file: hdf5::File,
    header: PairsHeader,
    rows: usize,
}

/// Opens a shard and reads its header.
fn open(path: &Path) -> Result<Shard> {
    let read = || -> Result<Shard> {
        let file = hdf5::File::open(path).context("it is no HDF5 file, or a broken one")?;
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
        Ok(Shard { path: path.to_path_buf(), file, header, rows })
    };
    read().with_context(|| path.display().to_string())
}

/// The header of a shard that is there already.
pub fn read_pairs_header(folder: &Path, shard: u64) -> Result<Option<PairsHeader>> {
    let path = pairs_path(folder, shard);
    if !path.exists() {
        return Ok(None);
    }
    open(&path).map(|shard| Some(shard.header))
}

/// All shards of a folder.
pub struct PairReader {
    shards: Vec<Shard>,
    /// The first pair of each shard, and how many there are in all.
    starts: Vec<u64>,
}

impl PairReader {
    /// # Errors
    /// Names the shard that is missing, broken, or made by other networks than the first one.
    pub fn open(folder: &Path) -> Result<PairReader> {
        let first = pairs_path(folder, 0);
        ensure!(first.exists(), "{} is missing: rldiff encode makes such shards", first.display());
        let count = open(&first)?.header.shards;
        let (mut shards, mut starts) = (Vec::new(), vec![0]);
        for number in 0..count {
            let path = pairs_path(folder, number);
            ensure!(path.exists(), "{} is missing: the folder is to hold {count} shards", path.display());
            let shard = open(&path)?;
            let reference = shards.first().map_or(&shard.header, |first: &Shard| &first.header);
            let expected = PairsHeader { shard: number, first: shard.header.first, ..reference.clone() };
            ensure!(shard.header == expected, "{} does not belong to the folder's other shards", path.display());
            starts.push(starts[number as usize] + shard.rows as u64);
            shards.push(shard);
        }
        ensure!(starts[shards.len()] > 0, "{}: the shards hold no pair", folder.display());
        Ok(PairReader { shards, starts })
    }

    pub fn header(&self) -> &PairsHeader {
        &self.shards[0].header
    }

    pub fn len(&self) -> u64 {
        self.starts[self.shards.len()]
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn shards(&self) -> usize {
        self.shards.len()
    }

    /// Latents and text of pair number `index`.
    ///
    /// # Errors
    /// A shard that cannot be read any more; it is named.
    pub fn read(&self, index: u64) -> Result<(Vec<f32>, Vec<f32>)> {
        let number = self.starts.partition_point(|&start| start <= index) - 1;
        let (shard, row) = (&self.shards[number], (index - self.starts[number]) as usize);
        let read = || -> Result<_> {
            let dataset = shard.file.dataset("latents")?;
            let mut latents = Vec::with_capacity(shard.header.latent_shape.iter().product());
            for channel in 0..shard.header.latent_shape[0] {
                latents.extend(dataset.read_slice_2d::<f32, _>((row, channel, .., ..))?);
            }
            let text = shard.file.dataset("text")?.read_slice_2d::<f32, _>((row, .., ..))?;
            Ok((latents, text.into_iter().collect()))
        };
        read().with_context(|| format!("{}: pair {row}", shard.path.display()))
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
            let reader = PairReader::open(folder.path()).unwrap();
            assert_eq!((reader.len(), reader.header()), (5, &header(0)));
            for index in [4, 0, 2, 3, 1] {
                let one = pairs(index as usize, 1);
                assert_eq!(reader.read(index).unwrap(), (one.latents, one.text), "{index}");
            }
            assert_eq!(read_pairs_header(folder.path(), 1).unwrap().unwrap(), header(1));
            assert!(read_pairs_header(folder.path(), 2).unwrap().is_none());
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let failing = |wanted: &str| {
            let e = format!("{:#}", PairReader::open(folder.path()).err().expect("an error"));
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
