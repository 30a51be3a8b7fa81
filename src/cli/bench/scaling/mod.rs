//! `rldiff bench scaling`: weak and strong scaling over ranks, measured, and predicted where it cannot be measured.
//!
//! Started on n ranks it writes what it measures to `DIR/ranks-n.json`; `--report DIR` compares what lies there with
//! the [`model`] and predicts the efficiency on more ranks. On GPUs sums go over NCCL beside the backward pass; what is left
//! of them, and what they had to hide in, lie between events. Ranks on one node and on several (1, 8 and 16, say) give both
//! ways of the [`network`].

mod fitted;
mod measurement;
mod model;
mod network;
mod prediction;
mod report;
mod sums;

use std::path::PathBuf;

use super::{ConfigArgs, Failure, OrMistake};
use crate::{
    cannot_write::make_folder,
    cli::{device_args::DeviceArgs, numbers::whole},
    comm::{agree, nccl, Communicator},
    device::threads::use_threads,
    folders::{can_be_folder, outputs},
    run::load_for_training,
    streams,
    telemetry::write_atomic,
};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Folder for the measurement of this number of ranks.
    #[arg(long, value_name = "DIR", required_unless_present = "report")]
    out: Option<PathBuf>,
    /// Lanes of every rank where the batch grows with the ranks (weak scaling).
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    lanes_per_rank: u16,
    /// Iterations that are not counted.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = whole::<u64>(0, 1_000_000))]
    warm_up: u64,
    /// Iterations that are.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = whole::<u64>(1, 1_000_000))]
    measured: u64,
    /// Measure nothing: print table and prediction from the measurements in this folder, and draw them there.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["out", "config", "set"])]
    report: Option<PathBuf>,
    #[command(flatten)]
    machine: report::Machine,
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    if let Some(folder) = &args.report {
        let text = if comm.rank() == 0 { report::write(folder, &args.machine).map(Some) } else { Ok(None) };
        if let Some(text) = text.or_mistake()? {
            streams::print(format_args!("{text}"));
        }
        return Ok(());
    }
    let folder = args.out.expect("clap demands it");
    let config = args.config.load(comm).or_mistake()?;
    let device = args.device.choose(comm).or_mistake()?;
    use_threads(config.run.threads, comm).or_mistake()?;
    let plan = measurement::Plan {
        lanes_per_rank: usize::from(args.lanes_per_rank),
        warm_up: args.warm_up,
        measured: args.measured,
    };
    let path = folder.join(format!("ranks-{:04}.json", comm.size()));
    let check = || {
        can_be_folder(&folder)?;
        outputs::may_replace(&path, outputs::is_json_with(&["ranks", "weak", "gradient_bytes"]))
    };
    agree(comm, if comm.rank() == 0 { check() } else { Ok(()) }).or_mistake()?;
    let pipeline = load_for_training(&config, comm, device).or_mistake()?;
    measurement::ensure_feasible(&pipeline).or_mistake()?;
    let nccl = nccl::for_gradients(comm, device, config.nccl_terms()).or_mistake()?;
    let measured = measurement::measure(&config, plan, nccl.as_ref().map_or(comm, |nccl| nccl), pipeline)?;
    if let Some(nccl) = nccl {
        nccl.close();
    }
    let write = || {
        make_folder(&folder)?;
        write_atomic(&path, &serde_json::to_vec_pretty(&measured)?)?;
        say!("{}", report::one_line(&measured));
        Ok(())
    };
    agree(comm, if comm.rank() == 0 { write() } else { Ok(()) })?;
    Ok(())
}
