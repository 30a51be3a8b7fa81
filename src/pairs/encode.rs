//! Pretraining pairs through the frozen networks, once instead of in every iteration: webdataset shards → HDF5 shards of
//! latents and text embeddings ([`crate::store`]).

use std::{
    path::Path,
    thread::{self, ScopedJoinHandle},
};

use anyhow::{ensure, Context, Result};
use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use super::{
    loader::{Decoder, Pair},
    shards::Shards,
};
use crate::{
    comm::{agree, all_made, Communicator},
    config::WebdatasetPairs,
    faults,
    models::{pipeline::Pipeline, weights::tensor_bytes},
    signals,
    store::{self, EncodedPairs, PairIndex, PairReader, PairsHeader},
};

/// Pairs that go through the networks together.
const BATCH: usize = 16;

/// How shards are made.
#[derive(Clone, Copy, Debug)]
pub struct EncodeSettings {
    /// Pairs of the data set that a shard is made of.
    pub per_shard: usize,
    /// Numbers are stored in f16 instead of f32.
    pub half: bool,
}

/// Encodes all pairs into `out`, shard by shard, each whole or not at all; a shard that is there already, made by the same
/// networks of the same part of the data, is left as it is. Pairs that cannot be used are logged and left out. A
/// collective call: the ranks share the shards. Gives the number of shards made by all ranks.
///
/// # Errors
/// Shards of pairs that cannot be used, or shards in `out` that were made of something else; [`signals::Interrupted`] on
/// all ranks, with all whole shards kept.
pub fn encode(
    pipeline: &Pipeline,
    pairs: &WebdatasetPairs,
    out: &Path,
    settings: EncodeSettings,
    comm: &dyn Communicator,
) -> Result<u64> {
    let shards = Shards::open(pairs, comm)?;
    let [channels, height, width] = pipeline.latent_shape();
    let size = pipeline.picture_size().map(|side| side as u32);
    let decoder = all_made(comm, Decoder::new(size, &pairs.drop_words))?;
    let encoders = encoders_digest(pipeline, comm)?;
    let empty = pipeline.embed(&[""])?;
    let per_shard = settings.per_shard as u64;
    let header = |shard: u64| -> Result<PairsHeader> {
        Ok(PairsHeader {
            encoders: encoders.clone(),
            shard,
            shards: shards.len().div_ceil(per_shard),
            first: shard * per_shard,
            source: pairs.folder.clone(),
            latent_shape: [channels as usize, height as usize, width as usize],
            text_shape: [empty.size()[1] as usize, empty.size()[2] as usize],
            empty_text: Vec::try_from(empty.view([-1]))?,
        })
    };
    let (mut made, last) = (0u64, shards.len().div_ceil(per_shard));
    let mut work = || -> Result<()> {
        for shard in (comm.rank() as u64..last).step_by(comm.size()) {
            let header = header(shard)?;
            if let Some(there) = store::read_pairs_header(out, shard)? {
                let path = store::pairs_path(out, shard);
                ensure!(
                    there == header,
                    "{} is there and was made of something else: use another folder",
                    path.display()
                );
                continue;
            }
            let range = header.first..shards.len().min(header.first + per_shard);
            let total = range.end - range.start;
            let encoded = encode_range(pipeline, &shards, &decoder, pairs.threads, range)?;
            log::info!("shard {shard} of {last}: {} of {total} pairs", encoded.captions.len());
            store::write_pairs(out, &header, &encoded, settings.half)?;
            made += 1;
        }
        Ok(())
    };
    agree(comm, work())?;
    let of_ranks = comm.all_gather_bytes(&made.to_le_bytes())?;
    Ok(of_ranks.iter().filter_map(|bytes| Some(u64::from_le_bytes(*bytes.first_chunk()?))).sum())
}

fn encode_range(
    pipeline: &Pipeline,
    shards: &Shards,
    decoder: &Decoder,
    threads: usize,
    range: std::ops::Range<u64>,
) -> Result<EncodedPairs> {
    let _no_grad = tch::no_grad_guard();
    let mut all = EncodedPairs::default();
    let [height, width] = decoder.size.map(i64::from);
    let indices: Vec<u64> = range.collect();
    for batch in indices.chunks(BATCH) {
        faults::point("encode");
        signals::check()?;
        let pairs = decode(shards, decoder, threads, batch)?;
        if pairs.is_empty() {
            continue;
        }
        let pixels: Vec<u8> = pairs.iter().flat_map(|pair| pair.pixels.iter().copied()).collect();
        let pixels = Tensor::from_slice(&pixels).view([-1, height, width, 3]).permute([0, 3, 1, 2]);
        let pictures = (pixels.to_kind(Kind::Float).contiguous() / 127.5 - 1.0).to_device(pipeline.device);
        let captions: Vec<String> = pairs.into_iter().map(|pair| pair.caption).collect();
        all.latents.extend(Vec::<f32>::try_from(pipeline.vae.encode_scaled(&pictures).contiguous().view([-1]))?);
        all.text.extend(Vec::<f32>::try_from(pipeline.embed(&captions)?.contiguous().view([-1]))?);
        all.captions.extend(captions);
    }
    Ok(all)
}

/// The pairs of a batch that can be used, in order, decoded by several threads.
fn decode(shards: &Shards, decoder: &Decoder, threads: usize, batch: &[u64]) -> Result<Vec<Pair>> {
    let one = |&index: &u64| -> Result<Option<Pair>> {
        let (image, caption) = shards.read(index)?;
        let pair = decoder.pair(&image, caption);
        Ok(pair.unwrap_or_else(|e| {
            log::warn!("{}: {e:#}; left out", shards.describe(index));
            None
        }))
    };
    let parts = thread::scope(|scope| -> Vec<Result<Vec<Option<Pair>>>> {
        let part = |indices: &[u64]| indices.iter().map(one).collect();
        let start = |indices| thread::Builder::new().spawn_scoped(scope, move || part(indices)).map_err(|_| indices);
        let running: Vec<_> = batch.chunks(batch.len().div_ceil(threads.max(1))).map(start).collect();
        let finish = |started: Result<ScopedJoinHandle<_>, &[u64]>| match started {
            Ok(thread) => thread.join().expect("a panic ends the run by itself"),
            // where there cannot be another thread, this one does it
            Err(indices) => part(indices),
        };
        running.into_iter().map(finish).collect()
    });
    let mut pairs = Vec::new();
    for part in parts {
        pairs.extend(part?.into_iter().flatten());
    }
    Ok(pairs)
}

/// The shards of `folder`, which the networks of `pipeline` must have made. A collective call: rank 0 reads their headers.
pub(super) fn open_for(pipeline: &Pipeline, comm: &dyn Communicator, folder: &Path) -> Result<PairReader> {
    let encoders = encoders_digest(pipeline, comm)?;
    let read = || -> Result<Vec<u8>> {
        let index = PairIndex::read(folder)?;
        ensure!(
            index.header.encoders == encoders,
            "{} was encoded by another VAE or text encoder than the run's model has",
            folder.display()
        );
        let latents = pipeline.latent_shape().map(|side| side as usize);
        ensure!(index.header.latent_shape == latents, "{}: latents {:?}", folder.display(), index.header.latent_shape);
        log::info!("{}: {} encoded pairs in {} shards", folder.display(), index.len(), index.shards());
        Ok(serde_json::to_vec(&index)?)
    };
    let mine = if comm.rank() == 0 { read() } else { Ok(Vec::new()) };
    let text = mine.as_ref().err().map(|e| format!("{e:#}")).unwrap_or_default();
    let mut error = text.into_bytes();
    comm.broadcast_bytes(&mut error, 0)?;
    ensure!(error.is_empty(), "{}", String::from_utf8_lossy(&error));
    let mut bytes = mine?;
    comm.broadcast_bytes(&mut bytes, 0)?;
    Ok(PairReader::new(folder, serde_json::from_slice(&bytes).context("index of rank 0")?))
}

/// SHA-256 of the weights of VAE and text encoder, computed by rank 0.
fn encoders_digest(pipeline: &Pipeline, comm: &dyn Communicator) -> Result<String> {
    let digest = || -> Result<String> {
        let mut hash = Sha256::new();
        for entry in pipeline.vae_parameters.entries.iter().chain(&pipeline.text_parameters.entries) {
            hash.update(entry.name.as_bytes());
            hash.update(tensor_bytes(&entry.exact().to_kind(Kind::Float))?);
        }
        Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
    };
    let mut mine =
        if comm.rank() == 0 { digest().context("digest of the encoders")? } else { String::new() }.into_bytes();
    comm.broadcast_bytes(&mut mine, 0)?;
    Ok(String::from_utf8(mine)?)
}
