//! `rldiff bench kernels`: each CUDA kernel at the size that SDv2 gives it, in bytes per second and percent of the
//! device's measured copy rate. Where there is no GPU the plain references run at a small size.

use std::sync::Arc;

use anyhow::Result;
use serde_json::{json, Value};
use tch::{Device, Kind, Tensor};

use super::{libtorch, median, rates::Rates};
use crate::{
    cli::{device_args::DeviceArgs, numbers::whole, Failure, OrMistake},
    comm::Communicator,
    device::stopwatch,
    kernels::{
        adamw::{AdamW, Piece, Table},
        clipped_surrogate::{self, DeviceGradients, DeviceStored, Objective, TERMS},
        cuda::{Machine, Slice},
        ddim_step::{launch_draw, launch_score, DeviceInputs, StepScalars},
        geglu::geglu,
        group_norm_silu::group_norm_silu,
        layer_norm::layer_norm,
        normal_rows::Rows,
        on_device::{self, Stepped, Stepper},
        FlatBuffer,
    },
    models::layers::channels_last,
    random::{Coordinates, Purpose},
};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    device: DeviceArgs,
    /// Samples of a transition and rows of half as many guided pairs; SDv2's lane has 16.
    #[arg(long, value_name = "N", value_parser = whole::<i64>(1, 65_536))]
    samples: Option<i64>,
    /// Scalars of the optimizer step; SDv2's U-Net has 866 million.
    #[arg(long, value_name = "N", value_parser = whole::<i64>(1, 1 << 36))]
    parameters: Option<i64>,
    /// Launches of one measurement, on rotating inputs.
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = whole::<usize>(1, 1_000_000))]
    launches: usize,
    #[arg(long, default_value_t = 7, value_name = "N", value_parser = whole::<usize>(1, 1_000_000))]
    repeats: usize,
    /// Print one JSON object with every measured value instead of a table.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    let device = args.device.choose(comm).or_mistake()?;
    if comm.rank() > 0 {
        return Ok(());
    }
    let _no_grad = tch::no_grad_guard();
    let on_gpu = device != Device::Cpu;
    // what a transition of SDv2 holds, or a sixteenth of it
    let (latent, samples, parameters) =
        if on_gpu { ([4, 64, 64], 16, 865_910_724) } else { ([4, 16, 16], 8, 1_000_000) };
    let bench = Bench {
        device,
        rates: Rates::measure(device, if on_gpu { Kind::BFloat16 } else { Kind::Float })?,
        latent,
        samples: args.samples.unwrap_or(samples),
        parameters: args.parameters.unwrap_or(parameters),
        args: &args,
    };
    let mut lines = Vec::new();
    if on_gpu {
        on_device::prepare(device)?;
        let machine = on_device::machine(device)?;
        lines.extend(bench.transitions(&machine, bench.samples)?);
        // as many samples as fill the device
        lines.extend(bench.transitions(&machine, 16 * bench.samples)?);
        lines.extend(bench.optimizer(&machine)?);
    } else {
        lines.extend(bench.references()?);
    }
    lines.extend(bench.normalisation()?);
    lines.extend(bench.rows()?);
    lines.extend(bench.activation()?);
    bench.report(&lines)?;
    Ok(())
}

/// Sets of inputs that a measurement goes through in turn: together more than a GPU's cache holds.
const SETS: usize = 8;

/// Bytes that are used again and again and may stay in a GPU's cache (the largest have 50 to 126 MB): "of copy" means
/// nothing for them.
const IN_CACHE: i64 = 256 << 20;

const STEP: StepScalars = StepScalars { c_x: 1.013, c_eps: -0.0831, sigma: 0.112, guidance_scale: 7.0 };
const OBJECTIVE: Objective = Objective { clip_range: 1e-4, weight: 1.0, samples: 16 };

struct Bench<'a> {
    args: &'a Args,
    device: Device,
    rates: Rates,
    latent: [i64; 3],
    samples: i64,
    parameters: i64,
}

/// The first three fields of a set.
fn inputs<'a>(fields: &'a [Tensor], machine: &dyn Machine) -> Result<DeviceInputs<'a>> {
    let [eps_uncond, eps_cond, x_t] = [0, 1, 2].map(|i| Slice::of(&fields[i], machine));
    Ok(DeviceInputs { eps_uncond: eps_uncond?, eps_cond: eps_cond?, x_t: x_t? })
}

/// A measured operation.
struct Line {
    what: String,
    /// Bytes that have to move: every input read once, every output written once.
    bytes: f64,
    /// Of one launch, each repeat.
    seconds: Vec<f64>,
}

impl Bench<'_> {
    /// Seconds of one of `launches`; `work` gets the number of its set of inputs.
    fn time(&self, what: impl Into<String>, bytes: i64, mut work: impl FnMut(usize) -> Result<()>) -> Result<Line> {
        let launches = self.args.launches;
        let mut round = || (0..launches).try_for_each(|i| work(i % SETS));
        round()?;
        let seconds = (0..self.args.repeats)
            .map(|_| Ok(stopwatch::seconds(self.device, &mut round)? / launches as f64))
            .collect::<Result<_>>()?;
        Ok(Line { what: what.into(), bytes: bytes as f64, seconds })
    }

    fn normals(&self, size: &[i64]) -> Tensor {
        Tensor::randn(size, (Kind::Float, self.device))
    }

    /// A leaf, as in training.
    fn weight(&self, channels: i64, kind: Kind) -> Tensor {
        self.normals(&[channels]).to_kind(kind).set_requires_grad(true)
    }

    /// The transition and the objective, on outputs in f32 as the U-Net gives them.
    fn transitions(&self, machine: &Arc<dyn Machine>, samples: i64) -> Result<Vec<Line>> {
        let [c, h, w] = self.latent;
        let (size, elements) = ([samples, c, h, w], samples * c * h * w);
        // eps_uncond, eps_cond, x_t, x_prev, grad_uncond, grad_cond; log_prob, log_prob_old, advantage; terms
        let sets: Vec<(Vec<Tensor>, Vec<Tensor>, Tensor)> = (0..SETS)
            .map(|_| {
                let fields = (0..6).map(|_| self.normals(&size)).collect();
                let rows = (0..3).map(|_| self.normals(&[samples])).collect();
                (fields, rows, self.normals(&[samples * TERMS as i64]))
            })
            .collect();
        let machine = machine.as_ref();
        let first = Coordinates::new(1, Purpose::TransitionNoise);
        let name = |what: &str| format!("{what}, {samples} samples of {c}x{h}x{w}");
        let draw = self.time(name("ddim_step draw"), 16 * elements, |set| {
            let (fields, rows, _) = &sets[set];
            launch_draw(
                machine,
                &inputs(fields, machine)?,
                Rows { first },
                &STEP,
                Slice::of(&fields[3], machine)?,
                Slice::of(&rows[0], machine)?,
            )
        })?;
        let score = self.time(name("ddim_step score"), 16 * elements, |set| {
            let (fields, rows, _) = &sets[set];
            launch_score(
                machine,
                &inputs(fields, machine)?,
                Slice::of(&fields[3], machine)?,
                &STEP,
                Slice::of(&rows[0], machine)?,
            )
        })?;
        let surrogate = self.time(name("clipped_surrogate"), 24 * elements, |set| {
            let (fields, rows, terms) = &sets[set];
            let stored = DeviceStored {
                x_prev: Slice::of(&fields[3], machine)?,
                log_prob_old: Slice::of(&rows[0], machine)?,
                advantage: Slice::of(&rows[2], machine)?,
            };
            let out = DeviceGradients {
                terms: Slice::of(terms, machine)?,
                grad_uncond: Some(Slice::of(&fields[4], machine)?),
                grad_cond: Slice::of(&fields[5], machine)?,
            };
            clipped_surrogate::launch(machine, &inputs(fields, machine)?, &stored, &STEP, &OBJECTIVE, &out)
        })?;
        Ok(vec![draw, score, surrogate])
    }

    fn optimizer(&self, machine: &Arc<dyn Machine>) -> Result<Vec<Line>> {
        let n = self.parameters;
        let [param, grad, exp_avg, exp_avg_sq] = [0; 4].map(|_| self.normals(&[n]).abs_());
        let copy = Tensor::zeros([n], (Kind::BFloat16, self.device));
        let piece = Piece {
            param: Slice::of(&param, machine.as_ref())?,
            grad: Slice::of(&grad, machine.as_ref())?,
            exp_avg: Slice::of(&exp_avg, machine.as_ref())?,
            exp_avg_sq: Slice::of(&exp_avg_sq, machine.as_ref())?,
            copy: Some(Slice::of(&copy, machine.as_ref())?),
        };
        let table = Table::new(machine, &[piece])?;
        let settings = AdamW::default();
        let name = |what: &str, bytes: i64| {
            let place = if bytes < IN_CACHE { ", within the cache" } else { "" };
            format!("{what}, {} M parameters{place}", n / 1_000_000)
        };
        let step = self.time(name("adamw with bf16 copy", 18 * n), 30 * n, |_| table.step(&settings, 1, 1.0))?;
        let norm = self.time(name("gradient norm", 4 * n), 4 * n, |_| table.sum_of_squares().map(drop))?;
        Ok(vec![step, norm])
    }

    /// The plain implementations, which a run without a GPU uses.
    fn references(&self) -> Result<Vec<Line>> {
        let samples = self.samples as usize;
        let elements = samples * self.latent.iter().product::<i64>() as usize;
        let field = |i: u32| {
            let mut values = vec![0f32; elements];
            Coordinates { sample: i, ..Coordinates::new(1, Purpose::TransitionNoise) }
                .stream()
                .fill_normal(&mut values);
            values
        };
        let [eps_uncond, eps_cond, x_t, noise] = [0, 1, 2, 3].map(field);
        let (mut x_prev, mut log_prob) = (field(4), vec![0f32; samples]);
        let (mut grad_uncond, mut grad_cond, advantage) = (field(5), field(6), vec![1f32; samples]);
        let name = |what: &str| format!("{what} (reference), {samples} samples");
        let draw = self.time(name("ddim_step draw"), 20 * elements as i64, |_| {
            use crate::kernels::ddim_step::{reference, Given};
            reference(&eps_uncond, &eps_cond, &x_t, Given::Draw(&noise), &STEP, &mut x_prev, &mut log_prob)
        })?;
        let surrogate = self.time(name("clipped_surrogate"), 24 * elements as i64, |_| {
            clipped_surrogate::reference(
                &eps_uncond,
                &eps_cond,
                &x_t,
                &x_prev,
                &log_prob,
                &advantage,
                &STEP,
                &OBJECTIVE,
                &mut grad_uncond,
                &mut grad_cond,
            )
            .map(drop)
        })?;
        let n = self.parameters;
        let [mut param, grad, mut exp_avg, mut exp_avg_sq] =
            [0; 4].map(|_| FlatBuffer::from_slice(&vec![0.5f32; n as usize], self.device));
        let mut stepper = Stepper::default();
        let step = self.time(format!("adamw (reference), {n} parameters"), 28 * n, |_| {
            let stepped = Stepped {
                params: &mut param,
                copies: &[],
                grads: &grad,
                exp_avg: &mut exp_avg,
                exp_avg_sq: &mut exp_avg_sq,
            };
            stepper.step(stepped, &AdamW::default(), 1, 1.0)
        })?;
        Ok(vec![draw, surrogate, step])
    }

    /// Group normalisation with SiLU at three of the U-Net's sizes: ours, channels-last, beside libtorch's two operations
    /// on their own fast layout.
    fn normalisation(&self) -> Result<Vec<Line>> {
        let on_gpu = self.device != Device::Cpu;
        let kind = if on_gpu { Kind::BFloat16 } else { Kind::Float };
        let width = if on_gpu { 2 } else { 4 };
        let rows = 2 * self.samples;
        let shapes = if on_gpu { [[320, 64, 64], [640, 32, 32], [1280, 16, 16]] } else { [[32, 16, 16]; 3] };
        let mut lines = Vec::new();
        for [c, h, w] in shapes.into_iter().take(if on_gpu { 3 } else { 1 }) {
            let size = [rows, c, h, w];
            let elements: i64 = size.iter().product();
            let plain: Vec<Tensor> = (0..SETS).map(|_| self.normals(&size).to_kind(kind)).collect();
            let [weight, bias] = [0, 1].map(|_| self.weight(c, kind));
            let name = |what: &str| format!("{what}, {rows}x{c}x{h}x{w}");
            lines.push(self.time(name("group_norm and silu of libtorch"), 2 * width * elements, |set| {
                drop(plain[set].group_norm(32, Some(&weight), Some(&bias), 1e-5, true).silu());
                Ok(())
            })?);
            if !on_gpu {
                continue;
            }
            let ours: Vec<Tensor> = plain.iter().map(channels_last).collect();
            lines.push(self.time(name("group_norm_silu"), 2 * width * elements, |set| {
                group_norm_silu(&ours[set], None, &weight, &bias, 32, 1e-5, true).map(drop)
            })?);
            lines.push(self.both_passes(name("group_norm and silu of libtorch, both passes"), &plain, |x| {
                Ok(x.group_norm(32, Some(&weight), Some(&bias), 1e-5, true).silu())
            })?);
            lines.push(self.both_passes(name("group_norm_silu, both passes"), &ours, |x| {
                group_norm_silu(x, None, &weight, &bias, 32, 1e-5, true)
            })?);
        }
        Ok(lines)
    }

    /// Layer normalisation at three of the U-Net's sizes: ours beside libtorch's.
    fn rows(&self) -> Result<Vec<Line>> {
        let on_gpu = self.device != Device::Cpu;
        let kind = if on_gpu { Kind::BFloat16 } else { Kind::Float };
        let width = if on_gpu { 2 } else { 4 };
        let shapes = if on_gpu { [[4096, 320], [1024, 640], [256, 1280]] } else { [[256, 32]; 3] };
        let mut lines = Vec::new();
        for [tokens, channels] in shapes.into_iter().take(if on_gpu { 3 } else { 1 }) {
            let size = [2 * self.samples * tokens, channels];
            let bytes = 2 * width * size[0] * size[1];
            let rows: Vec<Tensor> = (0..SETS).map(|_| self.normals(&size).to_kind(kind)).collect();
            let [weight, bias] = [0, 1].map(|_| self.weight(channels, kind));
            let name = |what: &str| format!("{what}, {}x{channels}", size[0]);
            let of_libtorch = |x: &Tensor| Ok(x.layer_norm([channels], Some(&weight), Some(&bias), 1e-5, true));
            let ours = |x: &Tensor| layer_norm(x, &weight, &bias, 1e-5);
            lines.push(self.time(name("layer_norm of libtorch"), bytes, |set| of_libtorch(&rows[set]).map(drop))?);
            lines.push(self.both_passes(name("layer_norm of libtorch, both passes"), &rows, of_libtorch)?);
            if on_gpu {
                lines.push(self.time(name("layer_norm"), bytes, |set| ours(&rows[set]).map(drop))?);
                lines.push(self.both_passes(name("layer_norm, both passes"), &rows, ours)?);
            }
        }
        Ok(lines)
    }

    /// The gated activation at the U-Net's largest size: ours beside libtorch's two operations.
    fn activation(&self) -> Result<Vec<Line>> {
        if self.device == Device::Cpu {
            return Ok(Vec::new());
        }
        let size = [2 * self.samples * 4096, 2 * 1280];
        let hidden: Vec<Tensor> = (0..2).map(|_| self.normals(&size).to_kind(Kind::BFloat16)).collect();
        let name = |what: &str| format!("{what}, {}x{}", size[0], size[1]);
        let bytes = 3 * size[0] * size[1];
        let of_libtorch = |h: &Tensor| {
            let halves = h.chunk(2, -1);
            Ok(&halves[0] * halves[1].gelu("none"))
        };
        Ok(vec![
            self.time(name("gelu and product of libtorch"), bytes, |set| of_libtorch(&hidden[set % 2]).map(drop))?,
            self.time(name("geglu"), bytes, |set| geglu(&hidden[set % 2]).map(drop))?,
            self.both_passes(name("gelu and product of libtorch, both passes"), &hidden, of_libtorch)?,
            self.both_passes(name("geglu, both passes"), &hidden, geglu)?,
        ])
    }

    /// Forward, and backward from a given gradient, those of weights with it: x, y, dy and dx move, x twice.
    fn both_passes(&self, what: String, inputs: &[Tensor], f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Line> {
        let dy: Vec<Tensor> = inputs.iter().take(2).map(|x| Ok(f(x)?.randn_like())).collect::<Result<_>>()?;
        let width = inputs[0].kind().elt_size_in_bytes();
        let bytes = (width * (3 * inputs[0].numel() + 2 * dy[0].numel())) as i64;
        self.time(what, bytes, |set| {
            let leaf = inputs[set % inputs.len()].detach().set_requires_grad(true);
            tch::with_grad(|| libtorch::backward(&f(&leaf)?, &dy[set % dy.len()]))
        })
    }

    fn report(&self, lines: &[Line]) -> Result<()> {
        let memory = libtorch::memory(self.device)?;
        if self.args.json {
            let all: Vec<Value> = lines
                .iter()
                .map(|line| json!({"what": line.what, "bytes": line.bytes, "seconds": line.seconds}))
                .collect();
            let device = format!("{:?}", self.device);
            let rates = self.rates.to_json();
            say!("{}", json!({"device": device, "rates": rates, "kernels": all, "memory": memory}));
            return Ok(());
        }
        say!("{}", self.rates.describe());
        say!("{:<64} {:>10} {:>9} {:>8}", "operation", "µs", "GB/s", "of copy");
        for line in lines {
            let m = median(line.seconds.clone());
            let rate = line.bytes / m;
            say!("{:<64} {:>10.1} {:>9.1} {:>6.1} %", line.what, m * 1e6, rate / 1e9, 100.0 * rate / self.rates.copy);
        }
        say!("{}", libtorch::describe(&memory));
        Ok(())
    }
}
