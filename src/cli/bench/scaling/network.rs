//! How long a collective operation takes on n ranks.
//!
//! A way has a latency α and a bandwidth β of one rank. Ranks of a node have a way among themselves (α_i, β_i), ranks of
//! different nodes another (α, β), which is the slower one. An operation to which each rank brings B bytes takes
//!
//! | operation | t(n, B) |
//! |---|---|
//! | sum by recursive halving and doubling (`comm`, n a power of two) | 2·log₂n·α + 2·(1 − 1/n)·B/β |
//! | sum by one ring through all ranks of N nodes | 2·(n − N)·α_i + 2·(N − 1)·α + 2·(1 − 1/n)·B/β |
//! | sum in two levels (k ranks per node, N = n/k nodes) | 2·(k − 1)·α_i + 2·(1 − 1/k)·B/β_i + 2·(N − 1)·α + 2·(1 − 1/N)·(B/k)/β |
//! | gather | log₂n·α + (n − 1)·B/β |
//! | broadcast | log₂n·(α + B/β) |
//! | barrier | log₂n·α |
//!
//! On the ranks of one node α_i and β_i stand for α and β; without nodes n is N. (That the latencies of a ring add up by the
//! nodes it passes is NCCL's own model, src/graph/tuning.cc.) In two levels each rank of a node sums its k-th of the vector
//! with the same k-th of the other nodes, so that all ways between nodes are used at once; a bucket goes through one level
//! after the other, and buckets are not pipelined. Between these two lies what NCCL does: its rings use all ways of a node,
//! which the first ring formula does not.
//!
//! A sum that travels in buckets while a backward pass goes on: m buckets of t seconds each, one after the other, whose
//! gradients come evenly over the W seconds of the pass. Bucket j is ready after W·j/m, so the last is summed after
//! max over j of W·j/m + (m − j + 1)·t, which is linear in j, and what is seen of the sums after the pass has ended is
//!
//! exposed = max(t, W/m + m·t − W).
//!
//! Without a window (W = 0) all m·t are seen; with a long one the last bucket alone.

use serde::{Deserialize, Serialize};

use crate::comm::Operation;

/// Ways between ranks.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// α between nodes, seconds.
    pub latency: f64,
    /// β between nodes, bytes per second of one rank.
    pub bandwidth: f64,
    /// The way within a node; without it all ways are alike.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Node>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// k, ranks of a node.
    pub ranks: usize,
    /// α_i, seconds.
    pub latency: f64,
    /// β_i, bytes per second of one rank.
    pub bandwidth: f64,
}

/// How sums over ranks are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sum {
    Halving,
    Ring,
    TwoLevels,
}

impl Network {
    /// α and β of the slowest way that an operation of `ranks` ranks takes.
    fn way(&self, ranks: usize) -> (f64, f64) {
        match self.node {
            Some(node) if ranks <= node.ranks => (node.latency, node.bandwidth),
            _ => (self.latency, self.bandwidth),
        }
    }

    /// t(n, B), seconds.
    pub fn seconds(&self, operation: Operation, bytes: f64, sum: Sum, ranks: usize) -> f64 {
        let (n, rounds) = (ranks as f64, (ranks as f64).log2());
        let (latency, bandwidth) = self.way(ranks);
        match (operation, sum, self.node) {
            (Operation::Barrier, ..) => rounds * latency,
            (Operation::Broadcast, ..) => rounds * (latency + bytes / bandwidth),
            (Operation::Gather, ..) => rounds * latency + (n - 1.0) * bytes / bandwidth,
            (Operation::Sum, Sum::Halving, _) => 2.0 * rounds * latency + 2.0 * (1.0 - 1.0 / n) * bytes / bandwidth,
            (Operation::Sum, Sum::TwoLevels, Some(node)) if ranks > node.ranks => {
                let (k, nodes) = (node.ranks as f64, (n / node.ranks as f64).ceil());
                ring(k, bytes, node.latency, node.bandwidth) + ring(nodes, bytes / k, latency, bandwidth)
            }
            (Operation::Sum, _, Some(node)) if ranks > node.ranks => {
                let nodes = (n / node.ranks as f64).ceil();
                2.0 * (n - nodes) * node.latency + ring(nodes, 0.0, latency, bandwidth) + ring(n, bytes, 0.0, bandwidth)
            }
            (Operation::Sum, ..) => ring(n, bytes, latency, bandwidth),
        }
    }

    /// Seconds that are seen of a sum of `bytes` in buckets of `bucket` bytes, of which `window` seconds of a backward pass
    /// hide a part.
    pub fn exposed(&self, bytes: f64, bucket: f64, window: f64, sum: Sum, ranks: usize) -> f64 {
        let buckets = (bytes / bucket).ceil().max(1.0);
        let one = self.seconds(Operation::Sum, bytes / buckets, sum, ranks);
        exposed(buckets, one, window)
    }
}

fn ring(n: f64, bytes: f64, latency: f64, bandwidth: f64) -> f64 {
    2.0 * (n - 1.0) * latency + 2.0 * (1.0 - 1.0 / n) * bytes / bandwidth
}

/// What is seen of `buckets` sums of `one` seconds each behind a window; see the module.
fn exposed(buckets: f64, one: f64, window: f64) -> f64 {
    one.max(window / buckets + buckets * one - window)
}

/// α and β of one way from sums over `ranks` ranks, at least two, of an empty vector and of one of `bytes`, made by
/// halving or by a ring.
pub fn fit(sum: Sum, ranks: usize, empty_seconds: f64, bytes: f64, seconds: f64) -> (f64, f64) {
    let n = ranks as f64;
    let messages = if sum == Sum::Halving { 2.0 * n.log2() } else { 2.0 * (n - 1.0) };
    let bandwidth = 2.0 * (1.0 - 1.0 / n) * bytes / (seconds - empty_seconds).max(f64::MIN_POSITIVE);
    (empty_seconds / messages, bandwidth)
}

/// α and β between nodes from sums in two levels over `ranks` ranks of several nodes whose own way is known.
pub fn fit_between(node: Node, ranks: usize, empty_seconds: f64, bytes: f64, seconds: f64) -> (f64, f64) {
    let (k, nodes) = (node.ranks as f64, (ranks as f64 / node.ranks as f64).ceil());
    let within = |bytes| ring(k, bytes, node.latency, node.bandwidth);
    let empty = (empty_seconds - within(0.0)).max(0.0);
    let rest = seconds - empty_seconds - (within(bytes) - within(0.0));
    let bandwidth = 2.0 * (1.0 - 1.0 / nodes) * bytes / k / rest.max(f64::MIN_POSITIVE);
    (empty / (2.0 * (nodes - 1.0)), bandwidth)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() <= 1e-12 * b.abs().max(1.0), "{a} is not {b}");
    }

    /// α = 1 s, β = 4 bytes/s between nodes; α_i = 0.5 s, β_i = 8 bytes/s in nodes of 2.
    const SLOW: Network =
        Network { latency: 1.0, bandwidth: 4.0, node: Some(Node { ranks: 2, latency: 0.5, bandwidth: 8.0 }) };
    const FLAT: Network = Network { node: None, ..SLOW };

    #[test]
    fn operations_of_four_ranks_take_what_is_counted_by_hand() {
        let t = |operation, sum| FLAT.seconds(operation, 16.0, sum, 4);
        near(t(Operation::Barrier, Sum::Ring), 2.0);
        near(t(Operation::Broadcast, Sum::Ring), 2.0 * (1.0 + 4.0));
        near(t(Operation::Gather, Sum::Ring), 2.0 + 12.0);
        // 2·(3/4)·16 = 24 bytes of each rank at 4 a second
        near(t(Operation::Sum, Sum::Halving), 4.0 + 6.0);
        near(t(Operation::Sum, Sum::Ring), 6.0 + 6.0);
        near(t(Operation::Sum, Sum::TwoLevels), 12.0);
    }

    #[test]
    fn two_levels_are_a_ring_in_the_node_and_one_between_nodes() {
        // in the node: 2 messages of 0.5 s, 16 bytes at 8 a second; between two nodes: 2 messages, 8 bytes at 4 a second
        near(SLOW.seconds(Operation::Sum, 16.0, Sum::TwoLevels, 4), (1.0 + 2.0) + (2.0 + 2.0));
        // of one node alone nothing goes between nodes, whatever the sum
        for sum in [Sum::Ring, Sum::TwoLevels] {
            near(SLOW.seconds(Operation::Sum, 16.0, sum, 2), 1.0 + 2.0);
        }
        near(SLOW.seconds(Operation::Sum, 16.0, Sum::Halving, 2), 1.0 + 2.0);
        // one ring sends all it sends on the slower way: 4 messages in the nodes, 2 between them, 24 bytes at 4 a second
        near(SLOW.seconds(Operation::Sum, 16.0, Sum::Ring, 4), 2.0 + 2.0 + 6.0);
        // nodes of one rank are a flat network
        let single = Network { node: Some(Node { ranks: 1, latency: 9.0, bandwidth: 1.0 }), ..FLAT };
        for sum in [Sum::Ring, Sum::TwoLevels] {
            near(single.seconds(Operation::Sum, 16.0, sum, 4), FLAT.seconds(Operation::Sum, 16.0, Sum::Ring, 4));
        }
    }

    #[test]
    fn one_rank_sums_nothing() {
        for sum in [Sum::Halving, Sum::Ring, Sum::TwoLevels] {
            near(SLOW.seconds(Operation::Sum, 1e9, sum, 1), 0.0);
            near(SLOW.exposed(1e9, 1e6, 3.0, sum, 1), 0.0);
        }
    }

    #[test]
    fn what_overlaps_is_the_longer_of_the_two() {
        // nothing to hide in: all of it is seen
        near(exposed(4.0, 2.0, 0.0), 8.0);
        // a pass much longer than the sums: the last bucket is seen
        near(exposed(4.0, 2.0, 100.0), 2.0);
        // sums much longer than the pass: they begin when the first bucket is there, W/m, and go on without a gap
        near(exposed(4.0, 10.0, 8.0), 2.0 + 40.0 - 8.0);
        // one bucket waits for the whole pass
        near(exposed(1.0, 5.0, 100.0), 5.0);
        // many small buckets: max(W, T) − W in the limit
        near((1e6 * exposed(1e6, 30e-6, 20.0) / 1e6 * 1e3).round() / 1e3, 10.0);
        assert!(exposed(1e6, 10e-6, 20.0) < 1e-4);
    }

    /// Bucket by bucket, as a stream works.
    #[test]
    fn the_formula_of_the_overlap_is_what_a_queue_does() {
        for (buckets, one, window) in [(1, 0.3, 1.0), (5, 0.1, 1.0), (5, 0.2, 1.0), (5, 0.9, 1.0), (132, 0.01, 0.13)] {
            let mut done = 0f64;
            for j in 1..=buckets {
                done = done.max(window * f64::from(j) / f64::from(buckets)) + one;
            }
            assert!((exposed(f64::from(buckets), one, window) - (done - window)).abs() < 1e-12, "{buckets} {one}");
        }
    }

    #[test]
    fn a_fitted_way_gives_back_what_was_measured() {
        for (sum, ranks) in [(Sum::Halving, 2), (Sum::Halving, 16), (Sum::Ring, 2), (Sum::Ring, 7)] {
            let network = Network { latency: 3e-6, bandwidth: 5e9, node: None };
            let seconds = |bytes| network.seconds(Operation::Sum, bytes, sum, ranks);
            let (latency, bandwidth) = fit(sum, ranks, seconds(0.0), 1e8, seconds(1e8));
            assert!((latency / 3e-6 - 1.0).abs() < 1e-9 && (bandwidth / 5e9 - 1.0).abs() < 1e-9, "{sum:?} {ranks}");
        }
    }

    #[test]
    fn a_network_without_nodes_is_read_as_before() {
        let old: Network = serde_json::from_str(r#"{"latency": 1e-5, "bandwidth": 25e9}"#).unwrap();
        assert_eq!(old, Network { latency: 1e-5, bandwidth: 25e9, node: None });
        assert!(!serde_json::to_string(&old).unwrap().contains("node"));
    }
}
