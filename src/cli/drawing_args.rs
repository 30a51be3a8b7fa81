//! The arguments by which commands that draw pictures are told how, and what is taken where they are not given.

use std::fmt::Display;

use anyhow::{anyhow, bail, Result};

use super::{
    family::Family,
    numbers::{whole, within},
};
use crate::{
    comm::Communicator,
    config::bounds::{ETA, GUIDANCE},
    draw::Drawing,
    model_origin::{self, Origin},
    run::model_location,
};

#[derive(clap::Args, Clone, Debug)]
pub struct DrawingArgs {
    /// DDIM steps [default: those of the run that made the model, else 50, or 6 of the miniature].
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1, 1000))]
    steps: Option<usize>,
    /// Guidance scale g; 1 for no guidance [default: that of the run that made the model, else 7, or 3 of the miniature].
    #[arg(long, value_name = "G", value_parser = within(GUIDANCE))]
    guidance: Option<f64>,
    /// Noise of the transitions: 0 is deterministic DDIM [default: that of the run that made the model, else 0, or 1 of the
    /// miniature].
    #[arg(long, value_parser = within(ETA))]
    eta: Option<f64>,
    /// What to steer away from.
    #[arg(long, default_value = "", value_name = "TEXT")]
    negative: String,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Height of the pictures in pixels [default: the model's own].
    #[arg(long, value_name = "PIXELS", value_parser = whole::<i64>(1, 16_384))]
    height: Option<i64>,
    /// Width of the pictures in pixels [default: the model's own].
    #[arg(long, value_name = "PIXELS", value_parser = whole::<i64>(1, 16_384))]
    width: Option<i64>,
}

/// A setting, and where it is from.
type Setting<T> = (T, String);

impl DrawingArgs {
    /// How `models` are drawn, all in one way: as the arguments say, else as the runs that made them do, else as is usual for
    /// their family; and a line that says which, to be said before the first picture. Rank 0 looks. A collective call.
    ///
    /// # Errors
    /// The models would be drawn in different ways; a run's config cannot be read.
    pub fn drawing(&self, models: &[&str], comm: &dyn Communicator) -> Result<(Drawing, String)> {
        let mut message = Vec::new();
        if comm.rank() == 0 {
            let chosen = self.choose(models).map_err(|e| format!("{e:#}"));
            message = serde_json::to_vec(&chosen)?;
        }
        comm.broadcast_bytes(&mut message, 0)?;
        let chosen: Result<(Drawing, String), String> = serde_json::from_slice(&message)?;
        chosen.map_err(|e| anyhow!(e))
    }

    /// The settings, and a line that says where they are from.
    fn choose(&self, models: &[&str]) -> Result<(Drawing, String)> {
        let asked = self.steps.is_some() && self.guidance.is_some() && self.eta.is_some();
        let mut runs: Vec<Origin> = Vec::new();
        if !asked {
            for origin in models.iter().filter_map(|model| model_origin::of_model(model)) {
                runs.push(origin?);
            }
        }
        let mut families: Vec<Family> = models.iter().map(|model| Family::of(&model_location(model))).collect();
        if families.is_empty() {
            // who draws complains of it
            families.push(Family::StableDiffusion);
        }
        let steps = setting("steps", self.steps, &runs, |run| run.config.rollout.steps, &families, Family::steps)?;
        let (guidance, eta) = (self.guidance, self.eta);
        let guidance =
            setting("guidance", guidance, &runs, |run| run.config.rollout.guidance_scale, &families, Family::guidance)?;
        let eta = setting("eta", eta, &runs, |run| run.config.rollout.eta, &families, Family::eta)?;
        let words = format!(
            "drawing with {} DDIM steps ({}), guidance {} ({}), eta {} ({})",
            steps.0, steps.1, guidance.0, guidance.1, eta.0, eta.1
        );
        let drawing = Drawing {
            seed: self.seed,
            steps: steps.0,
            guidance_scale: guidance.0,
            eta: eta.0,
            negative: self.negative.clone(),
            height: self.height,
            width: self.width,
        };
        Ok((drawing, words))
    }
}

/// The first that says something: the option, the runs' configs, the families' defaults.
fn setting<T: Copy + PartialEq + Display>(
    name: &str,
    option: Option<T>,
    runs: &[Origin],
    of_run: impl Fn(&Origin) -> T,
    families: &[Family],
    of_family: impl Fn(Family) -> T,
) -> Result<Setting<T>> {
    if let Some(value) = option {
        return Ok((value, format!("--{name}")));
    }
    let of_runs = runs.iter().map(|run| (of_run(run), format!("the config of {}", run.folder.display())));
    let of_families = families.iter().map(|family| (of_family(*family), format!("the default of {}", family.name())));
    let said: Vec<Setting<T>> = if runs.is_empty() { of_families.collect() } else { of_runs.collect() };
    let (value, from) = said[0].clone();
    match said.iter().find(|(other, _)| *other != value) {
        None => Ok((value, from)),
        Some((other, of_other)) => {
            bail!("{name} is {value} in {from} and {other} in {of_other}: say with --{name} how all models are drawn")
        }
    }
}
