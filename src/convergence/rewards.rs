//! A run's rewards by iteration.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Windows;
use crate::{
    config::RewardSource,
    telemetry::{names, number, Metrics},
};

/// What the curve of the mean over tasks is called.
pub const MEAN_OF_TASKS: &str = "mean of tasks";

/// Iterations done, and a value.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point(pub u64, #[serde(with = "number")] pub f64);

/// A reward over the iterations.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// A task, or [`MEAN_OF_TASKS`].
    pub name: String,
    pub points: Vec<Point>,
}

impl Curve {
    pub fn windows(&self, window: u64, done: u64) -> Windows {
        Windows::of(&self.points, window, done)
    }
}

/// The rewards of the tasks that a run trains on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rewards {
    tasks: Vec<OfTask>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct OfTask {
    task: String,
    training: Vec<Point>,
    evaluation: Vec<Point>,
}

impl OfTask {
    fn points(&self, source: RewardSource) -> &[Point] {
        match source {
            RewardSource::Training => &self.training,
            RewardSource::Evaluation => &self.evaluation,
        }
    }
}

impl Rewards {
    pub fn new<'t>(tasks: impl IntoIterator<Item = &'t str>) -> Self {
        let of = |task: &str| OfTask { task: task.to_string(), training: Vec::new(), evaluation: Vec::new() };
        Rewards { tasks: tasks.into_iter().map(of).collect() }
    }

    /// Those of a whole history.
    pub fn of<'t>(tasks: impl IntoIterator<Item = &'t str>, history: &[Metrics]) -> Self {
        let mut rewards = Rewards::new(tasks);
        history.iter().for_each(|metrics| rewards.note(metrics));
        rewards
    }

    /// Takes over an iteration's rewards. What is known of the iteration already stays, so that its evaluation can
    /// come later.
    pub fn note(&mut self, metrics: &Metrics) {
        let done = metrics.iteration + 1;
        let add = |points: &mut Vec<Point>, value: Option<f64>| {
            if let Some(value) = value.filter(|_| points.last().is_none_or(|last| last.0 < done)) {
                points.push(Point(done, value));
            }
        };
        for of in &mut self.tasks {
            add(&mut of.training, metrics.get(&names::reward_mean(&of.task)));
            add(&mut of.evaluation, metrics.get(&names::of_task(&of.task, names::EVALUATION_REWARD)));
        }
    }

    /// What a checkpoint after iteration `done` keeps. The evaluation after it may be dropped and made up for
    /// later, so it is left to the metrics.
    pub fn kept(&self, done: u64) -> Rewards {
        let mut kept = self.clone();
        kept.tasks.iter_mut().for_each(|of| of.evaluation.retain(|point| point.0 < done));
        kept
    }

    pub fn tasks(&self) -> impl Iterator<Item = &str> {
        self.tasks.iter().map(|of| of.task.as_str())
    }

    /// Whether the values of iteration `done` are there.
    pub fn reach(&self, source: RewardSource, done: u64) -> bool {
        self.tasks.iter().all(|of| of.points(source).last().is_some_and(|last| last.0 == done))
    }

    /// Iterations of which the training reward is known.
    pub fn len(&self) -> usize {
        self.tasks.iter().map(|of| of.training.len()).min().unwrap_or(0)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn curve(&self, task: &str, source: RewardSource) -> Option<Curve> {
        let of = self.tasks.iter().find(|of| of.task == task)?;
        Some(Curve { name: task.to_string(), points: of.points(source).to_vec() })
    }

    /// Of each task, and of their mean where they are several.
    pub fn curves(&self, source: RewardSource) -> Vec<Curve> {
        let mut curves: Vec<Curve> = self.tasks().filter_map(|task| self.curve(task, source)).collect();
        if curves.len() > 1 {
            let mut sums: BTreeMap<u64, (f64, usize)> = BTreeMap::new();
            for Point(done, value) in curves.iter().flat_map(|curve| &curve.points) {
                let sum = sums.entry(*done).or_default();
                *sum = (sum.0 + value, sum.1 + 1);
            }
            let count = curves.len();
            let of_all = sums.into_iter().filter(|(_, (_, values))| *values == count);
            let points = of_all.map(|(done, (sum, _))| Point(done, sum / count as f64)).collect();
            curves.push(Curve { name: MEAN_OF_TASKS.to_string(), points });
        }
        curves
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(iteration: u64, values: &[(&str, f64)]) -> Metrics {
        let mut metrics = Metrics::new(iteration);
        values.iter().for_each(|(name, value)| metrics.set(*name, *value));
        metrics
    }

    #[test]
    fn an_evaluation_may_come_after_its_iteration_and_the_mean_needs_every_task() {
        let mut rewards = Rewards::new(["a", "b"]);
        rewards.note(&metrics(0, &[("a/reward_mean", 1.0), ("b/reward_mean", 3.0), ("a/base_evaluation_reward", 7.0)]));
        rewards.note(&metrics(1, &[("a/reward_mean", 2.0)]));
        assert_eq!([1, 2].map(|done| rewards.reach(RewardSource::Training, done)), [false, false]);
        let whole = metrics(1, &[("a/reward_mean", 2.0), ("b/reward_mean", 5.0), ("a/evaluation_reward", 4.0)]);
        rewards.note(&whole);
        rewards.note(&whole);
        let training = rewards.curves(RewardSource::Training);
        assert_eq!(training[0].points, [Point(1, 1.0), Point(2, 2.0)]);
        assert_eq!(
            (training[2].name.as_str(), &training[2].points[..]),
            (MEAN_OF_TASKS, &[Point(1, 2.0), Point(2, 3.5)][..])
        );
        assert_eq!(rewards.curve("a", RewardSource::Evaluation).unwrap().points, [Point(2, 4.0)]);
        let mut kept = rewards.kept(2);
        assert_eq!((kept.len(), kept.reach(RewardSource::Evaluation, 2)), (2, false));
        kept.note(&whole);
        assert_eq!((kept, rewards.kept(3)), (rewards.clone(), rewards.clone()));
        assert_eq!((rewards.len(), rewards.curve("c", RewardSource::Training)), (2, None));
        assert_eq!(Rewards::new(["a"]).curves(RewardSource::Training).len(), 1);
    }

    #[test]
    fn every_digit_travels() {
        let mut rewards = Rewards::new(["a"]);
        rewards.note(&metrics(0, &[("a/reward_mean", 0.1 + 0.2)]));
        rewards.note(&metrics(1, &[("a/reward_mean", f64::NEG_INFINITY)]));
        let text = serde_json::to_string(&rewards).unwrap();
        assert_eq!(serde_json::from_str::<Rewards>(&text).unwrap(), rewards, "{text}");
    }
}
