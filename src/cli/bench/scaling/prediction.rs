//! What a [`Model`] says of more ranks than there are, and of what a goal takes.

use std::fmt::Write;

use anyhow::Result;

use super::{
    fitted::Model,
    model::{iteration_seconds, Section},
    network::Sum,
};
use crate::comm::Operation;

/// Numbers of ranks that are predicted.
const PREDICTED: [usize; 9] = [1, 8, 16, 32, 64, 128, 256, 512, 1024];
/// The efficiency that is asked for, and on how many ranks.
const GOAL: (f64, usize) = (0.99, 128);
/// Sizes of buckets that are compared, MiB of f32.
const BUCKETS_MIB: [f64; 6] = [4.0, 25.0, 50.0, 100.0, 200.0, 400.0];

/// How sums can be made on this machine, the first one for seconds: by MPI's halving, or where nodes are known by NCCL.
pub fn sums(model: &Model) -> [(&'static str, Sum); 2] {
    match model.network.node {
        None => [("halving", Sum::Halving), ("ring", Sum::Ring)],
        Some(_) => [("ring", Sum::Ring), ("two levels", Sum::TwoLevels)],
    }
}

/// Weak: the same work per rank.
pub fn weak_efficiency(model: &Model, sum: Sum, ranks: usize) -> f64 {
    let seconds = |n| iteration_seconds(&model.sections, &model.network, sum, n, model.lanes_per_rank as f64);
    seconds(1) / seconds(ranks)
}

/// Strong: the whole batch shared, up to one lane per rank.
pub fn strong_efficiency(model: &Model, sum: Sum, ranks: usize) -> Option<f64> {
    let seconds = |n| iteration_seconds(&model.sections, &model.network, sum, n, model.lanes as f64 / n as f64);
    (model.lanes % ranks == 0).then(|| seconds(1) / (ranks as f64 * seconds(ranks)))
}

/// The model with bf16 on the wire: half the bytes of every sum and of its buckets.
fn with_bf16(model: &Model) -> Model {
    each_sum(model, |s| {
        s.bytes /= 2.0;
        if let Some(overlap) = &mut s.overlap {
            overlap.bucket_bytes /= 2.0;
        }
    })
}

fn with_buckets(model: &Model, bytes: f64) -> Model {
    each_sum(model, |s| {
        if let Some(overlap) = &mut s.overlap {
            overlap.bucket_bytes = bytes;
        }
    })
}

fn without_spread(model: &Model) -> Model {
    let mut changed = model.clone();
    changed.sections.iter_mut().for_each(|s| s.spread = 0.0);
    changed
}

fn each_sum(model: &Model, change: impl Fn(&mut Section)) -> Model {
    let mut changed = model.clone();
    changed.sections.iter_mut().filter(|s| s.operation == Operation::Sum).for_each(change);
    changed
}

/// The best weak efficiency that some size of buckets gives, and that size in bytes on the wire (0: nothing overlaps).
fn best(model: &Model, sum: Sum, ranks: usize, width: f64) -> (f64, f64) {
    let sized = BUCKETS_MIB.map(|mib| mib * f64::from(1 << 20) * width / 4.0);
    let tried = sized.map(|bytes| (weak_efficiency(&with_buckets(model, bytes), sum, ranks), bytes));
    tried.into_iter().fold((0.0, 0.0), |a, b| if b.0 > a.0 { b } else { a })
}

/// β between nodes in bytes per second that gives the goal; the efficiency without limit of β where none does.
fn bandwidth_for(model: &Model, sum: Sum, width: f64, (goal, ranks): (f64, usize)) -> Result<f64, f64> {
    let efficiency = |bandwidth: f64| {
        let mut changed = model.clone();
        changed.network.bandwidth = bandwidth;
        best(&changed, sum, ranks, width).0
    };
    let (mut low, mut high) = (1e6f64, 1e15f64);
    if efficiency(high) < goal {
        return Err(efficiency(high));
    }
    for _ in 0..100 {
        let middle = (low * high).sqrt();
        *(if efficiency(middle) < goal { &mut low } else { &mut high }) = middle;
    }
    Ok(high)
}

/// The largest spread of all sections with which the goal is met at this model's bandwidth; None where even ranks that
/// are alike miss it.
fn spread_for(model: &Model, sum: Sum, width: f64, (goal, ranks): (f64, usize)) -> Option<f64> {
    let efficiency = |spread: f64| {
        let mut changed = model.clone();
        changed.sections.iter_mut().for_each(|s| s.spread = spread);
        best(&changed, sum, ranks, width).0
    };
    let (mut low, mut high) = (0.0f64, 1.0f64);
    if efficiency(low) < goal {
        return None;
    }
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        *(if efficiency(middle) < goal { &mut high } else { &mut low }) = middle;
    }
    Some(low)
}

pub fn table(model: &Model) -> Result<String> {
    let mut text = String::new();
    let network = &model.network;
    let bytes = model.sections.iter().map(|s| s.bytes).fold(0.0, f64::max);
    writeln!(text, "\npredicted: {}", model.origin)?;
    if let Some(node) = network.node {
        writeln!(
            text,
            "within nodes of {} ranks: latency {:.1} µs, bandwidth {:.2} GB/s of a rank; between nodes:",
            node.ranks,
            node.latency * 1e6,
            node.bandwidth / 1e9
        )?;
    }
    writeln!(
        text,
        "latency {:.1} µs, bandwidth {:.2} GB/s, largest sum {:.1} MB, {} meetings of all ranks per iteration",
        network.latency * 1e6,
        network.bandwidth / 1e9,
        bytes / 1e6,
        model.sections.len()
    )?;
    let [(first, sum), (second, other)] = sums(model);
    writeln!(
        text,
        "{:>6}  {:>12} {first:>10} {second:>10}   {:>16} {first:>10}",
        "ranks",
        format!("weak ({}/rank)", model.lanes_per_rank),
        format!("strong ({} lanes)", model.lanes),
    )?;
    let seconds = |ranks, lanes| iteration_seconds(&model.sections, network, sum, ranks, lanes);
    for ranks in PREDICTED {
        let strong = strong_efficiency(model, sum, ranks);
        let shared = strong.map(|_| seconds(ranks, model.lanes as f64 / ranks as f64));
        writeln!(
            text,
            "{ranks:>6}  {:>12} {:>10.3} {:>10.3}   {:>16} {:>10}",
            format!("{:.3} s", seconds(ranks, model.lanes_per_rank as f64)),
            weak_efficiency(model, sum, ranks),
            weak_efficiency(model, other, ranks),
            shared.map_or("-".into(), |s| format!("{s:.3} s")),
            strong.map_or("-".into(), |e| format!("{e:.3}")),
        )?;
    }
    if model.sections.iter().any(|s| s.overlap.is_some()) {
        text.push_str(&buckets(model)?);
    }
    text.push_str(&goal(model)?);
    Ok(text)
}

/// Which size of buckets is best where sums overlap.
fn buckets(model: &Model) -> Result<String> {
    let mut text = String::new();
    writeln!(text, "\nweak efficiency on {} ranks by size of the buckets (comm.bucket_mb):", GOAL.1)?;
    write!(text, "{:<22}", "MiB of f32")?;
    BUCKETS_MIB.iter().try_for_each(|mib| write!(text, " {mib:>7}"))?;
    text.push('\n');
    for (wire, width, model) in [("f32", 4.0, model.clone()), ("bf16", 2.0, with_bf16(model))] {
        for (name, sum) in sums(&model) {
            write!(text, "{:<22}", format!("{wire}, {name}"))?;
            for mib in BUCKETS_MIB {
                let bytes = mib * f64::from(1 << 20) * width / 4.0;
                write!(text, " {:>7.3}", weak_efficiency(&with_buckets(&model, bytes), sum, GOAL.1))?;
            }
            text.push('\n');
        }
    }
    Ok(text)
}

/// What the goal takes, with the best buckets.
fn goal(model: &Model) -> Result<String> {
    let mut text = String::new();
    let (efficiency, ranks) = GOAL;
    writeln!(
        text,
        "\n{efficiency} on {ranks} ranks (weak, the best buckets), by a rank's bandwidth between nodes and by spread:"
    )?;
    writeln!(
        text,
        "{:<18} {:>11} {:>26} {:>26} {:>26}",
        "", "efficiency", "GB/s with this spread", "GB/s without spread", "spread at this GB/s"
    )?;
    for (wire, width, model) in [("f32", 4.0, model.clone()), ("bf16", 2.0, with_bf16(model))] {
        for (name, sum) in sums(&model) {
            let bandwidth = |model: &Model| match bandwidth_for(model, sum, width, GOAL) {
                Ok(bandwidth) => format!("{:.1}", bandwidth / 1e9),
                Err(most) => format!("none is enough ({most:.3})"),
            };
            let spread = spread_for(&model, sum, width, GOAL);
            writeln!(
                text,
                "{:<18} {:>11.3} {:>26} {:>26} {:>26}",
                format!("{wire}, {name}"),
                best(&model, sum, ranks, width).0,
                bandwidth(&model),
                bandwidth(&without_spread(&model)),
                spread.map_or("none is enough".into(), |spread| format!("{:.2} % at most", 100.0 * spread)),
            )?;
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::scaling::{
        model::Overlap,
        network::{Network, Node},
    };

    /// 1 s of work, a sum of 1 GB hidden in its last half; nodes of 4 GPUs.
    fn model(spread: f64) -> Model {
        Model {
            origin: "a test".into(),
            lanes: 128,
            lanes_per_rank: 1,
            network: Network {
                latency: 0.0,
                bandwidth: 4e9,
                node: Some(Node { ranks: 4, latency: 0.0, bandwidth: 400e9 }),
            },
            sections: vec![Section {
                operation: Operation::Sum,
                bytes: 1e9,
                fixed_seconds: 0.0,
                seconds_per_lane: 1.0,
                spread,
                overlap: Some(Overlap { window_seconds: 0.5, bucket_bytes: 1e6, slowdown: 0.0 }),
            }],
        }
    }

    #[test]
    fn the_bandwidth_for_a_goal_gives_the_goal() {
        let model = model(0.0);
        for sum in [Sum::Ring, Sum::TwoLevels] {
            let bandwidth = bandwidth_for(&model, sum, 4.0, GOAL).unwrap();
            let mut with = model.clone();
            with.network.bandwidth = bandwidth;
            assert!((best(&with, sum, GOAL.1, 4.0).0 - GOAL.0).abs() < 1e-6, "{sum:?} {bandwidth}");
        }
        // one ring, without latency the smallest buckets: 2·(127/128) GB in 0.5 s and what may be seen, from the time when
        // the first of 239 buckets is there
        let ring = bandwidth_for(&model, Sum::Ring, 4.0, GOAL).unwrap();
        let expected = 2.0 * (127.0 / 128.0) * 1e9 / (0.5 - 0.5 / 239.0 + 1.0 / 0.99 - 1.0);
        assert!((ring / expected - 1.0).abs() < 1e-6, "{ring} {expected}");
        // each rank of a node sends a fourth
        assert!(bandwidth_for(&model, Sum::TwoLevels, 4.0, GOAL).unwrap() < ring / 3.5);
        // half the bytes need half the bandwidth
        let narrow = bandwidth_for(&with_bf16(&model), Sum::Ring, 2.0, GOAL).unwrap();
        assert!((2.0 * narrow / ring - 1.0).abs() < 1e-6);
    }

    #[test]
    fn no_network_makes_up_for_ranks_that_differ() {
        let most = bandwidth_for(&model(0.02), Sum::Ring, 4.0, GOAL).unwrap_err();
        // E_128 = 2.6
        assert!((most - 1.0 / (1.0 + 0.02 * super::super::model::expected_maximum(128))).abs() < 1e-4, "{most}");
        assert!(bandwidth_for(&without_spread(&model(0.02)), Sum::Ring, 4.0, GOAL).is_ok());
        // the spread that is found gives the goal
        let mut alike = model(0.02);
        alike.network.bandwidth = 3e9;
        assert_eq!(spread_for(&alike, Sum::Ring, 4.0, GOAL), None, "3 GB/s are too few");
        alike.network.bandwidth = 1e12;
        alike.sections[0].spread = spread_for(&alike, Sum::Ring, 4.0, GOAL).unwrap();
        assert!((best(&alike, Sum::Ring, GOAL.1, 4.0).0 - GOAL.0).abs() < 1e-6, "{alike:?}");
    }

    #[test]
    fn the_table_says_what_the_goal_takes_and_which_buckets() {
        let text = table(&model(0.02)).unwrap();
        for part in [
            "none is enough (0.9",
            " % at most",
            "bf16, two levels",
            "MiB of f32",
            "within nodes of 4 ranks",
            "\n  1024 ",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
