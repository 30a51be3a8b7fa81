//! A whole training run: model in, Algorithm 1, what it leaves in its folder.

mod course;
pub mod fit;
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
    comm::{agree, all_made, same_tree, Communicator},
    config::{needs::ensure_here, Checkpointing, Config, Graphs},
    device::ensure_gpu,
    evaluation::overlap,
    folders::FolderLock,
    miniature::Edition,
    models::{
        folder::{ModelFiles, ModelLocation},
        lora::{adapter::Adapter, LoraSettings},
        parameters::Source,
        pipeline::{Build, Pipeline},
        recompute::Recomputed,
    },
    policy::lanes::Lanes,
    signals, start_up, store,
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

/// The config's model as it was before training, to compare with: in f32, all else as in the run.
pub fn load_base(config: &Config, comm: &dyn Communicator, device: Device) -> Result<Pipeline> {
    let files = ModelFiles::read_and_broadcast(&model_location(&config.model.path), comm)?;
    Pipeline::with(files, device, Build { precision: config.model.frozen_compute, ..Build::default() })
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
    let location = model_location(&config.model.path);
    let files = start_up::phase("model to all ranks", || ModelFiles::read_and_broadcast(&location, comm))?;
    start_up::phase("networks", || Pipeline::with(files, device, build_for(config)))
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
        recomputed: match model.gradient_checkpointing {
            Checkpointing::Fixed(which) => which,
            // the trainer decides, when it knows what else takes memory
            Checkpointing::Auto => Recomputed::Nothing,
        },
        decode_batch: model.decode_batch,
        precision: model.frozen_compute,
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
        if config.rollout.cuda_graph == Graphs::Fixed(true) {
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
        let mut trainer = start_up::phase("networks", || Trainer::new(config, comm, pipeline))?;
        agree(comm, if comm.rank() == 0 { overlap::warn_of_tasks(config, &trainer.tasks) } else { Ok(()) })?;
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tch::{Kind, Tensor};

    use super::*;
    use crate::{
        comm::Local,
        config::load::{parse, EMBEDDED_JOINT},
        learner::Learner,
        miniature::EMBEDDED_MODEL,
    };

    /// The miniature with weights that bf16 does not hold, at `dir`, in `kind`.
    fn write_model(dir: &Path, kind: Kind) {
        let files = ModelFiles::read(&ModelLocation::Embedded(EMBEDDED_MODEL)).unwrap();
        let pipeline = Pipeline::from_files(files, Device::Cpu).unwrap();
        let networks = [&pipeline.text_parameters, &pipeline.unet_parameters, &pipeline.vae_parameters];
        for (i, p) in networks.into_iter().flat_map(|network| &network.entries).enumerate() {
            let factor = (p.tensor.ones_like().flatten(0, -1).cumsum(0, Kind::Float) + i as i64).sin() * 1e-3 + 1.0;
            let _ = p.tensor.shallow_clone().g_mul_(&factor.view_as(&p.tensor));
        }
        let zeros_of_both_signs = Tensor::from_slice(&[-0.0f32, 0.0]);
        pipeline.unet_parameters.entries[0].tensor.flatten(0, -1).narrow(0, 0, 2).copy_(&zeros_of_both_signs);
        pipeline.save(dir, kind, None).unwrap();
    }

    /// The bits of all weights of a folder, as f32.
    fn bits(dir: &Path) -> BTreeMap<String, Vec<u32>> {
        let files = ModelFiles::read(&ModelLocation::Disk(dir.to_path_buf())).unwrap();
        let of_network = |(component, tensors): (String, BTreeMap<String, Tensor>)| {
            tensors.into_iter().map(move |(name, tensor)| {
                let values = Vec::<f32>::try_from(tensor.to_kind(Kind::Float).contiguous().view([-1])).unwrap();
                (format!("{component}/{name}"), values.iter().map(|v| v.to_bits()).collect())
            })
        };
        files.weights.into_iter().flat_map(of_network).collect()
    }

    #[test]
    fn what_was_not_trained_is_saved_bit_for_bit() {
        let folder = tempfile::tempdir().unwrap();
        for kind in [Kind::Float, Kind::Half] {
            let given = folder.path().join(format!("{kind:?}"));
            write_model(&given, kind);
            let expected = bits(&given);
            let rounded = |bits: &u32| half::bf16::from_f32(f32::from_bits(*bits)).to_f32().to_bits() != *bits;
            assert!(expected.values().flatten().filter(|bits| rounded(bits)).count() > 1000, "bf16 would lose nothing");
            let model = format!("model.path='{}'", given.display());
            for (i, sets) in [
                &["model.compute='f32'"][..],
                &["model.compute='bf16'"],
                &["model.compute='bf16'", "ema.decay=0.9"],
                &["model.compute='f32'", "lora.rank=2"],
                &["model.compute='bf16'", "lora.rank=2"],
                &["model.compute='bf16'", "lora.rank=2", "ema.decay=0.9", "model.frozen_compute='bf16'"],
            ]
            .into_iter()
            .enumerate()
            {
                let all: Vec<String> = sets.iter().copied().chain([model.as_str()]).map(String::from).collect();
                let config = parse(EMBEDDED_JOINT, "joint", &all).unwrap();
                let pipeline = load_for_training(&config, &Local, Device::Cpu).unwrap();
                let learner = Learner::new(&pipeline, &config).unwrap();
                let out = folder.path().join(format!("{kind:?}-{i}"));
                pipeline.save(&out, Kind::Float, Some(&pipeline.unet_with(&learner.result()).unwrap())).unwrap();
                let saved = bits(&out);
                assert!(saved.keys().eq(expected.keys()));
                for (name, of_saved) in &saved {
                    assert!(*of_saved == expected[name], "{kind:?} files, {sets:?}: {name}");
                }
            }
        }
    }
}
