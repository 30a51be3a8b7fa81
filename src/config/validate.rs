//! The batch arithmetic of a config, checked in one place.

use anyhow::{ensure, Context, Result};

use super::{ClassifierConfig, Config, PairData, PretrainMode, RewardConfig, TaskConfig};
use crate::folders::check_name;

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
        let r = &self.run;
        check_name("run.name", &r.name)?;
        ensure!(r.lanes > 0, "run.lanes must be at least 1");
        ensure!(r.threads > 0, "run.threads must be at least 1");
        ensure!(r.iterations < u64::from(u32::MAX), "run.iterations must be below 2^32");
        ensure!(r.keep_checkpoints > 0, "run.keep_checkpoints must be at least 1");
        ensure!(
            r.checkpoint_every == 0 || r.keep_every % r.checkpoint_every == 0,
            "run.keep_every = {} must be a multiple of run.checkpoint_every = {} (0 for none)",
            r.keep_every,
            r.checkpoint_every
        );
        for (key, limit) in [("collective_limit", r.collective_limit), ("reward_limit", r.reward_limit)] {
            ensure!(limit >= 0.0 && limit.is_finite(), "run.{key} = {limit} must be a number of seconds (0 for never)");
        }
        let l = &self.lora;
        ensure!((0..=4096).contains(&l.rank), "lora.rank = {} must be in 0..=4096", l.rank);
        ensure!(l.rank == 0 || l.alpha > 0.0, "lora.alpha must be positive");
        ensure!(l.rank == 0 || !l.targets.is_empty(), "lora.targets must name layers");
        for target in &l.targets {
            let known = ["to_q", "to_k", "to_v", "to_out.0"];
            ensure!(known.contains(&target.as_str()), "lora.targets: {target:?} is not one of {}", known.join(", "));
        }
        let o = &self.rollout;
        ensure!(o.steps > 0 && o.steps <= 1000, "rollout.steps = {} must be in 1..=1000", o.steps);
        ensure!((0.0..=1.0).contains(&o.eta), "rollout.eta = {} must be in 0..=1", o.eta);
        ensure!(o.guidance_scale.is_finite(), "rollout.guidance_scale must be finite");
        self.validate_update()?;
        let bucket = self.comm.bucket_mb;
        ensure!(bucket > 0.0 && bucket <= 65536.0, "comm.bucket_mb = {bucket} must be above 0 and at most 65536");
        let p = &self.pretrain;
        ensure!(p.batch_per_lane > 0, "pretrain.batch_per_lane must be at least 1");
        ensure!((0.0..=1.0).contains(&p.caption_dropout), "pretrain.caption_dropout must be in 0..=1");
        ensure!(p.weight >= 0.0, "pretrain.weight must not be negative");
        if let PairData::Webdataset(w) = &p.data {
            ensure!((1..=256).contains(&w.threads), "pretrain.data.threads = {} must be in 1..=256", w.threads);
            ensure!(w.prefetch <= 1024, "pretrain.data.prefetch = {} must be at most 1024", w.prefetch);
        }
        ensure!((0.0..1.0).contains(&self.ema.decay), "ema.decay must be in 0..1");
        self.validate_evaluation()?;

        ensure!(!self.tasks.is_empty(), "there is no [[task]]");
        ensure!(self.tasks.len() < 256, "at most 255 tasks");
        for (i, task) in self.tasks.iter().enumerate() {
            ensure!(self.tasks[..i].iter().all(|t| t.name != task.name), "two tasks are named {}", task.name);
            self.validate_task(task)?;
        }
        ensure!(self.trained_tasks().count() > 0, "no task has train = true");
        self.method.validate(self)?;
        let pretrain_steps = if p.mode == PretrainMode::Separate { p.steps } else { 0 };
        Ok(Derived {
            samples_per_iteration: self.trained_tasks().map(|(_, t)| t.samples).sum(),
            optimizer_steps_per_iteration: self.trained_tasks().count() * self.method.updates() + pretrain_steps,
            pretrain_batch: p.batch_per_lane * r.lanes,
        })
    }

    fn validate_update(&self) -> Result<()> {
        let u = &self.update;
        ensure!(u.learning_rate >= 0.0, "update.learning_rate must not be negative");
        ensure!((0.0..1.0).contains(&u.beta1) && (0.0..1.0).contains(&u.beta2), "update.beta1, beta2 must be in 0..1");
        ensure!(u.epsilon > 0.0 && u.weight_decay >= 0.0, "update.epsilon must be positive, weight_decay not negative");
        ensure!(u.max_grad_norm >= 0.0, "update.max_grad_norm must not be negative (0 for never)");
        Ok(())
    }

    fn validate_evaluation(&self) -> Result<()> {
        let e = &self.evaluation;
        ensure!(
            e.prompts > 0 && e.images > 1,
            "evaluation.prompts = {} must be at least 1, evaluation.images = {} at least 2",
            e.prompts,
            e.images
        );
        Ok(())
    }

    fn validate_task(&self, task: &TaskConfig) -> Result<()> {
        let name = &task.name;
        ensure!(!name.is_empty() && !name.contains(['/', '.', ' ']), "task name {name:?}: no dots, slashes or spaces");
        check_name("task name", name)?;
        ensure!(task.weight.is_finite() && task.weight >= 0.0, "task.{name}.weight must not be negative");
        ensure!(task.images_per_prompt > 0, "task.{name}.images_per_prompt must be at least 1");
        let piece = self.run.lanes * task.images_per_prompt;
        ensure!(
            task.samples > 0 && task.samples % piece == 0,
            "task.{name}.samples = {} must be a multiple of {piece} (run.lanes = {} times images_per_prompt = {})",
            task.samples,
            self.run.lanes,
            task.images_per_prompt
        );
        let per_prompt = task.evaluation_images_per_prompt;
        ensure!(per_prompt > 0, "task.{name}.evaluation_images_per_prompt must be at least 1");
        ensure!(
            task.evaluation_samples > 0 && task.evaluation_samples % per_prompt == 0,
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

fn judges_groups(reward: &RewardConfig) -> bool {
    match reward {
        RewardConfig::Parity { .. } => true,
        RewardConfig::Sum { parts, .. } => parts.iter().any(|part| judges_groups(&part.reward)),
        _ => false,
    }
}

/// Checks what can be known of a reward without building it; `outermost`: it is no part of a sum.
pub fn validate_reward(reward: &RewardConfig, outermost: bool) -> Result<()> {
    match reward {
        RewardConfig::Sum { parts, .. } => {
            ensure!(outermost, "a sum cannot be a part of a sum");
            ensure!(!parts.is_empty(), "parts must name rewards");
            for part in parts {
                ensure!(part.weight.is_finite(), "parts: weight = {} must be finite", part.weight);
                validate_reward(&part.reward, false)?;
            }
        }
        RewardConfig::Command(c) => {
            ensure!(!c.command.is_empty(), "command must name a program");
            validate_timeouts(c.timeout_seconds, c.start_timeout_seconds)?;
        }
        RewardConfig::Server(s) => {
            let named = match s.address.split_once(':') {
                Some(("unix", path)) => !path.is_empty(),
                Some(("http", rest)) => rest.trim_start_matches('/').len() > 1 && rest.starts_with("//"),
                Some((host, port)) => !host.is_empty() && !port.contains('/'),
                None => false,
            };
            ensure!(named, "address = {:?} must be HOST:PORT, unix:PATH or http://HOST:PORT/PATH", s.address);
            validate_timeouts(s.timeout_seconds, s.start_timeout_seconds)?;
        }
        RewardConfig::Composition(u) => {
            ensure!((0.0..1.0).contains(&u.threshold), "threshold = {} must be in 0..1", u.threshold);
            let [short, long] = [u.short_side, u.long_side];
            ensure!(
                (32..=long).contains(&short) && long <= 4096,
                "short_side = {short} and long_side = {long} must ascend and be in 32..=4096"
            );
        }
        RewardConfig::Parity { classifier: ClassifierConfig::SkinTone(s) } => {
            ensure!((20..=4096).contains(&s.min_face_pixels), "classifier.min_face_pixels must be in 20..=4096");
            ensure!(s.face_score > 0.0 && s.face_score.is_finite(), "classifier.face_score must be positive");
            let [a, b, c] = s.cuts;
            ensure!(-180.0 <= a && a < b && b < c && c <= 180.0, "classifier.cuts must be degrees that ascend");
        }
        RewardConfig::Parity { classifier: ClassifierConfig::Torchscript { classes, .. } } => {
            ensure!(classes.len() >= 2, "classifier.classes must name two or more");
        }
        _ => {}
    }
    Ok(())
}

fn validate_timeouts(batch: f64, start: f64) -> Result<()> {
    let day = 0.001..=86_400.0;
    ensure!(day.contains(&batch), "timeout_seconds must be in 0.001..=86400");
    ensure!(day.contains(&start), "start_timeout_seconds must be in 0.001..=86400");
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
            (sum(&part.replace("1.0", "nan")), "weight = NaN must be finite"),
            (sum(part), "parity judges the pictures of a prompt together"),
            (program("0.0"), "timeout_seconds must be in"),
            (program("nan"), "timeout_seconds must be in"),
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
            ("evaluation.images=1", "evaluation.images = 1 at least 2"),
            ("task.parity.evaluation_samples=17", "evaluation_samples"),
        ] {
            let config = parse(EMBEDDED_JOINT, "joint", &[set.to_string()]).unwrap();
            let e = config.validate().unwrap_err().to_string();
            assert!(e.contains(wanted), "{set}: {e}");
        }
    }
}
