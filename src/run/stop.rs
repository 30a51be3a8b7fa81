//! `[stop]` of a run under way: what it has seen, and whether it is at its end. Rank 0 decides for all.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::{
    comm::Communicator,
    config::{Config, RewardSource, StopConfig, StopCriterion},
    convergence::{Curve, Judge, Rewards, MEAN_OF_TASKS},
    store::{checkpoint::REWARDS, Head},
    telemetry::{names, read_metrics, Ending, FallBack, Metrics, Reason, RunFiles},
};

pub struct Stop {
    /// None: `run.iterations` alone ends the run.
    by: Option<By>,
    at_most: u64,
}

struct By {
    settings: StopConfig,
    /// Of all iterations that are done.
    rewards: Rewards,
}

impl Stop {
    /// Of a run that begins.
    pub fn new(config: &Config) -> Self {
        let settings = config.stop.clone().filter(|stop| stop.criterion != StopCriterion::None);
        let rewards = || Rewards::new(config.trained_tasks().map(|(_, task)| task.name.as_str()));
        Stop { by: settings.map(|settings| By { settings, rewards: rewards() }), at_most: config.run.iterations }
    }

    /// Of a run that goes on from a checkpoint. Its rewards are there but for the last evaluation, which may have
    /// been made after it; that, and all of them where the run had no `[stop]` until now, is in the metrics of its
    /// folder.
    pub fn resumed(config: &Config, comm: &dyn Communicator, origin: &Path, checkpoint: &Head) -> Result<Self> {
        let mut stop = Stop::new(config);
        let Some(by) = &mut stop.by else { return Ok(stop) };
        if let Some(rewards) = checkpoint.meta.get(REWARDS) {
            by.rewards = serde_json::from_value(rewards.clone()).context("the checkpoint's rewards")?;
        }
        if comm.rank() == 0 {
            let folder = origin.parent().and_then(Path::parent).map(RunFiles::new);
            let history = folder.and_then(|files| read_metrics(&files.metrics()).ok()).unwrap_or_default();
            let done = checkpoint.iteration;
            history.iter().filter(|metrics| metrics.iteration < done).for_each(|metrics| by.rewards.note(metrics));
            let unknown = done.saturating_sub(by.rewards.len() as u64);
            if unknown > 0 {
                log::warn!(
                    "[stop]: the rewards of {unknown} of the {done} iterations that are done are not known; they count for \
                     nothing"
                );
            }
        }
        Ok(stop)
    }

    /// What a checkpoint keeps besides the learner's; nothing without `[stop]`.
    pub fn add_to(&self, meta: &mut Value, done: u64) -> Result<()> {
        if let Some(by) = &self.by {
            meta[REWARDS] = serde_json::to_value(by.rewards.kept(done))?;
        }
        Ok(())
    }

    /// Takes over an iteration's rewards, and puts the windows' numbers beside them where the iteration completes a
    /// window. Gives whether the run ends here by what `source` shows. A collective call.
    pub fn see(&mut self, source: RewardSource, metrics: &mut Metrics, comm: &dyn Communicator) -> Result<bool> {
        let done = metrics.iteration + 1;
        if let Some(by) = &mut self.by {
            by.rewards.note(metrics);
            if by.settings.reward == source && done % by.settings.window == 0 {
                by.curves().iter().for_each(|curve| by.describe(curve, metrics));
            }
        }
        self.saturated(source, done, comm)
    }

    /// Whether the run is at its end after `done` iterations. A collective call.
    pub fn is_end(&self, done: u64, comm: &dyn Communicator) -> Result<bool> {
        let saturated = match &self.by {
            Some(by) => self.saturated(by.settings.reward, done, comm)?,
            None => false,
        };
        Ok(saturated || done == self.at_most)
    }

    /// Never before the values of `done` are there: an evaluation may still be to come.
    fn saturated(&self, source: RewardSource, done: u64, comm: &dyn Communicator) -> Result<bool> {
        let Some(by) = self.by.as_ref().filter(|by| by.settings.reward == source) else { return Ok(false) };
        if done % by.settings.window != 0 {
            return Ok(false);
        }
        let so = || by.rewards.reach(source, done) && by.settings.rule().saturated(&by.curves(), done);
        let mut decided = vec![u8::from(comm.rank() == 0 && so())];
        comm.broadcast_bytes(&mut decided, 0)?;
        Ok(decided == [1])
    }

    /// How the run ended after `done` iterations.
    pub fn ending(&self, done: u64) -> Ending {
        match &self.by {
            Some(by) if done < self.at_most => Ending {
                reason: Reason::Saturated,
                iterations: done,
                at_most: self.at_most,
                words: by.why(done, self.at_most),
            },
            _ => Ending::all_iterations(done),
        }
    }
}

impl By {
    fn curves(&self) -> Vec<Curve> {
        self.rewards.curves(self.settings.reward)
    }

    fn describe(&self, curve: &Curve, metrics: &mut Metrics) {
        let of = |name: &str| match curve.name.as_str() {
            MEAN_OF_TASKS => name.to_string(),
            task => names::of_task(task, name),
        };
        let windows = curve.windows(self.settings.window, metrics.iteration + 1);
        if let Some(newest) = windows.last() {
            metrics.set(of(names::WINDOW_MEAN), newest.mean);
        }
        if let Some(rise) = windows.rise(self.settings.patience) {
            metrics.set(of(names::WINDOW_RISE), rise.in_standard_errors());
        }
    }

    fn why(&self, done: u64, at_most: u64) -> String {
        let StopConfig { window, patience, rise, reward, .. } = &self.settings;
        let of = |curve: &Curve| {
            let found = curve.windows(*window, done).rise(*patience)?;
            Some(format!(
                "{}: {:.4} after {:.4} in iterations {} to {} ({:+.1} standard errors)",
                curve.name,
                found.newer.mean,
                found.best.mean,
                found.best.from,
                found.best.to,
                found.in_standard_errors()
            ))
        };
        let curves: Vec<String> = self.curves().iter().filter_map(of).collect();
        format!(
            "the {} has saturated after {done} of at most {at_most} iterations: no rise by more than {rise} times the \
             standard error in the newest {patience} windows of {window} iterations ({})",
            reward.words(),
            curves.join("; ")
        )
    }
}

/// What a run that is over, or under way, has to say of rewards that fell back from their best.
pub fn fallen_back(config: &Config, history: &[Metrics]) -> Vec<FallBack> {
    let rewards = Rewards::of(config.trained_tasks().map(|(_, task)| task.name.as_str()), history);
    let done = history.last().map_or(0, |metrics| metrics.iteration + 1);
    Judge::of_run(config, done).all_fallen_back(&rewards, done)
}
