//! `rldiff eval`: models × prompt sets × metrics, the same prompts and noise for all models.
//!
//! ```text
//! OUT/<model>/<set>/part-<first sample>.json   what a rank has judged, as soon as it has
//! OUT/<model>/<set>/<prompt>-<image>.png       the pictures of the sheet, or all of them
//! OUT/<model>/<set>.json                       a model's values on a set, whole
//! OUT/results.json, results.md, <set>.png      figures of all models, tables, sheets: a column for each model
//! ```
//!
//! Samples go to the ranks round robin, in pieces of [`CHUNK`]; what is judged does not depend on the number of ranks. An
//! evaluation that was cut off goes on with the pieces that are missing, on any number of ranks. What is found is only
//! taken where it was made by the same weights (SHA-256), prompts, metrics, noise and steps.

mod model;
pub mod overlap;
mod results;
mod set;

pub use overlap::TrainedOn;
pub use results::{figure, read_group, to_json, to_markdown, Figure, ModelResult, SetResult, Values};
pub use set::draw_prompts;

use std::path::Path;

use anyhow::{Context, Result};
use tch::Device;

use crate::{
    cannot_write::CannotWrite,
    comm::{agree, all_made, Communicator},
    config::{needs::ensure_here, EvalConfig, EvalModel},
    cut_prompts,
    diffusion::schedule::Schedule,
    folders::FolderLock,
    signals,
    task::Roller,
};
use set::{evaluate_set, Set};

/// Samples per U-Net call where a prompt has fewer pictures; part of what the bits of a result depend on.
pub const CHUNK: usize = 16;

/// An evaluation that is ready to start.
pub struct Evaluation<'a> {
    config: &'a EvalConfig,
    sets: Vec<Set>,
    /// Rank 0's hold on the folder of the results.
    _lock: Option<FolderLock>,
}

impl<'a> Evaluation<'a> {
    /// Everything that can go wrong by a user's mistake: prompts, metrics, models. Only the folder's lock is. A collective
    /// call.
    pub fn prepare(config: &'a EvalConfig, comm: &dyn Communicator, device: Device, out: &Path) -> Result<Self> {
        config.validate()?;
        let lock = FolderLock::hold(comm, out, "eval", || results::check_place(config, out))?;
        all_made(comm, ensure_here(&config.needs()))?;
        let sets = config.sets.iter().enumerate().map(|(i, set)| Set::new(set, i, config.eval.seed, device, comm));
        let mut sets = sets.collect::<Result<Vec<_>>>()?;
        let of_files = |model: &EvalModel| {
            [&model.path, &model.lora]
                .into_iter()
                .flat_map(|path| TrainedOn::of_files(&model.name, path))
                .collect::<Vec<_>>()
        };
        let trained_on = if comm.rank() == 0 { config.models.iter().flat_map(of_files).collect() } else { Vec::new() };
        overlap::check_sets(&sets, &trained_on, comm)?;
        for model in &config.models {
            let mut try_out = || {
                let size = model::try_out(model, &config.rollout)?;
                sets.iter_mut().try_for_each(|set| set.check_size(size))
            };
            let tried = if comm.rank() == 0 { try_out() } else { Ok(()) };
            agree(comm, tried).with_context(|| format!("model {}", model.name))?;
        }
        Ok(Evaluation { config, sets, _lock: lock })
    }

    /// Whether its test prompts are others than those that models are trained on; rank 0's list counts. A collective call.
    ///
    /// # Errors
    /// Names three prompts that are not.
    pub fn hold_against(&self, trained_on: &[TrainedOn], comm: &dyn Communicator) -> Result<()> {
        overlap::check_sets(&self.sets, trained_on, comm)
    }

    /// Evaluates what is missing, and gives all results, the same on every rank. A collective call.
    ///
    /// # Errors
    /// Among others [`signals::Interrupted`], on all ranks; the pieces that are judged are on disk.
    pub fn go(mut self, comm: &dyn Communicator, device: Device, out: &Path) -> Result<Vec<ModelResult>> {
        let config = self.config;
        let mut results = Vec::new();
        for settings in &config.models {
            signals::stop_here(comm)?;
            let loaded = model::load(settings, &config.eval, comm, device)
                .with_context(|| format!("model {}", settings.name))?;
            let pipeline = &loaded.pipeline;
            let schedule = Schedule::of_model(&pipeline.scheduler)?;
            let steps = schedule.steps(config.rollout.steps, config.rollout.eta)?;
            let empty_prompt = pipeline.embed(&[""])?;
            let roller = Roller {
                pipeline,
                unet: &pipeline.unet,
                steps: &steps,
                empty_prompt: &empty_prompt,
                guidance_scale: config.rollout.guidance_scale,
                latent_shape: pipeline.latent_shape(),
                recorded: None,
            };
            let folder = out.join(settings.folder());
            let mut of_model =
                ModelResult { model: settings.name.clone(), path: settings.path.clone(), sets: Vec::new() };
            for set in &mut self.sets {
                let of = format!("set {}, model {}: ", set.config.name, settings.name);
                let texts = set.prompts.iter().map(|prompt| &prompt.text).filter(|_| comm.rank() == 0);
                agree(comm, cut_prompts::warn(&of, &pipeline.tokenizer, texts))?;
                of_model.sets.push(evaluate_set(config, &roller, &loaded.digest, set, &folder, comm)?);
            }
            results.push(of_model);
        }
        let written = if comm.rank() == 0 { results::write(config, out, &results) } else { Ok(()) };
        agree(comm, written).context(CannotWrite::new("the evaluation's files"))?;
        Ok(results)
    }
}
