//! `rldiff study`: the paper's comparison as one command.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{anyhow, Context, Result};
use tch::Device;

use super::{check::against, check_report::Report, device_args::DeviceArgs, Failure, OrMistake, START_AGAIN};
use crate::{
    comm::{agree, nccl, Communicator, Local, Watched},
    config::{needs::Need, Config, StudyConfig},
    evaluation::Evaluation,
    faults,
    models::pipeline::Pipeline,
    run::{load_for_training, Ending},
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

pub fn run(args: Args, comm: &dyn Communicator) -> Result<ExitCode, Failure> {
    let watched = Watched::new(comm);
    let comm: &dyn Communicator = &watched;
    faults::install(comm.rank()).or_mistake()?;
    let plan = plan(&args, comm).or_mistake()?;
    let device = args.device.choose(comm).or_mistake()?;
    let nccl = nccl::for_gradients(comm, device, plan.members[0].config.run.patience()).or_mistake()?;
    let comm = nccl.as_ref().map_or(comm, |nccl| nccl);
    tch::set_num_threads(plan.members[0].config.run.threads as i32);
    // again: MPI may have taken some for itself
    signals::install()?;
    plan.try_out(comm, device).or_mistake()?;
    let ending = plan.train(comm, device)?;
    if ending == Ending::Complete {
        if comm.rank() == 0 {
            log::info!("evaluating {} models", plan.evaluation.models.len());
        }
        // nothing is lost by a signal from here on: what is judged is on disk
        signals::release()?;
        let results = plan.evaluate(comm, device)?;
        plan.report(comm, &results)?;
    }
    let first = comm.rank() == 0;
    if let Some(nccl) = nccl {
        nccl.close();
    }
    Ok(match ending {
        Ending::Complete => ExitCode::SUCCESS,
        Ending::Interrupted => {
            if first {
                log::info!("the same command goes on where the study is");
            }
            ExitCode::from(START_AGAIN)
        }
    })
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
    let base = plan.evaluation_of_base();
    if with_files {
        let all_here = plan.of_first_seed().fold(true, |here, member| {
            let of_run = |need: Need| need.of(&format!("run {}", member.name));
            let needs: Vec<Need> = member.config.needs().into_iter().map(of_run).collect();
            report.look_for(&needs) && here
        });
        if report.look_for(&base.needs()) && all_here {
            against_models(&plan, &mut report);
            report.keep(
                Evaluation::prepare(&base, &Local, Device::Cpu, &out).context("the study's evaluation").map(drop),
            );
        }
    }
    for member in &plan.members {
        let trained: Vec<&str> = member.config.trained_tasks().map(|(_, task)| task.name.as_str()).collect();
        let (method, iterations) = (member.config.method.name(), member.config.run.iterations);
        let value = format!("seed {}, {method} on {}, {iterations} iterations", member.seed, trained.join(", "));
        report.line(&format!("run {}", member.name), value);
    }
    for set in &plan.evaluation.sets {
        let value = format!("{} prompts, {} pictures each", set.count, set.images_per_prompt);
        report.line(&format!("set {}", set.name), value);
    }
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
