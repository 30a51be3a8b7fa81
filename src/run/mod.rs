//! A whole training run: model in, Algorithm 1, what it leaves in its folder.

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
    comm::{agree, Communicator},
    config::Config,
    miniature,
    models::{
        folder::{ModelFiles, ModelLocation},
        pipeline::Pipeline,
    },
    policy::lanes::Lanes,
    store,
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

/// Loads a model on every rank; rank 0 reads. Its weights are frozen.
pub fn load_model(name: &str, comm: &dyn Communicator) -> Result<Pipeline> {
    let files = ModelFiles::read_and_broadcast(&model_location(name), comm)?;
    let pipeline = Pipeline::from_files(files, Device::Cpu)?;
    for parameters in [&pipeline.text_parameters, &pipeline.unet_parameters, &pipeline.vae_parameters] {
        parameters.freeze();
    }
    Ok(pipeline)
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
        agree(comm, if comm.rank() == 0 { can_be_folder(files.root()) } else { Ok(()) })?;
        let mut trainer = Trainer::new(config, comm, load_model(&config.model.path, comm)?)?;
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

    /// Trains, evaluates and writes everything. A collective call.
    pub fn go(mut self) -> Result<()> {
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
            return Ok(());
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
            let every = config.run.checkpoint_every;
            if every > 0 && ((iteration + 1) % every == 0 || iteration + 1 == config.run.iterations) {
                if let Some(recorder) = &recorder {
                    recorder.metrics.sync()?;
                }
                self.save(iteration + 1, &config_toml)?;
            }
        }
        let events = recorder.map(Recorder::finish);
        results::finish(config, comm, &self.files, self.trainer, events, self.started)
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
