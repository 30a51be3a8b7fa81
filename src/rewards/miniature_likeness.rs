//! How near a picture of the miniature world is to clean renderings of its caption: a judge of preference that nobody trains
//! on, as the paper's second metric is.
//!
//! Brightness and colour are compared apart, each without its mean and at unit size: with l(x) the luma of a picture less its
//! mean, divided by its length, and c(x) the same of the two colour differences R − Y and B − Y together,
//!
//! likeness(x, r) = (⟨l(x), l(r)⟩ + ⟨c(x), c(r)⟩) / 2, from −1 to 1,
//!
//! score(x, caption) = max over renderings r of the caption of likeness(x, r) − mean over other captions of the same.
//!
//! So neither contrast nor saturation counts, the best of `RENDERINGS` answers for place and size, and what is like all
//! captions alike (noise, a plain ground) scores 0 by the second term.

use std::collections::HashMap;

use anyhow::{anyhow, Result};
use tch::{Kind, Tensor};

use super::{check_batch, Reward, Scores};
use crate::{
    miniature::{
        raster::{ensure_size, SIZE},
        scene::{self, Content},
        Edition,
    },
    prompts::Prompt,
};

/// Clean renderings of a caption.
const RENDERINGS: usize = 48;
/// Other captions that a picture is compared with as well.
const OTHERS: usize = 12;
/// Seed of the renderings: no run's pictures are of this world.
const SEED: u64 = 0x6c69_6b65;
/// Shorter planes are plain and like nothing.
const SHORTEST: f64 = 1e-3;

/// The judge; renderings are drawn when a caption is met for the first time.
#[derive(Debug)]
pub struct MiniatureLikeness {
    task: String,
    /// What a caption of the world shows, without defects, and the number of its kind.
    captions: HashMap<String, (usize, Vec<Content>)>,
    /// The captions of each kind, in the world's order.
    kinds: Vec<Vec<String>>,
    /// Planes of the renderings of a caption, f32 [RENDERINGS, 2, 2 · SIZE²].
    drawn: HashMap<String, Tensor>,
}

impl MiniatureLikeness {
    pub fn new(task: &str) -> MiniatureLikeness {
        let mut captions: HashMap<String, (usize, Vec<Content>)> = HashMap::new();
        let mut kinds: Vec<Vec<String>> = Vec::new();
        let mut numbers = HashMap::new();
        for content in scene::flawless(Edition::Second) {
            let caption = scene::caption(content);
            let kind = *numbers.entry(std::mem::discriminant(&content)).or_insert(kinds.len());
            kinds.resize(numbers.len(), Vec::new());
            let entry = captions.entry(caption.clone()).or_insert_with(|| {
                kinds[kind].push(caption);
                (kind, Vec::new())
            });
            entry.1.push(content);
        }
        MiniatureLikeness { task: task.to_owned(), captions, kinds, drawn: HashMap::new() }
    }

    /// The highest likeness of every picture's planes `[n, 2, 2 · SIZE²]` to a rendering of `caption`, f32 `[n]`.
    fn nearest(&mut self, planes: &Tensor, caption: &str) -> Tensor {
        if !self.drawn.contains_key(caption) {
            let contents = &self.captions[caption].1;
            let pixels: Vec<f32> = (0..RENDERINGS)
                .flat_map(|k| scene::draw_only(contents[k % contents.len()], SEED, k as u64).pixels)
                .collect();
            let pictures = Tensor::from_slice(&pixels).view([RENDERINGS as i64, 3, SIZE as i64, SIZE as i64]);
            self.drawn.insert(caption.to_owned(), normalised(&pictures));
        }
        let likeness = planes.flatten(1, -1).matmul(&self.drawn[caption].flatten(1, -1).tr()) * 0.5;
        likeness.amax([1].as_slice(), false)
    }

    /// Captions of the same kind to compare with, spread evenly over the world's order behind `caption`.
    fn others(&self, caption: &str) -> Vec<String> {
        let kind = &self.kinds[self.captions[caption].0];
        let at = kind.iter().position(|known| known == caption).expect("a caption is one of its kind");
        let count = OTHERS.min(kind.len() - 1);
        (1..=count).map(|k| kind[(at + k * (kind.len() - 1) / count) % kind.len()].clone()).collect()
    }
}

impl Reward for MiniatureLikeness {
    fn name(&self) -> &str {
        &self.task
    }

    fn check_size(&mut self, height: i64, width: i64) -> Result<()> {
        ensure_size("the miniature's likeness", height, width)
    }

    /// # Errors
    /// A prompt that is no caption of the miniature world.
    fn score(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Scores> {
        check_batch(images, prompts)?;
        let _no_grad = tch::no_grad_guard();
        let planes = normalised(&images.to_device(tch::Device::Cpu).to_kind(Kind::Float).clamp(0.0, 1.0));
        let mut of_caption: HashMap<&str, Vec<i64>> = HashMap::new();
        for (index, prompt) in prompts.iter().enumerate() {
            self.known(&prompt.text)?;
            of_caption.entry(&prompt.text).or_default().push(index as i64);
        }
        let mut rewards = vec![0f32; prompts.len()];
        for (caption, indices) in of_caption {
            let planes = planes.index_select(0, &Tensor::from_slice(&indices));
            let own = self.nearest(&planes, caption);
            let others: Vec<Tensor> = self.others(caption).iter().map(|other| self.nearest(&planes, other)).collect();
            let chance = Tensor::stack(&others, 0).mean_dim([0].as_slice(), false, Kind::Float);
            let scores: Vec<f32> = Vec::try_from(own - chance)?;
            indices.iter().zip(scores).for_each(|(&index, score)| rewards[index as usize] = score);
        }
        Ok(Scores { rewards, ..Scores::default() })
    }
}

impl MiniatureLikeness {
    fn known(&self, caption: &str) -> Result<()> {
        match self.captions.contains_key(caption) {
            true => Ok(()),
            false => Err(anyhow!(
                "'{caption}' is no caption of the miniature world, whose pictures it would be compared with"
            )),
        }
    }
}

/// Luma and colour differences of pictures `[n, 3, SIZE, SIZE]`, each without its mean and of length 1 (0 where it is plain):
/// f32 `[n, 2, 2 · SIZE²]`, the luma padded with zeros.
fn normalised(pictures: &Tensor) -> Tensor {
    let weights = Tensor::from_slice(&[0.299f32, 0.587, 0.114]).view([1, 3, 1, 1]);
    let luma = (pictures * weights).sum_dim_intlist([1].as_slice(), false, Kind::Float);
    let colors = Tensor::stack(&[pictures.select(1, 0) - &luma, pictures.select(1, 2) - &luma], 1);
    let centred = |planes: &Tensor| planes - planes.mean_dim([-2, -1].as_slice(), true, Kind::Float);
    let unit = |planes: Tensor| {
        let planes = planes.flatten(1, -1);
        let length = planes.norm_scalaropt_dim(2.0, [1].as_slice(), true);
        let plain = length.lt(SHORTEST);
        (planes / length.clamp_min(SHORTEST)).masked_fill(&plain, 0.0)
    };
    let (luma, colors) = (unit(centred(&luma.unsqueeze(1))), unit(centred(&colors)));
    let luma = luma.constant_pad_nd([0, colors.size()[1] - luma.size()[1]]);
    Tensor::stack(&[luma, colors], 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::miniature::raster::VALUES;
    use crate::random::{Coordinates, Purpose};
    use crate::rewards::colorfulness::Colorfulness;

    fn batch(pictures: &[Vec<f32>]) -> Tensor {
        Tensor::from_slice(&pictures.concat()).view([-1, 3, SIZE as i64, SIZE as i64])
    }

    fn scores(images: &Tensor, caption: &str) -> Vec<f32> {
        let prompts = vec![Prompt { text: caption.to_owned(), objects: Vec::new() }; images.size()[0] as usize];
        MiniatureLikeness::new("likeness").score(images, &prompts).unwrap().rewards
    }

    fn mean(values: &[f32]) -> f32 {
        values.iter().sum::<f32>() / values.len() as f32
    }

    /// Clean pictures of "an apple in snow" of another world than the judge's own.
    fn apples() -> Tensor {
        let content = Content::Place { object: 0, place: 4, washed_out: false };
        batch(&(0..32).map(|index| scene::draw_only(content, 3, index).pixels).collect::<Vec<_>>())
    }

    #[test]
    fn the_right_caption_scores_far_above_the_others() {
        let right = scores(&apples(), "an apple in snow");
        for wrong in ["a ball in snow", "an apple at night", "a tire on grass", "an apple and a ball in snow"] {
            let wrong = scores(&apples(), wrong);
            let better = right.iter().zip(&wrong).filter(|(right, wrong)| right > wrong).count();
            println!("{:.3} {:.3} {better}", mean(&right), mean(&wrong));
            assert!(better >= 31, "{better} of 32");
        }
    }

    /// Contrast and saturation change colourfulness by half and likeness not at all, but for what f32 rounds.
    #[test]
    fn neither_contrast_nor_saturation_counts() {
        let images = apples();
        let prompts = vec![Prompt { text: "an apple in snow".to_owned(), objects: Vec::new() }; 32];
        let pale = (&images - 0.6) * 0.4 + 0.6;
        let gap = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        let before = scores(&images, "an apple in snow");
        assert!(gap(&before, &scores(&pale, "an apple in snow")) < 1e-5);
        // R − Y and B − Y scale with the colours where the luma is kept
        let weights = Tensor::from_slice(&[0.299f32, 0.587, 0.114]).view([1, 3, 1, 1]);
        let luma = (&images * weights).sum_dim_intlist([1].as_slice(), true, Kind::Float);
        let grey = &luma + (&images - &luma) * 0.5;
        assert!(gap(&before, &scores(&grey, "an apple in snow")) < 1e-5);
        let color = |images: &Tensor| mean(&Colorfulness.score(images, &prompts).unwrap().rewards);
        assert!(color(&pale) < 0.5 * color(&images) && color(&grey) < 0.8 * color(&images));
    }

    /// Over 200 pictures of noise the mean is chance's; plain pictures are like nothing.
    #[test]
    fn noise_and_plain_pictures_score_nothing() {
        let mut stream = Coordinates::new(1, Purpose::Sample).stream();
        let noise: Vec<Vec<f32>> = (0..200).map(|_| (0..VALUES).map(|_| stream.uniform() as f32).collect()).collect();
        for caption in ["an apple in snow", "a kite", "a woman in a red shirt", "an apple and a ball in snow"] {
            let mean = mean(&scores(&batch(&noise), caption));
            println!("{caption}: {mean:.4}");
            assert!(mean.abs() < 0.02, "{caption}: {mean}");
        }
        assert_eq!(scores(&batch(&[vec![0.3; VALUES]]), "a kite"), [0.0]);
    }

    /// An object of the largest and of the smallest radius that the world draws: place and size cost less than a fifth of what
    /// another object costs.
    #[test]
    fn size_and_place_count_little() {
        use crate::miniature::{objects, raster::Canvas};
        let kite = objects::index("kite").unwrap();
        let at = |radius: f32, x: f32| {
            let mut canvas = Canvas::plain([0.86; 3]);
            objects::paint(&mut canvas, kite, (x, 16.0), radius, [0.0; 3]);
            canvas.into_pixels()
        };
        let own = scores(&batch(&[at(5.6, 14.0), at(6.9, 18.0)]), "a kite");
        let other = scores(&batch(&[at(5.6, 14.0)]), "a book");
        println!("{own:?} {other:?}");
        assert!((own[0] - own[1]).abs() < 0.2 * (own[0] - other[0]));
    }

    #[test]
    fn a_prompt_of_another_world_is_an_error() {
        let prompts = [Prompt { text: "a horse on the moon".to_owned(), objects: Vec::new() }];
        let error = MiniatureLikeness::new("likeness").score(&apples().narrow(0, 0, 1), &prompts).unwrap_err();
        assert!(error.to_string().contains("a horse on the moon"), "{error}");
    }
}
