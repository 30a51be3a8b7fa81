//! From a TOML file and `--set key=value` to a [`Config`].

use std::path::Path;

use anyhow::{bail, Context, Result};

use super::Config;
use crate::user_file;

/// The experiment that a bare `rldiff` runs.
pub const EMBEDDED_JOINT: &str = include_str!("../../slurm/miniature-joint.toml");

/// The one that it runs on more ranks than the lanes of [`EMBEDDED_JOINT`]: the paper's 128 lanes of 16 samples.
pub const EMBEDDED_128: &str = include_str!("../../slurm/miniature-128.toml");

/// Which experiment a command works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Experiment<'a> {
    File(&'a Path),
    Joint,
    /// [`EMBEDDED_128`].
    Joint128,
}

impl<'a> Experiment<'a> {
    /// `path`, or an embedded one that `ranks` can share, where no override says how many lanes there are.
    pub fn of(path: Option<&'a Path>, overrides: &[String], ranks: usize) -> Self {
        let says_lanes = overrides.iter().any(|o| o.split('=').next().is_some_and(|key| key.trim() == "run.lanes"));
        match path {
            Some(path) => Experiment::File(path),
            None if ranks > JOINT_LANES && !says_lanes => Experiment::Joint128,
            None => Experiment::Joint,
        }
    }
}

impl Experiment<'_> {
    /// What an error begins with.
    pub fn origin(self) -> String {
        match self {
            Experiment::File(path) => path.display().to_string(),
            Experiment::Joint => "embedded joint experiment".to_string(),
            Experiment::Joint128 => "embedded joint experiment of 128 lanes".to_string(),
        }
    }
}

impl std::fmt::Display for Experiment<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Experiment::File(path) => write!(f, "{}", path.display()),
            Experiment::Joint => write!(f, "the embedded joint experiment (no CONFIG was given)"),
            Experiment::Joint128 => write!(
                f,
                "the embedded joint experiment at the paper's arithmetic, 128 lanes of 16 samples \
                 (slurm/miniature-128.toml; no CONFIG was given, and {JOINT_LANES} lanes are too few for the ranks)"
            ),
        }
    }
}

/// Lanes of [`EMBEDDED_JOINT`].
const JOINT_LANES: usize = 8;

/// Reads a config. Every override is `dotted.key=value` with a TOML
/// value; a bare word counts as a string. `task.NAME.key` addresses the task of that name.
///
/// # Errors
/// Names the file or override, the key, and what is wrong with it.
pub fn load(experiment: Experiment, overrides: &[String]) -> Result<Config> {
    let text = match experiment {
        Experiment::File(path) => {
            &user_file::read_text(path).with_context(|| format!("cannot read config {}", path.display()))?
        }
        Experiment::Joint => EMBEDDED_JOINT,
        Experiment::Joint128 => EMBEDDED_128,
    };
    parse(text, &experiment.origin(), overrides)
}

/// As [`load`], from text.
pub fn parse(text: &str, origin: &str, overrides: &[String]) -> Result<Config> {
    parse_as(text, origin, overrides)
}

/// A complete TOML file as another kind of config; overrides as in [`load`].
///
/// # Errors
/// Names the file or override, the key, and what is wrong with it.
pub fn read_toml<T: serde::de::DeserializeOwned>(path: &Path, overrides: &[String]) -> Result<T> {
    let origin = path.display().to_string();
    let text = user_file::read_text(path).with_context(|| format!("cannot read {origin}"))?;
    parse_as(&text, &origin, overrides)
}

fn parse_as<T: serde::de::DeserializeOwned>(text: &str, origin: &str, overrides: &[String]) -> Result<T> {
    // the text first by itself: its errors carry line and column
    let mut table: toml::Table = text.parse().map_err(|e| anyhow::anyhow!("{origin}: {}", one_line(&e)))?;
    for assignment in overrides {
        apply(&mut table, assignment).with_context(|| format!("--set {assignment}"))?;
    }
    serde_path_to_error::deserialize(table).map_err(|e| {
        let path = e.path().to_string();
        let inner = one_line(e.inner());
        match path.as_str() {
            "." => anyhow::anyhow!("{origin}: {inner}"),
            _ => anyhow::anyhow!("{origin}: {path}: {inner}"),
        }
    })
}

fn one_line(error: &impl std::fmt::Display) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn apply(table: &mut toml::Table, assignment: &str) -> Result<()> {
    let Some((key, value)) = assignment.split_once('=') else { bail!("expected KEY=VALUE") };
    let value = parse_value(value.trim());
    let mut parts: Vec<&str> = key.trim().split('.').collect();
    let last = parts.pop().expect("split gives at least one part");
    let mut place = table;
    let mut walked = String::new();
    let mut parts = parts.into_iter();
    while let Some(part) = parts.next() {
        walked = if walked.is_empty() { part.to_string() } else { format!("{walked}.{part}") };
        place = match place.get_mut(part) {
            Some(toml::Value::Table(inner)) => inner,
            Some(toml::Value::Array(tasks)) => {
                let name = parts.next().context("an array needs the name of the element: task.NAME.key")?;
                let named = |t: &toml::Value| t.get("name").and_then(toml::Value::as_str) == Some(name);
                match tasks.iter_mut().find(|t| named(t)) {
                    Some(toml::Value::Table(inner)) => inner,
                    _ => bail!("there is no {part} named {name}"),
                }
            }
            Some(_) => bail!("{walked} is a value, not a section"),
            None => bail!("there is no section {walked}"),
        };
    }
    let added = match walked.as_str() {
        // tables that a config may leave out
        "" => ["advantage", "stop"].contains(&last) && value.is_table(),
        // settings that older configs do not have
        "run" => last == "deterministic",
        "model" | "eval" => last == "frozen_compute",
        _ => false,
    };
    if !place.contains_key(last) && !added {
        let known: Vec<&str> = place.keys().map(String::as_str).collect();
        bail!("unknown key {last}; known here: {}", known.join(", "));
    }
    place.insert(last.to_string(), value);
    Ok(())
}

/// A TOML value, or a bare word as a string.
fn parse_value(text: &str) -> toml::Value {
    match format!("value = {text}").parse::<toml::Table>() {
        Ok(mut table) => table.remove("value").unwrap_or_else(|| toml::Value::String(text.to_string())),
        Err(_) => toml::Value::String(text.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MethodConfig;

    fn error(overrides: &[&str]) -> String {
        let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
        format!("{:#}", parse(EMBEDDED_JOINT, "joint", &overrides).unwrap_err())
    }

    #[test]
    fn overrides_reach_their_key() {
        let overrides = ["run.iterations=2", "run.name=x", "task.parity.samples=256", "method.clip_range=1e-3"];
        let config = parse(EMBEDDED_JOINT, "joint", &overrides.map(String::from)).unwrap();
        assert_eq!((config.run.iterations, config.run.name.as_str()), (2, "x"));
        assert_eq!(config.tasks.iter().find(|t| t.name == "parity").unwrap().samples, 256);
        let MethodConfig::Ours(ours) = config.method else { panic!("another method") };
        assert_eq!(ours.clip_range, 1e-3);
    }

    #[test]
    fn more_ranks_than_lanes_get_the_papers_arithmetic() {
        let of = |ranks, overrides: &[&str]| {
            Experiment::of(None, &overrides.iter().map(|s| s.to_string()).collect::<Vec<_>>(), ranks)
        };
        let joint = load(Experiment::Joint, &[]).unwrap();
        assert_eq!(joint.run.lanes, JOINT_LANES);
        assert_eq!((of(JOINT_LANES, &[]), of(JOINT_LANES + 1, &[])), (Experiment::Joint, Experiment::Joint128));
        assert_eq!(of(128, &["run.lanes = 16"]), Experiment::Joint);
        assert_eq!(of(128, &["run.lanes_of=16"]), Experiment::Joint128);
        let path = Path::new("a.toml");
        assert_eq!(Experiment::of(Some(path), &[], 128), Experiment::File(path));
        let mut config = load(Experiment::Joint128, &[]).unwrap();
        config.validate().unwrap();
        assert_eq!(config.run.lanes, 128);
        assert!(config.tasks.iter().all(|task| task.samples == 128 * 16), "16 samples a lane");
        // beside the sizes it is the same experiment
        config.run.lanes = joint.run.lanes;
        config.run.name.clone_from(&joint.run.name);
        config.pretrain.batch_per_lane = joint.pretrain.batch_per_lane;
        config.tasks.iter_mut().zip(&joint.tasks).for_each(|(task, of_joint)| task.samples = of_joint.samples);
        assert_eq!(toml::to_string(&config).unwrap(), toml::to_string(&joint).unwrap());
    }

    #[test]
    fn mistakes_are_one_line_that_names_the_key() {
        for (overrides, wanted) in [
            (&["run.iteration=2"][..], "unknown key iteration"),
            (&["runs.iterations=2"], "no section runs"),
            (&["run.iterations"], "KEY=VALUE"),
            (&["run.iterations=many"], "run.iterations"),
            (&["run.iterations=-1"], "run.iterations"),
            (&["task.nobody.samples=1"], "no task named nobody"),
            (&["task.parity.reward.name=nice"], "nice"),
        ] {
            let e = error(overrides);
            assert!(e.contains(wanted), "{overrides:?}: {e}");
            assert!(!e.contains('\n'), "{e}");
        }
    }

    #[test]
    fn unknown_and_missing_keys_in_a_file_are_named() {
        let extra = EMBEDDED_JOINT.replace("[rollout]", "[rollout]\nstep = 3");
        let e = format!("{:#}", parse(&extra, "my.toml", &[]).unwrap_err());
        assert!(e.contains("my.toml") && e.contains("rollout") && e.contains("step"), "{e}");
        let missing = EMBEDDED_JOINT.replace("eta = 1.0", "");
        let e = format!("{:#}", parse(&missing, "my.toml", &[]).unwrap_err());
        assert!(e.contains("rollout") && e.contains("eta"), "{e}");
    }
}
