//! How small, or how large, a picture is as a JPEG file: rewards that need no model, for trials.
//!
//! `jpeg_compressibility` = −kB and `jpeg_incompressibility` = kB of the file at quality 95, 1 kB = 1000 bytes, as Black
//! et al. (2023) use them. The encoder is the `image` crate's: baseline JPEG without chroma subsampling. On three
//! photographs its files were 2 % smaller than Pillow's without subsampling and 23 % to 32 % larger than Pillow's default.

use anyhow::Result;
use image::{codecs::jpeg::JpegEncoder, ExtendedColorType};
use tch::Tensor;

use super::{check_batch, rgb_bytes, Reward, Scores};
use crate::prompts::Prompt;

const QUALITY: u8 = 95;

/// See the module.
#[derive(Clone, Debug)]
pub struct JpegSize {
    name: &'static str,
    sign: f32,
}

impl JpegSize {
    pub fn compressibility() -> Self {
        JpegSize { name: "jpeg_compressibility", sign: -1.0 }
    }

    pub fn incompressibility() -> Self {
        JpegSize { name: "jpeg_incompressibility", sign: 1.0 }
    }
}

impl Reward for JpegSize {
    fn name(&self) -> &str {
        self.name
    }

    /// A picture with a value that is not finite is a bad sample.
    fn score(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Scores> {
        let n = check_batch(images, prompts)?;
        let pictures = rgb_bytes(images)?;
        let mut rewards = Vec::with_capacity(n);
        for picture in &pictures.rgb {
            rewards.push(match picture {
                Some(rgb) => self.sign * jpeg_bytes(rgb, pictures.width, pictures.height)? as f32 / 1000.0,
                None => f32::NAN,
            });
        }
        Ok(Scores { rewards, ..Scores::default() })
    }
}

/// Size of the file of an RGB picture.
fn jpeg_bytes(rgb: &[u8], width: usize, height: usize) -> Result<usize> {
    let mut file = Vec::new();
    let (width, height) = (u32::try_from(width)?, u32::try_from(height)?);
    JpegEncoder::new_with_quality(&mut file, QUALITY).encode(rgb, width, height, ExtendedColorType::Rgb8)?;
    Ok(file.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{normal_rows, Coordinates, Purpose};

    #[test]
    fn plain_pictures_are_smaller_than_noise() {
        let noise = normal_rows(Coordinates::new(1, Purpose::Sample), 0, 1, &[3, 64, 48]).sigmoid();
        let images = Tensor::cat(&[noise.full_like(0.5), noise.shallow_clone(), noise.full_like(f64::NAN)], 0);
        let prompts = vec![Prompt::default(); 3];
        let small = JpegSize::compressibility().score(&images, &prompts).unwrap().rewards;
        let large = JpegSize::incompressibility().score(&images, &prompts).unwrap().rewards;
        // 64 × 48 pixels of noise at quality 95 take about 11 kB, a grey picture less than 1 kB, of them 0.6 the header
        assert!(-small[0] > 0.5 && -small[0] < 1.0 && -small[1] > 6.0 && -small[1] < 16.0, "{small:?}");
        assert_eq!(large[..2], [-small[0], -small[1]]);
        assert!(small[2].is_nan() && large[2].is_nan());
        // the size in bytes of the file itself
        let picture = &rgb_bytes(&images).unwrap().rgb[1];
        assert_eq!(jpeg_bytes(picture.as_ref().unwrap(), 48, 64).unwrap(), (large[1] * 1000.0).round() as usize);
    }
}
