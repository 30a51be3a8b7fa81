//! How a run went: its evaluations in the course of training, its time, when its reward saturated and whether it fell back.

use anyhow::Result;

use super::Member;
use crate::{
    convergence::{Criterion, Judge, Rewards},
    telemetry::{names, read_metrics, FallBack, Metrics},
};

/// A run's history in short.
pub struct Course {
    pub history: Vec<Metrics>,
    /// Seconds of training, evaluations left out.
    pub seconds: f64,
    /// Samples that were drawn to train on.
    pub samples: u64,
    /// The method's name, and the iterations between evaluations.
    method: &'static str,
    every: u64,
}

/// When a task's reward had saturated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Saturation {
    /// Iterations and seconds of training until then; None: not in the whole run.
    pub at: Option<(u64, f64)>,
    /// Iterations of the run.
    pub of: u64,
}

impl Saturation {
    /// Whether this one came before another run's; None where the runs are too short to tell.
    pub fn before(&self, other: &Saturation) -> Option<bool> {
        match (self.at, other.at) {
            (Some((mine, _)), Some((theirs, _))) => Some(mine < theirs),
            (Some((mine, _)), None) => (mine <= other.of).then_some(true),
            (None, Some((theirs, _))) => (theirs <= self.of).then_some(false),
            (None, None) => None,
        }
    }

    /// In iterations.
    pub fn in_words(&self) -> String {
        self.at.map_or(format!("more than {}", self.of), |(iterations, _)| iterations.to_string())
    }
}

impl Course {
    pub fn read(member: &Member) -> Result<Self> {
        let history = read_metrics(&member.files.metrics())?;
        let per_iteration: usize = member.config.trained_tasks().map(|(_, task)| task.samples).sum();
        Ok(Course {
            seconds: history.iter().filter_map(|m| m.get(names::SECONDS)).sum(),
            samples: (per_iteration * history.len()) as u64,
            history,
            method: member.config.method.name(),
            every: member.config.evaluation.every,
        })
    }

    fn done(&self) -> u64 {
        self.history.last().map_or(0, |metrics| metrics.iteration + 1)
    }

    /// How the run is judged; by default where the study has no criterion.
    pub fn judge(&self, criterion: Option<Criterion>) -> Judge {
        let criterion = criterion.unwrap_or_else(|| Criterion::by_default(self.done()));
        Judge::of_method(criterion, self.method, self.every)
    }

    /// When `[stop]` with this criterion would have ended the run, or has.
    pub fn saturation(&self, task: &str, judge: &Judge) -> Saturation {
        let curve = Rewards::of([task], &self.history).curve(task, judge.source);
        let at = judge.criterion.first_saturated(curve.as_slice(), self.done());
        let seconds =
            |at: u64| self.history.iter().filter(|m| m.iteration < at).filter_map(|m| m.get(names::SECONDS)).sum();
        Saturation { at: at.map(|at| (at, seconds(at))), of: self.done() }
    }

    /// How the run fell back from its best; None where it has too few windows to tell.
    pub fn fallen_back(&self, task: &str, judge: &Judge) -> Option<Option<FallBack>> {
        judge.fallen_back(&Rewards::of([task], &self.history), task, self.done())
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A run of a second per iteration, with a training reward each and evaluations where given.
    fn course(method: &'static str, rewards: &[f64], evaluated: &[Option<f64>]) -> Course {
        let history = rewards.iter().enumerate().map(|(i, &reward)| {
            let mut metrics = Metrics::new(i as u64);
            if i == 0 {
                metrics.set("a/base_evaluation_reward", 0.4);
            }
            metrics.set("a/reward_mean", reward);
            let evaluated = evaluated.get(i).copied().flatten();
            evaluated.iter().for_each(|&reward| metrics.set("a/evaluation_reward", reward));
            metrics.set(names::SECONDS, 2.0);
            metrics
        });
        Course { history: history.collect(), seconds: 2.0 * rewards.len() as f64, samples: 0, method, every: 1 }
    }

    #[test]
    fn convergence_is_the_first_evaluation_with_most_of_the_gain() {
        let rewards = [Some(0.5), None, Some(0.8), Some(0.95), Some(1.0), Some(0.9)];
        let course = course("ours", &[0.0; 6], &rewards);
        assert_eq!(course.evaluations("a")[..3], [(0, 0.0, 0.4), (1, 2.0, 0.5), (3, 6.0, 0.8)]);
        assert_eq!(course.convergence("a", 0.9), Some((4, 8.0)));
        assert_eq!(course.convergence("a", 1.0), Some((5, 10.0)));
        assert_eq!(course.convergence("a", 0.1), Some((1, 2.0)));
        assert_eq!(course.convergence("b", 0.9), None);
    }

    const RULE: Criterion = Criterion { window: 4, patience: 2, min_iterations: 0, rise: 1.0, fall: 4.0 };

    /// A saw of 0.01 around what is given of each window of four.
    fn saw(means: &[f64]) -> Vec<f64> {
        means.iter().flat_map(|mean| [mean + 0.01, mean - 0.01, mean + 0.01, mean - 0.01]).collect()
    }

    #[test]
    fn saturation_is_where_stop_would_end_the_run() {
        let found = |method, means: &[f64], evaluated: &[Option<f64>]| {
            let course = course(method, &saw(means), evaluated);
            course.saturation("a", &course.judge(Some(RULE)))
        };
        let risen = found("ours", &[0.1, 0.3, 0.5, 0.5, 0.5, 0.9], &[]);
        assert_eq!(risen, Saturation { at: Some((20, 40.0)), of: 24 });
        let rising = found("draft", &[0.1, 0.3, 0.5, 0.7, 0.9, 1.1], &[]);
        assert_eq!(rising, Saturation { at: None, of: 24 });
        assert_eq!(
            (risen.before(&rising), rising.before(&risen), rising.before(&rising)),
            (Some(true), Some(false), None)
        );
        assert_eq!((risen.in_words(), rising.in_words()), ("20".to_string(), "more than 24".to_string()));
        // the reward-weighted method's samples are the original model's: its evaluations are what tells
        let evaluated: Vec<Option<f64>> = saw(&[0.1, 0.3, 0.5, 0.7, 0.9, 1.1]).into_iter().map(Some).collect();
        assert_eq!(found("reward_weighted", &[0.5; 6], &evaluated).at, None);
        assert_eq!(found("ours", &[0.5; 6], &evaluated).at, Some((12, 24.0)));
    }

    #[test]
    fn a_run_that_falls_back_has_diverged() {
        let fallen = |means: &[f64]| {
            let course = course("raft", &saw(means), &[]);
            course.fallen_back("a", &course.judge(Some(RULE))).map(|fallen| fallen.is_some())
        };
        assert_eq!(fallen(&[0.6, 0.9, 0.6]), Some(true));
        assert_eq!(fallen(&[0.6, 0.9, 0.1]), Some(true));
        assert_eq!(fallen(&[0.6, 0.9, 0.89]), Some(false));
        assert_eq!(fallen(&[0.4, 0.3]), Some(true));
        assert_eq!(fallen(&[0.4]), None);
    }
}
