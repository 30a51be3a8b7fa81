//! How long an iteration takes on n ranks.
//!
//! An iteration is a row of sections: each rank works by itself, then all meet in a collective operation. With ℓ lanes
//! per rank the work of section s takes w_s(ℓ) = a_s + b_s·ℓ on average (a: what every rank does whatever its share, as
//! the optimizer's step) and varies over ranks with relative standard deviation c_s. The slowest of n ranks decides:
//!
//! T(n, ℓ) = Σ_s w_s(ℓ)·(1 + c_s·E_n) + t_s(n),
//!
//! where E_n is the expected maximum of n draws from N(0, 1) and t_s is what is seen of the operation: all of it (see
//! [`super::network`]), or where it goes on beside the last W seconds of the work, what is left after them, and the
//! slowing of the work meanwhile (the sums' kernels take a part of the GPU):
//!
//! t_s(n) = exposed(n) + slowdown·min(W, all of the sum).
//!
//! Where ranks always differ in the same way (a slow GPU is slow in every section) T is the same in expectation.

use serde::{Deserialize, Serialize};

use super::network::{Network, Sum};
use crate::comm::Operation;

/// Work up to a collective operation, and the operation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Section {
    pub operation: Operation,
    /// What each rank brings along, bytes.
    pub bytes: f64,
    /// a: seconds of work whatever the share.
    pub fixed_seconds: f64,
    /// b: seconds of work per lane.
    pub seconds_per_lane: f64,
    /// c: standard deviation of the work over ranks, as a part of the work.
    pub spread: f64,
    /// Of a sum that goes on while its gradients are made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlap: Option<Overlap>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Overlap {
    /// W: seconds at the end of the work, one lane's backward pass, in which gradients come evenly.
    pub window_seconds: f64,
    /// Bytes of a bucket on the wire.
    pub bucket_bytes: f64,
    /// By how much the work is slower while sums go on, as a part of it.
    pub slowdown: f64,
}

impl Section {
    /// t_s(n), seconds.
    fn seen(&self, network: &Network, sum: Sum, ranks: usize) -> f64 {
        let Some(Overlap { window_seconds: window, bucket_bytes, slowdown }) = self.overlap else {
            return network.seconds(self.operation, self.bytes, sum, ranks);
        };
        let all = network.exposed(self.bytes, bucket_bytes, 0.0, sum, ranks);
        network.exposed(self.bytes, bucket_bytes, window, sum, ranks) + slowdown * window.min(all)
    }
}

/// T(n, ℓ), seconds.
pub fn iteration_seconds(sections: &[Section], network: &Network, sum: Sum, ranks: usize, lanes_per_rank: f64) -> f64 {
    let slowest = expected_maximum(ranks);
    let of = |s: &Section| {
        let work = s.fixed_seconds + s.seconds_per_lane * lanes_per_rank;
        work * (1.0 + s.spread * slowest) + s.seen(network, sum, ranks)
    };
    sections.iter().map(of).sum()
}

/// E_n, the expected maximum of `n` draws from N(0, 1): ∫ x dΦ(x)^n.
pub fn expected_maximum(n: usize) -> f64 {
    const STEP: f64 = 1e-3;
    const END: f64 = 9.0;
    let density = |x: f64| (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt();
    let (mut phi, mut sum) = (0.0f64, 0.0);
    for i in 0..(2.0 * END / STEP) as usize {
        let x = -END + i as f64 * STEP;
        // Simpson's rule for the piece of Φ
        let next = phi + STEP / 6.0 * (density(x) + 4.0 * density(x + 0.5 * STEP) + density(x + STEP));
        sum += (x + 0.5 * STEP) * (next.powi(n as i32) - phi.powi(n as i32));
        phi = next;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Coordinates, Purpose};

    /// Closed forms for up to three draws; the others from Harter's tables of order statistics (1961), 5 digits.
    #[test]
    fn the_expected_maximum_is_that_of_the_tables() {
        let root_pi = std::f64::consts::PI.sqrt();
        let known = [(1, 0.0), (2, 1.0 / root_pi), (3, 1.5 / root_pi), (10, 1.53875), (100, 2.50759)];
        for (n, expected) in known {
            // 5e-7 is observed against the closed forms; the tables are rounded to 5e-6
            assert!((expected_maximum(n) - expected).abs() < 6e-6, "{n}: {}", expected_maximum(n));
        }
        assert!(expected_maximum(1024) > 3.2 && expected_maximum(1024) < 3.3);
    }

    fn section(operation: Operation, bytes: f64, fixed: f64, per_lane: f64, spread: f64) -> Section {
        Section { operation, bytes, fixed_seconds: fixed, seconds_per_lane: per_lane, spread, overlap: None }
    }

    /// Every rank of a simulated machine draws its work; the mean over iterations of the slowest ranks' sum meets T.
    #[test]
    fn stragglers_cost_what_a_simulation_costs() {
        let sections = [section(Operation::Sum, 1e6, 0.1, 0.2, 0.1), section(Operation::Gather, 100.0, 0.0, 0.3, 0.05)];
        let network = Network { latency: 1e-5, bandwidth: 1e9, node: None };
        let mut draws = Coordinates::new(1, Purpose::RandomReward).stream();
        for ranks in [2usize, 8, 64] {
            let repeats = 400;
            let mut normal = vec![0.0; repeats * ranks * sections.len()];
            draws.fill_normal(&mut normal);
            let mut simulated = 0.0;
            for (i, works) in normal.chunks(ranks).enumerate() {
                let s = &sections[i % sections.len()];
                let slowest = works.iter().fold(f64::MIN, |a, &z| a.max(1.0 + s.spread * f64::from(z)));
                simulated += slowest * (s.fixed_seconds + 2.0 * s.seconds_per_lane);
            }
            let alone: f64 = sections.iter().map(|s| network.seconds(s.operation, s.bytes, Sum::Halving, ranks)).sum();
            let expected = simulated / repeats as f64 + alone;
            let predicted = iteration_seconds(&sections, &network, Sum::Halving, ranks, 2.0);
            // 400 repeats leave a standard error of about 0.2 %
            assert!((predicted / expected - 1.0).abs() < 0.01, "{ranks} ranks: {predicted} against {expected}");
        }
    }

    #[test]
    fn one_rank_pays_for_nothing_but_work() {
        let mut sections = [section(Operation::Sum, 1e9, 0.5, 1.0, 0.3)];
        let network = Network { latency: 1.0, bandwidth: 1.0, node: None };
        for overlap in [None, Some(Overlap { window_seconds: 0.4, bucket_bytes: 1e6, slowdown: 0.5 })] {
            sections[0].overlap = overlap;
            for sum in [Sum::Halving, Sum::Ring, Sum::TwoLevels] {
                assert!((iteration_seconds(&sections, &network, sum, 1, 4.0) - 4.5).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn a_sum_beside_the_work_costs_what_is_left_of_it_and_what_it_takes_from_the_work() {
        // two ranks, ring: 2·1 s of latency and B/β a bucket; 4 buckets of 1 byte at 1 byte a second: 3 s each
        let network = Network { latency: 1.0, bandwidth: 1.0, node: None };
        let mut s = section(Operation::Sum, 4.0, 20.0, 0.0, 0.0);
        let seconds = |s: &Section| iteration_seconds(std::slice::from_ref(s), &network, Sum::Ring, 2, 1.0);
        // in one piece: 2 + 4
        assert!((seconds(&s) - 26.0).abs() < 1e-9);
        let overlap = |window_seconds, slowdown| Some(Overlap { window_seconds, bucket_bytes: 1.0, slowdown });
        s.overlap = overlap(0.0, 0.1);
        assert!((seconds(&s) - (20.0 + 12.0)).abs() < 1e-9, "{}", seconds(&s));
        // hidden but for the last bucket; 12 s of the work are a tenth slower
        s.overlap = overlap(16.0, 0.1);
        assert!((seconds(&s) - (20.0 + 3.0 + 1.2)).abs() < 1e-9, "{}", seconds(&s));
        // the sums begin after 2 of 8 s, and end at 14; the whole window is slower
        s.overlap = overlap(8.0, 0.1);
        assert!((seconds(&s) - (20.0 + 6.0 + 0.8)).abs() < 1e-9, "{}", seconds(&s));
    }

    #[test]
    fn a_model_without_overlap_is_read_as_before() {
        let text = r#"{"operation": "sum", "bytes": 8, "fixed_seconds": 0.1, "seconds_per_lane": 0.2, "spread": 0.0}"#;
        let old: Section = serde_json::from_str(text).unwrap();
        assert_eq!(old, section(Operation::Sum, 8.0, 0.1, 0.2, 0.0));
    }
}
