//! The control: a reward that says nothing. Whatever improves under it did not improve because of a reward.

use anyhow::Result;
use tch::{Kind, Tensor};

use super::{check_batch, Reward, Scores};
use crate::prompts::Prompt;
use crate::random::{Coordinates, Purpose};

/// N(0, 1), independent of what a picture shows: a pure function of (seed, task, the bits of the picture). It keeps
/// no count of calls, so that it is the same on any number of ranks and after a resume.
#[derive(Clone, Debug)]
pub struct RandomReward {
    seed: u64,
    task: u8,
}

impl RandomReward {
    pub fn new(seed: u64, task: u8) -> Self {
        RandomReward { seed, task }
    }
}

impl Reward for RandomReward {
    fn name(&self) -> &str {
        "random"
    }

    fn score(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Scores> {
        let n = check_batch(images, prompts)?;
        let values: Vec<f32> = Vec::try_from(images.to_kind(Kind::Float).contiguous().flatten(0, -1))?;
        let rewards = values
            .chunks((values.len() / n.max(1)).max(1))
            .map(|picture| {
                let hash = fnv1a(picture);
                let at = Coordinates {
                    iteration: (hash >> 32) as u32,
                    sample: hash as u32,
                    task: self.task,
                    ..Coordinates::new(self.seed, Purpose::RandomReward)
                };
                let mut number = [0f32];
                at.stream().fill_normal(&mut number);
                number[0]
            })
            .collect();
        Ok(Scores { rewards, ..Scores::default() })
    }
}

/// 64-bit FNV-1a over the bits of the values.
fn fnv1a(values: &[f32]) -> u64 {
    values
        .iter()
        .flat_map(|value| value.to_bits().to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::normal_rows;

    #[test]
    fn fnv1a_known_answer() {
        // the four bytes "foob" as one little-endian word; published FNV-1a test vector
        assert_eq!(fnv1a(&[f32::from_bits(u32::from_le_bytes(*b"foob"))]), 0xdd12_0e79_0c25_12af);
    }

    #[test]
    fn standard_normal_and_reproducible_however_the_batch_is_cut() {
        let n = 4096usize;
        let images = normal_rows(Coordinates::new(1, Purpose::InitialLatent), 0, n, &[3, 4, 4]).sigmoid();
        let prompts = vec![Prompt::default(); n];
        let whole = RandomReward::new(5, 0).score(&images, &prompts).unwrap().rewards;
        let tail = RandomReward::new(5, 0).score(&images.narrow(0, 4000, 96), &prompts[4000..]).unwrap().rewards;
        assert_eq!(whole[4000..], tail);
        assert_ne!(whole, RandomReward::new(6, 0).score(&images, &prompts).unwrap().rewards);
        assert_ne!(whole, RandomReward::new(5, 1).score(&images, &prompts).unwrap().rewards);

        // five standard errors of the mean and of the variance
        let mean = whole.iter().map(|&v| f64::from(v)).sum::<f64>() / n as f64;
        let variance = whole.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n as f64;
        assert!(mean.abs() < 5.0 / (n as f64).sqrt(), "mean {mean}");
        assert!((variance - 1.0).abs() < 5.0 * (2.0 / n as f64).sqrt(), "variance {variance}");
    }
}
