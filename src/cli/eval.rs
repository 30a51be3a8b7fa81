//! `rldiff eval`: models × prompt sets × metrics, with the same noise for all models.

use std::path::PathBuf;

use anyhow::{anyhow, Result};
use tch::Device;

use super::{check_report::Report, config_args::ConfigArgs, device_args::DeviceArgs, Failure, OrMistake};
use crate::{
    comm::{agree, Communicator, Local},
    config::{eval::is_evaluation, EvalConfig, EvalModel},
    device::{ranks_and_device, threads::use_threads},
    evaluation::{to_json, to_markdown, Evaluation},
    faults,
    folders::{can_be_file, outputs},
    signals,
    telemetry::write_atomic,
    user_file, CODE_VERSION,
};

/// CONFIG is an evaluation (tables eval, model, set), or a training experiment, whose tasks are then the sets.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// A model to score: `miniature`, a diffusers folder, a run's folder or a checkpoint. May be given several times, and
    /// takes the place of the config's models; the first is what the others are compared with.
    #[arg(long = "model", value_name = "DIR")]
    models: Vec<String>,
    /// Folder for the results; an evaluation that was cut off goes on there [default: runs/NAME].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Also write the figures to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    signals::listen(comm.rank())?;
    let _droppable = signals::droppable("leaving at the next denoising step; the pieces that are judged are kept");
    faults::install(comm.rank()).or_mistake()?;
    let mut config = load(&args.config, comm).or_mistake()?;
    if !args.models.is_empty() {
        config.models = args.models.iter().map(|path| EvalModel::at(path)).collect();
    }
    let replaceable = |path: &PathBuf| outputs::may_replace(path, outputs::is_json_with(&["model", "path", "sets"]));
    agree(comm, args.json.as_ref().filter(|_| comm.rank() == 0).map_or(Ok(()), replaceable)).or_mistake()?;
    let device = args.device.choose(comm).or_mistake()?;
    use_threads(config.eval.threads, comm).or_mistake()?;
    let out = args.out.unwrap_or_else(|| PathBuf::from("runs").join(&config.eval.name));
    let json = args.json.as_deref().filter(|_| comm.rank() == 0);
    agree(comm, json.map_or(Ok(()), can_be_file)).or_mistake()?;
    let evaluation = Evaluation::prepare(&config, comm, device, &out).or_mistake()?;
    if comm.rank() == 0 {
        let (models, sets) = (config.models.len(), config.sets.len());
        let on = ranks_and_device(comm, device);
        log::info!(
            "rldiff {}: {models} models on {sets} prompt sets on {on}; results in {}",
            CODE_VERSION,
            out.display()
        );
    }
    let results = evaluation.go(comm, device, &out)?;
    if comm.rank() == 0 {
        say!("{}results in {}", to_markdown(&results), out.display());
    }
    if let Some(path) = args.json {
        let written = || write_atomic(&path, &serde_json::to_vec_pretty(&to_json(&results))?);
        agree(comm, if comm.rank() == 0 { written() } else { Ok(()) })?;
    }
    Ok(())
}

/// Rank 0 reads; all ranks get the same config or the same error.
fn load(args: &ConfigArgs, comm: &dyn Communicator) -> Result<EvalConfig> {
    let mut message = Vec::new();
    if comm.rank() == 0 {
        let text = args.config.as_ref().and_then(|path| user_file::read_text(path).ok()).unwrap_or_default();
        let loaded = match (is_evaluation(&text), &args.config) {
            (true, Some(path)) => EvalConfig::load(path, &args.set).map(Some),
            _ => Ok(None),
        };
        message = serde_json::to_vec(&loaded.map_err(|e| format!("{e:#}")))?;
    }
    comm.broadcast_bytes(&mut message, 0)?;
    let loaded: Result<Option<EvalConfig>, String> = serde_json::from_slice(&message)?;
    match loaded.map_err(|e| anyhow!(e))? {
        Some(config) => Ok(config),
        None => EvalConfig::of_run(&args.load(comm)?),
    }
}

/// What `check` says of an evaluation; on one rank.
pub fn check(path: &std::path::Path, overrides: &[String], with_files: bool) -> Result<Report> {
    let config = EvalConfig::load(path, overrides)?;
    let mut report = Report::new(&config.eval.name, with_files);
    if with_files && report.look_for(&config.needs()) {
        let out = PathBuf::from("runs").join(&config.eval.name);
        report.keep(Evaluation::prepare(&config, &Local, Device::Cpu, &out).map(drop));
    }
    for model in &config.models {
        report.line(&format!("model {}", model.name), &model.path);
    }
    for set in &config.sets {
        report.line(&format!("set {}", set.name), set.summary());
    }
    Ok(report)
}
