//! `rldiff bench product`: a matrix product that goes on for seconds, at the clocks that the device's power then allows.
//! What other measurements reach is stated as a part of it.

use anyhow::Result;
use serde_json::json;
use tch::{Device, Kind};

use super::{
    libtorch,
    rates::{self, Product},
};
use crate::{
    cli::{device_args::DeviceArgs, numbers, numbers::whole, Failure, OrMistake},
    comm::Communicator,
    device::threads::use_threads,
};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    device: DeviceArgs,
    /// How long it goes on.
    #[arg(long, default_value_t = 10.0, value_name = "SECONDS", value_parser = numbers::number(0.0, 3600.0))]
    seconds: f64,
    /// Rows and columns; by default 8,192 on GPUs, 1,024 on CPUs.
    #[arg(long, value_name = "N", value_parser = whole::<i64>(1, 65_536))]
    side: Option<i64>,
    /// In bf16; else in f32 (without TF32).
    #[arg(long)]
    bf16: bool,
    /// libtorch's threads.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = whole::<usize>(1, 256))]
    threads: usize,
    /// Print one JSON object with every measured value.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    let device = args.device.choose(comm).or_mistake()?;
    use_threads(args.threads, comm).or_mistake()?;
    if comm.rank() > 0 {
        return Ok(());
    }
    report(&args, device)?;
    Ok(())
}

fn report(args: &Args, device: Device) -> Result<()> {
    let kind = if args.bf16 { Kind::BFloat16 } else { Kind::Float };
    let sustained = Product::new(device, kind, args.side).sustained(args.seconds)?;
    let seconds = sustained.seconds();
    let [whole, first, last] =
        [sustained.mean(), sustained.between(0.0, 1.0), sustained.between(seconds - 1.0, seconds)].map(|r| r / 1e12);
    let gpu = rates::gpu(device)?;
    let memory = libtorch::memory(device)?;
    let nominal = gpu.as_ref().and_then(|gpu| gpu.1).map(|n| n / 1e12);
    if args.json {
        let pieces: Vec<f64> =
            sustained.pieces.iter().map(|(took, n)| sustained.flop * *n as f64 / took / 1e12).collect();
        let all = json!({
            "what": "product", "device": format!("{device:?}"), "gpu": gpu.map(|gpu| gpu.0), "bf16": args.bf16,
            "seconds": seconds, "tflops": whole, "tflops_first_second": first, "tflops_last_second": last,
            "tflops_of_pieces": pieces, "nominal_tflops": nominal, "memory": memory,
        });
        say!("{all}");
        return Ok(());
    }
    let share = nominal.map_or(String::new(), |n| format!(", {:.1} % of nominal", 100.0 * whole / n));
    say!("matrix product for {seconds:.1} s: {whole:.3} TFLOP/s{share}; first second {first:.3}, last {last:.3}");
    Ok(())
}
