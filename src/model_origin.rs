//! The run that made a model, by the files beside it.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::{
    config::{load, Config},
    telemetry::RunFiles,
};

/// A run's folder and its config.
pub struct Origin {
    pub folder: PathBuf,
    pub config: Config,
}

/// The run that `path` is the folder of, or its model, its adapters, or one of its checkpoints; none where no run's files are there.
///
/// # Errors
/// The run's config cannot be read.
pub fn of_model(path: &str) -> Option<Result<Origin>> {
    if path.is_empty() {
        return None;
    }
    let path = Path::new(path);
    let parents = || {
        let parent = path.parent()?;
        let files = RunFiles::new(parent);
        let is_model = files.model() == path || files.lora() == path;
        let is_checkpoint = parent.parent().is_some_and(|root| RunFiles::new(root).checkpoints() == parent);
        match (is_model, is_checkpoint) {
            (true, _) => Some(parent),
            (_, true) => parent.parent(),
            _ => None,
        }
    };
    let is_run = |folder: &&Path| {
        let files = RunFiles::new(*folder);
        files.config().is_file() && files.metrics().is_file()
    };
    let folder = [Some(path), parents()].into_iter().flatten().find(is_run)?;
    let file = RunFiles::new(folder).config();
    Some(load::load(load::Experiment::File(&file), &[]).map(|config| Origin { folder: folder.to_path_buf(), config }))
}
