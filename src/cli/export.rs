//! `rldiff export`: a checkpoint → a diffusers folder, or the adapters alone.

use std::path::PathBuf;

use anyhow::{ensure, Context, Result};
use clap::ValueEnum;
use tch::{Device, Kind};

use super::{Failure, OrMistake};
use crate::{
    comm::Communicator,
    config::load,
    folders::{can_be_file, NewFolder},
    learner::Learner,
    run::load_for_training,
    store,
};

#[derive(clap::Args)]
pub struct Args {
    /// A checkpoint, or a run's folder (its newest checkpoint).
    checkpoint: PathBuf,
    /// Folder for the model, or with --lora the file for the adapters; must not exist.
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// Write only the adapters, as diffusers' load_lora_weights reads them.
    #[arg(long)]
    lora: bool,
    /// The model that was fine-tuned, where it is no longer at the place the config names.
    #[arg(long, value_name = "DIR")]
    model: Option<String>,
    /// Number type of the weights.
    #[arg(long, value_enum, default_value_t = Type::F32)]
    r#type: Type,
}

#[derive(Clone, Copy, ValueEnum)]
enum Type {
    F32,
    F16,
    Bf16,
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    if comm.rank() != 0 {
        return Ok(());
    }
    export(&args).or_mistake()?;
    say!("{}", args.out.display());
    Ok(())
}

fn export(args: &Args) -> Result<()> {
    let new = match args.lora {
        false => Some(NewFolder::begin(&args.out, "export")?),
        true => None,
    };
    let is_free = new.is_some() || std::fs::symlink_metadata(&args.out).is_err();
    ensure!(is_free, "{} exists already: give another --out", args.out.display());
    if args.lora {
        can_be_file(&args.out)?;
    }
    let stored = store::find(&args.checkpoint)?;
    let path = &stored.path;
    stored.warnings.iter().for_each(|warning| log::warn!("{warning}"));
    let mut config = load::parse(&stored.head.config_toml, &format!("{}: its config", path.display()), &[])?;
    if let Some(model) = &args.model {
        config.model.path = model.clone();
    }
    let pipeline = load_for_training(&config, &crate::comm::Local, Device::Cpu)?;
    let mut learner = Learner::new(&pipeline, &config)?;
    learner.restore(&stored, &crate::comm::Local).with_context(|| path.display().to_string())?;
    let kind = match args.r#type {
        Type::F32 => Kind::Float,
        Type::F16 => Kind::Half,
        Type::Bf16 => Kind::BFloat16,
    };
    let trained = learner.result();
    match new {
        None => pipeline.save_lora(&args.out, &trained, kind),
        Some(new) => {
            pipeline.save_into(new.path(), kind, Some(&pipeline.unet_with(&trained)?))?;
            new.finish()
        }
    }
}
