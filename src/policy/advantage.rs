//! Advantages: Â = (r − μ_r)/√(σ_r² + ε) over the whole batch of a task and an iteration (Eq. 10), clipped.
//!
//! The alternative, [`PromptStatistics`], takes μ_r and σ_r from a running buffer of each prompt's own rewards (DDPO).
//! σ_r² is the population variance. Rewards come gathered from all ranks in the order of the global sample index, so
//! every rank computes the same bits; sums are f64.
//!
//! A reward that is not finite is excluded from the statistics and marks its sample, whose advantage is NaN, as
//! excluded from the update. Departure from DDPO: its per-prompt statistics divide by σ + 1e-6, ours by √(σ² + ε) as
//! Eq. 10 does.

use anyhow::{ensure, Result};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

/// Settings of the normalisation; the default is the paper's, with the official code's clipping.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdvantageSettings {
    /// ε of Eq. 10, inside the square root.
    pub epsilon: f64,
    /// |Â| is at most this.
    pub clip: f64,
    /// The run stops where more than this share of a batch's rewards is not finite.
    pub max_bad_fraction: f64,
}

impl Default for AdvantageSettings {
    fn default() -> Self {
        AdvantageSettings { epsilon: 1e-8, clip: 10.0, max_bad_fraction: 0.1 }
    }
}

/// Advantages of a batch, in the order of its rewards.
#[derive(Clone, Debug, PartialEq)]
pub struct Advantages {
    /// Â; NaN where the sample is excluded.
    pub values: Vec<f32>,
    /// False where the reward was not finite.
    pub usable: Vec<bool>,
    /// Mean of the usable rewards of the batch.
    pub mean: f64,
    /// Their population standard deviation.
    pub std: f64,
    /// How many rewards were not finite.
    pub bad_count: usize,
    /// How many usable ones were compared with rewards that are all equal: their Â is 0, whatever they are.
    pub without_spread: usize,
}

impl Advantages {
    /// How many samples the update uses: the N that its loss is divided by.
    pub fn usable_count(&self) -> usize {
        self.values.len() - self.bad_count
    }

    /// Of the rewards.
    pub fn moments(&self) -> BatchMoments {
        BatchMoments { mean: self.mean, std: self.std, bad_count: self.bad_count }
    }

    /// The same advantages with mean and deviation of `rewards`: what the log shows where something else, a sum of
    /// normalised parts, was normalised.
    pub fn described_by(self, rewards: &[f32]) -> Self {
        let moments = Moments::of(rewards.iter().copied().filter(|reward| reward.is_finite()));
        Advantages { mean: moments.mean, std: moments.variance.sqrt(), ..self }
    }
}

/// A batch's rewards in short.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchMoments {
    /// Mean of the finite ones.
    pub mean: f64,
    /// Their population standard deviation.
    pub std: f64,
    /// How many are not finite.
    pub bad_count: usize,
}

/// Of a task's whole global batch.
///
/// # Errors
/// As [`normalise`].
pub fn batch_moments(rewards: &[f32], settings: &AdvantageSettings) -> Result<BatchMoments> {
    let moments = usable_moments(rewards, settings)?;
    let bad_count = rewards.iter().filter(|reward| !reward.is_finite()).count();
    Ok(BatchMoments { mean: moments.mean, std: moments.variance.sqrt(), bad_count })
}

/// Mean and population variance.
#[derive(Clone, Copy)]
struct Moments {
    mean: f64,
    variance: f64,
}

impl Moments {
    fn of(values: impl Iterator<Item = f32> + Clone) -> Self {
        let count = values.clone().count() as f64;
        let mean = values.clone().map(f64::from).sum::<f64>() / count;
        let variance = values.map(|value| (f64::from(value) - mean).powi(2)).sum::<f64>() / count;
        Moments { mean, variance }
    }

    /// Eq. 10, clipped.
    fn advantage(&self, reward: f32, settings: &AdvantageSettings) -> f32 {
        let advantage = (f64::from(reward) - self.mean) / (self.variance + settings.epsilon).sqrt();
        // 0/0 where all rewards are equal and ε = 0
        let advantage = if advantage.is_nan() { 0.0 } else { advantage };
        advantage.clamp(-settings.clip, settings.clip) as f32
    }
}

/// Eq. 10 over all of `rewards`, the whole global batch of one task.
///
/// # Errors
/// No rewards, or more than `max_bad_fraction` of them (or all) not finite.
pub fn normalise(rewards: &[f32], settings: &AdvantageSettings) -> Result<Advantages> {
    let batch = usable_moments(rewards, settings)?;
    Ok(assemble(rewards, settings, batch, |_| batch))
}

/// Σ w_i Â_i over the parts (weight, rewards of the whole batch) of a sum, with Â_i of Eq. 10 without clipping; not finite
/// where a part's reward is not.
///
/// # Errors
/// As [`normalise`], for any part; parts of different lengths.
pub fn weighted_sum(parts: &[(f64, Vec<f32>)], settings: &AdvantageSettings) -> Result<Vec<f32>> {
    let settings = AdvantageSettings { clip: f64::INFINITY, ..settings.clone() };
    let mut sum = vec![0f64; parts.first().map_or(0, |(_, rewards)| rewards.len())];
    for (weight, rewards) in parts {
        ensure!(rewards.len() == sum.len(), "parts of {} and {} rewards", sum.len(), rewards.len());
        let advantages = normalise(rewards, &settings)?.values;
        sum.iter_mut().zip(advantages).for_each(|(sum, advantage)| *sum += weight * f64::from(advantage));
    }
    Ok(sum.into_iter().map(|value| value as f32).collect())
}

/// Moments of the finite rewards, if they are enough.
fn usable_moments(rewards: &[f32], settings: &AdvantageSettings) -> Result<Moments> {
    ensure!(settings.clip > 0.0 && settings.epsilon >= 0.0, "advantage: clip must be positive, epsilon not negative");
    ensure!(!rewards.is_empty(), "there are no rewards to normalise");
    let usable = rewards.iter().copied().filter(|reward| reward.is_finite());
    let (total, bad) = (rewards.len(), rewards.len() - usable.clone().count());
    ensure!(
        bad < total && bad as f64 <= settings.max_bad_fraction * total as f64,
        "{bad} of {total} rewards are not finite, more than max_bad_fraction = {} allows",
        settings.max_bad_fraction
    );
    Ok(Moments::of(usable))
}

fn assemble(
    rewards: &[f32],
    settings: &AdvantageSettings,
    batch: Moments,
    moments_of: impl Fn(usize) -> Moments,
) -> Advantages {
    let usable: Vec<bool> = rewards.iter().map(|reward| reward.is_finite()).collect();
    let advantage = |(i, &reward): (usize, &f32)| match usable[i] {
        true => moments_of(i).advantage(reward, settings),
        false => f32::NAN,
    };
    let values = rewards.iter().enumerate().map(advantage).collect();
    let bad_count = usable.iter().filter(|&&usable| !usable).count();
    // exact: a mean of equal f32 in f64 is that number
    let without_spread = (0..usable.len()).filter(|&i| usable[i] && moments_of(i).variance == 0.0).count();
    Advantages { values, usable, mean: batch.mean, std: batch.variance.sqrt(), bad_count, without_spread }
}

/// Settings of the running statistics per prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PerPromptSettings {
    /// How many of a prompt's latest rewards are remembered.
    pub buffer_size: usize,
    /// With fewer remembered rewards than this a prompt is normalised by the whole batch.
    pub min_count: usize,
}

impl Default for PerPromptSettings {
    fn default() -> Self {
        PerPromptSettings { buffer_size: 32, min_count: 16 }
    }
}

/// The latest rewards of every prompt seen; part of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PromptStatistics {
    buffers: BTreeMap<String, VecDeque<f32>>,
}

impl PromptStatistics {
    /// Remembers the rewards, then normalises each by what is remembered of its prompt.
    ///
    /// `prompts` and `rewards` are the whole global batch in global order. `mean` and `std` of the result are those of
    /// the batch.
    ///
    /// # Errors
    /// As [`normalise`]; nothing is remembered then.
    pub fn normalise<S: AsRef<str>>(
        &mut self,
        prompts: &[S],
        rewards: &[f32],
        settings: &AdvantageSettings,
        per_prompt: &PerPromptSettings,
    ) -> Result<Advantages> {
        ensure!(prompts.len() == rewards.len(), "{} prompts for {} rewards", prompts.len(), rewards.len());
        ensure!(per_prompt.buffer_size > 0, "per_prompt.buffer_size must be at least 1");
        let batch = usable_moments(rewards, settings)?;
        for (prompt, &reward) in prompts.iter().zip(rewards).filter(|(_, reward)| reward.is_finite()) {
            self.remember(prompt.as_ref(), reward, per_prompt.buffer_size);
        }
        let long_enough = self.buffers.iter().filter(|(_, buffer)| buffer.len() >= per_prompt.min_count.max(1));
        let moments: BTreeMap<&str, Moments> =
            long_enough.map(|(prompt, buffer)| (prompt.as_str(), Moments::of(buffer.iter().copied()))).collect();
        let moments_of = |i: usize| moments.get(prompts[i].as_ref()).copied().unwrap_or(batch);
        Ok(assemble(rewards, settings, batch, moments_of))
    }

    fn remember(&mut self, prompt: &str, reward: f32, buffer_size: usize) {
        if !self.buffers.contains_key(prompt) {
            self.buffers.insert(prompt.to_owned(), VecDeque::new());
        }
        let Some(buffer) = self.buffers.get_mut(prompt) else { return };
        buffer.push_back(reward);
        while buffer.len() > buffer_size {
            buffer.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> AdvantageSettings {
        AdvantageSettings::default()
    }

    #[test]
    fn hand_computed_batch() {
        let ours = normalise(&[1.0, 2.0, 3.0, 6.0], &settings()).unwrap();
        assert_eq!((ours.mean, ours.std, ours.bad_count), (3.0, 3.5f64.sqrt(), 0));
        for (value, deviation) in ours.values.iter().zip([-2.0, -1.0, 0.0, 3.0]) {
            // one rounding to f32
            assert!((f64::from(*value) - deviation / (3.5f64 + 1e-8).sqrt()).abs() < 1e-7);
        }
    }

    #[test]
    fn equal_rewards_give_zero_even_without_epsilon() {
        for epsilon in [1e-8, 0.0] {
            for reward in [0.1, 3e30, 0.0] {
                let ours = normalise(&[reward; 13], &AdvantageSettings { epsilon, ..settings() }).unwrap();
                assert_eq!(ours.values, [0.0; 13], "reward {reward}");
                assert_eq!((ours.without_spread, ours.std), (13, 0.0), "reward {reward}");
            }
        }
        let generous = AdvantageSettings { max_bad_fraction: 0.5, ..settings() };
        assert_eq!(normalise(&[0.1, f32::NAN, 0.1], &generous).unwrap().without_spread, 2);
        assert_eq!(normalise(&[0.1, 0.1, 0.1 + 1e-8], &settings()).unwrap().without_spread, 0);
    }

    #[test]
    fn bad_rewards_are_left_out_of_the_statistics_and_marked() {
        let clean = normalise(&[1.0, 2.0, 3.0, 6.0], &settings()).unwrap();
        let generous = AdvantageSettings { max_bad_fraction: 0.5, ..settings() };
        let ours = normalise(&[1.0, f32::NAN, 2.0, 3.0, f32::INFINITY, 6.0], &generous).unwrap();
        assert_eq!((ours.mean, ours.std, ours.bad_count, ours.usable_count()), (clean.mean, clean.std, 2, 4));
        assert_eq!(ours.usable, [true, false, true, true, false, true]);
        assert!(ours.values[1].is_nan() && ours.values[4].is_nan());
        let kept: Vec<f32> = ours.values.into_iter().filter(|v| !v.is_nan()).collect();
        assert_eq!(kept, clean.values);
    }

    #[test]
    fn too_many_bad_rewards_stop_the_run() {
        let rewards = [1.0, 2.0, f32::NAN, 3.0];
        assert!(normalise(&rewards, &AdvantageSettings { max_bad_fraction: 0.25, ..settings() }).is_ok());
        let error = normalise(&rewards, &AdvantageSettings { max_bad_fraction: 0.2, ..settings() }).unwrap_err();
        assert!(error.to_string().contains("1 of 4 rewards"), "{error}");
        assert!(normalise(&[f32::NAN; 3], &AdvantageSettings { max_bad_fraction: 1.0, ..settings() }).is_err());
        assert!(normalise(&[], &settings()).is_err());
    }

    #[test]
    fn outliers_are_clipped() {
        let mut rewards = vec![0.0; 2047];
        rewards.push(1.0);
        assert_eq!(normalise(&rewards, &settings()).unwrap().values[2047], 10.0);
    }

    #[test]
    fn prompts_are_normalised_by_their_own_buffers_once_these_are_long_enough() {
        let per_prompt = PerPromptSettings { buffer_size: 3, min_count: 2 };
        let mut statistics = PromptStatistics::default();
        let prompts = ["easy", "easy", "hard", "rare"];
        let first = statistics.normalise(&prompts, &[8.0, 10.0, 1.0, 5.0], &settings(), &per_prompt).unwrap();
        let batch = normalise(&[8.0, 10.0, 1.0, 5.0], &settings()).unwrap();
        assert_eq!(first.values[..2], [-1.0, 1.0]);
        assert_eq!(first.values[2..], batch.values[2..]);
        assert_eq!((first.mean, first.std), (batch.mean, batch.std));
        // "easy" now remembers 10, 6, 8 (the 8 of the first batch is gone), "hard" 1, 3
        let second =
            statistics.normalise(&["easy", "easy", "hard"], &[6.0, 8.0, 3.0], &settings(), &per_prompt).unwrap();
        let buffer = normalise(&[10.0, 6.0, 8.0], &settings()).unwrap();
        assert_eq!(second.values, [buffer.values[1], 0.0, 1.0]);
        assert_eq!(second.without_spread, 0);
        // a prompt whose own rewards are all equal, whatever the batch's are
        let third =
            statistics.normalise(&["same", "same", "easy"], &[2.0, 2.0, 9.0], &settings(), &per_prompt).unwrap();
        assert_eq!((third.without_spread, &third.values[..2]), (2, &[0.0, 0.0][..]));
    }

    #[test]
    fn prompt_statistics_survive_a_checkpoint_and_ignore_bad_rewards() {
        let (per_prompt, generous) =
            (PerPromptSettings::default(), AdvantageSettings { max_bad_fraction: 0.5, ..settings() });
        let mut statistics = PromptStatistics::default();
        let ours = statistics.normalise(&["a", "a", "b"], &[0.1, f32::NAN, 2.0], &generous, &per_prompt).unwrap();
        assert_eq!(ours.usable, [true, false, true]);
        let text = serde_json::to_string(&statistics).unwrap();
        assert_eq!(text, r#"{"buffers":{"a":[0.1],"b":[2.0]}}"#);
        assert_eq!(serde_json::from_str::<PromptStatistics>(&text).unwrap(), statistics);
        let before = statistics.clone();
        assert!(statistics.normalise(&["a", "b"], &[f32::NAN; 2], &generous, &per_prompt).is_err());
        assert_eq!(statistics, before);
    }

    /// By hand: parts (1, 2, 3) and (10, 10, 40) have Â = (−1.2247, 0, 1.2247) and (−0.7071, −0.7071, 1.4142).
    #[test]
    fn parts_of_a_sum_are_normalised_each_by_itself() {
        let settings = AdvantageSettings { epsilon: 0.0, max_bad_fraction: 0.5, ..AdvantageSettings::default() };
        let parts =
            |scale: f32| vec![(2.0, vec![1.0, 2.0, 3.0]), (-1.0, [10.0, 10.0, 40.0].map(|r| r * scale).to_vec())];
        let (a, b) = (1.5f64.sqrt(), 0.5f64.sqrt());
        let expected = [-2.0 * a + b, b, 2.0 * a - 2.0 * b];
        for scale in [1.0, 1e6] {
            let sum = weighted_sum(&parts(scale), &settings).unwrap();
            // Â and the sum are rounded to f32, 1e-7 of about 2 each
            let close = sum.iter().zip(expected).all(|(&s, e)| (f64::from(s) - e).abs() < 1e-6);
            assert!(close, "{sum:?} instead of {expected:?}");
        }
        let bad = vec![(1.0, vec![1.0, f32::NAN, 3.0]), (1.0, vec![1.0, 2.0, 3.0])];
        let sum = weighted_sum(&bad, &settings).unwrap();
        assert!(sum[0].is_finite() && sum[1].is_nan() && sum[2].is_finite());
        assert!(weighted_sum(&[(1.0, vec![1.0]), (1.0, vec![1.0, 2.0])], &settings).is_err());
        let described = normalise(&sum, &settings).unwrap().described_by(&[1.0, f32::NAN, 5.0]);
        assert_eq!((described.mean, described.std), (3.0, 2.0));
    }
}
