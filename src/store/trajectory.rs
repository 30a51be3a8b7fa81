//! Trajectory shards: what one rank sampled for one task in one iteration, for people and other programs.
//!
//! `trajectories/iteration-000012/<task>-rank-000.h5`, with n samples, S denoising steps, latents `[C, H, W]`:
//!
//! | dataset | type, shape | meaning |
//! |---|---|---|
//! | `prompts` | text `[n]` | |
//! | `global_sample` | u32 `[n]` | index in the global batch; with `seed` and `iteration` it fixes all noise |
//! | `timesteps` | i64 `[S]` | t of each step, in sampling order |
//! | `log_probs` | f32 `[n, S]` | mean log-probability of each transition under the sampling policy; NaN where σ = 0 |
//! | `rewards`, `advantages` | f32 `[n]` | advantages are NaN where the reward was not finite |
//! | `latents` | f32 or f16 `[n, S+1, C, H, W]` | x_T first, x_0 last (whole trajectories only) |
//! | `selected_steps` | i64 `[k]` | indices into `timesteps` (selected transitions only) |
//! | `x_t`, `x_prev` | f32 or f16 `[n, k, C, H, W]` | both ends of the selected transitions |
//!
//! Attributes: `format`, `task` (text), `iteration`, `rank`, `seed` (u64), `eta`, `guidance_scale` (f64).

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{ensure, Context, Result};
use half::f16;

use super::h5;

const FORMAT: &str = "rldiff trajectories 1";

/// Number type that latents are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LatentPrecision {
    F32,
    F16,
}

/// Which latents a shard keeps, flattened row by row.
#[derive(Clone, Debug, PartialEq)]
pub enum Latents {
    /// `[n, S+1, C, H, W]`
    Path(Vec<f32>),
    /// `x_t` and `x_prev`: `[n, k, C, H, W]`
    Transitions { selected_steps: Vec<i64>, x_t: Vec<f32>, x_prev: Vec<f32> },
}

/// One rank's samples of one task and iteration.
#[derive(Clone, Debug, PartialEq)]
pub struct TrajectoryShard {
    pub task: String,
    pub iteration: u64,
    pub rank: usize,
    pub seed: u64,
    pub eta: f64,
    pub guidance_scale: f64,
    pub prompts: Vec<String>,
    pub global_sample: Vec<u32>,
    pub timesteps: Vec<i64>,
    /// `[n, S]`
    pub log_probs: Vec<f32>,
    pub rewards: Vec<f32>,
    pub advantages: Vec<f32>,
    pub latent_shape: [usize; 3],
    pub latents: Latents,
}

impl TrajectoryShard {
    /// Writes the shard under the run's folder; returns its path.
    ///
    /// # Errors
    /// Lengths that do not fit each other, and what the file system says; the path is named.
    pub fn write(&self, trajectories: &Path, precision: LatentPrecision) -> Result<PathBuf> {
        let (n, steps) = (self.prompts.len(), self.timesteps.len());
        for (name, length) in [
            ("global_sample", self.global_sample.len()),
            ("rewards", self.rewards.len()),
            ("advantages", self.advantages.len()),
        ] {
            ensure!(length == n, "trajectory shard: {length} {name} for {n} prompts");
        }
        let path = trajectories
            .join(format!("iteration-{:06}", self.iteration))
            .join(format!("{}-rank-{:03}.h5", self.task, self.rank));
        let [c, h, w] = self.latent_shape;
        h5::write_file(&path, |out| {
            h5::write_text_attribute(out, "format", FORMAT)?;
            h5::write_text_attribute(out, "task", &self.task)?;
            h5::write_attribute(out, "iteration", self.iteration)?;
            h5::write_attribute(out, "rank", self.rank as u64)?;
            h5::write_attribute(out, "seed", self.seed)?;
            h5::write_attribute(out, "eta", self.eta)?;
            h5::write_attribute(out, "guidance_scale", self.guidance_scale)?;
            h5::write_texts(out, "prompts", &self.prompts)?;
            h5::write_array(out, "global_sample", &self.global_sample, &[n])?;
            h5::write_array(out, "timesteps", &self.timesteps, &[steps])?;
            h5::write_array(out, "log_probs", &self.log_probs, &[n, steps])?;
            h5::write_array(out, "rewards", &self.rewards, &[n])?;
            h5::write_array(out, "advantages", &self.advantages, &[n])?;
            match &self.latents {
                Latents::Path(values) => write_latents(out, "latents", values, &[n, steps + 1, c, h, w], precision),
                Latents::Transitions { selected_steps, x_t, x_prev } => {
                    let k = selected_steps.len();
                    h5::write_array(out, "selected_steps", selected_steps, &[k])?;
                    write_latents(out, "x_t", x_t, &[n, k, c, h, w], precision)?;
                    write_latents(out, "x_prev", x_prev, &[n, k, c, h, w], precision)
                }
            }
        })?;
        Ok(path)
    }
}

impl TrajectoryShard {
    /// Removes the shards of iteration `first` and all later ones, and their folders where nothing else is in them.
    pub fn remove_from(trajectories: &Path, first: u64) -> Result<()> {
        let Ok(iterations) = fs::read_dir(trajectories) else { return Ok(()) };
        for entry in iterations {
            let folder = entry?.path();
            let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let iteration = name.strip_prefix("iteration-").and_then(|number| number.parse::<u64>().ok());
            if iteration.is_some_and(|iteration| iteration >= first) && folder.is_dir() {
                let removed = remove_shards(&folder);
                removed.with_context(|| format!("cannot remove the shards in {}", folder.display()))?;
            }
        }
        Ok(())
    }
}

fn remove_shards(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // TASK-rank-NNN.h5, or .TASK-rank-NNN.h5.HOST-PID.tmp where it was being written
        let name = name.strip_suffix(".tmp").and_then(|name| name.rsplit_once('.')).map_or(name.as_str(), |n| n.0);
        let rank = name.strip_suffix(".h5").and_then(|name| name.rsplit_once("-rank-")).map(|(_, rank)| rank);
        if rank.is_some_and(|rank| rank.parse::<usize>().is_ok()) && !entry.file_type()?.is_dir() {
            fs::remove_file(entry.path())?;
        }
    }
    match fs::remove_dir(folder) {
        Err(e) if e.kind() != io::ErrorKind::DirectoryNotEmpty => Err(e),
        _ => Ok(()),
    }
}

fn write_latents(
    out: &hdf5::Group,
    name: &str,
    values: &[f32],
    shape: &[usize],
    precision: LatentPrecision,
) -> Result<()> {
    match precision {
        LatentPrecision::F32 => h5::write_array(out, name, values, shape),
        LatentPrecision::F16 => {
            let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
            h5::write_array(out, name, &halves, shape)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard() -> TrajectoryShard {
        let (n, steps) = (3, 4);
        let numbers = |count: usize| (0..count).map(|i| i as f32 * 0.25 - 1.0).collect::<Vec<f32>>();
        TrajectoryShard {
            task: "parity".into(),
            iteration: 12,
            rank: 1,
            seed: 7,
            eta: 1.0,
            guidance_scale: 3.0,
            prompts: (0..n).map(|i| format!("a portrait of a doctor n° {i}")).collect(),
            global_sample: vec![3, 4, 5],
            timesteps: vec![751, 501, 251, 1],
            log_probs: numbers(n * steps),
            rewards: vec![0.5, f32::NAN, -1.0],
            advantages: vec![1.0, f32::NAN, -1.0],
            latent_shape: [2, 3, 5],
            latents: Latents::Path(numbers(n * (steps + 1) * 30)),
        }
    }

    #[test]
    fn a_shard_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        for precision in [LatentPrecision::F32, LatentPrecision::F16] {
            let shard = shard();
            let path = shard.write(folder.path(), precision).unwrap();
            assert!(path.ends_with("iteration-000012/parity-rank-001.h5"), "{}", path.display());
            let file = h5::open(&path).unwrap();
            assert_eq!(h5::read_vector::<f32>(&file, "log_probs").unwrap(), shard.log_probs);
            assert_eq!(file.dataset("latents").unwrap().shape(), [3, 5, 2, 3, 5]);
            // quarters are exact in f16
            let Latents::Path(expected) = &shard.latents else { unreachable!() };
            let stored: Vec<f32> = match precision {
                LatentPrecision::F32 => h5::read_vector(&file, "latents").unwrap(),
                LatentPrecision::F16 => {
                    h5::read_vector::<f16>(&file, "latents").unwrap().iter().map(|v| v.to_f32()).collect()
                }
            };
            assert_eq!(&stored, expected);
            assert!(h5::read_vector::<f32>(&file, "rewards").unwrap()[1].is_nan());
            let prompts = h5::read_vector::<hdf5::types::VarLenUnicode>(&file, "prompts").unwrap();
            assert_eq!(prompts[2].as_str(), "a portrait of a doctor n° 2");
        }
        assert_eq!(std::fs::read_dir(folder.path().join("iteration-000012")).unwrap().count(), 1);
    }

    #[test]
    fn wrong_lengths_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut bad = shard();
        bad.rewards.pop();
        assert!(bad.write(folder.path(), LatentPrecision::F32).unwrap_err().to_string().contains("rewards"));
        let mut bad = shard();
        bad.log_probs.pop();
        assert!(format!("{:#}", bad.write(folder.path(), LatentPrecision::F32).unwrap_err()).contains("log_probs"));
        assert!(!folder.path().join("iteration-000012/parity-rank-001.h5").exists());
    }
}
