//! Composition (Eq. 13): are all the objects of the prompt in the picture?
//!
//! r = mean over the prompt's objects of d(o, x_0), where d is the highest confidence with which a detector finds
//! class o anywhere in the picture, 0 if nowhere.

use anyhow::{ensure, Context, Result};
use tch::{Kind, Tensor};

use super::{check_batch, DifferentiableReward, Reward, Scores};
use crate::{
    excerpt::{quoted, IN_MESSAGES},
    prompts::Prompt,
};

/// d of Eq. 13.
pub trait Detector {
    /// For picture i the highest confidence, in [0, 1], of each name in `wanted[i]`; `images` is f32 [n, 3, H, W]
    /// in [0, 1] and `wanted` has n entries. Errors: a name the detector does not know.
    fn detect(&mut self, images: &Tensor, wanted: &[&[String]]) -> Result<Vec<Vec<f32>>>;
    /// As [`Reward::weight_bytes`].
    fn weight_bytes(&self) -> u64 {
        0
    }
    /// Fails where it does not know one of these names; names the first few of them.
    fn check(&self, objects: &[String]) -> Result<()>;
    /// Fails where it cannot look at pictures of these many pixels.
    fn check_size(&self, _height: i64, _width: i64) -> Result<()> {
        Ok(())
    }
    /// The detector as a differentiable computation, where it is one.
    fn differentiable(&mut self) -> Option<&mut dyn DifferentiableDetector> {
        None
    }
}

/// Fails where `knows` fails for an object: names the first few of those.
pub(super) fn ensure_known(objects: &[String], knows: impl Fn(&str) -> bool) -> Result<()> {
    let unknown: Vec<&str> = objects.iter().map(String::as_str).filter(|object| !knows(object)).collect();
    let first: Vec<String> = unknown.iter().take(3).map(|object| format!("{object:?}")).collect();
    ensure!(
        unknown.is_empty(),
        "no class for {} of the prompts' {} objects: {}{}",
        unknown.len(),
        objects.len(),
        first.join(", "),
        if unknown.len() > 3 { ", …" } else { "" }
    );
    Ok(())
}

/// A detector whose confidences are a differentiable computation on tensors.
pub trait DifferentiableDetector {
    /// The confidences of [`Detector::detect`], those of picture 0 first, as one f32 tensor on the device of `images`.
    fn confidences(&mut self, images: &Tensor, wanted: &[&[String]]) -> Result<Tensor>;
}

/// The reward of Eq. 13 with any detector.
#[derive(Debug)]
pub struct Composition<D> {
    name: String,
    detector: D,
}

/// An object counts as present, in the diagnostics only, from this confidence on.
const PRESENT: f32 = 0.5;

impl<D: Detector> Composition<D> {
    pub fn new(name: &str, detector: D) -> Self {
        Composition { name: name.to_owned(), detector }
    }
}

impl<D: Detector> Reward for Composition<D> {
    fn name(&self) -> &str {
        &self.name
    }

    /// Diagnostics per picture: `all_present` (1 when every object is found with at least confidence 0.5, else 0)
    /// and `weakest` (the lowest confidence). Errors: a prompt that names no object.
    fn score(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Scores> {
        check_batch(images, prompts)?;
        let wanted = objects_of(&self.name, prompts)?;
        let found = self.detector.detect(images, &wanted).with_context(|| format!("reward '{}'", self.name))?;
        let mean = |values: &Vec<f32>| values.iter().sum::<f32>() / values.len() as f32;
        let weakest: Vec<f32> =
            found.iter().map(|values| values.iter().copied().fold(f32::INFINITY, f32::min)).collect();
        Ok(Scores {
            rewards: found.iter().map(mean).collect(),
            diagnostics: vec![
                ("all_present".to_owned(), weakest.iter().map(|&w| f32::from(u8::from(w >= PRESENT))).collect()),
                ("weakest".to_owned(), weakest),
            ],
            ..Scores::default()
        })
    }

    fn weight_bytes(&self) -> u64 {
        self.detector.weight_bytes()
    }

    fn check_objects(&self, objects: &[String], nameless: Option<&str>) -> Result<()> {
        ensure!(!objects.is_empty(), "reward '{}' looks for the objects that prompts name; these name none", self.name);
        ensure!(
            nameless.is_none(),
            "reward '{}' looks for the objects that prompts name; the prompt {:?} names none",
            self.name,
            nameless.unwrap_or_default()
        );
        self.detector.check(objects).with_context(|| format!("reward '{}'", self.name))
    }

    fn check_size(&mut self, height: i64, width: i64) -> Result<()> {
        self.detector.check_size(height, width)
    }

    fn differentiable(&mut self) -> Option<&mut dyn DifferentiableReward> {
        self.detector.differentiable().is_some().then_some(self as &mut dyn DifferentiableReward)
    }
}

impl<D: Detector> DifferentiableReward for Composition<D> {
    fn rewards(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Tensor> {
        check_batch(images, prompts)?;
        let wanted = objects_of(&self.name, prompts)?;
        let detector = self.detector.differentiable().context("the detector is not differentiable")?;
        let found = detector.confidences(images, &wanted).with_context(|| format!("reward '{}'", self.name))?;
        // each confidence adds its share to its picture's mean
        let (mut pictures, mut shares) = (Vec::new(), Vec::new());
        for (picture, names) in wanted.iter().enumerate() {
            pictures.extend(vec![picture as i64; names.len()]);
            shares.extend(vec![1.0 / names.len() as f32; names.len()]);
        }
        let device = found.device();
        let shares = found * Tensor::from_slice(&shares).to_device(device);
        let zeros = Tensor::zeros([wanted.len() as i64], (Kind::Float, device));
        Ok(zeros.index_add(0, &Tensor::from_slice(&pictures).to_device(device), &shares))
    }
}

/// The objects of every prompt. Errors: a prompt that names none.
fn objects_of<'a>(reward: &str, prompts: &'a [Prompt]) -> Result<Vec<&'a [String]>> {
    let objects = prompts.iter().map(|prompt| {
        ensure!(
            !prompt.objects.is_empty(),
            "reward '{reward}': the prompt {} names no objects",
            quoted(&prompt.text, IN_MESSAGES)
        );
        Ok(prompt.objects.as_slice())
    });
    objects.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed;
    impl Detector for Fixed {
        fn detect(&mut self, _: &Tensor, wanted: &[&[String]]) -> Result<Vec<Vec<f32>>> {
            let confidence = |name: &String| name.parse::<f32>().with_context(|| format!("unknown object '{name}'"));
            wanted.iter().map(|names| names.iter().map(confidence).collect()).collect()
        }

        fn check(&self, objects: &[String]) -> Result<()> {
            ensure_known(objects, |object| object.parse::<f32>().is_ok())
        }
    }

    fn prompt(objects: &[&str]) -> Prompt {
        Prompt { text: objects.join(" and "), objects: objects.iter().map(|&o| o.to_owned()).collect() }
    }

    #[test]
    fn mean_over_the_objects_of_each_prompt() {
        let images = Tensor::zeros([3, 3, 4, 4], (tch::Kind::Float, tch::Device::Cpu));
        let mut reward = Composition::new("composition", Fixed);
        let prompts = [prompt(&["1.0", "0.5"]), prompt(&["0.25"]), prompt(&["0.75", "0.25", "0.5"])];
        let scores = reward.score(&images, &prompts).unwrap();
        assert_eq!(scores.rewards, [0.75, 0.25, 0.5]);
        assert_eq!(scores.diagnostics[0].1, [1.0, 0.0, 0.0]);
        assert_eq!(scores.diagnostics[1].1, [0.5, 0.25, 0.25]);

        let none = reward.score(&images, &[prompt(&["1"]), prompt(&[]), prompt(&["1"])]).unwrap_err();
        assert!(none.to_string().contains("names no objects"), "{none}");
        let unknown = reward.score(&images, &[prompt(&["1"]), prompt(&["sofa"]), prompt(&["1"])]).unwrap_err();
        assert!(format!("{unknown:#}").contains("reward 'composition': unknown object 'sofa'"), "{unknown:#}");
        assert!(reward.score(&images, &prompts[..2]).is_err());
    }
}
