//! `rldiff bench iteration`: samples per second of each stage of Algorithm 1.

use anyhow::Result;
use serde_json::json;

use super::median;
use crate::{
    cli::{config_args::ConfigArgs, device_args::DeviceArgs, numbers::whole, Failure, OrMistake},
    comm::{nccl, Communicator},
    config::Config,
    device::threads::use_threads,
    models::{architectures::Architecture, pipeline::Pipeline},
    run::{build_for, load_for_training},
    telemetry::{names, Metrics},
    train::Trainer,
};

/// Samples per second of each A100 in the paper: 128 of them take 12.1 h for 1,000 iterations of 2,048 samples.
const PAPER: f64 = 0.367;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Random weights of a published architecture in place of the config's model.
    #[arg(long, value_enum)]
    architecture: Option<Architecture>,
    /// Iterations that are not counted.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = whole::<u64>(0, 1_000_000))]
    warm_up: u64,
    /// Iterations that are.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = whole::<u64>(1, 1_000_000))]
    measured: u64,
    /// Print one JSON object with every measured value instead of a table.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    let config = args.config.load(comm).or_mistake()?;
    let device = args.device.choose(comm).or_mistake()?;
    let nccl = nccl::for_gradients(comm, device, config.run.patience()).or_mistake()?;
    let comm = nccl.as_ref().map_or(comm, |nccl| nccl);
    use_threads(config.run.threads, comm).or_mistake()?;
    let pipeline = match args.architecture {
        Some(architecture) => {
            Pipeline::seeded_with(architecture.files(), config.run.seed, device, build_for(&config)).or_mistake()?
        }
        None => load_for_training(&config, comm, device).or_mistake()?,
    };
    let mut trainer = Trainer::new(&config, comm, pipeline).or_mistake()?;
    let mut measured = Vec::new();
    for iteration in 0..args.warm_up + args.measured {
        let metrics = trainer.iterate(iteration, &mut |_, _, _, _| Ok(()))?;
        if iteration >= args.warm_up {
            measured.push(metrics);
        }
    }
    if comm.rank() == 0 {
        print(&config, comm.size(), &measured, args.json)?;
    }
    drop(trainer);
    if let Some(nccl) = nccl {
        nccl.close();
    }
    Ok(())
}

fn print(config: &Config, ranks: usize, measured: &[Metrics], as_json: bool) -> Result<()> {
    let samples: usize = config.trained_tasks().map(|(_, t)| t.samples).sum();
    let first = measured.first().expect("at least one iteration is measured");
    let seconds = first.iter().filter_map(|(name, _)| name.strip_prefix("seconds/").map(String::from));
    let stages: Vec<(String, Vec<f64>)> = seconds
        .map(|stage| {
            let name = format!("seconds/{stage}");
            (stage, measured.iter().filter_map(|m| m.get(&name)).collect())
        })
        .collect();
    let whole = median(measured.iter().filter_map(|m| m.get(names::SECONDS)).collect());
    let rate = samples as f64 / whole / ranks as f64;
    if as_json {
        let all: serde_json::Map<_, _> = stages.into_iter().map(|(stage, values)| (stage, json!(values))).collect();
        let threads = config.run.threads;
        let all = json!({
            "samples": samples, "ranks": ranks, "threads": threads, "seconds": all,
            "samples_per_second_and_rank": rate, "times_the_papers": rate / PAPER,
        });
        say!("{all}");
        return Ok(());
    }
    say!("{samples} samples per iteration, {ranks} ranks, {} threads each", config.run.threads);
    say!("{:<12} {:>10} {:>12}", "stage", "seconds", "samples/s");
    for (stage, values) in stages {
        let m = median(values);
        say!("{stage:<12} {m:>10.4} {:>12.1}", samples as f64 / m);
    }
    say!(
        "whole: {whole:.4} s, {rate:.3} samples/s per rank, {:.2} times the paper's {PAPER} per A100 (for its model and size)",
        rate / PAPER
    );
    Ok(())
}
