//! From pictures to the input of CLIP-like networks: the short side to S pixels by a cubic filter, the S × S middle,
//! each channel minus its mean over its standard deviation. ImageReward and the aesthetic predictor share it.

use anyhow::Result;
use tch::{no_grad, Device, Kind, Tensor};

use super::{
    check_batch,
    pil::{self, Filter},
    rgb_bytes, Scores,
};
use crate::prompts::Prompt;

/// Red, green, blue, on the scale 0..1.
const MEAN: [f32; 3] = [0.48145466, 0.4578275, 0.40821073];
const STD: [f32; 3] = [0.26862954, 0.26130258, 0.27577711];

/// The input's side S.
#[derive(Clone, Copy, Debug)]
pub struct ClipInput {
    pub side: usize,
}

/// Input of a batch; pictures with a value that is not finite are black and marked.
pub struct Prepared {
    /// f32 `[n, 3, S, S]`.
    pub input: Tensor,
    pub finite: Vec<bool>,
}

impl Prepared {
    /// `rewards` with NaN, a bad sample, where the picture was broken.
    pub fn mark(&self, mut rewards: Vec<f32>) -> Vec<f32> {
        rewards.iter_mut().zip(&self.finite).filter(|(_, finite)| !**finite).for_each(|(r, _)| *r = f32::NAN);
        rewards
    }
}

impl ClipInput {
    /// The scores of a network on `device`; `judge` makes rewards f32 `[n]` of its input.
    pub fn score(
        self,
        images: &Tensor,
        prompts: &[Prompt],
        device: Device,
        judge: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Scores> {
        check_batch(images, prompts)?;
        let prepared = self.exact(images, device)?;
        let rewards = no_grad(|| judge(&prepared.input))?.to_device(Device::Cpu);
        Ok(Scores { rewards: prepared.mark(Vec::try_from(&rewards)?), ..Scores::default() })
    }

    /// The same, differentiable, where the images lie: apart from [`ClipInput::score`] as pictures that are not rounded to
    /// bytes.
    pub fn rewards(
        self,
        images: &Tensor,
        prompts: &[Prompt],
        device: Device,
        judge: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        check_batch(images, prompts)?;
        Ok(judge(&self.differentiable(&images.to_device(device)))?.to_device(images.device()))
    }

    /// As the networks' own packages do it: pictures rounded to bytes, resized by Pillow (`Resize` and `CenterCrop` of
    /// torchvision on its images). `images` is f32 [n, 3, H, W] in [0, 1]; the result lies on `device`.
    pub fn exact(self, images: &Tensor, device: Device) -> Result<Prepared> {
        let pictures = rgb_bytes(images)?;
        let size = [pictures.width, pictures.height];
        let (to, corner) = (self.resized(size), self.corner(size));
        let mut bytes: Vec<u8> = Vec::with_capacity(pictures.rgb.len() * 3 * self.side * self.side);
        let black = vec![0u8; 3 * size[0] * size[1]];
        for rgb in &pictures.rgb {
            let resized = pil::resize(rgb.as_ref().unwrap_or(&black), size, to, Filter::Bicubic);
            for row in corner[1]..corner[1] + self.side {
                let start = 3 * (row * to[0] + corner[0]);
                bytes.extend(&resized[start..start + 3 * self.side]);
            }
        }
        let side = self.side as i64;
        let pixels = Tensor::from_slice(&bytes).view([-1, side, side, 3]).to_device(device);
        let input = normalise(&(pixels.permute([0, 3, 1, 2]).to_kind(Kind::Float) / 255.0));
        Ok(Prepared { input: input.contiguous(), finite: pictures.rgb.iter().map(Option::is_some).collect() })
    }

    /// The same in floating-point numbers, differentiable: nothing is rounded or clipped. Half a grey level per pass
    /// apart from [`ClipInput::exact`], and more where the cubic filter overshoots black or white.
    pub fn differentiable(self, images: &Tensor) -> Tensor {
        let s = images.size();
        let size = [s[3] as usize, s[2] as usize];
        let (to, corner, side) = (self.resized(size), self.corner(size), self.side);
        let filter = |axis: usize| {
            let matrix = filter_matrix(size[axis], to[axis]).narrow(0, corner[axis] as i64, side as i64);
            matrix.to_device(images.device())
        };
        normalise(&filter(1).matmul(&images.matmul(&filter(0).tr())))
    }

    /// Width and height after the resize; the long side is rounded down.
    fn resized(self, [width, height]: [usize; 2]) -> [usize; 2] {
        let short = width.min(height);
        [width, height].map(|own| if own == short { self.side } else { self.side * own / short })
    }

    /// Left and top of the middle; halves go to the even number, as Python rounds.
    fn corner(self, size: [usize; 2]) -> [usize; 2] {
        self.resized(size).map(|own| {
            let twice = own - self.side;
            let down = twice / 2;
            down + (twice % 2) * (down % 2)
        })
    }
}

fn normalise(images: &Tensor) -> Tensor {
    let row = |values: &[f32; 3]| Tensor::from_slice(values).view([1, 3, 1, 1]).to_device(images.device());
    (images - row(&MEAN)) / row(&STD)
}

/// The cubic filter along one axis as a matrix f32 `[to, from]`.
fn filter_matrix(from: usize, to: usize) -> Tensor {
    let mut values = vec![0f32; from * to];
    for (row, tap) in pil::taps(from, to, Filter::Bicubic).iter().enumerate() {
        for (i, &weight) in tap.weights.iter().enumerate() {
            values[row * from + tap.first + i] = weight as f32;
        }
    }
    Tensor::from_slice(&values).view([to as i64, from as i64])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_corners_as_torchvision_has_them() {
        let input = ClipInput { side: 224 };
        assert_eq!((input.resized([512, 512]), input.corner([512, 512])), ([224, 224], [0, 0]));
        // 224 · 768 / 512 = 336; (336 − 224) / 2 = 56
        assert_eq!((input.resized([768, 512]), input.corner([768, 512])), ([336, 224], [56, 0]));
        // int(224 · 500 / 333) = 336; int(224 · 101 / 100) = 226, half of 2 is 1; 224 · 103 / 100 = 230.7, half of 6 is 3
        assert_eq!((input.resized([333, 500]), input.corner([100, 103])), ([224, 336], [0, 3]));
        // halves: (227 − 224) / 2 = 1.5 → 2, (225 − 224) / 2 = 0.5 → 0
        assert_eq!((input.corner([2240, 2270])[1], input.corner([2240, 2250])[1]), (2, 0));
    }

    /// The differentiable path against the exact one, and its gradient against finite differences.
    #[test]
    fn both_paths_agree_and_the_gradient_is_right() {
        tch::manual_seed(3);
        let input = ClipInput { side: 12 };
        // smooth enough that the cubic filter stays inside 0..1
        let images = (Tensor::rand([2, 3, 5, 7], (Kind::Float, Device::Cpu)) * 0.5 + 0.25).upsample_bilinear2d(
            [29, 40],
            false,
            None,
            None,
        );
        let images = (images * 255.0).round() / 255.0;
        let exact = input.exact(&images, Device::Cpu).unwrap();
        let smooth = input.differentiable(&images);
        assert_eq!((exact.input.size(), smooth.size()), (vec![2, 3, 12, 12], vec![2, 3, 12, 12]));
        // two passes, each rounded to whole grey levels: 1/255 over the smallest std; observed 0.0135
        let gap = (&exact.input - &smooth).abs().max().double_value(&[]);
        assert!(gap < 1.0 / 255.0 / 0.26, "{gap}");

        let direction = Tensor::rand_like(&smooth).to_kind(Kind::Double);
        let loss = |x: &Tensor| (input.differentiable(x).to_kind(Kind::Double) * &direction).sum(Kind::Double);
        let x = images.set_requires_grad(true);
        loss(&x).backward();
        let gradient = x.grad();
        let step = Tensor::rand_like(&gradient) - 0.5;
        let (up, down) = tch::no_grad(|| (loss(&(&x + &step)), loss(&(&x - &step))));
        // the map is linear, so a difference over a long step has f32's rounding only; observed 2e-7 of the value
        let slope = ((up - down) / 2.0).double_value(&[]);
        let wanted = (&gradient * &step).sum(Kind::Double).double_value(&[]);
        assert!((slope - wanted).abs() < 1e-5 * wanted.abs().max(1.0), "{slope} {wanted}");
    }

    #[test]
    fn a_broken_picture_is_marked() {
        let images = Tensor::zeros([2, 3, 8, 8], (Kind::Float, Device::Cpu));
        let _ = images.get(1).fill_(f64::NAN);
        let prepared = ClipInput { side: 4 }.exact(&images, Device::Cpu).unwrap();
        assert_eq!(prepared.finite, [true, false]);
        assert!(prepared.input.isfinite().all().int64_value(&[]) == 1);
    }

    /// Published pictures, 512 × 512 to 224 × 224, against what Pillow made of them (data of the project, not shipped).
    #[test]
    fn published_pictures_as_pillow_resizes_them() {
        let Some(data) = std::env::var_os("RLDIFF_TEST_DATA").map(std::path::PathBuf::from) else {
            eprintln!("SKIPPED: RLDIFF_TEST_DATA does not name a folder with imagereward/1.webp");
            return;
        };
        for number in [1, 2] {
            let read = |file: String| {
                let bytes = std::fs::read(data.join("imagereward").join(file)).unwrap();
                crate::image_file::decode_whole(&bytes).unwrap()
            };
            let (picture, wanted) = (read(format!("{number}.webp")), read(format!("{number}_pil_bicubic_224.png")));
            assert_eq!((picture.dimensions(), wanted.dimensions()), ((512, 512), (224, 224)));
            let got = pil::resize(picture.as_raw(), [512, 512], [224, 224], Filter::Bicubic);
            assert!(got == *wanted.as_raw(), "{number}.webp");
        }
    }
}
