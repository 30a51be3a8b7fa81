//! `rldiff bench unet-config`: the U-Net's config.json of the model that `bench rollout` and `bench update` measure, so
//! that another program measures the same network.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::{
    cli::{Failure, OrMistake},
    comm::Communicator,
    models::{architectures::Architecture, folder::ModelFiles},
    run::model_location,
    streams,
};

#[derive(clap::Args)]
pub struct Args {
    /// `miniature`, or a diffusers folder.
    #[arg(long, default_value = "miniature", value_name = "DIR", conflicts_with = "architecture")]
    model: PathBuf,
    /// A published architecture instead.
    #[arg(long, value_enum)]
    architecture: Option<Architecture>,
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    if comm.rank() == 0 {
        streams::print(format_args!("{}", text(&args).or_mistake()?));
    }
    Ok(())
}

fn text(args: &Args) -> Result<String> {
    let files = match args.architecture {
        Some(architecture) => architecture.files(),
        None => ModelFiles::read(&model_location(args.model.to_str().context("--model is no UTF-8")?))?,
    };
    let bytes = files.texts.get("unet/config.json").context("the model has no unet/config.json")?;
    Ok(format!("{}\n", String::from_utf8_lossy(bytes).trim_end()))
}
