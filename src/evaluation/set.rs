//! One model on one set: pieces that are drawn, judged, written, and put together.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};
use tch::Device;

use super::{
    results::{SetResult, Values},
    CHUNK,
};
use crate::{
    cannot_write::{make_folder, CannotWrite},
    comm::{agree, all_made, Communicator},
    config::{EvalConfig, EvalSet, EvalSplit},
    evaluate::to_picture,
    excerpt::{bounded, WHOLE},
    image_statistics::{diversity, high_frequency_share},
    memory,
    prompts::{registry as prompts, Prompt, PromptSource, Split, Whole},
    rewards::{
        registry::{build, Place},
        Reward,
    },
    signals, store,
    task::{NoiseOf, Roller},
    telemetry::{save_png, write_atomic},
    watch,
};

/// Prompts of a set.
pub struct DrawnPrompts {
    pub prompts: Vec<Prompt>,
    /// The split that they are of.
    pub split: Split,
    /// Every object that the set's source names.
    objects: Vec<String>,
}

/// The prompts of set number `index`. A collective call; errors are the same on all ranks.
pub fn draw_prompts(config: &EvalSet, index: u8, seed: u64, comm: &dyn Communicator) -> Result<DrawnPrompts> {
    let name = &config.name;
    let source = prompts::build(&config.prompts, comm).with_context(|| format!("set {name}: prompts"))?;
    let source: Box<dyn PromptSource> = match config.split {
        EvalSplit::All => Box::new(Whole(source)),
        _ => source,
    };
    let split = match config.split {
        EvalSplit::All => Split::Train,
        EvalSplit::HeldOut => Split::HeldOut,
        EvalSplit::Train => Split::Train,
        EvalSplit::Evaluation if source.len(Split::HeldOut) > 0 => Split::HeldOut,
        EvalSplit::Evaluation => Split::Train,
    };
    let there = source.len(split);
    ensure!(there > 0, "set {name}: it has no prompts in the split {:?}", config.split);
    let count = if config.count == 0 { usize::try_from(there)? } else { config.count };
    ensure!(
        count as u64 <= there || matches!(config.split, EvalSplit::Evaluation | EvalSplit::All),
        "set {name}: count = {count}, there are {there} prompts"
    );
    let prompts = prompts::some_prompts(source.as_ref(), split, seed, index, count);
    Ok(DrawnPrompts { prompts, split, objects: source.objects() })
}

/// A prompt set with its metrics, ready for any model.
pub struct Set {
    pub config: EvalSet,
    index: u8,
    pub prompts: Vec<Prompt>,
    /// The split of their source that they are of.
    pub split: Split,
    metrics: Vec<(String, Box<dyn Reward>)>,
}

impl Set {
    /// A collective call; errors are the same on all ranks.
    ///
    /// # Errors
    /// Prompts or metrics that cannot be had; no prompts.
    pub fn new(config: &EvalSet, index: usize, seed: u64, device: Device, comm: &dyn Communicator) -> Result<Self> {
        let (name, index) = (&config.name, index as u8);
        let drawn = draw_prompts(config, index, seed, comm)?;
        let place = Place { task: name, index, seed, device, group: config.images_per_prompt };
        let metrics = config.metrics.iter().map(|metric| {
            let mut reward =
                build(&metric.reward, place).with_context(|| format!("set {name}: metric {}", metric.name))?;
            reward.set_group(config.images_per_prompt);
            let nameless = drawn.prompts.iter().find(|prompt| prompt.objects.is_empty());
            reward
                .check_objects(&drawn.objects, nameless.map(|prompt| prompt.text.as_str()))
                .with_context(|| format!("set {name}: metric {}", metric.name))?;
            ensure!(
                config.images_per_prompt % reward.group() == 0,
                "set {name}: metric {} judges {} pictures of a prompt together, images_per_prompt = {}",
                metric.name,
                reward.group(),
                config.images_per_prompt
            );
            Ok((metric.name.clone(), reward))
        });
        let metrics = all_made(comm, metrics.collect::<Result<Vec<_>>>())?;
        Ok(Set { config: config.clone(), index, prompts: drawn.prompts, split: drawn.split, metrics })
    }

    /// # Errors
    /// A metric that cannot judge pictures of these many pixels.
    pub fn check_size(&mut self, [height, width]: [i64; 2]) -> Result<()> {
        let name = &self.config.name;
        let check = |(metric, reward): &mut (String, Box<dyn Reward>)| {
            reward.check_size(height, width).with_context(|| format!("set {name}: metric {metric}"))
        };
        self.metrics.iter_mut().try_for_each(check)
    }

    /// Whether its prompts are those that are trained on, as its settings say.
    pub fn is_of_training(&self) -> bool {
        self.config.split == EvalSplit::Train
    }

    fn samples(&self) -> usize {
        self.prompts.len() * self.config.images_per_prompt
    }

    fn is_shown(&self, config: &EvalConfig, sample: usize) -> bool {
        config.eval.keep_images || sample / self.config.images_per_prompt < config.eval.pictures
    }
}

/// The picture file of a sample, in the folder of its set.
pub fn picture_file(folder: &Path, sample: usize, images_per_prompt: usize) -> PathBuf {
    folder.join(format!("{:05}-{:03}.png", sample / images_per_prompt, sample % images_per_prompt))
}

/// What a rank found of consecutive samples. Numbers are bits: JSON has no NaN, and every one is kept.
#[derive(Serialize, Deserialize)]
struct Part {
    /// SHA-256 of what it depends on.
    key: String,
    first: usize,
    /// By metric: one per sample.
    rewards: BTreeMap<String, Vec<u32>>,
    /// By metric and diagnostic: one per sample, or per group.
    diagnostics: BTreeMap<String, Vec<u32>>,
    high_frequency: Vec<u64>,
    /// One per prompt; none where a prompt has one picture.
    diversity: Vec<u64>,
}

/// All that values depend on.
fn key(config: &EvalConfig, digest: &str, set: &Set) -> Result<Value> {
    let texts: Vec<u8> = serde_json::to_vec(&set.prompts)?;
    Ok(json!({
        "weights": digest, "seed": config.eval.seed, "rollout": config.rollout, "compute": config.eval.compute,
        "frozen_compute": config.eval.frozen_compute,
        "set": set.index, "images_per_prompt": set.config.images_per_prompt, "metrics": set.config.metrics,
        "prompts": store::digest::of_bytes(&texts),
    }))
}

/// The whole result, from files where it is there. A collective call; the result is the same on all ranks.
pub fn evaluate_set(
    config: &EvalConfig,
    roller: &Roller,
    digest: &str,
    set: &mut Set,
    of_model: &Path,
    comm: &dyn Communicator,
) -> Result<SetResult> {
    let key = key(config, digest, set)?;
    let (folder, file) = (of_model.join(&set.config.name), of_model.join(format!("{}.json", set.config.name)));
    let key_digest = store::digest::of_bytes(&serde_json::to_vec(&key)?);
    if let Some(found) = share(comm, (comm.rank() == 0).then(|| finished(&file, &key, config, set, &folder)))? {
        return Ok(found);
    }
    let made = if comm.rank() == 0 { make_folder(&folder) } else { Ok(()) };
    agree(comm, made)?;

    let chunk = CHUNK.next_multiple_of(set.config.images_per_prompt);
    let total = set.samples();
    let mut part_at = |first: usize| -> Result<Part> {
        let file = folder.join(format!("part-{first:07}.json"));
        let count = chunk.min(total - first);
        if let Some(part) = found(&file, &key_digest, config, set, &folder, first, count) {
            return Ok(part);
        }
        let part = draw_and_judge(config, roller, set, &folder, &key_digest, first, count)?;
        write_atomic(&file, &serde_json::to_vec(&part)?)?;
        Ok(part)
    };
    let firsts = (comm.rank() * chunk..total).step_by(comm.size() * chunk);
    let parts: Vec<Part> = signals::meet(comm, firsts.map(&mut part_at).collect())?;
    let mut all: Vec<Part> = Vec::new();
    for bytes in comm.all_gather_bytes(&serde_json::to_vec(&parts)?)? {
        all.extend(serde_json::from_slice::<Vec<Part>>(&bytes).context("parts of another rank")?);
    }
    all.sort_by_key(|part| part.first);
    let result = put_together(set, all, key);
    let written = || -> Result<()> {
        write_atomic(&file, &serde_json::to_vec_pretty(&result)?)?;
        for first in (0..total).step_by(chunk) {
            let part = folder.join(format!("part-{first:07}.json"));
            fs::remove_file(&part).with_context(|| part.display().to_string())?;
        }
        Ok(())
    };
    agree(comm, if comm.rank() == 0 { written() } else { Ok(()) })
        .context(CannotWrite::new("the evaluation's files"))?;
    Ok(result)
}

/// Rank 0's value on all ranks.
fn share(comm: &dyn Communicator, mine: Option<Option<SetResult>>) -> Result<Option<SetResult>> {
    let mut bytes = match mine {
        Some(found) => serde_json::to_vec(&found)?,
        None => Vec::new(),
    };
    comm.broadcast_bytes(&mut bytes, 0)?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// A result that was made the same way and has its pictures.
fn finished(file: &Path, key: &Value, config: &EvalConfig, set: &Set, folder: &Path) -> Option<SetResult> {
    let found: SetResult = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
    let is_it = found.key == *key && pictures_are_there(config, set, folder, 0, set.samples());
    is_it.then_some(SetResult { of_training: set.is_of_training(), ..found })
}

fn found(
    file: &Path,
    key: &str,
    config: &EvalConfig,
    set: &Set,
    folder: &Path,
    first: usize,
    count: usize,
) -> Option<Part> {
    let part: Part = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
    (part.key == key && part.first == first && pictures_are_there(config, set, folder, first, count)).then_some(part)
}

fn pictures_are_there(config: &EvalConfig, set: &Set, folder: &Path, first: usize, count: usize) -> bool {
    let wanted = (first..first + count).filter(|&sample| set.is_shown(config, sample));
    wanted.map(|sample| picture_file(folder, sample, set.config.images_per_prompt)).all(|path| path.is_file())
}

fn draw_and_judge(
    config: &EvalConfig,
    roller: &Roller,
    set: &mut Set,
    folder: &Path,
    key: &str,
    first: usize,
    count: usize,
) -> Result<Part> {
    let (name, per_prompt) = (set.config.name.clone(), set.config.images_per_prompt);
    let of_samples: Vec<Prompt> = (first..first + count).map(|i| set.prompts[i / per_prompt].clone()).collect();
    let noise = NoiseOf { seed: config.eval.seed, iteration: u32::MAX, task: set.index };
    let advice =
        format!("lower eval.decode_batch (0: no limit), and images_per_prompt of the set if it is above {CHUNK}");
    let _memory = memory::stage(format!("evaluation on {name}"), count, advice);
    let trajectory = roller.roll_out(&roller.conditioning(&of_samples)?, noise, first, count)?;
    let _no_grad = tch::no_grad_guard();
    let _precision = roller.pipeline.enter_precision();
    // rewards judge on the host
    let images = roller.pipeline.vae.decode_scaled(trajectory.x_0()).to_device(Device::Cpu);
    let ids: Vec<String> = (first..first + count).map(|i| format!("{name}-evaluation-{i:06}")).collect();
    let bits = |values: &[f32]| -> Vec<u32> { values.iter().map(|v| v.to_bits()).collect() };
    let (mut rewards, mut diagnostics) = (BTreeMap::new(), BTreeMap::new());
    for (metric, reward) in &mut set.metrics {
        let _stage = watch::stage(watch::REWARD, metric);
        signals::check()?;
        let scores = reward
            .score_with_ids(&images, &of_samples, &ids)
            .with_context(|| format!("set {name}: metric {metric}"))?;
        ensure!(
            scores.rewards.len() == count,
            "set {name}: metric {metric} gave {} values for {count} pictures",
            scores.rewards.len()
        );
        for (diagnostic, values) in &scores.diagnostics {
            diagnostics.insert(format!("{metric}/{diagnostic}"), bits(values));
        }
        rewards.insert(metric.clone(), bits(&scores.rewards));
    }
    let mut of_prompts = Vec::new();
    for prompt in (0..count).step_by(per_prompt).filter(|_| per_prompt > 1) {
        of_prompts.push(diversity(&images.narrow(0, prompt as i64, per_prompt as i64))?.to_bits());
    }
    for sample in (first..first + count).filter(|&sample| set.is_shown(config, sample)) {
        let picture = to_picture(&images.get((sample - first) as i64))?;
        let text = [("prompt".to_string(), bounded(&of_samples[sample - first].text, WHOLE).into_owned())];
        save_png(&picture_file(folder, sample, per_prompt), &picture, &text)
            .context(CannotWrite::new("the evaluation's files"))?;
    }
    Ok(Part {
        key: key.to_owned(),
        first,
        rewards,
        diagnostics,
        high_frequency: high_frequency_share(&images)?.into_iter().map(f64::to_bits).collect(),
        diversity: of_prompts,
    })
}

fn put_together(set: &Set, parts: Vec<Part>, key: Value) -> SetResult {
    let per_prompt = set.config.images_per_prompt;
    let mut result = SetResult {
        set: set.config.name.clone(),
        key,
        prompts: set.prompts.iter().map(|prompt| prompt.text.clone()).collect(),
        images_per_prompt: per_prompt,
        of_training: set.is_of_training(),
        metrics: BTreeMap::new(),
        diagnostics: BTreeMap::new(),
        high_frequency: Values::default(),
        diversity: Values::default(),
    };
    let values = |bits: Vec<u32>| bits.into_iter().map(|bits| f64::from(f32::from_bits(bits)));
    for part in parts {
        for (metric, bits) in part.rewards {
            result.metrics.entry(metric).or_default().0.extend(values(bits));
        }
        for (name, bits) in part.diagnostics {
            result.diagnostics.entry(name).or_default().0.extend(values(bits));
        }
        result.high_frequency.0.extend(part.high_frequency.into_iter().map(f64::from_bits));
        result.diversity.0.extend(part.diversity.into_iter().map(f64::from_bits));
    }
    result
}
