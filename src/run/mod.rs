//! A whole training run: model in, Algorithm 1, what it leaves in its folder.

pub mod footprint;
mod recorder;
mod results;
mod resume;
mod trajectories;

pub use resume::Resume;

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{ensure, Context, Result};
use tch::Device;

use crate::{
    comm::{agree, same_tree, Communicator},
    config::Config,
    miniature,
    models::{
        folder::{ModelFiles, ModelLocation},
        lora::{self, LoraSettings},
        parameters::Source,
        pipeline::{Build, Pipeline},
        weights::read_safetensors,
    },
    policy::lanes::Lanes,
    signals, store,
    telemetry::{can_be_folder, RunFiles, Summary},
    train::Trainer,
};
use recorder::Recorder;

/// Where a model lies that a config or a command line names: `embedded`, a diffusers folder, or a run's folder (its
/// tuned model).
pub fn model_location(name: &str) -> ModelLocation {
    if name == "embedded" {
        return ModelLocation::Embedded(miniature::EMBEDDED_MODEL);
    }
    let folder = Path::new(name);
    let of_run = RunFiles::new(folder).model();
    let is_run = !folder.join("model_index.json").exists() && of_run.join("model_index.json").exists();
    ModelLocation::Disk(if is_run { of_run } else { folder.to_path_buf() })
}

/// Loads a model on every rank; rank 0 reads.
pub fn load_model(name: &str, comm: &dyn Communicator) -> Result<Pipeline> {
    let files = ModelFiles::read_and_broadcast(&model_location(name), comm)?;
    Pipeline::from_files(files, Device::Cpu)
}

/// As [`load_model`], with the adapters of a LoRA file added; every rank reads that small file.
pub fn load_with_adapters(name: &str, lora: Option<&Path>, comm: &dyn Communicator) -> Result<Pipeline> {
    let files = ModelFiles::read_and_broadcast(&model_location(name), comm)?;
    let Some(path) = lora else { return Pipeline::from_files(files, Device::Cpu) };
    let read = || {
        let bytes = std::fs::read(path)?;
        lora::from_file(read_safetensors(&bytes, &path.display().to_string())?)
    };
    let (settings, adapters) = read().with_context(|| path.display().to_string())?;
    Pipeline::with(files, Device::Cpu, Build { lora: Some((settings, Source::Tensors(adapters))), ..Build::default() })
}

/// Loads the config's model with the adapters it asks for.
pub fn load_for_training(config: &Config, comm: &dyn Communicator) -> Result<Pipeline> {
    let files = ModelFiles::read_and_broadcast(&model_location(&config.model.path), comm)?;
    Pipeline::with(files, Device::Cpu, build_for(config))
}

/// How a config's U-Net is built for training.
pub fn build_for(config: &Config) -> Build {
    let lora = (config.lora.rank > 0).then(|| {
        let settings =
            LoraSettings { rank: config.lora.rank, alpha: config.lora.alpha, targets: config.lora.targets.clone() };
        (settings, Source::Seeded(config.run.seed))
    });
    Build { unet_kind: config.model.compute.kind(), gradient_checkpointing: config.model.gradient_checkpointing, lora }
}

/// How a run came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Complete,
    /// A signal asked for it; the state is saved and `--resume auto` goes on from it.
    Interrupted,
}

/// A run that is ready to start.
pub struct Run<'a> {
    config: &'a Config,
    comm: &'a dyn Communicator,
    files: RunFiles,
    trainer: Trainer<'a>,
    /// Iterations that a checkpoint holds.
    done: u64,
    /// That checkpoint.
    origin: Option<PathBuf>,
    started: Instant,
}

impl<'a> Run<'a> {
    /// Everything that can go wrong by a user's mistake, before any work and without a change on disk: the config, the
    /// number of ranks, the model, the checkpoint. A collective call; errors are the same on all ranks.
    pub fn prepare(config: &'a Config, comm: &'a dyn Communicator, files: RunFiles, resume: &Resume) -> Result<Self> {
        let started = Instant::now();
        config.validate()?;
        Lanes::new(config.run.lanes, comm)?;
        if comm.rank() == 0 && !same_tree(config.run.lanes, comm.size()) {
            log::warn!(
                "{} lanes on {} ranks: lanes per rank are no power of two, so the last bits differ from other numbers of ranks",
                config.run.lanes,
                comm.size()
            );
        }
        agree(comm, if comm.rank() == 0 { can_be_folder(files.root()) } else { Ok(()) })?;
        let mut trainer = Trainer::new(config, comm, load_for_training(config, comm)?)?;
        let (mut done, mut origin) = (0, None);
        if let Some(loaded) = resume::find(resume, &files, comm)? {
            let checkpoint = &loaded.checkpoint;
            if comm.rank() == 0 {
                loaded.warnings.iter().for_each(|warning| log::warn!("{warning}"));
            }
            resume::check_config(config, checkpoint)?;
            trainer
                .learner
                .restore(checkpoint)
                .with_context(|| format!("cannot resume from {}", loaded.path.display()))?;
            done = checkpoint.iteration;
            origin = Some(loaded.path.clone());
            ensure!(
                done <= config.run.iterations,
                "{} has {done} iterations, run.iterations is {}",
                loaded.path.display(),
                config.run.iterations
            );
            if comm.rank() == 0 {
                log::info!("resuming {} after iteration {done}", loaded.path.display());
            }
        }
        Ok(Run { config, comm, files, trainer, done, origin, started })
    }

    /// Trains, evaluates and writes everything, or saves and leaves when a signal asks for it. A collective call.
    pub fn go(mut self) -> Result<Ending> {
        let (config, comm) = (self.config, self.comm);
        let first = comm.rank() == 0;
        if self.is_finished()? {
            if first {
                println!(
                    "{}: all {} iterations are done; see {}",
                    config.run.name,
                    self.done,
                    self.files.root().display()
                );
            }
            return Ok(Ending::Complete);
        }
        if signals::asked_to_stop(comm)? {
            if first {
                log::info!("asked to stop before the first iteration: nothing to save");
            }
            return Ok(Ending::Interrupted);
        }
        let config_toml = toml::to_string_pretty(config)?;
        let begun = if first { self.begin(&config_toml).map(Some) } else { Ok(None) };
        let (mut recorder, begun) = match begun {
            Ok(recorder) => (recorder, Ok(())),
            Err(e) => (None, Err(e)),
        };
        agree(comm, begun)?;

        for iteration in self.done..config.run.iterations {
            let metrics = self.trainer.iterate(iteration, &mut |trainer, task, batch, chosen| {
                let every = config.trajectories.every;
                if every > 0 && (iteration + 1) % every == 0 {
                    trajectories::write(trainer, &self.files, task, iteration, batch, chosen)?;
                }
                Ok(())
            })?;
            if let Some(recorder) = &mut recorder {
                recorder.iteration(&metrics)?;
            }
            let (every, last) = (config.run.checkpoint_every, iteration + 1 == config.run.iterations);
            let stop = signals::asked_to_stop(comm)?;
            if stop || every > 0 && ((iteration + 1) % every == 0 || last) {
                if let Some(recorder) = &recorder {
                    recorder.metrics.sync()?;
                }
                self.save(iteration + 1, &config_toml)?;
            }
            if stop {
                if let Some(recorder) = recorder {
                    recorder.finish();
                    log::info!("asked to stop: saved after iteration {}; go on with --resume auto", iteration + 1);
                }
                return Ok(Ending::Interrupted);
            }
        }
        let events = recorder.map(Recorder::finish);
        // the evaluation can be done again where the trained state is on disk
        let is_saved = config.run.checkpoint_every > 0 || self.done == config.run.iterations;
        let stop = || Ok(is_saved && signals::asked_to_stop(comm)?);
        let ending = results::finish(config, comm, &self.files, self.trainer, events, self.started, &stop)?;
        if first && ending == Ending::Interrupted {
            log::info!("asked to stop: the training is done and saved; --resume auto evaluates it");
        }
        Ok(ending)
    }

    /// Whether all iterations are done and the results are theirs, not those of the run before it was extended. Rank 0
    /// looks.
    fn is_finished(&self) -> Result<bool> {
        let has_results = || Summary::read(&self.files.summary()).is_ok_and(|s| s.iterations == self.done);
        let mut finished =
            vec![u8::from(self.comm.rank() == 0 && self.done == self.config.run.iterations && has_results())];
        self.comm.broadcast_bytes(&mut finished, 0)?;
        Ok(finished == [1])
    }

    /// Rank 0, before the first iteration: the folder and its writers.
    fn begin(&self, config_toml: &str) -> Result<Recorder> {
        match &self.origin {
            None => resume::move_aside(self.files.root())?,
            Some(checkpoint) => resume::return_to(checkpoint, self.done, &self.files)?,
        }
        Recorder::create(self.config, config_toml, &self.files, self.done)
    }

    fn save(&self, iteration: u64, config_toml: &str) -> Result<()> {
        let learner = &self.trainer.learner;
        let (meta, layout) = (learner.meta(), learner.layout());
        let checkpoint = learner.checkpoint(iteration, &meta, &layout, config_toml);
        store::save(&self.files.checkpoints(), &checkpoint, self.config.run.keep_checkpoints, self.comm)?;
        Ok(())
    }
}
