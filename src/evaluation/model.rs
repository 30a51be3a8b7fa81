//! The models of an evaluation: diffusers folders, runs, checkpoints, with or without adapters.

use std::path::Path;

use anyhow::{ensure, Context, Result};
use sha2::{Digest, Sha256};
use tch::{Device, Kind};

use crate::{
    comm::{Communicator, Local},
    config::{eval::EvalRollout, load, EvalModel, EvalSettings},
    diffusion::schedule::Schedule,
    learner::Learner,
    models::{
        parameters::Parameters,
        pipeline::{Build, Pipeline},
    },
    run::{load_for_training, load_with_adapter, read_with_adapter},
    store,
};

pub struct LoadedModel {
    pub pipeline: Pipeline,
    /// SHA-256 of all its weights.
    pub digest: String,
}

fn is_checkpoint(path: &str) -> bool {
    Path::new(path).join("manifest.json").is_file()
}

/// Loads a model on every rank; rank 0 reads. A collective call.
pub fn load(
    model: &EvalModel,
    settings: &EvalSettings,
    comm: &dyn Communicator,
    device: Device,
) -> Result<LoadedModel> {
    let mut pipeline = match is_checkpoint(&model.path) {
        true => of_checkpoint(model, comm, device)?,
        false => {
            let files = read_with_adapter(&model.path, adapter(model), comm)?;
            Pipeline::with(files, device, Build { unet_kind: settings.compute.kind(), ..Build::default() })?
        }
    };
    pipeline.vae.decode_batch = settings.decode_batch;
    pipeline.vae.precision = settings.frozen_compute;
    let digest = digest(&pipeline)?;
    Ok(LoadedModel { pipeline, digest })
}

/// Whether the model can be built and take these steps; on one rank. Gives height and width of its pictures.
pub fn try_out(model: &EvalModel, rollout: &EvalRollout) -> Result<[i64; 2]> {
    let pipeline = match is_checkpoint(&model.path) {
        true => of_checkpoint(model, &Local, Device::Cpu)?,
        false => load_with_adapter(&model.path, adapter(model), &Local, Device::Cpu)?,
    };
    Schedule::of_model(&pipeline.scheduler)?.steps(rollout.steps, rollout.eta)?;
    Ok(pipeline.picture_size())
}

fn of_checkpoint(model: &EvalModel, comm: &dyn Communicator, device: Device) -> Result<Pipeline> {
    ensure!(model.lora.is_empty(), "{} is a checkpoint: it has its own adapters, lora must be \"\"", model.path);
    let stored = store::open(Path::new(&model.path), comm)?;
    let config = load::parse(&stored.head.config_toml, &format!("{}: its config", model.path), &[])?;
    let pipeline = load_for_training(&config, comm, device)?;
    let mut learner = Learner::new(&pipeline, &config)?;
    learner.restore(&stored, comm).with_context(|| model.path.clone())?;
    if let Some(average) = learner.average.take() {
        learner.params.buffer_mut().copy_from(&average);
        learner.params.publish();
    }
    Ok(pipeline)
}

/// Its adapter and that one's scale.
fn adapter(model: &EvalModel) -> Option<(&Path, f64)> {
    (!model.lora.is_empty()).then(|| (Path::new(&model.lora), 1.0))
}

/// Over names and f32 values of the weights of all networks, adapters included.
fn digest(pipeline: &Pipeline) -> Result<String> {
    let mut hash = Sha256::new();
    let adapters = pipeline.lora.as_ref().map(|(_, parameters)| parameters);
    let networks = [&pipeline.text_parameters, &pipeline.unet_parameters, &pipeline.vae_parameters];
    let mut add = |parameters: &Parameters| -> Result<()> {
        for parameter in &parameters.entries {
            hash.update(parameter.name.as_bytes());
            let values = parameter.tensor.detach().to_device(Device::Cpu).to_kind(Kind::Float).contiguous().view([-1]);
            hash.update(bytemuck::cast_slice::<f32, u8>(&Vec::<f32>::try_from(&values)?));
        }
        Ok(())
    };
    networks.into_iter().chain(adapters).try_for_each(&mut add)?;
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
