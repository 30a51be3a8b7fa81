//! Statistical parity (Eq. 12): how evenly the classes of a classifier occur among the pictures of one prompt.
//!
//! SP = √(Σ_a (p_a − 1/|A|)²) over the |A| classes, and every picture of the minibatch gets the reward −SP. It is 0
//! when all classes are equally frequent and √(1 − 1/|A|) when all pictures are of one class.
//!
//! The paper does not say what becomes of a picture without a face. Leaving it out of the counts would reward
//! removing people (no face at all would score 0.5 with four classes, better than 0.866 for one tone only). Here SP
//! of the classified pictures is weighted by their share, and the missing share is charged the worst value
//! √(1 − 1/|A|). By the triangle inequality a group with missing faces then never scores better than the same group
//! with the missing ones in any classes whatever.

use anyhow::{ensure, Context, Result};
use tch::Tensor;

use super::{Pending, Reward, Scores};
use crate::{
    excerpt::{quoted, IN_MESSAGES},
    prompts::Prompt,
};

/// h of the paper: puts a picture into one of a few classes.
pub trait Classifier {
    /// Names of the classes A, in the order of their indices.
    fn classes(&self) -> Vec<String>;
    /// The class of every picture, `None` where there is nothing to classify; `images` is f32 [n, 3, H, W] in [0, 1].
    fn classify(&mut self, images: &Tensor) -> Result<Vec<Option<usize>>>;
    /// As [`Reward::check_size`].
    fn check_size(&mut self, _height: i64, _width: i64) -> Result<()> {
        Ok(())
    }
}

/// The reward −SP of Eq. 12 over consecutive groups of pictures of the same prompt.
#[derive(Clone, Debug)]
pub struct Parity<C> {
    name: String,
    group: usize,
    classifier: C,
}

impl<C: Classifier> Parity<C> {
    /// `group` pictures are judged together (16 in the paper). Errors: `group` is 0, or fewer than two classes.
    pub fn new(name: &str, classifier: C, group: usize) -> Result<Self> {
        ensure!(group > 0, "the group of the reward '{name}' must be at least 1");
        let classes = classifier.classes().len();
        ensure!(classes >= 2, "the classifier of the reward '{name}' has {classes} classes, parity needs two or more");
        Ok(Parity { name: name.to_owned(), group, classifier })
    }
}

impl<C: Classifier> Reward for Parity<C> {
    fn name(&self) -> &str {
        &self.name
    }

    fn group(&self) -> usize {
        self.group
    }

    fn set_group(&mut self, pictures: usize) {
        self.group = pictures;
    }

    fn check_size(&mut self, height: i64, width: i64) -> Result<()> {
        self.classifier.check_size(height, width)
    }

    /// Diagnostics, one value per group: `miss_rate` and `share_<class>` (shares of the whole group; together with
    /// the miss rate they sum to 1). Errors: pictures that do not fill whole groups, or a group of mixed prompts.
    fn score(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Scores> {
        let labels = self.classify(images)?;
        self.judge(&labels, prompts)
    }

    fn begin_in_parts(
        &mut self,
        parts: &mut dyn Iterator<Item = Tensor>,
        prompts: &[Prompt],
        _ids: &[String],
    ) -> Result<Pending> {
        let mut labels = Vec::with_capacity(prompts.len());
        for images in parts {
            labels.extend(self.classify(&images)?);
        }
        Ok(Pending::Judged(self.judge(&labels, prompts)?))
    }
}

impl<C: Classifier> Parity<C> {
    fn classify(&mut self, images: &Tensor) -> Result<Vec<Option<usize>>> {
        self.classifier.classify(images).with_context(|| format!("reward '{}'", self.name))
    }

    /// The scores of pictures by their classes.
    fn judge(&self, labels: &[Option<usize>], prompts: &[Prompt]) -> Result<Scores> {
        let n = labels.len();
        ensure!(n == prompts.len(), "{n} pictures and {} prompts", prompts.len());
        ensure!(n % self.group == 0, "{n} pictures do not make whole groups of {}", self.group);
        for group in prompts.chunks(self.group) {
            if let Some(other) = group.iter().find(|prompt| prompt.text != group[0].text) {
                let [one, other] = [&group[0], other].map(|prompt| quoted(&prompt.text, IN_MESSAGES));
                anyhow::bail!("a group of '{}' mixes the prompts {one} and {other}", self.name);
            }
        }

        let classes = self.classifier.classes();
        let mut rewards = Vec::with_capacity(n);
        let mut miss_rate = Vec::new();
        let mut shares: Vec<Vec<f32>> = vec![Vec::new(); classes.len()];
        for group in labels.chunks(self.group) {
            let counts = count(group, classes.len());
            let missing = group.iter().filter(|label| label.is_none()).count();
            let disparity = statistical_parity(&counts, missing);
            rewards.extend(std::iter::repeat_n(-disparity as f32, group.len()));
            miss_rate.push(missing as f32 / group.len() as f32);
            for (share, count) in shares.iter_mut().zip(counts) {
                share.push(count as f32 / group.len() as f32);
            }
        }
        let mut diagnostics = vec![("miss_rate".to_owned(), miss_rate)];
        diagnostics.extend(classes.into_iter().map(|class| format!("share_{class}")).zip(shares));
        Ok(Scores { rewards, diagnostics, ..Scores::default() })
    }
}

fn count(labels: &[Option<usize>], classes: usize) -> Vec<usize> {
    let mut counts = vec![0; classes];
    for &label in labels.iter().flatten() {
        counts[label] += 1;
    }
    counts
}

/// SP of Eq. 12 from the number of pictures per class, the pictures without a class charged as the module says;
/// 0 (even) to √(1 − 1/|A|) (one class only, or none found). An empty group gives the worst value.
pub fn statistical_parity(counts: &[usize], missing: usize) -> f64 {
    let classes = counts.len() as f64;
    let worst = (1.0 - 1.0 / classes).sqrt();
    let classified = counts.iter().sum::<usize>() as f64;
    if classified == 0.0 {
        return worst;
    }
    let squares: f64 = counts.iter().map(|&count| (count as f64 / classified - 1.0 / classes).powi(2)).sum();
    let total = classified + missing as f64;
    classified / total * squares.sqrt() + missing as f64 / total * worst
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values in closed form; f64 arithmetic leaves a few ulps.
    #[test]
    fn known_values() {
        let close = |counts: &[usize], missing, expected: f64| {
            let value = statistical_parity(counts, missing);
            assert!((value - expected).abs() < 1e-12, "{counts:?} and {missing} missing: {value} not {expected}");
        };
        let worst = 0.75f64.sqrt();
        assert!((worst - 0.866).abs() < 1e-4);
        close(&[4, 4, 4, 4], 0, 0.0);
        close(&[16, 0, 0, 0], 0, worst);
        close(&[8, 8, 0, 0], 0, 0.5);
        close(&[8, 4, 4, 0], 0, 0.125f64.sqrt());
        close(&[0, 0, 0, 0], 16, worst);
        close(&[2, 2, 2, 2], 8, 0.5 * worst);
        close(&[8, 0, 0, 0], 8, worst);
        close(&[6, 6, 0, 0], 4, 0.75 * 0.5 + 0.25 * worst);
        close(&[1, 1], 0, 0.0);
        close(&[2, 0], 0, 0.5f64.sqrt());
    }

    /// Hiding faces never pays: every split of 16 pictures over four classes, every way to hide up to three of them.
    #[test]
    fn a_missing_face_is_never_better() {
        for a in 0..=16 {
            for b in 0..=16 - a {
                for c in 0..=16 - a - b {
                    let counts = [a, b, c, 16 - a - b - c];
                    let with_faces = statistical_parity(&counts, 0);
                    for class in 0..4 {
                        for hidden in 1..=counts[class].min(3) {
                            let mut fewer = counts;
                            fewer[class] -= hidden;
                            let without = statistical_parity(&fewer, hidden);
                            assert!(without > with_faces - 1e-12, "{counts:?}, {hidden} of class {class} hidden");
                        }
                    }
                }
            }
        }
    }

    /// Says what the first value of a picture is: class 0 to 3, or no class when negative.
    struct FirstPixel;
    impl Classifier for FirstPixel {
        fn classes(&self) -> Vec<String> {
            ["w", "x", "y", "z"].map(str::to_owned).to_vec()
        }
        fn classify(&mut self, images: &Tensor) -> Result<Vec<Option<usize>>> {
            let n = images.size()[0];
            Ok((0..n).map(|i| images.double_value(&[i, 0, 0, 0])).map(|v| (v >= 0.0).then_some(v as usize)).collect())
        }
    }

    fn pictures(labels: &[i64]) -> Tensor {
        Tensor::from_slice(labels).to_kind(tch::Kind::Float).view([-1, 1, 1, 1]).repeat([1, 3, 2, 2])
    }

    fn prompts(texts: &[&str], each: usize) -> Vec<Prompt> {
        texts
            .iter()
            .flat_map(|&text| std::iter::repeat_n(Prompt { text: text.to_owned(), objects: Vec::new() }, each))
            .collect()
    }

    #[test]
    fn groups_are_judged_apart_and_every_picture_gets_the_groups_reward() {
        let mut reward = Parity::new("parity", FirstPixel, 4).unwrap();
        let scores =
            reward.score(&pictures(&[0, 1, 2, 3, 3, 3, 3, 3, 0, 1, -1, -1]), &prompts(&["a", "b", "a"], 4)).unwrap();
        let worst = 0.75f32.sqrt();
        let expected = [0.0, -worst, -(0.5 * 0.5 + 0.5 * worst)];
        for (i, value) in scores.rewards.iter().enumerate() {
            assert!((value - expected[i / 4]).abs() < 1e-6, "picture {i}: {value}");
        }
        assert_eq!(scores.diagnostics[0], ("miss_rate".to_owned(), vec![0.0, 0.0, 0.5]));
        assert_eq!(scores.diagnostics[4], ("share_z".to_owned(), vec![0.25, 1.0, 0.0]));
    }

    #[test]
    fn mixed_or_broken_groups_are_errors() {
        let mut reward = Parity::new("parity", FirstPixel, 4).unwrap();
        let mixed = reward.score(&pictures(&[0, 1, 2, 3]), &prompts(&["a", "b"], 2)).unwrap_err();
        assert!(mixed.to_string().contains("\"a\" and \"b\""), "{mixed}");
        assert!(reward.score(&pictures(&[0, 1, 2]), &prompts(&["a"], 3)).is_err());
        assert!(Parity::new("parity", FirstPixel, 0).is_err());
    }
}
