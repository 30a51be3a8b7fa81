//! `rldiff [train]`: fine-tuning.

use std::{path::PathBuf, process::ExitCode};

use tch::Device;

use super::{config_args::ConfigArgs, device_args::DeviceArgs, Failure, OrMistake, START_AGAIN};
use crate::{
    comm::{nccl, Communicator, Watched},
    device::threads::use_threads,
    faults,
    run::{Ending, Resume, Run},
    signals,
    telemetry::RunFiles,
};

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

pub fn run(args: Args, comm: &dyn Communicator) -> Result<ExitCode, Failure> {
    let watched = Watched::new(comm);
    let comm: &dyn Communicator = &watched;
    faults::install(comm.rank()).or_mistake()?;
    let config = args.config.load(comm).or_mistake()?;
    let files = RunFiles::new(args.out.unwrap_or_else(|| PathBuf::from("runs").join(&config.run.name)));
    let resume = match args.resume.as_deref() {
        None => Resume::No,
        Some("auto") => Resume::Auto,
        Some(path) => Resume::From(path.into()),
    };
    let device = args.device.choose(comm).or_mistake()?;
    let nccl = nccl::for_gradients(comm, device, config.run.patience()).or_mistake()?;
    let comm = nccl.as_ref().map_or(comm, |nccl| nccl);
    use_threads(config.run.threads, comm).or_mistake()?;
    // again: MPI may have taken some for itself
    signals::install()?;
    let run = Run::prepare(&config, comm, device, files.clone(), &resume).or_mistake()?;
    if comm.rank() == 0 {
        let what = match &args.config.config {
            Some(path) => path.display().to_string(),
            None => "the embedded joint experiment (no CONFIG was given)".to_string(),
        };
        let ranks = if comm.size() == 1 { "1 rank".to_string() } else { format!("{} ranks", comm.size()) };
        let (version, root) = (crate::CODE_VERSION, files.root().display());
        let with = if device == Device::Cpu { "" } else { " with a GPU each" };
        log::info!("rldiff {version}: {what} on {ranks}{with}, results in {root}");
    }
    let ending = run.go()?;
    let first = comm.rank() == 0;
    if let Some(nccl) = nccl {
        nccl.close();
    }
    Ok(match ending {
        Ending::Complete => ExitCode::SUCCESS,
        Ending::Interrupted => {
            if first {
                log::info!("go on with --resume auto");
            }
            ExitCode::from(START_AGAIN)
        }
    })
}
