//! From a config's `reward` to a reward.

use anyhow::Result;

use super::{
    colorfulness::Colorfulness, composition::Composition, miniature_detector::MiniatureDetector,
    miniature_skin_tone::MiniatureSkinTone, parity::Parity, random::RandomReward, Reward,
};
use crate::config::{ClassifierConfig, RewardConfig, TaskConfig};

/// The reward of `task`, number `index` of the config; one that judges groups gets groups of `group` pictures.
pub fn build(task: &TaskConfig, seed: u64, index: u8, group: usize) -> Result<Box<dyn Reward>> {
    Ok(match &task.reward {
        RewardConfig::MiniatureComposition {} => Box::new(Composition::new(&task.name, MiniatureDetector::default())),
        RewardConfig::Parity { classifier } => match classifier {
            ClassifierConfig::MiniatureSkinTone => {
                Box::new(Parity::new(&task.name, MiniatureSkinTone::default(), group)?)
            }
        },
        RewardConfig::Colorfulness {} => Box::new(Colorfulness),
        RewardConfig::Random {} => Box::new(RandomReward::new(seed, index)),
    })
}
