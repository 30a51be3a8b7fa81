//! (Picture, caption) pairs for L_pre, and the loss of one lane on them.

mod encode;
mod loader;
mod shards;

pub use encode::{encode, EncodeSettings};

use std::{cell::RefCell, ops::Range, path::Path};

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

use self::{
    loader::{Loader, Place},
    shards::Shards,
};
use crate::{
    comm::{all_made, Communicator, Local},
    config::{Config, PairData, PretrainMode},
    diffusion::schedule::Schedule,
    miniature::{self, raster::ensure_size, Edition},
    models::pipeline::Pipeline,
    policy::pretraining::{self, Corruption},
    random::{Coordinates, Purpose},
    store::PairReader,
};

/// Pictures of the miniature's pretraining that are drawn from.
const MINIATURE_PAIRS: u64 = 24_000;

/// Which pair a sample gets is a function of (seed, iteration, step, global sample) alone, so every number of ranks and
/// every resumed run sees the same pairs.
pub struct PairSource {
    data: Data,
    batch_per_lane: usize,
    caption_dropout: f64,
    seed: u64,
}

enum Data {
    /// The run has no L_pre.
    None,
    Miniature(Edition),
    Webdataset(RefCell<Loader>),
    Encoded(PairReader),
}

impl PairSource {
    /// A collective call: the ranks share the indexing of shards. `lanes` are this rank's; pictures are made as large as
    /// `pipeline` draws them.
    ///
    /// # Errors
    /// Shards that cannot be used, on all ranks.
    pub fn new(config: &Config, comm: &dyn Communicator, pipeline: &Pipeline, lanes: Range<usize>) -> Result<Self> {
        let pretrain = &config.pretrain;
        let data = match &pretrain.data {
            _ if pretrain.mode == PretrainMode::Off => Data::None,
            PairData::Miniature { edition } => {
                let [height, width] = pipeline.picture_size();
                ensure_size("the miniature's world", height, width).context("pretrain.data")?;
                Data::Miniature(*edition)
            }
            PairData::Webdataset(settings) => {
                let shards = Shards::open(settings, comm).context("pretrain.data")?;
                let size = pipeline.picture_size().map(|side| side as u32);
                let order = loader::Order { slots: slots(config), lanes, batch: pretrain.batch_per_lane };
                let at = Coordinates::new(config.run.seed, Purpose::PretrainPair);
                let loader = Loader::new(shards, settings, size, pretrain.caption_dropout, at, order);
                let loader = all_made(comm, loader).context("pretrain.data")?;
                Data::Webdataset(RefCell::new(loader))
            }
            PairData::Encoded { folder } => {
                let reader = encode::open_for(pipeline, comm, Path::new(folder)).context("pretrain.data")?;
                Data::Encoded(reader)
            }
        };
        Ok(PairSource {
            data,
            batch_per_lane: pretrain.batch_per_lane,
            caption_dropout: pretrain.caption_dropout,
            seed: config.run.seed,
        })
    }

    /// Pictures f32 `[n, 3, H, W]` in \[−1, 1\] and captions (some of them empty) of the lane's samples.
    fn pairs(&self, place: Place) -> Result<(Tensor, Vec<String>)> {
        match &self.data {
            Data::None => anyhow::bail!("pretrain.mode is \"off\": there are no pairs"),
            Data::Miniature(edition) => Ok(self.miniature(*edition, place)),
            Data::Encoded(_) => anyhow::bail!("encoded pairs have no pictures"),
            Data::Webdataset(loader) => {
                let batch = loader.borrow_mut().take(place)?;
                let [height, width] = batch.size.map(i64::from);
                let bytes = Tensor::from_slice(&batch.pixels).view([-1, height, width, 3]);
                Ok((bytes.permute([0, 3, 1, 2]).to_kind(Kind::Float).contiguous() / 127.5 - 1.0, batch.captions))
            }
        }
    }

    fn miniature(&self, edition: Edition, place: Place) -> (Tensor, Vec<String>) {
        let world = miniature::pretrain::PretrainSettings::default().seed;
        let (mut indices, mut captions) = (Vec::new(), Vec::new());
        for at in place.samples(Coordinates::new(self.seed, Purpose::PretrainPair), self.batch_per_lane) {
            let mut stream = at.stream();
            let index = stream.below(MINIATURE_PAIRS);
            let dropped = stream.uniform() < self.caption_dropout;
            indices.push(index);
            captions.push(if dropped { String::new() } else { miniature::scene::draw(edition, world, index).caption });
        }
        (miniature::pretrain::pictures(edition, world, &indices), captions)
    }

    /// z_0 f32 `[n, C, H, W]` and text f32 `[n, tokens, width]` of the lane's samples, as they were encoded.
    fn encoded(&self, reader: &PairReader, place: Place, device: Device) -> Result<(Tensor, Tensor)> {
        let (mut latents, mut texts) = (Vec::new(), Vec::<f32>::new());
        let header = &reader.index.header;
        for at in place.samples(Coordinates::new(self.seed, Purpose::PretrainPair), self.batch_per_lane) {
            let mut stream = at.stream();
            let (z_0, text) = reader.read(stream.below(reader.index.len())).context("pretraining pairs")?;
            latents.extend(z_0);
            let without_caption = stream.uniform() < self.caption_dropout;
            texts.extend(if without_caption { &header.empty_text } else { &text });
        }
        let shape = |sizes: &[usize]| [&[-1], &sizes.iter().map(|&s| s as i64).collect::<Vec<_>>()[..]].concat();
        let latents = Tensor::from_slice(&latents).view(shape(&header.latent_shape).as_slice());
        let texts = Tensor::from_slice(&texts).view(shape(&header.text_shape).as_slice());
        Ok((latents.to_device(device), texts.to_device(device)))
    }

    /// L_pre of `lane`'s pairs, mean over its samples. `slot` tells the steps of an iteration apart.
    pub fn loss(
        &self,
        pipeline: &Pipeline,
        schedule: &Schedule,
        iteration: u64,
        slot: u16,
        lane: usize,
    ) -> Result<Tensor> {
        let place = Place { iteration: iteration as u32, slot, lane };
        let (z_0, text) = match &self.data {
            Data::Encoded(reader) => self.encoded(reader, place, pipeline.device)?,
            _ => {
                let (pictures, captions) = self.pairs(place)?;
                let z_0 = tch::no_grad(|| pipeline.vae.encode_scaled(&pictures.to_device(pipeline.device)));
                (z_0, pipeline.embed(&captions)?)
            }
        };
        let at = Coordinates {
            iteration: iteration as u32,
            step: slot,
            sample: (lane * self.batch_per_lane) as u32,
            ..Coordinates::new(self.seed, Purpose::PretrainNoise)
        };
        let at = Corruption::draw(at, self.batch_per_lane, &z_0.size()[1..], schedule.alpha_bar().len());
        Ok(pretraining::loss(&pipeline.unet, schedule, &z_0, &text, &at))
    }
}

/// Opens a config's pairs and reads the first batch of lane 0; what there is, in words.
///
/// # Errors
/// As a run has them: shards that cannot be used or read, pairs that cannot be decoded.
pub fn try_out(config: &Config, pipeline: &Pipeline) -> Result<String> {
    let source = PairSource::new(config, &Local, pipeline, 0..1)?;
    let place = Place { iteration: 0, slot: slots(config).first().copied().unwrap_or(0), lane: 0 };
    Ok(match &source.data {
        Data::None => "none: pretrain.mode is \"off\"".to_string(),
        Data::Miniature(_) => format!("{MINIATURE_PAIRS} of the miniature's world"),
        Data::Encoded(reader) => {
            let _ = source.encoded(reader, place, Device::Cpu)?;
            format!("{} encoded pairs in {} shards; a first batch was read", reader.index.len(), reader.index.shards())
        }
        Data::Webdataset(loader) => {
            let _ = source.pairs(place)?;
            format!("{} in shards; a first batch was decoded", loader.borrow().pairs())
        }
    })
}

/// The slot of pass `pass` over task number `task` where L_pre is part of every policy gradient.
pub fn combined_slot(config: &Config, task: usize, pass: usize) -> u16 {
    (task * config.method.updates() + pass) as u16
}

/// The slots of an iteration, in the order in which they are used.
fn slots(config: &Config) -> Vec<u16> {
    match config.pretrain.mode {
        PretrainMode::Off => Vec::new(),
        PretrainMode::Separate => (0..config.pretrain.steps as u16).collect(),
        PretrainMode::Combined => config
            .trained_tasks()
            .flat_map(|(task, _)| (0..config.method.updates()).map(move |pass| combined_slot(config, task, pass)))
            .collect(),
    }
}
