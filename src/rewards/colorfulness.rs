//! The miniature's stand-in for human preference: colourful and contrasty pictures are liked, washed-out ones not.
//!
//! reward = M3 / 127.5 + 2 · RMS contrast, where
//! - M3 = √(σ_rg² + σ_yb²) + 0.3 · √(μ_rg² + μ_yb²) is the colourfulness of Hasler and Süsstrunk (2003) with
//!   rg = R − G and yb = (R + G)/2 − B on the scale 0..255 (0 grey, 15 slightly, 59 quite, 109 extremely colourful),
//! - RMS contrast is the standard deviation of the luma 0.299 R + 0.587 G + 0.114 B on the scale 0..1 (at most 0.5).
//!
//! Means and standard deviations run over the pixels (population, divided by H·W). A plain grey picture scores 0,
//! the miniature's places score 0.35 on average when washed out and 1.0 when not. No picture exceeds 3.4: (rg, yb) is
//! at most 285 long (red), so M3 ≤ 285 · √1.09.

use anyhow::Result;
use tch::{Kind, Tensor};

use super::{check_batch, sqrt_with_finite_gradient as sqrt, DifferentiableReward, Reward, Scores};
use crate::prompts::Prompt;

/// Weight of σ and μ in M3.
const MEAN_WEIGHT: f64 = 0.3;
/// M3 is divided by this.
const M3_SCALE: f64 = 127.5;
/// Factor of the RMS contrast.
const CONTRAST_WEIGHT: f64 = 2.0;

/// The preference reward of the miniature; see the module for the formula.
#[derive(Clone, Debug, Default)]
pub struct Colorfulness;

impl Reward for Colorfulness {
    fn name(&self) -> &str {
        "preference"
    }

    /// Diagnostics per picture: `colorfulness` (M3, scale 0..255) and `contrast` (RMS, scale 0..1).
    fn score(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Scores> {
        check_batch(images, prompts)?;
        let (rewards, m3, contrast) = judge(images);
        Ok(Scores {
            rewards: Vec::try_from(&rewards)?,
            diagnostics: vec![
                ("colorfulness".to_owned(), Vec::try_from(&m3)?),
                ("contrast".to_owned(), Vec::try_from(&contrast)?),
            ],
            ..Scores::default()
        })
    }

    fn differentiable(&mut self) -> Option<&mut dyn DifferentiableReward> {
        Some(self)
    }
}

impl DifferentiableReward for Colorfulness {
    fn rewards(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Tensor> {
        check_batch(images, prompts)?;
        Ok(judge(images).0)
    }
}

/// Reward, M3 and contrast, f32 `[n]` each.
fn judge(images: &Tensor) -> (Tensor, Tensor, Tensor) {
    let images = images.clamp(0.0, 1.0);
    let m3 = hasler_susstrunk_m3(&images);
    let contrast = rms_contrast(&images);
    (&m3 / M3_SCALE + &contrast * CONTRAST_WEIGHT, m3, contrast)
}

/// M3 of every picture on the scale 0..255, f32 `[n]`; `images` is f32 [n, 3, H, W] in [0, 1].
pub fn hasler_susstrunk_m3(images: &Tensor) -> Tensor {
    let (red, green, blue) = (images.select(1, 0), images.select(1, 1), images.select(1, 2));
    let rg = (&red - &green) * 255.0;
    let yb = ((&red + &green) * 0.5 - &blue) * 255.0;
    let (rg_mean, rg_variance) = moments(&rg);
    let (yb_mean, yb_variance) = moments(&yb);
    sqrt(&(rg_variance + yb_variance)) + sqrt(&(rg_mean.square() + yb_mean.square())) * MEAN_WEIGHT
}

/// Standard deviation of the luma of every picture, f32 `[n]`; `images` is f32 [n, 3, H, W] in [0, 1].
pub fn rms_contrast(images: &Tensor) -> Tensor {
    let weights = Tensor::from_slice(&[0.299f32, 0.587, 0.114]).view([1, 3, 1, 1]).to_device(images.device());
    sqrt(&moments(&(images * weights).sum_dim_intlist(1, false, Kind::Float)).1)
}

/// Mean and population variance over the pixels of [n, H, W], each `[n]`; two passes, so the variance is never negative.
fn moments(values: &Tensor) -> (Tensor, Tensor) {
    let mean = values.mean_dim([1, 2].as_slice(), true, Kind::Float);
    let variance = (values - &mean).square().mean_dim([1, 2].as_slice(), false, Kind::Float);
    (mean.flatten(0, -1), variance)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::miniature::scene::{draw_only, Content};
    use crate::miniature::{objects, places};
    use crate::rewards::testing;

    /// A picture of vertical stripes in the given colours, all of the same width.
    fn stripes(colors: &[[f32; 3]]) -> Tensor {
        let columns: Vec<Tensor> = colors.iter().map(|c| Tensor::from_slice(c).view([1, 3, 1, 1])).collect();
        Tensor::cat(&columns, 3).repeat([1, 1, 8, 4]).contiguous()
    }

    fn assert_close(value: &Tensor, expected: f64) {
        let value = value.double_value(&[0]);
        // f32 arithmetic on numbers up to 255: observed errors are below 2e-5
        assert!((value - expected).abs() < 1e-4, "{value} instead of {expected}");
    }

    #[test]
    fn known_colours_in_closed_form() {
        // plain grey: nothing; plain red: rg = 255, yb = 127.5, no deviation
        assert_close(&hasler_susstrunk_m3(&stripes(&[[0.4; 3]])), 0.0);
        assert_close(
            &hasler_susstrunk_m3(&stripes(&[[1.0, 0.0, 0.0]])),
            0.3 * (255f64.powi(2) + 127.5f64.powi(2)).sqrt(),
        );
        // red and cyan: rg = ±255, yb = ±127.5, the means cancel
        let red_cyan = stripes(&[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]);
        assert_close(&hasler_susstrunk_m3(&red_cyan), (255f64.powi(2) + 127.5f64.powi(2)).sqrt());
        // blue and black: yb = −255 and 0
        let blue_black = stripes(&[[0.0, 0.0, 1.0], [0.0; 3]]);
        assert_close(&hasler_susstrunk_m3(&blue_black), 127.5 + 0.3 * 127.5);
        assert_close(&rms_contrast(&blue_black), 0.114 / 2.0);
        assert_close(&rms_contrast(&stripes(&[[0.0; 3], [1.0; 3]])), 0.5);
    }

    #[test]
    fn the_reward_is_the_documented_sum() {
        let images = stripes(&[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]);
        let scores = Colorfulness.score(&images, &[Prompt::default()]).unwrap();
        let m3 = 1.3 * (127.5f64.powi(2) + 63.75f64.powi(2)).sqrt();
        assert!((f64::from(scores.rewards[0]) - (m3 / 127.5 + 2.0 * 0.299 / 2.0)).abs() < 1e-5);
        assert!(Colorfulness.score(&images, &[]).is_err());
    }

    #[test]
    fn its_gradient_is_that_of_finite_differences_and_zero_for_a_plain_picture() {
        let image = (Tensor::arange(3 * 6 * 5, (Kind::Float, tch::Device::Cpu)) * 1.7).sin() * 0.4 + 0.5;
        testing::against_finite_differences(&mut Colorfulness, &image.view([1, 3, 6, 5]), &Prompt::default());
        let grey = Tensor::full([1, 3, 6, 5], 0.25, (Kind::Float, tch::Device::Cpu)).set_requires_grad(true);
        let reward = Colorfulness.differentiable().unwrap().rewards(&grey, &[Prompt::default()]).unwrap();
        reward.sum(Kind::Float).backward();
        assert_eq!((reward, grey.grad()), (Tensor::from_slice(&[0f32]), grey.zeros_like()));
    }

    /// The same scene, washed out and not: measured 0.20 to 0.48 (mean 0.35) against 0.58 to 1.39 (mean 1.00).
    #[test]
    fn washed_out_pictures_score_lower() {
        let (mut low, mut high) = (Vec::new(), Vec::new());
        for object in 0..objects::NAMES.len() {
            for place in 0..places::NAMES.len() {
                let pixels: Vec<f32> = [true, false]
                    .into_iter()
                    .flat_map(|washed_out| draw_only(Content::Place { object, place, washed_out }, 3, 0).pixels)
                    .collect();
                let images = Tensor::from_slice(&pixels).view([2, 3, 32, 32]);
                let scores = Colorfulness.score(&images, &[Prompt::default(), Prompt::default()]).unwrap().rewards;
                assert!(scores[0] < scores[1] / 1.5, "object {object}, place {place}: {scores:?}");
                low.push(scores[0]);
                high.push(scores[1]);
            }
        }
        let mean = |values: &[f32]| values.iter().sum::<f32>() / values.len() as f32;
        let range = |values: &[f32]| values.iter().fold((f32::MAX, f32::MIN), |(a, b), &v| (a.min(v), b.max(v)));
        println!("washed out {:.3} {:?}, full {:.3} {:?}", mean(&low), range(&low), mean(&high), range(&high));
        assert!(mean(&low) < 0.45 && mean(&high) > 0.8);
    }
}
