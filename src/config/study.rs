//! A study's configuration: runs of several methods with several seeds, and how their models are compared; see
//! [`crate::study`].

use std::path::Path;

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};

use super::{
    bounds,
    load::{self, read_toml},
    Config, EvalConfig, EvalModel,
};
use crate::{convergence::Criterion, folders::check_name};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StudyConfig {
    pub study: StudySettings,
    /// When a run's reward has saturated, for Table 2; without it windows are a sixth of the run, at least 4 and at most 50
    /// iterations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saturation: Option<SaturationConfig>,
    pub quick: QuickSettings,
    /// Models that no run makes, rows of Tables 1, 3 and 4 beside the base model.
    #[serde(rename = "model", default, skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<EvalModel>,
    #[serde(rename = "run", default)]
    pub runs: Vec<StudyRun>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StudySettings {
    /// Results go to `runs/<name>/` unless `--out` says otherwise.
    pub name: String,
    /// Every run is made once with each.
    pub seeds: Vec<u64>,
    /// The evaluation whose sets and noise the models are compared on; its models are not used.
    pub evaluation: String,
    /// Settings for all runs, as `--set` takes them.
    pub set: Vec<String>,
    /// Share of a run's gain on held-out prompts whose time Table 2 gives besides that of the saturation.
    pub converged_at: f64,
    /// Resamplings behind each confidence interval.
    pub resamplings: usize,
}

/// As the keys of the same names in [`super::StopConfig`], for all runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SaturationConfig {
    pub window: u64,
    pub patience: usize,
    #[serde(default)]
    pub min_iterations: u64,
    pub rise: f64,
    pub fall: f64,
}

impl SaturationConfig {
    pub fn rule(&self) -> Criterion {
        let SaturationConfig { window, patience, rise, fall, .. } = *self;
        Criterion { window, patience, min_iterations: self.min_iterations, rise, fall }
    }
}

/// What `--quick` changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuickSettings {
    /// More settings for all runs.
    pub set: Vec<String>,
    /// Prompts of each set of the evaluation, at most.
    pub prompts: usize,
    /// How many of the seeds, the first ones; all where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seeds: Option<usize>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StudyRun {
    /// What the tables call it.
    pub name: String,
    /// Its experiment.
    pub config: String,
    /// Settings of this run alone.
    pub set: Vec<String>,
    /// As `set`, with `--quick`.
    pub quick: Vec<String>,
}

/// Does this text configure a study?
pub fn is_study(text: &str) -> bool {
    text.parse::<toml::Table>().is_ok_and(|table| table.contains_key("study"))
}

impl StudyConfig {
    /// # Errors
    /// Names the file and the key.
    pub fn load(path: &Path) -> Result<Self> {
        let config: StudyConfig = read_toml(path, &[])?;
        config.validate().with_context(|| path.display().to_string())?;
        Ok(config)
    }

    pub(super) fn validate(&self) -> Result<()> {
        bounds::check(self, "")?;
        let s = &self.study;
        check_name("study.name", &s.name)?;
        ensure!(!s.seeds.is_empty(), "study.seeds must name seeds");
        for (i, seed) in s.seeds.iter().enumerate() {
            ensure!(!s.seeds[..i].contains(seed), "study.seeds names {seed} twice");
        }
        ensure!(!self.runs.is_empty(), "there is no [[run]]");
        for (i, run) in self.runs.iter().enumerate() {
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
            let name = &run.name;
            ensure!(!name.is_empty() && name.chars().all(plain), "run name {name:?}: letters, digits, - and _ only");
            ensure!(name != "base", "no run may be named base: that is the model before training");
            ensure!(self.runs[..i].iter().all(|r| r.name != *name), "two runs are named {name}");
        }
        for model in &self.models {
            let name = &model.name;
            ensure!(name != "base", "no [[model]] may be named base: that is the model before training");
            ensure!(self.runs.iter().all(|run| run.name != *name), "a model and a run are named {name}");
        }
        Ok(())
    }

    /// The experiment of a run with a seed.
    ///
    /// # Errors
    /// Its file, or a setting.
    pub fn run_config(&self, run: &StudyRun, seed: u64, quick: bool) -> Result<Config> {
        let mut settings = [self.study.set.as_slice(), &run.set].concat();
        if quick {
            settings.extend(self.quick.set.iter().chain(&run.quick).cloned());
        }
        settings.extend([format!("run.seed={seed}"), format!("run.name={}", StudyConfig::run_name(run, seed))]);
        let config = load::load(load::Experiment::File(Path::new(&run.config)), &settings)
            .and_then(|config| config.validate().map(|_| config).with_context(|| run.config.clone()));
        config.with_context(|| format!("run {}", run.name))
    }

    /// A run's name with its seed, also that of its folder.
    pub fn run_name(run: &StudyRun, seed: u64) -> String {
        format!("{}-seed{seed}", run.name)
    }

    /// The evaluation, still without models.
    pub fn evaluation(&self, quick: bool) -> Result<EvalConfig> {
        let mut evaluation = EvalConfig::load(Path::new(&self.study.evaluation), &[])?;
        if quick {
            for set in &mut evaluation.sets {
                set.count = if set.count == 0 { self.quick.prompts } else { set.count.min(self.quick.prompts) };
            }
        }
        Ok(evaluation)
    }
}
