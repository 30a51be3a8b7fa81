//! A whole training run: model in, Algorithm 1, what it leaves in its folder.

mod course;
pub mod footprint;
pub mod no_signal;
mod recorder;
mod results;
mod resume;
pub mod stop;
mod trajectories;
mod under_way;

pub use resume::Resume;

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{ensure, Context, Result};
use tch::Device;

use crate::{
    comm::{all_made, same_tree, Communicator},
    config::{needs::ensure_here, Config},
    device::ensure_gpu,
    folders::FolderLock,
    miniature::Edition,
    models::{
        folder::{ModelFiles, ModelLocation},
        lora::{adapter::Adapter, LoraSettings},
        parameters::Source,
        pipeline::{Build, Pipeline},
    },
    policy::lanes::Lanes,
    signals, store,
    telemetry::{RunFiles, Summary},
    train::Trainer,
    watch,
};
use recorder::Recorder;
use stop::Stop;

/// Where a model lies that a config or a command line names: an embedded miniature, a diffusers folder, or a run's folder (its
/// tuned model).
pub fn model_location(name: &str) -> ModelLocation {
    if let Some(edition) = Edition::of_model(name) {
        return ModelLocation::Embedded(edition.model());
    }
    let folder = Path::new(name);
    let of_run = RunFiles::new(folder).model();
    let is_run = !folder.join("model_index.json").exists() && of_run.join("model_index.json").exists();
    ModelLocation::Disk(if is_run { of_run } else { folder.to_path_buf() })
}

/// Loads a model on every rank; rank 0 reads.
pub fn load_model(name: &str, comm: &dyn Communicator, device: Device) -> Result<Pipeline> {
    let files = ModelFiles::read_and_broadcast(&model_location(name), comm)?;
    Pipeline::from_files(files, device)
}

/// As [`load_model`], with an adapter (a file or a folder of any layout), multiplied by a number, added to the weights.
pub fn load_with_adapter(
    name: &str,
    adapter: Option<(&Path, f64)>,
    comm: &dyn Communicator,
    device: Device,
) -> Result<Pipeline> {
    Pipeline::from_files(read_with_adapter(name, adapter, comm)?, device)
}

/// The files of a model with an adapter's products in their weights; rank 0 reads. A collective call.
pub fn read_with_adapter(name: &str, adapter: Option<(&Path, f64)>, comm: &dyn Communicator) -> Result<ModelFiles> {
    // the adapter first: it is small, and a mistake in it is told before the model is read
    let adapter = adapter.map(|(path, scale)| anyhow::Ok((Adapter::read(path, comm)?, scale))).transpose()?;
    let mut files = ModelFiles::read_and_broadcast(&model_location(name), comm)?;
    if let Some((adapter, scale)) = adapter {
        let merged = adapter.merge_into(&mut files, scale)?;
        if comm.rank() == 0 {
            adapter.guesses.iter().for_each(|guess| log::warn!("{guess}"));
            merged.warn(&adapter.origin);
        }
    }
    Ok(files)
}

/// Loads the config's model with the adapters it asks for.
pub fn load_for_training(config: &Config, comm: &dyn Communicator, device: Device) -> Result<Pipeline> {
    let files = ModelFiles::read_and_broadcast(&model_location(&config.model.path), comm)?;
    Pipeline::with(files, device, build_for(config))
}

/// How a config's U-Net is built for training.
pub fn build_for(config: &Config) -> Build {
    let lora = (config.lora.rank > 0).then(|| {
        let settings =
            LoraSettings { rank: config.lora.rank, alpha: config.lora.alpha, targets: config.lora.targets.clone() };
        (settings, Source::Seeded(config.run.seed))
    });
    let model = &config.model;
    Build {
        unet_kind: model.compute.kind(),
        gradient_checkpointing: model.gradient_checkpointing,
        decode_batch: model.decode_batch,
        lora,
    }
}

/// A run that is ready to start.
pub struct Run<'a> {
    config: &'a Config,
    comm: &'a dyn Communicator,
    files: RunFiles,
    /// Rank 0's hold on the run's folder.
    lock: Option<FolderLock>,
    trainer: Trainer<'a>,
    /// When it ends.
    stop: Stop,
    /// Iterations that a checkpoint holds.
    done: u64,
    /// That checkpoint.
    origin: Option<PathBuf>,
    started: Instant,
}

impl<'a> Run<'a> {
    /// Everything that can go wrong by a user's mistake, before any work: the config, the number of ranks, the
    /// folder and who else uses it, the model, the checkpoint. On disk only the folder's lock changes, and only
    /// until this is dropped. A collective call; errors are the same on all ranks, [`signals::Interrupted`] among
    /// them.
    pub fn prepare(
        config: &'a Config,
        comm: &'a dyn Communicator,
        device: Device,
        files: RunFiles,
        resume: &Resume,
    ) -> Result<Self> {
        let started = Instant::now();
        config.validate()?;
        if config.rollout.cuda_graph {
            ensure_gpu(device, "rollout.cuda_graph = true")?;
        }
        Lanes::new(config.run.lanes, comm)?;
        if comm.rank() == 0 && !same_tree(config.run.lanes, comm.size()) {
            log::warn!(
                "{} lanes on {} ranks: lanes per rank are no power of two, so the last bits differ from other numbers of ranks",
                config.run.lanes,
                comm.size()
            );
        }
        let lock = FolderLock::hold(comm, files.root(), "train", || resume::check_place(config, &files, resume))?;
        // waiting for an earlier start of the same job gives signals their usual effect
        signals::install()?;
        let _stage = watch::stage("loading", "");
        all_made(comm, ensure_here(&config.needs()))?;
        signals::stop_here(comm)?;
        let pipeline = load_for_training(config, comm, device)?;
        signals::stop_here(comm)?;
        let mut trainer = Trainer::new(config, comm, pipeline)?;
        signals::stop_here(comm)?;
        let (mut done, mut origin, mut stop) = (0, None, Stop::new(config));
        if let Some(stored) = resume::find(resume, &files, comm)? {
            let checkpoint = &stored.head;
            if comm.rank() == 0 {
                stored.warnings.iter().for_each(|warning| log::warn!("{warning}"));
            }
            resume::check_config(config, checkpoint)?;
            trainer
                .learner
                .restore(&stored, comm)
                .with_context(|| format!("cannot resume from {}", stored.path.display()))?;
            stop = Stop::resumed(config, comm, &stored.path, checkpoint)?;
            done = checkpoint.iteration;
            origin = Some(stored.path.clone());
            ensure!(
                done <= config.run.iterations,
                "{} has {done} iterations, run.iterations is {}",
                stored.path.display(),
                config.run.iterations
            );
            if comm.rank() == 0 {
                log::info!("resuming {} after iteration {done}", stored.path.display());
                if checkpoint.code_version != crate::CODE_VERSION {
                    let (theirs, ours) = (&checkpoint.code_version, crate::CODE_VERSION);
                    log::info!("it was written by rldiff {theirs}; this is {ours}");
                }
            }
        }
        let without_effect = config.stop.as_ref().and_then(|stop| stop.without_effect(config.run.iterations));
        without_effect.iter().filter(|_| comm.rank() == 0).for_each(|line| log::warn!("{line}"));
        Ok(Run { config, comm, files, lock, trainer, stop, done, origin, started })
    }

    /// Whether the run is at its end and the results are of that end, not of the run before it was extended. Rank 0
    /// looks. A collective call.
    fn is_finished(&self) -> Result<bool> {
        let has_results = || Summary::read(&self.files.summary()).is_ok_and(|s| s.iterations == self.done);
        let ended = self.stop.is_end(self.done, self.comm)?;
        let mut finished = vec![u8::from(self.comm.rank() == 0 && ended && has_results())];
        self.comm.broadcast_bytes(&mut finished, 0)?;
        Ok(finished == [1])
    }

    /// Rank 0, before the first iteration: the folder and its writers.
    fn begin(&mut self, config_toml: &str) -> Result<Recorder> {
        let lock = self.lock.as_mut().context("rank 0 holds the run's folder")?;
        match &self.origin {
            None => resume::move_aside(lock, &self.files)?,
            Some(checkpoint) => resume::return_to(checkpoint, self.done, lock, &self.files)?,
        }
        store::checkpoint::clear_leftovers(&self.files.checkpoints())?;
        watch::clear(&self.files.watch())?;
        Recorder::create(self.config, config_toml, &self.files, self.done)
    }
}
