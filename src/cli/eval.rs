//! `rldiff eval`: rewards of models on held-out prompts, with the same noise for all of them.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;
use tch::Device;

use super::{config_args::ConfigArgs, device_args::DeviceArgs, Failure, OrMistake};
use crate::{
    comm::{agree, Communicator},
    diffusion::schedule::Schedule,
    evaluate::evaluate,
    models::{folder::ModelFiles, pipeline::Pipeline},
    run::{load_model, model_location},
    task::Task,
    telemetry::{write_atomic, Estimate},
};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// A model to score: `embedded`, a diffusers folder, or a run's folder. May be given several times; the first is
    /// what the others are compared with [default: the config's model].
    #[arg(long = "model", value_name = "DIR")]
    models: Vec<String>,
    /// Also write the figures to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    let config = args.config.load(comm).or_mistake()?;
    let models = if args.models.is_empty() { vec![config.model.path.clone()] } else { args.models };
    let device = args.device.choose(comm).or_mistake()?;
    tch::set_num_threads(config.run.threads as i32);
    // every model is tried before the first one is scored
    for name in models.iter().skip(1) {
        let tried =
            || ModelFiles::read(&model_location(name)).and_then(|files| Pipeline::from_files(files, Device::Cpu));
        agree(comm, if comm.rank() == 0 { tried().map(drop) } else { Ok(()) }).or_mistake()?;
    }
    let mut tasks = Task::all(&config, device, comm).or_mistake()?;

    let mut results = Vec::new();
    for name in &models {
        let model = load_model(name, comm, device).or_mistake()?;
        let schedule = Schedule::of_model(&model.scheduler);
        let steps = schedule.and_then(|s| s.steps(config.rollout.steps, config.rollout.eta)).or_mistake()?;
        let tasks = evaluate(&config, &model, &steps, &mut tasks, comm, &|| Ok(false))?;
        let tasks = tasks.expect("nothing stops it");
        if comm.rank() == 0 {
            println!("{name}");
            for (i, task) in tasks.iter().enumerate() {
                let e = Estimate::of(&task.units);
                let against = results.first().map(|first: &Vec<Vec<f64>>| {
                    let differences: Vec<f64> = task.units.iter().zip(&first[i]).map(|(a, b)| a - b).collect();
                    let d = Estimate::of(&differences);
                    format!("  difference to the first {:+.4} ± {:.4}", d.mean, d.stderr)
                });
                println!("  {:<16} {:.4} ± {:.4}{}", task.task, e.mean, e.stderr, against.unwrap_or_default());
            }
        }
        results.push(tasks.into_iter().map(|t| t.units).collect());
    }
    if let Some(path) = args.json {
        let entry = |(name, units): (&String, &Vec<Vec<f64>>)| {
            let tasks = config.tasks.iter().zip(units).map(|(task, units)| {
                let e = Estimate::of(units);
                json!({"name": task.name, "mean": e.mean, "stderr": e.stderr, "values": units})
            });
            json!({"model": name, "tasks": tasks.collect::<Vec<_>>()})
        };
        let all: Vec<_> = models.iter().zip(&results).map(entry).collect();
        let written = || write_atomic(&path, &serde_json::to_vec_pretty(&all)?);
        agree(comm, if comm.rank() == 0 { written() } else { Ok(()) })?;
    }
    Ok(())
}
