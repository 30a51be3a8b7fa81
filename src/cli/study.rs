//! `rldiff study`: the paper's comparison as one command.

use std::path::{Path, PathBuf};

use anyhow::{anyhow, Context, Result};
use tch::Device;

use super::{check::against, check_report::Report, device_args::DeviceArgs, Failure, OrMistake};
use crate::{
    comm::{agree, nccl, Communicator, Local, Watched},
    config::{needs::Need, Config, StopCriterion, StudyConfig},
    device::{ranks_and_device, threads::use_threads},
    evaluation::Evaluation,
    faults,
    folders::FolderLock,
    models::pipeline::Pipeline,
    run::load_for_training,
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
    if comm.rank() == 0 {
        plan.lacks.iter().for_each(|lack| log::warn!("{lack}"));
    }
    let device = args.device.choose(comm).or_mistake()?;
    let nccl = nccl::for_gradients(comm, device, plan.members[0].config.nccl_terms()).or_mistake()?;
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
    if comm.rank() == 0 {
        let (version, out) = (crate::CODE_VERSION, plan.out.display());
        log::info!("rldiff {version}: a study on {}; results in {out}", ranks_and_device(comm, device));
    }
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

/// What `check` says of a study; on one rank.
pub fn check(path: &Path, with_files: bool) -> Result<Report> {
    let config = StudyConfig::load(path)?;
    let out = PathBuf::from("runs").join(&config.study.name);
    let plan = Plan::new(config, out.clone(), false)?;
    Plan::new(plan.config.clone(), out.clone(), true)?;
    let mut report = Report::new(&plan.config.study.name, with_files);
    let before = plan.evaluation_before_training();
    if with_files {
        let all_here = plan.of_first_seed().fold(true, |here, member| {
            let of_run = |need: Need| need.of(&format!("run {}", member.name));
            let needs: Vec<Need> = member.config.needs().into_iter().map(of_run).collect();
            report.look_for(&needs) && here
        });
        if report.look_for(&before.needs()) && all_here {
            against_models(&plan, &mut report);
            report.keep(
                Evaluation::prepare(&before, &Local, Device::Cpu, &out)
                    .and_then(|evaluation| evaluation.hold_against(&plan.trained_on(), &Local))
                    .context("the study's evaluation"),
            );
        }
    }
    for member in &plan.members {
        let trained: Vec<&str> = member.config.trained_tasks().map(|(_, task)| task.name.as_str()).collect();
        let stop = member.config.stop.as_ref().filter(|stop| stop.criterion != StopCriterion::None);
        let at_most = if stop.is_some() { "at most " } else { "" };
        let (method, iterations) = (member.config.method.name(), member.config.run.iterations);
        let value =
            format!("seed {}, {method} on {}, {at_most}{iterations} iterations", member.seed, trained.join(", "));
        report.line(&format!("run {}", member.name), value);
    }
    for model in &plan.config.models {
        report.line(&format!("model {}", model.name), &model.path);
    }
    for set in &plan.evaluation.sets {
        report.line(&format!("set {}", set.name), set.summary());
    }
    plan.lacks.iter().for_each(|lack| report.line("tables", lack));
    Ok(report)
}

/// Every run against the model, which is loaded again only where a run builds it in another way.
fn against_models(plan: &Plan, report: &mut Report) {
    let mut loaded: Option<(&Config, Pipeline)> = None;
    for member in plan.of_first_seed() {
        let config = &member.config;
        let same = |(other, _): &(&Config, Pipeline)| other.model == config.model && other.lora == config.lora;
        if !loaded.as_ref().is_some_and(same) {
            let pipeline =
                load_for_training(config, &Local, Device::Cpu).with_context(|| format!("run {}", member.name));
            loaded = report.keep(pipeline).map(|pipeline| (config, pipeline));
        }
        if let Some((_, pipeline)) = &loaded {
            against(config, pipeline, report, &format!("run {}", member.name));
        }
    }
}
