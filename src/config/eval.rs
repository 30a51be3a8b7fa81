//! An evaluation's configuration: models × prompt sets × metrics; see [`crate::evaluation`].

use std::path::Path;

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};

use super::{
    bounds,
    load::read_toml,
    validate::{validate_name, validate_reward},
    Compute, Config, PromptConfig, RewardConfig,
};
use crate::{device::numerics::Precision, folders::check_name};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalConfig {
    pub eval: EvalSettings,
    pub rollout: EvalRollout,
    /// The first one is what the others are compared with.
    #[serde(rename = "model", default)]
    pub models: Vec<EvalModel>,
    #[serde(rename = "set", default)]
    pub sets: Vec<EvalSet>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalSettings {
    /// Results go to `runs/<name>/` unless `--out` says otherwise.
    pub name: String,
    /// Seed of the prompts' order and of the noise; the same for all models.
    pub seed: u64,
    /// libtorch's threads per rank.
    pub threads: usize,
    /// What the U-Nets compute in.
    pub compute: Compute,
    /// What VAEs, text encoders and the metrics' networks compute in.
    #[serde(default)]
    pub frozen_compute: Precision,
    /// Pictures that the VAE decodes at once; 0 for all that are drawn at once.
    pub decode_batch: usize,
    /// Prompts of each set on the sheet of pictures.
    pub pictures: usize,
    /// Every picture stays as a PNG file; false: those of the sheet alone.
    pub keep_images: bool,
}

/// How pictures are drawn; as in a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalRollout {
    /// N.
    pub steps: usize,
    /// η.
    pub eta: f64,
    /// g.
    pub guidance_scale: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalModel {
    pub name: String,
    /// `miniature`, a diffusers folder, a run's folder (its tuned model) or a checkpoint.
    pub path: String,
    /// A LoRA adapter to add, a file or a folder; "" for none.
    pub lora: String,
}

/// Which of a source's prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EvalSplit {
    /// Those that are never trained on.
    HeldOut,
    /// Those that are trained on.
    Train,
    /// The held-out ones where there are some, else all: what a run evaluates on.
    Evaluation,
    /// All of them, of a source that nothing is trained on.
    All,
}

/// What becomes of a set with prompts that one of the models was trained on; a set with `split = "train"` is meant to have
/// them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlap {
    /// An error: it would be no test.
    #[default]
    Refuse,
    /// A warning that names three of them.
    Warn,
}

impl Overlap {
    fn is_refused(&self) -> bool {
        *self == Overlap::Refuse
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalSet {
    pub name: String,
    pub prompts: PromptConfig,
    pub split: EvalSplit,
    #[serde(default, skip_serializing_if = "Overlap::is_refused")]
    pub overlap: Overlap,
    /// How many prompts, in a seeded order; 0 for all.
    pub count: usize,
    pub images_per_prompt: usize,
    pub metrics: Vec<Metric>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metric {
    pub name: String,
    pub reward: RewardConfig,
}

impl EvalSet {
    /// What it is, in a line.
    pub fn summary(&self) -> String {
        let count = if self.count == 0 { "all".to_string() } else { self.count.to_string() };
        let of_training = if self.split == EvalSplit::Train { " that are trained on" } else { "" };
        let metrics: Vec<&str> = self.metrics.iter().map(|metric| metric.name.as_str()).collect();
        format!("{count} prompts{of_training}, {} pictures each: {}", self.images_per_prompt, metrics.join(", "))
    }
}

/// Does this text configure an evaluation (and not a run)?
pub fn is_evaluation(text: &str) -> bool {
    text.parse::<toml::Table>().is_ok_and(|table| table.contains_key("eval"))
}

impl EvalConfig {
    /// Overrides as in [`super::load::load`]; `model.NAME.key` and `set.NAME.key` address the one of that name.
    ///
    /// # Errors
    /// Names the file or override, and the key.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        let config: EvalConfig = read_toml(path, overrides)?;
        config.validate().with_context(|| path.display().to_string())?;
        Ok(config)
    }

    /// What a run evaluates at its end: its tasks on the prompts that it holds out.
    pub fn of_run(config: &Config) -> Result<Self> {
        let sets = config.tasks.iter().map(|task| {
            Ok(EvalSet {
                name: task.name.clone(),
                prompts: task.prompts.clone(),
                split: EvalSplit::Evaluation,
                // a run may hold no prompt out, and has no key to say what then
                overlap: Overlap::Warn,
                count: task.evaluation_samples / task.evaluation_images_per_prompt,
                images_per_prompt: task.evaluation_images_per_prompt,
                metrics: vec![Metric { name: task.reward.name()?, reward: task.reward.clone() }],
            })
        });
        Ok(EvalConfig {
            eval: EvalSettings {
                name: format!("{}-evaluation", config.run.name),
                seed: config.evaluation.seed,
                threads: config.run.threads,
                compute: Compute::F32,
                frozen_compute: config.model.frozen_compute,
                decode_batch: config.model.decode_batch,
                pictures: config.evaluation.pictures,
                keep_images: false,
            },
            rollout: EvalRollout {
                steps: config.rollout.steps,
                eta: config.rollout.eta,
                guidance_scale: config.rollout.guidance_scale,
            },
            models: vec![EvalModel::at(&config.model.path)],
            sets: sets.collect::<Result<_>>()?,
        })
    }

    pub fn validate(&self) -> Result<()> {
        bounds::check(self, "")?;
        let e = &self.eval;
        check_name("eval.name", &e.name)?;
        ensure!(!self.models.is_empty(), "there is no [[model]]");
        ensure!(!self.sets.is_empty(), "there is no [[set]]");
        ensure!(self.sets.len() < 256, "at most 255 sets");
        for (i, model) in self.models.iter().enumerate() {
            ensure!(!model.name.is_empty(), "a model has no name");
            let same = |other: &&EvalModel| other.folder() == model.folder();
            let twin = self.models[..i].iter().find(same);
            ensure!(twin.is_none(), "two models are named {}", model.name);
        }
        for (i, set) in self.sets.iter().enumerate() {
            let name = &set.name;
            validate_name("set", name)?;
            ensure!(self.sets[..i].iter().all(|s| s.name != *name), "two sets are named {name}");
            let samples = set.count as u64 * set.images_per_prompt as u64;
            ensure!(samples < 1 << 32, "set.{name}: count times images_per_prompt must be below 2^32");
            ensure!(!set.metrics.is_empty(), "set.{name}.metrics must name rewards");
            for (j, metric) in set.metrics.iter().enumerate() {
                let metrics = &set.metrics[..j];
                ensure!(metrics.iter().all(|m| m.name != metric.name), "set.{name}: two metrics are {}", metric.name);
                validate_reward(&metric.reward, true).with_context(|| format!("set.{name}.metrics.{}", metric.name))?;
            }
        }
        Ok(())
    }
}

impl EvalModel {
    /// A model by its place alone.
    pub fn at(path: &str) -> Self {
        EvalModel { name: path.to_owned(), path: path.to_owned(), lora: String::new() }
    }

    /// Its folder in the results.
    pub fn folder(&self) -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' };
        let name: String = self.name.chars().map(plain).collect();
        match name.trim_matches(['-', '.']) {
            // "." and the like
            "" => "model".to_string(),
            name => name.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load::{parse, EMBEDDED_JOINT};

    fn of_joint() -> EvalConfig {
        EvalConfig::of_run(&parse(EMBEDDED_JOINT, "joint", &[]).unwrap()).unwrap()
    }

    #[test]
    fn a_runs_tasks_are_an_evaluation() {
        let config = of_joint();
        config.validate().unwrap();
        let counts: Vec<_> = config.sets.iter().map(|s| (s.name.as_str(), s.count, s.images_per_prompt)).collect();
        assert_eq!(counts, [("composition", 512, 1), ("parity", 128, 16), ("preference", 256, 1)]);
        let text = toml::to_string(&config).unwrap();
        assert!(is_evaluation(&text) && !is_evaluation(EMBEDDED_JOINT));
        assert_eq!(toml::from_str::<EvalConfig>(&text).unwrap(), config);
    }

    #[test]
    fn mistakes_are_named() {
        let error = |change: fn(&mut EvalConfig)| {
            let mut config = of_joint();
            change(&mut config);
            format!("{:#}", config.validate().unwrap_err())
        };
        for (found, wanted) in [
            (error(|c| c.models.clear()), "no [[model]]"),
            (error(|c| c.sets.clear()), "no [[set]]"),
            (
                error(|c| c.models = vec![EvalModel::at("runs/a"), EvalModel::at("runs-a")]),
                "two models are named runs-a",
            ),
            (error(|c| c.sets[1].name = "composition".into()), "two sets are named composition"),
            (error(|c| c.sets[1].metrics.clear()), "set.parity.metrics must name rewards"),
            (error(|c| c.sets[1].images_per_prompt = 0), "set.parity.images_per_prompt"),
            (error(|c| c.rollout.steps = 0), "rollout.steps = 0"),
            (error(|c| c.eval.name = "a/b".into()), "eval.name"),
        ] {
            assert!(found.contains(wanted), "{found}");
        }
        assert_eq!(EvalModel::at("../runs/a b").folder(), "runs-a-b");
    }
}
