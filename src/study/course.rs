//! How a run went: its evaluations in the course of training, and its time.

use anyhow::Result;

use super::Member;
use crate::telemetry::{names, read_metrics, Metrics};

/// A run's history in short.
pub struct Course {
    pub history: Vec<Metrics>,
    /// Seconds of training, evaluations left out.
    pub seconds: f64,
    /// Samples that were drawn to train on.
    pub samples: u64,
}

impl Course {
    pub fn read(member: &Member) -> Result<Self> {
        let history = read_metrics(&member.files.metrics())?;
        let per_iteration: usize = member.config.trained_tasks().map(|(_, task)| task.samples).sum();
        Ok(Course {
            seconds: history.iter().filter_map(|m| m.get(names::SECONDS)).sum(),
            samples: (per_iteration * history.len()) as u64,
            history,
        })
    }

    /// (iterations done, seconds of training so far, reward on the few held-out prompts) of each evaluation.
    pub fn evaluations(&self, task: &str) -> Vec<(u64, f64, f64)> {
        let name = names::of_task(task, names::EVALUATION_REWARD);
        let before = names::of_task(task, &format!("base_{}", names::EVALUATION_REWARD));
        let mut found = Vec::new();
        let mut seconds = 0.0;
        for metrics in &self.history {
            found.extend(metrics.get(&before).map(|reward| (0, 0.0, reward)));
            seconds += metrics.get(names::SECONDS).unwrap_or(0.0);
            found.extend(metrics.get(&name).map(|reward| (metrics.iteration + 1, seconds, reward)));
        }
        found
    }

    /// Iterations and seconds after which the evaluated reward has first made `share` of its largest gain; None where it
    /// never rises above its beginning.
    pub fn convergence(&self, task: &str, share: f64) -> Option<(u64, f64)> {
        let evaluations = self.evaluations(task);
        let first = evaluations.first()?.2;
        let best = evaluations.iter().map(|e| e.2).fold(f64::NEG_INFINITY, f64::max);
        if best <= first {
            return None;
        }
        evaluations.iter().find(|e| e.2 - first >= share * (best - first)).map(|e| (e.0, e.1))
    }
}

impl Course {
    /// Whether the run fell back: at its end more than half of the largest gain in the evaluated reward is gone again. None
    /// where it never rises above its beginning.
    pub fn diverged(&self, task: &str) -> Option<bool> {
        let evaluations = self.evaluations(task);
        let (first, last) = (evaluations.first()?.2, evaluations.last()?.2);
        let best = evaluations.iter().map(|e| e.2).fold(f64::NEG_INFINITY, f64::max);
        (best > first).then_some(last - first < 0.5 * (best - first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn convergence_is_the_first_evaluation_with_most_of_the_gain() {
        let rewards = [Some(0.5), None, Some(0.8), Some(0.95), Some(1.0), Some(0.9)];
        let history = rewards.iter().enumerate().map(|(i, reward)| {
            let mut metrics = Metrics::new(i as u64);
            if i == 0 {
                metrics.set("a/base_evaluation_reward", 0.4);
            }
            reward.iter().for_each(|&reward| metrics.set("a/evaluation_reward", reward));
            metrics.set(names::SECONDS, 2.0);
            metrics
        });
        let course = Course { history: history.collect(), seconds: 12.0, samples: 0 };
        assert_eq!(course.evaluations("a")[..3], [(0, 0.0, 0.4), (1, 2.0, 0.5), (3, 6.0, 0.8)]);
        assert_eq!(course.convergence("a", 0.9), Some((4, 8.0)));
        assert_eq!(course.convergence("a", 1.0), Some((5, 10.0)));
        assert_eq!(course.convergence("a", 0.1), Some((1, 2.0)));
        assert_eq!(course.convergence("b", 0.9), None);
        assert_eq!((course.diverged("a"), course.diverged("b")), (Some(false), None));
    }

    #[test]
    fn a_run_that_loses_most_of_its_gain_has_diverged() {
        let course = |rewards: &[f64]| {
            let history = rewards.iter().enumerate().map(|(i, &reward)| {
                let mut metrics = Metrics::new(i as u64);
                if i == 0 {
                    metrics.set("a/base_evaluation_reward", 0.5);
                }
                metrics.set("a/evaluation_reward", reward);
                metrics
            });
            Course { history: history.collect(), seconds: 0.0, samples: 0 }
        };
        assert_eq!(course(&[0.6, 0.9, 0.6]).diverged("a"), Some(true));
        assert_eq!(course(&[0.6, 0.9, 0.1]).diverged("a"), Some(true));
        assert_eq!(course(&[0.6, 0.9, 0.8]).diverged("a"), Some(false));
        assert_eq!(course(&[0.4, 0.3]).diverged("a"), None);
    }
}
