//! `rldiff encode`: a config's pretraining pairs through its model's VAE and text encoder, once.

use std::path::PathBuf;

use anyhow::bail;
use clap::ValueEnum;

use super::{config_args::ConfigArgs, device_args::DeviceArgs, numbers::whole, Failure, OrMistake};
use crate::{
    comm::Communicator,
    config::PairData,
    device::threads::use_threads,
    faults,
    folders::{can_take, FolderLock},
    pairs::{encode, EncodeSettings},
    run::load_model,
    signals,
};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Folder for the shards, which pretrain.data = { source = "encoded", folder = … } then names. Shards that are there
    /// already are kept, so that an interrupted command goes on.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Pairs per shard.
    #[arg(long, default_value_t = 1024, value_name = "N", value_parser = whole::<usize>(1, 16_777_216))]
    per_shard: usize,
    /// Number type of latents and embeddings.
    #[arg(long, value_enum, default_value_t = Precision::F16)]
    precision: Precision,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Precision {
    F16,
    F32,
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    signals::listen(comm.rank())?;
    let _droppable = signals::droppable("leaving at the next batch of pairs; the shards that are whole are kept");
    faults::install(comm.rank()).or_mistake()?;
    let config = args.config.load(comm).or_mistake()?;
    let pairs = || match &config.pretrain.data {
        PairData::Webdataset(settings) => Ok(settings),
        _ => bail!("pretrain.data must have source = \"webdataset\": that is what encode reads"),
    };
    let pairs = pairs().or_mistake()?;
    let check = || can_take(&args.out, |name| name.starts_with("pairs-") && name.ends_with(".h5"));
    let _lock = FolderLock::hold(comm, &args.out, "encode", check).or_mistake()?;
    let device = args.device.choose(comm).or_mistake()?;
    use_threads(config.run.threads, comm).or_mistake()?;
    let pipeline = load_model(&config.model.path, comm, device).or_mistake()?;
    let settings = EncodeSettings { per_shard: args.per_shard, half: args.precision == Precision::F16 };
    let made = encode(&pipeline, pairs, &args.out, settings, comm).or_mistake()?;
    if comm.rank() == 0 {
        say!("{made} shards written to {}", args.out.display());
    }
    Ok(())
}
