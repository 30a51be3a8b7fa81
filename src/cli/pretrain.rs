//! `rldiff pretrain`: the miniature from scratch.

use std::path::PathBuf;

use anyhow::{ensure, Context};
use tch::Kind;

use super::{Failure, OrMistake};
use crate::{
    comm::{agree, Communicator},
    miniature::pretrain::{self, PretrainSettings},
    telemetry::can_be_folder,
};

#[derive(clap::Args)]
pub struct Args {
    /// Folder to write the model to (diffusers layout, f16); must not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Seed of pictures, initial weights and noise [default: the embedded weights' seed].
    #[arg(long)]
    seed: Option<u64>,
    /// Optimizer steps of the VAE.
    #[arg(long, value_name = "N")]
    vae_steps: Option<u64>,
    /// Optimizer steps of text encoder and U-Net.
    #[arg(long, value_name = "N")]
    unet_steps: Option<u64>,
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    let defaults = PretrainSettings::default();
    let settings = PretrainSettings {
        seed: args.seed.unwrap_or(defaults.seed),
        vae_steps: args.vae_steps.unwrap_or(defaults.vae_steps),
        unet_steps: args.unet_steps.unwrap_or(defaults.unet_steps),
        ..defaults
    };
    let free = || {
        ensure!(!args.out.exists(), "{} exists already", args.out.display());
        ensure!(settings.vae_steps > 0 && settings.unet_steps > 0, "--vae-steps and --unet-steps must be at least 1");
        if comm.rank() == 0 {
            can_be_folder(&args.out)?;
        }
        pretrain::check_ranks(comm)
    };
    agree(comm, free()).context("pretrain").or_mistake()?;
    // the bits of the result depend on the number of threads
    tch::set_num_threads(1);
    let first = comm.rank() == 0;
    let model = pretrain::run(settings, comm, &mut |line| {
        if first {
            say!("{line}");
        }
    })?;
    agree(comm, if first { model.save(&args.out, Kind::Half, None) } else { Ok(()) })?;
    if first {
        say!("model in {}", args.out.display());
    }
    Ok(())
}
