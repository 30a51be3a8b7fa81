//! `rldiff bench iteration`: samples per second of each stage of Algorithm 1.

use anyhow::Result;
use serde_json::json;
use tch::Device;

use super::{libtorch, median, rates};
use crate::{
    cli::{config_args::ConfigArgs, device_args::DeviceArgs, numbers::whole, Failure, OrMistake},
    comm::{nccl, Communicator},
    config::{Config, MethodConfig, PretrainMode},
    device::threads::use_threads,
    models::{architectures::Architecture, pipeline::Pipeline},
    run::{build_for, load_for_training},
    telemetry::{names, Metrics},
    train::Trainer,
};

/// Samples per second of each A100 in the paper: 128 of them take 12.1 h for 1,000 iterations of 2,048 samples.
const PAPER: f64 = 0.367;
/// Scalars of its U-Net, Stable Diffusion 2-base's.
const PAPERS_PARAMETERS: u64 = 865_910_724;
/// Rewards that it trains on.
const PAPERS_REWARDS: [&str; 3] = ["image_reward", "parity", "composition"];

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
    let nccl = nccl::for_gradients(comm, device, config.nccl_terms()).or_mistake()?;
    let comm = nccl.as_ref().map_or(comm, |nccl| nccl);
    use_threads(config.run.threads, comm).or_mistake()?;
    let pipeline = match args.architecture {
        Some(architecture) => {
            Pipeline::seeded_with(architecture.files(), config.run.seed, device, build_for(&config)).or_mistake()?
        }
        None => load_for_training(&config, comm, device).or_mistake()?,
    };
    let mut trainer = Trainer::new(&config, comm, pipeline).or_mistake()?;
    let (mut measured, mut warm_up) = (Vec::new(), Vec::new());
    for iteration in 0..args.warm_up + args.measured {
        let metrics = trainer.iterate(iteration, &mut |_, _, _, _| Ok(()))?;
        if iteration < args.warm_up { &mut warm_up } else { &mut measured }.push(metrics);
    }
    if comm.rank() == 0 {
        let parameters = trainer.pipeline.unet_parameters.count();
        let seen = Seen { config: &config, ranks: comm.size(), device, parameters, warm_up, measured };
        seen.print(args.json)?;
    }
    drop(trainer);
    if let Some(nccl) = nccl {
        nccl.close();
    }
    Ok(())
}

/// What was measured, and of what.
struct Seen<'a> {
    config: &'a Config,
    ranks: usize,
    device: Device,
    /// Scalars of the U-Net.
    parameters: u64,
    warm_up: Vec<Metrics>,
    measured: Vec<Metrics>,
}

impl Seen<'_> {
    fn print(&self, as_json: bool) -> Result<()> {
        let Seen { config, ranks, measured, .. } = self;
        let samples: usize = config.trained_tasks().map(|(_, t)| t.samples).sum();
        let first = measured.first().expect("at least one iteration is measured");
        let stages: Vec<(String, Vec<f64>)> = first
            .iter()
            .filter_map(|(name, _)| Some((name.strip_prefix("seconds/")?.to_string(), name.to_string())))
            .map(|(stage, name)| (stage, measured.iter().filter_map(|m| m.get(&name)).collect()))
            .collect();
        let seconds = |of: &[Metrics]| of.iter().filter_map(|m| m.get(names::SECONDS)).collect::<Vec<f64>>();
        let whole = median(seconds(measured));
        let rate = samples as f64 / whole / *ranks as f64;
        let leaves_out = leaves_out(config, self.parameters, *ranks);
        let gpu = rates::gpu(self.device)?.map(|gpu| gpu.0);
        let memory = libtorch::memory(self.device)?;
        let warm_up = seconds(&self.warm_up);
        if as_json {
            let all: serde_json::Map<_, _> = stages.into_iter().map(|(stage, values)| (stage, json!(values))).collect();
            let all = json!({
                "what": "iteration", "device": format!("{:?}", self.device), "gpu": gpu, "samples": samples,
                "ranks": ranks, "threads": config.run.threads, "seconds": all, "median_seconds": whole,
                "warm_up_seconds": warm_up, "samples_per_second_and_rank": rate, "memory": memory,
                "times_the_papers": leaves_out.as_ref().map(|_| rate / PAPER), "leaves_out": leaves_out,
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
        let first = warm_up.first().map_or(String::new(), |first| format!(", the first iteration {first:.4} s"));
        say!("whole: {whole:.4} s, {rate:.3} samples/s per rank{first}");
        if let Some(leaves_out) = leaves_out {
            let without = match leaves_out.is_empty() {
                true => String::new(),
                false => format!(", which include what is left out here: {}", leaves_out.join(", ")),
            };
            say!("{:.2} times the paper's {PAPER} per A100{without}", rate / PAPER);
        }
        say!("{}", libtorch::describe(&memory));
        Ok(())
    }
}

/// What the paper's iteration has and this one does not; None where they are not of one size and cannot be compared:
/// another network, other numbers of steps or timesteps, other samples per rank, another method.
fn leaves_out(config: &Config, parameters: u64, ranks: usize) -> Option<Vec<String>> {
    let MethodConfig::Ours(method) = &config.method else { return None };
    let same = parameters == PAPERS_PARAMETERS
        && config.rollout.steps == 50
        && method.timesteps == 5
        && config.trained_tasks().all(|(_, task)| task.samples == 16 * ranks);
    same.then(|| {
        let rewards = config.trained_tasks().map(|(_, task)| task.reward.name().unwrap_or_default());
        let mut others: Vec<_> = rewards.filter(|name| !PAPERS_REWARDS.contains(&name.as_str())).collect();
        others.dedup();
        let rewards = (!others.is_empty()).then(|| format!("its reward (here {})", others.join(", ")));
        let pretrain = (config.pretrain.mode == PretrainMode::Off).then(|| "its pretraining step".to_string());
        rewards.into_iter().chain(pretrain).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load;

    #[test]
    fn the_papers_rate_is_named_only_beside_its_own_work_and_with_what_is_left_out() {
        let config = |settings: &[&str]| {
            let settings: Vec<String> = settings.iter().map(|s| s.to_string()).collect();
            load::parse(include_str!("../../../slurm/preference.toml"), "preference", &settings).unwrap()
        };
        let same = leaves_out(&config(&[]), PAPERS_PARAMETERS, 128).expect("the paper's size");
        assert_eq!(same, Vec::<String>::new());
        let judged = "task.preference.reward={ name = \"jpeg_compressibility\" }";
        let partly = config(&[judged, "pretrain.mode=\"off\"", "run.lanes=1", "task.preference.samples=16"]);
        let partly = leaves_out(&partly, PAPERS_PARAMETERS, 1).expect("the paper's size");
        assert_eq!(partly, ["its reward (here jpeg_compressibility)", "its pretraining step"]);
        assert_eq!(leaves_out(&config(&[]), 1_000_000, 128), None, "the miniature");
        assert_eq!(leaves_out(&config(&[]), PAPERS_PARAMETERS, 64), None, "32 samples per GPU");
        assert_eq!(leaves_out(&config(&["rollout.steps=20"]), PAPERS_PARAMETERS, 128), None);
    }
}
