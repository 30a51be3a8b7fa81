//! What a run's folder holds.

use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};

use crate::{
    config::StopConfig,
    convergence::{Judge, Rewards},
    telemetry::{read_metrics, FallBack, Metrics, RunFiles, SampleSheet, Summary},
};

/// At most this many evaluations are shown beside each other.
const SHEETS: usize = 9;

pub struct RunData {
    /// The folder's name; its whole path where two runs have the same.
    pub name: String,
    pub folder: PathBuf,
    /// Its values, whatever version wrote it.
    pub config: toml::Table,
    pub config_text: String,
    pub history: Vec<Metrics>,
    /// Absent while the run goes on.
    pub summary: Option<Summary>,
    /// By task: iterations done and the pictures of that moment.
    pub samples: Vec<(String, Vec<(u64, SampleSheet)>)>,
    /// The PNG file.
    pub before_after: Option<Vec<u8>>,
}

/// Reads runs in the order in which they are given.
pub fn read_all(folders: &[PathBuf]) -> Result<Vec<RunData>> {
    for (i, folder) in folders.iter().enumerate() {
        let same = |other: &PathBuf| other == folder || same_place(other, folder);
        ensure!(!folders[..i].iter().any(same), "{} is given twice", folder.display());
    }
    let mut runs = folders.iter().map(|folder| RunData::read(folder)).collect::<Result<Vec<_>>>()?;
    let names: Vec<String> = runs.iter().map(|run| run.name.clone()).collect();
    for run in &mut runs {
        if names.iter().filter(|name| **name == run.name).count() > 1 {
            run.name = run.folder.display().to_string();
        }
    }
    Ok(runs)
}

fn same_place(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

impl RunData {
    fn read(folder: &Path) -> Result<Self> {
        let files = RunFiles::new(folder);
        let read = |path: &Path| std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        let config_text = String::from_utf8(read(&files.config())?)
            .with_context(|| format!("{} is not UTF-8", files.config().display()))?;
        let config: toml::Table = config_text
            .parse()
            .map_err(|e: toml::de::Error| anyhow::anyhow!("{}: {}", files.config().display(), e.message()))?;
        let history = read_metrics(&files.metrics())?;
        ensure!(!history.is_empty(), "{} holds no iteration yet", files.metrics().display());
        let tasks = tasks_of(&config);
        let samples = tasks
            .iter()
            .map(|task| {
                let sheets = spread(SampleSheet::list(&files.samples(task))?);
                let sheets = sheets.into_iter().map(|(done, path)| Ok((done, SampleSheet::read(&path)?)));
                Ok((task.clone(), sheets.collect::<Result<Vec<_>>>()?))
            })
            .collect::<Result<Vec<_>>>()?;
        let if_there = |path: PathBuf| path.exists().then_some(path);
        Ok(RunData {
            name: name_of(folder),
            folder: folder.to_path_buf(),
            config,
            config_text,
            history,
            summary: if_there(files.summary()).map(|path| Summary::read(&path)).transpose()?,
            samples: samples.into_iter().filter(|(_, sheets)| !sheets.is_empty()).collect(),
            before_after: if_there(files.before_after()).map(|path| read(&path)).transpose()?,
        })
    }

    /// Names of the config's tasks.
    pub fn tasks(&self) -> Vec<String> {
        tasks_of(&self.config)
    }

    /// The tasks whose reward is below its best by more than its noise, so far where the run goes on.
    pub fn fallen_back(&self) -> Vec<FallBack> {
        let value = |section: &str, key: &str| self.config.get(section).and_then(|table| table.get(key));
        let stop: Option<StopConfig> = self.config.get("stop").and_then(|stop| stop.clone().try_into().ok());
        let method = value("method", "name").and_then(toml::Value::as_str).unwrap_or_default();
        let every = value("evaluation", "every").and_then(toml::Value::as_integer).unwrap_or_default();
        let done = self.history.last().map_or(0, |metrics| metrics.iteration + 1);
        let rewards = Rewards::of(self.trained_tasks(), &self.history);
        Judge::new(stop.as_ref(), method, every.max(0) as u64, done).all_fallen_back(&rewards, done)
    }

    fn trained_tasks(&self) -> impl Iterator<Item = &str> {
        let tasks = self.config.get("task").and_then(toml::Value::as_array).map_or(&[][..], |tasks| tasks);
        let trained = |task: &&toml::Value| task.get("train").and_then(toml::Value::as_bool) != Some(false);
        tasks.iter().filter(trained).filter_map(|task| task.get("name")?.as_str())
    }

    /// `section.key` of the config as text.
    pub fn setting(&self, section: &str, key: &str) -> Option<String> {
        Some(self.config.get(section)?.get(key)?.to_string())
    }
}

fn tasks_of(config: &toml::Table) -> Vec<String> {
    let tasks = config.get("task").and_then(toml::Value::as_array).map_or(&[][..], |tasks| tasks);
    tasks.iter().filter_map(|task| Some(task.get("name")?.as_str()?.to_owned())).collect()
}

fn name_of(folder: &Path) -> String {
    let name = folder.canonicalize().ok().and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
    name.unwrap_or_else(|| folder.display().to_string())
}

/// At most [`SHEETS`] of them, evenly spread, the first and the last among them.
fn spread<T>(all: Vec<T>) -> Vec<T> {
    let count = all.len();
    let wanted =
        |i: usize| count <= SHEETS || (0..SHEETS).any(|k| (k * (count - 1) + (SHEETS - 1) / 2) / (SHEETS - 1) == i);
    all.into_iter().enumerate().filter(|(i, _)| wanted(*i)).map(|(_, one)| one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_evaluations_are_thinned_evenly() {
        let spread_of = |n: usize| spread((0..n).collect::<Vec<_>>());
        assert_eq!(spread_of(3), [0, 1, 2]);
        assert_eq!(spread_of(17), [0, 2, 4, 6, 8, 10, 12, 14, 16]);
        for n in 9..60 {
            let spread = spread_of(n);
            assert_eq!((spread.len(), spread[0], spread[8]), (9, 0, n - 1), "{n}: {spread:?}");
        }
    }
}
