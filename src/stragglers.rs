//! Ranks that make all others wait: who needs more than 1.5 times the median of the ranks' times in a stage.
//!
//! Times are a rank's own work, without its waiting in collectives. A rank is named when that holds in two iterations
//! one after the other (one alone is noise), and again only after it has kept up once. Differences below 5 % of the
//! iteration do not matter and are not reported.

use std::collections::BTreeMap;

/// Seconds of own work by stage, of one rank.
pub type StageSeconds = BTreeMap<String, f64>;

const FACTOR: f64 = 1.5;
const SHARE_THAT_MATTERS: f64 = 0.05;
const ITERATIONS: u32 = 2;

/// Remembers who was slow in the last iterations.
#[derive(Debug, Default)]
pub struct Stragglers {
    /// By rank and stage: iterations in a row.
    slow: BTreeMap<(usize, String), u32>,
}

impl Stragglers {
    /// Takes an iteration's times of all ranks in rank order; gives one line per straggler to report now.
    pub fn note(&mut self, ranks: &[StageSeconds], iteration_seconds: f64, hosts: &[String]) -> Vec<String> {
        let mut lines = Vec::new();
        let mut slow = BTreeMap::new();
        for stage in ranks.first().into_iter().flat_map(StageSeconds::keys) {
            let times: Vec<f64> = ranks.iter().map(|times| times.get(stage).copied().unwrap_or(0.0)).collect();
            let median = lower_median(&times);
            for (rank, &seconds) in times.iter().enumerate() {
                if seconds <= FACTOR * median || seconds - median < SHARE_THAT_MATTERS * iteration_seconds {
                    continue;
                }
                let key = (rank, stage.clone());
                let in_a_row = self.slow.get(&key).copied().unwrap_or(0) + 1;
                if in_a_row == ITERATIONS {
                    let host = hosts.get(rank).map_or("an unknown host", String::as_str);
                    lines.push(format!(
                        "rank {rank} on {host} is slow: {stage} took {seconds:.2} s, the median of {} ranks is \
                         {median:.2} s",
                        ranks.len()
                    ));
                }
                slow.insert(key, in_a_row);
            }
        }
        self.slow = slow;
        lines
    }
}

/// The middle value, the lower of two: of two ranks the faster one.
fn lower_median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[(sorted.len() - 1) / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(updates: &[f64]) -> Vec<StageSeconds> {
        updates.iter().map(|&seconds| BTreeMap::from([("rollout".into(), 1.0), ("update".into(), seconds)])).collect()
    }

    #[test]
    fn a_straggler_is_named_once_in_its_second_slow_iteration() {
        let hosts = ["n01", "n02", "n03", "n04"].map(String::from);
        let mut stragglers = Stragglers::default();
        let slow = times(&[1.0, 1.1, 1.6, 0.9]);
        assert!(stragglers.note(&slow, 4.0, &hosts).is_empty());
        let expected = "rank 2 on n03 is slow: update took 1.60 s, the median of 4 ranks is 1.00 s";
        assert_eq!(stragglers.note(&slow, 4.0, &hosts), [expected]);
        assert!(stragglers.note(&slow, 4.0, &hosts).is_empty(), "it is not said every time");
        // back to normal, and slow again
        assert!(stragglers.note(&times(&[1.0; 4]), 4.0, &hosts).is_empty());
        assert!(stragglers.note(&slow, 4.0, &hosts).is_empty());
        assert_eq!(stragglers.note(&slow, 4.0, &hosts), [expected]);
    }

    #[test]
    fn small_differences_and_one_rank_are_nothing() {
        let mut stragglers = Stragglers::default();
        for _ in 0..3 {
            assert!(stragglers.note(&times(&[0.01, 0.05]), 4.0, &[]).is_empty(), "1 % of the iteration");
            assert!(stragglers.note(&times(&[1.0, 1.5]), 4.0, &[]).is_empty(), "1.5 times, not more");
            assert!(stragglers.note(&times(&[3.0]), 4.0, &[]).is_empty());
        }
        assert!(stragglers.note(&times(&[1.0, 1.6]), 4.0, &[]).is_empty());
        assert_eq!(stragglers.note(&times(&[1.0, 1.6]), 4.0, &[]).len(), 1, "of two ranks the slower one");
    }
}
