//! Collects the numbers of one iteration on this rank, and merges them over ranks.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::{
    comm::Communicator,
    config::Config,
    models::flops,
    policy::{advantage::Advantages, surrogate::Diagnostics},
    rewards::Scores,
    telemetry::{names, Metrics},
};

/// Stages whose forward passes are followed by a backward pass of twice the cost.
const WITH_BACKWARD: [&str; 2] = ["update", "pretrain"];

/// Sums that ranks add up; everything else is the same on all ranks.
#[derive(Default, Serialize, Deserialize)]
struct Sums {
    /// By metric: sum and count.
    means: BTreeMap<String, (f64, f64)>,
    /// By metric: largest value. Infinite ones as strings would not survive JSON, so they travel as bits.
    maxima: BTreeMap<String, u64>,
    flops: f64,
}

impl Sums {
    fn add(&mut self, name: String, sum: f64, count: f64) {
        let entry = self.means.entry(name).or_default();
        entry.0 += sum;
        entry.1 += count;
    }

    fn maximum(&mut self, name: String, value: f64) {
        let entry = self.maxima.entry(name).or_insert(value.to_bits());
        *entry = f64::from_bits(*entry).max(value).to_bits();
    }
}

pub struct IterationLog {
    started: Instant,
    /// The same on all ranks, in order of appearance.
    common: Metrics,
    gradient_norms: Vec<f64>,
    bad_rewards: usize,
    sums: Sums,
    seconds: BTreeMap<&'static str, Duration>,
    flops_before: u64,
}

impl IterationLog {
    pub fn new(iteration: u64) -> Self {
        IterationLog {
            started: Instant::now(),
            common: Metrics::new(iteration),
            gradient_norms: Vec::new(),
            bad_rewards: 0,
            sums: Sums::default(),
            seconds: BTreeMap::new(),
            flops_before: flops::counted(),
        }
    }

    /// Ends a stage that began at `started`.
    pub fn spent(&mut self, stage: &'static str, started: Instant) {
        *self.seconds.entry(stage).or_default() += started.elapsed();
        let forward = (flops::counted() - self.flops_before) as f64;
        self.sums.flops += forward * if WITH_BACKWARD.contains(&stage) { 3.0 } else { 1.0 };
        self.flops_before = flops::counted();
    }

    pub fn diagnostics(&mut self, task: &str, scores: &Scores) {
        for (name, values) in &scores.diagnostics {
            let sum: f64 = values.iter().map(|&v| f64::from(v)).sum();
            self.sums.add(names::of_task(task, name), sum, values.len() as f64);
        }
    }

    pub fn rewards(&mut self, task: &str, advantages: &Advantages, total: usize) {
        self.common.set(names::reward_mean(task), advantages.mean);
        self.common.set(names::reward_std(task), advantages.std);
        self.common.set(names::of_task(task, "bad_reward_share"), advantages.bad_count as f64 / total as f64);
        self.bad_rewards += advantages.bad_count;
    }

    pub fn update(&mut self, task: &str, t: i64, first_pass: bool, seen: &Diagnostics, gradient_norm: f64) {
        let count = seen.samples as f64;
        for name in [names::CLIP_FRACTION.to_string(), names::of_task(task, names::CLIP_FRACTION)] {
            self.sums.add(name, seen.clipped as f64, count);
        }
        self.sums.add(names::APPROX_KL.to_string(), seen.kl_sum, count);
        self.sums.add(names::of_task(task, "loss"), seen.loss_sum, count);
        if first_pass {
            self.sums.maximum(names::RATIO_DRIFT.to_string(), seen.ratio_drift);
            self.sums.maximum(format!("{}/t{t}", names::RATIO_DRIFT), seen.ratio_drift);
        }
        self.gradient_norms.push(gradient_norm);
        self.common.set(format!("{task}/{}/t{t}", names::GRADIENT_NORM), gradient_norm);
    }

    /// `sum` of the mean losses of `lanes` lanes.
    pub fn pretraining(&mut self, sum: f64, lanes: usize) {
        self.sums.add(names::PRETRAINING_LOSS.to_string(), sum, lanes as f64);
    }

    /// The iteration's metrics, the same on every rank but for rank-local seconds (a collective call).
    pub fn finish(mut self, comm: &dyn Communicator, config: &Config) -> Result<Metrics> {
        let mut total = Sums::default();
        for bytes in comm.all_gather_bytes(&serde_json::to_vec(&self.sums)?)? {
            let part: Sums = serde_json::from_slice(&bytes)?;
            for (name, (sum, count)) in part.means {
                total.add(name, sum, count);
            }
            for (name, bits) in part.maxima {
                total.maximum(name, f64::from_bits(bits));
            }
            total.flops += part.flops;
        }
        for (name, (sum, count)) in total.means {
            self.common.set(name, sum / count);
        }
        for (name, bits) in total.maxima {
            self.common.set(name, f64::from_bits(bits));
        }
        let norms = &self.gradient_norms;
        self.common.set(names::GRADIENT_NORM, norms.iter().sum::<f64>() / norms.len() as f64);
        self.common.set(names::BAD_REWARDS, self.bad_rewards as f64);
        for (stage, duration) in &self.seconds {
            self.common.set(names::seconds(stage), duration.as_secs_f64());
        }
        let seconds = self.started.elapsed().as_secs_f64();
        let samples: usize = config.trained_tasks().map(|(_, t)| t.samples).sum();
        self.common.set(names::SECONDS, seconds);
        self.common.set(names::SAMPLES_PER_SECOND, samples as f64 / seconds);
        self.common.set(names::TFLOPS, total.flops / seconds / 1e12);
        Ok(self.common)
    }
}
