//! `rldiff pretrain`: the miniature from scratch.

use std::path::PathBuf;

use anyhow::{anyhow, ensure};
use tch::Kind;

use super::{numbers::whole, Failure, OrMistake};
use crate::{
    comm::{agree, Communicator},
    miniature::pretrain::{self, PretrainSettings},
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
    #[arg(long, value_name = "N", value_parser = whole::<u64>(1, 4_294_967_295))]
    vae_steps: Option<u64>,
    /// Optimizer steps of text encoder and U-Net.
    #[arg(long, value_name = "N", value_parser = whole::<u64>(1, 4_294_967_295))]
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
        pretrain::check_ranks(comm)
    };
    agree(comm, free()).map_err(|e| anyhow!("pretrain: {e:#}")).or_mistake()?;
    // the bits of the result depend on the number of threads
    tch::set_num_threads(1);
    let first = comm.rank() == 0;
    let model = pretrain::run(settings, comm, &mut |line| {
        if first {
            println!("{line}");
        }
    })?;
    agree(comm, if first { model.save(&args.out, Kind::Half, None) } else { Ok(()) })?;
    if first {
        println!("model in {}", args.out.display());
    }
    Ok(())
}
