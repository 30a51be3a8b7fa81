//! Means with confidence intervals over seeds and prompts.

use serde::{Deserialize, Serialize};

use crate::{
    percentiles,
    random::{Coordinates, Purpose, Stream},
    telemetry::number,
};

/// A value with its 95 % confidence interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    #[serde(with = "number")]
    pub value: f64,
    #[serde(with = "number")]
    pub low: f64,
    #[serde(with = "number")]
    pub high: f64,
}

/// A model's values: by seed, a value for each prompt; prompts are the same for all seeds and models.
pub type BySeed = Vec<Vec<f64>>;

/// Draws of seeds and prompts with replacement (a bootstrap in both directions): the same prompts in all quantities that one
/// draw gives, so that what is common to models cancels in differences and ratios.
///
/// With few seeds, two say, the part of the interval that comes from the seeds is an estimate from few numbers.
pub struct Resampling {
    draws: Vec<Draw>,
}

struct Draw {
    seeds: Vec<usize>,
    /// Of each set.
    prompts: Vec<Vec<usize>>,
}

impl Resampling {
    pub fn new(seeds: usize, prompts: usize, draws: usize) -> Self {
        Resampling::over_sets(seeds, &[prompts], draws)
    }

    /// For quantities over several sets of prompts, with so many prompts each; every set is drawn from by itself.
    pub fn over_sets(seeds: usize, prompts: &[usize], draws: usize) -> Self {
        let mut stream = Coordinates::new(1, Purpose::Resampling).stream();
        let some = |count: usize, stream: &mut Stream| -> Vec<usize> {
            (0..count).map(|_| stream.below(count as u64) as usize).collect()
        };
        let draw = |_| Draw {
            seeds: some(seeds, &mut stream),
            prompts: prompts.iter().map(|&count| some(count, &mut stream)).collect(),
        };
        Resampling { draws: (0..draws).map(draw).collect() }
    }

    /// The interval of `quantity`, which is given the mean of each of `models` (those with one seed only, as a base model,
    /// are the same in every draw of seeds). Values that are no numbers are left out of means.
    pub fn interval(&self, models: &[&BySeed], quantity: impl Fn(&[f64]) -> f64) -> Interval {
        self.interval_over_sets(&models.iter().map(|model| (0, *model)).collect::<Vec<_>>(), quantity)
    }

    /// The same of models with the number of the set that each one's values belong to.
    pub fn interval_over_sets(&self, models: &[(usize, &BySeed)], quantity: impl Fn(&[f64]) -> f64) -> Interval {
        let of = |pick: &dyn Fn(usize, &BySeed) -> f64| {
            quantity(&models.iter().map(|&(set, model)| pick(set, model)).collect::<Vec<_>>())
        };
        let value = of(&|_, model| mean(model.iter().flatten().copied()));
        let values: Vec<f64> = self
            .draws
            .iter()
            .map(|draw| {
                of(&|set, model: &BySeed| {
                    let seeds = draw.seeds.iter().map(|seed| &model[seed % model.len()]);
                    mean(seeds.flat_map(|prompts| draw.prompts[set].iter().map(|&prompt| prompts[prompt])))
                })
            })
            .filter(|value| !value.is_nan())
            .collect();
        let (low, high) = percentiles::of_95(values);
        Interval { value, low, high }
    }
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.filter(|v| v.is_finite()).fold((0.0, 0.0), |(sum, count), v| (sum + v, count + 1.0));
    sum / count
}

impl Interval {
    /// `+0.0712 [0.0521, 0.0913]`.
    pub fn text(&self, signed: bool) -> String {
        let value = if signed { format!("{:+.4}", self.value) } else { format!("{:.4}", self.value) };
        format!("{value} [{:.4}, {:.4}]", self.low, self.high)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 400 prompts of a known spread: the interval of a mean is ±1.96·σ/√n.
    #[test]
    fn the_interval_of_a_mean_is_the_normal_one() {
        let mut values = vec![0f32; 400];
        Coordinates::new(5, Purpose::Sample).stream().fill_normal(&mut values);
        let model: BySeed = vec![values.iter().map(|&v| f64::from(v)).collect()];
        let resampling = Resampling::new(1, 400, 4000);
        let interval = resampling.interval(&[&model], |means| means[0]);
        let mean = model[0].iter().sum::<f64>() / 400.0;
        let deviation = (model[0].iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 400.0).sqrt();
        assert!((interval.value - mean).abs() < 1e-12);
        let half = 1.96 * deviation / 20.0;
        // quantiles of 4000 draws: observed within 4 %
        for (found, expected) in [(interval.low, mean - half), (interval.high, mean + half)] {
            assert!((found - expected).abs() < 0.1 * half, "{found} instead of {expected}");
        }
        let twice = Resampling::new(1, 400, 4000).interval(&[&model], |means| means[0]);
        assert_eq!(interval, twice);
    }

    /// Two sets of known spread and different sizes: variances of their means add.
    #[test]
    fn the_interval_of_a_mean_over_sets() {
        let set = |count: usize| -> BySeed { vec![(0..count).map(|i| (i % 2) as f64).collect()] };
        let (small, large) = (set(100), set(400));
        let resampling = Resampling::over_sets(1, &[100, 400], 4000);
        let found = resampling.interval_over_sets(&[(0, &small), (1, &large)], |means| means.iter().sum::<f64>() / 2.0);
        // a coin's deviation is 1/2; ±1.96·√(0.25/100 + 0.25/400)/2
        let half = 1.96 * (0.25f64 / 100.0 + 0.25 / 400.0).sqrt() / 2.0;
        assert!((found.value - 0.5).abs() < 1e-12);
        for (found, expected) in [(found.low, 0.5 - half), (found.high, 0.5 + half)] {
            assert!((found - expected).abs() < 0.1 * half, "{found} instead of {expected}");
        }
    }

    #[test]
    fn what_is_common_cancels_and_seeds_widen() {
        let base: BySeed = vec![(0..50).map(f64::from).collect()];
        let shifted = |by: f64| -> Vec<f64> { base[0].iter().map(|v| v + by).collect() };
        let resampling = Resampling::new(2, 50, 500);
        let difference = |means: &[f64]| means[0] - means[1];
        let same = vec![shifted(2.0), shifted(2.0)];
        let found = resampling.interval(&[&same, &base], difference);
        // sums of other orders
        assert!((found.low - 2.0).abs() < 1e-9 && (found.high - 2.0).abs() < 1e-9, "{found:?}");
        let apart = vec![shifted(1.0), shifted(3.0)];
        let found = resampling.interval(&[&apart, &base], difference);
        assert!((found.value - 2.0).abs() < 1e-9 && (found.low - 1.0).abs() < 1e-9 && (found.high - 3.0).abs() < 1e-9);
        let broken = vec![vec![1.0, f64::NAN], vec![3.0, 3.0]];
        assert_eq!(Resampling::new(2, 2, 100).interval(&[&broken], |means| means[0]).value, 7.0 / 3.0);
        let none = Resampling::new(1, 1, 100).interval(&[&vec![vec![f64::NAN]]], |means| means[0]);
        assert!(none.low.is_nan());
        assert_eq!(Interval { value: 0.5, low: 0.25, high: 1.0 }.text(true), "+0.5000 [0.2500, 1.0000]");
    }
}
