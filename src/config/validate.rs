//! The batch arithmetic of a config, checked in one place.

use anyhow::{ensure, Context, Result};

use super::{
    bounds, ClassifierConfig, ClipScoreSettings, Config, PairData, PickScoreSettings, PretrainMode, Resizing,
    RewardConfig, TaskConfig,
};
use crate::{folders::check_name, miniature::Edition};

/// Sizes that follow from a config.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Derived {
    /// Samples per iteration over all trained tasks and ranks.
    pub samples_per_iteration: usize,
    /// AdamW steps per iteration: of the policy and of L_pre.
    pub optimizer_steps_per_iteration: usize,
    /// Pretraining pairs per optimizer step, over all ranks.
    pub pretrain_batch: usize,
}

impl Config {
    /// Checks everything that can be known without the model, and derives the sizes.
    ///
    /// # Errors
    /// Names the key and what it must be.
    pub fn validate(&self) -> Result<Derived> {
        bounds::check(self, "")?;
        let r = &self.run;
        check_name("run.name", &r.name)?;
        ensure!(
            r.checkpoint_every == 0 || r.keep_every % r.checkpoint_every == 0,
            "run.keep_every = {} must be a multiple of run.checkpoint_every = {} (0 for none)",
            r.keep_every,
            r.checkpoint_every
        );
        let l = &self.lora;
        ensure!(l.rank == 0 || l.alpha > 0.0, "lora.alpha must be positive");
        ensure!(l.rank == 0 || !l.targets.is_empty(), "lora.targets must name layers");
        for (i, target) in l.targets.iter().enumerate() {
            let known = ["to_q", "to_k", "to_v", "to_out.0"];
            ensure!(known.contains(&target.as_str()), "lora.targets: {target:?} is not one of {}", known.join(", "));
            ensure!(!l.targets[..i].contains(target), "lora.targets names {target:?} twice");
        }
        let u = &self.update;
        ensure!(
            u.learning_rate * u.weight_decay <= 1.0,
            "update.weight_decay = {} times update.learning_rate = {} must be at most 1: a step would decay the weights to \
             beyond 0",
            u.weight_decay,
            u.learning_rate
        );
        let p = &self.pretrain;
        ensure!(!self.tasks.is_empty(), "there is no [[task]]");
        ensure!(self.tasks.len() < 256, "at most 255 tasks");
        for (i, task) in self.tasks.iter().enumerate() {
            ensure!(self.tasks[..i].iter().all(|t| t.name != task.name), "two tasks are named {}", task.name);
            self.validate_task(task)?;
        }
        ensure!(self.trained_tasks().count() > 0, "no task has train = true");
        self.method.validate(self)?;
        self.stop.as_ref().map_or(Ok(()), |stop| stop.validate(self))?;
        let slots = self.tasks.len() * self.method.updates();
        ensure!(
            p.mode != PretrainMode::Combined || slots <= usize::from(u16::MAX),
            "pretrain.mode = \"combined\" with {} tasks of {} updates each: at most {} in all",
            self.tasks.len(),
            self.method.updates(),
            u16::MAX
        );
        if let (Some(of_model), PairData::Miniature { edition }) = (Edition::of_model(&self.model.path), &p.data) {
            ensure!(
                p.mode == PretrainMode::Off || of_model == *edition,
                "pretrain.data.edition = {}: the model \"{}\" was pretrained on the pictures of edition {}",
                u8::from(*edition),
                self.model.path,
                u8::from(of_model)
            );
        }
        let pretrain_steps = if p.mode == PretrainMode::Separate { p.steps } else { 0 };
        Ok(Derived {
            samples_per_iteration: self.trained_tasks().map(|(_, t)| t.samples).sum(),
            optimizer_steps_per_iteration: self.trained_tasks().count() * self.method.updates() + pretrain_steps,
            pretrain_batch: p.batch_per_lane * r.lanes,
        })
    }

    fn validate_task(&self, task: &TaskConfig) -> Result<()> {
        let name = &task.name;
        validate_name("task", name)?;
        let piece = self.run.lanes * task.images_per_prompt;
        ensure!(
            task.samples % piece == 0,
            "task.{name}.samples = {} must be a multiple of {piece} (run.lanes = {} times images_per_prompt = {})",
            task.samples,
            self.run.lanes,
            task.images_per_prompt
        );
        let per_prompt = task.evaluation_images_per_prompt;
        ensure!(
            task.evaluation_samples % per_prompt == 0,
            "task.{name}.evaluation_samples = {} must be a multiple of evaluation_images_per_prompt = {per_prompt}",
            task.evaluation_samples
        );
        validate_reward(&task.reward, true).with_context(|| format!("task.{name}.reward"))?;
        if judges_groups(&task.reward) {
            ensure!(
                task.images_per_prompt > 1 && per_prompt > 1,
                "task.{name}.images_per_prompt = {}: parity judges the pictures of a prompt together, it needs several",
                task.images_per_prompt
            );
        }
        Ok(())
    }
}

/// The name of a task or of a prompt set, which also names files, metrics and keys.
pub(super) fn validate_name(what: &str, name: &str) -> Result<()> {
    ensure!(!name.is_empty() && !name.contains(['/', '.', ' ']), "{what} name {name:?}: no dots, slashes or spaces");
    check_name(&format!("{what} name"), name)?;
    ensure!(name.len() <= 100, "{what} name {name:?}: at most 100 bytes");
    Ok(())
}

fn judges_groups(reward: &RewardConfig) -> bool {
    match reward {
        RewardConfig::Parity { .. } => true,
        RewardConfig::Sum { parts, .. } => parts.iter().any(|part| judges_groups(&part.reward)),
        _ => false,
    }
}

/// Checks what can be known of a reward without building it, besides the bounds of its numbers; `outermost`: it is no part
/// of a sum.
pub fn validate_reward(reward: &RewardConfig, outermost: bool) -> Result<()> {
    match reward {
        RewardConfig::Sum { parts, .. } => {
            ensure!(outermost, "a sum cannot be a part of a sum");
            ensure!(!parts.is_empty(), "parts must name rewards");
            for part in parts {
                validate_reward(&part.reward, false)?;
            }
        }
        RewardConfig::Command(c) => {
            ensure!(c.command.first().is_some_and(|p| !p.is_empty()), "command must name a program");
        }
        RewardConfig::Server(s) => {
            let named = match s.address.split_once(':') {
                Some(("unix", path)) => !path.is_empty(),
                Some(("http", rest)) => rest.trim_start_matches('/').len() > 1 && rest.starts_with("//"),
                Some((host, port)) => !host.is_empty() && !port.contains('/'),
                None => false,
            };
            ensure!(named, "address = {:?} must be HOST:PORT, unix:PATH or http://HOST:PORT/PATH", s.address);
        }
        RewardConfig::Composition(u) => {
            let [short, long] = [u.short_side, u.long_side];
            ensure!(short <= long, "short_side = {short} and long_side = {long} must ascend");
        }
        RewardConfig::PickScore(PickScoreSettings { resizing, antialias, .. })
        | RewardConfig::ClipScore(ClipScoreSettings { resizing, antialias, .. }) => {
            ensure!(
                *antialias || *resizing != Resizing::PillowBicubic,
                "antialias = false: Pillow antialiases always (resizing = \"float_bicubic\" need not)"
            );
        }
        RewardConfig::Parity { classifier: ClassifierConfig::SkinTone(s) } => {
            let [a, b, c] = s.cuts;
            ensure!(a < b && b < c, "classifier.cuts must be degrees that ascend");
        }
        RewardConfig::Parity { classifier: ClassifierConfig::Torchscript { classes, .. } } => {
            ensure!(classes.len() >= 2, "classifier.classes must name two or more");
            for (i, class) in classes.iter().enumerate() {
                ensure!(!classes[..i].contains(class), "classifier.classes names {class:?} twice");
            }
        }
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::load::{parse, EMBEDDED_JOINT};

    #[test]
    fn the_embedded_config_is_sound() {
        let config = parse(EMBEDDED_JOINT, "joint", &[]).unwrap();
        let derived = config.validate().unwrap();
        assert_eq!(derived.optimizer_steps_per_iteration, 3 * config.method.updates() + config.pretrain.steps);
    }

    #[test]
    fn impossible_sources_and_rewards_are_refused() {
        let shards = "pretrain.data={ source = 'webdataset', folder = 'x', score_column = '', score_min = 0.0, \
                      drop_words = '', threads = 0, prefetch = 1 }";
        let tone = "task.parity.reward={ name = 'parity', classifier = { name = 'skin_tone', face_model = 'x', \
                    min_face_pixels = 40, face_score = 2.0, cuts = [10.0, 10.0, 41.0] } }";
        let part = "{ weight = 1.0, reward = { name = 'parity', classifier = { name = 'miniature_skin_tone' } } }";
        let sum =
            |parts: &str| format!("task.preference.reward={{ name = 'sum', normalise = true, parts = [{parts}] }}");
        let program = |timeout: &str| {
            format!(
                "task.preference.reward={{ name = 'command', command = ['x'], timeout_seconds = {timeout}, \
                 start_timeout_seconds = 1.0, restarts = 0 }}"
            )
        };
        let inner = "{ weight = 1.0, reward = { name = 'sum', normalise = false, parts = [] } }";
        for (set, wanted) in [
            (shards.to_string(), "pretrain.data.threads = 0"),
            (tone.to_string(), "classifier.cuts"),
            (sum(""), "parts must name rewards"),
            (sum(inner), "a sum cannot be a part of a sum"),
            (sum(&part.replace("1.0", "nan")), "weight = NaN must be in"),
            (sum(part), "parity judges the pictures of a prompt together"),
            (program("0.0"), "reward.timeout_seconds = 0 must be in 0.001..=86400"),
            (program("nan"), "timeout_seconds = NaN must be in"),
            ("lora.targets=['to_q', 'to_q']".to_string(), "\"to_q\" twice"),
        ] {
            let config =
                parse(EMBEDDED_JOINT, "joint", std::slice::from_ref(&set)).unwrap_or_else(|e| panic!("{set}: {e:#}"));
            let e = format!("{:#}", config.validate().unwrap_err());
            assert!(e.contains(wanted), "{set}: {e}");
        }
    }

    #[test]
    fn impossible_numbers_are_refused() {
        for (set, wanted) in [
            ("task.parity.samples=100", "multiple of"),
            ("task.parity.images_per_prompt=1", "parity judges"),
            ("run.lanes=0", "run.lanes"),
            ("run.keep_every=7", "run.keep_every = 7"),
            ("run.reward_limit=-1.0", "run.reward_limit"),
            ("method.timesteps=7", "method.timesteps = 7"),
            ("rollout.eta=0.0", "rollout.eta"),
            ("ema.decay=1.0", "ema.decay"),
            ("comm.bucket_mb=0.0", "comm.bucket_mb"),
            ("evaluation.prompts=0", "evaluation.prompts = 0"),
            ("evaluation.images=1", "evaluation.images = 1 must be in 2..="),
            ("update.weight_decay=1e5", "update.weight_decay = 100000 times"),
            ("task.parity.evaluation_samples=17", "evaluation_samples"),
        ] {
            let config = parse(EMBEDDED_JOINT, "joint", &[set.to_string()]).unwrap();
            let e = config.validate().unwrap_err().to_string();
            assert!(e.contains(wanted), "{set}: {e}");
        }
    }
}
