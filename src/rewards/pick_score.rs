//! PickScore (Kirstain et al., arXiv 2305.01569): which of two pictures for a prompt people of the Pick-a-Pic site prefer.
//!
//! r = scale · exp(logit_scale) · cos + offset, about 17 to 24 at scale 1; higher is better, and differences are comparable
//! within a prompt only. Files are those of Hugging Face's `yuvalkirstain/PickScore_v1` (CLIP ViT-H/14, 16 heads of 80 in the
//! picture tower, GELU), with the tokenizer of `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`.
//!
//! Others' scales: 1/26 = 0.0384615 (flow_grpo, Flow-Factory), scale 0.125 and offset −2.25 for (s − 18)/8 (MixGRPO).

use anyhow::Result;
use tch::Device;

use super::{
    clip::{Clip, ClipReward, Files, Formula},
    clip_input::{Fit, Resample},
};
use crate::{config::PickScoreSettings, models::tokenizer::TextRules};

/// # Errors
/// As [`Clip::load`].
pub fn load(settings: &PickScoreSettings, device: Device) -> Result<ClipReward> {
    let PickScoreSettings { weights, config, tokenizer, scale, offset, resizing, middle, antialias } = settings;
    let files = Files { weights, config, tokenizer };
    let resample = Resample::of(*resizing, *antialias);
    let clip = Clip::load(files, TextRules::Fast, Fit::ShortSide(*middle), resample, device)?;
    let formula = Formula { logit: true, clamp: false, scale: *scale, offset: *offset, prefix: String::new() };
    Ok(ClipReward::new("pick_score", clip, formula))
}
