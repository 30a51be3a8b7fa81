//! `rldiff bench allreduce`: the sum of a gradient over the ranks, by bucket size and number type on the wire. On GPUs by
//! NCCL, on CPUs by MPI.

use anyhow::Result;
use half::bf16;
use serde_json::{json, Value};
use tch::{Device, Kind, Tensor};

use super::median;
use crate::{
    cli::{device_args::DeviceArgs, numbers::whole, Failure, OrMistake},
    comm::{
        nccl::{Nccl, PATIENCE},
        Communicator, DeviceVector, Wire,
    },
    device::{current_stream, stopwatch},
};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    device: DeviceArgs,
    /// Scalars of the gradient; by default SDv2's 866 million on GPUs, 4 million on CPUs.
    #[arg(long, value_name = "N", value_parser = whole::<usize>(1, 1 << 36))]
    parameters: Option<usize>,
    /// Sizes of a bucket in MiB of f32.
    #[arg(long, value_delimiter = ',', default_values_t = [4, 25, 100, 400], value_name = "MIB")]
    #[arg(value_parser = whole::<usize>(1, 65_536))]
    bucket_mib: Vec<usize>,
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = whole::<usize>(1, 1_000_000))]
    repeats: usize,
    /// Print one JSON object with every measured value instead of a table.
    #[arg(long)]
    json: bool,
}

struct Line {
    wire: &'static str,
    bucket_mib: usize,
    bytes: usize,
    seconds: Vec<f64>,
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    let device = args.device.choose(comm).or_mistake()?;
    let lines = match device {
        Device::Cuda(index) => by_nccl(&args, comm, index)?,
        _ => by_mpi(&args, comm)?,
    };
    if comm.rank() == 0 {
        report(&args, device, comm.size(), &lines);
    }
    Ok(())
}

/// Each bucket's ranges of `length` scalars.
fn buckets(length: usize, mib: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let size = mib << 18;
    (0..length).step_by(size).map(move |from| from..(from + size).min(length))
}

fn by_nccl(args: &Args, comm: &dyn Communicator, index: usize) -> Result<Vec<Line>> {
    let nccl = Nccl::start(comm, index, Some(PATIENCE))?;
    let (length, device) = (args.parameters.unwrap_or(865_910_724), Device::Cuda(index));
    let mut lines = Vec::new();
    for (wire, name, kind) in [(Wire::F32, "f32", Kind::Float), (Wire::Bf16, "bf16", Kind::BFloat16)] {
        let values = Tensor::zeros([length as i64], (kind, device));
        let width = kind.elt_size_in_bytes();
        for &bucket_mib in &args.bucket_mib {
            let sum = || {
                let stream = current_stream(index)?;
                for range in buckets(length, bucket_mib) {
                    let address = values.data_ptr() as u64 + (range.start * width) as u64;
                    nccl.start_device_sum(DeviceVector { address, length: range.len(), wire, stream })?;
                }
                nccl.finish_device_sums(stream)
            };
            let seconds = measure(args, comm, device, sum)?;
            lines.push(Line { wire: name, bucket_mib, bytes: length * width, seconds });
        }
    }
    nccl.close();
    Ok(lines)
}

fn by_mpi(args: &Args, comm: &dyn Communicator) -> Result<Vec<Line>> {
    let length = args.parameters.unwrap_or(4 << 20);
    let (mut wide, mut narrow) = (vec![0f32; length], vec![bf16::ZERO; length]);
    let mut lines = Vec::new();
    for &bucket_mib in &args.bucket_mib {
        let sum = || buckets(length, bucket_mib).try_for_each(|range| comm.all_reduce_sum_f32(&mut wide[range]));
        let seconds = measure(args, comm, Device::Cpu, sum)?;
        lines.push(Line { wire: "f32", bucket_mib, bytes: 4 * length, seconds });
        let sum = || buckets(length, bucket_mib).try_for_each(|range| comm.all_reduce_sum_bf16(&mut narrow[range]));
        let seconds = measure(args, comm, Device::Cpu, sum)?;
        lines.push(Line { wire: "bf16", bucket_mib, bytes: 2 * length, seconds });
    }
    Ok(lines)
}

/// Seconds of every repeat but the first, which the ranks begin together.
fn measure(
    args: &Args,
    comm: &dyn Communicator,
    device: Device,
    mut sum: impl FnMut() -> Result<()>,
) -> Result<Vec<f64>> {
    let mut seconds = Vec::new();
    for repeat in 0..=args.repeats {
        comm.barrier()?;
        let took = stopwatch::seconds(device, &mut sum)?;
        if repeat > 0 {
            seconds.push(took);
        }
    }
    Ok(seconds)
}

fn report(args: &Args, device: Device, ranks: usize, lines: &[Line]) {
    if args.json {
        let of = |line: &Line| {
            let Line { wire, bucket_mib, bytes, seconds } = line;
            json!({"wire": wire, "bucket_mib": bucket_mib, "bytes": bytes, "seconds": seconds})
        };
        let all: Vec<Value> = lines.iter().map(of).collect();
        let fastest: serde_json::Map<_, _> =
            fastest(lines).map(|line| (line.wire.to_string(), json!(line.bucket_mib))).collect();
        let device = format!("{device:?}");
        say!("{}", json!({"device": device, "ranks": ranks, "sums": all, "fastest_bucket_mib": fastest}));
        return;
    }
    say!("sum of a gradient over {ranks} ranks on {device:?}; bus rate: 2(n − 1)/n times its bytes per second");
    say!("{:<6} {:>11} {:>12} {:>10} {:>10}", "wire", "bucket MiB", "bytes", "seconds", "bus GB/s");
    for line in lines {
        let m = median(line.seconds.clone());
        let bus = 2.0 * (ranks - 1) as f64 / ranks as f64 * line.bytes as f64 / m;
        say!("{:<6} {:>11} {:>12} {m:>10.5} {:>10.2}", line.wire, line.bucket_mib, line.bytes, bus / 1e9);
    }
    let best: Vec<_> =
        fastest(lines).map(|line| format!("{} with comm.bucket_mb = {}", line.wire, line.bucket_mib)).collect();
    say!("fastest: {}", best.join(", "));
}

/// The line of each number type that took least time; of equals the smallest bucket, which leaves less to wait for after
/// a backward pass.
fn fastest(lines: &[Line]) -> impl Iterator<Item = &Line> {
    ["f32", "bf16"].into_iter().filter_map(|wire| {
        let of_wire = lines.iter().filter(|line| line.wire == wire);
        of_wire.min_by(|a, b| {
            let seconds = median(a.seconds.clone()).total_cmp(&median(b.seconds.clone()));
            seconds.then(a.bucket_mib.cmp(&b.bucket_mib))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_cover_everything_once() {
        let ranges: Vec<_> = buckets((2 << 18) + 5, 1).collect();
        assert_eq!(ranges, [0..1 << 18, 1 << 18..2 << 18, 2 << 18..(2 << 18) + 5]);
        assert_eq!(buckets(3, 1).next(), Some(0..3));
    }

    #[test]
    fn the_fastest_bucket_is_named_for_each_number_type() {
        let line = |wire, bucket_mib, seconds: &[f64]| Line { wire, bucket_mib, bytes: 8, seconds: seconds.to_vec() };
        let lines = [
            line("f32", 4, &[3.0]),
            line("f32", 25, &[2.0, 9.0, 2.0]),
            line("f32", 100, &[2.0]),
            line("bf16", 4, &[1.5]),
            line("bf16", 25, &[1.0]),
        ];
        assert_eq!(fastest(&lines).map(|l| (l.wire, l.bucket_mib)).collect::<Vec<_>>(), [("f32", 25), ("bf16", 25)]);
    }
}
