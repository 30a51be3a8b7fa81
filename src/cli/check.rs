//! `rldiff check`: is this config sound, and what follows from it?

use std::path::Path;

use anyhow::{anyhow, Context, Result};
use tch::Device;

use super::{config_args::ConfigArgs, eval, study, Failure, OrMistake};
use crate::{
    comm::{same_tree, Communicator, Local},
    config::{eval::is_evaluation, study::is_study, Config},
    diffusion::schedule::Schedule,
    methods,
    models::{architectures::Architecture, pipeline::Pipeline},
    pairs,
    policy::lanes::divisors,
    prompts::Split,
    run::{build_for, footprint, load_for_training, model_location},
    task::Task,
    user_file,
};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Take the sizes from this published architecture instead of the config's model. It is what a check does by
    /// itself, for sd2-base, where the model's folder is not on this machine.
    #[arg(long, value_enum)]
    architecture: Option<Architecture>,
    /// Memory of a GPU in GB (10⁹ bytes): does a rank fit?
    #[arg(long, default_value_t = 80.0, value_name = "GB")]
    gpu_memory: f64,
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    // evaluations and studies are another kind of config
    let text = args.config.config.as_ref().and_then(|path| user_file::read_text(path).ok()).unwrap_or_default();
    let of_other_kind = match &args.config.config {
        Some(path) if is_evaluation(&text) => Some(eval::check(path, &args.config.set)),
        Some(path) if is_study(&text) => Some(match args.config.set.is_empty() {
            true => study::check(path),
            false => Err(anyhow!("--set changes runs and evaluations, {} is a study", path.display())),
        }),
        _ => None,
    };
    if let Some(described) = of_other_kind {
        let described = described.or_mistake()?;
        if comm.rank() == 0 {
            say!("{described}");
        }
        return Ok(());
    }
    let config = args.config.load(comm).or_mistake()?;
    if comm.rank() == 0 {
        say!("{}", describe(&config, &args).or_mistake()?);
    }
    Ok(())
}

fn describe(config: &Config, args: &Args) -> Result<String> {
    let derived = config.validate()?;
    let mut report = Report::default();
    report.line("config", format!("{} is sound", config.run.name));
    let Sizes { pipeline, model, planning } = sizes(config, args.architecture)?;
    report.line("model", model);
    let schedule = Schedule::of_model(&pipeline.scheduler)?;
    let steps = schedule.steps(config.rollout.steps, config.rollout.eta)?;
    methods::check_steps(config, &steps)?;
    report.line("method", config.method.name().to_string());
    report.line(
        "parameters",
        format!(
            "U-Net {}, text encoder {}, VAE {}; {} trained",
            pipeline.unet_parameters.count(),
            pipeline.text_parameters.count(),
            pipeline.vae_parameters.count(),
            pipeline.trainable().count()
        ),
    );

    let mut of_rewards = 0;
    for (index, task) in config.tasks.iter().enumerate() {
        let use_ = match task.train {
            true => format!(
                "{} samples per iteration, {} per lane, {} prompts",
                task.samples,
                task.samples / config.run.lanes,
                task.samples / task.images_per_prompt
            ),
            false => "evaluated only".to_string(),
        };
        let what = match Task::new(task, index, config.run.seed, Device::Cpu, &Local) {
            Ok(mut task) => {
                if task.config.train {
                    methods::check_reward(config, &mut task)?;
                }
                task.warn_of_cut_prompts(&pipeline)?;
                of_rewards += task.reward.weight_bytes();
                let (train, held_out) = (task.prompts.len(Split::Train), task.prompts.len(Split::HeldOut));
                format!("{train} prompts to train on, {held_out} held out")
            }
            // a plan for another machine, which has what is not here
            Err(e) if planning => format!("not on this machine: {e:#}"),
            Err(e) => return Err(e),
        };
        report.line(
            &format!("task {}", task.name),
            format!("{use_}; {} evaluation samples; {what}", task.evaluation_samples),
        );
    }
    let pairs = match pairs::try_out(config, &pipeline) {
        Ok(pairs) => pairs,
        Err(e) if planning => format!("not on this machine: {e:#}"),
        Err(e) => return Err(e),
    };
    report.line("pretraining pairs", pairs);
    report.line("samples per iteration", derived.samples_per_iteration.to_string());
    let optimizer_steps = derived.optimizer_steps_per_iteration;
    let in_all = optimizer_steps as u64 * config.run.iterations;
    report.line("optimizer steps", format!("{optimizer_steps} per iteration, {in_all} in all"));
    let steps: Vec<String> = steps.iter().map(|s| format!("{} ({:.1})", s.t, s.sensitivity())).collect();
    report.line("timesteps (sensitivity)", steps.join(", "));
    report.line("numbers of ranks", ranks(config.run.lanes));
    footprint_lines(config, &pipeline, of_rewards, args.gpu_memory, &mut report)?;
    Ok(report.lines.join("\n"))
}

#[derive(Default)]
struct Report {
    lines: Vec<String>,
}

impl Report {
    fn line(&mut self, name: &str, value: String) {
        self.lines.push(format!("{name:<26} {value}"));
    }
}

/// What the figures are of.
struct Sizes {
    pipeline: Pipeline,
    model: String,
    /// The model is not on this machine, so other files and programs of the run may be missing too.
    planning: bool,
}

/// The config's model, or an architecture without weights.
fn sizes(config: &Config, architecture: Option<Architecture>) -> Result<Sizes> {
    let path = &config.model.path;
    let missing = path != "embedded" && !Path::new(path).exists();
    let Some(architecture) = architecture.or(missing.then_some(Architecture::Sd2Base)) else {
        let model = model_location(path).origin()?;
        let pipeline = load_for_training(config, &Local, Device::Cpu)?;
        return Ok(Sizes { pipeline, model, planning: false });
    };
    let pipeline = Pipeline::shapes_only(architecture.files(), Device::Cpu, build_for(config))
        .with_context(|| format!("--architecture {architecture}"))?;
    let why = if missing { format!("{path} is not on this machine; ") } else { String::new() };
    let model = format!("{why}sizes are those of {architecture}, without weights");
    Ok(Sizes { pipeline, model, planning: missing })
}

/// Numbers of ranks that share the lanes evenly, those that give the bits of one rank first.
fn ranks(lanes: usize) -> String {
    let list = |same: bool| -> Vec<String> {
        divisors(lanes).filter(|&ranks| same_tree(lanes, ranks) == same).map(|ranks| ranks.to_string()).collect()
    };
    match list(false).join(", ") {
        others if others.is_empty() => list(true).join(", "),
        others => format!("{} (same bits); {others} (other last bits)", list(true).join(", ")),
    }
}

/// `of_rewards` bytes are the weights of the rewards' networks that could be loaded here.
fn footprint_lines(
    config: &Config,
    pipeline: &Pipeline,
    of_rewards: u64,
    gpu_memory: f64,
    report: &mut Report,
) -> Result<()> {
    let cost = footprint::measure(pipeline.architecture(), config)?;
    let flop = |value: f64| si(value, "FLOP");
    report.line(
        "networks",
        format!(
            "U-Net forward {}, VAE decode {}, text encoder {}",
            flop(cost.unet_flops),
            flop(cost.decode_flops),
            flop(cost.text_flops)
        ),
    );
    let iteration = footprint::iteration_flops(config, &cost);
    let samples = config.validate()?.samples_per_iteration as f64;
    report.line("an iteration", format!("{}, {} per sample", flop(iteration), flop(iteration / samples)));

    let bytes = |value: u64| si(value as f64, "B");
    let m = footprint::memory(config, pipeline, &cost, 1);
    report.line("weights", bytes(m.weights));
    if of_rewards > 0 {
        report.line("weights of rewards", bytes(of_rewards));
    }
    report.line("optimizer", bytes(m.optimizer));
    report.line("gradients", bytes(m.gradients));
    let checkpointing = if config.model.gradient_checkpointing { "with" } else { "without" };
    report.line(
        "activations per lane",
        format!("update {} ({checkpointing} gradient checkpointing), roll-out {}", bytes(m.update), bytes(m.rollout)),
    );
    for (name, lanes) in [("one lane per rank", 1), ("all lanes on one rank", config.run.lanes)] {
        let total = footprint::memory(config, pipeline, &cost, lanes).total() + of_rewards;
        let fits = if total as f64 <= gpu_memory * 1e9 { "fits" } else { "does not fit" };
        report.line(name, format!("{} of memory: {fits} in {}", bytes(total), si(gpu_memory * 1e9, "B")));
    }
    Ok(())
}

/// A number with four digits and the prefix of its size.
fn si(value: f64, unit: &str) -> String {
    let prefixes = ["", "k", "M", "G", "T", "P", "E"];
    let power = (value.abs().max(1.0).log10() / 3.0).floor().min(6.0) as usize;
    let scaled = value / 1000f64.powi(power as i32);
    let digits = if power == 0 { 0 } else { 3 - scaled.abs().max(1.0).log10().floor().min(3.0) as usize };
    format!("{scaled:.digits$} {}{unit}", prefixes[power])
}

#[cfg(test)]
mod tests {
    use super::si;

    #[test]
    fn numbers_have_four_digits() {
        let shown = |v| si(v, "B");
        assert_eq!([shown(0.0), shown(999.0), shown(1000.0)], ["0 B", "999 B", "1.000 kB"]);
        assert_eq!([shown(12_345.0), shown(8.043e11), shown(1.5e15)], ["12.35 kB", "804.3 GB", "1.500 PB"]);
    }
}
