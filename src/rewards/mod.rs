//! Rewards r(x_0, c): one reward per file.

use anyhow::{bail, ensure, Result};
use tch::{Device, Kind, Tensor};

use crate::prompts::Prompt;

pub mod aesthetic;
pub mod clip;
pub mod clip_input;
pub mod clip_score;
pub mod colorfulness;
pub mod command;
pub mod composition;
pub mod hps;
pub mod http;
pub mod image_reward;
pub mod ita;
pub mod jpeg;
mod lines;
pub mod miniature_detector;
pub mod miniature_likeness;
pub mod miniature_skin_tone;
pub mod parity;
pub mod pick_score;
pub mod pil;
pub mod protocol;
pub mod random;
pub mod registry;
mod score_head;
pub mod server;
pub mod skin_tone;
mod stderr;
pub mod sum;
pub mod torchscript;
pub mod unidet;
pub mod vision_transformer;
pub mod weights;

/// What a reward says of one batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    /// One reward per image, higher is better. A value that is not finite marks a bad sample: it is excluded from
    /// the statistics and from the update, counted and logged.
    pub rewards: Vec<f32>,
    /// Named values to log, one per image or one per group each (for example `miss_rate`); averaged over the batch.
    pub diagnostics: Vec<(String, Vec<f32>)>,
    /// The parts of a sum that are to be normalised before they are added; none for every other reward.
    pub parts: Vec<Part>,
}

/// A part of a weighted sum of rewards.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    pub weight: f64,
    /// One per image.
    pub rewards: Vec<f32>,
}

impl Scores {
    /// Appends those of the next pictures, by the same reward.
    fn append(&mut self, next: Scores) {
        self.rewards.extend(next.rewards);
        append_parts(&mut self.parts, next.parts);
        for (name, values) in next.diagnostics {
            match self.diagnostics.iter_mut().find(|(known, _)| *known == name) {
                Some((_, all)) => all.extend(values),
                None => self.diagnostics.push((name, values)),
            }
        }
    }
}

/// All pictures of a batch that comes in parts.
fn whole(parts: &mut dyn Iterator<Item = Tensor>) -> Tensor {
    let parts: Vec<Tensor> = parts.collect();
    match &parts[..] {
        [all] => all.shallow_clone(),
        parts => Tensor::cat(parts, 0),
    }
}

/// Appends the next pictures' parts, which are as many every time.
pub fn append_parts(all: &mut Vec<Part>, next: Vec<Part>) {
    if all.is_empty() {
        *all = next;
        return;
    }
    for (part, more) in all.iter_mut().zip(next) {
        part.rewards.extend(more.rewards);
    }
}

/// r(x_0, c) of the paper: scores decoded pictures against their prompts.
pub trait Reward {
    /// Name in logs and tables.
    fn name(&self) -> &str;
    /// How many consecutive pictures are judged together (the minibatch of Eq. 12); 1 for ordinary rewards.
    fn group(&self) -> usize {
        1
    }
    /// From now on a reward that judges groups judges this many pictures together; others ignore it.
    fn set_group(&mut self, _pictures: usize) {}
    /// Scores `images`, f32 [n, 3, H, W] with values in [0, 1], where image i was made for `prompts[i]`; n is a
    /// multiple of [`Reward::group`] and the pictures of a group are consecutive.
    fn score(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Scores>;
    /// As [`Reward::score`], for rewards that want to know the pictures by name; `ids` are the same whatever the number
    /// of ranks.
    fn score_with_ids(&mut self, images: &Tensor, prompts: &[Prompt], _ids: &[String]) -> Result<Scores> {
        self.score(images, prompts)
    }
    /// Starts to judge a batch, whose scores [`Reward::collect`] gives; another one may begin after that. A reward that is a
    /// program judges meanwhile, others have judged when this returns.
    fn begin(&mut self, images: &Tensor, prompts: &[Prompt], ids: &[String]) -> Result<Pending> {
        Ok(Pending::Judged(self.score_with_ids(images, prompts, ids)?))
    }
    /// As [`Reward::begin`] for a batch whose pictures come in parts, of any size, each while the next one is decoded. A reward
    /// that judges pictures one by one judges each part as it comes; others wait for all of them.
    fn begin_in_parts(
        &mut self,
        parts: &mut dyn Iterator<Item = Tensor>,
        prompts: &[Prompt],
        ids: &[String],
    ) -> Result<Pending> {
        if self.group() > 1 {
            return self.begin(&whole(parts), prompts, ids);
        }
        let (mut all, mut first) = (Scores::default(), 0);
        for images in parts {
            let end = first + images.size()[0] as usize;
            ensure!(end <= prompts.len(), "{end} pictures and {} prompts", prompts.len());
            all.append(self.score_with_ids(&images, &prompts[first..end], &ids[first..end])?);
            first = end;
        }
        Ok(Pending::Judged(all))
    }
    /// The scores of [`Reward::score_with_ids`] for the batch that was begun.
    fn collect(&mut self, pending: Pending) -> Result<Scores> {
        match pending {
            Pending::Judged(scores) => Ok(scores),
            Pending::Asked(_) | Pending::Parts(_) => bail!("{}: another reward's batch", self.name()),
        }
    }
    /// Bytes of its networks' weights, where it has some in this process.
    fn weight_bytes(&self) -> u64 {
        0
    }
    /// Fails where it cannot judge prompts that name these objects (none: prompts that name no objects); `nameless` is one
    /// of the prompts that names none although others do.
    fn check_objects(&self, _objects: &[String], _nameless: Option<&str>) -> Result<()> {
        Ok(())
    }
    /// Fails where it cannot judge pictures of these many pixels, found by a trial where there is no other way. Most rewards
    /// take any size; a program is not asked.
    fn check_size(&mut self, _height: i64, _width: i64) -> Result<()> {
        Ok(())
    }
    /// The reward as a differentiable computation, where it is one. ReFL and DRaFT need it.
    fn differentiable(&mut self) -> Option<&mut dyn DifferentiableReward> {
        None
    }
}

/// A batch that is being judged.
pub enum Pending {
    Judged(Scores),
    /// A program has been asked ([`protocol`]).
    Asked(protocol::Asked),
    /// One per part of a sum.
    Parts(Vec<Pending>),
}

/// A reward that is a differentiable computation on tensors.
pub trait DifferentiableReward {
    /// The rewards of [`Reward::score`], up to rounding, as f32 `[n]` on the device of `images`, which may be any. Gradients
    /// flow into `images`, f32 [n, 3, H, W] in [0, 1], and nowhere else; where a picture lies on a kink they are finite.
    fn rewards(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Tensor>;
}

/// √v of values that are not negative, with gradient 0 where v = 0 (it is infinite there, and times 0 it would be NaN).
fn sqrt_with_finite_gradient(values: &Tensor) -> Tensor {
    // true for NaN, which stays NaN
    let not_zero = values.ne(0.0);
    values.where_scalarother(&not_zero, 1.0).sqrt() * not_zero
}

/// Pictures as bytes.
struct RgbBytes {
    width: usize,
    height: usize,
    /// 3 · width · height bytes each, row by row; `None` for a picture with a value that is not finite.
    rgb: Vec<Option<Vec<u8>>>,
}

/// `images`, f32 [n, 3, H, W] in [0, 1], rounded to bytes.
fn rgb_bytes(images: &Tensor) -> Result<RgbBytes> {
    let images = images.to_device(Device::Cpu);
    let size = images.size();
    let finite: Vec<bool> = Vec::try_from(images.isfinite().flatten(1, -1).all_dim(1, false))?;
    let bytes = (images.nan_to_num(0.0, 0.0, 0.0).clamp(0.0, 1.0) * 255.0).round().to_kind(Kind::Uint8);
    let bytes: Vec<u8> = Vec::try_from(bytes.permute([0, 2, 3, 1]).contiguous().view([-1]))?;
    let (height, width) = (size[2] as usize, size[3] as usize);
    let pictures = bytes.chunks((3 * height * width).max(1)).zip(finite);
    Ok(RgbBytes { width, height, rgb: pictures.map(|(rgb, finite)| finite.then(|| rgb.to_vec())).collect() })
}

/// Errors unless `images` is [n, 3, H, W] with one prompt per picture; gives n.
fn check_batch(images: &Tensor, prompts: &[Prompt]) -> Result<usize> {
    let size = images.size();
    ensure!(size.len() == 4 && size[1] == 3, "a reward needs pictures [n, 3, H, W], not {size:?}");
    ensure!(size[0] as usize == prompts.len(), "{} pictures and {} prompts", size[0], prompts.len());
    Ok(prompts.len())
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use crate::random::{normal_rows, Coordinates, Purpose};

    /// The gradient of a differentiable reward in a picture [1, 3, H, W] against central differences along eight random
    /// directions, and its values against those of [`Reward::score`].
    pub fn against_finite_differences(reward: &mut dyn Reward, image: &Tensor, prompt: &Prompt) {
        const STEP: f64 = 1e-3;
        let prompts = std::slice::from_ref(prompt);
        let leaf = image.detach().copy().set_requires_grad(true);
        let value = reward.differentiable().expect("differentiable").rewards(&leaf, prompts).unwrap();
        let scored = reward.score(image, prompts).unwrap().rewards[0];
        assert!((value.double_value(&[0]) - f64::from(scored)).abs() < 1e-6 * f64::from(scored).abs().max(1.0));
        value.sum(Kind::Float).backward();
        let gradient = leaf.grad();
        assert!(gradient.abs().max().double_value(&[]) > 0.0, "the gradient is zero");
        let shape = &image.size()[1..];
        for row in 0..8 {
            let direction = normal_rows(Coordinates::new(9, Purpose::Sample), row, 1, shape);
            let direction = &direction / direction.norm();
            let at = |step: f64| {
                let moved = image + &direction * step;
                reward.differentiable().unwrap().rewards(&moved, prompts).unwrap().double_value(&[0])
            };
            let mut at = at;
            let expected = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            let found = (&gradient * &direction).sum(Kind::Double).double_value(&[]);
            let scale = gradient.norm().double_value(&[]);
            // rewards of order 1 in f32 leave 1e-7/2e-3 = 6e-5 in a difference, the third derivative less
            assert!((found - expected).abs() < 5e-4 * (1.0 + scale), "direction {row}: {found} instead of {expected}");
        }
    }
}
