//! From a config's `prompts` to a source, and which prompt a sample gets.

use anyhow::Result;

use super::{
    paper, parquet,
    table::{self, Format},
    text, Prompt, PromptSource, Split,
};
use crate::{
    config::PromptConfig,
    miniature,
    random::{Coordinates, Purpose},
};

/// Every rank reads its prompts itself.
pub fn build(config: &PromptConfig) -> Result<Box<dyn PromptSource>> {
    Ok(match config {
        PromptConfig::Compositions { held_out, split_seed } => {
            Box::new(paper::compositions_of(*held_out, *split_seed)?)
        }
        PromptConfig::Occupations { held_out, split_seed } => Box::new(paper::portraits_of(*held_out, *split_seed)?),
        PromptConfig::Text(settings) => Box::new(text::load(settings)?),
        PromptConfig::Tsv(settings) => Box::new(table::load(settings, Format::Tsv)?),
        PromptConfig::Csv(settings) => Box::new(table::load(settings, Format::Csv)?),
        PromptConfig::Parquet(settings) => Box::new(parquet::load(settings)?),
        PromptConfig::MiniatureCompositions {} => Box::new(miniature::prompts::compositions()),
        PromptConfig::MiniatureOccupations {} => Box::new(miniature::prompts::occupations()),
        PromptConfig::MiniaturePlaces {} => Box::new(miniature::prompts::in_places()),
    })
}

/// The prompt of group `group` (samples that share a prompt): uniform over the training split, a function of the
/// numbers alone.
pub fn draw(source: &dyn PromptSource, seed: u64, iteration: u32, task: u8, group: u32) -> Prompt {
    let at = Coordinates { iteration, task, sample: group, ..Coordinates::new(seed, Purpose::Prompt) };
    source.prompt(Split::Train, at.stream().below(source.len(Split::Train)))
}

/// `count` prompts for an evaluation, from the held-out split where there is one: all of them in a seeded order, again
/// from the start where they are too few.
pub fn evaluation_prompts(source: &dyn PromptSource, seed: u64, task: u8, count: usize) -> Vec<Prompt> {
    let split = if source.len(Split::HeldOut) > 0 { Split::HeldOut } else { Split::Train };
    some_prompts(source, split, seed, task, count)
}

/// `count` prompts of a split that has some: all of them in a seeded order, again from the start where they are too few.
pub fn some_prompts(source: &dyn PromptSource, split: Split, seed: u64, task: u8, count: usize) -> Vec<Prompt> {
    let total = source.len(split);
    let mut stream = Coordinates { task, ..Coordinates::new(seed, Purpose::Evaluation) }.stream();
    if total as usize <= 100_000 {
        let order = stream.choose(total as usize, total as usize);
        return (0..count).map(|i| source.prompt(split, order[i % order.len()] as u64)).collect();
    }
    (0..count).map(|_| source.prompt(split, stream.below(total))).collect()
}
