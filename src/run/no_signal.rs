//! Rewards from which nothing can be learnt: all equal, or without a gradient. The run goes on, since a reward may begin to
//! tell pictures apart later, but not in silence.

use std::collections::BTreeMap;

use crate::{
    config::{Config, MethodConfig},
    telemetry::{names, Metrics},
};

/// For how many iterations in a row it has been so, by task.
#[derive(Debug, Default)]
pub struct NoSignal {
    in_a_row: BTreeMap<String, u64>,
}

impl NoSignal {
    /// What is to be said of an iteration: once when a task's rewards teach nothing, and again when it has been so for 10,
    /// 100, … iterations in a row.
    pub fn note(&mut self, config: &Config, metrics: &Metrics) -> Vec<String> {
        let mut lines = Vec::new();
        for (_, task) in config.trained_tasks() {
            let in_a_row = self.in_a_row.entry(task.name.clone()).or_default();
            if !teaches_nothing(metrics, &task.name) {
                *in_a_row = 0;
                continue;
            }
            *in_a_row += 1;
            let why = why(&config.method, metrics, &task.name, task.samples);
            match *in_a_row {
                1 => lines.push(format!("task {}: {why}", task.name)),
                n if is_power_of_ten(n) => lines.push(format!("task {}: for {n} iterations: {why}", task.name)),
                _ => {}
            }
        }
        lines
    }
}

fn is_power_of_ten(mut n: u64) -> bool {
    while n > 0 && n % 10 == 0 {
        n /= 10;
    }
    n == 1
}

fn teaches_nothing(metrics: &Metrics, task: &str) -> bool {
    metrics.get(&names::of_task(task, names::NO_SIGNAL)) == Some(1.0)
}

fn why(method: &MethodConfig, metrics: &Metrics, task: &str, samples: usize) -> String {
    let of = |name: &str| metrics.get(&names::of_task(task, name)).unwrap_or(f64::NAN);
    let (mean, std) = (metrics.get(&names::reward_mean(task)).unwrap_or(f64::NAN), of("reward_std"));
    let count = (samples as f64 * (1.0 - of("bad_reward_share"))).round();
    let rewards = match method {
        MethodConfig::Refl(_) | MethodConfig::Draft(_) => {
            return format!(
            "the reward has no gradient in any of {count} pictures (their mean reward is {mean}): nothing is trained"
        )
        }
        _ if std == 0.0 => format!("all {count} rewards are {mean}"),
        _ => format!("all {count} rewards equal those that they are compared with"),
    };
    let so = match method {
        MethodConfig::Raft(_) => "the samples that are kept are no better than the others",
        MethodConfig::RewardWeighted(_) => "every sample has the weight 0, and nothing is trained",
        _ => "every advantage is 0, and nothing is trained",
    };
    format!("{rewards}: {so}")
}

/// In how many of a run's iterations a task's rewards taught nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct InAll {
    pub task: String,
    pub iterations: u64,
    /// The first of them, counted from 1.
    pub first: u64,
    pub of: u64,
}

impl std::fmt::Display for InAll {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let InAll { task, iterations, first, of } = self;
        write!(
            f,
            "task {task}: in {iterations} of {of} iterations, first in iteration {first}, its rewards were all equal or had \
             no gradient: nothing was learnt from them"
        )
    }
}

/// The tasks of which that is to be said, in the order in which their metrics come.
pub fn in_all(history: &[Metrics]) -> Vec<InAll> {
    let mut found: Vec<InAll> = Vec::new();
    for metrics in history {
        for (name, value) in metrics.iter() {
            let Some((task, names::NO_SIGNAL)) = name.rsplit_once('/') else { continue };
            if value != 1.0 {
                continue;
            }
            match found.iter_mut().find(|known| known.task == task) {
                Some(known) => known.iterations += 1,
                None => found.push(InAll {
                    task: task.to_string(),
                    iterations: 1,
                    first: metrics.iteration + 1,
                    of: history.len() as u64,
                }),
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::testing::config;

    fn metrics(iteration: u64, share: f64) -> Metrics {
        let mut metrics = Metrics::new(iteration);
        for (name, value) in
            [("reward_mean", 0.5), ("reward_std", 0.0), ("bad_reward_share", 0.25), ("no_signal", share)]
        {
            metrics.set(names::of_task("preference", name), value);
        }
        metrics
    }

    #[test]
    fn it_is_said_at_first_then_rarely_and_again_after_a_pause() {
        let mut config = config("preference", &["task.preference.samples=8"]);
        let mut no_signal = NoSignal::default();
        let mut said = Vec::new();
        for iteration in 0..120 {
            let share = if iteration == 110 { 0.75 } else { 1.0 };
            let lines = no_signal.note(&config, &metrics(iteration, share));
            said.extend(lines.into_iter().map(|line| (iteration + 1, line)));
        }
        let when: Vec<u64> = said.iter().map(|(when, _)| *when).collect();
        assert_eq!(when, [1, 10, 100, 112]);
        assert_eq!(said[0].1, "task preference: all 6 rewards are 0.5: every advantage is 0, and nothing is trained");
        assert!(said[1].1.starts_with("task preference: for 10 iterations: all 6"), "{}", said[1].1);
        for (method, wanted) in [
            ("raft", "all 6 rewards are 0.5: the samples that are kept are no better than the others"),
            ("reward-weighted", "every sample has the weight 0"),
            ("refl", "the reward has no gradient in any of 6 pictures (their mean reward is 0.5)"),
        ] {
            config.method = crate::methods::testing::config(method, &["task.preference.samples=48"]).method;
            let line = &NoSignal::default().note(&config, &metrics(0, 1.0))[0];
            assert!(line.contains(wanted), "{line}");
        }
    }

    #[test]
    fn the_whole_run_in_a_line() {
        let history = [metrics(0, 0.0), metrics(1, 1.0), metrics(2, 0.5), metrics(3, 1.0)];
        let said = in_all(&history).iter().map(InAll::to_string).collect::<Vec<_>>();
        assert_eq!(said.len(), 1);
        assert!(said[0].starts_with("task preference: in 2 of 4 iterations, first in iteration 2, its"), "{}", said[0]);
        assert!(in_all(&history[..1]).is_empty());
    }
}
