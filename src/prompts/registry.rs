//! From a config's `prompts` to a source, and which prompt a sample gets.

use anyhow::{ensure, Context, Result};

use super::{
    listed::Listed,
    paper, parquet,
    reading::Reading,
    shared_texts::read_once_per_host,
    table::{self, Format},
    text, Prompt, PromptSource, Split,
};
use crate::{
    comm::{all_made, Communicator},
    config::PromptConfig,
    miniature,
    random::{Coordinates, Purpose},
};

/// A collective call: lists are read once per host and shared by its ranks. Errors are the same on all ranks.
pub fn build(config: &PromptConfig, comm: &dyn Communicator) -> Result<Box<dyn PromptSource>> {
    let listed = |path: &str, held_out: usize, split_seed: u64, read: &dyn Fn() -> Result<Reading>| {
        let texts = read_once_per_host(comm, || {
            let (texts, mut counts) = read()?.end();
            ensure!(!texts.is_empty(), "there are no prompts: {counts}");
            counts.held_out = held_out as u64;
            // rank 0 is the first of its host
            if comm.rank() == 0 {
                log::info!("{counts}");
            }
            Ok(texts)
        })?;
        let listed = Listed::new(texts, held_out, split_seed).with_context(|| path.to_string())?;
        Ok(Box::new(listed) as Box<dyn PromptSource>)
    };
    match config {
        PromptConfig::Text(s) => listed(&s.path, s.held_out, s.split_seed, &|| text::load(s)),
        PromptConfig::Tsv(s) => listed(&s.path, s.held_out, s.split_seed, &|| table::load(s, Format::Tsv)),
        PromptConfig::Csv(s) => listed(&s.path, s.held_out, s.split_seed, &|| table::load(s, Format::Csv)),
        PromptConfig::Parquet(s) => listed(&s.path, s.held_out, s.split_seed, &|| parquet::load(s)),
        generated => all_made(comm, generate(generated)),
    }
}

/// Sources that need no file.
fn generate(config: &PromptConfig) -> Result<Box<dyn PromptSource>> {
    Ok(match config {
        PromptConfig::Compositions { held_out, split_seed } => {
            Box::new(paper::compositions_of(*held_out, *split_seed)?)
        }
        PromptConfig::Occupations { held_out, split_seed } => Box::new(paper::portraits_of(*held_out, *split_seed)?),
        PromptConfig::MiniatureCompositions {} => Box::new(miniature::prompts::compositions()),
        PromptConfig::MiniatureOccupations {} => Box::new(miniature::prompts::occupations()),
        PromptConfig::MiniaturePlaces {} => Box::new(miniature::prompts::in_places()),
        PromptConfig::MiniaturePeople {} => Box::new(miniature::prompts::people()),
        PromptConfig::MiniatureWorkers {} => Box::new(miniature::prompts::workers()),
        PromptConfig::MiniaturePairsInPlaces {} => Box::new(miniature::prompts::pairs_in_places()),
        other => anyhow::bail!("{other:?} is read from a file"),
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
