//! CLIPScore (Hessel et al., arXiv 2104.08718): how well a picture fits its caption, by a CLIP that no preference has changed.
//!
//! r = scale · max(cos, 0) + offset of "A photo depicts " + prompt, scale 2.5: the paper's; scale, prefix and clamp are
//! settings, since everybody has others: scale 100 and no prefix (torchmetrics), scale 1/30 with `logit_scale = true` and
//! `resizing = "float_bilinear"`, `middle = "torchvision"` (flow_grpo). Where a cosine is negative, clamp = true leaves no
//! gradient. Files are OpenAI's `ViT-L-14.pt` or Hugging Face's `openai/clip-vit-large-patch14`, or any other CLIP with a
//! configuration.

use anyhow::Result;
use tch::Device;

use super::{
    clip::{Clip, ClipReward, Files, Formula},
    clip_input::{Fit, Resample},
};
use crate::{config::ClipScoreSettings, models::tokenizer::TextRules};

/// # Errors
/// As [`Clip::load`].
pub fn load(settings: &ClipScoreSettings, device: Device) -> Result<ClipReward> {
    let s = settings;
    let files = Files { weights: &s.weights, config: &s.config, tokenizer: &s.tokenizer };
    let resample = Resample::of(s.resizing, s.antialias);
    let clip = Clip::load(files, TextRules::Fast, Fit::ShortSide(s.middle), resample, device)?;
    let formula =
        Formula { logit: s.logit_scale, clamp: s.clamp, scale: s.scale, offset: s.offset, prefix: s.prefix.clone() };
    Ok(ClipReward::new("clip_score", clip, formula))
}
