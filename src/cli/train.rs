//! `rldiff [train]`: fine-tuning.

use std::{path::PathBuf, time::Duration};

use tch::Device;

use super::{config_args::ConfigArgs, device_args::DeviceArgs, Failure, OrMistake};
use crate::{
    comm::{nccl, Communicator, Watched},
    config::Config,
    device::{numerics, ranks_and_device, threads::use_threads},
    faults,
    run::{Resume, Run},
    signals, start_up,
    telemetry::RunFiles,
};

/// A start that takes longer is worth a line that says where the time went.
const SLOW: Duration = Duration::from_secs(5);

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Folder for the results [default: runs/NAME].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on from a checkpoint: `auto` takes the newest of the results' folder (and begins anew where there is none),
    /// a path names a run or a checkpoint.
    #[arg(long, value_name = "auto|DIR")]
    resume: Option<String>,
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    signals::listen(comm.rank())?;
    let _droppable =
        signals::droppable("leaving before the next part of the loading; this start has trained nothing yet");
    let watched = Watched::new(comm);
    let comm: &dyn Communicator = &watched;
    faults::install(comm.rank()).or_mistake()?;
    let config = start_up::phase("config", || args.config.load(comm)).or_mistake()?;
    let files = RunFiles::new(args.out.unwrap_or_else(|| PathBuf::from("runs").join(&config.run.name)));
    let resume = match args.resume.as_deref() {
        None => Resume::No,
        Some("auto") => Resume::Auto,
        Some(path) => Resume::From(path.into()),
    };
    // before NCCL starts
    numerics::set_deterministic(config.run.deterministic);
    let device = start_up::phase("device", || args.device.choose(comm)).or_mistake()?;
    let nccl = nccl::for_gradients(comm, device, config.nccl_terms()).or_mistake()?;
    let comm = nccl.as_ref().map_or(comm, |nccl| nccl);
    use_threads(config.run.threads, comm).or_mistake()?;
    let ended = train(&args.config, &config, comm, device, files, &resume);
    if let (Some(nccl), Ok(()) | Err(Failure::Interrupted)) = (nccl, &ended) {
        nccl.close();
    }
    ended
}

fn train(
    from: &ConfigArgs,
    config: &Config,
    comm: &dyn Communicator,
    device: Device,
    files: RunFiles,
    resume: &Resume,
) -> Result<(), Failure> {
    let run = Run::prepare(config, comm, device, files.clone(), resume).or_mistake()?;
    if comm.rank() == 0 {
        let what = from.experiment(comm.size());
        let (version, root) = (crate::CODE_VERSION, files.root().display());
        let on = ranks_and_device(comm, device);
        log::info!("rldiff {version}: {what} on {on}; results in {root}");
        if start_up::age().is_some_and(|age| age >= SLOW) {
            log::info!("ready after {}", start_up::in_words());
        }
    }
    Ok(run.go()?)
}
