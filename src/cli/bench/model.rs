//! `rldiff bench model`: a whole model of random weights at its full size: built, saved, loaded again, one guided step
//! of a roll-out, one training step. What it takes in seconds, memory and operations.

use std::{path::PathBuf, time::Instant};

use anyhow::{ensure, Context, Result};
use clap::ValueEnum;
use serde_json::{json, Value};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use super::libtorch;
use crate::{
    cli::{numbers::whole, Failure, OrMistake},
    comm::{Communicator, Local},
    device::threads::use_threads,
    diffusion::{
        sampler::{self, Conditioning},
        schedule::Schedule,
    },
    kernels::adamw::AdamW,
    models::{
        architectures::Architecture,
        flat_parameters::FlatParameters,
        flops,
        folder::{ModelFiles, ModelLocation},
        lora::LoraSettings,
        parameters::Source,
        pipeline::{Build, Pipeline},
        weights::tensor_bytes,
    },
    policy::{
        gradient_sum::{GradientSum, Transport},
        lanes::Lanes,
        optimizer::Optimizer,
        surrogate::Objective,
        update::{lane_objective, LaneBatch},
    },
    random::{self, Coordinates, Purpose},
};

#[derive(clap::Args)]
pub struct Args {
    /// The model to build.
    #[arg(long, value_enum, default_value_t = Architecture::Sd2Base)]
    architecture: Architecture,
    /// Folder for the saved model (5 GB for sd2-base); must not exist, and stays.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// What the U-Net computes in.
    #[arg(long, value_enum, default_value_t = Compute::F32)]
    compute: Compute,
    /// Train low-rank adapters of this rank instead of the U-Net; 0 trains the U-Net.
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = whole::<i64>(0, 4096))]
    lora: i64,
    /// Keep all activations instead of computing them again.
    #[arg(long)]
    no_gradient_checkpointing: bool,
    /// libtorch's threads.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = whole::<usize>(1, 256))]
    threads: usize,
    /// Samples of the step, each one a guided pair.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = whole::<usize>(1, 65_536))]
    samples: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Compute {
    F32,
    Bf16,
}

const SEED: u64 = 1;
const GUIDANCE_SCALE: f64 = 7.0;
/// Steps of the schedule; the one in the middle is done.
const STEPS: usize = 50;

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    if comm.rank() != 0 {
        return Ok(());
    }
    let free = || -> Result<()> {
        ensure!(!args.out.exists(), "{} exists already", args.out.display());
        Ok(())
    };
    free().or_mistake()?;
    use_threads(args.threads, comm).or_mistake()?;
    let report = measure(&args)?;
    say!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}

fn measure(args: &Args) -> Result<Value> {
    let mut report = json!({
        "architecture": args.architecture.to_string(), "compute": format!("{:?}", args.compute).to_lowercase(),
        "lora_rank": args.lora, "gradient_checkpointing": !args.no_gradient_checkpointing, "threads": args.threads,
        "samples": args.samples,
    });
    let mut note = |key: &str, value: Value| {
        log::info!("{key}: {value}");
        report[key] = value;
    };

    let started = Instant::now();
    let built = Pipeline::seeded(args.architecture.files(), SEED, Device::Cpu)?;
    note("build_seconds", json!(started.elapsed().as_secs_f64()));
    let parameters = [&built.unet_parameters, &built.text_parameters, &built.vae_parameters].map(|p| p.count());
    note("parameters", json!({"unet": parameters[0], "text_encoder": parameters[1], "vae": parameters[2]}));
    let digest = weights_digest(&built)?;
    let started = Instant::now();
    built.save(&args.out, Kind::Float, None)?;
    note("save_seconds", json!(started.elapsed().as_secs_f64()));
    drop(built);

    let started = Instant::now();
    let files = ModelFiles::read(&ModelLocation::Disk(args.out.clone()))?;
    let loaded = Pipeline::from_files(files, Device::Cpu)?;
    note("load_seconds", json!(started.elapsed().as_secs_f64()));
    ensure!(weights_digest(&loaded)? == digest, "{}: the loaded weights are not those saved", args.out.display());
    note("loaded_weights_are_those_saved", json!(true));
    drop(loaded);

    let settings = LoraSettings {
        rank: args.lora,
        alpha: args.lora as f64,
        targets: ["to_q", "to_k", "to_v", "to_out.0"].map(String::from).to_vec(),
    };
    let how = Build {
        unet_kind: if args.compute == Compute::F32 { Kind::Float } else { Kind::BFloat16 },
        recomputed: (!args.no_gradient_checkpointing).into(),
        lora: (args.lora > 0).then_some((settings, Source::Seeded(SEED))),
        ..Build::default()
    };
    let files = ModelFiles::read(&ModelLocation::Disk(args.out.clone()))?;
    let pipeline = Pipeline::with(files, Device::Cpu, how)?;
    note("memory_loaded_gb", json!(libtorch::host_gb("VmRSS")?));
    steps(&pipeline, args, &mut note)?;
    note("peak_memory_gb", json!(libtorch::host_gb("VmHWM")?));
    Ok(report)
}

/// One guided step of a roll-out, decoding, and one training step on that step.
fn steps(pipeline: &Pipeline, args: &Args, note: &mut dyn FnMut(&str, Value)) -> Result<()> {
    let mut timed = |name: &str, work: &mut dyn FnMut() -> Result<()>, factor: f64| -> Result<()> {
        let (before, started) = (flops::counted(), Instant::now());
        work()?;
        let (seconds, tflop) = (started.elapsed().as_secs_f64(), factor * (flops::counted() - before) as f64 / 1e12);
        note(name, json!({"seconds": seconds, "tflop": tflop, "tflops": tflop / seconds}));
        Ok(())
    };
    let schedule = Schedule::of_model(&pipeline.scheduler)?;
    let mut step = schedule.steps(STEPS, 1.0)?[STEPS / 2];
    // the only step of this trajectory
    step.index = 0;
    let shape = pipeline.latent_shape();
    let noise = |purpose| random::normal_rows(Coordinates::new(SEED, purpose), 0, args.samples, &shape);

    let mut text = None;
    let mut embed = || {
        text = Some(pipeline.embed(&["a portrait of a nurse", ""])?);
        Ok(())
    };
    timed("text", &mut embed, 1.0)?;
    let text = text.context("the texts were embedded")?;
    let cond = text.narrow(0, 0, 1).expand([args.samples as i64, -1, -1], false);
    let conditioning = Conditioning::new(&cond, &text.narrow(0, 1, 1), GUIDANCE_SCALE);
    let mut trajectory = None;
    timed(
        "guided_step",
        &mut || {
            let x_t = noise(Purpose::InitialLatent);
            let z = |_| noise(Purpose::TransitionNoise);
            trajectory = Some(sampler::roll_out(&pipeline.unet, None, &[step], x_t, &conditioning, z)?);
            Ok(())
        },
        1.0,
    )?;
    let trajectory = trajectory.context("the step was done")?;
    let kinds = [trajectory.x_0().kind(), trajectory.log_probs[0].as_ref().context("a step with noise")?.kind()];
    ensure!(kinds == [Kind::Float; 2], "latents and log-probabilities are {kinds:?}, not f32");
    let one = trajectory.x_0().narrow(0, 0, 1);
    let mut decode = || {
        drop(tch::no_grad(|| pipeline.vae.decode_scaled(&one)));
        Ok(())
    };
    timed("decode_one", &mut decode, 1.0)?;

    let mut params = FlatParameters::new(&[pipeline.trainable()])?;
    let mut optimizer = Optimizer::new(params.buffer(), AdamW::default(), None, 0);
    let (lanes, mut sum) = (Lanes::new(1, &Local)?, GradientSum::new(&params, Transport::default())?);
    let advantage: Vec<f32> = (0..args.samples).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
    let batch = LaneBatch { conditioning, trajectory, advantage: Tensor::from_slice(&advantage) };
    let objective = Objective { clip_range: 1e-4, weight: 1.0, samples: args.samples };
    let (mut drift, mut norm) = (f64::NAN, f64::NAN);
    timed(
        "training_step",
        &mut || {
            let gradient = lanes.sum_gradients(&mut sum, &Local, |_| {
                let (value, diagnostics) = lane_objective(&pipeline.unet, &step, &batch, &objective)?;
                drift = diagnostics.ratio_drift;
                Ok(value)
            })?;
            norm = optimizer.step(&mut params, &gradient)?;
            Ok(())
        },
        3.0,
    )?;
    note("ratio_drift", json!(drift));
    note("gradient_norm", json!(norm));
    ensure!(drift == 0.0 && norm.is_finite() && norm > 0.0, "ratio drift {drift}, gradient norm {norm}");
    Ok(())
}

/// SHA-256 over all weights, name by name.
fn weights_digest(pipeline: &Pipeline) -> Result<Vec<u8>> {
    let mut hash = Sha256::new();
    for parameters in [&pipeline.unet_parameters, &pipeline.text_parameters, &pipeline.vae_parameters] {
        for p in &parameters.entries {
            hash.update(p.name.as_bytes());
            hash.update(tensor_bytes(&p.tensor)?);
        }
    }
    Ok(hash.finalize().to_vec())
}
