//! From a config's `reward` to a reward.

use anyhow::{Context, Result};
use tch::Device;

use super::{
    aesthetic::Aesthetic,
    clip_score,
    colorfulness::Colorfulness,
    command::CommandReward,
    composition::Composition,
    hps,
    image_reward::ImageReward,
    jpeg::JpegSize,
    miniature_detector::MiniatureDetector,
    miniature_likeness::MiniatureLikeness,
    miniature_skin_tone::MiniatureSkinTone,
    parity::Parity,
    pick_score,
    random::RandomReward,
    server::ServerReward,
    skin_tone::SkinTone,
    sum::Sum,
    torchscript::{TorchScriptClassifier, TorchScriptReward},
    unidet::UniDet,
    Reward,
};
use crate::config::{ClassifierConfig, RewardConfig};

/// What a reward may depend on besides its settings.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The task's name.
    pub task: &'a str,
    /// Its number in the config.
    pub index: u8,
    pub seed: u64,
    /// Where networks of rewards compute.
    pub device: Device,
    /// Pictures of a group, for rewards that judge groups.
    pub group: usize,
}

/// # Errors
/// Files that cannot be used, programs that do not start.
pub fn build(reward: &RewardConfig, place: Place) -> Result<Box<dyn Reward>> {
    let Place { task, group, device, .. } = place;
    Ok(match reward {
        RewardConfig::MiniatureComposition {} => Box::new(Composition::new(task, MiniatureDetector::default())),
        RewardConfig::Composition(settings) => Box::new(Composition::new(task, UniDet::load(settings, device)?)),
        RewardConfig::Parity { classifier } => match classifier {
            ClassifierConfig::MiniatureSkinTone {} => Box::new(Parity::new(task, MiniatureSkinTone::default(), group)?),
            ClassifierConfig::SkinTone(settings) => Box::new(Parity::new(task, SkinTone::load(settings)?, group)?),
            ClassifierConfig::Torchscript { path, classes } => {
                Box::new(Parity::new(task, TorchScriptClassifier::load(path, classes)?, group)?)
            }
        },
        RewardConfig::ImageReward(settings) => Box::new(ImageReward::load(settings, device)?),
        RewardConfig::Aesthetic(settings) => Box::new(Aesthetic::load(settings, device)?),
        RewardConfig::PickScore(settings) => Box::new(pick_score::load(settings, device)?),
        RewardConfig::Hps(settings) => Box::new(hps::load(settings, device)?),
        RewardConfig::ClipScore(settings) => Box::new(clip_score::load(settings, device)?),
        RewardConfig::Colorfulness {} => Box::new(Colorfulness),
        RewardConfig::MiniatureLikeness {} => Box::new(MiniatureLikeness::new(task)),
        RewardConfig::JpegCompressibility {} => Box::new(JpegSize::compressibility()),
        RewardConfig::JpegIncompressibility {} => Box::new(JpegSize::incompressibility()),
        RewardConfig::Torchscript { path } => Box::new(TorchScriptReward::load(path)?),
        RewardConfig::Command(settings) => Box::new(CommandReward::start(settings.clone())?),
        RewardConfig::Server(settings) => Box::new(ServerReward::start(settings.clone())?),
        RewardConfig::Sum { normalise, parts } => {
            let mut built = Vec::new();
            for (i, part) in parts.iter().enumerate() {
                let name = part.reward.name()?;
                let reward = build(&part.reward, place).with_context(|| format!("part {i} ({name})"))?;
                // the number tells two parts of the same kind apart
                built.push((part.weight, format!("{i}_{name}"), reward));
            }
            Box::new(Sum::new(built, *normalise))
        }
        RewardConfig::Random {} => Box::new(RandomReward::new(place.seed, place.index)),
    })
}
