//! A weighted sum of rewards on the same pictures.
//!
//! Plain: r = Σ w_i r_i. Normalised: every part first becomes an advantage by itself, over the task's whole batch of the
//! iteration (Eq. 10), and Σ w_i Â_i is what is normalised and trained on; so no part drowns the others by its scale.
//! The normalisation needs all ranks and is the trainer's ([`crate::policy::advantage::weighted_sum`]); logs and
//! evaluations show the plain sum and the parts.

use anyhow::{bail, Context, Result};
use tch::Tensor;

use super::{whole, DifferentiableReward, Part, Pending, Reward, Scores};
use crate::prompts::Prompt;

/// See the module.
pub struct Sum {
    parts: Vec<(f64, String, Box<dyn Reward>)>,
    normalise: bool,
}

impl Sum {
    /// `parts` are weight, name in the logs, and reward.
    pub fn new(parts: Vec<(f64, String, Box<dyn Reward>)>, normalise: bool) -> Self {
        Sum { parts, normalise }
    }
}

impl Reward for Sum {
    fn name(&self) -> &str {
        "sum"
    }

    fn group(&self) -> usize {
        self.parts.iter().map(|(_, _, reward)| reward.group()).max().unwrap_or(1)
    }

    fn set_group(&mut self, pictures: usize) {
        self.parts.iter_mut().for_each(|(_, _, reward)| reward.set_group(pictures));
    }

    fn score(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Scores> {
        let ids: Vec<String> = (0..prompts.len()).map(|i| i.to_string()).collect();
        self.score_with_ids(images, prompts, &ids)
    }

    fn score_with_ids(&mut self, images: &Tensor, prompts: &[Prompt], ids: &[String]) -> Result<Scores> {
        let pending = self.begin(images, prompts, ids)?;
        self.collect(pending)
    }

    fn begin(&mut self, images: &Tensor, prompts: &[Prompt], ids: &[String]) -> Result<Pending> {
        let parts = self.parts.iter_mut().map(|(_, _, reward)| reward.begin(images, prompts, ids));
        Ok(Pending::Parts(parts.collect::<Result<_>>()?))
    }

    /// Each of its parts wants all pictures.
    fn begin_in_parts(
        &mut self,
        parts: &mut dyn Iterator<Item = Tensor>,
        prompts: &[Prompt],
        ids: &[String],
    ) -> Result<Pending> {
        self.begin(&whole(parts), prompts, ids)
    }

    /// Diagnostics: `part_<name>`, the part's rewards, and the part's own as `<name>_<diagnostic>`.
    fn collect(&mut self, pending: Pending) -> Result<Scores> {
        let Pending::Parts(pending) = pending else { bail!("sum: another reward's batch") };
        let mut sum = Vec::new();
        let mut scores = Scores::default();
        for ((weight, name, reward), pending) in self.parts.iter_mut().zip(pending) {
            let part = reward.collect(pending)?;
            sum.resize(part.rewards.len(), 0f64);
            sum.iter_mut().zip(&part.rewards).for_each(|(sum, &r)| *sum += *weight * f64::from(r));
            let own = part.diagnostics.into_iter().map(|(diagnostic, values)| (format!("{name}_{diagnostic}"), values));
            scores.diagnostics.push((format!("part_{name}"), part.rewards.clone()));
            scores.diagnostics.extend(own);
            if self.normalise {
                scores.parts.push(Part { weight: *weight, rewards: part.rewards });
            }
        }
        scores.rewards = sum.into_iter().map(|r| r as f32).collect();
        Ok(scores)
    }

    fn weight_bytes(&self) -> u64 {
        self.parts.iter().map(|(_, _, reward)| reward.weight_bytes()).sum()
    }

    fn check_objects(&self, objects: &[String], nameless: Option<&str>) -> Result<()> {
        let check = |(_, name, reward): &(f64, String, Box<dyn Reward>)| {
            reward.check_objects(objects, nameless).with_context(|| format!("part {name}"))
        };
        self.parts.iter().try_for_each(check)
    }

    fn check_size(&mut self, height: i64, width: i64) -> Result<()> {
        let check = |(_, name, reward): &mut (f64, String, Box<dyn Reward>)| {
            reward.check_size(height, width).with_context(|| format!("part {name}"))
        };
        self.parts.iter_mut().try_for_each(check)
    }

    /// A plain sum whose parts are all differentiable. What a normalised one is trained on depends on the whole batch.
    fn differentiable(&mut self) -> Option<&mut dyn DifferentiableReward> {
        let parts = self.parts.iter_mut().all(|(_, _, reward)| reward.differentiable().is_some());
        (parts && !self.normalise).then_some(self as &mut dyn DifferentiableReward)
    }
}

impl DifferentiableReward for Sum {
    fn rewards(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Tensor> {
        let mut sum = Tensor::zeros([prompts.len() as i64], (tch::Kind::Float, images.device()));
        for (weight, name, reward) in &mut self.parts {
            let part = reward.differentiable().with_context(|| format!("part {name} is not differentiable"))?;
            sum += part.rewards(images, prompts)? * *weight;
        }
        Ok(sum)
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::rewards::{colorfulness::Colorfulness, jpeg::JpegSize, testing};

    #[test]
    fn parts_are_weighted_and_shown() {
        let images = Tensor::rand([3, 3, 8, 8], (Kind::Float, Device::Cpu));
        let prompts = vec![Prompt::default(); 3];
        let color = Colorfulness.score(&images, &prompts).unwrap().rewards;
        let size = JpegSize::compressibility().score(&images, &prompts).unwrap().rewards;
        let parts = || -> Vec<(f64, String, Box<dyn Reward>)> {
            vec![
                (2.0, "color".into(), Box::new(Colorfulness)),
                (-0.5, "size".into(), Box::new(JpegSize::compressibility())),
            ]
        };
        let plain = Sum::new(parts(), false).score(&images, &prompts).unwrap();
        for i in 0..3 {
            let expected = 2.0 * f64::from(color[i]) - 0.5 * f64::from(size[i]);
            assert_eq!(plain.rewards[i], expected as f32);
        }
        assert!(plain.parts.is_empty());
        let names: Vec<&str> = plain.diagnostics.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["part_color", "color_colorfulness", "color_contrast", "part_size"]);
        let normalised = Sum::new(parts(), true).score(&images, &prompts).unwrap();
        assert_eq!(normalised.rewards, plain.rewards);
        assert_eq!(normalised.parts[1], Part { weight: -0.5, rewards: size });
    }

    #[test]
    fn it_is_differentiable_where_its_parts_are() {
        let sum = |other: Box<dyn Reward>, normalise| {
            let color: Box<dyn Reward> = Box::new(Colorfulness);
            Sum::new(vec![(2.0, "color".into(), color), (-0.5, "other".into(), other)], normalise)
        };
        let image = (Tensor::arange(3 * 8 * 8, (Kind::Float, Device::Cpu)) * 1.7).sin().view([1, 3, 8, 8]) * 0.4 + 0.5;
        let mut smooth = sum(Box::new(Colorfulness), false);
        testing::against_finite_differences(&mut smooth, &image, &Prompt::default());
        assert!(sum(Box::new(Colorfulness), true).differentiable().is_none());
        assert!(sum(Box::new(JpegSize::compressibility()), false).differentiable().is_none());
    }
}
