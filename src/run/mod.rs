//! A whole training run: model in, Algorithm 1, what it leaves in its folder.

mod course;
pub mod footprint;
mod recorder;
mod results;
mod resume;
mod trajectories;

pub use resume::Resume;

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{ensure, Context, Result};
use tch::Device;

use crate::{
    comm::{agree, all_made, same_tree, Communicator},
    config::{needs::ensure_here, Config},
    device::ensure_gpu,
    faults,
    learner::Learner,
    miniature,
    models::{
        folder::{ModelFiles, ModelLocation},
        lora::{self, LoraSettings},
        parameters::Source,
        pipeline::{Build, Pipeline},
        weight_files::read_tensors,
    },
    policy::lanes::Lanes,
    replicas, signals,
    store::{self, Keep, SaveReport, Saver},
    stragglers::Stragglers,
    telemetry::{can_be_folder, names, Metrics, RunFiles, Summary},
    train::Trainer,
    watch::{self, Limits, Watchdog},
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
pub fn load_model(name: &str, comm: &dyn Communicator, device: Device) -> Result<Pipeline> {
    let files = ModelFiles::read_and_broadcast(&model_location(name), comm)?;
    Pipeline::from_files(files, device)
}

/// As [`load_model`], with the adapters of a LoRA file (safetensors or PyTorch's own) added; every rank reads that small
/// file.
pub fn load_with_adapters(
    name: &str,
    lora: Option<&Path>,
    comm: &dyn Communicator,
    device: Device,
) -> Result<Pipeline> {
    let files = ModelFiles::read_and_broadcast(&model_location(name), comm)?;
    let Some(path) = lora else { return Pipeline::from_files(files, device) };
    let read = || {
        let bytes = std::fs::read(path)?;
        lora::from_file(read_tensors(&bytes, &path.display().to_string())?)
    };
    let (settings, adapters) = read().with_context(|| path.display().to_string())?;
    Pipeline::with(files, device, Build { lora: Some((settings, Source::Tensors(adapters))), ..Build::default() })
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

/// The context of an error that came from writing a run's files: disk full, read-only, an error of the device. The
/// command line has an exit code for it. A run that cannot save does not go on: what it would compute could be lost.
#[derive(Clone, Copy, Debug)]
pub struct CannotWrite;

impl std::fmt::Display for CannotWrite {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("cannot write the run's files")
    }
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
        agree(comm, if comm.rank() == 0 { can_be_folder(files.root()) } else { Ok(()) })?;
        all_made(comm, ensure_here(&config.needs()))?;
        let mut trainer = Trainer::new(config, comm, load_for_training(config, comm, device)?)?;
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
                if checkpoint.code_version != crate::CODE_VERSION {
                    let (theirs, ours) = (&checkpoint.code_version, crate::CODE_VERSION);
                    log::info!("it was written by rldiff {theirs}; this is {ours}");
                }
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
        agree(comm, begun).context(CannotWrite)?;
        let hosts = watch::hosts(comm)?;
        let limits = Limits { collective: config.run.collective_limit, reward: config.run.reward_limit };
        let _watchdog = Watchdog::start(self.files.watch(), comm.rank(), hosts.clone(), limits)?;
        let keep = Keep { last: config.run.keep_checkpoints, every: config.run.keep_every };
        let mut saver = Saver::new(&self.files.checkpoints(), keep);
        let mut stragglers = Stragglers::default();

        let mut of_base = Metrics::default();
        if self.done == 0 && course::is_due(config, 0) {
            course::evaluate(&mut self.trainer, comm, &self.files, 0, &mut recorder, &mut of_base)?;
        }
        for iteration in self.done..config.run.iterations {
            let (mut saved, mut stalled) = (None, Duration::ZERO);
            let mut metrics = self.trainer.iterate(iteration, &mut |trainer, task, batch, chosen| {
                let started = Instant::now();
                saved = saver.advance(comm).context(CannotWrite)?.or(saved.take());
                stalled += started.elapsed();
                let every = config.trajectories.every;
                if let Some(batch) = batch.filter(|_| every > 0 && (iteration + 1) % every == 0) {
                    trajectories::write(trainer, &self.files, task, iteration, batch, chosen).context(CannotWrite)?;
                }
                Ok(())
            })?;
            let done = iteration + 1;
            if iteration == 0 {
                of_base.iter().for_each(|(name, value)| metrics.set(name, value));
            }
            if first {
                let seconds = metrics.get(names::SECONDS).unwrap_or(0.0);
                let lines = stragglers.note(&self.trainer.stage_seconds, seconds, &hosts);
                lines.iter().for_each(|line| log::warn!("iteration {done}: {line}"));
            }
            self.trainer.check_weights(done)?;
            if course::is_due(config, done) {
                course::evaluate(&mut self.trainer, comm, &self.files, done, &mut recorder, &mut metrics)?;
            }
            if config.run.compare_every > 0 && done % config.run.compare_every == 0 {
                replicas::compare(self.trainer.learner.vectors(), done, &hosts, comm)?;
            }
            let (every, last) = (config.run.checkpoint_every, done == config.run.iterations);
            let stop = signals::asked_to_stop(comm)?;
            let save_now = stop || every > 0 && (done % every == 0 || last);
            let _stage = watch::stage("saving", "");
            let started = Instant::now();
            saved = saver.advance(comm).context(CannotWrite)?.or(saved);
            if save_now {
                let file = recorder.as_ref().map(|recorder| recorder.metrics.file()).transpose()?;
                saved = self.begin_save(&mut saver, done, &config_toml, file).context(CannotWrite)?.or(saved);
            }
            stalled += started.elapsed();
            metrics.set(names::SAVE_STALL, stalled.as_secs_f64());
            if let Some(report) = saved {
                metrics.set(names::SAVE_IN_BACKGROUND, report.took.as_secs_f64());
            }
            if let Some(recorder) = &mut recorder {
                faults::point("metrics");
                recorder.iteration(&metrics).context(CannotWrite)?;
            }
            if stop || last {
                if let Some(report) = saver.finish(comm).context(CannotWrite)?.filter(|_| first) {
                    log::info!("{}", in_words(&report));
                }
            }
            if stop {
                if let Some(recorder) = recorder {
                    recorder.finish();
                    log::info!("asked to stop: saved after iteration {done}");
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
            log::info!("asked to stop: the training is done and saved, its evaluation is not");
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
        store::checkpoint::clear_leftovers(&self.files.checkpoints())?;
        let watch = self.files.watch();
        if watch.exists() {
            fs::remove_dir_all(&watch).with_context(|| format!("cannot clear {}", watch.display()))?;
        }
        fs::create_dir_all(&watch).with_context(|| format!("cannot create {}", watch.display()))?;
        Recorder::create(self.config, config_toml, &self.files, self.done)
    }

    fn begin_save(
        &self,
        saver: &mut Saver,
        iteration: u64,
        config_toml: &str,
        metrics: Option<File>,
    ) -> Result<Option<SaveReport>> {
        let learner = &self.trainer.learner;
        let (meta, layout, vectors) = (learner.meta(), learner.layout(), learner.vectors().collect::<Vec<_>>());
        saver.begin(&Learner::checkpoint(iteration, &vectors, &meta, &layout, config_toml), metrics, self.comm)
    }
}

fn in_words(report: &SaveReport) -> String {
    format!(
        "{}: {:.1} MB by this rank in {:.2} s, the loop waited {:.3} s",
        report.path.display(),
        report.bytes as f64 / 1e6,
        report.took.as_secs_f64(),
        report.stalled.as_secs_f64()
    )
}
