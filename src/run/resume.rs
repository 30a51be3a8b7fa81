//! Where a run begins: anew, or at a checkpoint.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{bail, ensure, Context, Result};

use crate::{
    comm::Communicator,
    config::{load, Config},
    store::{self, Checkpoint, Loaded},
    telemetry::RunFiles,
};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// From the model; what an earlier run of the same name left is moved aside.
    No,
    /// From the newest sound checkpoint of the run's folder, if it has one.
    Auto,
    /// From this checkpoint, or the newest of this run's folder.
    From(PathBuf),
}

pub fn find(resume: &Resume, files: &RunFiles, comm: &dyn Communicator) -> Result<Option<Loaded>> {
    let path = match resume {
        Resume::No => return Ok(None),
        Resume::Auto => return store::load_latest(&files.checkpoints(), comm),
        Resume::From(path) => path,
    };
    let of_run = RunFiles::new(path.clone()).checkpoints();
    if !of_run.is_dir() {
        return store::load(path, comm).map(Some);
    }
    match store::load_latest(&of_run, comm)? {
        Some(loaded) => Ok(Some(loaded)),
        None => bail!("{} holds no checkpoint to resume from", path.display()),
    }
}

/// A resumed run equals the uninterrupted one only under the config it was started with; what may change is where it
/// ends, what it writes and how it evaluates.
pub fn check_config(config: &Config, checkpoint: &Checkpoint) -> Result<()> {
    let stored = load::parse(&checkpoint.config_toml, "the checkpoint's config", &[])?;
    let mut wanted = config.clone();
    wanted.run = stored.run.clone();
    wanted.run.seed = config.run.seed;
    wanted.run.lanes = config.run.lanes;
    wanted.run.threads = config.run.threads;
    wanted.model = stored.model.clone();
    wanted.trajectories = stored.trajectories.clone();
    wanted.evaluation = stored.evaluation.clone();
    for (task, before) in wanted.tasks.iter_mut().zip(&stored.tasks) {
        task.evaluation_samples = before.evaluation_samples;
    }
    if wanted == stored {
        return Ok(());
    }
    let (before, now) = (toml::to_string(&stored)?, toml::to_string(&wanted)?);
    let changed = before.lines().zip(now.lines()).find(|(a, b)| a != b);
    let (before, now) = changed.unwrap_or(("fewer or more settings", "fewer or more settings"));
    bail!("the checkpoint was made with another config ({before}; now {now}): resume with the same one, or start anew")
}

/// Renames what an earlier run left, so that nothing is lost.
pub fn move_aside(root: &Path) -> Result<()> {
    if !root.exists() {
        return Ok(());
    }
    ensure!(root.is_dir(), "{} is not a folder", root.display());
    let mut entries = fs::read_dir(root).with_context(|| format!("cannot read {}", root.display()))?;
    if entries.next().is_none() {
        return Ok(());
    }
    let name = root.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut candidates = (1..).map(|n| root.with_file_name(format!("{name}.{n}")));
    let target = candidates.find(|p| !p.exists()).expect("some number is free");
    fs::rename(root, &target).with_context(|| format!("cannot move {} aside", root.display()))?;
    log::info!("what an earlier run left in {} is now in {}", root.display(), target.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn earlier_results_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("joint");
        move_aside(&root).unwrap();
        for n in 1..=2 {
            fs::create_dir(&root).unwrap();
            move_aside(&root).unwrap();
            fs::write(root.join("a"), n.to_string()).unwrap();
            move_aside(&root).unwrap();
            assert_eq!(fs::read_to_string(folder.path().join(format!("joint.{n}/a"))).unwrap(), n.to_string());
            assert!(!root.exists());
        }
    }
}
