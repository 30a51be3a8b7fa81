//! `[stop]`: what ends a run before `run.iterations`; the mathematics is in [`crate::convergence`].

use anyhow::{ensure, Result};
use serde::{Deserialize, Serialize};

use super::{Config, MethodConfig};
use crate::convergence::Criterion;

/// A config without this table, and one whose criterion is `none`, trains for `run.iterations`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StopConfig {
    pub criterion: StopCriterion,
    /// Which reward is looked at.
    pub reward: RewardSource,
    /// Iterations of a window, W.
    pub window: u64,
    /// So many windows in a row have to bring no rise.
    pub patience: usize,
    /// No end before so many iterations.
    pub min_iterations: u64,
    /// Standard errors by which a window has to be above the best one before, to count as a rise.
    pub rise: f64,
    /// Standard errors by which a run has to end below its best window, to be reported as diverged.
    pub fall: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopCriterion {
    /// The run goes on to `run.iterations`, as though the table was not there.
    None,
    /// The run ends where the mean reward over windows of iterations has stopped to rise, on every task that is
    /// trained on and in the mean over them.
    Saturation,
}

/// Where a run's reward is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardSource {
    /// `<task>/reward_mean`: what each iteration has sampled to train on.
    Training,
    /// `<task>/evaluation_reward`: the small evaluations in the course of training, every `evaluation.every`
    /// iterations.
    Evaluation,
}

impl RewardSource {
    /// The one that shows how a method's training goes: the reward-weighted method samples from the original model,
    /// whose reward stays as it is.
    pub fn of_method(name: &str) -> Self {
        match name {
            "reward_weighted" => RewardSource::Evaluation,
            _ => RewardSource::Training,
        }
    }

    pub fn words(self) -> &'static str {
        match self {
            RewardSource::Training => "training reward",
            RewardSource::Evaluation => "evaluated reward",
        }
    }
}

impl StopConfig {
    pub fn rule(&self) -> Criterion {
        let StopConfig { window, patience, min_iterations, rise, fall, .. } = *self;
        Criterion { window, patience, min_iterations, rise, fall }
    }

    /// In one sentence, for people.
    pub fn in_words(&self, at_most: u64) -> String {
        let StopConfig { window, patience, min_iterations, rise, .. } = self;
        match self.criterion {
            StopCriterion::None => format!("none: {at_most} iterations"),
            StopCriterion::Saturation => format!(
                "saturation of the {}: after {min_iterations} iterations or more, where none of the newest {patience} windows of \
                 {window} iterations is above the best one before by more than {rise} times the standard error, on each trained \
                 task and in their mean; at most {at_most} iterations",
                self.reward.words()
            ),
        }
    }

    /// Why it can never end a run of so many iterations, where that is so.
    pub fn without_effect(&self, at_most: u64) -> Option<String> {
        let earliest = self.rule().earliest();
        (self.criterion != StopCriterion::None && earliest >= at_most).then(|| {
            format!(
                "[stop] has no effect: it cannot end a run before iteration {earliest} (stop.patience + 1 = {} windows of \
                 stop.window = {} iterations, stop.min_iterations = {}), and run.iterations = {at_most}",
                self.patience + 1,
                self.window,
                self.min_iterations
            )
        })
    }

    pub(super) fn validate(&self, config: &Config) -> Result<()> {
        if self.criterion == StopCriterion::None {
            return Ok(());
        }
        match self.reward {
            RewardSource::Training => ensure!(
                !matches!(config.method, MethodConfig::RewardWeighted(_)),
                "stop.reward = \"training\": method \"reward_weighted\" samples from the original model, whose reward does not \
                 change; it must be \"evaluation\""
            ),
            RewardSource::Evaluation => {
                let every = config.evaluation.every;
                ensure!(every > 0, "stop.reward = \"evaluation\": evaluation.every must not be 0");
                ensure!(
                    self.window % every == 0 && self.window >= 2 * every,
                    "stop.window = {} must be a multiple of evaluation.every = {every}, and at least twice as much: the noise is \
                     taken from evaluations of the same window",
                    self.window
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::config::testing::error;

    #[test]
    fn impossible_tables_are_refused() {
        let table = |criterion: &str, reward: &str, window: u64| {
            format!(
                "stop={{ criterion = '{criterion}', reward = '{reward}', window = {window}, patience = 2, min_iterations = 0, \
                 rise = 1.0, fall = 3.0 }}"
            )
        };
        let whole = table("saturation", "training", 4);
        for (name, settings, wanted) in [
            ("refl", vec![whole.as_str()], "none"),
            ("reward-weighted", vec![whole.as_str()], "stop.reward = \"training\": method \"reward_weighted\""),
            ("reward-weighted", vec![&whole, "stop.criterion=none"], "none"),
            (
                "refl",
                vec![&whole, "stop.criterion=plateau"],
                "unknown variant `plateau`, expected `none` or `saturation`",
            ),
            ("refl", vec![&whole, "stop.reward=evaluation", "evaluation.every=0"], "evaluation.every must not be 0"),
            (
                "refl",
                vec![&whole, "stop.reward=evaluation", "evaluation.every=3"],
                "stop.window = 4 must be a multiple",
            ),
            ("refl", vec![&whole, "stop.reward=evaluation", "evaluation.every=4"], "and at least twice as much"),
            ("refl", vec![&whole, "stop.reward=evaluation", "evaluation.every=2"], "none"),
            ("refl", vec![&whole, "stop.window=1"], "stop.window = 1 must be in 2..="),
            ("refl", vec![&whole, "stop.patience=0"], "stop.patience = 0 must be in 1..="),
            ("refl", vec![&whole, "stop.rise=-1.0"], "stop.rise = -1 must be in 0..="),
            ("refl", vec![&whole, "stop.fall=inf"], "stop.fall = inf must be in 0..="),
            ("refl", vec![&whole, "stop.windows=4"], "unknown key windows"),
            ("refl", vec!["stop={ criterion = 'saturation' }"], "stop: missing field `reward`"),
            ("refl", vec!["stop.window=4"], "there is no section stop"),
        ] {
            let e = error(name, &settings);
            assert!(e.contains(wanted) && !e.contains('\n'), "{name} {settings:?}: {e}");
        }
    }

    #[test]
    fn a_table_that_cannot_end_the_run_is_said_to_have_no_effect() {
        let stop = |text: &str| toml::from_str::<super::StopConfig>(text).unwrap();
        let whole = "criterion = 'saturation'\nreward = 'training'\nwindow = 50\npatience = 2\nmin_iterations = 190\n\
                     rise = 1.0\nfall = 3.0\n";
        let found = stop(whole).without_effect(200).unwrap();
        assert!(found.contains("before iteration 200 ") && found.contains("run.iterations = 200"), "{found}");
        assert_eq!(stop(whole).without_effect(201), None);
        assert_eq!(stop(&whole.replace("saturation", "none")).without_effect(2), None);
        assert!(stop(whole).in_words(1000).contains("windows of 50 iterations"));
    }
}
