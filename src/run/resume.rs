//! Where a run begins: anew, or at a checkpoint.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{bail, ensure, Context, Result};

use crate::{
    cannot_write::make_folder,
    comm::Communicator,
    config::{load, Config},
    folders::{can_be_folder, contents, outputs, FolderLock, Place},
    store::{self, Head, Stored},
    telemetry::{RunFiles, SampleSheet},
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

pub fn find(resume: &Resume, files: &RunFiles, comm: &dyn Communicator) -> Result<Option<Stored>> {
    let path = match resume {
        Resume::No => return Ok(None),
        Resume::Auto => return store::open_latest(&files.checkpoints(), comm),
        Resume::From(path) => path,
    };
    let of_run = RunFiles::new(path.clone()).checkpoints();
    if !of_run.is_dir() {
        return store::open(path, comm).map(Some);
    }
    match store::open_latest(&of_run, comm)? {
        Some(stored) => Ok(Some(stored)),
        None => bail!("{} holds no checkpoint to resume from", path.display()),
    }
}

/// A resumed run equals the uninterrupted one only under the config it was started with; what may change is where it
/// ends, what it writes and how it evaluates. (The checkpoint has the U-Net only, so the model must be the same.)
pub fn check_config(config: &Config, checkpoint: &Head) -> Result<()> {
    let stored = load::parse(&checkpoint.config_toml, "the checkpoint's config", &[])?;
    let mut wanted = config.clone();
    wanted.run = stored.run.clone();
    wanted.run.seed = config.run.seed;
    wanted.run.lanes = config.run.lanes;
    wanted.run.threads = config.run.threads;
    wanted.run.deterministic = config.run.deterministic;
    wanted.stop = stored.stop.clone();
    // what a run that is out of memory changes; another decode_batch may change last bits
    wanted.model.gradient_checkpointing = stored.model.gradient_checkpointing;
    wanted.model.decode_batch = stored.model.decode_batch;
    // the same results
    wanted.rollout.cuda_graph = stored.rollout.cuda_graph;
    wanted.comm.bucket_mb = stored.comm.bucket_mb;
    wanted.trajectories = stored.trajectories.clone();
    wanted.evaluation = stored.evaluation.clone();
    for (task, before) in wanted.tasks.iter_mut().zip(&stored.tasks) {
        task.evaluation_samples = before.evaluation_samples;
        task.evaluation_images_per_prompt = before.evaluation_images_per_prompt;
    }
    if wanted == stored {
        return Ok(());
    }
    let (before, now) = (toml::Value::try_from(&stored)?, toml::Value::try_from(&wanted)?);
    let difference = first_difference("", &before, &now).unwrap_or_default();
    bail!("the checkpoint was made with another config: {difference}; resume with the same one, or start anew")
}

/// The first setting in which two configs differ, addressed as on the command line, with both values.
fn first_difference(key: &str, before: &toml::Value, now: &toml::Value) -> Option<String> {
    use toml::Value::{Array, Table};
    let inside = |part: &str| if key.is_empty() { part.to_string() } else { format!("{key}.{part}") };
    match (before, now) {
        (Table(a), Table(b)) if a.keys().eq(b.keys()) => {
            a.iter().zip(b.values()).find_map(|((part, x), y)| first_difference(&inside(part), x, y))
        }
        (Array(a), Array(b)) if a.len() == b.len() => a.iter().zip(b).enumerate().find_map(|(i, (x, y))| {
            let name = x.get("name").and_then(toml::Value::as_str).map_or(i.to_string(), String::from);
            first_difference(&inside(&name), x, y)
        }),
        (Array(a), Array(b)) => Some(format!("{} {key}s, now {}", a.len(), b.len())),
        _ if before == now => None,
        _ => Some(format!("{key} = {before}, now {now}")),
    }
}

/// Makes the results' folder what it was when the run had done `done` iterations at `checkpoint`. Where the checkpoint
/// is another folder's, what is here is moved aside and that folder's metrics and samples are taken over. Trajectories and
/// samples of later iterations go: the run will write them again, perhaps on fewer ranks. (Metrics are cut when they are
/// opened.)
pub fn return_to(checkpoint: &Path, done: u64, lock: &mut FolderLock, files: &RunFiles) -> Result<()> {
    let there = checkpoint.parent().and_then(|folder| fs::canonicalize(folder).ok());
    if !is_in(checkpoint, files) {
        move_aside(lock, files)?;
        files.create()?;
        let Some(of_run) = there.as_deref().and_then(Path::parent).map(RunFiles::new) else { return Ok(()) };
        let copy = |from: &Path, to: &Path| {
            fs::copy(from, to).map(drop).with_context(|| format!("cannot copy {}", from.display()))
        };
        if of_run.metrics().is_file() {
            copy(&of_run.metrics(), &files.metrics())?;
        }
        for (task, _, path) in samples(&of_run)?.into_iter().filter(|(_, at, _)| *at <= done) {
            make_folder(&files.samples(&task))?;
            copy(&path, &files.samples(&task).join(path.file_name().unwrap_or_default()))?;
        }
        return Ok(());
    }
    for (_, _, path) in samples(files)?.into_iter().filter(|(_, at, _)| *at > done) {
        ensure!(SampleSheet::is_at(&path), "{} is in the way: a sheet of samples is to be there", path.display());
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    store::TrajectoryShard::remove_from(&files.trajectories(), done)
}

/// Whether a checkpoint is one of this run's folder.
pub fn is_in(checkpoint: &Path, files: &RunFiles) -> bool {
    let here = fs::canonicalize(files.checkpoints()).ok();
    let there = checkpoint.parent().and_then(|folder| fs::canonicalize(folder).ok());
    here.is_some() && here == there
}

/// The sheets of samples of all tasks: task, iterations done, file.
fn samples(files: &RunFiles) -> Result<Vec<(String, u64, PathBuf)>> {
    let Ok(tasks) = fs::read_dir(files.samples("")) else { return Ok(Vec::new()) };
    let mut all = Vec::new();
    for task in tasks {
        let task = task?.file_name().to_string_lossy().into_owned();
        let sheets = SampleSheet::list(&files.samples(&task))?;
        all.extend(sheets.into_iter().map(|(done, path)| (task.clone(), done, path)));
    }
    Ok(all)
}

/// Whether the run goes on in its folder, or begins in one of its own: the folder of an earlier run is set aside for it.
///
/// # Errors
/// What is in the folder is no run's, or the run needs something that would be set aside.
pub fn check_place(config: &Config, files: &RunFiles, resume: &Resume) -> Result<()> {
    let root = files.root();
    if goes_on_in(files, resume) {
        can_be_folder(root)?;
        return outputs::may_replace(&files.config(), contents::is_run_config);
    }
    if Place::of_run(root)? == Place::Free {
        return Ok(());
    }
    let mut needed = contents::paths_of(&toml::Value::try_from(config)?);
    if let Resume::From(path) = resume {
        needed.push(("--resume".to_owned(), path.clone()));
    }
    contents::set_aside_is_safe(root, &needed)
}

fn goes_on_in(files: &RunFiles, resume: &Resume) -> bool {
    let real = |path: &Path| fs::canonicalize(path).ok();
    let here = real(&files.checkpoints());
    match resume {
        Resume::No => false,
        Resume::Auto => store::checkpoint::is_any(&files.checkpoints()),
        Resume::From(path) => {
            let checkpoints = RunFiles::new(path.clone()).checkpoints();
            let of_run = if checkpoints.is_dir() { real(&checkpoints) } else { path.parent().and_then(real) };
            here.is_some() && here == of_run
        }
    }
}

/// Renames what an earlier run left, so that nothing is lost.
pub fn move_aside(lock: &mut FolderLock, files: &RunFiles) -> Result<()> {
    match contents::first_entry(files.root())? {
        Some(_) => lock.set_aside(),
        None => Ok(()),
    }
}
