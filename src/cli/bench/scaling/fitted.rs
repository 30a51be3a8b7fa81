//! The model of a machine and a recipe, from measurements.

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};

use super::{
    measurement::{MeasuredSection, Measurement},
    model::{Overlap, Section},
    network::{fit, fit_between, Network, Node, Sum},
};

/// A machine and a recipe: all that a prediction needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Where the numbers are from.
    pub origin: String,
    /// Lanes of the batch that ranks share (strong scaling).
    pub lanes: usize,
    /// Lanes of each rank where the batch grows (weak scaling).
    pub lanes_per_rank: usize,
    pub network: Network,
    pub sections: Vec<Section>,
}

/// Work from one rank, which no other disturbs; spread and network from the smallest number of ranks above one.
pub fn model_of(measured: &[Measurement]) -> Result<Model> {
    let alone = measured.iter().find(|m| m.ranks == 1).context("there is no measurement on one rank")?;
    let strong = alone.strong.as_ref().context("one rank shares every batch")?;
    let several = measured.iter().find(|m| m.ranks > 1).context("there is no measurement on several ranks")?;
    let counts = [strong.sections.len(), alone.weak.sections.len(), several.weak.sections.len()];
    ensure!(counts.iter().all(|&c| c == counts[0]), "the measurements differ in their collective operations");
    let sections = strong.sections.iter().zip(&alone.weak.sections).zip(&several.weak.sections);
    let lanes = (alone.weak.lanes_per_rank as f64, strong.lanes_per_rank as f64);
    Ok(Model {
        origin: format!("{}: work measured on 1 rank, spread and network on {} ranks", alone.config, several.ranks),
        lanes: strong.lanes_per_rank,
        lanes_per_rank: alone.weak.lanes_per_rank,
        network: network_of(measured, several),
        sections: sections.map(|((whole, one), among)| section(whole, one, among, lanes)).collect(),
    })
}

/// One way from the smallest number of ranks above one (`several`); two where GPUs were measured on one node and on several.
fn network_of(measured: &[Measurement], several: &Measurement) -> Network {
    let of_way = |m: &Measurement, sum| {
        let (latency, bandwidth) =
            fit(sum, m.ranks, m.empty_sum_seconds, m.gradient_bytes as f64, m.gradient_sum_seconds);
        Network { latency, bandwidth, node: None }
    };
    if several.gpu.is_none() {
        return of_way(several, Sum::Halving);
    }
    let is_within = |m: &&Measurement| m.ranks > 1 && m.ranks_per_node.is_some_and(|k| m.ranks <= k);
    let within = measured.iter().filter(is_within).max_by_key(|m| m.ranks);
    let across = measured.iter().find(|m| m.ranks_per_node.is_some_and(|k| m.ranks > k));
    match (within, across.and_then(|m| Some((m, m.ranks_per_node?)))) {
        (Some(within), Some((across, ranks))) => {
            let Network { latency, bandwidth, .. } = of_way(within, Sum::Ring);
            let node = Node { ranks, latency, bandwidth };
            let (latency, bandwidth) = fit_between(
                node,
                across.ranks,
                across.empty_sum_seconds,
                across.gradient_bytes as f64,
                across.gradient_sum_seconds,
            );
            Network { latency, bandwidth, node: Some(node) }
        }
        _ => of_way(several, Sum::Ring),
    }
}

/// The straight line through the work at two numbers of lanes; both its parts are at least 0.
fn section(whole: &MeasuredSection, one: &MeasuredSection, among: &MeasuredSection, lanes: (f64, f64)) -> Section {
    let (few, many) = lanes;
    let slope = if many > few { (whole.work_seconds - one.work_seconds) / (many - few) } else { f64::INFINITY };
    let seconds_per_lane = slope.clamp(0.0, whole.work_seconds / many);
    // one rank on a GPU has nothing to sum
    let bytes = one.bytes.max(among.bytes);
    let overlap = (among.window_seconds > 0.0).then(|| Overlap {
        window_seconds: among.window_seconds,
        bucket_bytes: bytes / among.vectors.max(1) as f64,
        slowdown: ((among.work_seconds - one.work_seconds) / among.window_seconds).clamp(0.0, 1.0),
    });
    Section {
        operation: whole.operation,
        bytes,
        fixed_seconds: whole.work_seconds - seconds_per_lane * many,
        seconds_per_lane,
        spread: among.work_deviation / among.work_seconds.max(f64::MIN_POSITIVE),
        overlap,
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::{
        cli::bench::scaling::{measurement::Iterations, prediction::strong_efficiency},
        comm::Operation,
    };

    fn measured(work_seconds: f64) -> MeasuredSection {
        MeasuredSection {
            operation: Operation::Sum,
            bytes: 8e6,
            work_seconds,
            work_deviation: 0.1 * work_seconds,
            operation_seconds: 0.0,
            window_seconds: 0.0,
            vectors: 1,
        }
    }

    /// A machine of known parts: 0.2 s + 0.5 s per lane, α = 10 µs, β = 1 GB/s.
    pub fn measurement(ranks: usize) -> Measurement {
        let network = Network { latency: 1e-5, bandwidth: 1e9, node: None };
        let sum = |bytes| network.seconds(Operation::Sum, bytes, Sum::Halving, ranks);
        let iterations = |lanes: usize| Iterations {
            lanes_per_rank: lanes,
            samples: 16 * lanes * ranks,
            seconds: vec![0.2 + 0.5 * lanes as f64 + sum(8e6)],
            sections: vec![measured(0.2 + 0.5 * lanes as f64)],
        };
        Measurement {
            config: "test".into(),
            ranks,
            ranks_per_node: Some(ranks),
            gpu: None,
            threads: 1,
            strong: Some(iterations(8 / ranks)),
            weak: iterations(1),
            empty_sum_seconds: sum(0.0),
            gradient_sum_seconds: sum(8e6),
            gradient_bytes: 8_000_000,
            bucket_sums: Vec::new(),
            start_up_seconds: vec![1.0; ranks],
            private_bytes: vec![70_000_000; ranks],
        }
    }

    #[test]
    fn the_parts_of_the_work_and_the_network_are_found_again() {
        let model = model_of(&[measurement(1), measurement(2)]).unwrap();
        let s = &model.sections[0];
        assert!((s.fixed_seconds - 0.2).abs() < 1e-12 && (s.seconds_per_lane - 0.5).abs() < 1e-12, "{s:?}");
        assert!((s.spread - 0.1).abs() < 1e-12);
        assert!((model.network.bandwidth / 1e9 - 1.0).abs() < 1e-9 && (model.network.latency - 1e-5).abs() < 1e-12);
        assert_eq!((model.lanes, model.lanes_per_rank), (8, 1));
        // 0.2 s of 4.2 s are not shared: 8 ranks × 0.7 s, and stragglers on top
        let strong = strong_efficiency(&model, Sum::Halving, 8).unwrap();
        assert!(strong < 4.2 / (8.0 * 0.7) && strong > 0.6, "{strong}");
        assert!(strong_efficiency(&model, Sum::Halving, 16).is_none());
    }

    /// GPUs whose ways are known: 1 µs and 300 GB/s in nodes of 4, 20 µs and 10 GB/s of a rank between them.
    #[test]
    fn gpus_on_one_node_and_on_several_give_both_ways_and_the_overlap() {
        let node = Node { ranks: 4, latency: 1e-6, bandwidth: 300e9 };
        let network = Network { latency: 20e-6, bandwidth: 10e9, node: Some(node) };
        let of = |ranks: usize| {
            let sum = |bytes| network.seconds(Operation::Sum, bytes, Sum::TwoLevels, ranks);
            let mut m = measurement(ranks);
            (m.gpu, m.ranks_per_node) = (Some("NVIDIA H200".into()), Some(ranks.min(4)));
            (m.empty_sum_seconds, m.gradient_sum_seconds) = (sum(0.0), sum(8e6));
            for s in m.weak.sections.iter_mut().filter(|_| ranks > 1) {
                (s.window_seconds, s.vectors) = (0.5, 8);
                // the sums' kernels take something from the work
                s.work_seconds += 0.025;
            }
            if ranks == 1 {
                [&mut m.weak, m.strong.as_mut().unwrap()].into_iter().for_each(|i| i.sections[0].bytes = 0.0);
            }
            m
        };
        let model = model_of(&[of(1), of(2), of(4), of(8)]).unwrap();
        let found = model.network.node.expect("two ways");
        assert_eq!(found.ranks, 4);
        for (found, known) in [
            (found.latency, node.latency),
            (found.bandwidth, node.bandwidth),
            (model.network.latency, network.latency),
            (model.network.bandwidth, network.bandwidth),
        ] {
            assert!((found / known - 1.0).abs() < 1e-6, "{found} {known}");
        }
        let s = &model.sections[0];
        let overlap = s.overlap.expect("sums overlap");
        assert_eq!((s.bytes, overlap.bucket_bytes, overlap.window_seconds), (8e6, 1e6, 0.5));
        assert!((overlap.slowdown - 0.05).abs() < 1e-9, "{overlap:?}");
        // on one node alone there is one way
        let flat = model_of(&[of(1), of(2), of(4)]).unwrap().network;
        assert!(flat.node.is_none() && (flat.bandwidth / node.bandwidth - 1.0).abs() < 1e-6, "{flat:?}");
    }
}
