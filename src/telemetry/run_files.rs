//! Where each file of a run lies: the layout of `runs/<name>/` in one place.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::cannot_write::make_folder;

/// The files of one run.
///
/// ```text
/// runs/<name>/
/// ├── config.toml          the resolved config
/// ├── metrics.jsonl        one line per iteration
/// ├── tensorboard/         the same for TensorBoard, with sample pictures
/// ├── samples/<task>/      the same prompts and noise as training goes on, one file per evaluation
/// ├── reward_curves.png
/// ├── before_after.png     same noise: base above tuned
/// ├── summary.json
/// ├── model/               the tuned model, a diffusers folder
/// ├── pytorch_lora_weights.safetensors   the adapters, where those were trained
/// ├── checkpoints/
/// ├── watch/               where ranks say what they are doing when one of them is late; empty otherwise
/// └── trajectories/
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunFiles {
    root: PathBuf,
}

impl RunFiles {
    /// Everything that a run and what is done with it afterwards put into its folder.
    pub const NAMES: [&str; 15] = [
        "config.toml",
        "metrics.jsonl",
        "tensorboard",
        "samples",
        "reward_curves.png",
        "before_after.png",
        "summary.json",
        "model",
        "model.partial",
        "model.replaced",
        "pytorch_lora_weights.safetensors",
        "checkpoints",
        "watch",
        "trajectories",
        "report.html",
    ];

    /// Names only; touches no file.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        RunFiles { root: root.into() }
    }

    /// Makes the run's folder and the folders inside it that the run itself fills from the start. Existing ones stay.
    pub fn create(&self) -> Result<()> {
        for folder in [self.root.clone(), self.tensorboard()] {
            make_folder(&folder)?;
        }
        Ok(())
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn config(&self) -> PathBuf {
        self.root.join("config.toml")
    }

    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    pub fn tensorboard(&self) -> PathBuf {
        self.root.join("tensorboard")
    }

    pub fn samples(&self, task: &str) -> PathBuf {
        self.root.join("samples").join(task)
    }

    pub fn reward_curves(&self) -> PathBuf {
        self.root.join("reward_curves.png")
    }

    pub fn before_after(&self) -> PathBuf {
        self.root.join("before_after.png")
    }

    pub fn summary(&self) -> PathBuf {
        self.root.join("summary.json")
    }

    pub fn model(&self) -> PathBuf {
        self.root.join("model")
    }

    pub fn lora(&self) -> PathBuf {
        self.root.join("pytorch_lora_weights.safetensors")
    }

    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    pub fn watch(&self) -> PathBuf {
        self.root.join("watch")
    }

    pub fn trajectories(&self) -> PathBuf {
        self.root.join("trajectories")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn creates_the_folders_twice_without_complaint() {
        let folder = tempfile::tempdir().unwrap();
        let files = RunFiles::new(folder.path().join("runs/joint"));
        files.create().unwrap();
        files.create().unwrap();
        assert!(files.tensorboard().is_dir());
        assert_eq!(files.metrics(), folder.path().join("runs/joint/metrics.jsonl"));
    }

    #[test]
    fn a_file_in_the_way_is_named() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("runs"), b"").unwrap();
        let error = RunFiles::new(folder.path().join("runs/joint")).create().unwrap_err();
        assert!(format!("{error:#}").contains("runs/joint"), "{error:#}");
    }
}
