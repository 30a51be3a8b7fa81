//! When a reward has stopped to rise, and when it has fallen back from its best: one definition for a run that may
//! end ([`crate::run`], `[stop]`), for its summary and [`crate::report`], and for Table 2 of a [`crate::study`].
//!
//! The paper calls a run converged when the mean reward of what it samples saturates (section 4.1, Appendix E) and
//! gives no criterion. Here the iterations are cut into windows of W, counted from the first. With m_k the mean reward
//! in window k, and n_k the values in it:
//! ```text
//! noise of one value   s = median over neighbours i, i+1 in the same window of |r_{i+1} − r_i|, over √2·0.6745
//! of a difference      SE(a, b) = s·√(1/n_a + 1/n_b)
//! saturated at K       best of the newest P windows − best of those before ≤ rise · SE
//! fallen back at K     best of those before K − m_K > fall · SE, and more than a tenth of what the best had gained
//! ```
//! The noise is the deviation of normal noise. Neighbours are used because a trend hardly enters their difference, and
//! the median because a collapse does not enter it. P windows together are compared, so a slow rise that no window
//! shows by itself counts. The tenth keeps the wandering of a long plateau, whose standard errors are small, from being
//! called a divergence. A window in which less than two values are finite is left out; while it is among those compared
//! nothing is decided.

mod rewards;
mod windows;

pub use rewards::{Curve, Point, Rewards, MEAN_OF_TASKS};
pub use windows::{Difference, Window, Windows};

use crate::{
    config::{Config, RewardSource, StopConfig, StopCriterion},
    telemetry::FallBack,
};

/// Share of the gain that has to be lost, besides the noise.
const LOST: f64 = 0.1;

/// The numbers of the definition.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Criterion {
    /// W, in iterations.
    pub window: u64,
    /// P.
    pub patience: usize,
    /// Nothing has saturated before.
    pub min_iterations: u64,
    /// In standard errors.
    pub rise: f64,
    /// In standard errors.
    pub fall: f64,
}

impl Criterion {
    /// For a run of so many iterations of which nothing else is said: windows of a sixth of it, but of 4 to 50
    /// iterations.
    pub fn by_default(iterations: u64) -> Self {
        Criterion { window: (iterations / 6).clamp(4, 50), patience: 2, min_iterations: 0, rise: 1.0, fall: 4.0 }
    }

    /// The same with a window of two values or more, where there is one every `every` iterations.
    pub fn spaced(self, every: u64) -> Self {
        let every = every.max(1);
        Criterion { window: self.window.max(2 * every).next_multiple_of(every), ..self }
    }

    /// The first iteration at which something can have saturated.
    pub fn earliest(&self) -> u64 {
        let windows = (self.patience as u64 + 1).saturating_mul(self.window);
        windows.max(self.min_iterations.div_ceil(self.window).saturating_mul(self.window))
    }

    /// Whether all curves have saturated at the end of the window that iteration `done` completes.
    pub fn saturated(&self, curves: &[Curve], done: u64) -> bool {
        let flat = |curve: &Curve| {
            let rise = curve.windows(self.window, done).rise(self.patience);
            rise.is_some_and(|rise| rise.gain() <= self.rise * rise.standard_error)
        };
        done > 0
            && done % self.window == 0
            && done >= self.min_iterations
            && !curves.is_empty()
            && curves.iter().all(flat)
    }

    /// The first iteration after which all curves had saturated.
    pub fn first_saturated(&self, curves: &[Curve], done: u64) -> Option<u64> {
        (1..=done / self.window).map(|k| k * self.window).find(|&at| self.saturated(curves, at))
    }
}

/// How a run is judged: by which reward and which numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Judge {
    pub source: RewardSource,
    pub criterion: Criterion,
}

impl Judge {
    /// As the run's `[stop]` says, else by default; `every`: iterations between evaluations, `done`: those that the
    /// run has.
    pub fn new(stop: Option<&StopConfig>, method: &str, every: u64, done: u64) -> Self {
        if let Some(stop) = stop.filter(|stop| stop.criterion != StopCriterion::None) {
            return Judge { source: stop.reward, criterion: stop.rule() };
        }
        Judge::of_method(Criterion::by_default(done), method, every)
    }

    /// By the reward that shows how a method's training goes.
    pub fn of_method(criterion: Criterion, method: &str, every: u64) -> Self {
        let source = RewardSource::of_method(method);
        match source {
            RewardSource::Training => Judge { source, criterion },
            RewardSource::Evaluation => Judge { source, criterion: criterion.spaced(every) },
        }
    }

    pub fn of_run(config: &Config, done: u64) -> Self {
        Judge::new(config.stop.as_ref(), config.method.name(), config.evaluation.every, done)
    }

    /// Whether a task's reward has fallen back after `done` iterations, with what is to be said of it; None where
    /// there are too few windows to tell.
    pub fn fallen_back(&self, rewards: &Rewards, task: &str, done: u64) -> Option<Option<FallBack>> {
        let windows = rewards.curve(task, self.source)?.windows(self.criterion.window, done);
        let (first, fall) = (windows.first()?, windows.fall()?);
        let (lost, gained) = (-fall.gain(), fall.best.mean - first.mean);
        let fallen = lost > self.criterion.fall * fall.standard_error && lost > LOST * gained;
        Some(fallen.then(|| FallBack {
            task: task.to_string(),
            reward: self.source.words().to_string(),
            best: fall.best.mean,
            best_iterations: [fall.best.from, fall.best.to],
            newest: fall.newer.mean,
            newest_iterations: [fall.newer.from, fall.newer.to],
            standard_error: fall.standard_error,
        }))
    }

    /// The tasks that have fallen back.
    pub fn all_fallen_back(&self, rewards: &Rewards, done: u64) -> Vec<FallBack> {
        rewards.tasks().filter_map(|task| self.fallen_back(rewards, task, done).flatten()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Coordinates, Purpose};

    const RULE: Criterion = Criterion { window: 10, patience: 2, min_iterations: 0, rise: 1.0, fall: 3.0 };

    /// Normal noise of deviation 0.05 around `mean`.
    fn curve(seed: u64, iterations: u64, mean: impl Fn(f64) -> f64) -> Curve {
        let mut noise = vec![0f32; iterations as usize];
        Coordinates::new(seed, Purpose::Sample).stream().fill_normal(&mut noise);
        let point = |(i, z): (usize, &f32)| Point(i as u64 + 1, mean((i + 1) as f64) + 0.05 * f64::from(*z));
        Curve { name: "a".into(), points: noise.iter().enumerate().map(point).collect() }
    }

    /// Rises over 100 iterations, then stays.
    fn rises_then_stays(i: f64) -> f64 {
        (i / 100.0).min(1.0)
    }

    #[test]
    fn a_rise_goes_on_and_a_plateau_ends_it() {
        for seed in 0..20 {
            let found = RULE.first_saturated(&[curve(seed, 400, rises_then_stays)], 400).unwrap();
            // not while it rises; and a plateau is seen within a few windows
            assert!((110..=300).contains(&found), "seed {seed}: {found}");
            assert_eq!(RULE.first_saturated(&[curve(seed, 400, |i| i / 100.0)], 400), None, "seed {seed}");
        }
    }

    #[test]
    fn every_task_has_to_saturate() {
        let flat = curve(1, 200, |_| 0.5);
        let at = RULE.first_saturated(std::slice::from_ref(&flat), 200).unwrap();
        assert_eq!(RULE.first_saturated(&[flat, curve(2, 200, |i| i / 100.0)], 200), None);
        assert!(at % 10 == 0 && at >= 30, "{at}");
        assert_eq!(RULE.first_saturated(&[], 200), None);
    }

    #[test]
    fn it_ends_at_the_end_of_windows_and_not_too_early() {
        let flat = [Curve { name: "a".into(), points: (1..=100).map(|i| Point(i, 0.25)).collect() }];
        assert_eq!(RULE.first_saturated(&flat, 100), Some(30));
        assert!(!RULE.saturated(&flat, 35) && RULE.saturated(&flat, 40) && !RULE.saturated(&flat, 0));
        let later = Criterion { min_iterations: 41, ..RULE };
        assert_eq!((later.first_saturated(&flat, 100), later.earliest(), RULE.earliest()), (Some(50), 50, 30));
        assert_eq!(RULE.first_saturated(&flat, 29), None);
    }

    #[test]
    fn what_is_not_finite_is_left_out_and_decides_nothing() {
        let with = |broken: &[u64]| {
            let value = |i: u64| if broken.contains(&i) { f64::NAN } else { 0.25 };
            [Curve { name: "a".into(), points: (1..=40).map(|i| Point(i, value(i))).collect() }]
        };
        assert_eq!(RULE.first_saturated(&with(&[5, 25]), 40), Some(30));
        // nine of ten in the third window
        assert_eq!(RULE.first_saturated(&with(&(22..=30).collect::<Vec<_>>()), 40), None);
    }

    fn rewards(curve: &Curve) -> Rewards {
        let mut rewards = Rewards::new(["a"]);
        for point in &curve.points {
            let mut metrics = crate::telemetry::Metrics::new(point.0 - 1);
            metrics.set("a/reward_mean", point.1);
            rewards.note(&metrics);
        }
        rewards
    }

    #[test]
    fn a_run_that_falls_back_by_more_than_its_noise_has_diverged() {
        let judge = Judge { source: RewardSource::Training, criterion: RULE };
        let fallen = |curve: &Curve| judge.fallen_back(&rewards(curve), "a", curve.points.len() as u64);
        for seed in 0..20 {
            // the last window is 0.35 below the best: 15 standard errors and a third of the gain
            let up_and_down = curve(seed, 200, |i| if i < 150.0 { i / 150.0 } else { 1.0 - (i - 150.0) / 150.0 });
            let found = fallen(&up_and_down).unwrap().unwrap();
            assert!((131..=151).contains(&found.best_iterations[0]), "seed {seed}: {found}");
            assert_eq!(found.newest_iterations, [191, 200]);
            assert!(found.to_string().contains("task a: the training reward fell back from"), "{found}");
            for (what, other) in [
                ("rises", curve(seed, 200, |i| i / 100.0)),
                ("stays", curve(seed, 200, rises_then_stays)),
                // a twentieth of the gain, many standard errors
                ("wanders", curve(seed, 200, |i| if i <= 190.0 { 10.0 * i / 190.0 } else { 9.5 })),
            ] {
                assert_eq!(fallen(&other), Some(None), "seed {seed}: {what}");
            }
        }
        // one that only falls
        assert!(fallen(&curve(1, 50, |i| -i / 10.0)).unwrap().is_some());
        assert_eq!(fallen(&curve(1, 19, |i| -i)), None);
    }

    #[test]
    fn windows_by_default_fit_the_run() {
        let window = |iterations| Criterion::by_default(iterations).window;
        assert_eq!([2, 24, 48, 300, 4000].map(window), [4, 4, 8, 50, 50]);
        assert_eq!(Criterion::by_default(48).spaced(8).window, 16);
        assert_eq!(Criterion::by_default(4000).spaced(20).window, 60);
        assert_eq!(Judge::new(None, "raft", 4, 20).source, RewardSource::Training);
        let weighted = Judge::new(None, "reward_weighted", 8, 48);
        assert_eq!((weighted.source, weighted.criterion.window), (RewardSource::Evaluation, 16));
    }
}
