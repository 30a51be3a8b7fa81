//! Human Preference Score v2 and v2.1 (Wu et al., arXiv 2306.09341), which differ in weights only.
//!
//! r = scale · cos, without the logit scale: about 0.2 to 0.4 (benchmark tables have scale 100); higher is better, comparable
//! within one prompt and one version. Files are `HPS_v2_compressed.pt` and `HPS_v2.1_compressed.pt` of Hugging Face's
//! `xswu/HPSv2` (CLIP ViT-H/14 in open_clip's layout, F16, computed in F32 here), with any of CLIP's vocabularies, read by
//! open_clip's rules.
//!
//! A picture is resized in floating-point numbers so that its LONG side fits, and black fills the rest; always, also where the
//! package forgets it because nothing is resized. The package pins no torchvision: since 0.17 the resize is antialiased, before
//! it was not (`antialias = false`), which gives other scores.

use anyhow::Result;
use tch::Device;

use super::{
    clip::{Clip, ClipReward, Files, Formula},
    clip_input::{Fit, Resample},
};
use crate::{
    config::{HpsSettings, Resizing},
    models::tokenizer::TextRules,
};

/// # Errors
/// As [`Clip::load`].
pub fn load(settings: &HpsSettings, device: Device) -> Result<ClipReward> {
    let HpsSettings { weights, config, tokenizer, scale, offset, antialias } = settings;
    let files = Files { weights, config, tokenizer };
    let resample = Resample::of(Resizing::FloatBicubic, *antialias);
    let clip = Clip::load(files, TextRules::OpenClip, Fit::LongSide, resample, device)?;
    let formula = Formula { logit: false, clamp: false, scale: *scale, offset: *offset, prefix: String::new() };
    Ok(ClipReward::new("hps", clip, formula))
}
