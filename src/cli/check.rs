//! `rldiff check`: is this config sound, and what follows from it?

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::{config_args::ConfigArgs, Failure, OrMistake};
use crate::{
    comm::{Communicator, Local},
    config::Config,
    models::flops,
    policy::lanes::divisors,
    run::load_for_training,
    train::Trainer,
};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    let config = args.config.load(comm).or_mistake()?;
    if comm.rank() == 0 {
        println!("{}", describe(&config).or_mistake()?);
    }
    Ok(())
}

fn describe(config: &Config) -> Result<String> {
    let derived = config.validate()?;
    // as one rank, whatever the number of ranks: this builds the model, the prompts and the rewards
    let trainer = Trainer::new(config, &Local, load_for_training(config, &Local)?)?;
    let pipeline = &trainer.pipeline;

    let mut lines = Vec::new();
    let mut line = |name: &str, value: String| lines.push(format!("{name:<26} {value}"));
    line("config", format!("{} is sound", config.run.name));
    line(
        "parameters",
        format!(
            "U-Net {}, text encoder {}, VAE {}",
            pipeline.unet_parameters.count(),
            pipeline.text_parameters.count(),
            pipeline.vae_parameters.count()
        ),
    );
    line("trained", format!("{} of them", pipeline.trainable().count()));
    for (index, task) in config.tasks.iter().enumerate() {
        let source = &trainer.tasks[index].prompts;
        let use_ = if task.train {
            format!(
                "{} samples per iteration, {} per lane, {} prompts",
                task.samples,
                task.samples / config.run.lanes,
                task.samples / task.images_per_prompt
            )
        } else {
            "evaluated only".to_string()
        };
        line(
            &format!("task {}", task.name),
            format!(
                "{use_}; {} prompts to train on, {} held out; {} evaluation samples",
                source.len(crate::prompts::Split::Train),
                source.len(crate::prompts::Split::HeldOut),
                task.evaluation_samples
            ),
        );
    }
    line("samples per iteration", derived.samples_per_iteration.to_string());
    line(
        "optimizer steps",
        format!(
            "{} per iteration, {} in all",
            trainer.optimizer_steps_per_iteration(),
            trainer.optimizer_steps_per_iteration() as u64 * config.run.iterations
        ),
    );
    let steps: Vec<String> = trainer.steps.iter().map(|s| format!("{} ({:.1})", s.t, s.sensitivity())).collect();
    line("timesteps (sensitivity)", steps.join(", "));
    line("numbers of ranks", divisors(config.run.lanes).map(|d| d.to_string()).collect::<Vec<_>>().join(", "));

    let unet_forward = unet_forward_flops(&trainer)?;
    line("U-Net forward", format!("{:.3} GFLOP per sample", unet_forward / 1e9));
    let cfg = if config.rollout.guidance_scale == 1.0 { 1.0 } else { 2.0 };
    let rollout = derived.samples_per_iteration as f64 * config.rollout.steps as f64 * cfg * unet_forward;
    let update = derived.samples_per_iteration as f64 * config.update.timesteps as f64 * cfg * 3.0 * unet_forward;
    line("U-Net work per iteration", format!("{:.3} TFLOP", (rollout + update) / 1e12));
    // f32 weights, two moments, gradient, the average, and the frozen networks
    let trained = pipeline.trainable().count() as f64;
    let copies = if config.ema.decay > 0.0 { 5.0 } else { 4.0 };
    let whole = [&pipeline.text_parameters, &pipeline.unet_parameters, &pipeline.vae_parameters];
    let all = whole.iter().map(|p| p.count()).sum::<u64>() as f64;
    let frozen = if pipeline.lora.is_some() { all } else { all - trained };
    line("weights and optimizer", format!("{:.3} GB per rank", (copies * trained + frozen) * 4.0 / 1e9));
    Ok(lines.join("\n"))
}

/// Measured by one forward pass at batch 1.
fn unet_forward_flops(trainer: &Trainer) -> Result<f64> {
    let pipeline = &trainer.pipeline;
    let _no_grad = tch::no_grad_guard();
    let [c, h, w] = pipeline.latent_shape();
    let text = pipeline.embed(&[""])?;
    let before = flops::counted();
    let x = Tensor::zeros([1, c, h, w], (Kind::Float, Device::Cpu));
    let t = Tensor::zeros([1], (Kind::Int64, Device::Cpu));
    let _ = pipeline.unet.forward(&x, &t, &text);
    Ok((flops::counted() - before) as f64)
}
