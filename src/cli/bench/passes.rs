//! `rldiff bench unet`, `rollout` and `update`: the three kinds of passes that training is made of, each repeated on
//! rotating inputs. Seconds, operations per second (model operations: what gradient checkpointing computes again does not
//! count), samples per second. `bench/compare.sh` sets the last two beside PyTorch with diffusers.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::{libtorch, median, rates::Rates};
use crate::{
    cli::{device_args::DeviceArgs, numbers::whole, Failure, OrMistake},
    comm::{nccl, Communicator},
    device::{self, stopwatch, threads::use_threads},
    diffusion::{
        recorded::RecordedUNet,
        sampler::{self, Conditioning, Trajectory},
        schedule::{Schedule, Step},
    },
    kernels::adamw::AdamW,
    models::{
        architectures::Architecture,
        flat_parameters::FlatParameters,
        flops,
        folder::ModelFiles,
        pipeline::{Build, Pipeline},
    },
    policy::{
        gradient_sum::{GradientSum, Transport},
        lanes::Lanes,
        optimizer::Optimizer,
        surrogate::Objective,
        update::{lane_objective, LaneBatch},
    },
    random::{self, Coordinates, Purpose},
    run::model_location,
};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    device: DeviceArgs,
    /// `miniature`, or a diffusers folder.
    #[arg(long, default_value = "miniature", value_name = "DIR", conflicts_with = "architecture")]
    model: PathBuf,
    /// Random weights of a published architecture instead.
    #[arg(long, value_enum)]
    architecture: Option<Architecture>,
    /// Samples of a pass, each a guided pair.
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = whole::<usize>(1, 65_536))]
    samples: usize,
    /// DDIM steps of a roll-out.
    #[arg(long, default_value_t = 50, value_name = "N", value_parser = whole::<usize>(1, 1000))]
    steps: usize,
    /// The U-Net in bf16.
    #[arg(long)]
    bf16: bool,
    #[arg(long)]
    gradient_checkpointing: bool,
    /// The roll-out replays the U-Net's work as a CUDA graph.
    #[arg(long)]
    cuda_graph: bool,
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = whole::<usize>(0, 1_000_000))]
    warm_up: usize,
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = whole::<usize>(1, 1_000_000))]
    repeats: usize,
    /// libtorch's threads.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = whole::<usize>(1, 256))]
    threads: usize,
    /// Print one JSON object with every measured value.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pass {
    /// The U-Net's forward pass, without gradients.
    Unet,
    /// A whole roll-out with its log-probabilities.
    Rollout,
    /// The objective's gradient, summed over ranks, and the optimizer step.
    Update,
}

const GUIDANCE_SCALE: f64 = 7.0;

pub fn run(pass: Pass, args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    let device = args.device.choose(comm).or_mistake()?;
    let nccl = nccl::for_gradients(comm, device, Some(nccl::PATIENCE)).or_mistake()?;
    let comm = nccl.as_ref().map_or(comm, |nccl| nccl);
    if args.cuda_graph {
        device::ensure_gpu(device, "--cuda-graph").or_mistake()?;
    }
    use_threads(args.threads, comm).or_mistake()?;
    let bench = Bench::new(&args, comm, device).or_mistake()?;
    let measured = match pass {
        Pass::Unet => bench.measure(1.0, |i| {
            drop(tch::no_grad(|| bench.predict(i)));
            Ok(())
        })?,
        Pass::Rollout => bench.measure(1.0, |i| bench.roll_out(&bench.steps, i).map(drop))?,
        Pass::Update => bench.updates()?,
    };
    if comm.rank() == 0 {
        bench.report(pass, comm.size(), measured)?;
    }
    drop(bench);
    if let Some(nccl) = nccl {
        nccl.close();
    }
    Ok(())
}

struct Measured {
    /// Of every repeat.
    seconds: Vec<f64>,
    /// Of those before, which are not counted: kernels are compiled and graphs recorded in the first.
    warm_up: Vec<f64>,
    /// Operations of one.
    flop: f64,
    /// max |w − 1| before the first optimizer step, of updates.
    drift: Option<f64>,
}

struct Bench<'a> {
    args: &'a Args,
    comm: &'a dyn Communicator,
    device: Device,
    pipeline: Pipeline,
    steps: Vec<Step>,
    cond: Tensor,
    uncond: Tensor,
    starts: Vec<Tensor>,
    /// Where the roll-out replays CUDA graphs.
    recorded: Option<RecordedUNet>,
}

impl<'a> Bench<'a> {
    fn new(args: &'a Args, comm: &'a dyn Communicator, device: Device) -> Result<Self> {
        let how = Build {
            unet_kind: if args.bf16 { Kind::BFloat16 } else { Kind::Float },
            recomputed: args.gradient_checkpointing.into(),
            ..Build::default()
        };
        let pipeline = match args.architecture {
            Some(architecture) => Pipeline::seeded_with(architecture.files(), 1, device, how)?,
            None => {
                let name = args.model.to_str().context("--model is no UTF-8")?;
                Pipeline::with(ModelFiles::read_and_broadcast(&model_location(name), comm)?, device, how)?
            }
        };
        let schedule = Schedule::of_model(&pipeline.scheduler)?;
        let text = pipeline.embed(&["a portrait of a nurse", ""])?;
        let cond = text.narrow(0, 0, 1).expand([args.samples as i64, -1, -1], false);
        let uncond = text.narrow(0, 1, 1);
        let starts = (0..4).map(|repeat| Bench::draw_start(args, &pipeline, repeat)).collect();
        Ok(Bench {
            args,
            starts,
            comm,
            device,
            steps: schedule.steps(args.steps, 1.0)?,
            cond,
            uncond,
            recorded: args.cuda_graph.then(RecordedUNet::default),
            pipeline,
        })
    }

    fn conditioning(&self) -> Conditioning {
        Conditioning::new(&self.cond, &self.uncond, GUIDANCE_SCALE)
    }

    /// x_T of a repeat, drawn before any clock starts.
    fn start(&self, repeat: usize) -> Tensor {
        self.starts[repeat % self.starts.len()].shallow_clone()
    }

    fn draw_start(args: &Args, pipeline: &Pipeline, repeat: usize) -> Tensor {
        let at = Coordinates { iteration: repeat as u32, ..Coordinates::new(1, Purpose::InitialLatent) };
        random::normal_rows(at, 0, args.samples, &pipeline.latent_shape()).to_device(pipeline.device)
    }

    fn predict(&self, repeat: usize) -> Tensor {
        let x_t = self.start(repeat);
        self.conditioning().predict(&self.pipeline.unet, &x_t, self.steps[self.steps.len() / 2].t).eps_cond
    }

    fn roll_out(&self, steps: &[Step], repeat: usize) -> Result<Trajectory> {
        let x_t = self.start(repeat);
        let noise = |step: usize| Coordinates {
            iteration: repeat as u32,
            step: step as u16,
            ..Coordinates::new(1, Purpose::TransitionNoise)
        };
        sampler::roll_out(&self.pipeline.unet, self.recorded.as_ref(), steps, x_t, &self.conditioning(), noise)
    }

    fn updates(&self) -> Result<Measured> {
        let mut step = self.steps[self.steps.len() / 2];
        step.index = 0;
        let advantage: Vec<f32> = (0..self.args.samples).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
        let advantage = Tensor::from_slice(&advantage).to_device(self.device);
        let inputs = (0..2)
            .map(|repeat| {
                let (conditioning, trajectory) = (self.conditioning(), self.roll_out(&[step], repeat)?);
                Ok(LaneBatch { conditioning, trajectory, advantage: advantage.shallow_clone() })
            })
            .collect::<Result<Vec<_>>>()?;
        let mut params = FlatParameters::new(&[self.pipeline.trainable()])?;
        let mut optimizer = Optimizer::new(params.buffer(), AdamW::default(), None, 0);
        let lanes = Lanes::new(self.comm.size(), self.comm)?;
        let mut sum = GradientSum::new(&params, Transport::default())?;
        let objective = Objective { clip_range: 1e-4, weight: 1.0, samples: self.args.samples * self.comm.size() };
        let mut drift = None;
        let measured = self.measure(3.0, |repeat| {
            let batch = &inputs[repeat % inputs.len()];
            let gradient = lanes.sum_gradients(&mut sum, self.comm, |_| {
                let (value, seen) = lane_objective(&self.pipeline.unet, &step, batch, &objective)?;
                drift.get_or_insert(seen.ratio_drift);
                Ok(value)
            })?;
            optimizer.step(&mut params, &gradient)?;
            sum.recycle(gradient);
            Ok(())
        })?;
        Ok(Measured { drift, ..measured })
    }

    /// Seconds of every repeat after the warm-up; the operations are `factor` times those of the forward passes.
    fn measure(&self, factor: f64, mut work: impl FnMut(usize) -> Result<()>) -> Result<Measured> {
        let (mut seconds, mut warm_up, mut flop) = (Vec::new(), Vec::new(), 0.0);
        for repeat in 0..self.args.warm_up + self.args.repeats {
            let before = flops::counted();
            let took = stopwatch::seconds(self.device, || work(repeat))?;
            flop = factor * (flops::counted() - before) as f64;
            if repeat < self.args.warm_up { &mut warm_up } else { &mut seconds }.push(took);
        }
        Ok(Measured { seconds, warm_up, flop, drift: None })
    }

    fn report(&self, pass: Pass, ranks: usize, measured: Measured) -> Result<()> {
        let Measured { seconds, warm_up, flop, drift } = measured;
        let memory = libtorch::memory(self.device)?;
        let m = median(seconds.clone());
        let (samples, what) = (self.args.samples, format!("{pass:?}").to_lowercase());
        let (tflops, rate) = (flop / m / 1e12, samples as f64 / m);
        let kind = if self.args.bf16 { Kind::BFloat16 } else { Kind::Float };
        let rates = Rates::measure(self.device, kind)?;
        let utilisation = flop / m / rates.matrix;
        if self.args.json {
            let all = json!({
                "what": what, "device": format!("{:?}", self.device), "ranks": ranks, "samples": samples,
                "steps": self.args.steps, "bf16": self.args.bf16, "threads": self.args.threads, "seconds": seconds,
                "median_seconds": m, "tflop": flop / 1e12, "tflops": tflops, "samples_per_second": rate, "rates": rates.to_json(),
                "utilisation": utilisation, "ratio_drift": drift, "cuda_graph": self.args.cuda_graph,
                "gradient_checkpointing": self.args.gradient_checkpointing, "warm_up_seconds": warm_up, "memory": memory,
            });
            say!("{all}");
            return Ok(());
        }
        say!("{}", rates.describe());
        say!(
            "{what}: {m:.4} s for {samples} samples on each of {ranks} ranks, {rate:.2} samples/s, {tflops:.3} TFLOP/s per \
             rank, {}",
            rates.shares(flop / m)
        );
        if let Some(first) = warm_up.first() {
            say!("first: {first:.4} s");
        }
        say!("{}", libtorch::describe(&memory));
        if let Some(drift) = drift {
            say!("ratio drift before the first step: {drift:.1e}");
        }
        Ok(())
    }
}
