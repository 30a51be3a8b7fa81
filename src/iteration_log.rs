//! Collects the numbers of one iteration on this rank, and merges them over ranks.
//!
//! Sums are kept per lane and added in the order of the lanes, so that what is logged has the same bits at every number
//! of ranks.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tch::Device;

use crate::{
    comm::Communicator,
    config::Config,
    device,
    models::flops,
    policy::{advantage::BatchMoments, surrogate::Diagnostics},
    rewards::Scores,
    stragglers::StageSeconds,
    telemetry::{names, number, Metrics},
    watch,
};

/// Stages whose forward passes are followed by a backward pass of twice the cost.
const WITH_BACKWARD: [&str; 2] = ["update", "pretrain"];

/// A number on its way between ranks; also those that JSON lacks, which a broken reward or ratio brings.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct Number(#[serde(with = "number")] f64);

/// What is to be merged over lanes; everything else is the same on all ranks.
#[derive(Default, Serialize, Deserialize)]
struct Sums {
    /// By metric: sum and count.
    means: BTreeMap<String, (Number, usize)>,
    /// By metric: largest value.
    maxima: BTreeMap<String, Number>,
}

impl Sums {
    fn add(&mut self, name: String, sum: f64, count: usize) {
        let entry = self.means.entry(name).or_default();
        entry.0 .0 += sum;
        entry.1 += count;
    }

    fn maximum(&mut self, name: String, value: f64) {
        let entry = self.maxima.entry(name).or_insert(Number(value));
        entry.0 = entry.0.max(value);
    }

    fn merge(&mut self, other: Sums) {
        for (name, (sum, count)) in other.means {
            self.add(name, sum.0, count);
        }
        for (name, value) in other.maxima {
            self.maximum(name, value.0);
        }
    }
}

/// One rank's part.
#[derive(Default, Serialize, Deserialize)]
struct Part {
    /// By lane.
    lanes: BTreeMap<usize, Sums>,
    flops: u64,
    /// Of own work, without waiting for other ranks.
    seconds: StageSeconds,
}

pub struct IterationLog {
    started: Instant,
    device: Device,
    /// The same on all ranks, in order of appearance.
    common: Metrics,
    gradient_norms: Vec<f64>,
    bad_rewards: usize,
    part: Part,
    seconds: BTreeMap<&'static str, Duration>,
    flops_before: u64,
    waited_before: Duration,
}

impl IterationLog {
    pub fn new(iteration: u64, device: Device) -> Self {
        IterationLog {
            started: Instant::now(),
            device,
            common: Metrics::new(iteration),
            gradient_norms: Vec::new(),
            bad_rewards: 0,
            part: Part::default(),
            seconds: BTreeMap::new(),
            flops_before: flops::counted(),
            waited_before: watch::waited(),
        }
    }

    /// Ends a stage that began at `started`. A GPU works behind the program: its part of the stage is waited for.
    pub fn spent(&mut self, stage: &'static str, started: Instant) {
        if let Device::Cuda(index) = self.device {
            // an error of the GPU comes out again at the next operation that can report it
            let _ = device::synchronize(index);
        }
        let (elapsed, waited) = (started.elapsed(), watch::waited());
        *self.seconds.entry(stage).or_default() += elapsed;
        let own = elapsed.saturating_sub(waited - self.waited_before).as_secs_f64();
        *self.part.seconds.entry(stage.to_string()).or_default() += own;
        self.waited_before = waited;
        let forward = flops::counted() - self.flops_before;
        self.part.flops += forward * if WITH_BACKWARD.contains(&stage) { 3 } else { 1 };
        self.flops_before = flops::counted();
    }

    fn lane(&mut self, lane: usize) -> &mut Sums {
        self.part.lanes.entry(lane).or_default()
    }

    pub fn diagnostics(&mut self, task: &str, lane: usize, scores: &Scores) {
        for (name, values) in &scores.diagnostics {
            let sum: f64 = values.iter().map(|&v| f64::from(v)).sum();
            self.lane(lane).add(names::of_task(task, name), sum, values.len());
        }
    }

    /// A task's rewards over its global batch of `total` samples.
    pub fn rewards(&mut self, task: &str, batch: &BatchMoments, total: usize) {
        self.common.set(names::reward_mean(task), batch.mean);
        self.common.set(names::reward_std(task), batch.std);
        self.common.set(names::of_task(task, "bad_reward_share"), batch.bad_count as f64 / total as f64);
        self.bad_rewards += batch.bad_count;
    }

    /// Any number of a task that is a mean over samples: the sum over `count` of a lane's.
    pub fn task_mean(&mut self, task: &str, name: &str, lane: usize, sum: f64, count: usize) {
        self.lane(lane).add(names::of_task(task, name), sum, count);
    }

    /// Any number of a task that is the same on all ranks.
    pub fn of_task(&mut self, task: &str, name: &str, value: f64) {
        self.common.set(names::of_task(task, name), value);
    }

    /// The norm of an optimizer step's gradient.
    pub fn norm(&mut self, gradient_norm: f64) {
        self.gradient_norms.push(gradient_norm);
    }

    /// What a lane saw in the pass over timestep `t`.
    pub fn objective(&mut self, task: &str, lane: usize, t: i64, first_pass: bool, seen: &Diagnostics) {
        let sums = self.lane(lane);
        for name in [names::CLIP_FRACTION.to_string(), names::of_task(task, names::CLIP_FRACTION)] {
            sums.add(name, seen.clipped as f64, seen.samples);
        }
        sums.add(names::APPROX_KL.to_string(), seen.kl_sum, seen.samples);
        sums.add(names::of_task(task, "loss"), seen.loss_sum, seen.samples);
        if first_pass {
            sums.maximum(names::RATIO_DRIFT.to_string(), seen.ratio_drift);
            sums.maximum(format!("{}/t{t}", names::RATIO_DRIFT), seen.ratio_drift);
        }
    }

    /// The optimizer step of that pass.
    pub fn step(&mut self, task: &str, t: i64, gradient_norm: f64) {
        self.norm(gradient_norm);
        self.common.set(format!("{task}/{}/t{t}", names::GRADIENT_NORM), gradient_norm);
    }

    /// A lane's mean loss of one pretraining step.
    pub fn pretraining(&mut self, lane: usize, loss: f64) {
        self.lane(lane).add(names::PRETRAINING_LOSS.to_string(), loss, 1);
    }

    /// The iteration's metrics, the same on every rank but for rank-local seconds, and the seconds of own work of all
    /// ranks in rank order (a collective call).
    pub fn finish(mut self, comm: &dyn Communicator, config: &Config) -> Result<(Metrics, Vec<StageSeconds>)> {
        let (total, flops, stage_seconds) = merge(&comm.all_gather_bytes(&serde_json::to_vec(&self.part)?)?)?;
        for (name, (sum, count)) in total.means {
            self.common.set(name, sum.0 / count as f64);
        }
        for (name, value) in total.maxima {
            self.common.set(name, value.0);
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
        self.common.set(names::TFLOPS, flops as f64 / seconds / 1e12);
        Ok((self.common, stage_seconds))
    }
}

/// Sums of all lanes, floating-point operations of all ranks and seconds of each, from their parts in rank order.
fn merge(parts: &[Vec<u8>]) -> Result<(Sums, u64, Vec<StageSeconds>)> {
    let (mut total, mut flops, mut seconds) = (Sums::default(), 0, Vec::with_capacity(parts.len()));
    for bytes in parts {
        // ranks hold consecutive lanes: rank order is lane order
        let part: Part = serde_json::from_slice(bytes).context("metrics of another rank")?;
        part.lanes.into_values().for_each(|lane| total.merge(lane));
        flops += part.flops;
        seconds.push(part.seconds);
    }
    Ok((total, flops, seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums over `values` (one per lane) on `ranks` ranks.
    fn merged(values: &[f64], ranks: usize) -> (f64, usize, f64) {
        let part_of = |rank: usize| {
            let mut part = Part { flops: 1, ..Part::default() };
            let per_rank = values.len() / ranks;
            for (lane, &value) in values.iter().enumerate().skip(rank * per_rank).take(per_rank) {
                let sums = part.lanes.entry(lane).or_default();
                sums.add("kl".into(), value, 1);
                sums.maximum("drift".into(), value);
            }
            serde_json::to_vec(&part).unwrap()
        };
        let (total, flops, _) = merge(&(0..ranks).map(part_of).collect::<Vec<_>>()).unwrap();
        assert_eq!(flops, ranks as u64);
        let (sum, count) = total.means["kl"];
        (sum.0, count, total.maxima["drift"].0)
    }

    #[test]
    fn sums_have_the_same_bits_at_every_number_of_ranks() {
        let values: Vec<f64> = (0..12).map(|i| 0.1 + 1e-3 / f64::from(i + 3)).collect();
        // one sum per rank, as a rank would form it by itself, has other bits: the lanes must travel
        let of_ranks: f64 = values.chunks(6).map(|half| half.iter().sum::<f64>()).sum();
        assert_ne!(of_ranks, merged(&values, 1).0);
        for ranks in [2, 3, 4, 12] {
            assert_eq!(merged(&values, ranks), merged(&values, 1), "{ranks} ranks");
        }
    }

    #[test]
    fn broken_numbers_travel() {
        let (sum, count, largest) = merged(&[1.0, f64::NAN, f64::INFINITY, 2.0], 2);
        assert!(sum.is_nan());
        assert_eq!((count, largest), (4, f64::INFINITY));
    }
}
