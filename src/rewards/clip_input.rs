//! From pictures to the input of CLIP-like networks: one side to S pixels by a filter, the S × S middle or black around, each
//! channel minus its mean over its standard deviation.
//!
//! ImageReward, the aesthetic predictor, PickScore and CLIPScore fit the short side and take the middle; HPSv2 fits the long
//! side. What publishers differ in (bytes or floating-point numbers, filter, antialiasing, rounding of the middle) are settings.

use anyhow::Result;
use tch::{no_grad, Device, Kind, Tensor};

use super::{
    check_batch,
    pil::{self, Filter, Taps},
    rgb_bytes, Scores,
};
use crate::{
    config::{Middle, Resizing},
    prompts::Prompt,
};

/// Red, green, blue, on the scale 0..1.
const MEAN: [f32; 3] = [0.48145466, 0.4578275, 0.40821073];
const STD: [f32; 3] = [0.26862954, 0.26130258, 0.27577711];

/// What becomes S pixels long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// The short side; the middle of the long one is taken.
    ShortSide(Middle),
    /// The long side; the rest is black, the odd row or column below or on the right.
    LongSide,
}

/// How a size is changed where pictures are scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resample {
    /// Bytes by Pillow's bicubic filter, to the bit.
    Pillow,
    /// Floating-point numbers as torch does it, neither rounded nor clipped.
    Float { filter: Filter, antialias: bool },
}

impl Resample {
    /// From the settings; Pillow antialiases always.
    pub fn of(resizing: Resizing, antialias: bool) -> Resample {
        match resizing {
            Resizing::PillowBicubic => Resample::Pillow,
            Resizing::FloatBicubic => Resample::Float { filter: Filter::Bicubic, antialias },
            Resizing::FloatBilinear => Resample::Float { filter: Filter::Bilinear, antialias },
        }
    }
}

/// How pictures become inputs.
#[derive(Clone, Copy, Debug)]
pub struct ClipInput {
    /// The input's side S.
    pub side: usize,
    pub fit: Fit,
    pub resample: Resample,
    /// Of the channels.
    pub mean: [f32; 3],
    pub std: [f32; 3],
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
    /// With CLIP's means and standard deviations.
    pub fn new(side: usize, fit: Fit, resample: Resample) -> Self {
        ClipInput { side, fit, resample, mean: MEAN, std: STD }
    }

    /// `Resize` and `CenterCrop` of torchvision on Pillow's pictures, as ImageReward and OpenAI have it.
    pub fn of_torchvision(side: usize) -> Self {
        ClipInput::new(side, Fit::ShortSide(Middle::Torchvision), Resample::Pillow)
    }

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

    /// As the networks' own packages do it, with pictures rounded to bytes. `images` is f32 [n, 3, H, W] in [0, 1]; the result
    /// lies on `device`.
    pub fn exact(self, images: &Tensor, device: Device) -> Result<Prepared> {
        let pictures = rgb_bytes(images)?;
        let size = [pictures.width, pictures.height];
        let black = vec![0u8; 3 * size[0] * size[1]];
        let finite = pictures.rgb.iter().map(Option::is_some).collect();
        let all = pictures.rgb.iter().map(|rgb| rgb.as_ref().unwrap_or(&black));
        let on_device = |bytes: &[u8], [width, height]: [usize; 2]| {
            let pixels = Tensor::from_slice(bytes).view([-1, height as i64, width as i64, 3]).to_device(device);
            pixels.permute([0, 3, 1, 2]).to_kind(Kind::Float) / 255.0
        };
        let input = match self.resample {
            Resample::Pillow => {
                let bytes: Vec<u8> = all.flat_map(|rgb| self.by_pillow(rgb, size)).collect();
                self.normalise(&on_device(&bytes, [self.side; 2]))
            }
            Resample::Float { .. } => {
                let bytes: Vec<u8> = all.flatten().copied().collect();
                self.differentiable(&on_device(&bytes, size))
            }
        };
        Ok(Prepared { input: input.contiguous(), finite })
    }

    /// A picture's S × S bytes.
    fn by_pillow(self, rgb: &[u8], size: [usize; 2]) -> Vec<u8> {
        let to = self.resized(size);
        let resized = pil::resize(rgb, size, to, Filter::Bicubic);
        let [left, top] = self.places(size);
        let row_of = |row: usize| {
            let start = 3 * ((top + row) * to[0] + left);
            &resized[start..start + 3 * self.side]
        };
        (0..self.side).flat_map(|row| row_of(row).iter().copied()).collect()
    }

    /// The same in floating-point numbers, differentiable: nothing is rounded or clipped. Half a grey level per pass
    /// apart from [`ClipInput::exact`] by Pillow, and more where the cubic filter overshoots black or white.
    pub fn differentiable(self, images: &Tensor) -> Tensor {
        let s = images.size();
        let size = [s[3] as usize, s[2] as usize];
        let matrix = |axis: usize| self.axis(size, axis).to_device(images.device());
        self.normalise(&matrix(1).matmul(&images.matmul(&matrix(0).tr())))
    }

    /// Width and height after the resize. The long side is rounded down where the short one fits, the short one to the nearest
    /// (halves to the even number) where the long one does.
    pub fn resized(self, [width, height]: [usize; 2]) -> [usize; 2] {
        let (short, long) = (width.min(height), width.max(height));
        match self.fit {
            Fit::ShortSide(_) => {
                [width, height].map(|own| if own == short { self.side } else { self.side * own / short })
            }
            Fit::LongSide => {
                let scale = self.side as f64 / long as f64;
                [width, height].map(|own| ((own as f64 * scale).round_ties_even() as usize).max(1))
            }
        }
    }

    /// Left and top: of the middle in the resized picture, or of the resized picture in the black one.
    pub fn places(self, size: [usize; 2]) -> [usize; 2] {
        self.resized(size).map(|own| {
            let twice = own.abs_diff(self.side);
            let down = twice / 2;
            match self.fit {
                // Python's rounding: halves to the even number
                Fit::ShortSide(Middle::Torchvision) => down + (twice % 2) * (down % 2),
                Fit::ShortSide(Middle::Transformers) | Fit::LongSide => down,
            }
        })
    }

    /// Resize, and middle or black, along one axis (0 across, 1 down) as a matrix f32 `[S, from]`.
    fn axis(self, size: [usize; 2], axis: usize) -> Tensor {
        let (from, to, place) = (size[axis], self.resized(size)[axis], self.places(size)[axis]);
        let taps = match self.resample {
            Resample::Pillow => pil::taps(from, to, Filter::Bicubic),
            Resample::Float { filter, antialias: true } => pil::taps(from, to, filter),
            Resample::Float { filter, antialias: false } => pil::taps_without_antialias(from, to, filter),
        };
        let mut values = vec![0f32; from * self.side];
        // rows outside of the middle are left out, rows outside of the picture stay black
        let (skipped, black) = match self.fit {
            Fit::ShortSide(_) => (place, 0),
            Fit::LongSide => (0, place),
        };
        let rows = taps.iter().skip(skipped).zip((black..self.side).map(|row| row * from));
        for (Taps { first, weights }, start) in rows {
            for (i, &weight) in weights.iter().enumerate() {
                values[start + first + i] = weight as f32;
            }
        }
        Tensor::from_slice(&values).view([self.side as i64, from as i64])
    }

    fn normalise(self, images: &Tensor) -> Tensor {
        let row = |values: &[f32; 3]| Tensor::from_slice(values).view([1, 3, 1, 1]).to_device(images.device());
        (images - row(&self.mean)) / row(&self.std)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_corners_as_torchvision_has_them() {
        let input = ClipInput::of_torchvision(224);
        assert_eq!((input.resized([512, 512]), input.places([512, 512])), ([224, 224], [0, 0]));
        // 224 · 768 / 512 = 336; (336 − 224) / 2 = 56
        assert_eq!((input.resized([768, 512]), input.places([768, 512])), ([336, 224], [56, 0]));
        // int(224 · 500 / 333) = 336; int(224 · 101 / 100) = 226, half of 2 is 1; 224 · 103 / 100 = 230.7, half of 6 is 3
        assert_eq!((input.resized([333, 500]), input.places([100, 103])), ([224, 336], [0, 3]));
        // halves: (227 − 224) / 2 = 1.5 → 2, (225 − 224) / 2 = 0.5 → 0
        assert_eq!((input.places([2240, 2270])[1], input.places([2240, 2250])[1]), (2, 0));
    }

    /// Sizes as transformers and HPSv2's package have them.
    #[test]
    fn sizes_and_places_of_the_other_publishers() {
        let middle = ClipInput::new(224, Fit::ShortSide(Middle::Transformers), Resample::Pillow);
        // 335 − 224 = 111: torchvision has 56
        assert_eq!((middle.resized([427, 640]), middle.places([427, 640])), ([224, 335], [0, 55]));
        let black = ClipInput::new(224, Fit::LongSide, Resample::of(Resizing::FloatBicubic, true));
        for (size, resized, places) in [
            ([768, 512], [224, 149], [0, 37]),
            ([448, 113], [224, 56], [0, 84]),
            // 57.5 → 58
            ([448, 115], [224, 58], [0, 83]),
            ([500, 3], [224, 1], [0, 111]),
            ([224, 160], [224, 160], [0, 32]),
            ([1000, 1], [224, 1], [0, 111]),
        ] {
            assert_eq!((black.resized(size), black.places(size)), (resized, places), "{size:?}");
        }
        // all rows of a white picture, 37 black ones above and 38 below
        let sums = black.axis([768, 512], 1).sum_dim_intlist(1, false, Kind::Double);
        let sums = Vec::<f64>::try_from(sums).unwrap();
        let wanted = |row: usize| f64::from(u8::from((37..186).contains(&row)));
        assert!(sums.iter().enumerate().all(|(row, sum)| (sum - wanted(row)).abs() < 1e-6), "{sums:?}");
    }

    /// The differentiable path against the exact one, and its gradient against finite differences.
    #[test]
    fn both_paths_agree_and_the_gradient_is_right() {
        tch::manual_seed(3);
        let input = ClipInput::of_torchvision(12);
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
        let prepared = ClipInput::of_torchvision(4).exact(&images, Device::Cpu).unwrap();
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
