//! `rldiff study`: the paper's comparison as one command.

use std::path::PathBuf;

use anyhow::{anyhow, Result};
use tch::Device;

use super::{device_args::DeviceArgs, Failure, OrMistake};
use crate::{
    comm::{agree, nccl, Communicator, Watched},
    config::StudyConfig,
    device::threads::use_threads,
    faults,
    folders::FolderLock,
    signals,
    study::Plan,
};

#[derive(clap::Args)]
pub struct Args {
    /// The study (tables study, quick, run).
    config: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
    /// Folder for the results; a study that was cut off goes on there [default: runs/NAME].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// With the few iterations and prompts of the table quick: shows that everything works, says nothing about the methods.
    #[arg(long)]
    quick: bool,
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    signals::listen(comm.rank())?;
    let _droppable = signals::droppable("leaving at the next step; what is done is kept");
    let watched = Watched::new(comm);
    let comm: &dyn Communicator = &watched;
    faults::install(comm.rank()).or_mistake()?;
    let plan = plan(&args, comm).or_mistake()?;
    let _lock = FolderLock::hold(comm, &plan.out, "study", || plan.check_place()).or_mistake()?;
    let device = args.device.choose(comm).or_mistake()?;
    let nccl = nccl::for_gradients(comm, device, plan.members[0].config.run.patience()).or_mistake()?;
    let comm = nccl.as_ref().map_or(comm, |nccl| nccl);
    use_threads(plan.members[0].config.run.threads, comm).or_mistake()?;
    let ended = go(&plan, comm, device);
    if let (Some(nccl), Ok(()) | Err(Failure::Interrupted)) = (nccl, &ended) {
        nccl.close();
    }
    ended
}

fn go(plan: &Plan, comm: &dyn Communicator, device: Device) -> Result<(), Failure> {
    plan.try_out(comm, device).or_mistake()?;
    plan.train(comm, device)?;
    if comm.rank() == 0 {
        log::info!("evaluating {} models", plan.evaluation.models.len());
    }
    let results = plan.evaluate(comm, device)?;
    Ok(plan.report(comm, &results)?)
}

/// Every rank reads; what only some find is an error on all.
fn plan(args: &Args, comm: &dyn Communicator) -> Result<Plan> {
    let read = || {
        let config = StudyConfig::load(&args.config)?;
        let out = args.out.clone().unwrap_or_else(|| PathBuf::from("runs").join(&config.study.name));
        Plan::new(config, out, args.quick)
    };
    let plan = read();
    let text = plan.as_ref().err().map(|e| format!("{e:#}"));
    agree(comm, if comm.rank() == 0 { text.as_ref().map_or(Ok(()), |t| Err(anyhow!("{t}"))) } else { Ok(()) })
        .map_err(|e| text.map_or(e, |t| anyhow!("{t}")))?;
    plan
}

/// What `check` says of a study.
pub fn check(path: &std::path::Path) -> Result<String> {
    let plan = Plan::new(StudyConfig::load(path)?, PathBuf::from("runs"), false)?;
    Plan::new(plan.config.clone(), PathBuf::from("runs"), true)?;
    let mut lines = vec![format!("config                     {} is sound", plan.config.study.name)];
    for member in &plan.members {
        let trained: Vec<&str> = member.config.trained_tasks().map(|(_, task)| task.name.as_str()).collect();
        let (method, iterations) = (member.config.method.name(), member.config.run.iterations);
        lines.push(format!(
            "run {:<22} seed {}, {method} on {}, {iterations} iterations",
            member.name,
            member.seed,
            trained.join(", ")
        ));
    }
    for set in &plan.evaluation.sets {
        lines.push(format!("set {:<22} {} prompts, {} pictures each", set.name, set.count, set.images_per_prompt));
    }
    Ok(lines.join("\n"))
}
