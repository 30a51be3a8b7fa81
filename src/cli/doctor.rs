//! `rldiff doctor`: what is in use, and does it work?

use std::path::PathBuf;

use anyhow::{anyhow, ensure, Context, Result};
use tch::{Device, Kind, Tensor};

use super::{device_args::DeviceArgs, Failure, OrMistake};
use crate::{
    comm::{agree, nccl, Communicator, DeviceVector, Local, Wire},
    device::{
        self, attention,
        parts::{self, loaded_library},
    },
    host, store,
};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    let mut report = Report { first: comm.rank() == 0, failed: Vec::new() };
    report.line("rldiff", crate::CODE_VERSION);
    // before the first tensor: it opens libtorch_cuda where there is a GPU
    let chosen = args.device.choose(comm).or_mistake()?;
    report.line("device", &device_name(chosen));
    report.line("waiting ranks", if comm.sleeps() { "sleep (more ranks than cores)" } else { "ask all the time" });
    report.line("libtorch", &library("libtorch_cpu"));
    report.line("MPI", &crate::comm::library_version());
    report.line("MPI library", &library("libmpi"));
    let (local, here) = comm.local_rank();
    report.line(
        "ranks",
        &format!("{} in all; this is {}, number {local} of {here} on its host", comm.size(), comm.rank()),
    );
    report.line("HDF5", &store::hdf5_version());
    report.line("cores", &std::thread::available_parallelism().map_or("unknown".into(), |n| n.to_string()));
    gpu_lines(&report, chosen);
    attention_line(&report, chosen);
    let mut slurm: Vec<String> =
        std::env::vars_os().map(|(k, v)| format!("{}={}", k.to_string_lossy(), v.to_string_lossy())).collect();
    slurm.retain(|variable| variable.starts_with("SLURM_"));
    slurm.sort();
    report.line("Slurm", if slurm.is_empty() { "not inside a job" } else { "" });
    slurm.iter().for_each(|v| report.line("", v));

    report.check("libtorch works", agree(comm, torch_works(Device::Cpu)));
    report.check("MPI works", mpi_works(comm));
    report.check("HDF5 works", agree(comm, hdf5_works()));
    if parts::nvrtc().is_ok() {
        report.check("NVRTC works", agree(comm, parts::nvrtc_works()));
    }
    if let Device::Cuda(index) = chosen {
        report.check("GPU works", agree(comm, torch_works(chosen)));
        if parts::open_nccl().is_ok() {
            let joined = match comm.size() {
                1 => nccl::Nccl::start(&Local, index, Some(nccl::PATIENCE)).map(Some),
                _ => nccl::for_gradients(comm, chosen, Some(nccl::PATIENCE)),
            };
            let worked = joined.and_then(|joined| nccl_works(joined.context("no communicator")?, chosen));
            report.check("NCCL works", agree(comm, worked));
        }
    }
    if !report.failed.is_empty() {
        return Err(anyhow!("not in order: {}", report.failed.join(", ")).into());
    }
    Ok(())
}

struct Report {
    first: bool,
    failed: Vec<String>,
}

impl Report {
    fn line(&self, name: &str, value: &str) {
        if self.first {
            say!("{name:<16} {value}");
        }
    }

    fn check(&mut self, name: &str, result: Result<()>) {
        match result {
            Ok(()) => self.line(name, "yes"),
            Err(e) => {
                self.line(name, &format!("NO: {e:#}"));
                self.failed.push(name.to_string());
            }
        }
    }
}

fn device_name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("GPU {index}"),
        _ => "CPU".to_string(),
    }
}

/// Path of a library that this process has loaded.
fn library(stem: &str) -> String {
    loaded_library(stem).unwrap_or("not loaded".into())
}

/// What a GPU needs: version and path of each part, or what is missing. Opening a part to ask changes nothing.
fn gpu_lines(report: &Report, chosen: Device) {
    let with_path = |version: Result<String>, stem: &str| match version {
        Ok(version) => format!("{version} ({})", library(stem)),
        Err(e) => format!("{e:#}"),
    };
    report.line("NVIDIA driver", &with_path(parts::driver_version().map(|v| format!("up to CUDA {v}")), "libcuda"));
    match parts::gpus() {
        Ok(gpus) => {
            for (i, gpu) in gpus.iter().enumerate() {
                let (major, minor) = gpu.compute_capability;
                let gigabytes = gpu.bytes as f64 / f64::from(1 << 30);
                report.line("", &format!("GPU {i}: {}, {gigabytes:.1} GiB, sm_{major}{minor}", gpu.name));
            }
        }
        Err(e) => report.line("GPUs", &format!("{e:#}")),
    }
    report.line("libtorch_cuda", &loaded_library("libtorch_cuda").unwrap_or_else(libtorch_cuda_on_disk));
    report.line("NVRTC", &with_path(parts::nvrtc_version(), "libnvrtc"));
    report.line("NCCL", &with_path(nccl::version(), "libnccl"));
    if chosen == Device::Cpu {
        return;
    }
    let version = attention::cudnn_version();
    if let Some(warning) = version.as_ref().ok().and_then(|&version| attention::cudnn_warning(version)) {
        report.line("", &format!("WARNING: {warning}"));
    }
    report.line("cuDNN", &with_path(version.map(attention::cudnn_in_words), "libcudnn"));
}

/// Which kernels compute attention, in the number types of `model.compute`.
fn attention_line(report: &Report, device: Device) {
    let of = |kind| {
        attention::backend(device, kind).unwrap_or_else(|e| {
            log::warn!("attention: {e:#}");
            "unknown"
        })
    };
    report.line("attention", &format!("{} (bf16), {} (f32)", of(Kind::BFloat16), of(Kind::Float)));
}

/// It is not opened without a GPU; is it there?
fn libtorch_cuda_on_disk() -> String {
    let beside = loaded_library("libtorch_cpu").map(|cpu| PathBuf::from(cpu).with_file_name("libtorch_cuda.so"));
    match beside.filter(|path| path.is_file()) {
        Some(path) => format!("not loaded ({})", path.display()),
        None => "not installed: this libtorch is for the CPU".into(),
    }
}

fn torch_works(device: Device) -> Result<()> {
    let x = Tensor::f_arange(6, (Kind::Float, device))?.view([2, 3]);
    let product = x.f_matmul(&x.transpose(0, 1))?.sum(Kind::Float).double_value(&[]);
    ensure!(product == 83.0, "a matrix product gave {product}, expected 83");
    Ok(())
}

fn mpi_works(comm: &dyn Communicator) -> Result<()> {
    let mut sum = [comm.rank() as f32 + 1.0];
    comm.all_reduce_sum_f32(&mut sum)?;
    let n = comm.size() as f32;
    ensure!(sum[0] == n * (n + 1.0) / 2.0, "a sum over {n} ranks gave {}", sum[0]);
    Ok(())
}

fn nccl_works(comm: nccl::Nccl, device: Device) -> Result<()> {
    let Device::Cuda(index) = device else { return Ok(()) };
    let values = Tensor::f_full([1000], comm.rank() as f64 + 1.0, (Kind::Float, device))?;
    let stream = device::current_stream(index)?;
    let address = values.data_ptr() as u64;
    comm.start_device_sum(DeviceVector { address, length: 1000, wire: Wire::F32, stream })?;
    comm.finish_device_sums(stream)?;
    let n = comm.size() as f64;
    let (wanted, got) = (1000.0 * n * (n + 1.0) / 2.0, values.f_sum(Kind::Float)?.double_value(&[]));
    ensure!(got == wanted, "a sum over {n} GPUs gave {got}, expected {wanted}");
    comm.close();
    Ok(())
}

fn hdf5_works() -> Result<()> {
    let folder = std::env::temp_dir().join(format!("rldiff-doctor-{}", host::process_mark()));
    std::fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let worked = store::round_trip(&folder).with_context(|| format!("in {}", folder.display()));
    // best effort: the folder is temporary
    let _ = std::fs::remove_dir_all(&folder);
    worked
}
