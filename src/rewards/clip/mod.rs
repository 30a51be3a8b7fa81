//! CLIP as a judge of pictures for texts: PickScore, HPSv2 and CLIPScore are one formula over three sets of weights.
//!
//! r = scale · s · cos(p, t) + offset, with p the picture's features, t the text's, and s either exp(logit_scale) of the file
//! or 1. Every text is encoded once and by itself, so that its features do not depend on what else is in a batch.
//!
//! ```text
//! layouts.rs   names of the two published layouts -> ours      shape.rs    heads and activations
//! towers.rs    the two networks                                reading.rs  texts -> token ids
//! ```

pub mod layouts;
mod reading;
mod shape;
pub mod towers;

use std::collections::HashMap;

use anyhow::{ensure, Context, Result};
use tch::{no_grad, Device, Kind, Tensor};

use self::{
    reading::Reader,
    towers::{unit, PictureTower, TextTower},
};
use super::{
    clip_input::{ClipInput, Fit, Resample},
    weights::{Checkpoint, Loaded},
    DifferentiableReward, Reward, Scores,
};
use crate::{models::tokenizer::TextRules, prompts::Prompt};

/// Texts whose features are kept.
const KEPT: usize = 4096;

/// The files of a CLIP.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a> {
    pub weights: &'a str,
    /// "" for a file beside the weights, or the table of published models.
    pub config: &'a str,
    /// "" for the weights' folder.
    pub tokenizer: &'a str,
}

struct Network {
    pictures: PictureTower,
    texts: TextTower,
}

/// A loaded CLIP; how it sees pictures and reads texts is its publisher's.
pub struct Clip {
    network: Loaded<Network>,
    reader: Reader,
    pub input: ClipInput,
    pub device: Device,
    /// exp(logit_scale).
    pub logit_scale: f64,
    /// Features of texts seen before, `[1, joint]`.
    known: HashMap<String, Tensor>,
}

impl Clip {
    /// # Errors
    /// Files that cannot be read, of another architecture, without one of the towers or projections; a tokenizer of another
    /// model; weights whose heads nothing says. Each names the file.
    pub fn load(files: Files, rules: TextRules, fit: Fit, resample: Resample, device: Device) -> Result<Clip> {
        let checkpoint = layouts::canonical_text(layouts::canonical(Checkpoint::read(files.weights)?)?)?;
        let plan = shape::plan(&checkpoint, files.config)?;
        let scale = checkpoint.tensors.get("logit_scale").filter(|scale| scale.numel() == 1);
        let scale = scale.with_context(|| format!("{}: tensor logit_scale, one number, is missing", files.weights))?;
        let logit_scale = scale.to_kind(Kind::Double).reshape([1]).double_value(&[0]).exp();
        ensure!(logit_scale.is_finite(), "{}: logit_scale is {}", files.weights, logit_scale.ln());
        let reader = Reader::load(files, rules, &plan)?;
        let network = checkpoint.build(device, layouts::ignored_by_both, |b| {
            Ok(Network {
                pictures: PictureTower::new(b, plan.sizes, plan.style, plan.joint)?,
                texts: TextTower::new(b, &plan.text, plan.joint)?,
            })
        })?;
        let input = ClipInput::new(plan.sizes.side as usize, fit, resample);
        let input = plan.channels.map_or(input, |(mean, std)| ClipInput { mean, std, ..input });
        Ok(Clip { network, reader, input, device, logit_scale, known: HashMap::new() })
    }

    /// Bytes of the weights.
    pub fn bytes(&self) -> u64 {
        self.network.bytes
    }

    /// Features f32 `[n, joint]` of prepared pictures.
    pub fn picture_features(&self, input: &Tensor) -> Tensor {
        self.network.pictures.features(input)
    }

    /// Features f32 `[n, joint]` of texts, without gradients.
    ///
    /// # Errors
    /// A text that cannot be cut into tokens.
    pub fn text_features<S: AsRef<str>>(&mut self, texts: &[S]) -> Result<Tensor> {
        let mut rows = Vec::with_capacity(texts.len());
        for text in texts.iter().map(AsRef::as_ref) {
            if !self.known.contains_key(text) {
                let features = self.features_of_ids(&self.ids(text)?);
                if self.known.len() >= KEPT {
                    self.known.clear();
                }
                self.known.insert(text.to_string(), features);
            }
            rows.push(self.known[text].shallow_clone());
        }
        Ok(Tensor::cat(&rows, 0))
    }

    /// A text's token ids i64 `[1, tokens]`, up to the first end token.
    ///
    /// # Errors
    /// As [`Clip::text_features`].
    pub fn ids(&self, text: &str) -> Result<Tensor> {
        self.reader.ids(text)
    }

    /// Features f32 `[n, joint]` of token ids i64 `[n, tokens]` that end with the end token.
    pub fn features_of_ids(&self, ids: &Tensor) -> Tensor {
        no_grad(|| self.network.texts.features(&ids.to_device(self.device)))
    }

    /// Cosines f32 `[n]` of prepared pictures and their texts.
    pub fn cosines<S: AsRef<str>>(&mut self, input: &Tensor, texts: &[S]) -> Result<Tensor> {
        let texts = unit(&self.text_features(texts)?);
        Ok((unit(&self.picture_features(input)) * texts).sum_dim_intlist(1, false, Kind::Float))
    }
}

/// From a cosine to a reward.
#[derive(Clone, Debug)]
pub struct Formula {
    /// Multiply by exp(logit_scale).
    pub logit: bool,
    /// A negative cosine counts as 0.
    pub clamp: bool,
    pub scale: f64,
    pub offset: f64,
    /// Put before every prompt.
    pub prefix: String,
}

/// One of the rewards on CLIP.
pub struct ClipReward {
    name: &'static str,
    pub clip: Clip,
    formula: Formula,
    /// It has been said that clamped rewards have no gradient.
    warned: bool,
}

impl ClipReward {
    pub fn new(name: &'static str, clip: Clip, formula: Formula) -> Self {
        ClipReward { name, clip, formula, warned: false }
    }

    /// Rewards f32 `[n]` of prepared pictures, and how many of them are clamped.
    fn judge(&mut self, input: &Tensor, prompts: &[Prompt]) -> Result<(Tensor, i64)> {
        let Formula { logit, clamp, scale, offset, prefix } = &self.formula;
        let texts: Vec<String> = prompts.iter().map(|prompt| format!("{prefix}{}", prompt.text)).collect();
        let mut cosines = self.clip.cosines(input, &texts)?;
        let mut clamped = 0;
        if *clamp {
            clamped = cosines.lt(0.0).sum(Kind::Int64).int64_value(&[]);
            cosines = cosines.clamp_min(0.0);
        }
        let factor = scale * if *logit { self.clip.logit_scale } else { 1.0 };
        Ok((cosines * factor + *offset, clamped))
    }
}

impl Reward for ClipReward {
    fn name(&self) -> &str {
        self.name
    }

    fn weight_bytes(&self) -> u64 {
        self.clip.bytes()
    }

    fn score(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Scores> {
        let (input, device) = (self.clip.input, self.clip.device);
        input.score(images, prompts, device, |input| Ok(self.judge(input, prompts)?.0))
    }

    fn differentiable(&mut self) -> Option<&mut dyn DifferentiableReward> {
        Some(self)
    }
}

impl DifferentiableReward for ClipReward {
    fn rewards(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Tensor> {
        let (input, device) = (self.clip.input, self.clip.device);
        input.rewards(images, prompts, device, |input| {
            let (rewards, clamped) = self.judge(input, prompts)?;
            if clamped > 0 && !self.warned {
                self.warned = true;
                log::warn!(
                    "{}: {clamped} of {} cosines are negative, where clamp = true leaves no gradient (clamp = false has one)",
                    self.name,
                    prompts.len()
                );
            }
            Ok(rewards)
        })
    }
}
