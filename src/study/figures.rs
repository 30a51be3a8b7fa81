//! The values of a study's models by set and metric, and quantities of them with their intervals.

use anyhow::{Context, Result};

use super::{
    paper::Kind,
    statistics::{BySeed, Interval, Resampling},
    tables::{trained, Cell, Table},
    Plan, BASE,
};
use crate::{config::RewardConfig, evaluation::ModelResult};

/// In place of a metric's name: the share of fine detail in the pictures, of which over-optimised ones have too much.
pub const FINE_DETAIL: &str = "fine detail";

/// The values of all models by name, set and metric, and the draws behind intervals.
pub struct Figures<'a> {
    pub plan: &'a Plan,
    pub results: &'a [ModelResult],
}

impl Figures<'_> {
    fn is_run(&self, name: &str) -> bool {
        self.plan.members.iter().any(|member| member.name == name)
    }

    /// A value per prompt of each seed; models that no run made have one seed.
    fn values(&self, run: &str, set: &str, metric: &str) -> Result<BySeed> {
        let names = match self.is_run(run) {
            false => vec![run.to_string()],
            true => self.plan.config.study.seeds.iter().map(|seed| format!("{run}-seed{seed}")).collect(),
        };
        let of = |name: &String| {
            let model = self.results.iter().find(|model| model.model == *name);
            let set =
                model.and_then(|model| model.set(set)).with_context(|| format!("no result of {name} on {set}"))?;
            Ok(if metric == FINE_DETAIL { set.fine_detail() } else { set.units(metric) })
        };
        names.iter().map(of).collect()
    }

    /// Of `quantity`, which is given each of `runs`' mean over `sets`, every set counting equally.
    fn over_sets(
        &self,
        runs: &[&str],
        sets: &[String],
        metric: &str,
        quantity: impl Fn(&[f64]) -> f64,
    ) -> Result<Interval> {
        let mut values = Vec::new();
        for run in runs {
            for (number, set) in sets.iter().enumerate() {
                values.push((number, self.values(run, set, metric)?));
            }
        }
        let counts: Vec<usize> = values[..sets.len()].iter().map(|(_, of_set)| of_set[0].len()).collect();
        let study = &self.plan.config.study;
        let models: Vec<(usize, &BySeed)> = values.iter().map(|(set, model)| (*set, model)).collect();
        let resampling = Resampling::over_sets(study.seeds.len(), &counts, study.resamplings);
        Ok(resampling.interval_over_sets(&models, |means| {
            let of_runs = means.chunks(sets.len()).map(|of_run| of_run.iter().sum::<f64>() / sets.len() as f64);
            quantity(&of_runs.collect::<Vec<_>>())
        }))
    }

    /// The mean over sets as the tables print it: SP is minus the reward.
    pub fn value(&self, run: &str, sets: &[String], metric: &str) -> Result<Interval> {
        let sign = self.kind(&sets[0], metric).sign();
        self.over_sets(&[run], sets, metric, |means| sign * means[0])
    }

    /// By how much what the tables print changes from the base model to `run`.
    pub fn change(&self, run: &str, sets: &[String], metric: &str) -> Result<Interval> {
        let sign = self.kind(&sets[0], metric).sign();
        self.over_sets(&[run, BASE], sets, metric, |means| sign * (means[0] - means[1]))
    }

    /// By how much `run` is above `other` in the mean over sets.
    pub fn gain(&self, run: &str, other: &str, sets: &[String], metric: &str) -> Result<Interval> {
        self.over_sets(&[run, other], sets, metric, |means| means[0] - means[1])
    }

    /// A ratio of two runs' means over sets.
    pub fn ratio(
        &self,
        runs: [&str; 2],
        sets: &[String],
        metric: &str,
        ratio: impl Fn(f64, f64) -> f64,
    ) -> Result<Interval> {
        self.over_sets(&runs, sets, metric, |means| ratio(means[0], means[1]))
    }

    /// The share of `other`'s gain over `base` that `run` has.
    pub fn share_of_gain(&self, run: &str, other: &str, base: &str, sets: &[String], metric: &str) -> Result<Interval> {
        self.over_sets(&[run, other, base], sets, metric, |means| (means[0] - means[2]) / (means[1] - means[2]))
    }

    /// The kind of a set's metric.
    pub fn kind(&self, set: &str, metric: &str) -> Kind {
        let set = self.plan.evaluation.sets.iter().find(|other| other.name == set);
        let metric = set.and_then(|set| set.metrics.iter().find(|other| other.name == metric));
        Kind::of(&metric.expect("a metric of the evaluation").reward)
    }

    /// Sets and metrics whose reward is as wanted, in the evaluation's order.
    pub fn metrics(&self, wanted: impl Fn(&str, &RewardConfig) -> bool) -> Vec<(String, String)> {
        let sets = self.plan.evaluation.sets.iter();
        let all = sets.flat_map(|set| set.metrics.iter().map(move |metric| (set, metric)));
        all.filter(|(_, metric)| wanted(&metric.name, &metric.reward))
            .map(|(set, metric)| (set.name.clone(), metric.name.clone()))
            .collect()
    }

    /// Value and gain over the base model on each of `metrics`, a row for each of `runs` and of the models that no run made.
    pub fn comparison(&self, title: &str, note: &str, runs: &[&str], metrics: &[(String, String)]) -> Result<Table> {
        let mut columns = vec!["model".to_string(), "trained on".to_string()];
        for (set, metric) in metrics {
            columns.extend(match self.kind(set, metric) {
                Kind::Parity => [format!("SP on {set} (lower is better)"), "change".to_string()],
                _ => [format!("{metric} on {set}"), "gain".to_string()],
            });
        }
        let mut rows = Vec::new();
        let others = self.plan.config.models.iter().map(|model| model.name.as_str());
        for run in [BASE].into_iter().chain(others).chain(runs.iter().copied()) {
            let member = self.plan.members.iter().find(|member| member.name == run);
            let trained_on = member.map_or(String::new(), |member| trained(member).join(", "));
            let mut row = vec![Cell::Text(run.to_string()), Cell::Text(trained_on)];
            for (set, metric) in metrics {
                let set = std::slice::from_ref(set);
                row.push(Cell::Value(self.value(run, set, metric)?));
                row.push(match run {
                    BASE => Cell::Text(String::new()),
                    run => Cell::Gain(self.change(run, set, metric)?),
                });
            }
            rows.push(row);
        }
        Ok(Table { title: title.to_string(), note: note.to_string(), columns, rows })
    }
}
