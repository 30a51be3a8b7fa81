//! `rldiff pretrain`: the miniature from scratch.

use std::path::PathBuf;

use anyhow::Context;
use tch::Kind;

use super::{numbers::whole, Failure, OrMistake};
use crate::{
    comm::{agree, Communicator},
    folders::NewFolder,
    miniature::{
        pretrain::{self, PretrainSettings},
        Edition,
    },
};

#[derive(clap::Args)]
pub struct Args {
    /// Folder to write the model to (diffusers layout, f16); must not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Edition of the miniature's world: 1 gives the model called "embedded", 2 the one called "miniature".
    #[arg(long, value_name = "1|2", default_value = "2", value_parser = edition)]
    edition: Edition,
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

fn edition(text: &str) -> Result<Edition, String> {
    Edition::try_from(text.parse::<u8>().map_err(|e| e.to_string())?)
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    let defaults = PretrainSettings::default();
    let settings = PretrainSettings {
        edition: args.edition,
        seed: args.seed.unwrap_or(defaults.seed),
        vae_steps: args.vae_steps.unwrap_or(defaults.vae_steps),
        unet_steps: args.unet_steps.unwrap_or(defaults.unet_steps),
        ..defaults
    };
    let free = || pretrain::check_ranks(comm);
    let first = comm.rank() == 0;
    let begun = if first { NewFolder::begin(&args.out, "pretrain").map(Some) } else { Ok(None) };
    let (new, begun) = match begun {
        Ok(new) => (new, Ok(())),
        Err(e) => (None, Err(e)),
    };
    agree(comm, begun.and(free())).context("pretrain").or_mistake()?;
    // the bits of the result depend on the number of threads
    tch::set_num_threads(1);
    let model = pretrain::run(settings, comm, &mut |line| {
        if first {
            say!("{line}");
        }
    })?;
    let save = |new: NewFolder| model.save_into(new.path(), Kind::Half, None).and_then(|()| new.finish());
    agree(comm, new.map_or(Ok(()), save))?;
    if first {
        say!("model in {}", args.out.display());
    }
    Ok(())
}
