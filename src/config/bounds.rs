//! The bounds of every number of a config, in one table. A number that is not in it is an error, so a new setting cannot be
//! without bounds.
//!
//! The bounds keep out what cannot be computed (infinities, counts that do not fit, waits that no clock can measure), what
//! vanishes in f32 and so would train nothing, and what no machine holds in memory. They do not judge what is wise.

use anyhow::{bail, ensure, Context, Result};
use serde::Serialize;
use toml::Value;

/// Where a number may lie.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bound {
    low: f64,
    high: f64,
    /// `low` itself is not allowed.
    above: bool,
    /// 0 is allowed besides: it turns something off.
    or_zero: bool,
}

impl Bound {
    pub const fn new(low: f64, high: f64) -> Self {
        Bound { low, high, above: false, or_zero: false }
    }

    const fn above(low: f64, high: f64) -> Self {
        Bound { above: true, ..Bound::new(low, high) }
    }

    const fn zero_or(low: f64, high: f64) -> Self {
        Bound { or_zero: true, ..Bound::new(low, high) }
    }

    pub fn allows(&self, value: f64) -> bool {
        let inside = self.low <= value && value <= self.high && !(self.above && value == self.low);
        inside || self.or_zero && value == 0.0
    }

    /// # Errors
    /// `value`, with its key and its bounds.
    pub fn ensure(&self, key: &str, value: f64) -> Result<()> {
        ensure!(self.allows(value), "{key} = {} must be {self}", shown(value));
        Ok(())
    }
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let (low, high) = (shown(self.low), shown(self.high));
        match (self.above, self.or_zero) {
            (true, _) => write!(f, "above {low} and at most {high}"),
            (_, true) => write!(f, "0 or in {low}..={high}"),
            _ => write!(f, "in {low}..={high}"),
        }
    }
}

/// A number as people write it.
fn shown(value: f64) -> String {
    let size = value.abs();
    match size != 0.0 && size.is_finite() && !(1e-4..1e10).contains(&size) {
        true => format!("{value:e}"),
        false => value.to_string(),
    }
}

/// Any seed; TOML's integers end here.
const SEED: Bound = Bound::new(0.0, i64::MAX as f64);
/// Iterations and optimizer steps; random numbers depend on them as 32 bits.
const ITERATIONS: Bound = Bound::new(0.0, (u32::MAX - 1) as f64);
/// Samples of a batch, prompts of a set: their numbers are 32 bits after all products.
const SAMPLES: Bound = Bound::new(1.0, 16_777_216.0);
const SAMPLES_OR_NONE: Bound = Bound::new(0.0, 16_777_216.0);
/// Pictures of a prompt.
const PER_PROMPT: Bound = Bound::new(1.0, 65_536.0);
/// Prompts held out of a list.
const HELD_OUT: Bound = Bound::new(0.0, (u32::MAX - 1) as f64);
const SHARE: Bound = Bound::new(0.0, 1.0);
/// Denoising steps; a model's schedule may allow fewer.
pub const STEPS: Bound = Bound::new(1.0, 1000.0);
/// A guidance scale; larger ones leave f32's range in the sampler.
pub const GUIDANCE: Bound = Bound::new(-1e6, 1e6);
/// The noise of the transitions.
pub const ETA: Bound = SHARE;
/// A decay below 1 by more than f32's last digit.
const DECAY: Bound = Bound::new(0.0, 0.999_999_9);
/// Seconds of a wait; 0 for never.
const WAIT: Bound = Bound::zero_or(0.001, 1e9);
/// Seconds of one answer.
const TIMEOUT: Bound = Bound::new(0.001, 86_400.0);
/// Values of rewards and scores.
const SCORE: Bound = Bound::new(-1e12, 1e12);
const ANGLE: Bound = Bound::new(-180.0, 180.0);
const THREADS: Bound = Bound::new(1.0, 256.0);
/// Columns of a sheet of pictures.
const COLUMNS: Bound = Bound::new(0.0, 256.0);
/// Iterations of a window: one value has no noise.
const WINDOW: Bound = Bound::new(2.0, 1e6);
/// Windows without a rise.
const PATIENCE: Bound = Bound::new(1.0, 1000.0);
const STANDARD_ERRORS: Bound = Bound::new(0.0, 1e6);
const UPDATES: Bound = Bound::new(1.0, 10_000.0);

/// By the end of the key; `*` is any one part of it. The first row that fits counts.
const TABLE: &[(&str, Bound)] = &[
    ("run.seed", SEED),
    ("run.iterations", ITERATIONS),
    ("run.lanes", Bound::new(1.0, 65_536.0)),
    ("run.threads", THREADS),
    ("run.checkpoint_every", ITERATIONS),
    ("run.keep_checkpoints", Bound::new(1.0, (u32::MAX - 1) as f64)),
    ("run.keep_every", ITERATIONS),
    ("run.compare_every", ITERATIONS),
    ("run.collective_limit", WAIT),
    ("run.reward_limit", WAIT),
    ("stop.window", WINDOW),
    ("stop.patience", PATIENCE),
    ("stop.min_iterations", ITERATIONS),
    ("stop.rise", STANDARD_ERRORS),
    ("stop.fall", STANDARD_ERRORS),
    ("method.timesteps", STEPS),
    ("method.clip_range", Bound::above(0.0, 1e6)),
    ("method.max_sensitivity", Bound::new(0.0, 1e12)),
    ("method.last_steps.*", STEPS),
    ("method.scale", Bound::above(0.0, 1e6)),
    ("method.offset", SCORE),
    ("method.guidance_scale", GUIDANCE),
    ("method.decode_batch", SAMPLES),
    ("method.max_bad_fraction", SHARE),
    ("method.updates", UPDATES),
    ("method.accept_one_in", PER_PROMPT),
    ("method.batch", SAMPLES),
    ("method.truncation", STEPS),
    ("method.renoisings", Bound::new(0.0, 1000.0)),
    ("model.decode_batch", SAMPLES_OR_NONE),
    ("lora.rank", Bound::new(0.0, 4096.0)),
    ("lora.alpha", Bound::new(0.0, 1e6)),
    ("rollout.steps", STEPS),
    ("rollout.eta", ETA),
    ("rollout.guidance_scale", GUIDANCE),
    ("advantage.epsilon", Bound::new(0.0, 1e6)),
    ("advantage.clip", Bound::above(0.0, 1e6)),
    ("advantage.max_bad_fraction", SHARE),
    ("advantage.prompt_buffer", Bound::new(1.0, 1e6)),
    ("advantage.prompt_min_count", Bound::new(0.0, 1e6)),
    ("update.learning_rate", SHARE),
    ("update.beta1", DECAY),
    ("update.beta2", DECAY),
    // below this it is 0 in f32, and a weight without gradients would become 0/0
    ("update.epsilon", Bound::new(1e-30, 1.0)),
    ("update.weight_decay", Bound::new(0.0, 1e6)),
    ("update.max_grad_norm", Bound::zero_or(1e-12, 1e12)),
    ("update.warmup_steps", ITERATIONS),
    ("comm.bucket_mb", Bound::above(0.0, 65_536.0)),
    ("pretrain.weight", Bound::new(0.0, 1e6)),
    ("pretrain.batch_per_lane", Bound::new(1.0, 4096.0)),
    ("pretrain.steps", Bound::new(0.0, 10_000.0)),
    ("pretrain.caption_dropout", SHARE),
    ("pretrain.data.edition", Bound::new(1.0, 2.0)),
    ("pretrain.data.score_min", SCORE),
    ("pretrain.data.threads", THREADS),
    ("pretrain.data.prefetch", Bound::new(0.0, 1024.0)),
    ("ema.decay", DECAY),
    ("trajectories.every", ITERATIONS),
    ("evaluation.seed", SEED),
    ("evaluation.pictures", COLUMNS),
    ("evaluation.every", ITERATIONS),
    ("evaluation.prompts", Bound::new(1.0, 65_536.0)),
    ("evaluation.images", Bound::new(2.0, 65_535.0)),
    ("task.*.samples", SAMPLES),
    ("task.*.images_per_prompt", PER_PROMPT),
    ("task.*.weight", Bound::new(0.0, 1e6)),
    ("task.*.evaluation_samples", SAMPLES),
    ("task.*.evaluation_images_per_prompt", PER_PROMPT),
    ("prompts.held_out", HELD_OUT),
    ("prompts.split_seed", SEED),
    ("prompts.nsfw_max", SCORE),
    ("reward.scale", Bound::above(0.0, 1e6)),
    ("reward.offset", SCORE),
    ("reward.threshold", Bound::new(0.0, 0.999_999_9)),
    ("reward.top", Bound::new(0.0, 1e6)),
    ("reward.short_side", Bound::new(32.0, 4096.0)),
    ("reward.long_side", Bound::new(32.0, 4096.0)),
    ("reward.timeout_seconds", TIMEOUT),
    ("reward.start_timeout_seconds", TIMEOUT),
    ("reward.restarts", Bound::new(0.0, 1e6)),
    ("parts.*.weight", SCORE),
    ("classifier.min_face_pixels", Bound::new(20.0, 4096.0)),
    ("classifier.face_score", Bound::above(0.0, 1e6)),
    ("classifier.cuts.*", ANGLE),
    ("eval.seed", SEED),
    ("eval.threads", THREADS),
    ("eval.decode_batch", SAMPLES_OR_NONE),
    ("eval.pictures", COLUMNS),
    ("set.*.count", SAMPLES_OR_NONE),
    ("set.*.images_per_prompt", PER_PROMPT),
    ("study.seeds.*", SEED),
    ("study.converged_at", Bound::above(0.0, 1.0)),
    ("saturation.window", WINDOW),
    ("saturation.patience", PATIENCE),
    ("saturation.min_iterations", ITERATIONS),
    ("saturation.rise", STANDARD_ERRORS),
    ("saturation.fall", STANDARD_ERRORS),
    ("study.resamplings", Bound::new(100.0, 1e7)),
    ("quick.prompts", Bound::new(2.0, 16_777_216.0)),
    ("quick.seeds", Bound::new(1.0, 1e6)),
];

/// The row for a key.
fn of_key(key: &[String]) -> Option<Bound> {
    let fits = |row: &str| {
        let parts: Vec<&str> = row.split('.').collect();
        let tail = key.len().checked_sub(parts.len()).map(|start| &key[start..]);
        tail.is_some_and(|tail| parts.iter().zip(tail).all(|(part, own)| *part == "*" || part == own))
    };
    TABLE.iter().find(|(row, _)| fits(row)).map(|(_, bound)| *bound)
}

/// Holds every number of a config, or of the part of one that lies under `prefix`, against its bounds.
///
/// # Errors
/// The first one outside, with its key and its bounds.
pub fn check(config: &impl Serialize, prefix: &str) -> Result<()> {
    let mut key: Vec<String> = prefix.split('.').filter(|part| !part.is_empty()).map(String::from).collect();
    let value = Value::try_from(config).context("a number beyond those of TOML")?;
    walk(&value, &mut key, &mut |key, number| {
        let Some(bound) = of_key(key) else { bail!("{} is not in the table of bounds", key.join(".")) };
        bound.ensure(&key.join("."), number)
    })
}

/// All numbers with their keys. The element of an array is called by its name, or by its number where it has none.
fn walk(value: &Value, key: &mut Vec<String>, see: &mut dyn FnMut(&[String], f64) -> Result<()>) -> Result<()> {
    let mut inside = |part: String, value: &Value| {
        key.push(part);
        let seen = walk(value, key, see);
        key.pop();
        seen
    };
    match value {
        Value::Table(table) => table.iter().try_for_each(|(name, value)| inside(name.clone(), value)),
        Value::Array(all) => all.iter().enumerate().try_for_each(|(i, value)| {
            let name = value.get("name").and_then(Value::as_str);
            inside(name.map_or(i.to_string(), String::from), value)
        }),
        Value::Integer(number) => see(key, *number as f64),
        Value::Float(number) => see(key, *number),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::config::{load::EMBEDDED_JOINT, Config, EvalConfig, StudyConfig};

    /// Every variant of everything that has numbers, as changes of the embedded experiment.
    fn configs() -> Vec<Value> {
        let joint: Value = EMBEDDED_JOINT.parse::<toml::Table>().unwrap().into();
        let list = "path = 'x', held_out = 1, split_seed = 1, drop_words = ''";
        let program = "timeout_seconds = 1.0, start_timeout_seconds = 2.0, restarts = 1";
        let unidet = "{ name = 'composition', weights = 'x', labels = 'x', threshold = 0.1, top = 0, \
                      channel_order = 'bgr', short_side = 800, long_side = 1333 }";
        let tone = "{ name = 'parity', classifier = { name = 'skin_tone', face_model = 'x', min_face_pixels = 40, \
                    face_score = 2.0, cuts = [10.0, 28.0, 41.0] } }";
        let rewards = [
            format!("{{ name = 'command', command = ['x'], {program} }}"),
            format!("{{ name = 'server', address = 'x:1', {program} }}"),
            unidet.to_string(),
            "{ name = 'pick_score', weights = 'x', scale = 0.04, offset = -1.0 }".to_string(),
            "{ name = 'hps', weights = 'x', scale = 100.0, offset = 0.5 }".to_string(),
            "{ name = 'clip_score', weights = 'x', scale = 100.0, offset = 0.5 }".to_string(),
            format!("{{ name = 'sum', normalise = true, parts = [{{ weight = 0.5, reward = {unidet} }}] }}"),
        ];
        let prompts = [
            "{ source = 'compositions', held_out = 1, split_seed = 1 }".to_string(),
            "{ source = 'occupations', held_out = 1, split_seed = 1 }".to_string(),
            format!("{{ source = 'text', key = '', {list} }}"),
            format!("{{ source = 'csv', column = 'x', {list} }}"),
            format!("{{ source = 'parquet', column = 'x', nsfw_columns = [], nsfw_max = 0.5, {list} }}"),
        ];
        let shards = "{ source = 'webdataset', folder = 'x', score_column = '', score_min = 1.0, drop_words = '', \
                      threads = 1, prefetch = 1 }";
        let parsed = |text: &str| format!("x = {text}").parse::<toml::Table>().unwrap()["x"].clone();
        let with = |task: usize, key: &str, text: &str| {
            let mut config = joint.clone();
            config["task"][task][key] = parsed(text);
            config
        };
        let mut all = vec![joint.clone(), with(1, "reward", tone)];
        all.extend(rewards.iter().map(|text| with(2, "reward", text)));
        all.extend(prompts.iter().map(|text| with(2, "prompts", text)));
        let mut webdataset = joint.clone();
        webdataset["pretrain"]["data"] = parsed(shards);
        all.push(webdataset);
        let mut stop = joint.clone();
        let table = "{ criterion = 'saturation', reward = 'training', window = 4, patience = 2, min_iterations = 8, rise = 1.0, \
                     fall = 3.0 }";
        stop.as_table_mut().unwrap().insert("stop".into(), parsed(table));
        all.push(stop);
        for method in ["refl", "reward-weighted", "raft", "draft"] {
            let path = format!("{}/slurm/miniature-{method}.toml", env!("CARGO_MANIFEST_DIR"));
            all.push(std::fs::read_to_string(path).unwrap().parse::<toml::Table>().unwrap().into());
        }
        all
    }

    fn other(name: &str) -> Value {
        let path = format!("{}/slurm/{name}.toml", env!("CARGO_MANIFEST_DIR"));
        std::fs::read_to_string(path).unwrap().parse::<toml::Table>().unwrap().into()
    }

    /// The numbers' places, as indices of tables and arrays.
    fn numbers(value: &Value) -> Vec<Vec<String>> {
        let mut found = Vec::new();
        walk(value, &mut Vec::new(), &mut |key, _| {
            found.push(key.to_vec());
            Ok(())
        })
        .unwrap();
        found
    }

    fn place<'v>(value: &'v mut Value, key: &[String]) -> &'v mut Value {
        key.iter().fold(value, |value, part| match value {
            Value::Array(all) => {
                let named = all.iter().position(|v| v.get("name").and_then(Value::as_str) == Some(part));
                &mut all[named.unwrap_or_else(|| part.parse().unwrap())]
            }
            _ => &mut value[part.as_str()],
        })
    }

    /// Each number of `config` becomes each of the bad ones: a panic is a failure, and so is a value that is taken though
    /// it lies outside its bounds, or refused without its key. What TOML's reader refuses, as a fraction for a count, is left
    /// to it.
    fn every_number(config: &Value, judge: &dyn Fn(Value) -> Option<Result<()>>) -> usize {
        let keys = numbers(config);
        for key in &keys {
            let bound = of_key(key).unwrap_or_else(|| panic!("{} is not in the table", key.join(".")));
            let floats = [f64::INFINITY, f64::NEG_INFINITY, f64::NAN, -1.0, 0.0, 1e-300, 1e300, f64::MAX];
            let whole = [-1, 0, 1, 65_536, 1 << 32, i64::MAX, i64::MIN];
            let values = floats.map(Value::Float).into_iter().chain(whole.map(Value::Integer));
            for value in values {
                let mut changed = config.clone();
                *place(&mut changed, key) = value.clone();
                let number = value.as_float().or(value.as_integer().map(|i| i as f64)).unwrap();
                match judge(changed) {
                    None => {}
                    Some(Ok(())) => assert!(bound.allows(number), "{} = {number} is taken", key.join(".")),
                    Some(Err(e)) => {
                        let (text, own) = (format!("{e:#}"), key.last().unwrap());
                        assert!(!text.contains('\n'), "{text}");
                        // a number that does not fit another one is refused under the other's key
                        let named = own.parse::<usize>().map_or(own.as_str(), |_| &key[key.len() - 2]);
                        let of_both = bound.allows(number);
                        assert!(of_both || text.contains(named), "{} = {number}: {text}", key.join("."));
                    }
                }
                assert!(number.is_finite() || !bound.allows(number), "{} may be infinite", key.join("."));
            }
        }
        keys.len()
    }

    #[test]
    fn every_number_of_every_config_has_bounds() {
        let run = |value: Value| Some(Config::deserialize(value).ok()?.validate().map(drop));
        let counts: Vec<usize> = configs().iter().map(|config| every_number(config, &run)).collect();
        assert!(counts.iter().all(|&count| count > 45), "{counts:?}");
        let evaluation = |value: Value| Some(EvalConfig::deserialize(value).ok()?.validate());
        assert!(every_number(&other("eval-parity"), &evaluation) > 10);
        let study = |value: Value| Some(StudyConfig::deserialize(value).ok()?.validate());
        assert!(every_number(&other("miniature-study"), &study) >= 9);
    }

    #[test]
    fn a_number_outside_is_named_with_its_bounds() {
        for (key, value, wanted) in [
            ("update.epsilon", f64::INFINITY, "update.epsilon = inf must be in 1e-30..=1"),
            ("run.reward_limit", 1e300, "run.reward_limit = 1e300 must be 0 or in 0.001..=1000000000"),
            ("method.clip_range", 0.0, "method.clip_range = 0 must be above 0 and at most 1000000"),
            ("task.a.samples", f64::NAN, "task.a.samples = NaN must be in 1..=16777216"),
        ] {
            let parts: Vec<String> = key.split('.').map(String::from).collect();
            let e = of_key(&parts).unwrap().ensure(key, value).unwrap_err().to_string();
            assert_eq!(e, wanted);
        }
    }
}
