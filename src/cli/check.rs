//! `rldiff check`: is this config sound, and what follows from it?

use anyhow::{anyhow, Context, Result};
use tch::Device;

use super::{check_report::Report, config_args::ConfigArgs, eval, numbers::number, study, Failure, OrMistake};
use crate::{
    comm::{same_tree, Communicator, Local},
    config::{eval::is_evaluation, needs::Missing, study::is_study, Config, Graphs, StopCriterion},
    device::parts::gpus,
    diffusion::schedule::{Schedule, Step},
    methods,
    models::{architectures::Architecture, pipeline::Pipeline, recompute::Recomputed},
    pairs,
    policy::lanes::divisors,
    prompts::Split,
    run::{
        build_for,
        fit::{self, Decided, Room},
        footprint::{self, Setting},
        load_for_training, model_location,
    },
    task::Task,
    user_file,
};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Take the sizes from this published architecture, and leave the config's model closed. It is what a check does by
    /// itself, for sd2-base, where the model's folder is not on this machine.
    #[arg(long, value_enum)]
    architecture: Option<Architecture>,
    /// Check the settings and their arithmetic alone: no file of the config is looked for and no program started. For
    /// planning on another machine than the run's.
    #[arg(long)]
    without_files: bool,
    /// Memory of a GPU in GB (10⁹ bytes): does a rank fit?
    #[arg(long, default_value_t = 80.0, value_name = "GB", value_parser = number(1e-3, 1e6))]
    gpu_memory: f64,
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    let text = args.config.config.as_ref().and_then(|path| user_file::read_text(path).ok()).unwrap_or_default();
    let with_files = !args.without_files;
    // evaluations and studies are another kind of config
    let report = match &args.config.config {
        _ if comm.rank() != 0 && (is_evaluation(&text) || is_study(&text)) => return Ok(()),
        Some(path) if is_evaluation(&text) => eval::check(path, &args.config.set, with_files),
        Some(path) if is_study(&text) => match args.config.set.is_empty() {
            true => study::check(path, with_files),
            false => Err(anyhow!("--set changes runs and evaluations, {} is a study", path.display())),
        },
        _ => {
            let config = args.config.load(comm).or_mistake()?;
            if comm.rank() != 0 {
                return Ok(());
            }
            describe(&config, &args)
        }
    };
    let report = report.or_mistake()?;
    say!("{}", report.text());
    report.verdict().or_mistake()
}

fn describe(config: &Config, args: &Args) -> Result<Report> {
    let derived = config.validate()?;
    let with_files = !args.without_files;
    let mut report = Report::new(&config.run.name, with_files);
    if with_files && config.rollout.cuda_graph == Graphs::Fixed(true) {
        if let Err(e) = gpus() {
            let what = format!("true needs a GPU, and there is none here ({e:#})");
            report.missing.push(Missing { key: "rollout.cuda_graph".to_string(), what });
        }
    }
    let Some(Sizes { pipeline, is_own }) = sizes(config, args, &mut report)? else { return Ok(report) };
    let own = is_own.then_some(&pipeline);
    if let (None, None) = (own, report.closed) {
        report.closed = Some("its model was not opened");
    }
    report.line("method", config.method.name());
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
    for index in 0..config.tasks.len() {
        of_rewards += task_line(config, index, own, with_files, &mut report);
    }
    let pairs_here = with_files && report.look_for(&config.pair_needs());
    let pairs = own.filter(|_| pairs_here).map(|own| pairs::try_out(config, own));
    let pairs = pairs.map_or(Some("not looked at".to_string()), |pairs| report.keep(pairs));
    report.line("pretraining pairs", pairs.as_deref().unwrap_or("cannot be used"));
    report.line("samples per iteration", derived.samples_per_iteration.to_string());
    let optimizer_steps = derived.optimizer_steps_per_iteration;
    let in_all = optimizer_steps as u64 * config.run.iterations;
    let stop = config.stop.as_ref().filter(|stop| stop.criterion != StopCriterion::None);
    let in_all = if stop.is_some() { format!("at most {in_all}") } else { in_all.to_string() };
    report.line("optimizer steps", format!("{optimizer_steps} per iteration, {in_all} in all"));
    if let Some(stop) = &config.stop {
        let words = stop.in_words(config.run.iterations);
        report.line("stop", stop.without_effect(config.run.iterations).unwrap_or(words));
    }
    let Some(steps) = report.keep(steps(config, &pipeline)) else { return Ok(report) };
    let steps: Vec<String> = steps.iter().map(|s| format!("{} ({:.1})", s.t, s.sensitivity())).collect();
    report.line("timesteps (sensitivity)", steps.join(", "));
    report.line("numbers of ranks", ranks(config.run.lanes));
    footprint_lines(config, &pipeline, of_rewards, args.gpu_memory, &mut report)?;
    Ok(report)
}

/// The steps of a config that its method can train with.
fn steps(config: &Config, pipeline: &Pipeline) -> Result<Vec<Step>> {
    let steps = Schedule::of_model(&pipeline.scheduler)?.steps(config.rollout.steps, config.rollout.eta)?;
    methods::check_steps(config, &steps)?;
    Ok(steps)
}

/// Holds a config against its model, as a run does before it starts.
pub fn against(config: &Config, pipeline: &Pipeline, report: &mut Report, of: &str) {
    let tasks = (0..config.tasks.len()).map(|index| Task::ready(config, index, pipeline, &Local).map(drop));
    let checks = [steps(config, pipeline).map(drop), pairs::try_out(config, pipeline).map(drop)];
    for checked in checks.into_iter().chain(tasks) {
        report.keep(checked.with_context(|| of.to_string()));
    }
}

/// A task's line; gives the bytes of its reward's networks. Without `own` it is not held against the model.
fn task_line(config: &Config, index: usize, own: Option<&Pipeline>, with_files: bool, report: &mut Report) -> u64 {
    let task = &config.tasks[index];
    let use_ = match task.train {
        true => format!(
            "{} samples per iteration, {} per lane, {} prompts",
            task.samples,
            task.samples / config.run.lanes,
            task.samples / task.images_per_prompt
        ),
        false => "evaluated only".to_string(),
    };
    let alone = || {
        let mut built = Task::new(task, index, config.run.seed, Device::Cpu, &Local)?;
        methods::check_gradient(config, &mut built).map(|()| built)
    };
    let built = match own {
        _ if !with_files && !task.is_self_contained() => None,
        _ if !report.look_for(&task.needs()) => None,
        Some(own) => Some(Task::ready(config, index, own, &Local)),
        None => Some(alone()),
    };
    let (what, bytes) = match built.map(|built| report.keep(built)) {
        None => ("its prompts and reward were not looked at".to_string(), 0),
        Some(None) => ("cannot be used".to_string(), 0),
        Some(Some(task)) => {
            if let Some(own) = own {
                report.keep(task.warn_of_cut_prompts(own));
            }
            let (train, held_out) = (task.prompts.len(Split::Train), task.prompts.len(Split::HeldOut));
            (format!("{train} prompts to train on, {held_out} held out"), task.reward.weight_bytes())
        }
    };
    let line = format!("{use_}; {} evaluation samples; {what}", task.evaluation_samples);
    report.line(&format!("task {}", task.name), line);
    bytes
}

/// What the figures are of.
struct Sizes {
    pipeline: Pipeline,
    /// It is the config's model, and not an architecture without weights in its place.
    is_own: bool,
}

/// The config's model, or an architecture without weights; none where the model cannot be used.
fn sizes(config: &Config, args: &Args, report: &mut Report) -> Result<Option<Sizes>> {
    let path = &config.model.path;
    let need = config.model_need();
    let here = match &need {
        Some(need) => !args.without_files && report.look_for(std::slice::from_ref(need)),
        None => true,
    };
    let Some(architecture) = args.architecture.or((!here).then_some(Architecture::Sd2Base)) else {
        let model = model_location(path).origin()?;
        report.line("model", model);
        let pipeline = report.keep(load_for_training(config, &Local, Device::Cpu));
        if pipeline.is_none() {
            // no figure can be given, but all that is wrong
            report.look_for(&config.needs());
            report.verdict()?;
        }
        return Ok(pipeline.map(|pipeline| Sizes { pipeline, is_own: true }));
    };
    let pipeline = Pipeline::shapes_only(architecture.files(), Device::Cpu, build_for(config))
        .with_context(|| format!("--architecture {architecture}"))?;
    report.line("model", format!("{path}; sizes are those of {architecture}, without weights"));
    Ok(Some(Sizes { pipeline, is_own: false }))
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
    let room = Room { on_gpu: true, in_company: config.run.lanes > 1, bytes: (gpu_memory * 1e9) as u64, lanes: 1 };
    let Decided { choice, cost, memory: m, .. } = fit::decide(config, pipeline, of_rewards, &room)?;
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
    if fit::is_open(config) {
        report.line("on a GPU", fit::in_words(config, choice));
    }
    report.line("weights", bytes(m.weights));
    if of_rewards > 0 {
        report.line("weights of rewards", bytes(of_rewards));
    }
    report.line("optimizer", bytes(m.optimizer));
    report.line("gradients", bytes(m.gradients));
    let checkpointing = match choice.recomputed {
        Recomputed::Nothing => "without gradient checkpointing",
        Recomputed::Level0 => "with gradient checkpointing of level 0",
        Recomputed::Everything => "with gradient checkpointing",
    };
    report.line(
        "activations per lane",
        format!("update {} ({checkpointing}), roll-out {}", bytes(m.update), bytes(m.rollout)),
    );
    let graphs = if choice.graphs { format!("recorded steps {}, ", bytes(m.graphs)) } else { String::new() };
    report.line("libraries of a GPU", format!("{graphs}CUDA and NCCL about {}", bytes(m.libraries)));
    for (name, lanes) in [("one lane per rank", 1), ("all lanes on one rank", config.run.lanes)] {
        let setting = Setting { lanes, on_gpu: true, in_company: lanes < config.run.lanes, graphs: choice.graphs };
        let total = footprint::memory(config, pipeline, &cost, setting).total() + of_rewards;
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
